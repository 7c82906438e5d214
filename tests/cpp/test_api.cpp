// Compares the operations of the torch-free library with naive.h.

#include "expectations.h"
#include "grid.h"

using check::expect;
using check::section;

// Adding in place to the prior state gives the same bits as `wanted`, in any order.
void test_in_place(const Case& c, const Inputs& in, const Before& prior, StateBuffers& wanted) {
  StateBuffers state(in.acc, c.shape.batch, c.channels());
  for (const bool ascending : {true, false}) {
    copy(prior.total, state.total), copy(prior.residual, state.residual), copy(prior.count, state.count);
    const StateOut own = state.view();
    run_once(c.name("state in place"), StateArgs{in.features, in.groups, own, own.view()}, ascending);
    for (size_t i = 0; i < 3; ++i)
      expect(bits(*state.outputs()[i]) == bits(*wanted.outputs()[i]), "%s: not the bits of another state's memory",
             c.name("state in place").c_str());
  }
}

void test_state(const Case& c) {
  const Inputs in(c);
  const int64_t rows = c.shape.batch * in.p.groups, channels = c.channels();
  StateBuffers out(in.acc, rows, channels);
  Before prior(in.acc, c.shape.batch, channels, false);
  const StateView before = c.prior ? prior.view() : StateView{};
  const naive::State state = c.prior ? added(prior.values, in.p) : naive::state(in.p);
  run(c.name("state"), StateArgs{in.features, in.groups, out.view(), before}, out.outputs());
  expect_state(c, c.name("state"), out, state);
  if (c.prior && in.p.groups == 1) test_in_place(c, in, prior, out);

  Array grad_values = draw(rows * channels, -0.5, 1.5);
  const Buffer grad_total(in.acc, grad_values);
  Buffer grad_u(c.dtype, int64_t(in.p.u.size())), grad_coeff(in.acc, int64_t(in.p.coeff.size()));
  const std::string name = c.name("state_backward");
  run(name, StateBackwardArgs{in.features, in.groups, grad_total.data(), grad_u.data(), grad_coeff.data()},
      {&grad_u, &grad_coeff});
  const naive::FeatureGradients wanted = naive::state_backward(in.p, grad_values);
  expect_channels(c, name + "grad_u", grad_u, wanted.u);
  expect_coeff(c, name + "grad_coeff", grad_coeff, wanted.coeff);
}

void test_readout(const Case& c) {
  const Inputs in(c);
  const int64_t rows = c.shape.batch * in.p.groups, channels = c.channels(), size = int64_t(in.p.u.size());
  const Before state(in.acc, rows, channels, true);
  Buffer y(c.dtype, size);
  run(c.name("readout"), ReadoutArgs{in.gates, in.p.groups, in.groups.offsets, state.view(), y.data()}, {&y});
  expect_channels(c, c.name("readout") + "y", y, naive::readout(in.p, state.values));

  Array grad_values = draw(size, -0.5, 1.5);
  const Rows grad_y(c.dtype, grad_values, c.shape.batch, c.shape.tokens, channels, c.layout);
  Buffer grad_gate(c.dtype, int64_t(in.p.gate.size())), grad_total(in.acc, rows * channels);
  const std::string name = c.name("readout_backward");
  run(name,
      ReadoutBackwardArgs{in.gates, in.p.groups, in.groups.offsets, state.view(), grad_y.buffer.data(),
                          grad_y.batch_stride, grad_y.token_stride, grad_gate.data(), grad_total.data()},
      {&grad_gate, &grad_total});
  const naive::ReadoutGradients wanted = naive::readout_backward(in.p, state.values, grad_values);
  expect_gates(c, name + "grad_gate", grad_gate, wanted.gate);
  expect_channels(c, name + "grad_total", grad_total, wanted.total);
}

