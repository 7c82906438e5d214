// The two polynomial forms and their gates: the only copy of the formulas.
//
// T is float or double (one token's channel, as in a CUDA thread) or a vector of them (several channels, as in the
// CPU kernels). A vector type brings its own `larger`, `smaller`, `where`, `exp` and `erf_over_root2`.
#pragma once

#include <cmath>

#include "pom/types.h"

namespace pom {

constexpr int kMaxDegree = 16;

// max(bound, x) and min(bound, x) that keep a NaN in x.
template <class T>
POM_HD T larger(T bound, T x) {
  return bound > x ? bound : x;
}
template <class T>
POM_HD T smaller(T bound, T x) {
  return bound < x ? bound : x;
}
template <class T>
POM_HD T where(bool condition, T yes, T no) {
  return condition ? yes : no;
}
template <class T>
POM_HD T reciprocal(T x) {
  return T(1) / x;
}

// A dual number: a value and its derivative along a tangent. Formulas of sums and products need no second version for
// it; activations and gates define their derivatives below.
template <class T>
struct Dual {
  T value, tangent;

  Dual() = default;
  POM_HD explicit Dual(double x) : value(x), tangent(0.0) {}
  POM_HD Dual(T value, T tangent) : value(value), tangent(tangent) {}
  POM_HD friend Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.tangent + b.tangent}; }
  POM_HD friend Dual operator*(Dual a, Dual b) {
    return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
  }
};

// Returns x, or its tangent if x is a dual number.
template <class T>
POM_HD T primal_or_tangent(T x) {
  return x;
}
template <class T>
POM_HD T primal_or_tangent(Dual<T> x) {
  return x.tangent;
}

// One instruction each on a GPU, within 2 ulp.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ float larger(float bound, float x) {
  asm("max.NaN.f32 %0, %1, %0;" : "+f"(x) : "f"(bound));
  return x;
}
__device__ __forceinline__ float smaller(float bound, float x) {
  asm("min.NaN.f32 %0, %1, %0;" : "+f"(x) : "f"(bound));
  return x;
}
__device__ __forceinline__ float exp2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
POM_HD float exp(float x) { return exp2(1.44269504088896341f * x); }
#else
POM_HD float exp2(float x) { return ::exp2f(x); }
POM_HD float exp(float x) { return ::expf(x); }
#endif
POM_HD double exp(double x) { return ::exp(x); }
POM_HD double erf_over_root2(double x) { return ::erf(x * 0.70710678118654752440); }

// Φ(-x), the tail of the Gaussian distribution, for x from 0 to 16: 2 to the power of a polynomial, which keeps the
// relative precision of a small tail and needs one special function. The error of the fit is 2^-26 of GELU, or, if
// `coarse`, 2^-21, which 16-bit inputs cannot resolve; evaluating it in float adds a few roundings.
template <bool coarse>
POM_HD float normal_tail(float x) {
  constexpr float kFine[] = {-1.000000000e+00f, -1.151104569e+00f, -4.592188597e-01f, -5.244062096e-02f,
                             6.932365708e-03f,  2.631178177e-05f,  -3.011123335e-04f, 8.582220471e-05f,
                             -1.322930893e-05f, 1.143650252e-06f,  -4.342681947e-08f};
  constexpr float kCoarse[] = {-1.000000000e+00f, -1.151114702e+00f, -4.591241181e-01f,
                               -5.274348333e-02f, 7.403085940e-03f,  -3.826749453e-04f,
                               -8.998555131e-05f, 2.017316183e-05f,  -1.307504476e-06f};
  constexpr int degree = coarse ? 8 : 10;
  float p = coarse ? kCoarse[8] : kFine[10];
  POM_UNROLL for (int i = degree - 1; i >= 0; --i)
    p = p * x + (coarse ? kCoarse[i] : kFine[i]);
  return exp2(p);
}

