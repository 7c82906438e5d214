// Readouts together with the projections before and behind them: as project_state.cpp, a block of queries at a time.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/means.h"
#include "torch/projections.h"

namespace {

using namespace pom_torch;

// A result (B, N, D) of tokens, written a block of rows at a time.
struct TokenResult {
  Tensor tensor, rows;
  TokenResult(const Tensor& x, int64_t dim)
      : tensor(new_result(x, {x.size(0), x.size(1), dim}, x.scalar_type())), rows(matrix_of(tensor)) {}
  void write(int64_t first, const Tensor& matrix) {
    Tensor part = rows_of(rows, first, matrix.size(0));
    torch::stable::copy_(part, matrix);
  }
};

#define POM_READING                                                                                              \
  "Tensor x, Tensor gate_weight, Tensor? gate_bias, " POM_STATE ", Tensor out_weight, Tensor? out_bias, " \
  "Tensor? offsets, Tensor? gate_cos, Tensor? gate_sin, int gate_axes, int form"
struct ReadingInputs {
  Tensor x, gate_weight;
  Optional gate_bias;
  StateInputs state;
  Tensor out_weight;
  Optional out_bias, offsets, cos, sin;
  int64_t axes, form;
  static ReadingInputs read(Arguments& from) {
    return {from.tensor(),   from.tensor(),   from.optional(), StateInputs::read(from), from.tensor(),  from.optional(),
            from.optional(), from.optional(), from.optional(), from.integer(),          from.integer()};
  }
};

// Queries and what they read: as Projected, of gates.
struct ProjectedGates {
  const ReadingInputs& in;
  Tensor rows;
  State state;
  DenseArg offsets;
  Bounds bounds;
  int64_t heads, groups, channels;
  int64_t gated = channels;  // channels that a token has gates for

  ProjectedGates(const ReadingInputs& in, int64_t heads)
      : in(in), rows(projected_rows(in.x, in.gate_weight, in.gate_bias, "gate_weight")), state(in.state, in.x),
        offsets(in.offsets, in.x, ScalarType::Long, {in.state.total.size(1) + 1}, "offsets"),
        bounds(offsets, in.x.size(1), in.state.total.size(1)), heads(heads), groups(in.state.total.size(1)),
        channels(in.state.total.size(2)) {
    STD_TORCH_CHECK(in.out_weight.scalar_type() == in.x.scalar_type(), "out_weight: expected the dtype of x");
    STD_TORCH_CHECK(in.out_weight.dim() == 2 && in.out_weight.size(1) == channels, "out_weight: unexpected shape");
  }

  Tensor tokens(const Block& block, int64_t first) const { return rows_of(rows, first, block.rows()); }
  Gates gates(const Block& block, int64_t first, const Optional& saved = {}) const {
    return gates_of(block, saved ? rows_of(*saved, first, block.rows())
                                 : linear(tokens(block, first), in.gate_weight, in.gate_bias));
  }
  // The derivative of these along a direction of the tokens, a matrix.
  Gates gates_along(const Block& block, int64_t first, const Gates& gates, const Tensor& direction) const {
    return gates_of(block, matrix_of(gates.gate), linear(rows_of(direction, first, block.rows()), in.gate_weight));
  }
  // A direction of the state.
  State state_along(const TangentInputs& tangent) const {
    STD_TORCH_CHECK(tangent.total && tangent.residual, "total_tangent, residual_tangent: expected with x_tangent");
    return {{tangent.total, tangent.residual, {}}, in.x, groups, channels};
  }
  // The groups of a block: the row of the first, and their state.
  int64_t row(const Block& block, const Bounds::Local& local) const { return block.sample * groups + local.first; }
  pom::StateView view(const State& state, int64_t row) const {
    const int64_t bytes = row * channels * state.total.tensor->element_size();
    return {static_cast<const char*>(state.view.total) + bytes, static_cast<const char*>(state.view.residual) + bytes,
            state.view.count ? state.view.count + row : nullptr};
  }
  // (rows, C): what the queries of a block read; with a direction of the gates and of the state, its derivative.
  Tensor read(const Block& block, const Gates& gates, const Bounds::Local& local, const State* along = nullptr) const {
    Tensor mixed = torch::stable::new_empty(in.x, {block.rows(), channels});
    const int64_t first = row(block, local);
    call(pom::ReadoutArgs{gates.args, local.count, local.data(), view(state, first), mixed.mutable_data_ptr(),
                          along ? view(*along, first) : pom::StateView{}},
         gates.gate, POM_OPERATION(readout));
    return mixed;
  }

