// Walks of one warp through a chunk of tokens that carry a running sum: what the token-causal forward and backward
// share.
#pragma once

#include "cuda/gated.cuh"
#include "cuda/rows.cuh"
#include "cuda/sums.cuh"

namespace pom::cuda {

constexpr int kChunkShift = 5;
constexpr int64_t kChunk = 1 << kChunkShift;  // tokens of a chunk, as many as lanes: each minds the count of one
constexpr int kWalkThreads = 128;             // four chunks to a block
constexpr unsigned kAll = 0xffffffffu;

// What all walks know of the tokens before a chunk.
struct Walk {
  Features features;
  Gates gates;
  Slabs slabs;
  int64_t chunks = 0;
  StateView prior;
  const void* sums = nullptr;      // acc (batch, chunks, C): φ summed up to the end of each chunk, the prior included
  const double* counts = nullptr;  // (batch, chunks), likewise
};

// One chunk of one sample.
struct Chunk {
  int64_t b, number, begin, end;
  __device__ Chunk(const Walk& walk, unsigned index)
      : b(index / unsigned(walk.chunks)),
        number(index - unsigned(b) * unsigned(walk.chunks)),
        begin(number * kChunk),
        end(least(walk.features.tokens, begin + kChunk)) {}
};

// 1 / count behind token begin + lane, in that lane.
template <class Acc>
__device__ Acc inverse_counts(const Walk& walk, const Chunk& chunk, int lane) {
  const int64_t token = chunk.begin + lane;
  double count = 0;
  if (token < chunk.end)
    count = walk.features.weight
                ? double(static_cast<const Acc*>(walk.features.weight)[chunk.b * walk.features.tokens + token])
                : 1.0;
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const double earlier = __shfl_up_sync(kAll, count, apart);
    if (lane >= apart) count += earlier;
  }
  if (chunk.number)
    count += walk.counts[chunk.b * walk.chunks + chunk.number - 1];
  else if (walk.prior.count)
    count += walk.prior.count[chunk.b];
  return Acc(inverse(count));
}

// φ summed over all tokens before the chunk, at the thread's channels.
template <int Vec, int ranges, class Acc>
__device__ void load_base(const Walk& walk, const Chunk& chunk, const Place& place, Acc* base) {
  const int64_t channels = walk.features.channels();
  POM_UNROLL
  for (int i = 0; i < ranges * Vec; ++i) base[i] = Acc(0);
  if (chunk.number)
    load_row<Vec, ranges>(static_cast<const Acc*>(walk.sums) + (chunk.b * walk.chunks + chunk.number - 1) * channels,
                          place, base);
  else if (walk.prior.total)
    load_state<Vec, ranges>(walk.prior, chunk.b, channels, 1.0, place, base);
}

// Blocks of a multiprocessor at the least: fewer where a thread holds more numbers than a third of the registers.
template <class I>
constexpr int kWalkBlocks = FeatureTokens<I>::kNumbers > 16 || FeatureTokens<I>::kRanges > 3 ||
                                    (I::turned && sizeof(typename I::T) >= 4) || is_along<typename I::Form>
                                ? 2
                                : 3;

template <class I>
struct Walker {
  using Acc = typename I::Acc;
  using Tokens = FeatureTokens<I>;
  static constexpr int kRanges = Tokens::kRanges, kNumbers = Tokens::kNumbers;
  using Gates = GateTokens<typename GateOf<typename I::Form>::type, typename I::T, I::Vec, kRanges>;
  using Rows = typename Tokens::Rows;
};

// Sums in front of every chunk, which forward and backward share.
template <class Acc, class Args>
struct CausalPlan {
  Arena arena;
  Pieces rows;  // one for each chunk
  PieceSums<Acc> sums;
  Acc* totals;
  double* counts;
  Walk walk;

  // `others`: of what features, gates and the prior leave out.
  CausalPlan(const Args& args, const Alignment& others, void* workspace)
      : arena(workspace),
        rows(Pieces::rows(Pieces(args.features.tokens, kChunkShift, 1, nullptr).chunks)),
        sums(args.features, Pieces(args.features.tokens, kChunkShift, 1, nullptr), true, false, arena),
        totals(arena.take<Acc>(args.features.batch * rows.groups * args.features.channels())),
        counts(arena.take<double>(args.features.batch * rows.groups)) {
    const Features& f = args.features;
    const Alignment alignment = alignment_of(f).with(alignment_of(args.gates, args.prior)).with(others);
    const int vec = args.gates.tangent ? 1 : alignment.vec();
    walk = {f, args.gates, slabs_of(f, f.rotary, vec), rows.groups, args.prior, totals, counts};
  }

  Status prefix_sums(const StateOut& last, void* stream) const {
    const Features& f = walk.features;
    if (const Status s = sums.launch(stream); s != Status::ok) return s;
    Join<Acc> joined = {rows, f.batch, f.channels(), sums.rows, sums.weight_rows, walk.prior};
    joined.out = {totals, nullptr, counts};
    joined.last = last;
    return scan(joined, false, stream);
  }

  int64_t walk_blocks() const {
    return ceil_div(walk.features.batch * walk.chunks, kWalkThreads / kWarp) * walk.slabs.count;
  }

  template <class Body>
  Status with_walker(Body body) const {
    return with_instance(walk.features, walk.features.rotary.axes > 0, walk.slabs.vec, [&](auto instance) {
      using I = decltype(instance);
      if constexpr (std::is_same_v<typename I::Acc, Acc>) {
        if (!walk.gates.tangent) return body(instance);
        // These go one element at a time.
        if constexpr (I::Vec == 1 && !is_along<typename I::Form>)
          return body(Instance<GatesAlong<typename I::Form>, typename I::T, 1, I::turned>{});
      }
      return Status::bad_dtype;
    });
  }
};

}  // namespace pom::cuda
