// Compares the engine's streams with naive.h: peek, commit, fork, a whole layer.

#include "engine_cases.h"
#include "grid.h"

using check::expect;
using check::section;

// Three frames of one layer among several: peeked twice, then committed.
void test_frames(const Case& c) {
  Case other = {Form::power, 2, Dtype::f64, Context::whole, false, false, c.shape};
  OpenStream s({layer_of(other), layer_of(c)}, c.shape.batch, 2);
  naive::State wanted = {Array(c.shape.batch * c.channels()), Array(c.shape.batch)};
  for (int i = 0; i < 3; ++i) {
    const std::string name = c.name(("frame " + std::to_string(i)).c_str());
    Frame frame(c);
    wanted = added(wanted, frame.in.p);
    const std::string before = s.bits();
    act(name + "peek ", Act::peek, s, 1, frame, 1);
    const std::string read = bits(frame.y);
    expect_channels(c, name + "peek y", frame.y, naive::readout(frame.in.p, wanted));
    act(name + "peek again ", Act::peek, s, 1, frame, 1, false);
    expect(bits(frame.y) == read, "%s: read again, it is another", name.c_str());
    expect(s.bits() == before, "%s: reading changed the state", name.c_str());
    act(name + "commit ", Act::commit, s, 1, frame, 1, i % 2);
    expect(bits(frame.y) == read, "%s: kept, it is another", name.c_str());
    expect_state(c, name, state_of(s, c, 1, 1), wanted);
  }
  const StateBuffers untouched = state_of(s, c, 1, 0), beside = state_of(s, other, 0, 1);
  for (const Buffer* buffer : {&untouched.total, &untouched.count, &beside.total, &beside.residual})
    expect(bits(*buffer) == std::string(buffer->bytes(), 0), "%s: another state was written", c.name("").c_str());
}

// A frame that is added and not read.
void test_silent() {
  const Case c = {Form::power, 3, Dtype::f32, Context::whole, true, false, {2, 9, 12}, 4};
  Case silent = c;
  silent.other_queries = 0;
  OpenStream s({layer_of(c)}, 2);
  Frame frame(silent);
  frame.view.gate = nullptr, frame.view.y = nullptr;
  act("silent", Act::commit, s, 0, frame);
  expect_state(c, "silent ", state_of(s, c, 0), naive::state(frame.in.p));
}

void test_fork() {
  const Case c = {Form::product, 2, Dtype::bf16, Context::whole, false, false, {2, 40, 16}};
  OpenStream s({layer_of(c, 100), layer_of(c)}, 2, 3), fork(s.layers, 2, 3);
  Frame one(c), two(c);
  for (int64_t evaluation : {0, 1, 2}) act("one", Act::commit, s, 1, one, evaluation);
  std::memset(s.stream.state(0, 2).kept, 42, 100);
  expect(s.stream.fork_to(fork.stream) == Status::ok, "fork");
  const std::string forked = s.bits();
  expect(fork.bits() == forked, "a fork is another");
  act("two", Act::commit, fork, 1, two, 1);
  expect(s.bits() == forked && fork.bits() != forked, "a fork writes to what it was made from");
  act("two", Act::commit, s, 1, two, 1);
  expect(s.bits() == fork.bits(), "the same frame after a fork gives another state");
  expect(s.stream.reset() == Status::ok, "reset");
  expect(s.bits() == OpenStream(s.layers, 2, 3).bits(), "a reset stream is not empty");
  expect(fork.stream.fork_to(s.stream) == Status::ok && s.bits() == fork.bits(), "return to a fork");
  expect(s.stream.fork_to(s.stream) == Status::ok, "a fork of itself");
}

// Rows of y = x Wᵀ + bias, in double.
Array multiplied(const Array& x, const Array& weight, const Array& bias, int64_t inputs) {
  const int64_t outputs = int64_t(weight.size()) / inputs, rows = int64_t(x.size()) / inputs;
  Array y(rows * outputs);
  for (int64_t i = 0; i < rows * outputs; ++i) {
    y[i] = bias.empty() ? 0 : bias[i % outputs];
    for (int64_t k = 0; k < inputs; ++k) y[i] += x[i / outputs * inputs + k] * weight[i % outputs * inputs + k];
  }
  return y;
}

