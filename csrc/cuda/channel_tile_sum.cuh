// Sums the numbers that the threads of a block hold of a channel tile over the rows of threads, and writes one row.
// Every thread sums and writes its own columns; neighbouring threads own neighbouring columns.
#pragma once

#include "cuda/block.cuh"
#include "cuda/plan.h"

namespace pom::cuda {

template <class Acc, int Vec, int ranges>
class ChannelTileSum {
 public:
  static constexpr int kRows = kThreads / kLanes, kNumbers = ranges * Vec, kAll = kNumbers * kLanes;
  static constexpr int kOwn = (kAll + kThreads - 1) / kThreads;               // columns of one thread
  static constexpr int kStride = kLanes + (Vec > 1 ? kLanes / Vec : 0);       // avoids bank conflicts
  static constexpr size_t kBytes = sizeof(Acc) * kRows * kNumbers * kStride;  // of shared memory

  __device__ ChannelTileSum(const ChannelTiles& channel_tiles, unsigned channel_tile) {
    POM_UNROLL for (int i = 0; i < kOwn; ++i) {
      const int number = number_of(i), range = number / (kLanes * Vec), run = number % (kLanes * Vec);
      const Place place = channel_tiles.place(channel_tile, run / Vec);
      const bool valid = number < kAll && range < place.ranges;
      column_[i] = valid ? int(place.channel + range * place.stride) + run % Vec : -1;
    }
  }

  // Calls body(column) for each column of this thread.
  template <class Body>
  __device__ void each(Body body) const {
    POM_UNROLL for (int i = 0; i < kOwn; ++i)
      if (column_[i] >= 0) body(column_[i]);
  }

  // out[column] = Σ x over the rows of threads, in the order of sum_rows(). `x`: this thread's, [range * Vec + i].
  __device__ void sum(const Acc (&x)[kNumbers], Acc* shared, Acc* out) const {
    const int row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
    __syncthreads();  // earlier contents have been read
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      shared[(row * kNumbers + i) * kStride + lane] = x[i];
    __syncthreads();
    POM_UNROLL for (int i = 0; i < kOwn; ++i) {
      if (column_[i] < 0) continue;
      const int number = number_of(i), range = number / (kLanes * Vec), run = number % (kLanes * Vec);
      const Acc* const of_row = shared + (range * Vec + run % Vec) * kStride + run / Vec;
      Acc sums[kRows];
      POM_UNROLL for (int r = 0; r < kRows; ++r)
        sums[r] = of_row[r * kNumbers * kStride];
      POM_UNROLL for (int half = kRows / 2; half > 0; half /= 2) {
        POM_UNROLL for (int r = 0; r < half; ++r)
          sums[r] += sums[r + half];
      }
      out[column_[i]] = sums[0];
    }
  }

 private:
  static __device__ int number_of(int own) { return int(threadIdx.x) + own * kThreads; }

  int column_[kOwn];  // -1 for none
};

}  // namespace pom::cuda
