// Backward of the token-causal mix: sums of the tiles and a scan over them, then one pass from the last tile to the
// first. A block goes forwards through its tile for the gradients of the gates, looks up what the later tiles add to
// the gradient of φ, and goes backwards through the tile, in shared memory, for the gradients of the features.

#include "cuda/causal_scan.cuh"

namespace pom::cuda {
namespace {

template <class Acc>
struct BackwardArgs {
  ScanArgs scan;
  Lookback<Acc> sums;           // terms of the gradient of φ summed over each tile, the last tile first
  const Acc* before = nullptr;  // (batch, tiles, C): φ and the prior, summed up to the end of each tile
  const void* grad_y = nullptr;
  int64_t grad_y_batch_stride = 0, grad_y_token_stride = 0;
  const Acc* grad_total = nullptr;  // (batch, 1, C), or null
  void* grad_u = nullptr;
  void* grad_gate = nullptr;
  Acc* grad_prior = nullptr;  // (batch, 1, C)
  Acc* partials = nullptr;    // (batch, tokens, channels >> shift), if there are heads
  int partials_shift = 0;
  int64_t partials_per_token = 0;
  Acc* coeff_rows = nullptr;  // (batch, tiles, degree, width), power form only
};

template <class I>
__global__ void __launch_bounds__(kScanThreads, scan_blocks<I>())
    causal_mix_backward_kernel(BackwardArgs<typename I::Acc> args) {
  using W = ScanTile<I, true>;
  using Acc = typename I::Acc;
  constexpr int kNumbers = W::kNumbers, kUnroll = kNumbers > 8 ? 1 : 2;
  const ScanArgs& scan = args.scan;
  const Features& f = scan.features;
  const ScanStep step = claim_step(args.sums);
  const int64_t tile = scan.tiles - 1 - step.index;
  const W own(scan, step, tile);
  const typename W::Tokens tokens(f, own.b, own.place);
  const typename W::Gates gates(scan.gates, own.b, own.place);
  const int64_t channels = f.channels(), at = own.b * channels + own.column;
  const typename W::Rows dy(args.grad_y, own.b * args.grad_y_batch_stride, args.grad_y_token_stride, own.place);
  const typename W::Rows dgate(args.grad_gate, own.b * f.tokens * channels, channels, own.place);
  const typename W::Rows du_rows(args.grad_u, own.b * f.tokens * channels, channels, own.place);

  own.store_inverse_counts(scan);
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
      before = args.before[(own.b * scan.tiles + tile - 1) * channels + own.column];
    else
      before = with_prior<Acc>(scan.prior, at, 0);
  }
  own.sum_before_row(before, false, sum);

  // Forwards: gradients of the gates, and each token's term of the gradient of φ.
  typename W::Raw raw;
  Acc back[kNumbers] = {};
  use_tokens<kUnroll>(own.begin, own.end, 1, load, [&](int j, int64_t token) {
    Acc value[kNumbers], d[kNumbers];
    own.restore(tokens, token, raw);
    tokens.add(token, raw, sum);
    gates.value(token, raw_gate[j], value);
    W::Rows::unpack(raw_dy[j], d);
    const Acc scale = own.inverse_count(token);
    POM_UNROLL
    for (int i = 0; i < kNumbers; ++i) {
      d[i] *= scale;
      const Acc returned = d[i] * value[i];
      back[i] += returned;
      value[i] = d[i] * sum[i];
      d[i] = returned;
    }
    own.save_numbers(token, d);
    if (scan.gates.heads > 1) {
      write_head_partials<I::Vec, W::kRanges>(value, own.place, args.partials_shift, W::lanes_of_row(),
                                              args.partials + (own.b * f.tokens + token) * args.partials_per_token);
    } else {
      gates.slope(token, raw_gate[j], value);
      dgate.store(token, value);
    }
  });

  const double of_tile = own.sum_rows(back);
  double after = 0;
  if (own.column >= 0) {
    after = sum_before(args.sums, step, own.column, of_tile);
    if (args.grad_total) after += double(args.grad_total[at]);
    if (tile == 0 && args.grad_prior) args.grad_prior[at] = Acc(after + of_tile);
  }
  Acc base[kNumbers];
  own.sum_before_row(after, true, base);

