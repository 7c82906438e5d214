// State forward and backward: φ summed over the tokens of each group, and the way back.

#include "cpu/tokens.h"
#include "residual.h"

namespace pom::cpu {
namespace {

Segments segments_of(const Features& f, const Groups& groups) { return {f.tokens, groups.count, groups.offsets}; }

template <class Acc>
struct StatePlan {
  Arena arena;
  FeatureTokens<Acc> tokens;
  Pieces pieces;
  int64_t slots;    // partial sums of one sequence
  double* partial;  // (batch, slots, C)

  StatePlan(const StateArgs& args, void* workspace)
      : arena(workspace),
        tokens(args.features, arena),
        pieces{Chunks(args.features.tokens), segments_of(args.features, args.groups)},
        slots(args.groups.mask ? args.groups.count : pieces.count()),
        partial(arena.take<double>(args.features.batch * slots * tokens.channels())) {}
};

// Count of every group: the number of its tokens, or the sum of their weights, and what came before.
template <class Acc>
void counts(const StateArgs& args) {
  const Features& f = args.features;
  const Segments segments = segments_of(f, args.groups);
  for (int64_t b = 0; b < f.batch; ++b) {
    const double before = args.prior.count ? args.prior.count[b] : 0.0;
    double count = 0;
    for (int64_t g = 0; g < args.groups.count; ++g) {
      if (!args.groups.cumulative) count = 0;
      const Acc* weight = static_cast<const Acc*>(args.groups.mask ? args.groups.mask : f.weight);
      if (weight) weight += args.groups.mask ? (b * args.groups.count + g) * f.tokens : b * f.tokens;
      const int64_t begin = args.groups.mask ? 0 : segments.begin(g),
                    end = args.groups.mask ? f.tokens : segments.end(g);
      if (weight)
        for (int64_t n = begin; n < end; ++n) count += weight[n];
      else
        count += double(end - begin);
      args.out.count[b * args.groups.count + g] = before + count;
    }
  }
}

// The partial sum of every piece.
template <class Acc>
void sum_pieces(const StateArgs& args, StatePlan<Acc>& plan, const Executor& executor) {
  const Features& f = args.features;
  const int64_t chunks = plan.pieces.chunks.count, channels = plan.tokens.channels();
  const TileGroups groups(plan.tokens.tiles.count(), f.batch * chunks);
  parallel(executor, f.batch * chunks * groups.count, [&](int64_t task) {
    const int64_t b = task / groups.count / chunks, chunk = task / groups.count % chunks, group = task % groups.count;
    plan.pieces.each(chunk, [&](int64_t piece, int64_t, int64_t begin, int64_t end) {
      double* total = plan.partial + (b * plan.slots + piece) * channels;
      for (int64_t i = groups.begin(group); i < groups.end(group); ++i)
        each_range(plan.tokens.tiles[i],
                   [&](int64_t, int64_t channel) { std::fill_n(total + channel, plan.tokens.tiles[i].width, 0.0); });
      plan.tokens.sum(b, begin, end, groups.begin(group), groups.end(group), total);
    });
  });
}

// With a dense mask every group sees every token: features of a panel once, then added to all groups.
template <class Acc>
void sum_masked(const StateArgs& args, StatePlan<Acc>& plan, const Executor& executor) {
  const Features& f = args.features;
  const int64_t channels = plan.tokens.channels(), tiles = plan.tokens.tiles.count();
  parallel(executor, f.batch * tiles, [&](int64_t task) {
    const int64_t b = task / tiles;
    const Tile tile = plan.tokens.tiles[task % tiles];
    double* total = plan.partial + b * plan.slots * channels;
    for (int64_t g = 0; g < args.groups.count; ++g)
      each_range(tile, [&](int64_t, int64_t c) { std::fill_n(total + g * channels + c, tile.width, 0.0); });
    each_panel(0, f.tokens, [&](int64_t token, int64_t count) {
      alignas(64) Acc phi[kScratch];
      plan.tokens.features(b, token, count, tile, phi);
      for (int64_t g = 0; g < args.groups.count; ++g) {
        const Acc* weight = static_cast<const Acc*>(args.groups.mask) + (b * args.groups.count + g) * f.tokens + token;
        FeatureTokens<Acc>::add(phi, count, tile, weight, total + g * channels);
      }
    });
  });
}

template <class Acc>
Status run(const StateArgs& args, void* workspace, const Executor& executor) {
  StatePlan<Acc> plan(args, workspace);
  plan.tokens.transpose_coeff();
  counts<Acc>(args);
  if (args.groups.mask)
    sum_masked(args, plan, executor);
  else
    sum_pieces(args, plan, executor);

  const int64_t channels = plan.tokens.channels(), groups = args.groups.count;
  const int64_t blocks = (channels + kTileWidth - 1) / kTileWidth;
  parallel(executor, args.features.batch * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, first = task % blocks * kTileWidth, width = std::min(kTileWidth, channels - first);
    const double* partial = plan.partial + b * plan.slots * channels + first;
    double sum[kTileWidth] = {};
    for (int64_t g = 0; g < groups; ++g) {
      if (!args.groups.cumulative) std::fill_n(sum, width, 0.0);
      auto add = [&](int64_t slot) {
        for (int64_t c = 0; c < width; ++c) sum[c] += partial[slot * channels + c];
      };
      if (args.groups.mask)
        add(g);
      else
        plan.pieces.of_group(g, add);
      const int64_t at = (b * groups + g) * channels + first, before = b * channels + first;
      for (int64_t c = 0; c < width; ++c) {
        double total = sum[c];
        const double rest = add_prior<Acc>(args.prior, before + c, total);
        split(total, rest, static_cast<Acc*>(args.out.total)[at + c], static_cast<Acc*>(args.out.residual)[at + c]);
      }
    }
  });
  return Status::ok;
}

template <class Acc>
struct StateBackwardPlan {
  Arena arena;
  FeatureTokens<Acc> tokens;
  Pieces pieces;
  Acc* suffix;     // (batch, groups, C): gradient of every group's own tokens, for cumulative groups
  double* dcoeff;  // (batch, chunks, degree, width)

