// Element types, and macros that let one header serve g++ and nvcc.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define POM_HD __host__ __device__ __forceinline__
#define POM_UNROLL _Pragma("unroll")
#define POM_UNROLL_4 _Pragma("unroll 4")
#define POM_UNROLL_1 _Pragma("unroll 1")
#else
#define POM_HD inline __attribute__((always_inline))
#define POM_UNROLL
#define POM_UNROLL_4
#define POM_UNROLL_1
#endif

namespace pom {

enum class Dtype : int { f32, f64, bf16, f16 };

// Storage of the 16-bit types. Arithmetic is always done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

POM_HD float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
POM_HD uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

POM_HD float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

// Rounds to nearest, ties to even; a NaN stays a NaN.
POM_HD bf16 to_bf16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

POM_HD float to_float(f16 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent to float's bias and makes half's subnormals exact.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

// Rounds to nearest, ties to even, through subnormals to infinity; a NaN stays a NaN.
POM_HD f16 to_f16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to more than 65504
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of half's smallest number
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return {uint16_t(sign | (rounded - float_to_bits(0.5f)))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
}

// Sums are float for every type but double.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};

}  // namespace pom
