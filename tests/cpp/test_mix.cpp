// Compares the whole-context mix, and the update of a running state, with naive.h.

#include "expectations.h"
#include "grid.h"

using check::expect;
using check::section;

void test_mix(const Case& c) {
  const Inputs in(c);
  const int64_t batch = c.shape.batch, channels = c.channels();
  Before prior(in.acc, batch, channels, false);
  if (!c.prior) prior.values = {Array(batch * channels), Array(batch)};
  Buffer y(c.dtype, batch * c.queries() * channels);
  StateBuffers out(in.acc, batch, channels);
  run(c.name("mix"), MixArgs{in.features, in.gates, c.prior ? prior.view() : StateView{}, y.data(), out.view()},
      {&y, &out.total, &out.residual, &out.count});
  const naive::State state = added(prior.values, in.p);
  expect_channels(c, c.name("mix") + "y", y, naive::readout(in.p, state));
  expect_state(c, c.name("mix"), out, state);
}

// Consecutive frames, each with the counters that the previous one left, from an empty state or a prior one.
void test_update(const Case& c) {
  const Inputs frames[] = {Inputs(c), Inputs(c), Inputs(c)};
  const Dtype acc = frames[0].acc;
  const int64_t batch = c.shape.batch, channels = c.channels();
  Before start(acc, batch, channels, false);
  if (!c.prior) {
    for (Buffer* buffer : {&start.total, &start.residual, &start.count})
      std::memset(buffer->data(), 0, buffer->bytes());
    start.values = {Array(batch * channels), Array(batch)};
  }
  Array zeros(batch);
  Buffer arrivals(Dtype::f32, zeros);
  StateBuffers state(acc, batch, channels);
  std::vector<std::string> first;
  for (const bool ascending : {true, false}) {
    copy(start.total, state.total), copy(start.residual, state.residual), copy(start.count, state.count);
    naive::State wanted = start.values;
    for (int i = 0; i < 3; ++i) {
      const Inputs& frame = frames[i];
      const std::string name = c.name(("update " + std::to_string(i)).c_str());
      Buffer y(c.dtype, batch * c.queries() * channels);
      run_once(name,
               UpdateArgs{frame.features, frame.gates, state.view(), static_cast<uint32_t*>(arrivals.data()), y.data()},
               ascending);
      wanted = added(wanted, frame.p);
      expect_channels(c, name + "y", y, naive::readout(frame.p, wanted));
      expect_state(c, name, state, wanted);
      expect(bits(arrivals) == std::string(arrivals.bytes(), 0), "%s: an arrival counter is left", name.c_str());
      const std::string all = bits(y) + bits(state.total) + bits(state.residual) + bits(state.count);
      if (ascending)
        first.push_back(all);
      else
        expect(all == first[i], "%s: depends on the order", name.c_str());
    }
  }
}

// With as many queries as context tokens, or another number.
template <class Test>
void test_queries(Test test) {
  test_grid(
      [&](Case c) {
        constexpr int64_t kQueries[] = {-1, -1, 0, 1, 6, 40};
        c.other_queries = kQueries[choose(std::size(kQueries))];
        test(c);
      },
      {Context::whole});
}

// Contexts and queries too long for one block, and features and gates with different rotary positions.
template <class Test>
void test_large(Test test) {
  for (const auto& [tokens, queries] : {std::pair<int64_t, int64_t>{1025, 3}, {3, 1025}, {1500, 1100}}) {
    Case c = {Form::product, 2, Dtype::f32, Context::whole, true, true, {2, tokens, 5}};
    c.other_queries = queries;
    test(c);
    c = {Form::power, 3, Dtype::bf16, Context::whole, true, false, {1, tokens, 16}, 1, 2};
    c.other_queries = queries;
    test(c);
    c = {Form::power, 2, Dtype::f64, Context::whole, false, true, {1, tokens, 12}, 4, 1};
    c.other_queries = queries;
    test(c);
  }
  test({Form::product, 3, Dtype::f16, Context::whole, false, true, {1, 1024, 8}});
}

// What a float total cannot hold is not lost, in one frame or over many.
void test_residual() {
  constexpr int64_t kTokens = 4, kWidth = 8;
  constexpr int kFrames = 100;
  Array ones(kTokens * kWidth, 1), coeff_values(kWidth, 0x1p-10), totals(kWidth, 0x1p20), zeros(kWidth), none(1);
  const Buffer u(Dtype::f32, ones), coeff(Dtype::f32, coeff_values);
  Buffer total(Dtype::f32, totals), residual(Dtype::f32, zeros), count(Dtype::f64, none), arrivals(Dtype::f32, none);
  Buffer y(Dtype::f32, u.size());
  const Features features = {Form::power, 1,      Dtype::f32,   1,       kTokens, kWidth, u.data(),
                             u.size(),    kWidth, coeff.data(), nullptr, {}};
  const Gates gates = {Form::power, Dtype::f32, 1, kTokens, kWidth, 1, u.data(), u.size(), kWidth, {}};
  const StateOut state = {total.data(), residual.data(), count.doubles()};
  const UpdateArgs args = {features, gates, state, static_cast<uint32_t*>(arrivals.data()), y.data()};
  for (int frame = 0; frame < kFrames; ++frame) run_once("update", args, frame % 2);
  for (int c = 0; c < kWidth; ++c) {
    const double sum = total.get(c) + residual.get(c), wanted = 0x1p20 + kFrames * kTokens * 0x1p-10;
    expect(sum == wanted, "a sum of %a + %a is not %a", total.get(c), residual.get(c), wanted);
  }
  expect(count.get(0) == kFrames * kTokens, "the count is %g", count.get(0));
}

int main() {
  section("mix");
  test_queries(test_mix);
  test_each_odd(test_mix, {Context::whole});
  section("update");
  test_queries(test_update);
  section("large inputs");
  test_large(test_mix);
  test_large(test_update);
  section("residual");
  test_residual();
  return check::finish();
}
