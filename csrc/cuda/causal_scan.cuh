// Shared by the forward and the backward of the token-causal mix: tiles of tokens that carry a running sum. The threads
// of a block form rows of a few lanes. Each row takes some consecutive tokens of the tile and saves them in shared
// memory until it knows the sum of all tokens before its own.
#pragma once

#include "cuda/gates.cuh"
#include "cuda/lookback.cuh"
#include "cuda/partial_sums.cuh"

namespace pom::cuda {

constexpr int kScanThreads = 128;

// Arguments of both kernels. Call: CausalArgs or CausalBackwardArgs.
template <class Call_, class Acc_>
struct ScanArgs {
  using Call = Call_;
  using Acc = Acc_;
  Call call;
  ChannelTiles channel_tiles;
  int64_t tiles = 1;
  double* counts = nullptr;  // (batch, tiles): prior and weights to each tile's end; null if all weights are 1
  Lookback<Acc> sums;

  // The prior count plus the weights of the `tokens` tokens before a tile.
  __device__ double count_before(int64_t b, int64_t tile, int64_t tokens) const {
    if (counts && tile > 0) return counts[b * tiles + tile - 1];
    return double(tokens) + (call.prior.count ? call.prior.count[b] : 0.0);
  }
};

// Minimum resident blocks per SM; a thread then has registers enough for its numbers.
template <class I>
constexpr int scan_blocks() {
  using Tokens = FeatureTokens<I>;
  constexpr bool wide = sizeof(typename I::T) >= 4;
  if (Tokens::kNumbers > 16 || Tokens::kRanges > 3 || (I::rotated && wide) || Tokens::kDual) return 2;
  return Tokens::kRanges > 1 || Tokens::kNumbers * (1 + Tokens::kCoeffs) > 32 ? 3 : 4;
}

// `sum` plus element `at` of the prior state, if there is one.
template <class Acc>
__device__ double with_prior(const StateView& prior, int64_t at, double sum) {
  const double remainder = add_prior<Acc>(prior, at, sum);
  return sum + remainder;
}

constexpr int next_power_of_two(int n) { return n <= 1 ? 1 : 2 * next_power_of_two((n + 1) / 2); }

// One tile of tokens and channels, as one thread sees it. For a backward it also saves numbers of each token.
template <class I, class Call>
class ScanTile {
 public:
  using Args = ScanArgs<Call, typename I::Acc>;
  using T = typename I::T;
  using Acc = typename I::Acc;
  using Tokens = FeatureTokens<I>;
  using Raw = typename Tokens::Raw;
  static constexpr int kRanges = Tokens::kRanges, kNumbers = Tokens::kNumbers;
  using Gates = GateTokens<typename I::Form::Gate, T, I::Vec, kRanges>;
  using Rows = typename Tokens::Rows;

  static constexpr bool saves_numbers = std::is_same_v<Call, CausalBackwardArgs>;
  // A token takes few contiguous bytes, so that a block holds many tokens; a thread owns one column at most.
  static constexpr int kContiguousBytes = saves_numbers || kRanges > 2 ? 64 : 128;
  // Without vectors a row of threads covers a sector of 32 bytes, if there are threads enough for its columns.
  static constexpr int kPaddedRanges = next_power_of_two(kRanges);
  static constexpr int kLanes =
      I::Vec > 1 ? kContiguousBytes / (I::Vec * int(sizeof(T)))
                 : int(max(kWarp / kPaddedRanges, min(kScanThreads / kPaddedRanges, 32 / int(sizeof(T)))));
  static constexpr int kRows = kScanThreads / kLanes, kColumns = kLanes * kNumbers;
  static_assert(kColumns <= kScanThreads);

 private:
  using Run = Packed<T, I::Vec>;  // of channels, as they are saved
  static constexpr int kRuns = Tokens::kDual ? 2 * kRanges : kRanges;
  static constexpr int kStep = sizeof(Acc) == 4 && kNumbers % 4 == 0 ? 4 : 1;
  using Numbers = Packed<Acc, kStep>;
  static constexpr int kStride = kColumns + kLanes;  // avoids bank conflicts between rows
  static constexpr size_t kRowBytes = sizeof(Acc) * kRows * kStride, kHead = 16;
  static constexpr size_t kTokenBytes =
      sizeof(Acc) + kLanes * (kRuns * sizeof(Run) + (saves_numbers ? kNumbers * sizeof(Acc) : 0));
  static constexpr size_t kMaxBytes = 60 << 10;  // of shared memory: three blocks fit on an SM of an H100
  // Tokens that a thread loads before it uses the first.
  static constexpr int kLoads = 8 >> (int(kNumbers > 8) + int(Tokens::kDual) + int(sizeof(Acc) == 8));

