// Token-causal mix, forward and backward, linear in tokens: sums of chunks, a scan over the chunks, and a walk through
// every chunk that carries the running sum. The states of the tokens are never stored.

#include "cpu/means.h"
#include "cpu/tokens.h"

namespace pom::cpu {
namespace {

// What forward and backward share: the running sums in front of every chunk.
template <class Acc, class Args>
struct CausalPlan {
  const Args& args;
  Arena arena;
  FeatureTokens<Acc> tokens;
  GateTokens<Acc> gates;
  Chunks chunks;
  int64_t channels;
  double* sums;    // (batch, chunks + 1, C): φ summed over all tokens before the chunk, and at the end over all
  double* counts;  // (batch, chunks + 1)

  CausalPlan(const Args& args, void* workspace)
      : args(args),
        arena(workspace),
        tokens(args.features, arena),
        gates(args.gates),
        chunks(args.features.tokens),
        channels(args.features.channels()),
        sums(arena.take<double>(args.features.batch * (chunks.count + 1) * channels)),
        counts(arena.take<double>(args.features.batch * (chunks.count + 1))) {}

  double* sum(int64_t batch, int64_t chunk) const { return sums + (batch * (chunks.count + 1) + chunk) * channels; }
  double& count(int64_t batch, int64_t chunk) const { return counts[batch * (chunks.count + 1) + chunk]; }

  // body(batch, chunk, first tile, last tile) in parallel. A head's gate reads all channels: then no cut by tiles.
  template <class Body>
  void each_task(const Executor& executor, bool whole_rows, Body body) const {
    const Features& f = args.features;
    const TileGroups groups(tokens.tiles.count(), whole_rows ? kWantedTasks : f.batch * chunks.count);
    parallel(executor, f.batch * chunks.count * groups.count, [&](int64_t task) {
      const int64_t part = task % groups.count, chunk = task / groups.count % chunks.count;
      body(task / groups.count / chunks.count, chunk, groups.begin(part), groups.end(part));
    });
  }

  void prefix_sums(const Executor& executor) {
    const Features& f = args.features;
    tokens.transpose_coeff();
    each_task(executor, false, [&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        each_range(tokens.tiles[i], [&](int64_t, int64_t channel) {
          std::fill_n(sum(b, chunk + 1) + channel, tokens.tiles[i].width, 0.0);
        });
      tokens.sum(b, chunks.begin(chunk), chunks.end(chunk), first, last, sum(b, chunk + 1));
    });
    parallel(executor, f.batch, [&](int64_t b) {
      const Acc* total = static_cast<const Acc*>(args.prior.total);
      const Acc* residual = static_cast<const Acc*>(args.prior.residual);
      for (int64_t c = 0; c < channels; ++c)
        sum(b, 0)[c] = total ? double(total[b * channels + c]) + double(residual[b * channels + c]) : 0.0;
      count(b, 0) = args.prior.count ? args.prior.count[b] : 0.0;
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        for (int64_t c = 0; c < channels; ++c) sum(b, chunk + 1)[c] += sum(b, chunk)[c];
        double weights = double(chunks.end(chunk) - chunks.begin(chunk));
        if (const Acc* weight = tokens.weight(b, chunks.begin(chunk))) {
          weights = 0;
          for (int64_t n = 0; n < chunks.end(chunk) - chunks.begin(chunk); ++n) weights += weight[n];
        }
        count(b, chunk + 1) = count(b, chunk) + weights;
      }
    });
  }

  // 1 / count of every token in a panel; advances the running count.
  void inverse_counts(int64_t batch, int64_t token, int64_t n, double& count, Acc* inverses) const {
    const Acc* weight = tokens.weight(batch, token);
    for (int64_t i = 0; i < n; ++i) {
      count += weight ? double(weight[i]) : 1.0;
      inverses[i] = Acc(inverse(count));
    }
  }

  // Means H of a panel in scratch; `base` is the tile's running sum in front of it, and is advanced.
  void panel_means(int64_t b, int64_t token, int64_t n, const Tile& tile, const Acc* inverses, double* base,
                   Acc* mean) const {
    tokens.features(b, token, n, tile, mean);
    each_range(tile, [&](int64_t range, int64_t) {
      linear_kernels<Acc>().scan(n, tile.width, mean + range * tile.width, row_width(tile), tokens.weight(b, token),
                                 inverses, false, base + range * tile.width);
    });
  }

