// A dense mask says which group sums which token. φ is computed once per token, and the state is a matrix product,
// total (groups, C) = mask (groups, tokens) φ (tokens, C); the backward is dφ = maskᵀ grad.
#pragma once

#include "cuda/partial_sums.cuh"
#include "cuda/reduce.cuh"

namespace pom::cuda {

constexpr int kMaskTile = 64;         // rows and channels of a block
constexpr int kMaskChunk = 64;        // products that are added in Acc before they are added in double
constexpr int kMaskBlocks = 2 * 132;  // per sample, which keep a large GPU busy; with fewer the depth is cut

// out = A x. A is the mask of a sample, or its transpose.
template <class Acc>
struct MaskProduct {
  int64_t batch = 0, rows = 0, depth = 0, channels = 0;
  const Acc* mask = nullptr;  // (batch, rows, depth), or transposed (batch, depth, rows)
  bool transposed = false, aligned = false;
  const Acc* x = nullptr;  // (batch, depth, channels)
  int row_tiles = 0, channel_tiles = 0, cuts = 1;
  int64_t length = 0;                 // of a cut of the depth; a multiple of kMaskChunk
  Acc* partial = nullptr;             // (batch, rows, cuts, channels), if the depth is cut
  double* partial_weights = nullptr;  // (batch, rows, cuts), if the depth is cut
  StateView prior;                    // added to every row; pointers may be null
  StateOut out;  // (batch, rows, channels); residual and count may be null, and count is null if A is transposed

  // Chooses the cuts by the shape of one sample alone, and takes workspace for them.
  MaskProduct(int64_t batch, int64_t rows, int64_t depth, int64_t channels, const void* mask, bool transposed,
              Arena& arena)
      : batch(batch),
        rows(rows),
        depth(depth),
        channels(channels),
        mask(static_cast<const Acc*>(mask)),
        transposed(transposed),
        row_tiles(int(ceil_div(rows, kMaskTile))),
        channel_tiles(int(ceil_div(channels, kMaskTile))) {
    const int64_t tiles = max(1, int64_t(row_tiles) * channel_tiles), chunks = max(1, ceil_div(depth, kMaskChunk));
    cuts = int(max(1, min(kMaskBlocks / tiles, ceil_div(chunks, 4))));
    length = ceil_div(chunks, cuts) * kMaskChunk;
    cuts = int(max(1, ceil_div(depth, length)));  // leaves out empty cuts
    if (cuts == 1) return;
    partial = arena.take<Acc>(batch * rows * cuts * channels);
    if (!transposed) partial_weights = arena.take<double>(batch * rows * cuts);
  }

  // One launch, or two if the depth is cut.
  Status launch(void* stream) const;
};

// State with a dense mask.
template <class Acc>
struct MaskedStatePlan {
  const StateArgs& args;
  Arena arena;
  Acc* phi;  // (batch, tokens, C)
  MaskProduct<Acc> product;

  MaskedStatePlan(const StateArgs& args, void* workspace)
      : args(args),
        arena(workspace),
        phi(arena.take<Acc>(args.features.batch * args.features.tokens * args.features.channels())),
        product(args.features.batch, args.groups.count, args.features.tokens, args.features.channels(),
                args.groups.mask, false, arena) {
    product.x = phi;
    product.prior = args.prior;
    product.out = args.out;
  }

  Status run(void* stream) const;
};

}  // namespace pom::cuda
