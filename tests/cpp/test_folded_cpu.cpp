// Compares cpu::folded_readout, the readout with one gate per head through the output projection, with plain loops over
// doubles: values and tangents.

#include "projections.h"

using check::expect;
using check::section;

struct FoldedCase {
  Form form;
  Dtype dtype;
  int64_t batch, queries, dim, heads, width, out_dim;  // width: channels of a head
  Context context = Context::whole;
  bool bias = false;
  Multiplication::Kind kind = Multiplication::plain;
  std::string name() const {
    std::string name = "folded_readout";
    for (int64_t n : {int64_t(form), int64_t(dtype), batch, queries, dim, heads, width, out_dim, int64_t(context),
                      int64_t(bias), int64_t(kind)})
      name += " " + std::to_string(n);
    return name + ": ";
  }
};

void test(const FoldedCase& f) {
  const std::string name = f.name();
  const int64_t channels = f.heads * f.width;
  Case c = {f.form, 1, f.dtype, f.context, false, false, {f.batch, f.queries, channels}};
  c.heads = f.heads;
  c.axes = f.form == Form::power && f.heads > 3 ? 2 : 0;
  Inputs in(c);
  in.p.heads = f.heads;
  const int64_t groups = in.p.groups, rows = f.batch * f.queries;
  Array numbers = draw(rows * f.dim, -1, 1.2), direction = draw(rows * f.dim, -1, 1);
  const Rows x(f.dtype, numbers, f.batch, f.queries, f.dim, choose(2) ? Layout::dense : Layout::padded),
      x_tangent(f.dtype, direction, f.batch, f.queries, f.dim, Layout::dense);
  const Weights weight(f.dtype, f.heads, f.dim, 4), bias(f.dtype, 1, f.bias ? f.heads : 0),
      out(f.dtype, f.out_dim, channels), out_bias(f.dtype, 1, f.bias ? f.out_dim : 0);
  const Before state(in.acc, f.batch * groups, channels, true);
  Array state_direction = draw(f.batch * groups * channels, -1, 1), zeros(f.batch * groups * channels);
  const Buffer state_tangent(in.acc, state_direction), no_residual(in.acc, zeros);
  const auto read = [&](double step) {
    naive::Problem p = in.p;
    p.gate = times_transpose(moved(numbers, step, direction), weight.values, f.dim, bias.values);
    const naive::State s = {moved(state.values.total, step, state_direction), state.values.count};
    Array mixed(rows * channels);
    if (f.heads > 1) return times_transpose(naive::readout(p, s), out.values, channels, out_bias.values);
    p.heads = 1;  // one gate for all channels: a head of its own
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t group = row / f.queries * groups + p.reads[row % f.queries];
      for (int64_t i = 0; i < channels && s.count[group] != 0; ++i)
        mixed[row * channels + i] = naive::gate_value(p, p.gate[row]) * s.total[group * channels + i] / s.count[group];
    }
    return times_transpose(mixed, out.values, channels, out_bias.values);
  };

  Multiplication multiplication(f.kind);
  Buffer y(f.dtype, rows * f.out_dim), y_tangent(f.dtype, rows * f.out_dim);
  FoldedReadoutArgs args = {f.form,
                            f.dtype,
                            f.batch,
                            f.queries,
                            f.dim,
                            f.heads,
                            channels,
                            f.out_dim,
                            {x.buffer.data(), x.batch_stride, x.token_stride},
                            weight.buffer.data(),
                            f.bias ? bias.buffer.data() : nullptr,
                            out.buffer.data(),
                            f.bias ? out_bias.buffer.data() : nullptr,
                            groups,
                            in.groups.offsets,
                            state.view(),
                            y.data(),
                            multiplication.linear(),
                            in.gates.rotary};
  run(name, args, {&y});
  expect_near(name + "y", y, read(0), f.dtype, f.out_dim);
  args.x_tangent = {x_tangent.buffer.data(), x_tangent.batch_stride, x_tangent.token_stride};
  args.state_tangent = {state_tangent.data(), no_residual.data(), nullptr};
  args.y_tangent = y_tangent.data();
  run(name + "along a direction: ", args, {&y, &y_tangent});
  expect_near(name + "y_tangent", y_tangent, slope(read), f.dtype, f.out_dim, kSlope);
}

void test_cases() {
  for (Form form : {Form::product, Form::power})
    for (int kind : {0, 1, 2}) {
      const auto k = Multiplication::Kind(kind);
      for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
        test({form, dtype, 2, 60, 12, 4, 6, 10, Context::offsets, true, k});
      test({form, Dtype::f32, 1, 1, 3, 1, 5, 2, Context::whole, false, k});
      test({form, Dtype::f32, 2, 37, 8, 1, 24, 9, Context::even, true, k});
      test({form, Dtype::f64, 25, 12, 8, 8, 3, 16, Context::even, false, k});
      test({form, Dtype::f64, 2, 300, 4, 5, 4, 500, Context::offsets, true, k});  // several blocks of a sample
    }
}

void test_refusals() {
  Array numbers = draw(64, -1, 1), one = {1};
  const Buffer data(Dtype::f32, numbers), count(Dtype::f64, one);
  Buffer y(Dtype::f32, 64);
  const FoldedReadoutArgs args = {Form::product,
                                  Dtype::f32,
                                  1,
                                  8,
                                  8,
                                  2,
                                  8,
                                  8,
                                  {data.data(), 64, 8},
                                  data.data(),
                                  nullptr,
                                  data.data(),
                                  nullptr,
                                  1,
                                  nullptr,
                                  {data.data(), data.data(), count.doubles()},
                                  y.data()};
  const size_t bytes = cpu::workspace(args);
  Workspace memory(bytes);
  auto refuses = [&](const char* what, Status wanted, auto change) {
    FoldedReadoutArgs changed = args;
    change(changed);
    const Status got = cpu::folded_readout(changed, memory.data(), bytes);
    expect(got == wanted && y.untouched(), "%s: %s", what, message(got));
  };
  using Args = FoldedReadoutArgs;
  refuses("heads that do not divide", Status::bad_size, [](Args& a) { a.heads = 3; });
  refuses("no heads", Status::bad_size, [](Args& a) { a.heads = 0; });
  refuses("no inputs", Status::bad_size, [](Args& a) { a.dim = 0; });
  refuses("positions in product form", Status::rotary_needs_power, [](Args& a) { a.rotary.axes = 1; });
  refuses("no queries' memory", Status::null_pointer, [](Args& a) { a.x.data = nullptr; });
  refuses("no weight", Status::null_pointer, [](Args& a) { a.gate_weight = nullptr; });
  refuses("no result", Status::null_pointer, [](Args& a) { a.y = nullptr; });
  expect(cpu::folded_readout(args, memory.data(), bytes - 1) == Status::workspace_too_small, "a small workspace");
  expect(cpu::folded_readout(args, memory.data(), bytes) == Status::ok && !y.untouched(), "a good call");
}

int main() {
  section("cases");
  test_cases();
  section("refusals");
  test_refusals();
  return check::finish();
}
