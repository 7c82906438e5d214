// The inner loops of kernels.h. This file is compiled once for every instruction set.

#include "cpu/kernels.h"

#include "cpu/simd.h"

namespace pom::cpu::POM_ISA {

// What lies in scratch or beside the tokens, as a vector of the kind the tokens are in.
template <class V, class Acc, class Lanes>
POM_INLINE V load_as(const Acc* p, Lanes n) {
  return V(load(p, n));
}

template <class Form, class T>
struct Feature {
  using Acc = typename accumulator<T>::type;
  using V = typename vector_of<T>::type;
  static constexpr int kFactors = Form::capacity;
  static constexpr int kCoeffs = Form::has_coeff ? decltype(Form::degree)::capacity : 1;

  template <class Lanes, class W>
  POM_INLINE static void load_coeff(const Form& form, const Acc* coeff, int64_t stride, Lanes n, W* c) {
    if constexpr (Form::has_coeff)
      for (int i = 0; i < form.degree; ++i) c[i] = load_as<W>(coeff + i * stride, n);
  }

  template <class Lanes, class W>
  POM_INLINE static void load_factors(const Form& form, const T* u, int64_t range_stride, Lanes n, W* x) {
    for (int i = 0; i < form.factors(); ++i) x[i] = load(u + i * range_stride, n);
  }

  template <bool weighted>
  POM_INLINE static void sum_rows(const Rows& rows, const Form& form, const T* u, int64_t stride, const Acc* coeff,
                                  int64_t coeff_stride, const Acc* weight, double* total) {
    for_stored_channels<T>(rows.width, [&](int64_t channel, auto n) {
      using W = typename vector_at<V, decltype(n)>::type;
      W c[kCoeffs], x[kFactors], phi[kFactors], sum[kFactors];
      load_coeff(form, coeff + channel, coeff_stride, n, c);
      for (int i = 0; i < form.factors(); ++i) sum[i] = W(0.0);
      for (int64_t row = 0; row < rows.count; ++row) {
        load_factors(form, u + channel + row * stride, rows.range_stride, n, x);
        form.value(x, c, phi);
        for (int i = 0; i < form.factors(); ++i)
          sum[i] = sum[i] + (weighted ? W(double(weight[row])) * phi[i] : phi[i]);
      }
      for (int i = 0; i < form.factors(); ++i) accumulate(total + channel + i * rows.range_stride, sum[i], n);
    });
  }

  static void sum(const Rows& rows, int degree, const void* u, int64_t stride, const Acc* coeff, int64_t coeff_stride,
                  const Acc* weight, double* total) {
    const Form form(degree);
    if (weight)
      sum_rows<true>(rows, form, static_cast<const T*>(u), stride, coeff, coeff_stride, weight, total);
    else
      sum_rows<false>(rows, form, static_cast<const T*>(u), stride, coeff, coeff_stride, weight, total);
  }

  static void features(const Rows& rows, int degree, const void* u_, int64_t stride, const Acc* coeff,
                       int64_t coeff_stride, Acc* phi_out) {
    const Form form(degree);
    const T* u = static_cast<const T*>(u_);
    for_channels<V>(rows.width, [&](int64_t channel, auto n) {
      V c[kCoeffs], x[kFactors], phi[kFactors];
      load_coeff(form, coeff + channel, coeff_stride, n, c);
      for (int64_t row = 0; row < rows.count; ++row) {
        load_factors(form, u + channel + row * stride, rows.range_stride, n, x);
        form.value(x, c, phi);
        Acc* out = phi_out + row * rows.ranges * rows.width + channel;
        for (int i = 0; i < form.factors(); ++i) store(out + i * rows.width, phi[i], n);
      }
    });
  }