// The state after every token is a group of its own.
void test_causal(const Case& c) {
  const Inputs in(c);
  const int64_t batch = c.shape.batch, tokens = c.shape.tokens, channels = c.channels(), size = int64_t(in.p.u.size());
  Before prior(in.acc, batch, channels, false);
  if (!c.prior) prior.values = {Array(batch * channels), Array(batch)};
  naive::State states = naive::state(in.p), last = prior.values;
  for (int64_t row = 0; row < batch * tokens; ++row) {
    const int64_t b = row / tokens;
    states.count[row] += prior.values.count[b];
    for (int64_t i = 0; i < channels; ++i) states.total[row * channels + i] += prior.values.total[b * channels + i];
    last.count[b] = states.count[row];
    std::copy_n(&states.total[row * channels], channels, &last.total[b * channels]);
  }

  Buffer y(c.dtype, size);
  StateBuffers out(in.acc, batch, channels);
  const StateView before = c.prior ? prior.view() : StateView{};
  run(c.name("causal_mix"), CausalArgs{in.features, in.gates, before, y.data(), out.view()},
      {&y, &out.total, &out.residual, &out.count});
  expect_channels(c, c.name("causal_mix") + "y", y, naive::readout(in.p, states));
  expect_state(c, c.name("causal_mix"), out, last);

  Array dy = draw(size, -0.5, 1.5), dlast = draw(batch * channels, -0.5, 1.5);
  const Rows grad_y(c.dtype, dy, batch, tokens, channels, c.layout);
  const Buffer grad_total(in.acc, dlast);
  Buffer grad_u(c.dtype, size), grad_gate(c.dtype, int64_t(in.p.gate.size()));
  Buffer grad_coeff(in.acc, int64_t(in.p.coeff.size())), grad_prior(in.acc, batch * channels);
  const std::string name = c.name("causal_mix_backward");
  const bool of_last = c.weighted || !tokens;  // else the final state has no gradient
  run(name,
      CausalBackwardArgs{in.features, in.gates, before, grad_y.buffer.data(), grad_y.batch_stride, grad_y.token_stride,
                         of_last ? grad_total.data() : nullptr, grad_u.data(), grad_gate.data(), grad_coeff.data(),
                         grad_prior.data()},
      {&grad_u, &grad_gate, &grad_coeff, &grad_prior});
  naive::ReadoutGradients wanted = naive::readout_backward(in.p, states, dy);
  Array dprior = of_last ? dlast : Array(batch * channels);
  for (int64_t i = 0; i < int64_t(wanted.total.size()); ++i) {
    const int64_t token = i / channels % tokens, at = i / channels / tokens * channels + i % channels;
    dprior[at] += wanted.total[i];
    if (of_last && token == tokens - 1) wanted.total[i] += dlast[at];
  }
  const naive::FeatureGradients of_features = naive::state_backward(in.p, wanted.total);
  expect_channels(c, name + "grad_u", grad_u, of_features.u);
  expect_gates(c, name + "grad_gate", grad_gate, wanted.gate);
  expect_coeff(c, name + "grad_coeff", grad_coeff, of_features.coeff);
  expect_channels(c, name + "grad_prior", grad_prior, dprior);
}

// Chunks longer than 64 tokens, several tiles with and without rotary positions, heads that tiles cut.
void test_large() {
  test_state({Form::product, 2, Dtype::f32, Context::offsets, false, false, {1, 4500, 3}});
  test_state({Form::power, 3, Dtype::f64, Context::whole, true, false, {1, 4500, 3}, 1, 1});
  test_readout({Form::product, 1, Dtype::f32, Context::offsets, false, false, {1, 4500, 6}, 3});
  for (Dtype dtype : {Dtype::f32, Dtype::f64}) {
    for (Context context : {Context::cumulative, Context::mask}) {
      test_state({Form::product, 3, dtype, context, false, false, {1, 9, 400}});
      test_state({Form::power, 2, dtype, context, false, false, {1, 9, 1300}, 1, 2});
    }
    for (int64_t heads : {1, 13}) {
      test_causal({Form::product, 16, dtype, Context::causal, true, true, {1, 9, 13 * 6}, heads});
      test_causal({Form::power, 3, dtype, Context::causal, true, true, {1, 70, 1300}, heads, 2});
      test_readout({Form::power, 1, dtype, Context::whole, false, false, {1, 70, 1300}, heads, 2});
    }
  }
}

