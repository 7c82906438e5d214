// The inner loops of kernels.h. This file is compiled once for every instruction set.

#include "cpu/kernels.h"

#include "cpu/simd.h"

namespace pom::cpu::POM_ISA {

// What lies in scratch or beside the tokens, as a vector of the kind the tokens are in.
template <class V, class Acc, class Lanes>
POM_INLINE V load_as(const Acc* p, Lanes n) {
  return V(load(p, n));
}

// The number kinds of a loop: plain ones, or dual ones where there is a tangent.
template <bool along, class W>
using number = std::conditional_t<along, Dual<W>, W>;

template <bool along, class W, class T, class Lanes>
POM_INLINE number<along, W> load_number(const T* at, const T* tangent, Lanes n) {
  if constexpr (along)
    return {W(load(at, n)), W(load(tangent, n))};
  else
    return W(load(at, n));
}
template <bool along, class W>
POM_INLINE number<along, W> constant(W x) {
  if constexpr (along)
    return {x, W(0.0)};
  else
    return x;
}

// The loops over tokens of one dtype, form and degree; `along` a tangent or not.
template <class Form, class T, bool along>
struct Loops {
  using Acc = typename accumulator<T>::type;
  using V = typename vector_of<T>::type;
  static constexpr int kFactors = Form::capacity;
  static constexpr int kCoeffs = Form::has_coeff ? decltype(Form::degree)::capacity : 1;

  // Loads tokens and coefficients at a channel, plain or dual.
  struct Source {
    const Form form;
    const Point<Acc>&at, &tangent;
    const int64_t range_stride, coeff_stride;

    template <class W, class Lanes>
    POM_INLINE void load_coeff(int64_t channel, Lanes n, number<along, W>* c) const {
      if constexpr (Form::has_coeff)
        for (int i = 0; i < form.degree; ++i) {
          const int64_t offset = channel + i * coeff_stride;
          c[i] = load_number<along, W>(at.coeff + offset, tangent.coeff + offset, n);
        }
    }
    template <class W, class Lanes>
    POM_INLINE void load_factors(int64_t row, int64_t channel, Lanes n, number<along, W>* x) const {
      const T* u = static_cast<const T*>(at.u) + row * at.stride + channel;
      const T* du = static_cast<const T*>(tangent.u) + row * tangent.stride + channel;
      for (int i = 0; i < form.factors(); ++i)
        x[i] = load_number<along, W>(u + i * range_stride, du + i * range_stride, n);
    }
  };

  template <bool weighted>
  static void sum_rows(const Rows& rows, const Source& source, const Acc* weight, double* total) {
    const Form& form = source.form;
    const auto body = [&](int64_t channel, auto n) {
      using W = typename vector_at<V, decltype(n)>::type;
      number<along, W> c[kCoeffs], x[kFactors], phi[kFactors];
      W sum[kFactors];
      source.template load_coeff<W>(channel, n, c);
      for (int i = 0; i < form.factors(); ++i) sum[i] = W(0.0);
      for (int64_t row = 0; row < rows.count; ++row) {
        source.template load_factors<W>(row, channel, n, x);
        form.value(x, c, phi);
        for (int i = 0; i < form.factors(); ++i) {
          const W term = primal_or_tangent(phi[i]);
          sum[i] = sum[i] + (weighted ? W(double(weight[row])) * term : term);
        }
      }
      for (int i = 0; i < form.factors(); ++i) accumulate(total + channel + i * rows.range_stride, sum[i], n);
    };
    if constexpr (along)
      for_channels<V>(rows.width, body);
    else
      for_stored_channels<T>(rows.width, body);
  }

  static void sum(const Rows& rows, int degree, const Point<Acc>& at, const Point<Acc>& tangent, int64_t coeff_stride,
                  const Acc* weight, double* total) {
    const Source source = {Form(degree), at, tangent, rows.range_stride, coeff_stride};
    if (weight)
      sum_rows<true>(rows, source, weight, total);
    else
      sum_rows<false>(rows, source, weight, total);
  }

  static void features(const Rows& rows, int degree, const Point<Acc>& at, const Point<Acc>& tangent,
                       int64_t coeff_stride, Acc* phi_out) {
    const Source source = {Form(degree), at, tangent, rows.range_stride, coeff_stride};
    const Form& form = source.form;
    for_channels<V>(rows.width, [&](int64_t channel, auto n) {
      number<along, V> c[kCoeffs], x[kFactors], phi[kFactors];
      source.template load_coeff<V>(channel, n, c);
      for (int64_t row = 0; row < rows.count; ++row) {
        source.template load_factors<V>(row, channel, n, x);
        form.value(x, c, phi);
        Acc* out = phi_out + row * rows.ranges * rows.width + channel;
        for (int i = 0; i < form.factors(); ++i) store(out + i * rows.width, primal_or_tangent(phi[i]), n);
      }
    });
  }

