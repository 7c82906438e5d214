// The cases that the library is tested with, and their inputs: as the library takes them, and as a naive::Problem.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "harness.h"

using namespace pom;

enum class Context { whole, even, offsets, cumulative, mask, causal };
constexpr const char* kContextNames[] = {"whole", "even", "offsets", "cumulative", "mask", "causal"};
constexpr const char* kDtypeNames[] = {"f32", "f64", "bf16", "f16"};

struct Shape {
  int64_t batch, tokens, width;
};

// A case of any operation it fits. A readout reads `even` groups or groups by offsets; a mix is `causal`.
struct Case {
  Form form;
  int degree;
  Dtype dtype;
  Context context;
  bool weighted = false, prior = false;
  Shape shape = {2, 70, 9};
  int64_t heads = 1;
  int axes = 0;
  Layout layout = Layout::dense;
  bool aligned = true;
  int64_t other_queries = -1;  // number of queries; -1: as many as tokens

  int64_t queries() const { return other_queries < 0 ? shape.tokens : other_queries; }
  int64_t channels() const { return form == Form::product ? degree * shape.width : shape.width; }
  int64_t gates() const { return heads > 1 ? heads : channels(); }

  std::string name(const char* operation) const {
    return std::string(operation) + (form == Form::product ? " product" : " power") + std::to_string(degree) + " " +
           kDtypeNames[int(dtype)] + " " + kContextNames[int(context)] + (weighted ? "+weights" : "") +
           (prior ? "+prior" : "") + " B" + std::to_string(shape.batch) + " N" + std::to_string(shape.tokens) + " M" +
           std::to_string(queries()) + " E" + std::to_string(shape.width) + " heads " + std::to_string(heads) +
           " axes " + std::to_string(axes) + " layout " + std::to_string(int(layout)) +
           (aligned ? ": " : " unaligned: ");
  }
};

struct Angles {
  naive::Rotary values;
  Buffer cos, sin;

  Angles() = default;
  // If an axis has many pairs, a few last channels are not rotated.
  Angles(Dtype acc, int64_t tokens, int64_t width, int axes) {
    if (!axes) return;
    const int64_t pairs = width / (2 * axes), few = pairs % 8 == 0 ? 8 : pairs % 4 == 0 ? 4 : 1;
    values.axes = axes;
    values.half = pairs > 2 * few ? pairs - few : pairs;
    for (double angle : draw(tokens * axes * values.half, -9, 9)) {
      values.cos.push_back(std::cos(angle));
      values.sin.push_back(std::sin(angle));
    }
    cos = Buffer(acc, values.cos);
    sin = Buffer(acc, values.sin);
  }
  Rotary view() const { return values.axes ? Rotary{cos.data(), sin.data(), values.half, int(values.axes)} : Rotary{}; }
};

// A prior state. Its sums need more than a float; with several rows the last one has count 0.
struct Before {
  Buffer total, residual, count;
  naive::State values;

  Before(Dtype acc, int64_t rows, int64_t channels, bool with_empty) {
    values = {draw(rows * channels, -3, 4), draw(rows, 0.5, 3)};
    if (with_empty && rows > 1) values.count.back() = 0;
    Array rest = draw(rows * channels, -1e-7, 1e-7);
    if (acc == Dtype::f64) rest.assign(rest.size(), 0);
    total = Buffer(acc, values.total);
    residual = Buffer(acc, rest);
    count = Buffer(Dtype::f64, values.count);
    for (size_t i = 0; i < rest.size(); ++i) values.total[i] += rest[i];
  }
  StateView view() const { return {total.data(), residual.data(), count.doubles()}; }
};

// The output arrays of a state.
struct StateBuffers {
  Buffer total, residual, count;
  StateBuffers(Dtype acc, int64_t rows, int64_t channels)
      : total(acc, rows * channels), residual(acc, rows * channels), count(Dtype::f64, rows) {}
  StateOut view() const { return {total.data(), residual.data(), count.doubles()}; }
  Outputs outputs() { return {&total, &residual, &count}; }
};

// The arrays of a case, and the same numbers as a naive::Problem.
struct Inputs {
  Dtype acc;
  naive::Problem p;
  Rows u, gate;
  Buffer coeff, weight, mask;
  std::vector<int64_t> offsets;
  Angles rotary, gate_rotary;
  Features features;
  Groups groups;
  Gates gates;

