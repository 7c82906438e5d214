// Compares the CPU's states and readouts of tokens that are projected a block at a time with naive.h: values, tangents
// and gradients.

#include "projections.h"

using check::expect;
using check::section;

struct ProjectCase {
  Case c;
  int64_t dim;
  bool bias = false, saved = false;
  Multiplication::Kind kind = Multiplication::plain;
  int64_t out_dim = 11;
  std::string name(const char* operation) const {
    return c.name(operation) + "D" + std::to_string(dim) + (bias ? " with bias" : "") + (saved ? ", saved" : "") +
           ", product " + std::to_string(kind) + ": ";
  }
};

// Tokens and a direction of them. Channels apart for what has one sample, as those of images have.
struct ProjectedRows {
  Array values, direction;
  Rows x, x_tangent;
  Tokens args, tangent;
  ProjectedRows(const ProjectCase& p, int64_t tokens)
      : values(draw(p.c.shape.batch * tokens * p.dim, -1, 1.2)),
        direction(draw(p.c.shape.batch * tokens * p.dim, -1, 1)),
        x(p.c.dtype, values, p.c.shape.batch, tokens, p.dim, p.c.layout),
        x_tangent(p.c.dtype, direction, p.c.shape.batch, tokens, p.dim, Layout::dense),
        args{x.buffer.data(), x.batch_stride, x.token_stride},
        tangent{x_tangent.buffer.data(), x_tangent.batch_stride, x_tangent.token_stride} {
    if (p.c.shape.batch > 1 || p.c.layout != Layout::dense) return;
    Array turned = transpose(values, p.dim);
    x = Rows(p.c.dtype, turned, 1, p.dim, tokens, Layout::dense);
    args = {x.buffer.data(), 0, 1, tokens};
  }
};

void test_state(const ProjectCase& p) {
  const Case& c = p.c;
  const std::string name = p.name("project_state");
  const auto [batch, tokens, width] = c.shape;
  Inputs in(c);
  const int64_t channels = c.channels(), groups = in.p.groups;
  ProjectedRows rows(p, tokens);
  Weights weight(c.dtype, channels, p.dim, 3), bias(c.dtype, 1, p.bias ? channels : 0);
  Before prior(in.acc, batch, channels, false);
  Array prior_direction = draw(batch * channels, -1, 1), zeros(batch * channels);
  const Buffer prior_tangent(in.acc, prior_direction), no_residual(in.acc, zeros);
  const auto problem = [&](double step) {
    naive::Problem problem = in.p;
    problem.u = times_transpose(moved(rows.values, step, rows.direction), weight.values, p.dim, bias.values);
    return problem;
  };
  const auto total = [&](double step) {
    naive::State before = prior.values;
    before.total = moved(before.total, step, prior_direction);
    return c.prior ? added(before, problem(step)) : naive::state(problem(step));
  };

  Multiplication multiplication(p.kind);
  StateBuffers out(in.acc, batch * groups, channels), tangent(in.acc, batch * groups, channels);
  Features features = in.features;
  features.u = nullptr;
  ProjectStateArgs args = {features,
                           rows.args,
                           p.dim,
                           weight.buffer.data(),
                           p.bias ? bias.buffer.data() : nullptr,
                           in.groups,
                           out.view(),
                           c.prior ? prior.view() : StateView{},
                           multiplication.linear()};
  run(name, args, out.outputs());
  expect_near(name + "total", out.total, total(0).total, c.dtype, channels);
  expect_close(name + "count", out.count, total(0).count, 1, 1, 1e-13);
  const std::string first = bits(out.total);
  args.x_tangent = rows.tangent;
  if (c.prior) args.prior_tangent = {prior_tangent.data(), no_residual.data(), nullptr};
  args.tangent_out = {tangent.total.data(), tangent.residual.data(), nullptr};
  run(name + "along a direction: ", args, {&out.total, &tangent.total, &tangent.residual});
  expect(bits(out.total) == first, "%sother bits beside a derivative", name.c_str());
  expect_near(name + "tangent", tangent.total, slope([&](double step) { return total(step).total; }), c.dtype, channels,
              kSlope);
  args.x_tangent = {}, args.tangent_out = {};

  Array grad = draw(batch * groups * channels, -1, 1), u = problem(0).u;
  const Buffer grad_total(in.acc, grad), saved(c.dtype, u);
  Buffer grad_x(c.dtype, batch * tokens * p.dim), grad_weight(c.dtype, channels * p.dim), grad_bias(c.dtype, channels),
      grad_coeff(in.acc, in.p.coeff.size());
  run(name + "backward: ",
      ProjectStateBackwardArgs{args, grad_total.data(), p.saved ? saved.data() : nullptr, grad_x.data(),
                               grad_weight.data(), grad_bias.data(), grad_coeff.data()},
      {&grad_x, &grad_weight, &grad_bias, &grad_coeff});
  const naive::FeatureGradients wanted = naive::state_backward(problem(0), grad);
  const Array back = transpose(wanted.u, channels);
  expect_near(name + "grad_x", grad_x, times_transpose(wanted.u, transpose(weight.values, p.dim), channels), c.dtype,
              p.dim);
  expect_near(name + "grad_weight", grad_weight, times_transpose(back, transpose(rows.values, p.dim), batch * tokens),
              c.dtype, p.dim);
  expect_near(name + "grad_bias", grad_bias, column_sums(wanted.u, channels), c.dtype, channels);
  expect_close(name + "grad_coeff", grad_coeff, wanted.coeff, c.degree, c.degree, in.acc == Dtype::f64 ? 1e-9 : 0.01);
}

