// A vector of channels for the formulas of math.h, at the width of the instruction set this file is compiled for.
//
// Everything lives in a namespace of its own for each instruction set: the linker must never merge a function that
// was compiled for one with the same function compiled for another.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>

#include "pom/math.h"

#if defined(__AVX512F__)
#define POM_ISA avx512
#elif defined(__AVX2__)
#define POM_ISA avx2
#else
#define POM_ISA generic
#endif

namespace pom::cpu::POM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define POM_INLINE inline __attribute__((always_inline))

template <class L>
struct lane_int;
template <>
struct lane_int<float> {
  using type = int32_t;
};
template <>
struct lane_int<double> {
  using type = int64_t;
};

template <class L>
struct Vec {
  static constexpr int lanes = kVectorBytes / sizeof(L);
  typedef L Native __attribute__((vector_size(kVectorBytes)));
  typedef typename lane_int<L>::type Bits __attribute__((vector_size(kVectorBytes)));
  Native v;

  Vec() = default;
  POM_INLINE explicit Vec(double x) : v(Native{} + L(x)) {}
  POM_INLINE Vec(Native v) : v(v) {}
  POM_INLINE Bits bits() const { return (Bits)v; }
  POM_INLINE static Vec of_bits(Bits b) { return Vec((Native)b); }

  POM_INLINE friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  POM_INLINE friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  POM_INLINE friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  POM_INLINE friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  POM_INLINE friend Bits operator<(Vec a, Vec b) { return a.v < b.v; }
  POM_INLINE friend Bits operator>(Vec a, Vec b) { return a.v > b.v; }
  POM_INLINE friend Vec where(Bits condition, Vec yes, Vec no) { return condition ? yes.v : no.v; }

  POM_INLINE static Vec load(const L* p) {
    Vec x;
    memcpy(&x.v, p, sizeof x.v);
    return x;
  }
  POM_INLINE void store(L* p) const { memcpy(p, &v, sizeof v); }
};

using Floats = Vec<float>;
using Doubles = Vec<double>;

// max(bound, x) and min(bound, x): the instructions return their second operand when either is NaN.
#if defined(__AVX512F__)
POM_INLINE Floats larger(Floats bound, Floats x) { return Floats(_mm512_max_ps(bound.v, x.v)); }
POM_INLINE Floats smaller(Floats bound, Floats x) { return Floats(_mm512_min_ps(bound.v, x.v)); }
POM_INLINE Doubles larger(Doubles bound, Doubles x) { return Doubles(_mm512_max_pd(bound.v, x.v)); }
POM_INLINE Doubles smaller(Doubles bound, Doubles x) { return Doubles(_mm512_min_pd(bound.v, x.v)); }
#elif defined(__AVX2__)
POM_INLINE Floats larger(Floats bound, Floats x) { return Floats(_mm256_max_ps(bound.v, x.v)); }
POM_INLINE Floats smaller(Floats bound, Floats x) { return Floats(_mm256_min_ps(bound.v, x.v)); }
POM_INLINE Doubles larger(Doubles bound, Doubles x) { return Doubles(_mm256_max_pd(bound.v, x.v)); }
POM_INLINE Doubles smaller(Doubles bound, Doubles x) { return Doubles(_mm256_min_pd(bound.v, x.v)); }
#else
template <class L>
POM_INLINE Vec<L> larger(Vec<L> bound, Vec<L> x) {
  return where(bound > x, bound, x);
}
template <class L>
POM_INLINE Vec<L> smaller(Vec<L> bound, Vec<L> x) {
  return where(bound < x, bound, x);
}
#endif

// Entry i of an eight-entry table for every lane, 0 <= i < 8.
POM_INLINE Floats lookup(const float (&table)[8], Floats::Bits i) {
#if defined(__AVX512F__)
  const __m512 entries = _mm512_castps256_ps512(_mm256_loadu_ps(table));
  return Floats(_mm512_permutexvar_ps((__m512i)i, entries));
#elif defined(__AVX2__)
  return Floats(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)i));
#else
  Floats x;
  for (int lane = 0; lane < Floats::lanes; ++lane) x.v[lane] = table[i[lane]];
  return x;
#endif
}

// e^x to 2 ulp, for float arguments of any size.
POM_INLINE Floats exp(Floats x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; past the bounds the result is 0 or infinity all the same.
  const Floats held = smaller(Floats(89.0), larger(Floats(-104.0), x));
  const Floats magic(12582912.0);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = held * Floats(1.44269504088896341) + magic;
  const Floats n = shifted - magic;
  const Floats r = held - n * Floats(0.693145751953125) - n * Floats(1.42860682030941723e-6);
  Floats p(0.001382104237563908);
  p = p * r + Floats(0.00836867094039917);
  p = p * r + Floats(0.04166826233267784);
  p = p * r + Floats(0.1666652113199234);
  p = p * r + Floats(0.4999999403953552);
  p = p * r + Floats(1.0);
  p = p * r + Floats(1.0);
  // 2^n in two steps, since n may lie outside the range of one exponent.
  const Floats::Bits whole = shifted.bits() - magic.bits(), half = whole >> 1;
  const Floats low = Floats::of_bits((half + 127) << 23), high = Floats::of_bits((whole - half + 127) << 23);
  return p * low * high;
}

