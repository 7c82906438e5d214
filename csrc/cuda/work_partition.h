// Splits the pieces of all samples among blocks that each go through several.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/plan.h"

namespace pom::cuda {

// Neighbouring pieces go to one block. The result of a piece does not depend on its block.
struct WorkPartition {
  unsigned pieces = 0, blocks = 1;  // no more blocks than pieces

  POM_HD unsigned first(unsigned block) const { return unsigned(uint64_t(block) * pieces / blocks); }
  POM_HD unsigned block_of(unsigned piece) const { return unsigned(((piece + 1) * uint64_t(blocks) - 1) / pieces); }
};

// Whether the numbers of all pieces and of a sample's tokens fit in 32 bits.
inline Status check_partition(int64_t batch, const Pieces& pieces) {
  return batch * pieces.slots() > kMaxBlocks || pieces.tokens > kMaxTokens ? Status::bad_size : Status::ok;
}

// As many blocks per channel tile as the GPU runs at a time, with `resident` blocks per SM.
WorkPartition partition_work(unsigned pieces, int channel_tiles, int resident);

}  // namespace pom::cuda
