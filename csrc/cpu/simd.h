// A vector of channels for the formulas of math.h, at the width of the instruction set this file is compiled for.
//
// Everything lives in a namespace of its own for each instruction set: the linker must never merge a function that
// was compiled for one with the same function compiled for another.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>
#include <type_traits>
#include <utility>

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

// `fine` is false for what comes from 16-bit storage: there a coarser erf is still far finer than the storage.
template <class L, bool fine = true>
struct Vec {
  static constexpr int lanes = kVectorBytes / sizeof(L);
  typedef L Native __attribute__((vector_size(kVectorBytes)));
  typedef typename lane_int<L>::type Bits __attribute__((vector_size(kVectorBytes)));
  Native v;

  Vec() = default;
  POM_INLINE explicit Vec(double x) : v(Native{} + L(x)) {}
  POM_INLINE Vec(Native v) : v(v) {}
  template <bool other>
  POM_INLINE explicit Vec(Vec<L, other> x) : v(x.v) {}
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
using CoarseFloats = Vec<float, false>;

// The vectors that hold channels stored as T.
template <class T>
struct vector_of {
  using type = CoarseFloats;
};
template <>
struct vector_of<float> {
  using type = Floats;
};
template <>
struct vector_of<double> {
  using type = Doubles;
};

// max(bound, x) and min(bound, x): the instructions return their second operand when either is NaN.
template <class L, bool fine>
POM_INLINE Vec<L, fine> larger(Vec<L, fine> bound, Vec<L, fine> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(L) == 4) return Vec<L, fine>(_mm512_max_ps(bound.v, x.v));
  if constexpr (sizeof(L) == 8) return Vec<L, fine>(_mm512_max_pd(bound.v, x.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(L) == 4) return Vec<L, fine>(_mm256_max_ps(bound.v, x.v));
  if constexpr (sizeof(L) == 8) return Vec<L, fine>(_mm256_max_pd(bound.v, x.v));
#else
  return where(bound > x, bound, x);
#endif
}
template <class L, bool fine>
POM_INLINE Vec<L, fine> smaller(Vec<L, fine> bound, Vec<L, fine> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(L) == 4) return Vec<L, fine>(_mm512_min_ps(bound.v, x.v));
  if constexpr (sizeof(L) == 8) return Vec<L, fine>(_mm512_min_pd(bound.v, x.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(L) == 4) return Vec<L, fine>(_mm256_min_ps(bound.v, x.v));
  if constexpr (sizeof(L) == 8) return Vec<L, fine>(_mm256_min_pd(bound.v, x.v));
#else
  return where(bound < x, bound, x);
#endif
}

// Entry i mod 16 of an eight-entry table for every lane; i mod 16 must be below 8.
POM_INLINE Floats lookup(const float (&table)[8], Floats::Bits i) {
#if defined(__AVX512F__)
  const __m512 entries = _mm512_castps256_ps512(_mm256_loadu_ps(table));
  return Floats(_mm512_permutexvar_ps((__m512i)i, entries));
#elif defined(__AVX2__)
  return Floats(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)i));
#else
  Floats x;
  for (int lane = 0; lane < Floats::lanes; ++lane) x.v[lane] = table[i[lane] & 7];
  return x;
#endif
}

// e^x to 2 ulp, for float arguments of any size.
template <bool fine>
POM_INLINE Vec<float, fine> exp(Vec<float, fine> given) {
  const Floats x(given);
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
  return Vec<float, fine>(p * low * high);
}

// erf(x / √2): a polynomial about each of eight points i * kStep between 0 and 5.66, where it reaches 1; about 0 it has
// no constant term, so that small x keeps its relative accuracy. Coefficients fitted by least squares, reweighted to
// the smallest largest relative error, each rounded to float before the next was fitted.
constexpr float kStep = 0.754247248f;

