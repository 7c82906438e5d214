// Second passes over partial sums: rows of numbers, one per piece, joined to states, running sums and gradients.
#pragma once

#include "cuda/block.cuh"
#include "cuda/plan.h"

namespace pom::cuda {

// Sums of the rows (batch, slots, channels) that belong to each group, and what else becomes of them.
template <class Acc>
struct Join {
  Pieces pieces;
  int64_t batch = 0, channels = 0;
  const Acc* rows = nullptr;
  const double* weights = nullptr;  // (batch, slots) sums of the weights; null where a token counts as one
  StateView prior;                  // added to every group; any pointer may be null
  const double* divisor = nullptr;  // (batch, groups) counts to divide by; 0 gives 0
  StateOut out;                     // (batch, groups, channels); any pointer may be null
  StateOut last;                    // (batch, 1, channels), of a scan: where it ends; any pointer may be null
};

// A sum for each group.
template <class Acc>
Status join(const Join<Acc>& args, void* stream);

// Sums of all groups up to each one or, `backwards`, from each one on.
template <class Acc>
Status scan(const Join<Acc>& args, bool backwards, void* stream);

// dc (width, degree) = Σ of the rows (count, degree, width)
template <class Acc>
Status join_coeff(const Acc* rows, int64_t count, int64_t degree, int64_t width, Acc* out, void* stream);

}  // namespace pom::cuda
