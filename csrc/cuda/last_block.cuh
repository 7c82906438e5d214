// Which of several blocks is the last to be done with something, told in memory that nobody has cleared.
#pragma once

#include "cuda/launch.h"

namespace pom::cuda {

using Ticket = unsigned long long;
constexpr int kTicketBits = 16;  // of the blocks that are done
constexpr unsigned kMaxSharingBlocks = (1u << kTicketBits) - 1;
// The other 48 bits of a ticket in use. Whatever else memory holds, by a chance of 2^-48 at the worst it holds this;
// the last block takes it away again.
constexpr Ticket kInUse = 0x9e3779b97f4aull << kTicketBits;

// Whether all `blocks` that share the ticket have called this. For one thread of each block, between two barriers: what
// all threads of the others wrote before theirs is then seen by all threads of the last.
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
