// State forward and backward: φ summed over the tokens of each group, and the way back.

#include <optional>

#include "cuda/mask.cuh"
#include "cuda/rows.cuh"
#include "cuda/sums.cuh"

namespace pom::cuda {
namespace {

// The pieces of a state without a mask.
Pieces pieces_of(const Features& f, const Groups& groups) {
  return {f.tokens, chunk_shift(f.tokens), groups.count, groups.offsets};
}

template <class Acc>
struct StatePlan {
  Arena arena;
  Pieces pieces;
  PieceSums<Acc> sums;

  StatePlan(const StateArgs& args, void* workspace)
      : arena(workspace),
        pieces(pieces_of(args.features, args.groups)),
        sums(args.features, pieces, false, arena) {}
};

template <class Acc>
Status run(const StateArgs& args, void* workspace, void* stream) {
  if (args.groups.mask) return masked_state<Acc>(args, workspace, stream);
  const StatePlan<Acc> plan(args, workspace);
  if (args.features.batch * args.groups.count == 0) return Status::ok;
  if (const Status s = plan.sums.launch(stream); s != Status::ok) return s;
  const Join<Acc> joined = {
      plan.pieces, args.features.batch, args.features.channels(), plan.sums.rows, plan.sums.weight_rows, {}, nullptr,
      args.out};
  return args.groups.cumulative ? scan(joined, false, stream) : join(joined, stream);
}

template <class Acc>
struct Backward {
  Features features;
  Slabs slabs;
  Pieces pieces;
  int64_t channels = 0, stride = 0;  // pieces are dealt to blocks by this stride
  const Acc* grad = nullptr;         // (batch, groups, C)
  const Acc* token_grad = nullptr;   // (batch, tokens, C), in its place with a dense mask
  void* grad_u = nullptr;
  Acc* coeff_rows = nullptr;  // (stride, degree, width)
};

template <class I>
__global__ void __launch_bounds__(kThreads, I::turned && is_along<typename I::Form> ? 1 : 2) slopes(Backward<typename I::Acc> args) {
  using Acc = typename I::Acc;
  using Tokens = FeatureTokens<I>;
  constexpr int kRanges = Tokens::kRanges, kNumbers = Tokens::kNumbers;
  // Tokens in flight: as many as the registers beside coefficients and their gradients allow.
  constexpr int kUnroll = kNumbers > 16 || kRanges * Tokens::kCoeffs > 4 ? 1
                          : kNumbers > 8 || Tokens::kCoeffs > 3          ? 2
                                                                         : 4;
  const int rows = int(blockDim.x) / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const BlockIndex block(args.slabs.count);
  const Place place = args.slabs.place(block.slab, lane);
  const Features& f = args.features;
  const unsigned slots = unsigned(args.pieces.slots()), pieces = unsigned(f.batch) * slots;

  Acc dc[kRanges][I::Vec][Tokens::kCoeffs] = {};
  for (unsigned index = block.row; index < pieces; index += unsigned(args.stride)) {
    const unsigned b = index / slots;
    const Piece piece = args.pieces.at(index - b * slots);
    const Tokens tokens(f, b, place);
    const typename Tokens::Rows du_rows(args.grad_u, b * f.tokens * args.channels, args.channels, place);
    const Acc* grad = args.token_grad ? args.token_grad + b * f.tokens * args.channels
                                      : args.grad + (b * args.pieces.groups + piece.group) * args.channels;
    Acc grad_row[kNumbers];
    if (!args.token_grad) load_row<I::Vec, kRanges>(grad, place, grad_row);
    typename Tokens::Raw raw[kUnroll];
    for_tokens<kUnroll>(
        piece.begin + row, piece.end, rows, [&](int j, int64_t token) { tokens.load(token, raw[j]); },
        [&](int j, int64_t token) {
          Acc dphi[kNumbers], du[kNumbers];
          if (args.token_grad) load_row<I::Vec, kRanges>(grad + token * args.channels, place, grad_row);
          POM_UNROLL
          for (int i = 0; i < kNumbers; ++i) dphi[i] = grad_row[i];
          tokens.slope(token, raw[j], dphi, du, dc);
          du_rows.store(token, du);
        });
  }
  if constexpr (I::Form::has_coeff) write_coeff_row<I>(dc, f, place, args.coeff_rows + block.row * f.degree * f.width);
}

template <class Acc>
struct StateBackwardPlan {
  Arena arena;
  Backward<Acc> args;
  Pieces groups;  // a row each, for their gradients
  Acc* suffix;    // (batch, groups, C): gradient of every group's own tokens, for cumulative groups
  std::optional<MaskProduct<Acc>> masked;  // dL/dφ of the tokens, with a dense mask
  bool aligned;

  StateBackwardPlan(const StateBackwardArgs& given, void* workspace) : arena(workspace) {
    const Features& f = given.features;
    aligned = is_aligned(f).pointers({given.grad_total, given.grad_u, given.grad_coeff});
    args.features = f;
    args.slabs = slabs_of(f, f.rotary, aligned);
    args.pieces = given.groups.mask ? Pieces(f.tokens, chunk_shift(f.tokens), 1, nullptr) : pieces_of(f, given.groups);
    args.channels = f.channels();
    args.stride = least(f.batch * args.pieces.slots(), most(1, kCoeffBlocks / args.slabs.count));
    if (given.groups.mask) {
      Acc* const token_grad = arena.take<Acc>(f.batch * f.tokens * args.channels);
      masked.emplace(f.batch, f.tokens, given.groups.count, args.channels, given.groups.mask, true, arena);
      masked->x = static_cast<const Acc*>(given.grad_total);
      masked->out.total = token_grad;
      args.token_grad = token_grad;
    }
    args.grad_u = given.grad_u;
    groups = Pieces(1, 0, given.groups.count, nullptr, true);
    suffix = given.groups.cumulative ? arena.take<Acc>(f.batch * given.groups.count * args.channels) : nullptr;
    args.grad = suffix ? suffix : static_cast<const Acc*>(given.grad_total);
    args.coeff_rows = f.form == Form::power ? arena.take<Acc>(args.stride * f.degree * f.width) : nullptr;
  }
};

template <class Acc>
Status run(const StateBackwardArgs& given, void* workspace, void* stream) {
  const StateBackwardPlan<Acc> plan(given, workspace);
  const Backward<Acc>& args = plan.args;
  const Features& f = given.features;
  if (plan.suffix && f.batch > 0) {
    Join<Acc> suffix = {plan.groups, f.batch, args.channels, static_cast<const Acc*>(given.grad_total)};
    suffix.out.total = plan.suffix;
    if (const Status s = scan(suffix, true, stream); s != Status::ok) return s;
  }
  if (plan.masked) {
    if (const Status s = plan.masked->launch(stream); s != Status::ok) return s;
  }
  const Status launched = with_instance(f, f.rotary.axes > 0, plan.aligned, [&](auto instance) {
    using I = decltype(instance);
    if constexpr (std::is_same_v<typename I::Acc, Acc>)
      return launch(slopes<I>, args.stride * args.slabs.count, kThreads, coeff_shared_bytes<I>(kThreads), stream, args);
    return Status::bad_dtype;
  });
  if (launched != Status::ok || f.form != Form::power) return launched;
  return join_coeff(args.coeff_rows, args.stride, f.degree, f.width, static_cast<Acc*>(given.grad_coeff), stream);
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
