// Finds the last of several blocks to finish, with a counter in memory that need not be cleared first.
#pragma once

#include "cuda/launch.h"

namespace pom::cuda {

using Ticket = unsigned long long;
constexpr int kTicketBits = 16;  // that count the finished blocks
constexpr unsigned kMaxSharingBlocks = (1u << kTicketBits) - 1;
// The other 48 bits mark a counter in use: uninitialised memory holds this mark with a chance of at most 2^-48.
constexpr Ticket kInUse = 0x9e3779b97f4aull << kTicketBits;

// Whether all `blocks` that share the ticket have called this. To be called by one thread per block, between two
// barriers: the threads of the last block then see what all threads of the others wrote before.
__device__ inline bool is_last(Ticket* ticket, unsigned blocks) {
  __threadfence();
  Ticket seen = *static_cast<volatile Ticket*>(ticket);
  for (;;) {
    const Ticket before = seen >> kTicketBits == kInUse >> kTicketBits ? seen & kMaxSharingBlocks : 0;
    const bool last = before + 1 == blocks;
    const Ticket found = atomicCAS(ticket, seen, last ? 0 : kInUse | (before + 1));
    if (found == seen) {
      __threadfence();
      return last;
    }
    seen = found;
  }
}

}  // namespace pom::cuda
