// Backward of the token-causal mix: sums of the tiles and a scan over them, then one pass from the last tile to the
// first. A block walks forwards through its tile for the gates, learns what the tiles behind it send back, and walks
// backwards, in shared memory, for the features.

#include "cuda/causal_scan.cuh"

namespace pom::cuda {
namespace {

template <class Acc>
struct WalkBackward {
  Walk walk;
  Lookback<Acc> sums;               // of what tiles send back, the last tile first
  const Acc* before = nullptr;      // (batch, tiles, C): φ summed up to the end of each tile, the prior included
  const void* grad_y = nullptr;
  int64_t grad_y_batch_stride = 0, grad_y_token_stride = 0;
  const Acc* grad_total = nullptr;  // (batch, 1, C), or null
  void* grad_u = nullptr;
  void* grad_gate = nullptr;
  Acc* grad_prior = nullptr;  // (batch, 1, C)
  Acc* parts = nullptr;       // (batch, tokens, channels >> shift), with heads
  int parts_shift = 0;
  int64_t parts_of_token = 0;
  Acc* coeff_rows = nullptr;  // (batch, tiles, degree, width), in power form
};

template <class I>
__global__ void __launch_bounds__(kWalkThreads, walk_blocks<I>())
    causal_slopes(WalkBackward<typename I::Acc> args) {
  using W = Walker<I, true>;
  using Acc = typename I::Acc;
  constexpr int kNumbers = W::kNumbers, kUnroll = kNumbers > 8 ? 1 : 2;
  const Walk& walk = args.walk;
  const Features& f = walk.features;
  const Turn turn = take_turn(args.sums);
  const int64_t tile = walk.tiles - 1 - turn.step;
  const W own(walk, turn, tile);
  const typename W::Tokens tokens(f, own.b, own.place);
  const typename W::Gates gates(walk.gates, own.b, own.place);
  const int64_t channels = f.channels(), at = own.b * channels + own.column;
  const typename W::Rows dy(args.grad_y, own.b * args.grad_y_batch_stride, args.grad_y_token_stride, own.place);
  const typename W::Rows dgate(args.grad_gate, own.b * f.tokens * channels, channels, own.place);
  const typename W::Rows du_rows(args.grad_u, own.b * f.tokens * channels, channels, own.place);

  own.find_inverses(walk);
  Acc sum[kNumbers] = {};
  own.load(tokens, sum);
  typename W::Rows::Raw raw_dy[kUnroll];
  typename W::Gates::Raw raw_gate[kUnroll];
  auto load = [&](int j, int64_t token) {
    dy.load(token, raw_dy[j]);
    gates.load(token, raw_gate[j]);
  };
  load_tokens<kUnroll>(own.begin, own.end, 1, load);
  own.sum_rows(sum);
  double before = 0;
  if (own.column >= 0) {
    if (tile > 0)
      before = args.before[(own.b * walk.tiles + tile - 1) * channels + own.column];
    else
      before = with_prior<Acc>(walk.prior, at, 0);
  }
  own.sum_before_row(before, false, sum);

  // Forwards: gradients of the gates, and what the tokens send back.
  typename W::Raw raw;
  Acc back[kNumbers] = {};
  use_tokens<kUnroll>(own.begin, own.end, 1, load, [&](int j, int64_t token) {
    Acc value[kNumbers], d[kNumbers];
    own.find(tokens, token, raw);
    tokens.add(token, raw, sum);
    gates.value(token, raw_gate[j], value);
    W::Rows::unpack(raw_dy[j], d);
    const Acc scale = own.inverse(token);
    POM_UNROLL
    for (int i = 0; i < kNumbers; ++i) {
      d[i] *= scale;
      const Acc returned = d[i] * value[i];
      back[i] += returned;
      value[i] = d[i] * sum[i];
      d[i] = returned;
    }
    own.keep_numbers(token, d);
    if (walk.gates.heads > 1) {
      write_head_parts<I::Vec, W::kRanges>(value, own.place, args.parts_shift, W::lanes_of_row(),
                                           args.parts + (own.b * f.tokens + token) * args.parts_of_token);
    } else {
      gates.slope(token, raw_gate[j], value);
      dgate.store(token, value);
    }
  });

  const double of_tile = own.sum_rows(back);
  double behind = 0;
  if (own.column >= 0) {
    behind = sum_before(args.sums, turn, own.column, of_tile);
    if (args.grad_total) behind += double(args.grad_total[at]);
    if (tile == 0 && args.grad_prior) args.grad_prior[at] = Acc(behind + of_tile);
  }
  Acc base[kNumbers];
  own.sum_before_row(behind, true, base);

  // Backwards: the gradient of a token's features is what it and all later tokens send back.
  Acc dc[W::kRanges][I::Vec][W::Tokens::kCoeffs] = {};
  POM_UNROLL
  for (int i = 0; i < kNumbers; ++i) sum[i] = Acc(0);
  for (int64_t token = own.end - 1; token >= own.begin; --token) {
    Acc d[kNumbers], du[kNumbers];
    own.find(tokens, token, raw);
    own.find_numbers(token, d);
    POM_UNROLL
    for (int i = 0; i < kNumbers; ++i) {
      sum[i] += d[i];
      d[i] = base[i] + sum[i];
    }
    tokens.slope(token, raw, d, du, dc);
    du_rows.store(token, du);
  }
  if constexpr (I::Form::has_coeff) {
    Acc* const row = args.coeff_rows + (own.b * walk.tiles + tile) * f.degree * f.width;
    for (int k = 0; k < f.degree; ++k) {
      Acc of_power[kNumbers];
      take_power<I>(dc, k, of_power);
      const double of_column = own.sum_rows(of_power);
      if (own.column >= 0) row[k * f.width + own.column] = Acc(of_column);
    }
  }
}

template <class Acc>
struct BackwardPlan : WalkPlan<Acc, true> {
  Pieces rows;  // one for each tile
  PieceSums<Acc> before;
  double* counts = nullptr;  // (batch, tiles), of weighted tokens
  HeadParts heads;
  Acc *parts = nullptr, *coeff_rows = nullptr;

