// The operations as plain loops over doubles, straight from the formulas: the oracle of the C++ tests. Arrays are dense
// and row-major.
#pragma once

#include <cmath>
#include <vector>

#include "pom/pom.h"

namespace naive {

using Array = std::vector<double>;

// Channel p in the first half of an axis's block is rotated with channel p + half. cos, sin: (tokens, axes, half).
struct Rotary {
  int64_t axes = 0, half = 0;
  Array cos, sin;
};

// An instance of the operations. `seen`: each group's weight of every token; query m reads group reads[m].
struct Problem {
  pom::Form form;
  int degree;
  int64_t batch, tokens, width, groups, queries, heads;
  Array u, coeff;  // (batch, tokens, C), (width, degree)
  Array seen;      // (batch, groups, tokens)
  Array gate;      // (batch, queries, C or heads)
  std::vector<int64_t> reads;
  Rotary rotary, gate_rotary;

  bool product() const { return form == pom::Form::product; }
  int64_t channels() const { return product() ? degree * width : width; }
  int64_t gates() const { return heads > 1 ? heads : channels(); }
  int64_t gate_of(int64_t channel) const { return heads > 1 ? channel / (channels() / heads) : channel; }
};

// Rotates the rows x (batch, tokens, width) by their angles; inversely with direction -1.
inline void rotate(Array& x, int64_t batch, int64_t tokens, int64_t width, const Rotary& rotary, double direction = 1) {
  const int64_t half = rotary.half;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t axis = 0; axis < rotary.axes; ++axis)
        for (int64_t p = 0; p < half; ++p) {
          const int64_t angle = (n * rotary.axes + axis) * half + p;
          const double cos = rotary.cos[angle], sin = direction * rotary.sin[angle];
          double& low = x[(b * tokens + n) * width + 2 * half * axis + p];
          double& high = (&low)[half];
          const double turned = low * cos - high * sin;
          high = high * cos + low * sin;
          low = turned;
        }
}

inline double gelu(double x) { return x * (1 + std::erf(x / std::sqrt(2.0))) / 2; }
inline double gelu_slope(double x) {
  return (1 + std::erf(x / std::sqrt(2.0))) / 2 + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
}
inline double leaky_clamp(double x) {
  const double leaky = x > 0 ? x : 0.01 * x;
  return leaky < -0.1 ? -0.1 : leaky > 6 ? 6 : leaky;
}
inline double leaky_clamp_slope(double x) { return x < -10 || x > 6 ? 0 : x > 0 ? 1 : 0.01; }

inline double gate_value(const Problem& p, double x) {
  if (p.product()) return 1 / (1 + std::exp(-x));
  return x < -3 ? 0 : x > 3 ? 1 : (x + 3) / 6;
}
inline double gate_slope(const Problem& p, double x) {
  if (p.product()) return std::exp(-x) / std::pow(1 + std::exp(-x), 2);
  return x > -3 && x < 3 ? 1.0f / 6 : 0;  // torch's constant is a float
}

// φ (batch, tokens, C)
inline Array features(const Problem& p) {
  Array phi(p.u.size());
  for (int64_t row = 0; row < p.batch * p.tokens; ++row)
    for (int64_t e = 0; e < p.width; ++e) {
      const int64_t at = row * p.channels() + e;
      if (p.product()) {
        for (int i = 0; i < p.degree; ++i) {
          phi[at + i * p.width] = 1;
          for (int j = 0; j <= i; ++j) phi[at + i * p.width] *= gelu(p.u[at + j * p.width]);
        }
      } else {
        for (int i = 0; i < p.degree; ++i) phi[at] += p.coeff[e * p.degree + i] * std::pow(leaky_clamp(p.u[at]), i + 1);
      }
    }
  rotate(phi, p.batch, p.tokens, p.channels(), p.rotary);
  return phi;
}