// Dense masks larger than a tile in groups, tokens and channels, and so large that the sums are cut.
void test_masks() {
  auto test = [](Form form, int degree, Dtype dtype, Shape shape, int64_t groups, bool aligned) {
    Case c = {form, degree, dtype, Context::mask, false, false, shape};
    c.other_queries = groups, c.aligned = aligned;
    test_state(c);
  };
  for (bool aligned : {true, false}) {
    test(Form::power, 3, Dtype::f32, {2, 330, 66}, 70, aligned);
    test(Form::power, 2, Dtype::f32, {1, 332, 8}, 300, aligned);
    test(Form::product, 2, Dtype::bf16, {1, 70, 20}, 330, aligned);
  }
  test(Form::product, 3, Dtype::f16, {1, 36, 48}, 131, true);
  test(Form::power, 1, Dtype::f64, {1, 300, 5}, 261, true);
  test(Form::power, 2, Dtype::f32, {1, 0, 5}, 70, true);
}

// Sums that a float cannot hold: the residual holds the rest, and it is not lost on the way from a prior state.
void test_residual() {
  constexpr int64_t kTokens = 128, kHalf = kTokens / 2, kWidth = 3;
  Array u_values(kTokens * kWidth, 4), coeff_values(kWidth, 1), weights(kTokens, 0x1p20);
  Array totals(kWidth, 0x1p26), rests(kWidth, 0x1p-9), counts(1, 5);
  std::fill(u_values.begin() + kHalf * kWidth, u_values.end(), 0x1p-10);
  std::fill(weights.begin() + kHalf, weights.end(), 1);
  const Buffer u(Dtype::f32, u_values), coeff(Dtype::f32, coeff_values), weight(Dtype::f32, weights);
  const Buffer prior_total(Dtype::f32, totals), prior_residual(Dtype::f32, rests), prior_count(Dtype::f64, counts);
  const Features features = {Form::power,   1, Dtype::f32, 1, kTokens, kWidth, u.data(), u.size(), kWidth, coeff.data(),
                             weight.data(), {}};
  StateBuffers out(Dtype::f32, 1, kWidth);
  auto expect_sum = [&](double total, double residual, double count) {
    for (int c = 0; c < kWidth; ++c)
      expect(out.total.get(c) == total && out.residual.get(c) == residual, "a sum of %a + %a is not %a + %a",
             out.total.get(c), out.residual.get(c), total, residual);
    expect(out.count.get(0) == count, "the count is %.17g, not %.17g", out.count.get(0), count);
  };
  run("state", StateArgs{features, {}, out.view()}, out.outputs());
  expect_sum(0x1p28, 0x1p-4, 0x1p26 + 64);

  const Gates gates = {Form::power, Dtype::f32, 1, kTokens, kWidth, 1, u.data(), u.size(), kWidth, {}};
  const StateView prior = {prior_total.data(), prior_residual.data(), prior_count.doubles()};
  run("state", StateArgs{features, {}, out.view(), prior}, out.outputs());
  expect_sum(0x1p28 + 0x1p26, 0x1p-4 + 0x1p-9, 0x1p26 + 69);
  Buffer y(Dtype::f32, u.size());
  run("causal_mix", CausalArgs{features, gates, prior, y.data(), out.view()},
      {&y, &out.total, &out.residual, &out.count});
  expect_sum(0x1p28 + 0x1p26, 0x1p-4 + 0x1p-9, 0x1p26 + 69);
}

int main() {
  section("state");
  test_grid(test_state, {Context::whole, Context::offsets, Context::cumulative, Context::mask});
  section("readout");
  test_grid(test_readout, {Context::whole, Context::even, Context::offsets});
  section("causal_mix");
  test_grid(test_causal, {Context::causal});
  section("one odd array");
  test_each_odd(test_state, {Context::whole, Context::mask});
  test_each_odd(test_readout, {Context::offsets});
  test_each_odd(test_causal, {Context::causal});
  section("large inputs");
  test_large();
  section("masks");
  test_masks();
  section("residual");
  test_residual();
  return check::finish();
}