  // The tile's channels of a row of doubles, side by side.
  static void gather(const Tile& tile, const double* row, double* out) {
    each_range(tile, [&](int64_t range, int64_t channel) {
      std::copy_n(row + channel, tile.width, out + range * tile.width);
    });
  }
};

template <class Acc>
Status run(const CausalArgs& args, void* workspace, const Executor& executor) {
  CausalPlan<Acc, CausalArgs> plan(args, workspace);
  plan.prefix_sums(executor);
  plan.each_task(executor, false, [&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Tile tile = plan.tokens.tiles[i];
      double base[kScratch / kPanel], count = plan.count(b, chunk);
      plan.gather(tile, plan.sum(b, chunk), base);
      each_panel(plan.chunks.begin(chunk), plan.chunks.end(chunk), [&](int64_t token, int64_t n) {
        alignas(64) Acc mean[kScratch], value[kScratch];
        Acc inverses[kPanel];
        plan.inverse_counts(b, token, n, count, inverses);
        plan.panel_means(b, token, n, tile, inverses, base, mean);
        plan.gates.values(b, token, n, tile, value);
        plan.gates.multiply(b, token, n, tile, value, mean, true, args.y);
      });
    }
  });
  for (int64_t b = 0; b < args.features.batch; ++b) {
    args.out.count[b] = plan.count(b, plan.chunks.count);
    for (int64_t c = 0; c < plan.channels; ++c)
      split(plan.sum(b, plan.chunks.count)[c], 0.0, static_cast<Acc*>(args.out.total)[b * plan.channels + c],
            static_cast<Acc*>(args.out.residual)[b * plan.channels + c]);
  }
  return Status::ok;
}

template <class Acc>
struct CausalBackwardPlan : CausalPlan<Acc, CausalBackwardArgs> {
  // (batch, chunks + 1, C): dL/dS of the tokens in a chunk and after, and last what reaches the state at the end
  double* later;
  double* dcoeff;     // (batch, chunks, degree, E)
  double* head_grad;  // (batch, tokens, heads)

  CausalBackwardPlan(const CausalBackwardArgs& args, void* workspace)
      : CausalPlan<Acc, CausalBackwardArgs>(args, workspace),
        later(this->arena.template take<double>(args.features.batch * (this->chunks.count + 1) * this->channels)),
        dcoeff(this->arena.template take<double>(args.features.batch * this->chunks.count * this->tokens.coeff_size())),
        head_grad(this->gates.heads()
                      ? this->arena.template take<double>(args.features.batch * args.features.tokens * args.gates.heads)
                      : nullptr) {}

  double* after(int64_t batch, int64_t chunk) const {
    return later + (batch * (this->chunks.count + 1) + chunk) * this->channels;
  }

  // value becomes the gradient of γ, dsum the gradient of the running sum behind every token of the panel.
  void panel_backward(int64_t b, int64_t token, int64_t n, const Tile& tile, const Acc* inverses, const Acc* mean,
                      Acc* value, Acc* dsum) const {
    const CausalBackwardArgs& args = this->args;
    const char* dy = static_cast<const char*>(args.grad_y) +
                     (b * args.grad_y_batch_stride + token * args.grad_y_token_stride) * this->gates.element_size();
    this->gates.values(b, token, n, tile, value);
    this->gates.multiply_backward(dy, args.grad_y_token_stride, n, tile, mean, true, value, dsum);
    for (int64_t row = 0; row < n; ++row)
      for (int64_t c = 0; c < row_width(tile); ++c) dsum[row * row_width(tile) + c] *= inverses[row];
  }
};