 private:
  Gates gates_of(const Block& block, const Tensor& gate, const Optional& tangent = {}) const {
    const auto of_tokens = [&](const Tensor& t) {
      return torch::stable::view(t, {block.samples, block.tokens, in.gate_weight.size(0)});
    };
    return Gates({of_tokens(gate), tangent ? of_tokens(*tangent) : tangent, part_of(in.cos, block),
                  part_of(in.sin, block), in.axes, heads},
                 in.form, gated);
  }
};

// What is read and projected and, along directions of the tokens and of the state, its derivative, in one pass.
std::tuple<Tensor, Tensor, Tensor> project_readout(const ReadingInputs& in, int64_t heads, const TangentInputs& tangent,
                                                   bool save_projection) {
  const ProjectedGates p(in, heads);
  const Tensor& x = in.x;
  STD_TORCH_CHECK(!(tangent.x && save_projection), "save_projection: expected no tangents");
  TokenResult y(x, in.out_weight.size(0));
  const Tensor gate = save_projection ? torch::stable::view(linear(p.rows, in.gate_weight, in.gate_bias),
                                                            {x.size(0), x.size(1), in.gate_weight.size(0)})
                                      : empty_result(x);
  const Optional saved = save_projection ? Optional(matrix_of(gate)) : Optional();
  if (!tangent.x) {
    each_block(x, p.channels, [&](const Block& block, int64_t first) {
      const Tensor mixed = p.read(block, p.gates(block, first, saved), p.bounds.within(block));
      y.write(first, linear(mixed, in.out_weight, in.out_bias));
    });
    return {y.tensor, empty_result(x), gate};
  }
  const State moved = p.state_along(tangent);
  const Tensor direction = direction_of(*tangent.x, x);
  TokenResult along(x, in.out_weight.size(0));
  each_block(x, p.channels, [&](const Block& block, int64_t first) {
    const Bounds::Local local = p.bounds.within(block);
    const Gates gates = p.gates(block, first);
    y.write(first, linear(p.read(block, gates, local), in.out_weight, in.out_bias));
    const Gates gates_along = p.gates_along(block, first, gates, direction);
    along.write(first, linear(p.read(block, gates_along, local, &moved), in.out_weight));
  });
  return {y.tensor, along.tensor, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> project_readout_backward(
    const Tensor& grad_y, const ReadingInputs& in, int64_t heads, const Optional& saved_projection) {
  const ProjectedGates p(in, heads);
  const Tensor &x = in.x, &gate_weight = in.gate_weight, &out_weight = in.out_weight;
  const int64_t dim = out_weight.size(0);
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "grad_y: unexpected dtype");
  expect_shape(grad_y, {x.size(0), x.size(1), dim}, "grad_y");
  const Optional saved = saved_matrix(saved_projection, x, gate_weight.size(0));
  const Tensor grad_y_rows = matrix_of(grad_y), back = transposed(out_weight), gate_back = transposed(gate_weight);
  Tensor grad_x = new_like(x), grad_total = new_like(*p.state.total.tensor);
  const Tensor grad_rows = matrix_of(grad_x);
  std::vector<double> sums(grad_total.numel());
  Sum grad_gate_weight, grad_gate_bias, grad_out_weight, grad_out_bias;
  each_block(x, p.channels, [&](const Block& block, int64_t first) {
    const Gates gates = p.gates(block, first, saved);
    const Bounds::Local local = p.bounds.within(block);
    const Tensor dy = rows_of(grad_y_rows, first, block.rows()), dmixed = linear(dy, back);
    grad_out_weight.add(linear(transposed(dy), transposed(p.read(block, gates, local))));
    if (in.out_bias) grad_out_bias.add(column_sums(dy));
    Tensor dgate = new_like(gates.gate);
    Tensor dtotal = torch::stable::new_empty(x, {block.samples, local.count, p.channels}, acc_of(x));
    const int64_t row = p.row(block, local);
    call(pom::ReadoutBackwardArgs{gates.args, local.count, local.data(), p.view(p.state, row),
                                  dmixed.const_data_ptr(), block.tokens * p.channels, p.channels,
                                  dgate.mutable_data_ptr(), dtotal.mutable_data_ptr()},
         gates.gate, POM_OPERATION(readout_backward));
    with_acc(x, [&](auto acc) {
      const auto* const part = static_cast<const decltype(acc)*>(dtotal.const_data_ptr());
      for (int64_t i = 0; i < dtotal.numel(); ++i) sums[row * p.channels + i] += part[i];
    });
    const Tensor dgate_rows = matrix_of(dgate);
    Tensor part = rows_of(grad_rows, first, block.rows());
    torch::stable::copy_(part, linear(dgate_rows, gate_back));
    grad_gate_weight.add(linear(transposed(dgate_rows), transposed(p.tokens(block, first))));
    if (in.gate_bias) grad_gate_bias.add(column_sums(dgate_rows));
  }, kBackBlockBytes);
  with_acc(x, [&](auto acc) {
    std::copy(sums.begin(), sums.end(), static_cast<decltype(acc)*>(grad_total.mutable_data_ptr()));
  });
  return {grad_x, grad_gate_weight.as(x, {gate_weight.size(0), gate_weight.size(1)}),
          grad_gate_bias.as(x, {in.gate_bias ? gate_weight.size(0) : 0}), grad_total,
          grad_out_weight.as(x, {dim, p.channels}), grad_out_bias.as(x, {in.out_bias ? dim : 0})};
}

// Queries with one gate per head, which read the mean features of a head through the output projection.
struct FoldedGates : ProjectedGates {
  explicit FoldedGates(const ReadingInputs& in) : ProjectedGates(in, 1) {
    gated = in.gate_weight.size(0);
    STD_TORCH_CHECK(gated >= 1 && channels % gated == 0, "gate_weight: expected a divisor of ", channels, " heads");
  }

  // (B * G, heads, D): the mean features of every head through its columns of the projection.
  Tensor folded(const State& of) const {
    const int64_t rows = in.x.size(0) * groups, dim = in.out_weight.size(0), width = channels / gated;
    const Tensor mean = torch::stable::new_empty(in.x, {rows, gated, width}, acc_of(in.x));
    with_acc(in.x, [&](auto acc) {
      pom::cpu::means({of.view.total, of.view.residual, state.view.count}, rows, channels,
                      static_cast<decltype(acc)*>(mean.mutable_data_ptr()), kTorchThreads);
    });
    const Tensor columns = torch::stable::reshape(torch::stable::to(in.out_weight, acc_of(in.x)), {dim, gated, width});
    const Tensor maps = torch::stable::transpose(transposed(columns), 1, 2);     // (heads, C / heads, D)
    const Tensor of_heads = torch::stable::matmul(transposed(mean), maps);       // (heads, B * G, D)
    return torch::stable::to(torch::stable::contiguous(transposed(of_heads)), in.x.scalar_type());
  }
  // (rows, heads): γ of the queries of a block, or its derivative: what they read of a state of ones.
  Tensor values(const Gates& gates) const {
    const int64_t samples = gates.args.batch;
    Tensor value = torch::stable::new_empty(in.x, {samples * gates.args.tokens, gated});
    with_acc(in.x, [&](auto acc) {
      const std::vector<decltype(acc)> ones(samples * gated, 1), zeros(samples * gated, 0);
      const std::vector<double> counts(samples, 1);
      call(pom::ReadoutArgs{gates.args, 1, nullptr, {ones.data(), zeros.data(), counts.data()},
                            value.mutable_data_ptr(), {}},
           gates.gate, POM_OPERATION(readout));
    });
    return value;
  }
  // Values (rows, k) of the queries of a block, times what is folded for their groups (B * G, k, D), into y.
  void multiply(const Block& block, int64_t first, const Tensor& value, const Tensor& folded, const Optional& out_bias,
                TokenResult& y) const {
    const Bounds::Local local = bounds.within(block);
    for (int64_t s = 0; s < block.samples; ++s)
      for (int64_t g = 0; g < local.count; ++g) {
        const int64_t begin = local.offsets[g], count = local.offsets[g + 1] - begin, at = s * block.tokens + begin;
        if (count == 0) continue;
        const Tensor map = torch::stable::select(folded, 0, (block.sample + s) * groups + local.first + g);
        y.write(first + at, linear(rows_of(value, at, count), transposed(map), out_bias));
      }
  }
};

// Two tensors of one shape, along their second dimension.
Tensor side_by_side(const Tensor& a, const Tensor& b) {
  const int64_t n = a.size(1);
  Tensor both = a.dim() == 2 ? torch::stable::new_empty(a, {a.size(0), 2 * n})
                             : torch::stable::new_empty(a, {a.size(0), 2 * n, a.size(2)});
  Tensor first = torch::stable::narrow(both, 1, 0, n), second = torch::stable::narrow(both, 1, n, n);
  torch::stable::copy_(first, a);
  torch::stable::copy_(second, b);
  return both;
}

// What is read and, along directions of the tokens and of the state, its derivative: both its terms as one product.
std::tuple<Tensor, Tensor> folded_readout(const ReadingInputs& in, const TangentInputs& tangent) {
  const FoldedGates p(in);
  const Tensor folded = p.folded(p.state);
  const int64_t dim = in.out_weight.size(0);
  TokenResult y(in.x, dim);
  if (!tangent.x) {
    each_block(in.x, dim, [&](const Block& block, int64_t first) {
      p.multiply(block, first, p.values(p.gates(block, first)), folded, in.out_bias, y);
    }, kResultBytes);
    return {y.tensor, empty_result(in.x)};
  }
  const Tensor direction = direction_of(*tangent.x, in.x);
  const Tensor both = side_by_side(p.folded(p.state_along(tangent)), folded);
  TokenResult along(in.x, dim);
  each_block(in.x, dim, [&](const Block& block, int64_t first) {
    const Gates gates = p.gates(block, first);
    const Tensor value = p.values(gates), value_along = p.values(p.gates_along(block, first, gates, direction));
    p.multiply(block, first, value, folded, in.out_bias, y);
    p.multiply(block, first, side_by_side(value, value_along), both, {}, along);
  });
  return {y.tensor, along.tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def(
      "project_readout(" POM_READING ", int heads, " POM_TANGENTS ", bool save_projection) "
      "-> (Tensor y, Tensor y_tangent, Tensor saved_projection)");
  m.def(
      "project_readout_backward(Tensor grad_y, " POM_READING ", int heads, Tensor? saved_projection) "
      "-> (Tensor grad_x, Tensor grad_gate_weight, Tensor grad_gate_bias, Tensor grad_total, Tensor grad_out_weight, "
      "Tensor grad_out_bias)");
  m.def("folded_readout(" POM_READING ", " POM_TANGENTS ") -> (Tensor y, Tensor y_tangent)");
}

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CPU, m) {
  m.impl("project_readout", Boxed<&project_readout>::call);
  m.impl("project_readout_backward", Boxed<&project_readout_backward>::call);
  m.impl("folded_readout", Boxed<&folded_readout>::call);
}
