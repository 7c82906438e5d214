// Whole-context mix, and the update of a running state. Short contexts take one launch: a block sums a tile of channels
// over all tokens and then gates it. Longer contexts take the kernels of state and readout.

#include "cuda/gates.cuh"
#include "cuda/partial_sums.cuh"
#include "cuda/reduce.cuh"

namespace pom::cuda {
namespace {

constexpr int kMixLanes = 4;               // narrow tiles, so that a single image has enough of them
constexpr int64_t kMaxFusedTokens = 1024;  // tokens that one block can take

// The output state may be the prior.
struct MixKernelArgs : MixArgs {
  uint32_t* arrival_counter = nullptr;
  ChannelTiles channel_tiles;
};
MixKernelArgs kernel_args(const MixArgs& args) { return {args}; }
MixKernelArgs kernel_args(const UpdateArgs& args) {
  return {{args.features, args.gates, args.state.view(), args.y, args.state}, args.arrival_counter};
}

template <class I>
__global__ void __launch_bounds__(kThreads, FeatureTokens<I>::kRanges > 3 ? 1 : 2) mix_kernel(MixKernelArgs args) {
  using Acc = typename I::Acc;
  using Tokens = FeatureTokens<I>;
  constexpr int kRanges = Tokens::kRanges, kNumbers = Tokens::kNumbers, kUnroll = kNumbers > 16 ? 1 : 2;
  using Gates = GateTokens<typename I::Form::Gate, typename I::T, I::Vec, kRanges>;
  POM_SHARED(memory);
  const int lanes = args.channel_tiles.lanes, thread = int(threadIdx.x), threads = int(blockDim.x);
  const int rows = threads / lanes, row = thread / lanes, lane = thread % lanes;
  double* const new_count = reinterpret_cast<double*>(memory);
  Acc* const numbers = reinterpret_cast<Acc*>(memory + 16);  // (numbers, lanes): sums, then means
  Acc* const scratch = numbers + kNumbers * lanes;

  const BlockIndex block(args.channel_tiles.count);
  const int64_t b = block.row;
  const Place place = args.channel_tiles.place(block.tile, lane);
  const Features& f = args.features;
  const Tokens tokens(f, b, place);

  // One thread for each number of the tile's state. The prior is in flight while the tokens are summed.
  const Place owned = args.channel_tiles.place(block.tile, thread % lanes);
  const int number = thread / lanes, range = number / I::Vec;
  const bool owns = number < kNumbers && range < owned.ranges;
  const int64_t at = b * f.channels() + owned.channel + range * owned.stride + number % I::Vec;
  Acc total = Acc(0), residual = Acc(0);
  if (owns && args.prior.total) {
    total = static_cast<const Acc*>(args.prior.total)[at];
    residual = static_cast<const Acc*>(args.prior.residual)[at];
  }

  Acc sum[kNumbers] = {};
  typename Tokens::Raw raw[kUnroll];
  for_tokens<kUnroll>(
      int64_t(row), f.tokens, rows, [&](int j, int64_t token) { tokens.load(token, raw[j]); },
      [&](int j, int64_t token) { tokens.add(token, raw[j], sum); });
  double count[1] = {thread == 0 && !f.weight ? double(f.tokens) : 0};
  if (f.weight) {
    for (int64_t token = thread; token < f.tokens; token += threads) count[0] += double(tokens.weights[token]);
    sum_rows(count, 1, reinterpret_cast<double*>(scratch));
    __syncthreads();
  }
  if (thread == 0) *new_count = count[0] + (args.prior.count ? args.prior.count[b] : 0.0);
  sum_rows(sum, lanes, scratch);
  __syncthreads();
  if (row == 0) {
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      numbers[i * lanes + lane] = sum[i];
  }
  __syncthreads();
  if (owns) {
    const double before = total, own = numbers[thread], scale = inverse(*new_count);
    split(before + own, rounded_off(before, own, before + own) + double(residual), total, residual);
    numbers[thread] = scale != 0 ? Acc((double(total) + double(residual)) * scale) : Acc(0);
  }
  __syncthreads();

  const Gates gates(args.gates, b, place);
  const typename Gates::Rows y(args.y, b * args.gates.tokens * f.channels(), f.channels(), place);
  Acc mean[kNumbers];
  POM_UNROLL for (int i = 0; i < kNumbers; ++i)
    mean[i] = i / I::Vec < place.ranges ? numbers[i * lanes + lane] : Acc(0);
  typename Gates::Raw raw_gates[kUnroll];
  for_tokens<kUnroll>(
      int64_t(row), args.gates.tokens, rows, [&](int j, int64_t token) { gates.load(token, raw_gates[j]); },
      [&](int j, int64_t token) {
        Acc value[kNumbers];
        gates.multiply(token, raw_gates[j], mean, value);
        y.store(token, value);
      });

  // The state is written last. The count belongs to all blocks: the last one writes it, when all others have read it.
  if (owns) {
    static_cast<Acc*>(args.out.total)[at] = total;
    static_cast<Acc*>(args.out.residual)[at] = residual;
  }
  if (thread != 0) return;
  if (!args.arrival_counter) {
    if (block.tile == 0) args.out.count[b] = *new_count;
    return;
  }
  __threadfence();
  if (atomicAdd(args.arrival_counter + b, 1u) + 1 == unsigned(args.channel_tiles.count)) {
    args.out.count[b] = *new_count;
    args.arrival_counter[b] = 0;
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    copy_state_kernel(StateView from, StateOut to, int64_t channels, int64_t batch) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < batch) to.count[i] = from.count[i];
  if (i >= batch * channels) return;
  static_cast<Acc*>(to.total)[i] = static_cast<const Acc*>(from.total)[i];
  static_cast<Acc*>(to.residual)[i] = static_cast<const Acc*>(from.residual)[i];
}

// Whether the context is short, and features and gates are rotated in the same pairs or one of them not at all.
bool fits_one_launch(const Features& f, const Gates& g) {
  const bool together =
      !f.rotary.axes || !rotates_channels(g) || (f.rotary.axes == g.rotary.axes && f.rotary.half == g.rotary.half);
  return f.tokens <= kMaxFusedTokens && g.tokens <= kMaxFusedTokens && together;
}

template <class Acc>
struct OneLaunchPlan {
  Arena arena;
  MixKernelArgs args;