  static constexpr size_t bytes_of(int tokens) { return kHead + kRowBytes + tokens * kTokenBytes; }
  static constexpr int tokens_of(int most) {
    return most <= kRows || bytes_of(most) <= kMaxBytes ? most : tokens_of(most / 2);
  }
  static constexpr int shift_of(int tokens) { return tokens == 1 ? 0 : 1 + shift_of(tokens / 2); }

 public:
  static constexpr int kTile = tokens_of(int(min(256, 32 * kRows)));  // tokens; not many per row
  static_assert(kTile % kWarp == 0, "a warp finds the counts");
  static constexpr int kShift = shift_of(kTile), kOfRow = kTile / kRows;
  static constexpr size_t kBytes = bytes_of(kTile);  // of shared memory
  static_assert(kBytes <= 99 << 10, "more than a block may have on GPUs of compute capability 8.6, 8.9 and 12.0");

  const int64_t b, tile_begin;
  const int64_t begin, end;  // tokens of this thread's row
  const Place place;
  int64_t column = -1;  // whose sum this thread computes; -1 if it has none

  __device__ ScanTile(const Args& scan, const ScanStep& step, int64_t tile)
      : b(step.b),
        tile_begin(tile * kTile),
        begin(tile_begin + row() * kOfRow),
        end(min(scan.call.features.tokens, begin + kOfRow)),
        place(scan.channel_tiles.place(step.channel_tile, lane())) {
    const int number = int(threadIdx.x) / kLanes, range = number / I::Vec;
    const Place owned = scan.channel_tiles.place(step.channel_tile, int(threadIdx.x) % kLanes);
    if (number < kNumbers && range < owned.ranges) column = owned.channel + range * owned.stride + number % I::Vec;
  }

  static __device__ int row() { return int(threadIdx.x) / kLanes; }
  static __device__ int lane() { return int(threadIdx.x) % kLanes; }
  // Mask of the warp's lanes that belong to this thread's row.
  static __device__ unsigned lanes_of_row() {
    return (0xffffffffu >> (kWarp - kLanes)) << (int(threadIdx.x) % kWarp - lane());
  }

  // Σ x over the rows, for this thread's column. `x` holds the numbers of this thread.
  __device__ double sum_rows(const Acc (&x)[kNumbers]) const {
    __syncthreads();  // earlier contents have been read
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      row_sums()[row() * kStride + i * kLanes + lane()] = x[i];
    __syncthreads();
    double sum = 0;
    if (column >= 0)
      for (int r = 0; r < kRows; ++r) sum += double(row_sums()[r * kStride + threadIdx.x]);
    return sum;
  }
  // After sum_rows(): `before` plus the sums of all earlier rows (of all later rows if `backwards`), at this thread's
  // channels. `before` belongs to this thread's column.
  __device__ void sum_before_row(double before, bool backwards, Acc (&x)[kNumbers]) const {
    if (column >= 0)
      for (int i = 0; i < kRows; ++i) {
        Acc& at = row_sums()[(backwards ? kRows - 1 - i : i) * kStride + threadIdx.x];
        const double own = at;
        at = Acc(before);
        before += own;
      }
    __syncthreads();
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      x[i] = row_sums()[row() * kStride + i * kLanes + lane()];
  }

  // Stores 1 / count after each token of the tile. A later sum over the rows makes them visible to other threads.
  __device__ void store_inverse_counts(const Args& scan) const {
    const Features& f = scan.call.features;
    const double before = scan.count_before(b, tile_begin / kTile, tile_begin);
    if (!scan.counts) {
      for (int i = int(threadIdx.x); i < kTile; i += kScanThreads)
        inverse_counts()[i] = Acc(pom::inverse(before + double(i + 1)));
      return;
    }
    if (threadIdx.x >= kWarp) return;
    constexpr int kEach = kTile / kWarp;
    const int64_t first = tile_begin + int64_t(threadIdx.x) * kEach;
    const Acc* const weight = static_cast<const Acc*>(f.weight) + b * f.tokens;
    double sum = 0;
    for (int i = 0; i < kEach; ++i)
      if (first + i < f.tokens) sum += double(weight[first + i]);
    double count = sum;
    for (int apart = 1; apart < kWarp; apart *= 2) {
      const double earlier = __shfl_up_sync(0xffffffffu, count, apart);
      if (int(threadIdx.x) >= apart) count += earlier;
    }
    // Adds up only what lies before, and takes no difference: a NaN or a large weight must not reach earlier counts.
    count = __shfl_up_sync(0xffffffffu, count, 1);
    count = before + (threadIdx.x > 0 ? count : 0);
    for (int i = 0; i < kEach; ++i) {
      if (first + i < f.tokens) count += double(weight[first + i]);
      inverse_counts()[threadIdx.x * kEach + i] = Acc(pom::inverse(count));
    }
  }
  __device__ Acc inverse_count(int64_t token) const { return inverse_counts()[token - tile_begin]; }