  // Backwards: the gradient of a token's φ is the sum of the terms of this token and all later ones.
  Acc dc[W::kRanges][I::Vec][W::Tokens::kCoeffs] = {};
  POM_UNROLL
  for (int i = 0; i < kNumbers; ++i) sum[i] = Acc(0);
  for (int64_t token = own.end - 1; token >= own.begin; --token) {
    Acc d[kNumbers], du[kNumbers];
    own.restore(tokens, token, raw);
    own.restore_numbers(token, d);
    POM_UNROLL
    for (int i = 0; i < kNumbers; ++i) {
      sum[i] += d[i];
      d[i] = base[i] + sum[i];
    }
    tokens.slope(token, raw, d, du, dc);
    du_rows.store(token, du);
  }
  if constexpr (I::Form::has_coeff) {
    Acc* const row = args.coeff_rows + (own.b * scan.tiles + tile) * f.degree * f.width;
    for (int k = 0; k < f.degree; ++k) {
      Acc of_power[kNumbers];
      select_power<I>(dc, k, of_power);
      const double of_column = own.sum_rows(of_power);
      if (own.column >= 0) row[k * f.width + own.column] = Acc(of_column);
    }
  }
}

template <class Acc>
struct BackwardPlan : ScanPlan<Acc, true> {
  Pieces rows;  // one per tile
  PieceSums<Acc> before;
  double* counts = nullptr;  // (batch, tiles), if the tokens are weighted
  HeadPartials heads;
  Acc *partials = nullptr, *coeff_rows = nullptr;

  BackwardPlan(const CausalBackwardArgs& call, void* workspace)
      : ScanPlan<Acc, true>(call.features, call.gates, call.prior,
                            Alignment(call.features.dtype)
                                .pointers({call.grad_y, call.grad_u, call.grad_gate})
                                .sizes({call.grad_y_batch_stride, call.grad_y_token_stride}),
                            workspace),
        rows(Pieces::rows(this->scan.tiles)),
        before(call.features, Pieces(call.features.tokens, this->shift, 1, nullptr), false, this->arena),
        heads(call.gates, this->scan.channel_tiles) {
    const Features& f = call.features;
    Arena& arena = this->arena;
    if (f.weight) this->scan.counts = counts = arena.take<double>(f.batch * this->scan.tiles);
    if (call.gates.heads > 1) partials = arena.take<Acc>(f.batch * f.tokens * heads.count);
    if (f.form == Form::power) coeff_rows = arena.take<Acc>(f.batch * this->scan.tiles * f.degree * f.width);
  }

  Status prefix_sums(void* stream) const {
    const Features& f = this->scan.features;
    if (this->scan.tiles == 1) return Status::ok;
    if (const Status s = before.launch(stream); s != Status::ok) return s;
    ReduceArgs<Acc> reduce = {rows, f.batch, f.channels(), before.rows, before.weight_rows, this->scan.prior};
    reduce.out = {before.rows, nullptr, counts};
    return scan_groups(reduce, false, stream);
  }
};

template <class Acc>
Status run(const CausalBackwardArgs& call, void* workspace, void* stream) {
  const BackwardPlan<Acc> plan(call, workspace);
  const Features& f = call.features;
  if (f.batch > 0) {
    if (const Status s = plan.prefix_sums(stream); s != Status::ok) return s;
    if (const Status s = plan.sums.start(stream); s != Status::ok) return s;
    BackwardArgs<Acc> args = {plan.scan, plan.sums, plan.before.rows};
    args.grad_y = call.grad_y;
    args.grad_y_batch_stride = call.grad_y_batch_stride;
    args.grad_y_token_stride = call.grad_y_token_stride;
    args.grad_total = static_cast<const Acc*>(call.grad_total);
    args.grad_u = call.grad_u;
    args.grad_gate = call.grad_gate;
    args.grad_prior = static_cast<Acc*>(call.grad_prior);
    args.partials = plan.partials;
    args.partials_shift = plan.heads.shift;
    args.partials_per_token = plan.heads.count;
    args.coeff_rows = plan.coeff_rows;
    Status status = plan.with_scan_instance([&](auto instance) {
      using I = decltype(instance);
      return launch(causal_mix_backward_kernel<I>, plan.sums.blocks, kScanThreads, ScanTile<I, true>::kBytes, stream,
                    args);
    });
    if (status == Status::ok && plan.partials)
      status = reduce_head_partials(call.gates, plan.heads, plan.partials, call.grad_gate, stream);
    if (status != Status::ok) return status;
  }
  if (f.form != Form::power) return Status::ok;
  return reduce_coeff(plan.coeff_rows, f.batch * plan.scan.tiles, f.degree, f.width, static_cast<Acc*>(call.grad_coeff),
                      stream);
}

}  // namespace

size_t workspace(const CausalBackwardArgs& args) { return planned_bytes<BackwardPlan>(args, args.features.dtype); }

Status causal_mix_backward(const CausalBackwardArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, stream); });
}

}  // namespace pom::cuda