// to 1.5 ulp
static const float kErf[7][8] = {
    {0.f, 0.54929924f, 0.868571997f, 0.9763484f, 0.997447014f, 0.999837577f, 0.99999398f, 0.999999881f},
    {0.797884583f, 0.600354135f, 0.255746633f, 0.061680235f, 0.00842204131f, 0.000651063921f, 2.84947218e-05f,
     7.06198819e-07f},
    {-3.17845866e-06f, -0.226408243f, -0.192896917f, -0.0697838292f, -0.0127047505f, -0.001229838f, -6.51631635e-05f,
     -3.13438136e-06f},
    {-0.132906422f, -0.0431468114f, 0.0543518066f, 0.0423595831f, 0.0113745984f, 0.0014345044f, 9.24373817e-05f,
     3.14432668e-06f},
    {-0.000631649687f, 0.0458694249f, 0.0116649531f, -0.0123209115f, -0.00646048691f, -0.00110889005f, -8.14886371e-05f,
     1.98829403e-05f},
    {0.0223243479f, -0.000287272036f, -0.0114050591f, -0.000886600581f, 0.00215840898f, 0.000659607409f,
     7.38372255e-05f, 3.94937842e-06f},
    {-0.0039800969f, -0.00596175063f, 0.00123457599f, 0.00189925311f, -0.000223812371f, -0.000432689383f,
     -9.81663979e-05f, -0.000113860071f}};

// to 2^-20 of the value, where half precision has 2^-11 and bfloat16 2^-8
static const float kCoarseErf[6][8] = {
    {0.f, 0.549298704f, 0.868572116f, 0.976348579f, 0.997447014f, 0.999837518f, 0.99999398f, 0.999999881f},
    {0.797884524f, 0.600357533f, 0.255746394f, 0.0616803393f, 0.00842198543f, 0.000651063863f, 2.8498247e-05f,
     7.0605671e-07f},
    {4.75047136e-06f, -0.226340786f, -0.192910537f, -0.0698048174f, -0.0127028292f, -0.0012233709f, -6.43077001e-05f,
     -2.39980341e-06f},
    {-0.133074135f, -0.0432416424f, 0.0543549694f, 0.0423608348f, 0.0113762049f, 0.00143442187f, 9.21920291e-05f,
     3.14555177e-06f},
    {0.000610614254f, 0.0446005426f, 0.0119244829f, -0.0119210547f, -0.00650457293f, -0.00121428375f, -0.000101022735f,
     -5.02169371e-07f},
    {0.0185665134f, 0.000243849558f, -0.0114148082f, -0.000903008447f, 0.00214928621f, 0.000661003287f, 7.58128954e-05f,
     3.95559664e-06f}};

template <int terms>
POM_INLINE Floats erf_by_table(const float (&c)[terms][8], Floats x) {
  const Floats::Bits sign = x.bits() & int32_t(0x80000000u);
  const Floats magnitude = smaller(Floats(5.656), Floats::of_bits(x.bits() ^ sign));
  // At 1.5 * 2^23 floats are whole numbers: adding it rounds, and leaves the number in the last bits.
  const Floats magic(12582912.0), shifted = magnitude * Floats(1.0 / kStep) + magic;
  const Floats t = magnitude - (shifted - magic) * Floats(kStep);
  Floats p = lookup(c[terms - 1], shifted.bits());
  for (int k = terms - 2; k >= 0; --k) p = p * t + lookup(c[k], shifted.bits());
  return Floats::of_bits(p.bits() | sign);
}
POM_INLINE Floats erf_over_root2(Floats x) { return erf_by_table(kErf, x); }
POM_INLINE CoarseFloats erf_over_root2(CoarseFloats x) { return CoarseFloats(erf_by_table(kCoarseErf, Floats(x))); }

POM_INLINE Doubles exp(Doubles x) {
  for (int i = 0; i < Doubles::lanes; ++i) x.v[i] = ::exp(x.v[i]);
  return x;
}
POM_INLINE Doubles erf_over_root2(Doubles x) {
  for (int i = 0; i < Doubles::lanes; ++i) x.v[i] = pom::erf_over_root2(double(x.v[i]));
  return x;
}

// Half-width vectors of 16-bit storage, as many lanes as Floats.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