void test_readout(const ProjectCase& p) {
  const Case& c = p.c;
  const std::string name = p.name("project_readout");
  const int64_t batch = c.shape.batch, queries = c.queries(), channels = c.channels(), rows_count = batch * queries;
  Inputs in(c);
  const int64_t groups = in.p.groups, gates = c.gates();
  ProjectedRows rows(p, queries);
  Weights weight(c.dtype, gates, p.dim, 4), bias(c.dtype, 1, p.bias ? gates : 0), out(c.dtype, p.out_dim, channels),
      out_bias(c.dtype, 1, p.bias ? p.out_dim : 0);
  Before state(in.acc, batch * groups, channels, true);
  Array state_direction = draw(batch * groups * channels, -1, 1), zeros(batch * groups * channels);
  const Buffer state_tangent(in.acc, state_direction), no_residual(in.acc, zeros);
  const auto problem = [&](double step) {
    naive::Problem problem = in.p;
    problem.gate = times_transpose(moved(rows.values, step, rows.direction), weight.values, p.dim, bias.values);
    return problem;
  };
  const auto mixed = [&](double step) {
    return naive::readout(problem(step), {moved(state.values.total, step, state_direction), state.values.count});
  };
  const auto read = [&](double step) { return times_transpose(mixed(step), out.values, channels, out_bias.values); };

  Multiplication multiplication(p.kind);
  Array gate = problem(0).gate;
  const Buffer saved(c.dtype, gate);
  Buffer y(c.dtype, rows_count * p.out_dim), y_tangent(c.dtype, rows_count * p.out_dim);
  ProjectReadoutArgs args;
  static_cast<FoldedReadoutArgs&>(args) = {c.form,
                                           c.dtype,
                                           batch,
                                           queries,
                                           p.dim,
                                           c.heads,
                                           channels,
                                           p.out_dim,
                                           rows.args,
                                           weight.buffer.data(),
                                           p.bias ? bias.buffer.data() : nullptr,
                                           out.buffer.data(),
                                           p.bias ? out_bias.buffer.data() : nullptr,
                                           groups,
                                           in.groups.offsets,
                                           state.view(),
                                           y.data(),
                                           multiplication.linear(),
                                           in.gates.rotary};
  if (p.saved) args.saved = saved.data();
  run(name, args, {&y});
  expect_near(name + "y", y, read(0), c.dtype, p.out_dim);
  const std::string first = bits(y);
  args.x_tangent = rows.tangent;
  args.state_tangent = {state_tangent.data(), no_residual.data(), nullptr};
  args.y_tangent = y_tangent.data();
  run(name + "along a direction: ", args, {&y, &y_tangent});
  expect(bits(y) == first, "%sother bits beside a derivative", name.c_str());
  expect_near(name + "y_tangent", y_tangent, slope(read), c.dtype, p.out_dim, kSlope);
  args.x_tangent = {};

  Array grad = draw(rows_count * p.out_dim, -1, 1);
  const Rows grad_y(c.dtype, grad, batch, queries, p.out_dim, c.layout);
  Buffer grad_x(c.dtype, rows_count * p.dim), grad_weight(c.dtype, gates * p.dim), grad_bias(c.dtype, gates),
      grad_total(in.acc, batch * groups * channels), grad_out(c.dtype, p.out_dim * channels),
      grad_out_bias(c.dtype, p.out_dim);
  run(name + "backward: ",
      ProjectReadoutBackwardArgs{args,
                                 {grad_y.buffer.data(), grad_y.batch_stride, grad_y.token_stride},
                                 grad_x.data(),
                                 grad_weight.data(),
                                 grad_bias.data(),
                                 grad_total.data(),
                                 grad_out.data(),
                                 grad_out_bias.data()},
      {&grad_x, &grad_weight, &grad_bias, &grad_total, &grad_out, &grad_out_bias});
  const Array grad_mixed = times_transpose(grad, transpose(out.values, channels), p.out_dim);
  const naive::ReadoutGradients wanted = naive::readout_backward(problem(0), state.values, grad_mixed);
  const Array back = transpose(wanted.gate, gates);
  expect_near(name + "grad_x", grad_x, times_transpose(wanted.gate, transpose(weight.values, p.dim), gates), c.dtype,
              p.dim);
  expect_near(name + "grad_gate_weight", grad_weight, times_transpose(back, transpose(rows.values, p.dim), rows_count),
              c.dtype, p.dim);
  expect_near(name + "grad_gate_bias", grad_bias, column_sums(wanted.gate, gates), c.dtype, gates);
  expect_near(name + "grad_total", grad_total, wanted.total, c.dtype, channels);
  expect_near(name + "grad_out_weight", grad_out,
              times_transpose(transpose(grad, p.out_dim), transpose(mixed(0), channels), rows_count), c.dtype,
              channels);
  expect_near(name + "grad_out_bias", grad_out_bias, column_sums(grad, p.out_dim), c.dtype, p.out_dim);
}

