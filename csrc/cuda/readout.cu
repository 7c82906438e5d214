// Readout forward and backward: every query gates the mean features of its group.

#include "cuda/channel_tile_sum.cuh"
#include "cuda/gates.cuh"
#include "cuda/reduce.cuh"

namespace pom::cuda {
namespace {

struct ForwardKernelArgs {
  Gates gates;
  ChannelTiles channel_tiles;
  Pieces pieces;  // of the queries
  WorkPartition partition;  // set by the launch
  StateView state;
  void* y = nullptr;
  StateView tangent;  // of the state; given only with a tangent of the gates
};

// An instance for gates: eight, four or one element per access, single channels or pairs.
template <class Gate_, class T_, int Vec_, bool rotated>
struct GateInstance {
  using Gate = Gate_;
  using T = T_;
  using Acc = typename accumulator<T>::type;
  static constexpr int Vec = Vec_, ranges = rotated ? 2 : 1, kNumbers = ranges * Vec;
  static constexpr int kUnroll = rotated ? 2 : 4;
  static constexpr int kBackwardUnroll = rotated && sizeof(T) == 4 ? 1 : kUnroll;  // registers are needed for gradients
  using Tokens = GateTokens<Gate, T, Vec, ranges>;
  using Rows = typename Tokens::Rows;
};

constexpr int kForwardBlocks = 2;  // minimum resident blocks per SM

// Each block goes through neighbouring pieces of one channel tile, pieces of one group in one loop.
template <class I>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) readout_kernel(ForwardKernelArgs args) {
  using Acc = typename I::Acc;
  const int rows = kThreads / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const BlockIndex block(args.channel_tiles.count);
  const Place place = args.channel_tiles.place(block.tile, lane);
  const Gates& g = args.gates;
  const Pieces& pieces = args.pieces;
  if (place.ranges == 0) return;

  const unsigned slots = unsigned(pieces.slots()), end = args.partition.first(block.row + 1);
  for (unsigned index = args.partition.first(block.row); index < end;) {
    const unsigned b = index / slots;
    const Piece run = pieces.at(index - b * slots);
    const int64_t last = pieces.last_of_run(index - b * slots, min(end - b * slots, slots) - 1, run.group);
    const int first = int(run.begin) + row, to = int(pieces.at(last, run.group).end);
    index = b * slots + unsigned(last) + 1;
    if (run.begin >= to) continue;
    const typename I::Tokens gates(g, b, place);
    const typename I::Rows y(args.y, b * g.tokens * g.channels, g.channels, place);
    const int64_t state_row = b * pieces.groups + run.group;
    Number<Acc, I::Tokens::kDual> mean[I::kNumbers];
    if constexpr (I::Tokens::kDual) {
      Acc primal[I::kNumbers], tangent[I::kNumbers] = {};
      load_mean<I::Vec, I::ranges>(args.state, state_row, g.channels, place, primal);
      if (args.tangent.total)
        load_mean<I::Vec, I::ranges>({args.tangent.total, args.tangent.residual, args.state.count}, state_row,
                                     g.channels, place, tangent);
      POM_UNROLL
      for (int i = 0; i < I::kNumbers; ++i) mean[i] = {primal[i], tangent[i]};
    } else {
      load_mean<I::Vec, I::ranges>(args.state, state_row, g.channels, place, mean);
    }
    typename I::Tokens::Raw raw[I::kUnroll];
    for_tokens<I::kUnroll>(
        first, to, rows, [&](int j, int64_t token) { gates.load(token, raw[j]); },
        [&](int j, int64_t token) {
          Acc value[I::kNumbers];
          gates.multiply(token, raw[j], mean, value);
          y.store(token, value);
        });
  }
}

struct BackwardKernelArgs {
  ForwardKernelArgs forward;
  const void* grad_y = nullptr;
  int64_t grad_y_batch_stride = 0, grad_y_token_stride = 0;
  void* grad_gate = nullptr;  // with one gate per channel
  void* mean_rows = nullptr;  // acc (batch, slots, C): gradient of the mean, a partial sum per piece
  ArrivalCounter* arrival_counters = nullptr;  // (batch, channel tiles), if a sample is one group; the last block then reduces it
  void* grad_total = nullptr;
  void* partials = nullptr;  // acc (batch, tokens, channels >> shift), if there are heads
  int partials_shift = 0;
  int64_t partials_per_token = 0;
};

template <class Acc>
POM_HD ReduceArgs<Acc> reduce_args(const BackwardKernelArgs& args) {
  const Gates& g = args.forward.gates;
  ReduceArgs<Acc> reduce = {args.forward.pieces, g.batch, g.channels, static_cast<const Acc*>(args.mean_rows)};
  reduce.divisor = args.forward.state.count;
  reduce.out.total = args.grad_total;
  return reduce;
}

template <class I>
constexpr int kBackwardBlocks = I::ranges == 2 && I::Tokens::kDual ? 1 : 2;  // minimum resident blocks per SM

// Each block goes through neighbouring pieces of one channel tile. It loads the first queries of the next piece while
// it adds this piece's gradient of the mean.
template <class I>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<I>) readout_backward_kernel(BackwardKernelArgs args) {
  using Acc = typename I::Acc;
  POM_SHARED(memory);
  const int rows = kThreads / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const ForwardKernelArgs& forward = args.forward;
  const Pieces& pieces = forward.pieces;
  const BlockIndex block(forward.channel_tiles.count);
  const Place place = forward.channel_tiles.place(block.tile, lane);
  const ChannelTileSum<Acc, I::Vec, I::ranges> out(forward.channel_tiles, block.tile);
  const Gates& g = forward.gates;
  Acc* const mean_rows = static_cast<Acc*>(args.mean_rows);
  const unsigned slots = unsigned(pieces.slots()), end = forward.partition.first(block.row + 1);

  for (unsigned index = forward.partition.first(block.row); index < end;) {
    const unsigned b = index / slots, sample_end = unsigned(min(end, (b + 1) * slots));
    const typename I::Tokens gates(g, b, place);
    const typename I::Rows dy(args.grad_y, b * args.grad_y_batch_stride, args.grad_y_token_stride, place);
    const typename I::Rows dgate(args.grad_gate, b * g.tokens * g.channels, g.channels, place);
    typename I::Tokens::Raw raw[I::kBackwardUnroll];
    typename I::Rows::Raw raw_dy[I::kBackwardUnroll];
    auto load = [&](int j, int64_t token) {
      gates.load(token, raw[j]);
      dy.load(token, raw_dy[j]);
    };
    int token, last, group = -1, group_of_mean = -1;  // 32 bits, to save registers
    Acc mean[I::kNumbers];
    auto begin = [&](unsigned index) {
      const Piece piece = pieces.at(index - b * slots);
      token = int(piece.begin) + row, last = int(piece.end), group = int(piece.group);
      load_tokens<I::kBackwardUnroll>(token, last, rows, load);
    };
    for (begin(index); index < sample_end; ++index) {
      if (group != group_of_mean)
        load_mean<I::Vec, I::ranges>(forward.state, b * pieces.groups + group, g.channels, place, mean);
      group_of_mean = group;
      Acc dmean[I::kNumbers] = {};
      use_tokens<I::kBackwardUnroll>(token, last, rows, load, [&](int j, int64_t token) {
        Acc value[I::kNumbers], d[I::kNumbers];
        gates.value(token, raw[j], value);
        I::Rows::unpack(raw_dy[j], d);
        POM_UNROLL
        for (int i = 0; i < I::kNumbers; ++i) {
          dmean[i] += d[i] * value[i];
          value[i] = d[i] * mean[i];
        }
        if (g.heads > 1) {
          write_head_partials<I::Vec, I::ranges>(
              value, place, args.partials_shift, 0xffffffffu,
              static_cast<Acc*>(args.partials) + (b * g.tokens + token) * args.partials_per_token);
        } else {
          gates.slope(token, raw[j], value);
          dgate.store(token, value);
        }
      });
      if (index + 1 < sample_end) begin(index + 1);
      out.sum(dmean, reinterpret_cast<Acc*>(memory), mean_rows + int64_t(index) * g.channels);
    }
  }
  if (args.arrival_counters)
    reduce_samples(reduce_args<Acc>(args), forward.partition, block, forward.channel_tiles.count, out, args.arrival_counters);
}

