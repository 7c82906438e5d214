// For tests of the CPU's operations with projections: products of plain arrays, and the matrix products that callers
// bring.
#pragma once

#include <vector>

#include "expectations.h"
#include "pom/engine.h"

// x (rows, inputs) weight (outputs, inputs)ᵀ + bias
inline Array times_transpose(const Array& x, const Array& weight, int64_t inputs, const Array& bias = {}) {
  const int64_t rows = int64_t(x.size()) / inputs, outputs = int64_t(weight.size()) / inputs;
  Array y(rows * outputs);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < outputs; ++o) {
      double& sum = y[r * outputs + o] = bias.empty() ? 0 : bias[o];
      for (int64_t i = 0; i < inputs; ++i) sum += x[r * inputs + i] * weight[o * inputs + i];
    }
  return y;
}
inline Array transpose(const Array& x, int64_t columns) {
  const int64_t rows = int64_t(x.size()) / columns;
  Array y(x.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) y[c * rows + r] = x[r * columns + c];
  return y;
}
inline Array column_sums(const Array& x, int64_t columns) {
  Array sums(columns);
  for (size_t i = 0; i < x.size(); ++i) sums[i % columns] += x[i];
  return sums;
}
inline Array moved(const Array& x, double step, const Array& direction) {
  Array y = x;
  for (size_t i = 0; i < x.size() && !direction.empty(); ++i) y[i] += step * direction[i];
  return y;
}
// The derivative of a function of a step, at 0.
template <class Function>
Array slope(const Function& function) {
  constexpr double kStep = 3e-8;  // so short that hardly a number crosses a kink of its activation
  Array up = function(kStep), down = function(-kStep);
  for (size_t i = 0; i < up.size(); ++i) up[i] = (up[i] - down[i]) / (2 * kStep);
  return up;
}

// Numbers that are multiplied with: exact in the dtype.
struct Weights {
  Array values;
  Buffer buffer;
  Weights(Dtype dtype, int64_t outputs, int64_t inputs, double scale = 1)
      : values(draw(outputs * inputs, -scale / std::sqrt(double(inputs)), scale / std::sqrt(double(inputs)))),
        buffer(dtype, values) {}
};

// The ways to multiply: plain loops, a function for dense matrices, and a library that has memory of its own.
class Multiplication {
 public:
  enum Kind { plain, dense, library };
  explicit Multiplication(Kind kind) : kind_(kind) {}

  Linear linear() {
    if (kind_ == plain) return {};
    if (kind_ == dense) return {multiply_dense, this};
    return {nullptr, this, multiply, sum_columns};
  }
  pom_status status = POM_OK;  // of `dense`
  int64_t calls = 0;

 private:
  static pom_status multiply_dense(void* self, const pom_linear* map) {
    auto& m = *static_cast<Multiplication*>(self);
    ++m.calls;
    return m.status == POM_OK ? pom_cpu_linear(nullptr, map) : m.status;
  }
  static const void* multiply(void* self, const MatrixProduct& p, int slot) {
    auto& m = *static_cast<Multiplication*>(self);
    ++m.calls;
    const int64_t batch = std::max<int64_t>(1, p.batch);
    Buffer& y = m.results_[slot] = Buffer(p.dtype, batch * p.rows * p.outputs);
    for (int64_t i = 0; i < y.size(); ++i) {
      const int64_t b = i / p.outputs / p.rows, row = i / p.outputs % p.rows, output = i % p.outputs;
      double sum = p.bias ? number(p.dtype, p.bias, output) : 0;
      for (int64_t k = 0; k < p.inputs; ++k)
        sum += element(p.dtype, p.x, b, row, k) * element(p.dtype, p.weight, b, output, k);
      y.set(i, sum);
    }
    return y.data();
  }
  static void sum_columns(void*, Dtype dtype, const Matrix& matrix, int64_t rows, int64_t columns, void* sums) {
    for (int64_t c = 0; c < columns; ++c) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) sum += element(dtype, matrix, 0, r, c);
      if (dtype == Dtype::f64)
        static_cast<double*>(sums)[c] = sum;
      else
        static_cast<float*>(sums)[c] = float(sum);
    }
  }
  static double element(Dtype dtype, const Matrix& m, int64_t batch, int64_t row, int64_t column) {
    return number(dtype, m.data, batch * m.batch_stride + row * m.row_stride + column * m.column_stride);
  }
  static double number(Dtype dtype, const void* data, int64_t i) {
    if (dtype == Dtype::f64) return static_cast<const double*>(data)[i];
    if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
    return dtype == Dtype::bf16 ? to_float(static_cast<const bf16*>(data)[i])
                                : to_float(static_cast<const f16*>(data)[i]);
  }

  Kind kind_;
  Buffer results_[Linear::kSlots];
};

// Near what is wanted, to what rounding of products and projections may cost; `inexact`: to what `slope` may.
inline void expect_near(const std::string& name, const Buffer& got, const Array& wanted, Dtype dtype, int64_t last,
                        double inexact = 0) {
  constexpr double kTolerance[] = {2e-5, 1e-10, 0.03, 0.004};
  expect_close(name, got, wanted, last, 1, std::max(inexact, kTolerance[int(dtype)]));
}
constexpr double kSlope = 3e-6;
