// Running sums over steps in the launch that makes them: a block leaves the sums of its step for those behind it, and
// waits for those before it. The blocks are numbered as they start (Merrill and Garland, "Single-pass parallel prefix
// scan with decoupled look-back", 2016), so a block never waits for one that has not started. Unlike there, numbers are
// added in an order that no block's pace changes, so that results are the same bits from run to run.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "arena.h"
#include "cuda/allocate.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace pom::cuda {

constexpr int kRun = 8;  // steps; a block adds up those of its own run, and one row for all runs before

template <class Acc>
struct Lookback {
  unsigned batch = 0, steps = 1, channel_tiles = 1;
  int64_t channels = 0, blocks = 0;  // more blocks than a grid has if their number does not fit
  // Blank until they are written. Of one step alone there are none.
  unsigned* started = nullptr;  // one less than the blocks that have
  Acc* rows = nullptr;          // (batch, steps, C): sums of a step
  double* runs = nullptr;       // (batch, runs, C): of all steps up to the end of a run

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

// What a block works on. Later steps have later turns.
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

// Whether nothing has been written: all bits are set. That is a NaN which arithmetic at the most passes on.
template <class Number>
POM_HD bool is_unwritten(Number x) {
  std::conditional_t<sizeof(Number) == 4, uint32_t, uint64_t> bits;
  memcpy(&bits, &x, sizeof x);
  return bits + 1 == 0;
}
// A number for another block, or from it. It is there as a whole or not at all, and nothing else goes with it.
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

// The sum of a column over the steps before the block's. `own` is the step's.
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
  POM_UNROLL
  for (int i = 0; i < kRun - 1; ++i) x[i] = i < in_run ? peek(row - (in_run - i) * sums.channels) : Acc(0);
  double of_run = 0;
  POM_UNROLL
  for (int i = 0; i < kRun - 1; ++i) of_run += double(wait_for(row - (in_run - i) * sums.channels, x[i]));
  sum = wait_for(run_row - sums.channels, sum) + of_run;
  if (ends_run) publish(run_row, sum + own);
  return sum;
}

}  // namespace pom::cuda
