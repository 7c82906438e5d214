// Pieces of work dealt to blocks that each walk through several.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/plan.h"

namespace pom::cuda {

// Pieces of all samples dealt to the blocks of a slab, neighbours to one block. What becomes of a piece does not depend
// on the block that has it.
struct WorkPartition {
  unsigned pieces = 0, blocks = 1;  // no more blocks than pieces

  POM_HD unsigned first(unsigned block) const { return unsigned(uint64_t(block) * pieces / blocks); }
  POM_HD unsigned block_of(unsigned piece) const { return unsigned(((piece + 1) * uint64_t(blocks) - 1) / pieces); }
};

// Whether the pieces of all samples can be dealt: their numbers and those of a sample's tokens fit in 32 bits.
inline Status check_partition(int64_t batch, const Pieces& pieces) {
  return batch * pieces.slots() > kMaxBlocks || pieces.tokens > kMaxTokens ? Status::bad_size : Status::ok;
}

// As many blocks for each of `slabs` as the GPU runs at once, `resident` of them on a multiprocessor.
WorkPartition partition_work(unsigned pieces, int channel_tiles, int resident);

}  // namespace pom::cuda
