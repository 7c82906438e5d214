// State forward and backward: φ summed over the tokens of each group.

#include <optional>

#include "cuda/mask.cuh"
#include "cuda/partial_sums.cuh"
#include "cuda/reduce.cuh"

namespace pom::cuda {
namespace {

// Whether the kernel that sums pieces also reduces each sample.
bool is_one_group(const Groups& groups) { return groups.count == 1 && !groups.cumulative; }

template <class Acc>
struct StatePlan {
  const StateArgs& args;
  Arena arena;
  Pieces pieces;
  PieceSums<Acc> sums;

  StatePlan(const StateArgs& args, void* workspace)
      : args(args),
        arena(workspace),
        pieces(args.features.tokens, chunk_shift(args.features.tokens), args.groups.count, args.groups.offsets),
        sums(args.features, pieces, is_one_group(args.groups), arena) {}

  Status run(void* stream) const {
    const Features& f = args.features;
    if (f.batch * args.groups.count == 0) return Status::ok;
    const Status s = sums.launch(stream, args.prior, args.out);
    if (s != Status::ok || is_one_group(args.groups)) return s;
    const ReduceArgs<Acc> reduce = {pieces,           f.batch,    f.channels(), sums.rows,
                                    sums.weight_rows, args.prior, nullptr,      args.out};
    return args.groups.cumulative ? scan_groups(reduce, false, stream) : reduce_groups(reduce, stream);
  }
};

template <class Acc>
struct BackwardKernelArgs {
  StateBackwardArgs call;
  ChannelTiles channel_tiles;
  Pieces pieces;
  WorkPartition partition;
  int64_t channels = 0;
  const Acc* grad = nullptr;        // (batch, groups, C)
  const Acc* token_grad = nullptr;  // (batch, tokens, C); replaces `grad` with a dense mask
  Acc* coeff_rows = nullptr;        // (blocks of the partition, degree, width)
};

template <class I>
constexpr int kBackwardBlocks =  // minimum resident blocks per SM
    has_tangent<typename I::Form> && (I::rotated || sizeof(typename I::Acc) == 8) ? 1 : 2;

// Each block goes through neighbouring pieces of one channel tile, pieces of one group in one loop.
template <class I>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<I>)
    state_backward_kernel(BackwardKernelArgs<typename I::Acc> args) {
  using Acc = typename I::Acc;
  using Tokens = FeatureTokens<I>;
  constexpr int kRanges = Tokens::kRanges, kNumbers = Tokens::kNumbers;
  // Tokens in flight: as many as the registers allow beside coefficients and their gradients.
  constexpr bool wide = kNumbers > 8 || Tokens::kCoeffs > 3 || (I::rotated && sizeof(typename I::T) == 4);
  constexpr int kUnroll = kNumbers > 16 || kRanges * Tokens::kCoeffs > 4 ? 1 : wide ? 2 : 4;
  const int rows = kThreads / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const BlockIndex block(args.channel_tiles.count);
  const Place place = args.channel_tiles.place(block.tile, lane);
  const Features& f = args.call.features;
  const Pieces& pieces = args.pieces;
  const unsigned slots = unsigned(pieces.slots()), end = args.partition.first(block.row + 1);

  Acc dc[kRanges][I::Vec][Tokens::kCoeffs] = {};
  for (unsigned index = args.partition.first(block.row); index < end;) {
    const unsigned b = index / slots, sample_end = unsigned(min(end, (b + 1) * slots));
    const Tokens tokens(f, b, place);
    const typename Tokens::Rows du_rows(args.call.grad_u, b * f.tokens * args.channels, args.channels, place);
    typename Tokens::Raw raw[kUnroll];
    while (index < sample_end) {
      const Piece run = pieces.at(index - b * slots);
      const int64_t last = pieces.last_of_run(index - b * slots, sample_end - b * slots - 1, run.group);
      const Acc* grad = args.token_grad ? args.token_grad + b * f.tokens * args.channels
                                        : args.grad + (b * pieces.groups + run.group) * args.channels;
      Acc grad_row[kNumbers];
      if (!args.token_grad) load_row<I::Vec, kRanges>(grad, place, grad_row);
      index = b * slots + unsigned(last) + 1;
      // 32 bits, to save registers.
      const int first = int(run.begin) + row, to = int(pieces.at(last, run.group).end);
      auto load = [&](int j, int64_t token) { tokens.load(token, raw[j]); };
      for_tokens<kUnroll>(first, to, rows, load, [&](int j, int64_t token) {
        Acc dphi[kNumbers], du[kNumbers];
        if (args.token_grad) load_row<I::Vec, kRanges>(grad + token * args.channels, place, grad_row);
        POM_UNROLL for (int i = 0; i < kNumbers; ++i)
          dphi[i] = grad_row[i];
        tokens.slope(token, raw[j], dphi, du, dc);
        du_rows.store(token, du);
      });
    }
  }
  if constexpr (I::Form::has_coeff)
    write_coeff_row<I>(dc, f, args.channel_tiles, block.tile, args.coeff_rows + block.row * f.degree * f.width);
}

template <class Acc>
struct StateBackwardPlan {
  Arena arena;
  BackwardKernelArgs<Acc> args;
  Acc* suffix;  // (batch, groups, C): gradient of each group's own tokens, for cumulative groups
  std::optional<MaskProduct<Acc>> masked;  // dL/dφ of the tokens, with a dense mask