// Exact GELU: x times the Gaussian distribution function of x.
template <bool coarse>
struct GeluOf {
  // With a fast erf: Φ(x) = (1 + erf(x / √2)) / 2.
  template <class T>
  POM_HD static T value(T x) {
    const T half = T(0.5) * x;
    return half * erf_over_root2(x) + half;
  }
  template <class T>
  POM_HD static void value_and_slope(T x, T& value, T& slope) {
    const T cdf = T(0.5) * erf_over_root2(x) + T(0.5);
    const T pdf = T(0.39894228040143267794) * exp(T(-0.5) * x * x);
    value = x * cdf;
    slope = cdf + x * pdf;
  }
  // For a single float, by the tail: x Φ(x) = max(0, x) - |x| Φ(-|x|).
  POM_HD static float value(float x) {
    const float size = smaller(16.0f, ::fabsf(x));
    return ::fmaxf(0.0f, x) - size * normal_tail<coarse>(size);
  }
  POM_HD static void value_and_slope(float x, float& value, float& slope) {
    const float size = smaller(16.0f, ::fabsf(x)), tail = normal_tail<coarse>(size);
    const float pdf = 0.39894228040143267794f * exp2(-0.72134752044448170368f * size * size);
    const float slope_of_tail = tail - size * pdf;
    value = ::fmaxf(0.0f, x) - size * tail;
    slope = where(x > 0.0f, 1.0f - slope_of_tail, slope_of_tail);
  }

  template <class T>
  POM_HD static Dual<T> value(Dual<T> x) {
    T value, slope;
    value_and_slope(x.value, value, slope);
    return {value, slope * x.tangent};
  }
  // The second derivative is (2 - x²) times the density.
  template <class T>
  POM_HD static void value_and_slope(Dual<T> x, Dual<T>& value, Dual<T>& slope) {
    const T square = x.value * x.value, pdf = T(0.39894228040143267794) * exp(T(-0.5) * square);
    value_and_slope(x.value, value.value, slope.value);
    value.tangent = slope.value * x.tangent;
    slope.tangent = (T(2) - square) * pdf * x.tangent;
  }
};
using Gelu = GeluOf<false>;

// Leaky ReLU clamped to [-0.1, 6].
struct LeakyClamp {
  template <class T>
  POM_HD static T value(T x) {
    return smaller(T(6), larger(T(-0.1), larger(x, T(0.01) * x)));
  }
  template <class T>
  POM_HD static T slope(T x) {
    const T leaky = larger(x, T(0.01) * x);
    const T inside = where(x > T(0), T(1), T(0.01));
    return where(leaky < T(-0.1), T(0), where(leaky > T(6), T(0), inside));
  }
  template <class T>
  POM_HD static Dual<T> value(Dual<T> x) {
    return {value(x.value), slope(x.value) * x.tangent};
  }
  template <class T>
  POM_HD static Dual<T> slope(Dual<T> x) {
    return {slope(x.value), T(0)};
  }
};

// Gates γ: sigmoid for the product form, hardsigmoid for the power form.
struct Sigmoid {
  template <class T>
  POM_HD static T value(T x) {
    return reciprocal(T(1) + exp(T(0) - x));
  }
  template <class T>
  POM_HD static T slope(T x) {
    const T s = value(x);
    return s * (T(1) - s);
  }
  template <class T>
  POM_HD static Dual<T> value(Dual<T> x) {
    return {value(x.value), slope(x.value) * x.tangent};
  }
  template <class T>
  POM_HD static Dual<T> slope(Dual<T> x) {
    const T s = value(x.value), slope = s * (T(1) - s);
    return {slope, slope * (T(1) - T(2) * s) * x.tangent};
  }
};
struct HardSigmoid {
  template <class T>
  POM_HD static T value(T x) {
    return smaller(T(6), larger(T(0), x + T(3))) * T(1.0 / 6.0);
  }
  template <class T>
  POM_HD static T slope(T x) {
    // One sixth rounded to float, in double too: torch does the same, and these gradients must equal torch's.
    return where(x > T(-3), where(x < T(3), T(1.0f / 6.0f), T(0)), T(0));
  }
  template <class T>
  POM_HD static Dual<T> value(Dual<T> x) {
    return {value(x.value), slope(x.value) * x.tangent};
  }
  template <class T>
  POM_HD static Dual<T> slope(Dual<T> x) {
    return {slope(x.value), T(0)};
  }
};

