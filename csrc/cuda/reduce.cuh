// Second passes over partial sums: rows of numbers, one per piece, reduced to states, running sums and gradients.
#pragma once

#include "cuda/block.cuh"
#include "cuda/last_block.cuh"
#include "cuda/plan.h"
#include "cuda/work_partition.h"

namespace pom::cuda {

// Sums rows per group, then applies the epilogue below.
template <class Acc>
struct ReduceArgs {
  Pieces pieces;
  int64_t batch = 0, channels = 0;
  const Acc* rows = nullptr;
  const double* weights = nullptr;  // (batch, slots) sums of weights; null if all weights are 1
  StateView prior;                  // added to every group; pointers may be null
  const double* divisor = nullptr;  // (batch, groups) counts to divide by; a count of 0 gives 0
  StateOut out;                     // (batch, groups, channels); pointers may be null
};

// One sum per group.
template <class Acc>
Status reduce_groups(const ReduceArgs<Acc>& args, void* stream);

// Prefix sums over the groups; `backwards`: suffix sums.
template <class Acc>
Status scan_groups(const ReduceArgs<Acc>& args, bool backwards, void* stream);

// dc (width, degree) = Σ of the rows (count, degree, width).
template <class Acc>
Status reduce_coeff(const Acc* rows, int64_t count, const Features& f, void* grad_coeff, void* stream);

// The sum of one column over rows first … last, in double: every eighth row is added to the same one of eight sums,
// four rows at a time; then these are added. Bypasses L1, to see rows that other blocks wrote before a fence.
template <class Number>
__device__ double column_sum(const Number* column, int64_t stride, int64_t first, int64_t last) {
  constexpr int kSums = 8, kRows = 4, kParallelSums = sizeof(Number) == 4 ? 8 : 4;  // as many sums as registers allow
  double sum = 0;
  POM_UNROLL_1 for (int begin = 0; begin < kSums; begin += kParallelSums) {
    double sums[kParallelSums] = {};
    const Number* at = column + (first + begin) * stride;
    POM_UNROLL_1 for (int64_t left = last - first + 1 - begin; left > 0; left -= kSums * kRows) {
      Number x[kRows][kParallelSums];
      POM_UNROLL for (int k = 0; k < kRows; ++k) {
        POM_UNROLL for (int i = 0; i < kParallelSums; ++i) {
          x[k][i] = k * kSums + i < left ? __ldcg(at) : Number(0);
          at += stride;
        }
        at += (kSums - kParallelSums) * stride;
      }
      POM_UNROLL for (int i = 0; i < kParallelSums; ++i) {
        const double low = x[0][i], high = x[1][i];
        // Zeros after the end change no sum, but the order in which the others are added matters.
        if ((kRows - 1) * kSums + i < left)
          sums[i] += low + high + (double(x[2][i]) + double(x[3][i]));
        else
          sums[i] = sums[i] + low + high + double(x[2][i]);
      }
    }
    POM_UNROLL for (int i = 0; i < kParallelSums; ++i)
      sum += sums[i];
  }
  return sum;
}

template <class Acc>
POM_HD void write_state(const StateOut& out, int64_t at, double sum, double remainder) {
  Acc total, residual;
  split(sum, remainder, total, residual);
  if (out.total) static_cast<Acc*>(out.total)[at] = total;
  if (out.residual) static_cast<Acc*>(out.residual)[at] = residual;
}

// One channel of a group of sample b.
template <class Acc>
__device__ void reduce_channel(const ReduceArgs<Acc>& args, int64_t b, int64_t group, int64_t channel) {
  const int64_t slots = args.pieces.slots(), row = b * args.pieces.groups + group;
  double sum = column_sum(args.rows + b * slots * args.channels + channel, args.channels, args.pieces.first_slot(group),
                          args.pieces.last_slot(group));
  double remainder = add_prior<Acc>(args.prior, b * args.channels + channel, sum);
  if (args.divisor) {
    const double scale = inverse(args.divisor[row]);
    sum = scale != 0 ? sum * scale : 0;  // for infinite sums too
    remainder = 0;
  }
  write_state<Acc>(args.out, row * args.channels + channel, sum, remainder);
}

template <class Acc>
__device__ void reduce_count(const ReduceArgs<Acc>& args, int64_t b, int64_t group) {
  const Pieces& pieces = args.pieces;
  const double sum =
      args.weights ? column_sum(args.weights + b * pieces.slots(), 1, pieces.first_slot(group), pieces.last_slot(group))
                   : double(pieces.border(group + 1) - pieces.border(group));
  args.out.count[b * pieces.groups + group] = sum + (args.prior.count ? args.prior.count[b] : 0.0);
}

// Called by a block that has written the rows of its pieces of a channel tile, if a sample is one group: the last block
// with a piece of a sample reduces the sample's rows. `row` is the block's ChannelTileSum, `arrival_counters` is (batch,
// channel tiles). Which blocks share a sample follows from its shape alone, not from offsets, which may be wrong.
template <class Acc, class Row>
__device__ void reduce_samples(const ReduceArgs<Acc>& args, const WorkPartition& partition, const BlockIndex& block,
                               int channel_tiles, const Row& row, ArrivalCounter* arrival_counters) {
  POM_SHARED(memory);
  int* const broadcast = reinterpret_cast<int*>(memory);
  const unsigned slots = unsigned(args.pieces.slots()), end = partition.first(block.row + 1);
  __syncthreads();
  for (unsigned b = partition.first(block.row) / slots; b * slots < end; ++b) {
    const unsigned sharing = partition.block_of((b + 1) * slots - 1) - partition.block_of(b * slots) + 1;
    if (sharing > 1) {
      if (threadIdx.x == 0) *broadcast = is_last(arrival_counters + int64_t(b) * channel_tiles + block.tile, sharing);
      __syncthreads();
      const bool last = *broadcast;
      __syncthreads();
      if (!last) continue;
    }
    row.each([&](int64_t channel) { reduce_channel(args, b, 0, channel); });
    // By a thread with few channels to reduce.
    if (block.tile == 0 && args.out.count && threadIdx.x + 1 == blockDim.x) reduce_count(args, b, 0);
  }
}

}  // namespace pom::cuda