template <class Acc>
Status run(const CausalBackwardArgs& args, void* workspace, const Executor& executor) {
  CausalBackwardPlan<Acc> plan(args, workspace);
  const Features& f = args.features;
  const int64_t chunks = plan.chunks.count, channels = plan.channels, heads = args.gates.heads;
  plan.prefix_sums(executor);

  // Forwards through every chunk: gradients of the gates, and the sum of what the chunk sends back.
  plan.each_task(executor, plan.gates.heads(), [&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
    const int64_t begin = plan.chunks.begin(chunk), end = plan.chunks.end(chunk);
    if (plan.head_grad && end > begin)
      std::fill_n(plan.head_grad + (b * f.tokens + begin) * heads, (end - begin) * heads, 0.0);
    for (int64_t i = first; i < last; ++i) {
      const Tile tile = plan.tokens.tiles[i];
      double base[kScratch / kPanel], count = plan.count(b, chunk);
      plan.gather(tile, plan.sum(b, chunk), base);
      each_range(tile, [&](int64_t, int64_t channel) { std::fill_n(plan.after(b, chunk) + channel, tile.width, 0.0); });
      each_panel(begin, end, [&](int64_t token, int64_t n) {
        alignas(64) Acc mean[kScratch], value[kScratch], dsum[kScratch];
        Acc inverses[kPanel];
        plan.inverse_counts(b, token, n, count, inverses);
        plan.panel_means(b, token, n, tile, inverses, base, mean);
        plan.panel_backward(b, token, n, tile, inverses, mean, value, dsum);
        FeatureTokens<Acc>::add(dsum, n, tile, nullptr, plan.after(b, chunk));
        plan.gates.backward(b, token, n, tile, value, args.grad_gate, plan.head_grad);
      });
    }
    if (plan.head_grad) plan.gates.finish_heads(b, begin, end, plan.head_grad, args.grad_gate);
  });

  parallel(executor, f.batch, [&](int64_t b) {
    const Acc* grad_total = static_cast<const Acc*>(args.grad_total);
    for (int64_t c = 0; c < channels; ++c) {
      plan.after(b, chunks)[c] = grad_total ? grad_total[b * channels + c] : 0.0;
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) plan.after(b, chunk)[c] += plan.after(b, chunk + 1)[c];
      static_cast<Acc*>(args.grad_prior)[b * channels + c] = Acc(plan.after(b, 0)[c]);
    }
  });

  // Backwards through every chunk: the gradient of a token's features is what it and all later tokens send back.
  plan.each_task(executor, false, [&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
    const int64_t begin = plan.chunks.begin(chunk), end = plan.chunks.end(chunk);
    double* dcoeff = plan.tokens.coeff_size() ? plan.dcoeff + (b * chunks + chunk) * plan.tokens.coeff_size() : nullptr;
    for (int64_t i = first; i < last; ++i) {
      const Tile tile = plan.tokens.tiles[i];
      if (dcoeff)
        each_range(tile, [&](int64_t, int64_t channel) {
          for (int d = 0; d < f.degree; ++d) std::fill_n(dcoeff + d * f.width + channel, tile.width, 0.0);
        });
      double base[kScratch / kPanel];
      plan.gather(tile, plan.after(b, chunk + 1), base);
      for (int64_t token = begin + (end - begin - 1) / kPanel * kPanel; token >= begin && end > begin;
           token -= kPanel) {
        const int64_t n = std::min(kPanel, end - token);
        alignas(64) Acc value[kScratch], dsum[kScratch];
        Acc inverses[kPanel];
        double count = plan.count(b, chunk);
        if (const Acc* weight = plan.tokens.weight(b, begin))
          for (int64_t t = begin; t < token; ++t) count += weight[t - begin];
        else
          count += double(token - begin);
        plan.inverse_counts(b, token, n, count, inverses);
        // The means matter for the gates' gradient alone, which the first walk has taken care of.
        plan.panel_backward(b, token, n, tile, inverses, value, value, dsum);
        each_range(tile, [&](int64_t range, int64_t) {
          linear_kernels<Acc>().scan(n, tile.width, dsum + range * tile.width, row_width(tile), nullptr, nullptr, true,
                                     base + range * tile.width);
        });
        plan.tokens.slopes_scratch(b, token, n, tile, dsum, args.grad_u, dcoeff);
      }
    }
  });
  plan.tokens.sum_coeff(plan.dcoeff, f.batch * chunks, args.grad_coeff, executor);
  return Status::ok;
}

}  // namespace

size_t workspace(const CausalArgs& args) {
  return args.features.dtype == Dtype::f64 ? CausalPlan<double, CausalArgs>(args, nullptr).arena.used()
                                           : CausalPlan<float, CausalArgs>(args, nullptr).arena.used();
}

Status causal_mix(const CausalArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

size_t workspace(const CausalBackwardArgs& args) {
  return planned_bytes<CausalBackwardPlan>(args.features.dtype, args);
}

Status causal_mix_backward(const CausalBackwardArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

}  // namespace pom::cpu