// A compile-time degree if K > 0, so that the loops below unroll; a run-time degree if K = 0.
template <int K>
struct Degree {
  static constexpr int capacity = K;
  POM_HD explicit Degree(int) {}
  POM_HD constexpr operator int() const { return K; }
};
template <>
struct Degree<0> {
  static constexpr int capacity = kMaxDegree;
  int degree;
  POM_HD explicit Degree(int degree) : degree(degree) {}
  POM_HD operator int() const { return degree; }
};

// φ_i = Π_{j <= i} gelu(u_j), i = 0 … k-1 (arXiv 2411.12663).
template <int K, class Activation = Gelu>
struct Product {
  using Gate = Sigmoid;
  Degree<K> degree;
  static constexpr int capacity = Degree<K>::capacity;
  static constexpr bool has_coeff = false;
  POM_HD explicit Product(int degree) : degree(degree) {}
  POM_HD int factors() const { return degree; }

  template <class T>
  POM_HD void value(const T* u, const T*, T* phi) const {
    phi[0] = Activation::value(u[0]);
    POM_UNROLL for (int i = 1; i < degree; ++i)
      phi[i] = phi[i - 1] * Activation::value(u[i]);
  }

  // du = (∂φ/∂u)ᵀ dφ
  template <class T>
  POM_HD void slope(const T* u, const T*, const T* dphi, T* du, T*) const {
    T factor[capacity], slope[capacity], phi[capacity];
    POM_UNROLL for (int i = 0; i < degree; ++i) {
      Activation::value_and_slope(u[i], factor[i], slope[i]);
      phi[i] = i ? phi[i - 1] * factor[i] : factor[i];
    }
    T carried = dphi[degree - 1];  // dL/dφ_i, including the part from later products
    POM_UNROLL for (int i = degree - 1; i > 0; --i) {
      du[i] = carried * phi[i - 1] * slope[i];
      carried = dphi[i - 1] + carried * factor[i];
    }
    du[0] = carried * slope[0];
  }
};

template <int K>
using CoarseProduct = Product<K, GeluOf<true>>;

// φ = Σ_i c_i a^i, i = 1 … k, with a the clamped leaky ReLU of u (arXiv 2604.06129). c[i - 1] holds c_i.
template <int K>
struct Power {
  using Gate = HardSigmoid;
  Degree<K> degree;
  static constexpr int capacity = 1;
  static constexpr bool has_coeff = true;
  POM_HD explicit Power(int degree) : degree(degree) {}
  POM_HD int factors() const { return 1; }

  template <class T>
  POM_HD void value(const T* u, const T* c, T* phi) const {
    const T a = LeakyClamp::value(u[0]);
    T p = c[degree - 1];
    POM_UNROLL for (int i = degree - 2; i >= 0; --i)
      p = p * a + c[i];
    phi[0] = p * a;
  }

  // du = φ'(u) dφ and dc_i = a^i dφ
  template <class T>
  POM_HD void slope(const T* u, const T* c, const T* dphi, T* du, T* dc) const {
    const T a = LeakyClamp::value(u[0]);
    T p = T(double(degree)) * c[degree - 1];
    POM_UNROLL for (int i = degree - 2; i >= 0; --i)
      p = p * a + T(double(i + 1)) * c[i];
    du[0] = p * LeakyClamp::slope(u[0]) * dphi[0];
    T term = a * dphi[0];
    POM_UNROLL for (int i = 0; i < degree; ++i) {
      dc[i] = term;
      term = term * a;
    }
  }
};

}  // namespace pom
