// Readout forward and backward: every query token gates the mean features of its group.

#include "cuda/channel_tile_sum.cuh"
#include "cuda/gates.cuh"
#include "cuda/reduce.cuh"

namespace pom::cuda {
namespace {

struct Readout {
  Gates gates;
  Slabs slabs;
  Pieces pieces;  // of the queries
  Deal deal;      // set by the launch
  StateView state;
  void* y = nullptr;
  StateView tangent;  // of the state, beside one of the gates
};

// The gates of an instance: eight, four or one at once, pairs of channels or single ones.
template <class Gate_, class T_, int Vec_, bool turned>
struct GateInstance {
  using Gate = Gate_;
  using T = T_;
  using Acc = typename accumulator<T>::type;
  static constexpr int Vec = Vec_, ranges = turned ? 2 : 1, kNumbers = ranges * Vec;
  static constexpr int kUnroll = turned ? 2 : 4;
  static constexpr int kSlopeUnroll = turned && sizeof(T) == 4 ? 1 : kUnroll;  // in the registers gradients leave
  using Tokens = GateTokens<Gate, T, Vec, ranges>;
  using Rows = typename Tokens::Rows;
};

constexpr int kMeanBlocks = 2;  // of a multiprocessor at the least

// Each block walks through neighbouring pieces of one slab, those of one group without a stop.
template <class I>
__global__ void __launch_bounds__(kThreads, kMeanBlocks) gate_means(Readout args) {
  using Acc = typename I::Acc;
  const int rows = kThreads / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const BlockIndex block(args.slabs.count);
  const Place place = args.slabs.place(block.slab, lane);
  const Gates& g = args.gates;
  const Pieces& pieces = args.pieces;
  if (place.ranges == 0) return;

  const unsigned slots = unsigned(pieces.slots()), end = args.deal.first(block.row + 1);
  for (unsigned index = args.deal.first(block.row); index < end;) {
    const unsigned b = index / slots;
    const Piece run = pieces.at(index - b * slots);
    const int64_t last = pieces.last_of_run(index - b * slots, least(end - b * slots, slots) - 1, run.group);
    const int first = int(run.begin) + row, to = int(pieces.at(last, run.group).end);
    index = b * slots + unsigned(last) + 1;
    if (run.begin >= to) continue;
    const typename I::Tokens gates(g, b, place);
    const typename I::Rows y(args.y, b * g.tokens * g.channels, g.channels, place);
    const int64_t state_row = b * pieces.groups + run.group;
    Number<Acc, I::Tokens::along> mean[I::kNumbers];
    if constexpr (I::Tokens::along) {
      Acc at[I::kNumbers], along[I::kNumbers] = {};
      load_mean<I::Vec, I::ranges>(args.state, state_row, g.channels, place, at);
      if (args.tangent.total)
        load_mean<I::Vec, I::ranges>({args.tangent.total, args.tangent.residual, args.state.count}, state_row,
                                     g.channels, place, along);
      POM_UNROLL
      for (int i = 0; i < I::kNumbers; ++i) mean[i] = {at[i], along[i]};
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

struct ReadoutBackward {
  Readout forward;
  const void* grad_y = nullptr;
  int64_t grad_y_batch_stride = 0, grad_y_token_stride = 0;
  void* grad_gate = nullptr;  // with a gate per channel
  void* mean_rows = nullptr;  // acc (batch, slots, C): gradient of the mean, a part from every piece
  Ticket* tickets = nullptr;  // (batch, slabs), where a sample is one group, whose rows are then joined at once
  void* grad_total = nullptr;
  void* parts = nullptr;      // acc (batch, tokens, channels >> shift), with heads
  int parts_shift = 0;
  int64_t parts_of_token = 0;
};

template <class Acc>
POM_HD Join<Acc> join_of(const ReadoutBackward& args) {
  const Gates& g = args.forward.gates;
  Join<Acc> join = {args.forward.pieces, g.batch, g.channels, static_cast<const Acc*>(args.mean_rows)};
  join.divisor = args.forward.state.count;
  join.out.total = args.grad_total;
  return join;
}

template <class I>
constexpr int kGateSlopeBlocks = I::ranges == 2 && I::Tokens::along ? 1 : 2;  // of a multiprocessor at the least

// Each block walks through neighbouring pieces of one slab. The first queries of the next piece are on their way while
// what this one sends back to the mean is added up.
template <class I>
__global__ void __launch_bounds__(kThreads, kGateSlopeBlocks<I>) gate_slopes(ReadoutBackward args) {
  using Acc = typename I::Acc;
  POM_SHARED(memory);
  const int rows = kThreads / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const Readout& forward = args.forward;
  const Pieces& pieces = forward.pieces;
  const BlockIndex block(forward.slabs.count);
  const Place place = forward.slabs.place(block.slab, lane);
  const SlabRow<Acc, I::Vec, I::ranges> out(forward.slabs, block.slab);
  const Gates& g = forward.gates;
  Acc* const mean_rows = static_cast<Acc*>(args.mean_rows);
  const unsigned slots = unsigned(pieces.slots()), end = forward.deal.first(block.row + 1);

  for (unsigned index = forward.deal.first(block.row); index < end;) {
    const unsigned b = index / slots, behind = unsigned(least(end, (b + 1) * slots));
    const typename I::Tokens gates(g, b, place);
    const typename I::Rows dy(args.grad_y, b * args.grad_y_batch_stride, args.grad_y_token_stride, place);
    const typename I::Rows dgate(args.grad_gate, b * g.tokens * g.channels, g.channels, place);
    typename I::Tokens::Raw raw[I::kSlopeUnroll];
    typename I::Rows::Raw raw_dy[I::kSlopeUnroll];
    auto load = [&](int j, int64_t token) {
      gates.load(token, raw[j]);
      dy.load(token, raw_dy[j]);
    };
    int token, last, group = -1, group_of_mean = -1;  // in 32 bits: these live beside all of a thread's numbers
    Acc mean[I::kNumbers];
    auto begin = [&](unsigned index) {
      const Piece piece = pieces.at(index - b * slots);
      token = int(piece.begin) + row, last = int(piece.end), group = int(piece.group);
      load_tokens<I::kSlopeUnroll>(token, last, rows, load);
    };
    for (begin(index); index < behind; ++index) {
      if (group != group_of_mean)
        load_mean<I::Vec, I::ranges>(forward.state, b * pieces.groups + group, g.channels, place, mean);
      group_of_mean = group;
      Acc dmean[I::kNumbers] = {};
      use_tokens<I::kSlopeUnroll>(token, last, rows, load, [&](int j, int64_t token) {
        Acc value[I::kNumbers], d[I::kNumbers];
        gates.value(token, raw[j], value);
        I::Rows::unpack(raw_dy[j], d);
        POM_UNROLL
        for (int i = 0; i < I::kNumbers; ++i) {
          dmean[i] += d[i] * value[i];
          value[i] = d[i] * mean[i];
        }
        if (g.heads > 1) {
          write_head_parts<I::Vec, I::ranges>(
              value, place, args.parts_shift, 0xffffffffu,
              static_cast<Acc*>(args.parts) + (b * g.tokens + token) * args.parts_of_token);
        } else {
          gates.slope(token, raw[j], value);
          dgate.store(token, value);
        }
      });
      if (index + 1 < behind) begin(index + 1);
      out.sum(dmean, reinterpret_cast<Acc*>(memory), mean_rows + int64_t(index) * g.channels);
    }
  }
  if (args.tickets)
    join_samples(join_of<Acc>(args), forward.deal, block, forward.slabs.count, out, args.tickets);
}

template <class S, class H, class T, class Body>
Status with_gates_of(const Gates& g, int vec, Body body) {
  return with_vec<widest_vec(sizeof(T), is_along<S>)>(vec, [&](auto elements) {
    constexpr int Vec = decltype(elements)::value;
    if (g.form == Form::product) return body(GateInstance<S, T, Vec, false>{});
    if constexpr (Vec <= widest_vec(sizeof(T), true))
      if (turns_channels(g)) return body(GateInstance<H, T, Vec, true>{});
    return body(GateInstance<H, T, Vec, false>{});
  });
}

template <class Body>
Status with_gates(const Readout& args, Body body) {
  const Gates& g = args.gates;
  return with_dtype(g.dtype, [&](auto type) {
    using T = decltype(type);
    return g.tangent ? with_gates_of<Along<Sigmoid>, Along<HardSigmoid>, T>(g, args.slabs.vec, body)
                     : with_gates_of<Sigmoid, HardSigmoid, T>(g, args.slabs.vec, body);
  });
}

Readout readout_of(const Gates& g, int64_t groups, const int64_t* offsets, const StateView& state,
                   const Alignment& alignment) {
  const bool turned = turns_channels(g);
  const int vec = int(least(alignment.vec(), turned || g.tangent ? 4 : 8));
  return {g,
          {g.channels, 1, turned ? g.rotary : Rotary{}, vec, kLanes},
          {g.tokens, chunk_shift(g.tokens), groups, offsets},
          {},
          state};
}

Status run(const ReadoutArgs& given, void* stream) {
  const Gates& g = given.gates;
  const Alignment alignment = alignment_of(g, given.state)
                                  .pointers({given.y})
                                  .numbers({given.tangent.total, given.tangent.residual});
  Readout args = readout_of(g, given.groups, given.offsets, given.state, alignment);
  args.y = given.y;
  args.tangent = given.tangent;
  if (g.batch * g.tokens == 0) return Status::ok;
  if (const Status s = check_deal(g.batch, args.pieces); s != Status::ok) return s;
  return with_gates(args, [&](auto instance) {
    args.deal = deal(unsigned(g.batch * args.pieces.slots()), args.slabs.count, kMeanBlocks);
    return launch(gate_means<decltype(instance)>, int64_t(args.slabs.count) * args.deal.blocks, kThreads, 0, stream,
                  args);
  });
}

template <class Acc>
struct BackwardPlan {
  Arena arena;
  ReadoutBackward args;
  HeadParts heads;

  BackwardPlan(const ReadoutBackwardArgs& given, void* workspace)
      : arena(workspace),
        args{readout_of(given.gates, given.groups, given.offsets, given.state,
                        alignment_of(given.gates, given.state)
                            .pointers({given.grad_y, given.grad_gate})
                            .sizes({given.grad_y_batch_stride, given.grad_y_token_stride})),
             given.grad_y, given.grad_y_batch_stride, given.grad_y_token_stride, given.grad_gate},
        heads(given.gates, args.forward.slabs) {
    const Gates& g = given.gates;
    args.mean_rows = arena.take<Acc>(g.batch * args.forward.pieces.slots() * g.channels);
    args.tickets = given.groups == 1 ? arena.take<Ticket>(g.batch * args.forward.slabs.count) : nullptr;
    args.grad_total = given.grad_total;
    args.parts = g.heads > 1 ? arena.take<Acc>(g.batch * g.tokens * heads.count) : nullptr;
    args.parts_shift = heads.shift;
    args.parts_of_token = heads.count;
  }
};

template <class Acc>
Status run(const ReadoutBackwardArgs& given, void* workspace, void* stream) {
  const BackwardPlan<Acc> plan(given, workspace);
  const Gates& g = given.gates;
  if (g.batch * given.groups == 0) return Status::ok;
  if (const Status s = check_deal(g.batch, plan.args.forward.pieces); s != Status::ok) return s;
  Status status = with_gates(plan.args.forward, [&](auto instance) {
    using I = decltype(instance);
    if constexpr (std::is_same_v<typename I::Acc, Acc>) {
      ReadoutBackward args = plan.args;
      Readout& forward = args.forward;
      forward.deal = deal(unsigned(g.batch * forward.pieces.slots()), forward.slabs.count, kGateSlopeBlocks<I>);
      return launch(gate_slopes<I>, int64_t(forward.slabs.count) * forward.deal.blocks, kThreads,
                    SlabRow<Acc, I::Vec, I::ranges>::kBytes, stream, args);
    }
    return Status::bad_dtype;
  });
  if (status == Status::ok && given.groups > 1) status = join(join_of<Acc>(plan.args), stream);
  if (status != Status::ok || g.heads == 1) return status;
  return finish_heads(g, plan.heads, static_cast<const Acc*>(plan.args.parts), given.grad_gate, stream);
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