struct FeatureGradients {
  Array u, coeff;
};
inline FeatureGradients features_backward(const Problem& p, Array dphi) {
  FeatureGradients d{Array(p.u.size()), Array(p.coeff.size())};
  rotate(dphi, p.batch, p.tokens, p.channels(), p.rotary, -1);
  for (int64_t row = 0; row < p.batch * p.tokens; ++row)
    for (int64_t e = 0; e < p.width; ++e) {
      const int64_t at = row * p.channels() + e;
      if (p.product()) {
        for (int i = 0; i < p.degree; ++i)
          for (int j = 0; j <= i; ++j) {
            double slope = gelu_slope(p.u[at + j * p.width]);
            for (int other = 0; other <= i; ++other)
              if (other != j) slope *= gelu(p.u[at + other * p.width]);
            d.u[at + j * p.width] += slope * dphi[at + i * p.width];
          }
      } else {
        const double a = leaky_clamp(p.u[at]);
        for (int i = 0; i < p.degree; ++i) {
          d.u[at] += p.coeff[e * p.degree + i] * (i + 1) * std::pow(a, i) * leaky_clamp_slope(p.u[at]) * dphi[at];
          d.coeff[e * p.degree + i] += std::pow(a, i + 1) * dphi[at];
        }
      }
    }
  return d;
}

// S (batch, groups, C) and n (batch, groups)
struct State {
  Array total, count;
};
inline State state(const Problem& p) {
  const int64_t channels = p.channels();
  const Array phi = features(p);
  State s{Array(p.batch * p.groups * channels), Array(p.batch * p.groups)};
  for (int64_t row = 0; row < p.batch * p.groups; ++row)
    for (int64_t n = 0; n < p.tokens; ++n) {
      const double weight = p.seen[row * p.tokens + n];
      s.count[row] += weight;
      for (int64_t c = 0; c < channels && weight != 0; ++c)
        s.total[row * channels + c] += weight * phi[(row / p.groups * p.tokens + n) * channels + c];
    }
  return s;
}
inline FeatureGradients state_backward(const Problem& p, const Array& dtotal) {
  const int64_t channels = p.channels();
  Array dphi(p.u.size());
  for (int64_t row = 0; row < p.batch * p.groups; ++row)
    for (int64_t n = 0; n < p.tokens; ++n) {
      const double weight = p.seen[row * p.tokens + n];
      for (int64_t c = 0; c < channels && weight != 0; ++c)
        dphi[(row / p.groups * p.tokens + n) * channels + c] += weight * dtotal[row * channels + c];
    }
  return features_backward(p, dphi);
}

// The rotated values of the gates (batch, queries, C or heads).
inline Array gate_values(const Problem& p) {
  Array value;
  for (double x : p.gate) value.push_back(gate_value(p, x));
  rotate(value, p.batch, p.queries, p.gates(), p.gate_rotary);
  return value;
}

// y (batch, queries, C)
inline Array readout(const Problem& p, const State& s) {
  const int64_t channels = p.channels();
  const Array value = gate_values(p);
  Array y(p.batch * p.queries * channels);
  for (int64_t row = 0; row < p.batch * p.queries; ++row) {
    const int64_t group = row / p.queries * p.groups + p.reads[row % p.queries];
    for (int64_t c = 0; c < channels && s.count[group] != 0; ++c)
      y[row * channels + c] = value[row * p.gates() + p.gate_of(c)] * s.total[group * channels + c] / s.count[group];
  }
  return y;
}

struct ReadoutGradients {
  Array gate, total;
};
inline ReadoutGradients readout_backward(const Problem& p, const State& s, const Array& dy) {
  const int64_t channels = p.channels();
  const Array value = gate_values(p);
  ReadoutGradients d{Array(p.gate.size()), Array(s.total.size())};
  for (int64_t row = 0; row < p.batch * p.queries; ++row) {
    const int64_t group = row / p.queries * p.groups + p.reads[row % p.queries];
    for (int64_t c = 0; c < channels && s.count[group] != 0; ++c) {
      const int64_t gate = row * p.gates() + p.gate_of(c);
      d.gate[gate] += dy[row * channels + c] * s.total[group * channels + c] / s.count[group];
      d.total[group * channels + c] += dy[row * channels + c] * value[gate] / s.count[group];
    }
  }
  rotate(d.gate, p.batch, p.queries, p.gates(), p.gate_rotary, -1);
  for (size_t i = 0; i < d.gate.size(); ++i) d.gate[i] *= gate_slope(p, p.gate[i]);
  return d;
}

}  // namespace naive
