// Compares results with naive.h, within rounding errors.
#pragma once

#include <string>

#include "inputs.h"

// The allowed error: rounding of the result, and of every factor of a polynomial.
inline double tolerance(const Case& c, const Buffer& result) {
  constexpr double kResult[] = {2e-6, 1e-14, 0x1.1p-8, 0x1.1p-11}, kFactor[] = {6e-7, 1e-15, 0x1p-19, 0x1p-19};
  return kResult[int(result.dtype())] + c.degree * kFactor[int(c.dtype)];
}

// Results whose last dimension is the features' channels; then coefficients and gates.
inline void expect_channels(const Case& c, const std::string& name, const Buffer& got, const Array& wanted) {
  expect_close(name, got, wanted, c.channels(), c.form == Form::product ? c.degree : 1, tolerance(c, got));
}
inline void expect_coeff(const Case& c, const std::string& name, const Buffer& got, const Array& wanted) {
  expect_close(name, got, wanted, c.degree, c.degree, tolerance(c, got));
}
inline void expect_gates(const Case& c, const std::string& name, const Buffer& got, const Array& wanted) {
  const int64_t parts = c.heads == 1 && c.form == Form::product ? c.degree : 1;
  expect_close(name, got, wanted, c.gates(), parts, tolerance(c, got));
}

inline void expect_state(const Case& c, const std::string& name, const StateBuffers& got, const naive::State& wanted) {
  expect_channels(c, name + "total", got.total, wanted.total);
  expect_close(name + "count", got.count, wanted.count, 1, 1, 1e-14);
  for (int64_t i = 0; i < got.total.size(); ++i) {
    const double total = got.total.get(i), residual = got.residual.get(i);
    Array sum = {total + residual};
    Buffer(got.total.dtype(), sum);
    check::expect(sum[0] == total, "%stotal %.9g with residual %g is not rounded", name.c_str(), total, residual);
  }
}

// The state after adding the tokens of a problem to a state of one group, for every group of the problem.
inline naive::State added(const naive::State& before, const naive::Problem& p) {
  naive::State state = naive::state(p);
  const int64_t channels = p.channels(), of_sample = p.groups * channels;
  for (int64_t i = 0; i < int64_t(state.total.size()); ++i)
    state.total[i] += before.total[i / of_sample * channels + i % channels];
  for (int64_t i = 0; i < int64_t(state.count.size()); ++i) state.count[i] += before.count[i / p.groups];
  return state;
}