  BackwardPlan(const CausalBackwardArgs& given, void* workspace)
      : WalkPlan<Acc, true>(given.features, given.gates, given.prior,
                            Alignment(given.features.dtype)
                                .pointers({given.grad_y, given.grad_u, given.grad_gate})
                                .sizes({given.grad_y_batch_stride, given.grad_y_token_stride}),
                            workspace),
        rows(Pieces::rows(this->walk.tiles)),
        before(given.features, Pieces(given.features.tokens, this->shift, 1, nullptr), false, this->arena),
        heads(given.gates, this->walk.slabs) {
    const Features& f = given.features;
    Arena& arena = this->arena;
    if (f.weight) this->walk.counts = counts = arena.take<double>(f.batch * this->walk.tiles);
    if (given.gates.heads > 1) parts = arena.take<Acc>(f.batch * f.tokens * heads.count);
    if (f.form == Form::power) coeff_rows = arena.take<Acc>(f.batch * this->walk.tiles * f.degree * f.width);
  }

  Status prefix_sums(void* stream) const {
    const Features& f = this->walk.features;
    if (this->walk.tiles == 1) return Status::ok;  // before which there is nothing
    if (const Status s = before.launch(stream); s != Status::ok) return s;
    Join<Acc> joined = {rows, f.batch, f.channels(), before.rows, before.weight_rows, this->walk.prior};
    joined.out = {before.rows, nullptr, counts};
    return scan(joined, false, stream);
  }
};

template <class Acc>
Status run(const CausalBackwardArgs& given, void* workspace, void* stream) {
  const BackwardPlan<Acc> plan(given, workspace);
  const Features& f = given.features;
  if (f.batch > 0) {
    if (const Status s = plan.prefix_sums(stream); s != Status::ok) return s;
    if (const Status s = plan.sums.start(stream); s != Status::ok) return s;
    WalkBackward<Acc> args = {plan.walk, plan.sums, plan.before.rows};
    args.grad_y = given.grad_y;
    args.grad_y_batch_stride = given.grad_y_batch_stride;
    args.grad_y_token_stride = given.grad_y_token_stride;
    args.grad_total = static_cast<const Acc*>(given.grad_total);
    args.grad_u = given.grad_u;
    args.grad_gate = given.grad_gate;
    args.grad_prior = static_cast<Acc*>(given.grad_prior);
    args.parts = plan.parts;
    args.parts_shift = plan.heads.shift;
    args.parts_of_token = plan.heads.count;
    args.coeff_rows = plan.coeff_rows;
    Status status = plan.with_walker([&](auto instance) {
      using I = decltype(instance);
      return launch(causal_slopes<I>, plan.sums.blocks, kWalkThreads, Walker<I, true>::kBytes, stream, args);
    });
    if (status == Status::ok && plan.parts)
      status = finish_heads(given.gates, plan.heads, plan.parts, given.grad_gate, stream);
    if (status != Status::ok) return status;
  }
  if (f.form != Form::power) return Status::ok;
  return join_coeff(plan.coeff_rows, f.batch * plan.walk.tiles, f.degree, f.width, static_cast<Acc*>(given.grad_coeff),
                    stream);
}

}  // namespace

size_t workspace(const CausalBackwardArgs& args) { return planned_bytes<BackwardPlan>(args, args.features.dtype); }

Status causal_mix_backward(const CausalBackwardArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, stream); });
}

}  // namespace pom::cuda
