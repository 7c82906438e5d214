// Readout forward and backward: every query token gates the mean features of its group.

#include "cpu/means.h"
#include "cpu/tokens.h"

namespace pom::cpu {
namespace {

template <class Acc, class Args>
struct ReadoutPlan {
  Arena arena;
  GateTokens<Acc> gates;
  Tiles tiles;
  Pieces pieces;
  int64_t rows;  // groups of all sequences
  Acc* mean;     // (batch, groups, C)

  ReadoutPlan(const Args& args, void* workspace)
      : arena(workspace),
        gates(args.gates),
        tiles(1, args.gates.channels, GateTokens<Acc>::channel_rotary(args.gates)),
        pieces{Chunks(args.gates.tokens), Segments{args.gates.tokens, args.groups, args.offsets}},
        rows(args.gates.batch * args.groups),
        mean(arena.take<Acc>(rows * args.gates.channels)) {}
};

template <class Acc>
struct ForwardPlan : ReadoutPlan<Acc, ReadoutArgs> {
  Acc* mean_tangent;  // (batch, groups, C), where the state has a direction

  ForwardPlan(const ReadoutArgs& args, void* workspace)
      : ReadoutPlan<Acc, ReadoutArgs>(args, workspace),
        mean_tangent(args.tangent.total ? this->arena.template take<Acc>(this->rows * args.gates.channels) : nullptr) {}
};

template <class Acc>
Status run(const ReadoutArgs& args, void* workspace, const Executor& executor) {
  const ForwardPlan<Acc> plan(args, workspace);
  const Gates& g = args.gates;
  means(args.state, plan.rows, g.channels, plan.mean, executor);
  if (args.tangent.total) {
    const StateView tangent = {args.tangent.total, args.tangent.residual, args.state.count};
    means(tangent, plan.rows, g.channels, plan.mean_tangent, executor);
  }
  const int64_t chunks = plan.pieces.chunks.count;
  const TileGroups groups(plan.tiles.count(), g.batch * chunks);
  parallel(executor, g.batch * chunks * groups.count, [&](int64_t task) {
    const int64_t b = task / groups.count / chunks, chunk = task / groups.count % chunks, part = task % groups.count;
    plan.pieces.each(chunk, [&](int64_t, int64_t group, int64_t begin, int64_t end) {
      const int64_t row = (b * args.groups + group) * g.channels;
      const Acc* mean = plan.mean + row;
      each_panel(begin, end, [&](int64_t token, int64_t count) {
        for (int64_t i = groups.begin(part); i < groups.end(part); ++i) {
          const Tile tile = plan.tiles[i];
          alignas(64) Acc outer[kScratch], value[kScratch];  // γ, or its derivative; γ itself
          plan.gates.values(b, token, count, tile, outer);
          if (!args.tangent.total) {
            plan.gates.multiply(b, token, count, tile, outer, mean, false, args.y);
            continue;
          }
          plan.gates.values(b, token, count, tile, nullptr, value);
          plan.gates.multiply_along(b, token, count, tile, value, mean, outer, plan.mean_tangent + row, args.y);
        }
      });
    });
  });
  return Status::ok;
}

template <class Acc>
struct ReadoutBackwardPlan : ReadoutPlan<Acc, ReadoutBackwardArgs> {
  double* dmean;      // (batch, pieces, C): gradient of the mean, a part from every piece
  double* head_grad;  // (batch, tokens, heads): gradient of the gates' values, with heads

