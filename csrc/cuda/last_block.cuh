// Finds the last of several blocks to finish, with a counter in memory that need not be cleared first.
#pragma once

#include "cuda/launch.h"

namespace pom::cuda {

using ArrivalCounter = unsigned long long;
constexpr int kCounterBits = 16;  // that count the finished blocks
constexpr unsigned kMaxSharingBlocks = (1u << kCounterBits) - 1;
// The other 48 bits mark a counter in use: uninitialised memory holds this mark with a chance of at most 2^-48.
constexpr ArrivalCounter kInUse = 0x9e3779b97f4aull << kCounterBits;

// Whether all `blocks` that share the arrival counter have called this. To be called by one thread per block, between
// two barriers: the threads of the last block then see what all threads of the others wrote before.
__device__ inline bool is_last(ArrivalCounter* arrival_counter, unsigned blocks) {
  __threadfence();
  ArrivalCounter seen = *static_cast<volatile ArrivalCounter*>(arrival_counter);
  for (;;) {
    const ArrivalCounter before = seen >> kCounterBits == kInUse >> kCounterBits ? seen & kMaxSharingBlocks : 0;
    const bool last = before + 1 == blocks;
    const ArrivalCounter found = atomicCAS(arrival_counter, seen, last ? 0 : kInUse | (before + 1));
    if (found == seen) {
      __threadfence();
      return last;
    }
    seen = found;
  }
}

}  // namespace pom::cuda