  template <class Args>
  OneLaunchPlan(const Args& call, void*) : args(kernel_args(call)) {
    const Features& f = args.features;
    const Alignment alignment = alignment_of(f).with(alignment_of(args.gates, {})).pointers({args.y});
    const Rotary rotary = f.rotary.axes ? f.rotary : rotates_channels(args.gates) ? args.gates.rotary : Rotary{};
    args.channel_tiles = make_channel_tiles(f, rotary, alignment.vec(), kMixLanes);
  }

  Status run(void* stream) const {
    return with_instance<Acc, false>(args.features, args.channel_tiles, [&](auto instance) {
      using I = decltype(instance);
      constexpr int kNumbers = FeatureTokens<I>::kNumbers;
      const size_t scratch = max(kNumbers * sizeof(Acc), sizeof(double)) * kThreads / 2;
      return launch(mix_kernel<I>, int64_t(args.channel_tiles.count) * args.features.batch, kThreads,
                    16 + kNumbers * kMixLanes * sizeof(Acc) + scratch, stream, args);
    });
  }
};

// Workspace of a long context. The new state stays here until y is written.
template <class Acc>
struct LongContextPlan {
  Arena arena;
  MixKernelArgs args;
  PieceSums<Acc> sums;
  StateOut state;
  size_t readout_bytes;
  void* readout_memory;

  template <class Args>
  LongContextPlan(const Args& call, void* workspace)
      : arena(workspace),
        args(kernel_args(call)),
        sums(args.features, {args.features.tokens, chunk_shift(args.features.tokens), 1, nullptr}, true, arena) {
    const int64_t batch = args.features.batch, numbers = batch * args.features.channels();
    state = {arena.take<Acc>(numbers), arena.take<Acc>(numbers), arena.take<double>(batch)};
    readout_bytes = cuda::workspace(ReadoutArgs{args.gates, 1, nullptr, state.view()});
    readout_memory = arena.take<char>(readout_bytes);
  }

  Status run(void* stream) const {
    const Features& f = args.features;
    if (f.batch == 0) return Status::ok;
    // If the new state replaces the prior, the prior stays until y is written.
    const StateOut& to = args.out.total == args.prior.total ? state : args.out;
    if (const Status s = sums.launch(stream, args.prior, to); s != Status::ok) return s;
    const ReadoutArgs readout_args = {args.gates, 1, nullptr, to.view(), args.y};
    const Status read = readout(readout_args, readout_memory, readout_bytes, stream);
    if (read != Status::ok || to.total == args.out.total) return read;
    return launch(copy_state_kernel<Acc>, ceil_div(f.batch * f.channels(), kThreads), kThreads, 0, stream, to.view(),
                  args.out, f.channels(), f.batch);
  }
};

template <class Args>
size_t workspace_of(const Args& args) {
  return fits_one_launch(args.features, args.gates) ? Arena().used()
                                                    : planned_bytes<LongContextPlan>(args, args.features.dtype);
}

template <class Args>
Status run(const Args& args, void* workspace, size_t bytes, void* stream) {
  return fits_one_launch(args.features, args.gates)
             ? run_plan<OneLaunchPlan>(args, args.features.dtype, workspace, bytes, stream)
             : run_plan<LongContextPlan>(args, args.features.dtype, workspace, bytes, stream);
}

}  // namespace

size_t workspace(const MixArgs& args) { return workspace_of(args); }
size_t workspace(const UpdateArgs& args) { return workspace_of(args); }

Status mix(const MixArgs& args, void* workspace, size_t bytes, void* stream) {
  return run(args, workspace, bytes, stream);
}

Status update(const UpdateArgs& args, void* workspace, size_t bytes, void* stream) {
  if (args.features.batch > 0 && !args.arrival_counter) return Status::null_pointer;
  return run(args, workspace, bytes, stream);
}

}  // namespace pom::cuda