  ReadoutBackwardPlan(const ReadoutBackwardArgs& args, void* workspace)
      : ReadoutPlan<Acc, ReadoutBackwardArgs>(args, workspace),
        dmean(this->arena.template take<double>(args.gates.batch * this->pieces.count() * args.gates.channels)),
        head_grad(this->gates.heads()
                      ? this->arena.template take<double>(args.gates.batch * args.gates.tokens * args.gates.heads)
                      : nullptr) {}
};

template <class Acc>
Status run(const ReadoutBackwardArgs& args, void* workspace, const Executor& executor) {
  const ReadoutBackwardPlan<Acc> plan(args, workspace);
  const Gates& g = args.gates;
  means(args.state, plan.rows, g.channels, plan.mean, executor);
  const int64_t chunks = plan.pieces.chunks.count, slots = plan.pieces.count();
  // The gradient of a head's gate is a sum over channels: its tiles stay in one task.
  const TileGroups groups(plan.tiles.count(), plan.gates.heads() ? kWantedTasks : g.batch * chunks);
  parallel(executor, g.batch * chunks * groups.count, [&](int64_t task) {
    const int64_t b = task / groups.count / chunks, chunk = task / groups.count % chunks, part = task % groups.count;
    if (plan.head_grad && plan.pieces.chunks.end(chunk) > plan.pieces.chunks.begin(chunk))
      std::fill_n(plan.head_grad + (b * g.tokens + plan.pieces.chunks.begin(chunk)) * g.heads,
                  (plan.pieces.chunks.end(chunk) - plan.pieces.chunks.begin(chunk)) * g.heads, 0.0);
    plan.pieces.each(chunk, [&](int64_t piece, int64_t group, int64_t begin, int64_t end) {
      const Acc* mean = plan.mean + (b * args.groups + group) * g.channels;
      double* dmean = plan.dmean + (b * slots + piece) * g.channels;
      for (int64_t i = groups.begin(part); i < groups.end(part); ++i) {
        const Tile tile = plan.tiles[i];
        each_range(tile, [&](int64_t, int64_t channel) { std::fill_n(dmean + channel, tile.width, 0.0); });
        each_panel(begin, end, [&](int64_t token, int64_t count) {
          alignas(64) Acc value[kScratch], product[kScratch];
          plan.gates.values(b, token, count, tile, value);
          const char* dy =
              static_cast<const char*>(args.grad_y) +
              (b * args.grad_y_batch_stride + token * args.grad_y_token_stride) * plan.gates.element_size();
          plan.gates.multiply_backward(dy, args.grad_y_token_stride, count, tile, mean, false, value, product);
          FeatureTokens<Acc>::add(product, count, tile, nullptr, dmean);
          plan.gates.backward(b, token, count, tile, value, args.grad_gate, plan.head_grad);
        });
      }
    });
    if (plan.head_grad)
      plan.gates.finish_heads(b, plan.pieces.chunks.begin(chunk), plan.pieces.chunks.end(chunk), plan.head_grad,
                              args.grad_gate);
  });

  parallel(executor, plan.rows, [&](int64_t row) {
    const int64_t b = row / args.groups, group = row % args.groups;
    const double scale = inverse(args.state.count[row]);
    Acc* out = static_cast<Acc*>(args.grad_total) + row * g.channels;
    for (int64_t first = 0; first < g.channels; first += kTileWidth) {
      const int64_t width = std::min(kTileWidth, g.channels - first);
      double sum[kTileWidth] = {};
      plan.pieces.of_group(group, [&](int64_t piece) {
        const double* part = plan.dmean + (b * slots + piece) * g.channels + first;
        for (int64_t c = 0; c < width; ++c) sum[c] += part[c];
      });
      for (int64_t c = 0; c < width; ++c) out[first + c] = scale != 0 ? Acc(sum[c] * scale) : Acc(0);
    }
  });
  return Status::ok;
}

}  // namespace

size_t workspace(const ReadoutArgs& args) { return planned_bytes<ForwardPlan>(args.gates.dtype, args); }

Status readout(const ReadoutArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.gates.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

size_t workspace(const ReadoutBackwardArgs& args) { return planned_bytes<ReadoutBackwardPlan>(args.gates.dtype, args); }

Status readout_backward(const ReadoutBackwardArgs& args, void* workspace, size_t bytes, const Executor& executor) {
  return checked_run(args, args.gates.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, executor); });
}

}  // namespace pom::cpu
