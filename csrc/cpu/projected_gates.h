// Queries by blocks, their projections, which are gates, and the groups that they read.
#pragma once

#include "cpu/products.h"
#include "cpu/token_blocks.h"

namespace pom::cpu {

struct ProjectedGates {
  const FoldedReadoutArgs& args;
  Gates all;      // the gates of all queries, without their numbers
  int64_t width;  // of the gates of a query
  int64_t size, acc_bytes;
  Blocks blocks;
  BlockGroups groups;

  ProjectedGates(const FoldedReadoutArgs& args, const Gates& all, const Blocks& blocks, Arena& arena)
      : args(args),
        all(all),
        width(all.width()),
        size(size_of(args.dtype)),
        acc_bytes(args.dtype == Dtype::f64 ? 8 : 4),
        blocks(blocks),
        groups({args.queries, args.groups, args.offsets}, arena) {}

  MatrixProduct projection(const Tokens& x, const Block& block, const void* bias) const {
    return {
        args.dtype, 0, block.rows(), args.dim, width, rows_of(x, block, args.dtype), dense(args.gate_weight, args.dim),
        bias};
  }
  Gates gates(const Block& block, const void* gate, const void* tangent = nullptr) const {
    Gates g = all;
    g.batch = block.samples, g.tokens = block.tokens;
    g.gate = gate, g.tangent = tangent;
    g.gate_batch_stride = g.tangent_batch_stride = block.tokens * width;
    g.gate_token_stride = g.tangent_token_stride = width;
    g.rotary = rotary_of(g.rotary, block, acc_bytes);
    return g;
  }
  // The row of the first group of a block in a state of all samples, and the state from there.
  int64_t row(const Block& block, const LocalGroups& local) const { return block.sample * args.groups + local.first; }
  StateView view(const StateView& state, int64_t row) const {
    const int64_t bytes = row * args.channels * acc_bytes;
    return {at(state.total, bytes), at(state.residual, bytes), state.count ? state.count + row : nullptr};
  }
};

inline bool evenly_spaced(const FoldedReadoutArgs& args) {
  return evenly_spaced(args.x, args.batch, args.queries) && evenly_spaced(args.x_tangent, args.batch, args.queries);
}

}  // namespace pom::cpu