  static void slopes(const Rows& rows, int degree, const Point<Acc>& at, const Point<Acc>& tangent,
                     int64_t coeff_stride, const Acc* weight, const Acc* dphi_, int64_t dphi_stride,
                     int64_t dphi_range_stride, void* du_, int64_t du_stride, double* dcoeff) {
    const Source source = {Form(degree), at, tangent, rows.range_stride, coeff_stride};
    const Form& form = source.form;
    for_channels<V>(rows.width, [&](int64_t channel, auto n) {
      number<along, V> c[kCoeffs], x[kFactors], dphi[kFactors], du[kFactors], dc[kCoeffs];
      V dc_sum[kCoeffs];
      source.template load_coeff<V>(channel, n, c);
      if constexpr (Form::has_coeff)
        for (int i = 0; i < form.degree; ++i) dc_sum[i] = V(0.0);
      for (int64_t row = 0; row < rows.count; ++row) {
        source.template load_factors<V>(row, channel, n, x);
        const Acc* dphi_row = dphi_ + row * dphi_stride + channel;
        for (int i = 0; i < form.factors(); ++i) {
          const V d = load_as<V>(dphi_row + i * dphi_range_stride, n);
          dphi[i] = constant<along>(weight ? V(double(weight[row])) * d : d);
        }
        form.slope(x, c, dphi, du, dc);
        T* out = static_cast<T*>(du_) + row * du_stride + channel;
        for (int i = 0; i < form.factors(); ++i) store(out + i * rows.range_stride, primal_or_tangent(du[i]), n);
        if constexpr (Form::has_coeff)
          for (int i = 0; i < form.degree; ++i) dc_sum[i] = dc_sum[i] + primal_or_tangent(dc[i]);
      }
      if constexpr (Form::has_coeff)
        for (int i = 0; i < form.degree; ++i) accumulate(dcoeff + i * coeff_stride + channel, dc_sum[i], n);
    });
  }
};

// The loops of a form, and of the one that stands for it where there is a tangent.
template <class Form, class FormAlong, class T>
struct Feature {
  using Acc = typename accumulator<T>::type;
  using Plain = Loops<Form, T, false>;
  using Dually = Loops<FormAlong, T, true>;

  template <class... Rest>
  static void sum(const Rows& rows, int degree, const Point<Acc>& at, const Point<Acc>& tangent, Rest... rest) {
    (tangent.u ? Dually::sum : Plain::sum)(rows, degree, at, tangent, rest...);
  }
  template <class... Rest>
  static void features(const Rows& rows, int degree, const Point<Acc>& at, const Point<Acc>& tangent, Rest... rest) {
    (tangent.u ? Dually::features : Plain::features)(rows, degree, at, tangent, rest...);
  }
  template <class... Rest>
  static void slopes(const Rows& rows, int degree, const Point<Acc>& at, const Point<Acc>& tangent, Rest... rest) {
    (tangent.u ? Dually::slopes : Plain::slopes)(rows, degree, at, tangent, rest...);
  }

  static constexpr FeatureKernels<Acc> kernels = {sizeof(T), sum, features, slopes};
};

template <class Gate, class T>
struct Gated {
  using Acc = typename accumulator<T>::type;
  using V = typename vector_of<T>::type;

  // body(channel, lanes, gates), plain or dual
  template <class Body>
  static void each_gate(int64_t width, const void* gate, const void* tangent, Body body) {
    const T *at = static_cast<const T*>(gate), *along = static_cast<const T*>(tangent);
    for_channels<V>(width, [&](int64_t c, auto n) {
      if (along)
        body(c, n, load_number<true, V>(at + c, along + c, n));
      else
        body(c, n, load_number<false, V>(at + c, at + c, n));
    });
  }

  static void value(int64_t width, const void* gate, const void* tangent, Acc* value) {
    each_gate(width, gate, tangent,
              [&](int64_t c, auto n, auto x) { store(value + c, primal_or_tangent(Gate::value(x)), n); });
  }

  static void slope(int64_t width, const void* gate, const void* tangent, const Acc* dvalue, void* dgate) {
    each_gate(width, gate, tangent, [&](int64_t c, auto n, auto x) {
      store(static_cast<T*>(dgate) + c, primal_or_tangent(Gate::slope(x)) * load_as<V>(dvalue + c, n), n);
    });
  }

  static void multiply(int64_t width, const Acc* value, const Acc* mean, void* y) {
    for_channels<V>(width, [&](int64_t c, auto n) {
      store(static_cast<T*>(y) + c, load_as<V>(value + c, n) * load_as<V>(mean + c, n), n);
    });
  }

  static void multiply_along(int64_t width, const Acc* value, const Acc* mean, const Acc* dvalue, const Acc* dmean,
                             void* y) {
    for_channels<V>(width, [&](int64_t c, auto n) {
      const Dual<V> gamma(load_as<V>(value + c, n), load_as<V>(dvalue + c, n));
      const Dual<V> h(load_as<V>(mean + c, n), load_as<V>(dmean + c, n));
      store(static_cast<T*>(y) + c, primal_or_tangent(gamma * h), n);
    });
  }

  static void multiply_backward(int64_t width, const void* dy, const Acc* mean, Acc* value, Acc* dmean) {
    for_channels<V>(width, [&](int64_t c, auto n) {
      const V d = load(static_cast<const T*>(dy) + c, n);
      store(dmean + c, d * load_as<V>(value + c, n), n);
      store(value + c, d * load_as<V>(mean + c, n), n);
    });
  }

  static constexpr GateKernels<Acc> kernels = {sizeof(T), value, slope, multiply, multiply_along, multiply_backward};
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

// Tangents of float, the dtype that directions are mostly taken in, have loops of their own for degrees 2 and 3.
template <template <int> class Form, class T>
const auto* feature_kernels_of_degree(int degree) {
  constexpr bool own = std::is_same_v<T, float>;
  switch (degree) {
    case 1:
      return &Feature<Form<1>, Form<0>, T>::kernels;
    case 2:
      return &Feature<Form<2>, Form<own ? 2 : 0>, T>::kernels;
    case 3:
      return &Feature<Form<3>, Form<own ? 3 : 0>, T>::kernels;
    case 4:
      return &Feature<Form<4>, Form<0>, T>::kernels;
    default:
      return &Feature<Form<0>, Form<0>, T>::kernels;
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
