// Running sums over steps in the launch that makes them: a block leaves the sums of its step for those behind it, and
// waits for those before it. The blocks are numbered as they start (Merrill and Garland, "Single-pass parallel prefix
// scan with decoupled look-back", 2016), so a block never waits for one that has not started. Unlike there, numbers are
// added in an order that no block's pace changes, so that results are the same bits from run to run.
#pragma once

#include "arena.h"
#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/plan.h"

namespace pom::cuda {

constexpr int kRun = 8;  // steps; a block adds up those of its own run, and one row for all runs before

template <class Acc>
struct Lookback {
  unsigned batch = 0, steps = 1, slabs = 1;
  int64_t channels = 0;
  unsigned* flags = nullptr;  // how many blocks have started, then whether each row is there
  Acc* rows = nullptr;        // (batch, steps, C): sums of a step
  double* runs = nullptr;     // (batch, runs, C): of all steps up to the end of a run

  Lookback() = default;
  Lookback(int64_t batch, int64_t steps, int slabs, int64_t channels, Arena& arena)
      : batch(unsigned(batch)), steps(unsigned(steps)), slabs(unsigned(slabs)), channels(channels) {
    if (steps == 1) return;
    flags = arena.take<unsigned>(flag_count());
    rows = arena.take<Acc>(batch * steps * channels);
    runs = arena.take<double>(batch * of_runs() * channels);
  }

  POM_HD unsigned of_runs() const { return steps / kRun; }
  POM_HD int64_t flag_count() const { return 1 + int64_t(batch) * (steps + of_runs()) * slabs; }
  int64_t blocks() const { return int64_t(batch) * steps * slabs; }
  Status start(void* stream) const { return flags ? clear(flags, flag_count() * sizeof(unsigned), stream) : Status::ok; }
};

// What a block works on. Later steps have later turns.
struct Turn {
  unsigned b = 0, step = 0, slab = 0;
};
template <class Acc>
__device__ Turn take_turn(const Lookback<Acc>& sums) {
  POM_SHARED(memory);
  unsigned* const told = reinterpret_cast<unsigned*>(memory);
  unsigned number = blockIdx.x;
  if (sums.flags) {
    if (threadIdx.x == 0) *told = atomicAdd(sums.flags, 1u);
    __syncthreads();
    number = *told;
  }
  const unsigned row = number / sums.slabs;
  return {row % sums.batch, row / sums.batch, number % sums.slabs};
}

__device__ inline void wait_for(const unsigned* flag) {
  while (!*static_cast<const volatile unsigned*>(flag)) __nanosleep(32);
  __threadfence();
}
// For all threads of a block, when some have written what the flag stands for.
__device__ inline void raise(unsigned* flag) {
  __syncthreads();
  if (threadIdx.x > 0) return;
  __threadfence();  // behind the barrier one fence serves what all threads have written
  *static_cast<volatile unsigned*>(flag) = 1;
}

// The sum of a column over the steps before the block's. All threads of the block call it, each with a column of its
// own and the step's sum of that, or with column -1.
template <class Acc>
__device__ double sum_before(const Lookback<Acc>& sums, const Turn& turn, int64_t column, double own) {
  if (!sums.flags) return 0;
  const unsigned run = turn.step / kRun, in_run = turn.step % kRun, of_runs = sums.of_runs();
  const bool ends_run = in_run + 1 == kRun, mine = column >= 0;
  Acc* const row = sums.rows + (int64_t(turn.b) * sums.steps + turn.step) * sums.channels + column;
  double* const run_row = sums.runs + (int64_t(turn.b) * of_runs + run) * sums.channels + column;
  unsigned* const flag = sums.flags + 1 + (int64_t(turn.b) * sums.steps + turn.step) * sums.slabs + turn.slab;
  unsigned* const run_flag = sums.flags + 1 + int64_t(sums.batch) * sums.steps * sums.slabs +
                             (int64_t(turn.b) * of_runs + run) * sums.slabs + turn.slab;
  if (!ends_run) {
    if (mine) *row = Acc(own);
    raise(flag);
  }
  if (threadIdx.x > 0 && threadIdx.x <= in_run)
    wait_for(flag - int64_t(threadIdx.x) * sums.slabs);
  else if (threadIdx.x == kRun && run > 0)
    wait_for(run_flag - sums.slabs);
  __syncthreads();

  double sum = 0;
  if (mine) {
    if (run > 0) sum = __ldcg(run_row - sums.channels);
    Acc x[kRun - 1];
    POM_UNROLL
    for (int i = 0; i < kRun - 1; ++i) x[i] = i < int(in_run) ? __ldcg(row - (int(in_run) - i) * sums.channels) : Acc(0);
    POM_UNROLL
    for (int i = 0; i < kRun - 1; ++i) sum += double(x[i]);
  }
  if (ends_run) {
    if (mine) *run_row = sum + own;
    raise(run_flag);
  }
  return sum;
}

}  // namespace pom::cuda
