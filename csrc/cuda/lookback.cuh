// Running sums over steps within one launch: each block publishes the sum of its step and waits for the sums of earlier
// steps. Blocks are numbered in the order they start, so a block never waits for one that has not started (Merrill and
// Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016). Unlike there, the order of additions
// does not depend on timing, so results are bit-identical from run to run.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "arena.h"
#include "cuda/allocate.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace pom::cuda {

constexpr int kRun = 8;  // steps; a block adds the earlier steps of its own run, and one row for all earlier runs

template <class Acc>
struct Lookback {
  unsigned batch = 0, steps = 1, channel_tiles = 1;
  int64_t channels = 0, blocks = 0;  // blocks: larger than any grid if the number does not fit
  // All bits are set until they are written. Null if there is only one step.
  unsigned* started = nullptr;  // blocks that have started, minus one
  Acc* rows = nullptr;          // (batch, steps, C): sum of each step
  double* runs = nullptr;       // (batch, runs, C): sum of all steps up to the end of each run

  Lookback() = default;
  Lookback(int64_t batch, int64_t steps, int channel_tiles, int64_t channels, Arena& arena)
      : batch(unsigned(batch)),
        steps(unsigned(steps)),
        channel_tiles(unsigned(channel_tiles)),
        channels(channels),
        blocks(batch <= kMaxBlocks / steps / max(1, channel_tiles) ? batch * steps * channel_tiles : kMaxBlocks + 1) {
    if (steps == 1) return;
    started = arena.take<unsigned>(1);
    runs = arena.take<double>(batch * (steps / kRun) * channels);
    rows = arena.take<Acc>(batch * steps * channels);
  }

  Status start(void* stream) const {
    if (!started) return Status::ok;
    const Acc* const end = rows + int64_t(batch) * steps * channels;
    return fill(started, 0xff, size_t(reinterpret_cast<const char*>(end) - reinterpret_cast<char*>(started)), stream);
  }
};

// What a block works on. Blocks that start later get later steps.
struct ScanStep {
  unsigned b = 0, index = 0, channel_tile = 0;
};
template <class Acc>
__device__ ScanStep claim_step(const Lookback<Acc>& sums) {
  POM_SHARED(memory);
  unsigned* const broadcast = reinterpret_cast<unsigned*>(memory);
  unsigned number = blockIdx.x;
  if (sums.started) {
    if (threadIdx.x == 0) *broadcast = atomicAdd(sums.started, 1u) + 1;
    __syncthreads();
    number = *broadcast;
  }
  const unsigned row = number / sums.channel_tiles;
  return {row % sums.batch, row / sums.batch, number % sums.channel_tiles};
}

// Whether all bits are set, as before the first write. As a number this is a NaN that arithmetic at most passes on.
template <class Number>
POM_HD bool is_unwritten(Number x) {
  std::conditional_t<sizeof(Number) == 4, uint32_t, uint64_t> bits;
  memcpy(&bits, &x, sizeof x);
  return bits + 1 == 0;
}
// Passes a number to another block. It arrives as a whole or not at all, and orders no other memory accesses.
template <class Number>
__device__ void publish(Number* at, Number x) {
  *static_cast<volatile Number*>(at) = is_unwritten(x) ? Number(NAN) : x;
}
template <class Number>
__device__ Number peek(const Number* at) {
  return *static_cast<const volatile Number*>(at);
}
template <class Number>
__device__ Number wait_for(const Number* at, Number seen) {
  for (; is_unwritten(seen); seen = peek(at)) __nanosleep(20);
  return seen;
}

// The sum of a column over all steps before this one. `own` is the sum of this step.
template <class Acc>
__device__ double sum_before(const Lookback<Acc>& sums, const ScanStep& step, int64_t column, double own) {
  if (!sums.started) return 0;
  const int run = int(step.index / kRun), in_run = int(step.index % kRun);
  Acc* const row = sums.rows + (int64_t(step.b) * sums.steps + step.index) * sums.channels + column;
  double* const run_row = sums.runs + (int64_t(step.b) * (sums.steps / kRun) + run) * sums.channels + column;
  const bool ends_run = in_run + 1 == kRun;
  if (!ends_run) publish(row, Acc(own));

  Acc x[kRun - 1];
  double sum = run > 0 ? peek(run_row - sums.channels) : 0;
  POM_UNROLL for (int i = 0; i < kRun - 1; ++i)
    x[i] = i < in_run ? peek(row - (in_run - i) * sums.channels) : Acc(0);
  double of_run = 0;
  POM_UNROLL for (int i = 0; i < kRun - 1; ++i)
    of_run += double(wait_for(row - (in_run - i) * sums.channels, x[i]));
  sum = wait_for(run_row - sums.channels, sum) + of_run;
  if (ends_run) publish(run_row, sum + own);
  return sum;
}

}  // namespace pom::cuda
