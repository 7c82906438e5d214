// Building blocks of the kernels: vector loads and stores, and sums over the threads of a block.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "pom/math.h"
#include "residual.h"

namespace pom::cuda {

// The words of one vector access. The compiler moves a struct of 32-bit words in one instruction.
template <int bytes>
struct alignas(bytes) Words {
  uint32_t word[bytes / 4];
};

// Vec neighbouring elements as they lie in memory. If Vec > 1, the address must be a multiple of their size.
template <class T, int Vec>
struct Packed {
  Words<Vec* int(sizeof(T))> words;

  POM_HD void load(const T* p) { words = *reinterpret_cast<const Words<Vec* int(sizeof(T))>*>(p); }
  POM_HD void store(T* p) const { *reinterpret_cast<Words<Vec* int(sizeof(T))>*>(p) = words; }

  POM_HD void unpack(float* x) const {
    POM_UNROLL for (int i = 0; i < Vec; ++i) {
      if constexpr (std::is_same_v<T, float>)
        x[i] = bits_to_float(words.word[i]);
      else if constexpr (std::is_same_v<T, bf16>)
        x[i] = bits_to_float(i % 2 ? words.word[i / 2] & 0xffff0000u : words.word[i / 2] << 16);
      else
        x[i] = to_float(f16{uint16_t(i % 2 ? words.word[i / 2] >> 16 : words.word[i / 2])});
    }
  }

  POM_HD void pack(const float* x) {
    POM_UNROLL for (int i = 0; i < Vec; i += int(4 / sizeof(T)))
      words.word[i * int(sizeof(T)) / 4] = word(x + i);
  }

 private:
  POM_HD static uint32_t word(const float* x) {
    if constexpr (std::is_same_v<T, float>) return float_to_bits(x[0]);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t pair;  // one instruction rounds both
    if constexpr (std::is_same_v<T, bf16>)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x[1]), "f"(x[0]));
    else
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x[1]), "f"(x[0]));
    return pair;
#else
    if constexpr (std::is_same_v<T, bf16>) return uint32_t(to_bf16(x[1]).bits) << 16 | to_bf16(x[0]).bits;
    if constexpr (std::is_same_v<T, f16>) return uint32_t(to_f16(x[1]).bits) << 16 | to_f16(x[0]).bits;
#endif
  }
};

// One element, at any address.
template <class T>
struct Packed<T, 1> {
  using Acc = typename accumulator<T>::type;
  T x;

  POM_HD void load(const T* p) { x = *p; }
  POM_HD void store(T* p) const { *p = x; }
  POM_HD void unpack(Acc* y) const {
    if constexpr (std::is_same_v<T, Acc>)
      *y = x;
    else
      *y = to_float(x);
  }
  POM_HD void pack(const Acc* y) {
    if constexpr (std::is_same_v<T, Acc>)
      x = *y;
    else if constexpr (std::is_same_v<T, bf16>)
      x = to_bf16(*y);
    else
      x = to_f16(*y);
  }
};

// How many of Vec numbers of the accumulator's type are loaded at once.
template <int Vec, class Acc>
constexpr int kAtOnce = sizeof(Acc) != 4 || Vec % 2 ? 1
                        : Vec % 4                   ? 2
                                                    : 4;

// Loads Vec numbers of the accumulator's type.
template <int Vec, class Acc>
POM_HD void load_numbers(const Acc* p, Acc* x) {
  constexpr int step = kAtOnce<Vec, Acc>;
  POM_UNROLL for (int i = 0; i < Vec; i += step) {
    Packed<Acc, step> packed;
    packed.load(p + i);
    packed.unpack(x + i);
  }
}
template <int Vec, class Acc>
POM_HD void store_numbers(Acc* p, const Acc* x) {
  constexpr int step = kAtOnce<Vec, Acc>;
  POM_UNROLL for (int i = 0; i < Vec; i += step) {
    Packed<Acc, step> packed;
    packed.pack(x + i);
    packed.store(p + i);
  }
}

// Sums V numbers over the rows of a block, in a fixed order. Thread (row, lane) is number row * lanes + lane; row 0
// ends with the sums. Rows and lanes are powers of two. Needs V * threads / 2 numbers of shared memory.
template <int V, class Acc>
__device__ void sum_rows(Acc (&x)[V], int lanes, Acc* shared) {
  const int thread = int(threadIdx.x), slots = int(blockDim.x) / 2;
  for (int half = slots; half >= lanes; half /= 2) {
    if (thread >= half && thread < 2 * half) {
      POM_UNROLL for (int i = 0; i < V; ++i)
        shared[i * slots + (thread < slots ? thread : thread - slots)] = x[i];
    }
    __syncthreads();
    if (thread < half) {
      const int slot = half == slots ? thread : thread + half;
      POM_UNROLL for (int i = 0; i < V; ++i)
        x[i] += shared[i * slots + slot];
    }
  }
}

// Blocks are numbered in one dimension. Channel tiles vary fastest: neighbouring blocks read neighbouring memory.
struct BlockIndex {
  unsigned tile, row;  // 32 bits: a 64-bit division takes as long as a few tokens
  __device__ explicit BlockIndex(int tiles) : tile(blockIdx.x % unsigned(tiles)), row(blockIdx.x / unsigned(tiles)) {}
};

}  // namespace pom::cuda