  explicit Inputs(const Case& c) : acc(c.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32) {
    const auto [batch, tokens, width] = c.shape;
    p.form = c.form, p.degree = c.degree, p.heads = c.heads;
    p.batch = batch, p.tokens = tokens, p.queries = c.queries(), p.width = width;
    Buffer::aligned = c.aligned;
    draw_numbers(c);
    draw_groups(c);
    rotary = Angles(acc, tokens, p.channels(), c.axes);
    gate_rotary = Angles(acc, p.queries, p.gates(), c.axes);
    p.rotary = rotary.values, p.gate_rotary = gate_rotary.values;
    features = {c.form,
                c.degree,
                c.dtype,
                batch,
                tokens,
                width,
                u.buffer.data(),
                u.batch_stride,
                u.token_stride,
                c.form == Form::power ? coeff.data() : nullptr,
                c.weighted ? weight.data() : nullptr,
                rotary.view()};
    gates = {c.form,
             c.dtype,
             batch,
             p.queries,
             p.channels(),
             c.heads,
             gate.buffer.data(),
             gate.batch_stride,
             gate.token_stride,
             gate_rotary.view()};
    groups = {p.groups, offsets.empty() ? nullptr : offsets.data(), c.context == Context::cumulative,
              c.context == Context::mask ? mask.data() : nullptr};
  }

 private:
  // High degrees get small numbers, which half precision can hold; others also get numbers beyond the clamps.
  void draw_numbers(const Case& c) {
    p.u = c.degree > 5 ? draw(p.batch * p.tokens * p.channels(), 0.6, 1.5)
                       : draw(p.batch * p.tokens * p.channels(), -1.5, 2.8);
    if (c.degree <= 5)
      for (size_t i = 0; i < p.u.size(); i += 23) p.u[i] = i % 2 ? -12 : c.form == Form::power ? 7 : 3;
    u = Rows(c.dtype, p.u, p.batch, p.tokens, p.channels(), c.layout);
    p.gate = draw(p.batch * p.queries * p.gates(), -5, 5);
    gate = Rows(c.dtype, p.gate, p.batch, p.queries, p.gates(), c.layout);
    if (c.form == Form::power) p.coeff = draw(p.width * c.degree, 0.2, 1.5);
    for (size_t i = 0; i < p.coeff.size(); ++i) p.coeff[i] *= std::pow(c.degree > 5 ? -0.8 : -0.4, i % c.degree);
    coeff = Buffer(acc, p.coeff);
  }

  void draw_groups(const Case& c) {
    const int64_t n = p.tokens;
    if (c.context == Context::offsets || c.context == Context::cumulative)
      offsets = {0, 0, n / 4, n / 4, n - n / 3, n, n};
    p.groups = offsets.empty() ? 1 : int64_t(offsets.size()) - 1;
    if (c.context == Context::even) p.groups = n % 3 ? n % 2 ? n : 2 : 3;
    if (c.context == Context::mask) p.groups = c.other_queries < 0 ? choose(12) : c.other_queries;  // may be 0
    if (c.context == Context::causal) p.groups = n;
    p.reads.resize(p.queries);
    for (int64_t m = 0; m < p.queries; ++m)
      p.reads[m] = offsets.empty() ? m * p.groups / p.queries
                                   : std::upper_bound(offsets.begin(), offsets.end(), m) - offsets.begin() - 1;

    Array weights = draw(p.batch * n, -0.4, 1.5), masks = draw(p.batch * p.groups * n, -0.4, 1.5);
    for (double& x : weights) x = std::max(0.0, x);
    for (double& x : masks) x = std::max(0.0, x);
    weight = Buffer(acc, weights);
    mask = Buffer(acc, masks);
    p.seen.resize(p.batch * p.groups * n);
    for (int64_t i = 0; i < int64_t(p.seen.size()); ++i) {
      const int64_t token = i % n, group = i / n % p.groups, b = i / n / p.groups;
      if (c.context == Context::mask)
        p.seen[i] = masks[i];
      else if (sees(c.context, group, token))
        p.seen[i] = c.weighted ? weights[b * n + token] : 1;
    }
  }

  bool sees(Context context, int64_t group, int64_t token) const {
    if (context == Context::offsets) return token >= offsets[group] && token < offsets[group + 1];
    if (context == Context::cumulative) return token < offsets[group + 1];
    return context == Context::whole || token <= group;
  }
};
