// A tensor-core product of one warp: 16 rows by 8 columns over 16 inputs.
#pragma once

#include "cuda/launch.h"
#include "pom/types.h"

#ifndef __CUDACC__
#include "mma_on_cpu.h"
#endif

namespace pom::cuda {

#ifdef __CUDACC__

// sums += a b. With g = lane / 4 and q = lane % 4 a lane holds, two neighbours of a 16-bit type T per word,
//  a: rows g and g + 8 at inputs 2q, 2q + 1, then both rows at inputs 2q + 8, 2q + 9;
//  b: column g at inputs 2q, 2q + 1 and at 2q + 8, 2q + 9;
//  sums: row g at columns 2q, 2q + 1, then row g + 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define POM_MULTIPLY_ADD(type)                                                        \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, bf16>)
    POM_MULTIPLY_ADD("bf16");
  else
    POM_MULTIPLY_ADD("f16");
#undef POM_MULTIPLY_ADD
#endif
}

#endif

}  // namespace pom::cuda