// Blocks of many samples, of one, and several of a sample; every way to multiply; every layout.
void test_sizes(void (*test)(const ProjectCase&), std::initializer_list<Context> contexts, bool heads) {
  constexpr struct {
    Shape shape;
    int64_t dim;
  } kSizes[] = {{{2, 70, 9}, 8}, {{1, 1, 8}, 3}, {{30, 7, 5}, 6}, {{1, 260, 600}, 5}, {{2, 230, 620}, 4}};
  for (const auto& [shape, dim] : kSizes)
    for (Context context : contexts)
      for (Form form : {Form::product, Form::power}) {
        ProjectCase p = {{form, 1 + int(choose(3)), choose(2) ? Dtype::f32 : Dtype::f64, context}, dim};
        p.c.shape = shape;
        if (form == Form::product && shape.width > 100) p.c.shape.width /= p.c.degree;
        p.c.weighted = choose(2), p.c.prior = choose(2), p.bias = choose(2), p.saved = choose(2);
        p.kind = Multiplication::Kind(choose(3));
        p.c.layout = choose(2) ? Layout::dense : choose(2) ? Layout::padded : Layout::one_row;
        if (form == Form::power && shape.width > 3) p.c.axes = int(choose(3));
        if (heads && choose(2)) p.c.heads = p.c.channels() % 2 ? 1 : 2, p.c.axes = 0;
        test(p);
      }
}

void test_dtypes(void (*test)(const ProjectCase&)) {
  for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
    for (int kind : {0, 1, 2})
      test({{Form::product, 2, dtype, Context::whole, true, true, {2, 100, 20}},
            16,
            true,
            false,
            Multiplication::Kind(kind)});
}