  StateBackwardPlan(const StateBackwardArgs& call, void* workspace) : arena(workspace), args{call} {
    const Features& f = call.features;
    const Alignment alignment = alignment_of(f).pointers({call.grad_u}).numbers({call.grad_total, call.grad_coeff});
    args.channel_tiles = make_channel_tiles(f, f.rotary, alignment.vec());
    args.pieces = {f.tokens, chunk_shift(f.tokens), call.groups.mask ? 1 : call.groups.count, call.groups.offsets};
    args.channels = f.channels();
    args.partition = partition_coeff_work(f.batch * args.pieces.slots(), args.channel_tiles);
    if (call.groups.mask) {
      Acc* const token_grad = arena.take<Acc>(f.batch * f.tokens * args.channels);
      masked.emplace(f.batch, f.tokens, call.groups.count, args.channels, call.groups.mask, true, arena);
      masked->x = static_cast<const Acc*>(call.grad_total);
      masked->out.total = token_grad;
      args.token_grad = token_grad;
    }
    suffix = call.groups.cumulative ? arena.take<Acc>(f.batch * call.groups.count * args.channels) : nullptr;
    args.grad = suffix ? suffix : static_cast<const Acc*>(call.grad_total);
    args.coeff_rows = f.form == Form::power ? arena.take<Acc>(args.partition.blocks * f.degree * f.width) : nullptr;
  }

  Status run(void* stream) const {
    const StateBackwardArgs& call = args.call;
    const Features& f = call.features;
    if (const Status s = check_partition(f.batch, args.pieces); s != Status::ok) return s;
    if (suffix && f.batch > 0) {
      ReduceArgs<Acc> scan = {Pieces::rows(call.groups.count), f.batch, args.channels,
                              static_cast<const Acc*>(call.grad_total)};
      scan.out.total = suffix;
      if (const Status s = scan_groups(scan, true, stream); s != Status::ok) return s;
    }
    if (masked) {
      if (const Status s = masked->launch(stream); s != Status::ok) return s;
    }
    const Status launched = with_instance<Acc>(f, args.channel_tiles, [&](auto instance) {
      using I = decltype(instance);
      BackwardKernelArgs<Acc> kernel = args;
      if (!I::Form::has_coeff)
        kernel.partition = partition_work(args.partition.pieces, args.channel_tiles.count, kBackwardBlocks<I>);
      return launch(state_backward_kernel<I>, int64_t(args.channel_tiles.count) * kernel.partition.blocks, kThreads,
                    kCoeffBytes<I>, stream, kernel);
    });
    if (launched != Status::ok || f.form != Form::power) return launched;
    return reduce_coeff(args.coeff_rows, args.partition.blocks, f, call.grad_coeff, stream);
  }
};

}  // namespace

size_t workspace(const StateArgs& args) {
  return args.groups.mask ? planned_bytes<MaskedStatePlan>(args, args.features.dtype)
                          : planned_bytes<StatePlan>(args, args.features.dtype);
}
size_t workspace(const StateBackwardArgs& args) { return planned_bytes<StateBackwardPlan>(args, args.features.dtype); }

Status state(const StateArgs& args, void* workspace, size_t bytes, void* stream) {
  return args.groups.mask ? run_plan<MaskedStatePlan>(args, args.features.dtype, workspace, bytes, stream)
                          : run_plan<StatePlan>(args, args.features.dtype, workspace, bytes, stream);
}

Status state_backward(const StateBackwardArgs& args, void* workspace, size_t bytes, void* stream) {
  return run_plan<StateBackwardPlan>(args, args.features.dtype, workspace, bytes, stream);
}

}  // namespace pom::cuda