template <class S, class H, class T, class Body>
Status with_gates_of(const Gates& g, int vec, Body body) {
  return with_vec<widest_vec(sizeof(T), has_tangent<S>)>(vec, [&](auto elements) {
    constexpr int Vec = decltype(elements)::value;
    if (g.form == Form::product) return body(GateInstance<S, T, Vec, false>{});
    if constexpr (Vec <= widest_vec(sizeof(T), true))
      if (rotates_channels(g)) return body(GateInstance<H, T, Vec, true>{});
    return body(GateInstance<H, T, Vec, false>{});
  });
}

template <class Body>
Status with_gates(const ForwardKernelArgs& args, Body body) {
  const Gates& g = args.gates;
  return with_dtype(g.dtype, [&](auto type) {
    using T = decltype(type);
    return g.tangent ? with_gates_of<WithTangent<Sigmoid>, WithTangent<HardSigmoid>, T>(g, args.channel_tiles.vec, body)
                     : with_gates_of<Sigmoid, HardSigmoid, T>(g, args.channel_tiles.vec, body);
  });
}

ForwardKernelArgs make_args(const Gates& g, int64_t groups, const int64_t* offsets, const StateView& state,
                            const Alignment& alignment) {
  const bool rotated = rotates_channels(g);
  const int vec = int(min(alignment.vec(), rotated || g.tangent ? 4 : 8));
  return {g,
          {g.channels, 1, rotated ? g.rotary : Rotary{}, vec, kLanes},
          {g.tokens, chunk_shift(g.tokens), groups, offsets},
          {},
          state};
}

