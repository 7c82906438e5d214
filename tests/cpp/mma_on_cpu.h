// What csrc/cuda/mma.cuh uses of tensor cores, on a CPU: the lanes of a warp read each other's fragments.
#pragma once

#include "cuda_on_cpu.h"
#include "pom/types.h"

namespace pom::cuda {

struct Fragments {
  uint32_t a[4], b[2];
};
inline thread_local Fragments fragments[1024];  // of the running block's threads

template <class T>
float half_of(uint32_t word, int which) {
  const uint16_t bits = uint16_t(which ? word >> 16 : word);
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return to_float(value);
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fragments[threadIdx.x] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  __syncwarp();
  const Fragments* const warp = fragments + threadIdx.x / 32 * 32;
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t of_a = warp[row % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + row / 8],
                     of_b = warp[column * 4 + k % 8 / 2].b[k / 8];
      sums[i] += half_of<T>(of_a, k % 2) * half_of<T>(of_b, k % 2);
    }
  }
  __syncwarp();
}

}  // namespace pom::cuda