// erf to 1 ulp: a polynomial of degree 7 on each of eight intervals of |x| between 0 and 4, about its middle; in the
// first about 0, as x + x r(x), so that small x keeps its relative accuracy. Coefficients fitted by least squares,
// reweighted to the smallest largest relative error, each rounded to float before the next was fitted.
POM_INLINE Floats erf(Floats x) {
  static const float centre[8] = {0.f, 0.75f, 1.25f, 1.75f, 2.25f, 2.75f, 3.25f, 3.75f};
  static const float c[8][8] = {
      {0.f, 0.711155653f, 0.92290014f, 0.986671686f, 0.998537302f, 0.999899387f, 0.999995708f, 0.999999881f},
      {0.128379181f, 0.642931104f, 0.236521125f, 0.0527749956f, 0.00714231934f, 0.000586277281f, 2.91890265e-05f,
       8.81432186e-07f},
      {-2.45347405e-06f, -0.482203633f, -0.295655072f, -0.0923604667f, -0.0160754677f, -0.0016149095f,
       -9.8070559e-05f, -1.74466584e-06f},
      {-0.37605536f, 0.0267819352f, 0.167535007f, 0.0901572108f, 0.0217244774f, 0.00276038074f, 0.000195810702f,
       7.96990298e-06f},
      {-0.000766256067f, 0.150906235f, -0.00598848378f, -0.0479243658f, -0.0188626293f, -0.00314520998f,
       -0.00014986546f, -8.02472205e-05f},
      {0.11670351f, -0.0529670604f, -0.0471483916f, 0.00662709819f, 0.0106616449f, 0.00275630085f, 0.000313685276f,
       1.83421016e-05f},
      {-0.00955317449f, -0.0290253032f, 0.0190557223f, 0.00712161744f, -0.00518101174f, -0.00286685233f,
       -0.00172642211f, 0.000687493244f},
      {-0.0168957934f, 0.0153230987f, 0.0033361821f, -0.00602983357f, -0.000739171228f, 0.000635519158f,
       0.000173131019f, 1.70486965e-05f}};
  const Floats::Bits sign = x.bits() & int32_t(0x80000000u);
  const Floats magnitude = smaller(Floats(3.99999976), Floats::of_bits(x.bits() ^ sign));
  // At 1.5 * 2^22 floats are one half apart: adding it leaves the number of the interval in the last bits.
  const Floats magic(6291456.0);
  const Floats::Bits i = ((magnitude - Floats(0.25)) + magic).bits() & 7;
  const Floats t = magnitude - lookup(centre, i);
  Floats p = lookup(c[7], i);
  for (int k = 6; k >= 1; --k) p = p * t + lookup(c[k], i);
  p = p * t + where(i == 0, t, lookup(c[0], i));
  return Floats::of_bits(p.bits() | sign);
}

POM_INLINE Doubles exp(Doubles x) {
  for (int i = 0; i < Doubles::lanes; ++i) x.v[i] = ::exp(x.v[i]);
  return x;
}
POM_INLINE Doubles erf(Doubles x) {
  for (int i = 0; i < Doubles::lanes; ++i) x.v[i] = ::erf(x.v[i]);
  return x;
}

// Half-width vectors of 16-bit storage, as many lanes as Floats.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

POM_INLINE Doubles load(const double* p) { return Doubles::load(p); }
POM_INLINE Floats load(const float* p) { return Floats::load(p); }
POM_INLINE Floats load(const bf16* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  return Floats::of_bits((Floats::Bits)(__builtin_convertvector(h, Words) << 16));
}
POM_INLINE Floats load(const f16* p) {
#if defined(__AVX512F__)
  return Floats(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__AVX2__)
  return Floats(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  Floats x;
  for (int i = 0; i < Floats::lanes; ++i) x.v[i] = to_float(p[i]);
  return x;
#endif
}

POM_INLINE void store(double* p, Doubles x) { x.store(p); }
POM_INLINE void store(float* p, Floats x) { x.store(p); }
POM_INLINE void store(bf16* p, Floats x) {
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  const Words bits = (Words)x.v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const Words kept = x.v == x.v ? rounded : (bits >> 16) | 0x40u;
  const Halves h = __builtin_convertvector(kept, Halves);
  memcpy(p, &h, sizeof h);
}
POM_INLINE void store(f16* p, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < Floats::lanes; ++i) p[i] = to_f16(x.v[i]);
#endif
}

// How many lanes of a vector are meant: all of them, known when compiling, or the first n.
struct AllLanes {};

template <class T>
POM_INLINE auto load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
POM_INLINE auto load(const T* p, int64_t n) {
  T buffer[kVectorBytes / 2] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T, class V>
POM_INLINE void store(T* p, V x, AllLanes) {
  store(p, x);
}
template <class T, class V>
POM_INLINE void store(T* p, V x, int64_t n) {
  T buffer[V::lanes];
  store(buffer, x);
  memcpy(p, buffer, n * sizeof(T));
}

// p[i] += x[i], in double.
POM_INLINE void accumulate(double* p, Doubles x, AllLanes) { store(p, load(p) + x); }
POM_INLINE void accumulate(double* p, Floats x, AllLanes) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half half[2];
  memcpy(half, &x.v, sizeof half);
  accumulate(p, Doubles(__builtin_convertvector(half[0], Doubles::Native)), AllLanes{});
  accumulate(p + Doubles::lanes, Doubles(__builtin_convertvector(half[1], Doubles::Native)), AllLanes{});
}
template <class V>
POM_INLINE void accumulate(double* p, V x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] += x.v[i];
}

// body(channel, lanes) over all channels: whole vectors, then what is left.
template <class V, class Body>
POM_INLINE void for_channels(int64_t width, Body body) {
  int64_t c = 0;
  for (; c + V::lanes <= width; c += V::lanes) body(c, AllLanes{});
  if (c < width) body(c, width - c);
}

}  // namespace pom::cpu::POM_ISA