Status run(const ReadoutArgs& call, void* stream) {
  const Gates& g = call.gates;
  const Alignment alignment =
      alignment_of(g, call.state).pointers({call.y}).numbers({call.tangent.total, call.tangent.residual});
  ForwardKernelArgs args = make_args(g, call.groups, call.offsets, call.state, alignment);
  args.y = call.y;
  args.tangent = call.tangent;
  if (g.batch * g.tokens == 0) return Status::ok;
  if (const Status s = check_partition(g.batch, args.pieces); s != Status::ok) return s;
  return with_gates(args, [&](auto instance) {
    args.partition = partition_work(unsigned(g.batch * args.pieces.slots()), args.channel_tiles.count, kForwardBlocks);
    return launch(readout_kernel<decltype(instance)>, int64_t(args.channel_tiles.count) * args.partition.blocks,
                  kThreads, 0, stream, args);
  });
}

template <class Acc>
struct BackwardPlan {
  Arena arena;
  BackwardKernelArgs args;
  HeadPartials heads;

  BackwardPlan(const ReadoutBackwardArgs& call, void* workspace)
      : arena(workspace),
        args{make_args(call.gates, call.groups, call.offsets, call.state,
                       alignment_of(call.gates, call.state)
                           .pointers({call.grad_y, call.grad_gate})
                           .sizes({call.grad_y_batch_stride, call.grad_y_token_stride})),
             call.grad_y, call.grad_y_batch_stride, call.grad_y_token_stride, call.grad_gate},
        heads(call.gates, args.forward.channel_tiles) {
    const Gates& g = call.gates;
    args.mean_rows = arena.take<Acc>(g.batch * args.forward.pieces.slots() * g.channels);
    args.arrival_counters = call.groups == 1 ? arena.take<ArrivalCounter>(g.batch * args.forward.channel_tiles.count) : nullptr;
    args.grad_total = call.grad_total;
    args.partials = g.heads > 1 ? arena.take<Acc>(g.batch * g.tokens * heads.count) : nullptr;
    args.partials_shift = heads.shift;
    args.partials_per_token = heads.count;
  }
};

template <class Acc>
Status run(const ReadoutBackwardArgs& call, void* workspace, void* stream) {
  const BackwardPlan<Acc> plan(call, workspace);
  const Gates& g = call.gates;
  if (g.batch * call.groups == 0) return Status::ok;
  if (const Status s = check_partition(g.batch, plan.args.forward.pieces); s != Status::ok) return s;
  Status status = with_gates(plan.args.forward, [&](auto instance) {
    using I = decltype(instance);
    if constexpr (std::is_same_v<typename I::Acc, Acc>) {
      BackwardKernelArgs args = plan.args;
      ForwardKernelArgs& forward = args.forward;
      forward.partition =
          partition_work(unsigned(g.batch * forward.pieces.slots()), forward.channel_tiles.count, kBackwardBlocks<I>);
      return launch(readout_backward_kernel<I>, int64_t(forward.channel_tiles.count) * forward.partition.blocks,
                    kThreads, ChannelTileSum<Acc, I::Vec, I::ranges>::kBytes, stream, args);
    }
    return Status::bad_dtype;
  });
  if (status == Status::ok && call.groups > 1) status = reduce_groups(reduce_args<Acc>(plan.args), stream);
  if (status != Status::ok || g.heads == 1) return status;
  return reduce_head_partials(g, plan.heads, static_cast<const Acc*>(plan.args.partials), call.grad_gate, stream);
}

}  // namespace

size_t workspace(const ReadoutArgs&) { return Arena().used(); }

Status readout(const ReadoutArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.gates.dtype, workspace, bytes, [&](auto, void*) { return run(args, stream); });
}

size_t workspace(const ReadoutBackwardArgs& args) { return planned_bytes<BackwardPlan>(args, args.gates.dtype); }

Status readout_backward(const ReadoutBackwardArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.gates.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, stream); });
}

}  // namespace pom::cuda