POM_INLINE Doubles load(const double* p) { return Doubles::load(p); }
POM_INLINE Floats load(const float* p) { return Floats::load(p); }
POM_INLINE CoarseFloats load(const bf16* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  return CoarseFloats::of_bits((Floats::Bits)(__builtin_convertvector(h, Words) << 16));
}
POM_INLINE CoarseFloats load(const f16* p) {
#if defined(__AVX512F__)
  return CoarseFloats(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__AVX2__)
  return CoarseFloats(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  CoarseFloats x;
  for (int i = 0; i < Floats::lanes; ++i) x.v[i] = to_float(p[i]);
  return x;
#endif
}

POM_INLINE void store(double* p, Doubles x) { x.store(p); }
template <bool fine>
POM_INLINE void store(float* p, Vec<float, fine> x) {
  x.store(p);
}
template <bool fine>
POM_INLINE void store(bf16* p, Vec<float, fine> x) {
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  const Words bits = (Words)x.v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const Words kept = x.v == x.v ? rounded : (bits >> 16) | 0x40u;
  const Halves h = __builtin_convertvector(kept, Halves);
  memcpy(p, &h, sizeof h);
}
template <bool fine>
POM_INLINE void store(f16* p, Vec<float, fine> x) {
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
template <bool fine>
POM_INLINE void accumulate(double* p, Vec<float, fine> x, AllLanes) {
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

// Two vectors' worth of bfloat16: the channels with even numbers and those with odd ones. Widening them so takes one
// instruction a vector, half of what widening neighbours takes.
template <class V>
struct EvenOdd {
  V even, odd;
  EvenOdd() = default;
  POM_INLINE explicit EvenOdd(double x) : even(x), odd(x) {}
  POM_INLINE EvenOdd(V even, V odd) : even(even), odd(odd) {}
  POM_INLINE friend EvenOdd operator+(EvenOdd a, EvenOdd b) { return {a.even + b.even, a.odd + b.odd}; }
  POM_INLINE friend EvenOdd operator*(EvenOdd a, EvenOdd b) { return {a.even * b.even, a.odd * b.odd}; }
  POM_INLINE friend EvenOdd larger(EvenOdd a, EvenOdd b) { return {larger(a.even, b.even), larger(a.odd, b.odd)}; }
  POM_INLINE friend EvenOdd smaller(EvenOdd a, EvenOdd b) { return {smaller(a.even, b.even), smaller(a.odd, b.odd)}; }
  POM_INLINE friend EvenOdd erf_over_root2(EvenOdd x) { return {erf_over_root2(x.even), erf_over_root2(x.odd)}; }
};

struct EvenOddLanes {};

POM_INLINE EvenOdd<CoarseFloats> load(const bf16* p, EvenOddLanes) {
  Floats::Bits both;
  memcpy(&both, p, sizeof both);
  return {CoarseFloats::of_bits(both << 16), CoarseFloats::of_bits(both & int32_t(0xffff0000u))};
}

template <size_t... i>
POM_INLINE EvenOdd<CoarseFloats> deal(Floats low, Floats high, std::index_sequence<i...>) {
  return {CoarseFloats(__builtin_shufflevector(low.v, high.v, (2 * i)...)),
          CoarseFloats(__builtin_shufflevector(low.v, high.v, (2 * i + 1)...))};
}
POM_INLINE EvenOdd<CoarseFloats> load(const float* p, EvenOddLanes) {
  return deal(load(p), load(p + Floats::lanes), std::make_index_sequence<Floats::lanes>{});
}

template <size_t... i>
POM_INLINE void accumulate(double* p, EvenOdd<CoarseFloats> x, std::index_sequence<i...>) {
  constexpr size_t lanes = Floats::lanes;
  accumulate(p, Floats(__builtin_shufflevector(x.even.v, x.odd.v, (i / 2 + i % 2 * lanes)...)), AllLanes{});
  accumulate(p + lanes, Floats(__builtin_shufflevector(x.even.v, x.odd.v, ((lanes + i) / 2 + i % 2 * lanes)...)),
             AllLanes{});
}
POM_INLINE void accumulate(double* p, EvenOdd<CoarseFloats> x, EvenOddLanes) {
  accumulate(p, x, std::make_index_sequence<Floats::lanes>{});
}

// The vector that `lanes` of V stand for.
template <class V, class Lanes>
struct vector_at {
  using type = V;
};
template <class V>
struct vector_at<V, EvenOddLanes> {
  using type = EvenOdd<V>;
};

// body(channel, lanes) over all channels: whole vectors, then what is left.
template <class V, class Body>
POM_INLINE void for_channels(int64_t width, Body body, int64_t first = 0) {
  int64_t c = first;
  for (; c + V::lanes <= width; c += V::lanes) body(c, AllLanes{});
  if (c < width) body(c, width - c);
}

// The same for channels stored as T, by even and odd numbers where that is quicker.
template <class T, class Body>
POM_INLINE void for_stored_channels(int64_t width, Body body) {
  using V = typename vector_of<T>::type;
  int64_t c = 0;
  if constexpr (std::is_same_v<T, bf16>)
    for (; c + 2 * V::lanes <= width; c += 2 * V::lanes) body(c, EvenOddLanes{});
  for_channels<V>(width, body, c);
}

}  // namespace pom::cpu::POM_ISA