  StateBackwardPlan(const StateBackwardArgs& args, void* workspace)
      : arena(workspace),
        tokens(args.features, arena),
        pieces{Chunks(args.features.tokens), segments_of(args.features, args.groups)},
        suffix(args.groups.cumulative ? arena.take<Acc>(args.features.batch * args.groups.count * tokens.channels())
                                      : nullptr),
        dcoeff(arena.take<double>(args.features.batch * pieces.chunks.count * tokens.coeff_size())) {}
};

template <class Acc>
void suffix_sums(const StateBackwardArgs& args, int64_t channels, Acc* suffix, const Executor& executor) {
  parallel(executor, args.features.batch, [&](int64_t b) {
    const int64_t groups = args.groups.count, first = b * groups * channels;
    const Acc* grad = static_cast<const Acc*>(args.grad_total) + first;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t g = groups - 1; g >= 0; --g) suffix[first + g * channels + c] = Acc(sum += grad[g * channels + c]);
    }
  });
}

template <class Acc>
Status run(const StateBackwardArgs& args, void* workspace, const Executor& executor) {
  StateBackwardPlan<Acc> plan(args, workspace);
  plan.tokens.transpose_coeff();
  const Features& f = args.features;
  const int64_t channels = plan.tokens.channels(), coeff_size = plan.tokens.coeff_size();
  const int64_t chunks = plan.pieces.chunks.count;
  const Acc* grad = static_cast<const Acc*>(args.grad_total);
  if (plan.suffix) {
    suffix_sums(args, channels, plan.suffix, executor);
    grad = plan.suffix;
  }

  const TileGroups groups(plan.tokens.tiles.count(), f.batch * chunks);
  parallel(executor, f.batch * chunks * groups.count, [&](int64_t task) {
    const int64_t b = task / groups.count / chunks, chunk = task / groups.count % chunks, group = task % groups.count;
    double* dcoeff = coeff_size ? plan.dcoeff + (b * chunks + chunk) * coeff_size : nullptr;
    for (int64_t i = groups.begin(group); i < groups.end(group); ++i) {
      const Tile tile = plan.tokens.tiles[i];
      if (dcoeff)
        each_range(tile, [&](int64_t, int64_t channel) {
          for (int d = 0; d < f.degree; ++d) std::fill_n(dcoeff + d * f.width + channel, tile.width, 0.0);
        });
      const Acc* grad_b = grad + b * args.groups.count * channels;
      if (args.groups.mask) {
        each_panel(plan.pieces.chunks.begin(chunk), plan.pieces.chunks.end(chunk), [&](int64_t token, int64_t count) {
          // dL/dφ of a token: the gradients of the groups, weighted by how much each sees of it.
          alignas(64) Acc dphi[kScratch];
          const Acc* mask = static_cast<const Acc*>(args.groups.mask) + b * args.groups.count * f.tokens + token;
          for (int64_t row = 0; row < count; ++row)
            each_range(tile, [&](int64_t range, int64_t channel) {
              double sum[kTileWidth] = {};
              for (int64_t g = 0; g < args.groups.count; g += kPanel)
                linear_kernels<Acc>().sum(std::min(kPanel, args.groups.count - g), tile.width,
                                          grad_b + g * channels + channel, channels, mask + g * f.tokens + row,
                                          f.tokens, sum);
              std::copy_n(sum, tile.width, dphi + row * row_width(tile) + range * tile.width);
            });
          plan.tokens.slopes_scratch(b, token, count, tile, dphi, args.grad_u, dcoeff);
        });
      } else {
        plan.pieces.each(chunk, [&](int64_t, int64_t g, int64_t begin, int64_t end) {
          each_panel(begin, end, [&](int64_t token, int64_t count) {
            plan.tokens.slopes_shared(b, token, count, tile, grad_b + g * channels, args.grad_u, dcoeff);
          });
        });
      }
    }
  });
  plan.tokens.sum_coeff(plan.dcoeff, f.batch * chunks, args.grad_coeff, executor);
  return Status::ok;
}

}  // namespace

size_t workspace(const StateArgs& args) { return planned_bytes<StatePlan>(args.features.dtype, args); }

Status state(const StateArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

size_t workspace(const StateBackwardArgs& args) { return planned_bytes<StateBackwardPlan>(args.features.dtype, args); }

Status state_backward(const StateBackwardArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

}  // namespace pom::cpu
