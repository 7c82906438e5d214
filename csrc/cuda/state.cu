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
  Arena arena;
  Pieces pieces;
  PieceSums<Acc> sums;

  StatePlan(const StateArgs& args, void* workspace)
      : arena(workspace),
        pieces(args.features.tokens, chunk_shift(args.features.tokens), args.groups.count, args.groups.offsets),
        sums(args.features, pieces, is_one_group(args.groups), arena) {}
};

template <class Acc>
Status run(const StateArgs& args, void* workspace, void* stream) {
  if (args.groups.mask) return masked_state<Acc>(args, workspace, stream);
  const StatePlan<Acc> plan(args, workspace);
  const Features& f = args.features;
  if (f.batch * args.groups.count == 0) return Status::ok;
  if (is_one_group(args.groups)) return plan.sums.launch(stream, args.prior, args.out);
  if (const Status s = plan.sums.launch(stream); s != Status::ok) return s;
  const ReduceArgs<Acc> reduce = {plan.pieces,           f.batch,    f.channels(), plan.sums.rows,
                                  plan.sums.weight_rows, args.prior, nullptr,      args.out};
  return args.groups.cumulative ? scan_groups(reduce, false, stream) : reduce_groups(reduce, stream);
}

template <class Acc>
struct BackwardKernelArgs {
  Features features;
  ChannelTiles channel_tiles;
  Pieces pieces;
  WorkPartition partition;
  int64_t channels = 0;
  const Acc* grad = nullptr;        // (batch, groups, C)
  const Acc* token_grad = nullptr;  // (batch, tokens, C); replaces `grad` with a dense mask
  void* grad_u = nullptr;
  Acc* coeff_rows = nullptr;  // (blocks of the partition, degree, width)
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
  const Features& f = args.features;
  const Pieces& pieces = args.pieces;
  const unsigned slots = unsigned(pieces.slots()), end = args.partition.first(block.row + 1);

  Acc dc[kRanges][I::Vec][Tokens::kCoeffs] = {};
  for (unsigned index = args.partition.first(block.row); index < end;) {
    const unsigned b = index / slots, sample_end = unsigned(min(end, (b + 1) * slots));
    const Tokens tokens(f, b, place);
    const typename Tokens::Rows du_rows(args.grad_u, b * f.tokens * args.channels, args.channels, place);
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
      for_tokens<kUnroll>(
          first, to, rows, [&](int j, int64_t token) { tokens.load(token, raw[j]); },
          [&](int j, int64_t token) {
            Acc dphi[kNumbers], du[kNumbers];
            if (args.token_grad) load_row<I::Vec, kRanges>(grad + token * args.channels, place, grad_row);
            POM_UNROLL
            for (int i = 0; i < kNumbers; ++i) dphi[i] = grad_row[i];
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
  Pieces groups;  // one row per group, for the scan of gradients
  Acc* suffix;    // (batch, groups, C): gradient of each group's own tokens, for cumulative groups
  std::optional<MaskProduct<Acc>> masked;  // dL/dφ of the tokens, with a dense mask

  StateBackwardPlan(const StateBackwardArgs& call, void* workspace) : arena(workspace) {
    const Features& f = call.features;
    const Alignment alignment = alignment_of(f).pointers({call.grad_u}).numbers({call.grad_total, call.grad_coeff});
    args.features = f;
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
    args.grad_u = call.grad_u;
    groups = Pieces::rows(call.groups.count);
    suffix = call.groups.cumulative ? arena.take<Acc>(f.batch * call.groups.count * args.channels) : nullptr;
    args.grad = suffix ? suffix : static_cast<const Acc*>(call.grad_total);
    args.coeff_rows = f.form == Form::power ? arena.take<Acc>(args.partition.blocks * f.degree * f.width) : nullptr;
  }
};

template <class Acc>
Status run(const StateBackwardArgs& call, void* workspace, void* stream) {
  const StateBackwardPlan<Acc> plan(call, workspace);
  const Features& f = call.features;
  if (const Status s = check_partition(f.batch, plan.args.pieces); s != Status::ok) return s;
  if (plan.suffix && f.batch > 0) {
    ReduceArgs<Acc> suffix = {plan.groups, f.batch, f.channels(), static_cast<const Acc*>(call.grad_total)};
    suffix.out.total = plan.suffix;
    if (const Status s = scan_groups(suffix, true, stream); s != Status::ok) return s;
  }
  if (plan.masked) {
    if (const Status s = plan.masked->launch(stream); s != Status::ok) return s;
  }
  const Status launched = with_instance(f, f.rotary.axes > 0, plan.args.channel_tiles.vec, [&](auto instance) {
    using I = decltype(instance);
    if constexpr (std::is_same_v<typename I::Acc, Acc>) {
      BackwardKernelArgs<Acc> args = plan.args;
      if (!I::Form::has_coeff)
        args.partition = partition_work(args.partition.pieces, args.channel_tiles.count, kBackwardBlocks<I>);
      return launch(state_backward_kernel<I>, int64_t(args.channel_tiles.count) * args.partition.blocks, kThreads,
                    kCoeffBytes<I>, stream, args);
    }
    return Status::bad_dtype;
  });
  if (launched != Status::ok || f.form != Form::power) return launched;
  const BackwardKernelArgs<Acc>& args = plan.args;
  return reduce_coeff(args.coeff_rows, args.partition.blocks, f.degree, f.width, static_cast<Acc*>(call.grad_coeff),
                      stream);
}

}  // namespace

size_t workspace(const StateArgs& args) {
  return args.groups.mask ? planned_bytes<MaskedStatePlan>(args, args.features.dtype)
                          : planned_bytes<StatePlan>(args, args.features.dtype);
}

Status state(const StateArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, stream); });
}

size_t workspace(const StateBackwardArgs& args) { return planned_bytes<StateBackwardPlan>(args, args.features.dtype); }

Status state_backward(const StateBackwardArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, stream); });
}

}  // namespace pom::cuda