  static void slopes(const Rows& rows, int degree, const void* u_, int64_t stride, const Acc* coeff,
                     int64_t coeff_stride, const Acc* weight, const Acc* dphi_, int64_t dphi_stride,
                     int64_t dphi_range_stride, void* du_, int64_t du_stride, double* dcoeff) {
    const Form form(degree);
    const T* u = static_cast<const T*>(u_);
    T* du_out = static_cast<T*>(du_);
    for_channels<V>(rows.width, [&](int64_t channel, auto n) {
      V c[kCoeffs], x[kFactors], dphi[kFactors], du[kFactors], dc[kCoeffs], dc_sum[kCoeffs];
      load_coeff(form, coeff + channel, coeff_stride, n, c);
      if constexpr (Form::has_coeff)
        for (int i = 0; i < form.degree; ++i) dc_sum[i] = V(0.0);
      for (int64_t row = 0; row < rows.count; ++row) {
        load_factors(form, u + channel + row * stride, rows.range_stride, n, x);
        const Acc* dphi_row = dphi_ + row * dphi_stride + channel;
        for (int i = 0; i < form.factors(); ++i) {
          dphi[i] = load_as<V>(dphi_row + i * dphi_range_stride, n);
          if (weight) dphi[i] = V(double(weight[row])) * dphi[i];
        }
        form.slope(x, c, dphi, du, dc);
        for (int i = 0; i < form.factors(); ++i)
          store(du_out + row * du_stride + channel + i * rows.range_stride, du[i], n);
        if constexpr (Form::has_coeff)
          for (int i = 0; i < form.degree; ++i) dc_sum[i] = dc_sum[i] + dc[i];
      }
      if constexpr (Form::has_coeff)
        for (int i = 0; i < form.degree; ++i) accumulate(dcoeff + i * coeff_stride + channel, dc_sum[i], n);
    });
  }

  static constexpr FeatureKernels<Acc> kernels = {sizeof(T), sum, features, slopes};
};

template <class Gate, class T>
struct Gated {
  using Acc = typename accumulator<T>::type;
  using V = typename vector_of<T>::type;

  static void value(int64_t width, const void* gate, Acc* value) {
    for_channels<V>(width, [&](int64_t c, auto n) {
      store(value + c, Gate::value(load(static_cast<const T*>(gate) + c, n)), n);
    });
  }

  static void slope(int64_t width, const void* gate, const Acc* dvalue, void* dgate) {
    for_channels<V>(width, [&](int64_t c, auto n) {
      const V slope = Gate::slope(load(static_cast<const T*>(gate) + c, n));
      store(static_cast<T*>(dgate) + c, slope * load_as<V>(dvalue + c, n), n);
    });
  }

  static void multiply(int64_t width, const Acc* value, const Acc* mean, void* y) {
    for_channels<V>(width, [&](int64_t c, auto n) {
      store(static_cast<T*>(y) + c, load_as<V>(value + c, n) * load_as<V>(mean + c, n), n);
    });
  }

  static void multiply_backward(int64_t width, const void* dy, const Acc* mean, Acc* value, Acc* dmean) {
    for_channels<V>(width, [&](int64_t c, auto n) {
      const V d = load(static_cast<const T*>(dy) + c, n);
      store(dmean + c, d * load_as<V>(value + c, n), n);
      store(value + c, d * load_as<V>(mean + c, n), n);
    });
  }

  static constexpr GateKernels<Acc> kernels = {sizeof(T), value, slope, multiply, multiply_backward};
};

template <class Acc>
struct Linear {
  using V = Vec<Acc>;

  static double total(int64_t width, const Acc* x) {
    V sum(0.0);
    for_channels<V>(width, [&](int64_t c, auto n) { sum = sum + load(x + c, n); });
    double total = 0;
    for (int i = 0; i < V::lanes; ++i) total += sum.v[i];
    return total;
  }

  static void sum(int64_t rows, int64_t width, const Acc* x, int64_t stride, const Acc* weight, int64_t weight_stride,
                  double* total) {
    for_channels<V>(width, [&](int64_t c, auto n) {
      V sum(0.0);
      for (int64_t row = 0; row < rows; ++row) {
        const V term = load(x + row * stride + c, n);
        sum = sum + (weight ? V(double(weight[row * weight_stride])) * term : term);
      }
      accumulate(total + c, sum, n);
    });
  }

