// Readout forward and backward: every query gates the mean features of its group.

#include "cuda/channel_tile_sum.cuh"
#include "cuda/gates.cuh"
#include "cuda/reduce.cuh"

namespace pom::cuda {
namespace {

// Arguments of both kernels.
template <class Call>
struct KernelArgs {
  Call call;
  ChannelTiles channel_tiles;
  Pieces pieces;            // of the queries
  WorkPartition partition;  // set by the launch

  KernelArgs(const Call& call, Alignment alignment)
      : call(call), pieces(call.gates.tokens, chunk_shift(call.gates.tokens), call.groups, call.offsets) {
    const Gates& g = call.gates;
    const bool rotated = rotates_channels(g);
    const int vec = int(min(alignment.with(alignment_of(g, call.state)).vec(), rotated || g.tangent ? 4 : 8));
    channel_tiles = {g.channels, 1, rotated ? g.rotary : Rotary{}, vec, kLanes};
  }
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
__global__ void __launch_bounds__(kThreads, kForwardBlocks) readout_kernel(KernelArgs<ReadoutArgs> args) {
  using Acc = typename I::Acc;
  const int rows = kThreads / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const BlockIndex block(args.channel_tiles.count);
  const Place place = args.channel_tiles.place(block.tile, lane);
  const ReadoutArgs& call = args.call;
  const Gates& g = call.gates;
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
    const typename I::Rows y(call.y, b * g.tokens * g.channels, g.channels, place);
    const int64_t state_row = b * pieces.groups + run.group;
    Number<Acc, I::Tokens::kDual> mean[I::kNumbers];
    if constexpr (I::Tokens::kDual) {
      Acc primal[I::kNumbers], tangent[I::kNumbers] = {};
      load_mean<I::Vec, I::ranges>(call.state, state_row, g.channels, place, primal);
      if (call.tangent.total)
        load_mean<I::Vec, I::ranges>({call.tangent.total, call.tangent.residual, call.state.count}, state_row,
                                     g.channels, place, tangent);
      POM_UNROLL for (int i = 0; i < I::kNumbers; ++i)
        mean[i] = {primal[i], tangent[i]};
    } else {
      load_mean<I::Vec, I::ranges>(call.state, state_row, g.channels, place, mean);
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

template <class Acc>
struct BackwardKernelArgs : KernelArgs<ReadoutBackwardArgs> {
  Acc* mean_rows = nullptr;  // (batch, slots, C): gradient of the mean, a partial sum per piece
  // (batch, channel tiles), if a sample is one group; the last block then reduces it
  ArrivalCounter* arrival_counters = nullptr;
  HeadPartials<Acc> heads;
};

template <class Acc>
POM_HD ReduceArgs<Acc> reduce_args(const BackwardKernelArgs<Acc>& args) {
  const Gates& g = args.call.gates;
  ReduceArgs<Acc> reduce = {args.pieces, g.batch, g.channels, args.mean_rows};
  reduce.divisor = args.call.state.count;
  reduce.out.total = args.call.grad_total;
  return reduce;
}

template <class I>
constexpr int kBackwardBlocks = I::ranges == 2 && I::Tokens::kDual ? 1 : 2;  // minimum resident blocks per SM

// Each block goes through neighbouring pieces of one channel tile. It loads the first queries of the next piece while
// it adds this piece's gradient of the mean.
template <class I>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<I>)
    readout_backward_kernel(BackwardKernelArgs<typename I::Acc> args) {
  using Acc = typename I::Acc;
  POM_SHARED(memory);
  const int rows = kThreads / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const ReadoutBackwardArgs& call = args.call;
  const Pieces& pieces = args.pieces;
  const BlockIndex block(args.channel_tiles.count);
  const Place place = args.channel_tiles.place(block.tile, lane);
  const ChannelTileSum<Acc, I::Vec, I::ranges> out(args.channel_tiles, block.tile);
  const Gates& g = call.gates;
  const unsigned slots = unsigned(pieces.slots()), end = args.partition.first(block.row + 1);

  for (unsigned index = args.partition.first(block.row); index < end;) {
    const unsigned b = index / slots, sample_end = unsigned(min(end, (b + 1) * slots));
    const typename I::Tokens gates(g, b, place);
    const typename I::Rows dy(call.grad_y, b * call.grad_y_batch_stride, call.grad_y_token_stride, place);
    const typename I::Rows dgate(call.grad_gate, b * g.tokens * g.channels, g.channels, place);
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
        load_mean<I::Vec, I::ranges>(call.state, b * pieces.groups + group, g.channels, place, mean);
      group_of_mean = group;
      Acc dmean[I::kNumbers] = {};
      use_tokens<I::kBackwardUnroll>(token, last, rows, load, [&](int j, int64_t token) {
        Acc value[I::kNumbers], d[I::kNumbers];
        gates.value(token, raw[j], value);
        I::Rows::unpack(raw_dy[j], d);
        POM_UNROLL for (int i = 0; i < I::kNumbers; ++i) {
          dmean[i] += d[i] * value[i];
          value[i] = d[i] * mean[i];
        }
        if (g.heads > 1) {
          args.heads.template write<I::Vec, I::ranges>(value, place, 0xffffffffu, b * g.tokens + token);
        } else {
          gates.slope(token, raw[j], value);
          dgate.store(token, value);
        }
      });
      if (index + 1 < sample_end) begin(index + 1);
      out.sum(dmean, reinterpret_cast<Acc*>(memory), args.mean_rows + int64_t(index) * g.channels);
    }
  }
  if (args.arrival_counters)
    reduce_samples(reduce_args(args), args.partition, block, args.channel_tiles.count, out, args.arrival_counters);
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

template <class Acc, class Body>
Status with_gates(const Gates& g, int vec, Body body) {
  return with_dtype<Acc>(g.dtype, [&](auto type) {
    using T = decltype(type);
    return g.tangent ? with_gates_of<WithTangent<Sigmoid>, WithTangent<HardSigmoid>, T>(g, vec, body)
                     : with_gates_of<Sigmoid, HardSigmoid, T>(g, vec, body);
  });
}

template <class Acc>
struct ReadoutPlan {
  Arena arena;
  KernelArgs<ReadoutArgs> args;

  ReadoutPlan(const ReadoutArgs& call, void*)
      : args(call,
             Alignment(call.gates.dtype).pointers({call.y}).numbers({call.tangent.total, call.tangent.residual})) {}

  Status run(void* stream) {
    const Gates& g = args.call.gates;
    if (g.batch * g.tokens == 0) return Status::ok;
    if (const Status s = check_partition(g.batch, args.pieces); s != Status::ok) return s;
    return with_gates<Acc>(g, args.channel_tiles.vec, [&](auto instance) {
      args.partition =
          partition_work(unsigned(g.batch * args.pieces.slots()), args.channel_tiles.count, kForwardBlocks);
      return launch(readout_kernel<decltype(instance)>, int64_t(args.channel_tiles.count) * args.partition.blocks,
                    kThreads, 0, stream, args);
    });
  }
};

template <class Acc>
struct ReadoutBackwardPlan {
  Arena arena;
  BackwardKernelArgs<Acc> args;

  ReadoutBackwardPlan(const ReadoutBackwardArgs& call, void* workspace)
      : arena(workspace),
        args{{call, Alignment(call.gates.dtype)
                        .pointers({call.grad_y, call.grad_gate})
                        .sizes({call.grad_y_batch_stride, call.grad_y_token_stride})}} {
    const Gates& g = call.gates;
    args.mean_rows = arena.take<Acc>(g.batch * args.pieces.slots() * g.channels);
    if (call.groups == 1) args.arrival_counters = arena.take<ArrivalCounter>(g.batch * args.channel_tiles.count);
    args.heads = {g, args.channel_tiles, arena};
  }

  Status run(void* stream) {
    const ReadoutBackwardArgs& call = args.call;
    const Gates& g = call.gates;
    if (g.batch * call.groups == 0) return Status::ok;
    if (const Status s = check_partition(g.batch, args.pieces); s != Status::ok) return s;
    Status status = with_gates<Acc>(g, args.channel_tiles.vec, [&](auto instance) {
      using I = decltype(instance);
      args.partition =
          partition_work(unsigned(g.batch * args.pieces.slots()), args.channel_tiles.count, kBackwardBlocks<I>);
      return launch(readout_backward_kernel<I>, int64_t(args.channel_tiles.count) * args.partition.blocks, kThreads,
                    ChannelTileSum<Acc, I::Vec, I::ranges>::kBytes, stream, args);
    });
    if (status == Status::ok && call.groups > 1) status = reduce_groups(reduce_args(args), stream);
    return status == Status::ok ? reduce_head_partials(g, args.heads, call.grad_gate, stream) : status;
  }
};

}  // namespace

size_t workspace(const ReadoutArgs& args) { return planned_bytes<ReadoutPlan>(args, args.gates.dtype); }
size_t workspace(const ReadoutBackwardArgs& args) { return planned_bytes<ReadoutBackwardPlan>(args, args.gates.dtype); }

Status readout(const ReadoutArgs& args, void* workspace, size_t bytes, void* stream) {
  return run_plan<ReadoutPlan>(args, args.gates.dtype, workspace, bytes, stream);
}

Status readout_backward(const ReadoutBackwardArgs& args, void* workspace, size_t bytes, void* stream) {
  return run_plan<ReadoutBackwardPlan>(args, args.gates.dtype, workspace, bytes, stream);
}

}  // namespace pom::cuda
