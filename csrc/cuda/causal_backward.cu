// Backward of the token-causal mix: sums of the tiles and a scan over them, then one pass from the last tile to the
// first. A block goes forwards through its tile for the gradients of the gates, looks up what the later tiles add to
// the gradient of φ, and goes backwards through the tile, in shared memory, for the gradients of the features.

#include "cuda/causal_scan.cuh"

namespace pom::cuda {
namespace {

// `sums`: terms of the gradient of φ summed over each tile, the last tile first.
template <class Acc>
struct BackwardArgs : ScanArgs<CausalBackwardArgs, Acc> {
  const Acc* before = nullptr;  // (batch, tiles, C): φ and the prior, summed up to the end of each tile
  HeadPartials<Acc> heads;
  Acc* coeff_rows = nullptr;  // (batch, tiles, degree, width), power form only
};

template <class I>
__global__ void __launch_bounds__(kScanThreads, scan_blocks<I>())
    causal_mix_backward_kernel(BackwardArgs<typename I::Acc> scan) {
  using W = ScanTile<I, CausalBackwardArgs>;
  using Acc = typename I::Acc;
  constexpr int kNumbers = W::kNumbers, kUnroll = kNumbers > 8 ? 1 : 2;
  const CausalBackwardArgs& call = scan.call;
  const Features& f = call.features;
  const ScanStep step = claim_step(scan.sums);
  const int64_t tile = scan.tiles - 1 - step.index;
  const W own(scan, step, tile);
  const typename W::Tokens tokens(f, own.b, own.place);
  const typename W::Gates gates(call.gates, own.b, own.place);
  const int64_t channels = f.channels(), at = own.b * channels + own.column;
  const typename W::Rows dy(call.grad_y, own.b * call.grad_y_batch_stride, call.grad_y_token_stride, own.place);
  const typename W::Rows dgate(call.grad_gate, own.b * f.tokens * channels, channels, own.place);
  const typename W::Rows du_rows(call.grad_u, own.b * f.tokens * channels, channels, own.place);

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
      before = scan.before[(own.b * scan.tiles + tile - 1) * channels + own.column];
    else
      before = with_prior<Acc>(call.prior, at, 0);
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
    POM_UNROLL for (int i = 0; i < kNumbers; ++i) {
      d[i] *= scale;
      const Acc returned = d[i] * value[i];
      back[i] += returned;
      value[i] = d[i] * sum[i];
      d[i] = returned;
    }
    own.save_numbers(token, d);
    if (call.gates.heads > 1) {
      scan.heads.template write<I::Vec, W::kRanges>(value, own.place, W::lanes_of_row(), own.b * f.tokens + token);
    } else {
      gates.slope(token, raw_gate[j], value);
      dgate.store(token, value);
    }
  });

  const double of_tile = own.sum_rows(back);
  double after = 0;
  if (own.column >= 0) {
    after = sum_before(scan.sums, step, own.column, of_tile);
    if (call.grad_total) after += double(static_cast<const Acc*>(call.grad_total)[at]);
    if (tile == 0 && call.grad_prior) static_cast<Acc*>(call.grad_prior)[at] = Acc(after + of_tile);
  }
  Acc base[kNumbers];
  own.sum_before_row(after, true, base);

  // Backwards: the gradient of a token's φ is the sum of the terms of this token and all later ones.
  Acc dc[W::kRanges][I::Vec][W::Tokens::kCoeffs] = {};
  Acc running[kNumbers] = {};
  for (int64_t token = own.end - 1; token >= own.begin; --token) {
    Acc d[kNumbers], du[kNumbers];
    own.restore(tokens, token, raw);
    own.restore_numbers(token, d);
    POM_UNROLL for (int i = 0; i < kNumbers; ++i) {
      running[i] += d[i];
      d[i] = base[i] + running[i];
    }
    tokens.slope(token, raw, d, du, dc);
    du_rows.store(token, du);
  }
  if constexpr (I::Form::has_coeff) {
    Acc* const row = scan.coeff_rows + (own.b * scan.tiles + tile) * f.degree * f.width;
    for (int k = 0; k < f.degree; ++k) {
      Acc of_power[kNumbers];
      select_power<I>(dc, k, of_power);
      const double of_column = own.sum_rows(of_power);
      if (own.column >= 0) row[k * f.width + own.column] = Acc(of_column);
    }
  }
}

template <class Acc>
struct CausalBackwardPlan : ScanPlan<BackwardArgs<Acc>> {
  PieceSums<Acc> before;

  CausalBackwardPlan(const CausalBackwardArgs& call, void* workspace)
      : ScanPlan<BackwardArgs<Acc>>(call,
                                    Alignment(call.features.dtype)
                                        .pointers({call.grad_y, call.grad_u, call.grad_gate})
                                        .sizes({call.grad_y_batch_stride, call.grad_y_token_stride}),
                                    workspace),
        before(call.features, Pieces(call.features.tokens, this->shift, 1, nullptr), false, this->arena) {
    const Features& f = call.features;
    Arena& arena = this->arena;
    BackwardArgs<Acc>& scan = this->scan;
    scan.before = before.rows;
    if (f.weight) scan.counts = arena.take<double>(f.batch * scan.tiles);
    scan.heads = {call.gates, scan.channel_tiles, arena};
    if (f.form == Form::power) scan.coeff_rows = arena.take<Acc>(f.batch * scan.tiles * f.degree * f.width);
  }

  Status run(void* stream) const {
    const BackwardArgs<Acc>& scan = this->scan;
    const CausalBackwardArgs& call = scan.call;
    const Features& f = call.features;
    if (f.batch > 0 && scan.tiles > 1) {
      if (const Status s = before.launch(stream); s != Status::ok) return s;
      ReduceArgs<Acc> prefixes = {Pieces::rows(scan.tiles), f.batch,   f.channels(), before.rows,
                                  before.weight_rows,       call.prior};
      prefixes.out = {before.rows, nullptr, scan.counts};
      if (const Status s = scan_groups(prefixes, false, stream); s != Status::ok) return s;
    }
    if (f.batch > 0) {
      if (const Status s = scan.sums.start(stream); s != Status::ok) return s;
      Status status = this->with_scan_instance([&](auto instance) {
        using I = decltype(instance);
        return launch(causal_mix_backward_kernel<I>, scan.sums.blocks, kScanThreads,
                      ScanTile<I, CausalBackwardArgs>::kBytes, stream, scan);
      });
      if (status == Status::ok) status = reduce_head_partials(call.gates, scan.heads, call.grad_gate, stream);
      if (status != Status::ok) return status;
    }
    if (f.form != Form::power) return Status::ok;
    return reduce_coeff(scan.coeff_rows, f.batch * scan.tiles, f, call.grad_coeff, stream);
  }
};

}  // namespace

size_t workspace(const CausalBackwardArgs& args) {
  return planned_bytes<CausalBackwardPlan>(args, args.features.dtype);
}

Status causal_mix_backward(const CausalBackwardArgs& args, void* workspace, size_t bytes, void* stream) {
  return run_plan<CausalBackwardPlan>(args, args.features.dtype, workspace, bytes, stream);
}

}  // namespace pom::cuda