void test_refusals() {
  const Dtype f32 = Dtype::f32;
  Array numbers = draw(64, -1, 1);
  const Buffer data(f32, numbers);
  StateBuffers out(f32, 1, 8);
  Multiplication multiplication(Multiplication::dense);
  Features features;
  features.degree = 1, features.batch = 1, features.tokens = features.width = 8;
  const ProjectStateArgs args = {features, {data.data(), 64, 8},   8, data.data(), nullptr, {}, out.view(),
                                 {},       multiplication.linear()};
  auto refuses = [&](const char* what, Status wanted, auto change) {
    ProjectStateArgs changed = args;
    change(changed);
    const size_t bytes = cpu::workspace(changed);
    Workspace memory(bytes);
    const Status got = cpu::project_state(changed, memory.data(), bytes);
    expect(got == wanted && out.total.untouched(), "%s: %s", what, message(got));
  };
  using Args = ProjectStateArgs;
  refuses("no degree", Status::bad_degree, [](Args& a) { a.features.degree = 0; });
  refuses("a mask", Status::bad_size, [&](Args& a) { a.groups.mask = data.data(); });
  refuses("no channels of tokens", Status::bad_size, [](Args& a) { a.dim = 0; });
  refuses("no tokens' memory", Status::null_pointer, [](Args& a) { a.x.data = nullptr; });
  refuses("no weight", Status::null_pointer, [](Args& a) { a.weight = nullptr; });
  refuses("a direction without room", Status::null_pointer, [](Args& a) { a.x_tangent = a.x; });
  refuses("a direction of features", Status::no_tangents, [&](Args& a) { a.features.u_tangent = data.data(); });
  const size_t bytes = cpu::workspace(args);
  Workspace memory(bytes);
  expect(cpu::project_state(args, memory.data(), bytes - 1) == Status::workspace_too_small, "a small workspace");
  multiplication.status = POM_DEVICE_ERROR;
  expect(cpu::project_state(args, memory.data(), bytes) == Status::device_error, "the status of a product is lost");
  multiplication.status = POM_OK;
  expect(cpu::project_state(args, memory.data(), bytes) == Status::ok && multiplication.calls == 2,
         "is not multiplied");

  Buffer y(f32, 64);
  ProjectReadoutArgs readout;
  static_cast<FoldedReadoutArgs&>(readout) = {
      Form::product,     f32,     1, 8, 8, 1, 8, 8, args.x, data.data(), nullptr, data.data(), nullptr, 1, nullptr,
      out.view().view(), y.data()};
  const size_t more = cpu::workspace(readout);
  Workspace room(more);
  auto readout_refuses = [&](const char* what, Status wanted, auto change) {
    ProjectReadoutArgs changed = readout;
    change(changed);
    const Status got = cpu::project_readout(changed, room.data(), more);
    expect(got == wanted && y.untouched(), "%s: %s", what, message(got));
  };
  using Readout = ProjectReadoutArgs;
  readout_refuses("heads that do not divide", Status::bad_size, [](Readout& a) { a.heads = 3; });
  readout_refuses("groups of unequal length", Status::bad_size, [](Readout& a) { a.groups = 3; });
  readout_refuses("no outputs", Status::bad_size, [](Readout& a) { a.out_dim = 0; });
  readout_refuses("no state", Status::null_pointer, [](Readout& a) { a.state.count = nullptr; });
  readout_refuses("no weight", Status::null_pointer, [](Readout& a) { a.out_weight = nullptr; });
  readout_refuses("a direction of queries alone", Status::null_pointer, [](Readout& a) { a.x_tangent = a.x; });
}

int main() {
  section("states");
  test_sizes(test_state, {Context::whole, Context::offsets, Context::cumulative}, false);
  test_dtypes(test_state);
  section("readouts");
  test_sizes(test_readout, {Context::whole, Context::even, Context::offsets}, true);
  test_dtypes(test_readout);
  section("refusals");
  test_refusals();
  return check::finish();
}