  static void rotate(int64_t rows, int64_t width, Acc* low_, Acc* high_, int64_t stride, const Acc* cos_,
                     const Acc* sin_, int64_t angle_stride, bool transpose) {
    for (int64_t row = 0; row < rows; ++row)
      for_channels<V>(width, [&](int64_t c, auto n) {
        Acc *low = low_ + row * stride + c, *high = high_ + row * stride + c;
        const V cos = load(cos_ + row * angle_stride + c, n), s = load(sin_ + row * angle_stride + c, n);
        const V sin = transpose ? V(0.0) - s : s, a = load(low, n), b = load(high, n);
        store(low, a * cos - b * sin, n);
        store(high, b * cos + a * sin, n);
      });
  }

  static void scan(int64_t rows, int64_t width, Acc* x, int64_t stride, const Acc* weight, const Acc* scale,
                   bool reverse, double* base) {
    for_channels<V>(width, [&](int64_t c, auto n) {
      Acc rounded[V::lanes] = {};
      for (int64_t i = 0; i < V::lanes && c + i < width; ++i) rounded[i] = Acc(base[c + i]);
      const V from = load(rounded);
      V sum(0.0);
      for (int64_t step = 0; step < rows; ++step) {
        const int64_t row = reverse ? rows - 1 - step : step;
        Acc* here = x + row * stride + c;
        const V term = load(here, n);
        sum = sum + (weight ? V(double(weight[row])) * term : term);
        store(here, scale ? V(double(scale[row])) * (from + sum) : from + sum, n);
      }
      accumulate(base + c, sum, n);
    });
  }

  static constexpr LinearKernels<Acc> kernels = {total, sum, rotate, scan};
};

template <template <int> class Form, class T>
const auto* feature_kernels_of_degree(int degree) {
  switch (degree) {
    case 1:
      return &Feature<Form<1>, T>::kernels;
    case 2:
      return &Feature<Form<2>, T>::kernels;
    case 3:
      return &Feature<Form<3>, T>::kernels;
    case 4:
      return &Feature<Form<4>, T>::kernels;
    default:
      return &Feature<Form<0>, T>::kernels;
  }
}

template <class T>
const auto* feature_kernels_of_form(Form form, int degree) {
  return form == Form::product ? feature_kernels_of_degree<Product, T>(degree)
                               : feature_kernels_of_degree<Power, T>(degree);
}

template <class T>
const auto* gate_kernels_of_form(Form form) {
  return form == Form::product ? &Gated<Sigmoid, T>::kernels : &Gated<HardSigmoid, T>::kernels;
}

// Entry points of this instruction set, looked up by dispatch.cpp.
const FeatureKernels<float>* feature_kernels(Dtype dtype, Form form, int degree, float) {
  switch (dtype) {
    case Dtype::bf16:
      return feature_kernels_of_form<bf16>(form, degree);
    case Dtype::f16:
      return feature_kernels_of_form<f16>(form, degree);
    default:
      return feature_kernels_of_form<float>(form, degree);
  }
}
const FeatureKernels<double>* feature_kernels(Dtype, Form form, int degree, double) {
  return feature_kernels_of_form<double>(form, degree);
}
const GateKernels<float>* gate_kernels(Dtype dtype, Form form, float) {
  switch (dtype) {
    case Dtype::bf16:
      return gate_kernels_of_form<bf16>(form);
    case Dtype::f16:
      return gate_kernels_of_form<f16>(form);
    default:
      return gate_kernels_of_form<float>(form);
  }
}
const GateKernels<double>* gate_kernels(Dtype, Form form, double) { return gate_kernels_of_form<double>(form); }
const LinearKernels<float>* linear_kernels(float) { return &Linear<float>::kernels; }
const LinearKernels<double>* linear_kernels(double) { return &Linear<double>::kernels; }

}  // namespace pom::cpu::POM_ISA