void test_linear(Dtype dtype) {
  constexpr double kTolerance[] = {3e-6, 1e-14, 0x1p-8, 0x1p-11};
  for (const int64_t inputs : {1, 15, 16, 70})
    for (const bool with_bias : {false, true})
      for (const bool ascending : {true, false}) {
        const int64_t rows = choose(20), outputs = 1 + choose(9);
        Array x_values = draw(rows * inputs, -1, 1), w_values = draw(outputs * inputs, -1, 1);
        Array b_values = draw(with_bias ? outputs : 0, -1, 1);
        const Buffer x(dtype, x_values), weight(dtype, w_values), bias(dtype, b_values);
        Buffer y(dtype, rows * outputs);
        const pom_linear map = {
            int32_t(dtype), rows, inputs, outputs, x.data(), weight.data(), with_bias ? bias.data() : nullptr,
            y.data()};
        pom_executor executor = place(ascending).executor;
        expect(pom_cpu_linear(ascending ? nullptr : &executor, &map) == POM_OK, "linear");
        expect_close("linear", y, multiplied(x_values, w_values, b_values, inputs), outputs, 1,
                     kTolerance[int(dtype)] * (dtype == Dtype::f32 || dtype == Dtype::f64 ? 4 : 1));
      }
}

int products = 0;
pom_status counted_linear(void* context, const pom_linear* map) {
  ++products;
  return context ? *static_cast<pom_status*>(context) : pom_cpu_linear(nullptr, map);
}

// A layer in double, between two projections.
void test_step(Form form, int64_t heads) {
  const Case c = {form, 2, Dtype::f64, Context::whole, false, false, {2, 5, 12}, heads};
  constexpr int64_t kDim = 7;
  const int64_t width = c.channels(), both = width + c.gates(), rows = c.shape.batch * c.shape.tokens;
  OpenStream s({layer_of(c)}, 2);
  Array x = draw(rows * kDim, -1, 1), in_weight = draw(both * kDim, -1, 1), in_bias = draw(both, -1, 1);
  Array out_weight = draw(kDim * width, -1, 1), out_bias = draw(kDim, -1, 1), coeff = draw(c.shape.width * 2, 0.1, 1);
  const Buffer x_data(Dtype::f64, x), in_data(Dtype::f64, in_weight), in_bias_data(Dtype::f64, in_bias),
      out_data(Dtype::f64, out_weight), out_bias_data(Dtype::f64, out_bias), coeff_data(Dtype::f64, coeff);
  Buffer y(Dtype::f64, rows * kDim);
  pom_step step = {};
  step.tokens = c.shape.tokens, step.dim = kDim, step.x = x_data.data(), step.y = y.data();
  step.in_weight = in_data.data(), step.in_bias = in_bias_data.data(), step.coeff = coeff_data.data();
  step.out_weight = out_data.data(), step.out_bias = out_bias_data.data(), step.linear = counted_linear;

  naive::Problem p = Inputs(c).p;
  const Array projected = multiplied(x, in_weight, in_bias, kDim);
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(&projected[row * both], width, &p.u[row * width]);
    std::copy_n(&projected[row * both + width], c.gates(), &p.gate[row * c.gates()]);
  }
  p.coeff = form == Form::power ? coeff : Array();
  naive::State state = {Array(c.shape.batch * width), Array(c.shape.batch)};
  const size_t bytes = s.stream.workspace(0, step);
  const Workspace workspace(bytes);
  for (const bool commit : {false, false, true, true, false}) {
    const std::string before = s.bits();
    y.clear();
    expect(s.stream.step(0, step, commit, workspace.data(), bytes) == Status::ok, "step");
    const naive::State read = added(state, p);
    expect_close("step y", y, multiplied(naive::readout(p, read), out_weight, out_bias, width), kDim, 1, 1e-13);
    expect(commit == (s.bits() != before), "a step that is %s", commit ? "not kept" : "kept");
    if (commit) state = read;
  }
  expect(products == 10, "%d products", products);
  products = 0;
  pom_status failure = 99;
  step.linear_context = &failure;
  const std::string before = s.bits();
  expect(int(s.stream.step(0, step, true, workspace.data(), bytes)) == 99, "what linear says is not passed on");
  expect(s.bits() == before && products == 1, "a step goes on after a failure");
  products = 0;
}

int main() {
  section("frames");
  test_grid(
      [](Case c) {
        constexpr int64_t kQueries[] = {-1, -1, 0, 1, 6};
        c.other_queries = kQueries[choose(std::size(kQueries))];
        test_frames(c);
      },
      {Context::whole});
  test_silent();
  section("fork");
  test_fork();
  section("linear");
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16}) test_linear(dtype);
  section("step");
  for (const Form form : {Form::product, Form::power})
    for (const int64_t heads : {1, 4}) test_step(form, heads);
  return check::finish();
}
