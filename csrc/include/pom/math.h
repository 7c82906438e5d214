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
POM_HD float exp(float x) { return ::expf(x); }
POM_HD double exp(double x) { return ::exp(x); }
POM_HD float erf_over_root2(float x) { return ::erff(x * 0.70710678118654752440f); }
POM_HD double erf_over_root2(double x) { return ::erf(x * 0.70710678118654752440); }

// GELU, exact: x times the Gaussian distribution function of x, (1 + erf(x / √2)) / 2.
struct Gelu {
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
};

// Leaky ReLU held to [-0.1, 6].
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
};

// The degree is a constant where K > 0, so that the loops below unroll, and a run-time number where K = 0.
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
template <int K>
struct Product {
  Degree<K> degree;
  static constexpr int capacity = Degree<K>::capacity;
  static constexpr bool has_coeff = false;
  POM_HD explicit Product(int degree) : degree(degree) {}
  POM_HD int factors() const { return degree; }

  template <class T>
  POM_HD void value(const T* u, const T*, T* phi) const {
    phi[0] = Gelu::value(u[0]);
    for (int i = 1; i < degree; ++i) phi[i] = phi[i - 1] * Gelu::value(u[i]);
  }

  // du = (∂φ/∂u)ᵀ dφ
  template <class T>
  POM_HD void slope(const T* u, const T*, const T* dphi, T* du, T*) const {
    T factor[capacity], slope[capacity], phi[capacity];
    for (int i = 0; i < degree; ++i) {
      Gelu::value_and_slope(u[i], factor[i], slope[i]);
      phi[i] = i ? phi[i - 1] * factor[i] : factor[i];
    }
    T carried = dphi[degree - 1];  // dL/dφ_i, including what reaches it through the later products
    for (int i = degree - 1; i > 0; --i) {
      du[i] = carried * phi[i - 1] * slope[i];
      carried = dphi[i - 1] + carried * factor[i];
    }
    du[0] = carried * slope[0];
  }
};

// φ = Σ_i c_i a^i, i = 1 … k, with a the clamped leaky ReLU of u (arXiv 2604.06129). c[i - 1] holds c_i.
template <int K>
struct Power {
  Degree<K> degree;
  static constexpr int capacity = 1;
  static constexpr bool has_coeff = true;
  POM_HD explicit Power(int degree) : degree(degree) {}
  POM_HD int factors() const { return 1; }

  template <class T>
  POM_HD void value(const T* u, const T* c, T* phi) const {
    const T a = LeakyClamp::value(u[0]);
    T p = c[degree - 1];
    for (int i = degree - 2; i >= 0; --i) p = p * a + c[i];
    phi[0] = p * a;
  }

  // du = φ'(u) dφ and dc_i = a^i dφ
  template <class T>
  POM_HD void slope(const T* u, const T* c, const T* dphi, T* du, T* dc) const {
    const T a = LeakyClamp::value(u[0]);
    T p = T(double(degree)) * c[degree - 1];
    for (int i = degree - 2; i >= 0; --i) p = p * a + T(double(i + 1)) * c[i];
    du[0] = p * LeakyClamp::slope(u[0]) * dphi[0];
    T term = a * dphi[0];
    for (int i = 0; i < degree; ++i) {
      dc[i] = term;
      term = term * a;
    }
  }
};

// Gates γ: sigmoid for the product form, hardsigmoid for the power form.
struct Sigmoid {
  template <class T>
  POM_HD static T value(T x) {
    return T(1) / (T(1) + exp(T(0) - x));
  }
  template <class T>
  POM_HD static T slope(T x) {
    const T s = value(x);
    return s * (T(1) - s);
  }
};
struct HardSigmoid {
  template <class T>
  POM_HD static T value(T x) {
    return smaller(T(6), larger(T(0), x + T(3))) * T(1.0 / 6.0);
  }
  template <class T>
  POM_HD static T slope(T x) {
    // One sixth rounded to float, in double too: so is torch's, whose gradients these must equal.
    return where(x > T(-3), where(x < T(3), T(1.0f / 6.0f), T(0)), T(0));
  }
};

}  // namespace pom