  // Loads the tokens of this thread's row, saves them, and adds their features to `sum`.
  __device__ void load(const Tokens& tokens, Acc (&sum)[kNumbers]) const {
    Raw raw[kLoads];
    for_tokens<kLoads>(
        begin, end, 1, [&](int j, int64_t token) { tokens.load(token, raw[j]); },
        [&](int j, int64_t token) {
          save(token, raw[j]);
          tokens.add(token, raw[j], sum);
        });
  }
  // Reads a saved token, or saved numbers of it.
  __device__ void restore(const Tokens& tokens, int64_t token, Raw& raw) const {
    POM_UNROLL for (int r = 0; r < kRanges; ++r) {
      raw.primal[r] = run(token, r);
      if constexpr (Tokens::kDual) raw.tangent[r] = run(token, kRanges + r);
    }
    raw.weight = tokens.weight(token);
  }
  __device__ void save_numbers(int64_t token, const Acc (&x)[kNumbers]) const {
    POM_UNROLL for (int i = 0; i < kNumbers; i += kStep)
      saved(token, i / kStep).pack(x + i);
  }
  __device__ void restore_numbers(int64_t token, Acc (&x)[kNumbers]) const {
    POM_UNROLL for (int i = 0; i < kNumbers; i += kStep)
      saved(token, i / kStep).unpack(x + i);
  }

 private:
  __device__ void save(int64_t token, const Raw& raw) const {
    POM_UNROLL for (int r = 0; r < kRanges; ++r) {
      run(token, r) = raw.primal[r];
      if constexpr (Tokens::kDual) run(token, kRanges + r) = raw.tangent[r];
    }
  }
  static __device__ char* memory() {
    POM_SHARED(memory);
    return memory + kHead;  // claim_step() uses what lies before
  }
  static __device__ Acc* row_sums() { return reinterpret_cast<Acc*>(memory()); }
  static __device__ Acc* inverse_counts() { return reinterpret_cast<Acc*>(memory() + kRowBytes); }
  __device__ Run& run(int64_t token, int number) const {
    char* const runs = memory() + kRowBytes + kTile * sizeof(Acc);
    return reinterpret_cast<Run*>(runs)[(int(token - begin) * kRuns + number) * kScanThreads + threadIdx.x];
  }
  __device__ Numbers& saved(int64_t token, int number) const {
    char* const all = memory() + kRowBytes + kTile * (sizeof(Acc) + kLanes * kRuns * sizeof(Run));
    constexpr int kCount = kNumbers / kStep;
    return reinterpret_cast<Numbers*>(all)[(int(token - begin) * kCount + number) * kScanThreads + threadIdx.x];
  }
};

// Splits a call into tiles. Args begin with ScanArgs.
template <class Args>
struct ScanPlan {
  Arena arena;
  int shift = 0;  // a tile has 2^shift tokens
  Args scan;

  // `others`: alignment of all arguments but features and gates.
  ScanPlan(const typename Args::Call& call, const Alignment& others, void* workspace) : arena(workspace), scan{{call}} {
    const Features& f = call.features;
    const int vec = call.gates.tangent ? 1 : alignment_of(f).with(alignment_of(call.gates, {})).with(others).vec();
    scan.channel_tiles = make_channel_tiles(f, f.rotary, vec);
    with_scan_instance([&](auto instance) {
      using W = ScanTile<decltype(instance), typename Args::Call>;
      shift = W::kShift;
      scan.channel_tiles = make_channel_tiles(f, f.rotary, vec, W::kLanes);
      return Status::ok;
    });
    scan.tiles = max(1, ceil_div(f.tokens, int64_t(1) << shift));
    scan.sums = {f.batch, scan.tiles, scan.channel_tiles.count, f.channels(), arena};
  }

  template <class Body>
  Status with_scan_instance(Body body) const {
    return with_instance<typename Args::Acc>(scan.call.features, scan.channel_tiles, [&](auto instance) {
      using I = decltype(instance);
      if (!scan.call.gates.tangent) return body(instance);
      // A tangent of the gates has only instances of one element at a time.
      if constexpr (I::Vec == 1 && !has_tangent<typename I::Form>)
        return body(Instance<WithGateTangent<typename I::Form>, typename I::T, 1, I::rotated>{});
      return Status::bad_dtype;
    });
  }
};

}  // namespace pom::cuda
