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

// Queries and what they read: as Projected, of gates.
struct ProjectedGates {
  Tensor x, rows, weight, out_weight;
  Optional bias, cos, sin;
  State state;
  Plain offsets;
  Bounds bounds;
  int64_t axes, form, heads, groups, channels;
  int64_t gated = channels;  // channels that a token has gates for

  ProjectedGates(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& total,
                 const Tensor& residual, const Tensor& count, const Tensor& out_weight, const Optional& offsets_,
                 const Optional& cos, const Optional& sin, int64_t axes, int64_t form, int64_t heads)
      : x(x), rows(projected_rows(x, weight, bias, "gate_weight")), weight(weight), out_weight(out_weight),
        bias(bias), cos(cos), sin(sin), state(total, residual, count, x, x.size(0), total.size(1), total.size(2)),
        offsets(offsets_, x, ScalarType::Long, {total.size(1) + 1}, "offsets"),
        bounds(offsets, x.size(1), total.size(1)), axes(axes), form(form), heads(heads), groups(total.size(1)),
        channels(total.size(2)) {
    STD_TORCH_CHECK(out_weight.scalar_type() == x.scalar_type(), "out_weight: expected the dtype of x");
    STD_TORCH_CHECK(out_weight.dim() == 2 && out_weight.size(1) == channels, "out_weight: unexpected shape");
  }

  Tensor tokens(const Block& block, int64_t first) const { return rows_of(rows, first, block.rows()); }
  Gates gates(const Block& block, int64_t first, const Optional& kept = {}) const {
    return gates_of(block, kept ? rows_of(*kept, first, block.rows()) : linear(tokens(block, first), weight, bias));
  }
  // The derivative of these along a direction of the tokens, a matrix.
  Gates gates_along(const Block& block, int64_t first, const Gates& gates, const Tensor& direction) const {
    return gates_of(block, matrix_of(gates.gate), linear(rows_of(direction, first, block.rows()), weight));
  }
  // A direction of the state.
  State state_along(const Tensor& total, const Tensor& residual) const {
    return {total, residual, {}, x, x.size(0), groups, channels};
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
    Tensor mixed = torch::stable::new_empty(x, {block.rows(), channels});
    const int64_t first = row(block, local);
    call(pom::ReadoutArgs{gates.args, local.count, local.data(), view(state, first), mixed.mutable_data_ptr(),
                          along ? view(*along, first) : pom::StateView{}},
         gates.gate, POM_OPERATION(readout));
    return mixed;
  }

 private:
  Gates gates_of(const Block& block, const Tensor& gate, const Optional& tangent = {}) const {
    const auto of_tokens = [&](const Tensor& t) {
      return torch::stable::view(t, {block.samples, block.tokens, weight.size(0)});
    };
    return Gates(of_tokens(gate), tangent ? Optional(of_tokens(*tangent)) : tangent, gated,
                 part_of(cos, block), part_of(sin, block), axes, form, heads);
  }
};

std::tuple<Tensor, Tensor> project_readout(const Tensor& x, const Tensor& gate_weight, const Optional& gate_bias,
                                           const Tensor& total, const Tensor& residual, const Tensor& count,
                                           const Tensor& out_weight, const Optional& out_bias, const Optional& offsets,
                                           const Optional& cos, const Optional& sin, int64_t axes, int64_t form,
                                           int64_t heads, bool keep) {
  const ProjectedGates in(x, gate_weight, gate_bias, total, residual, count, out_weight, offsets, cos, sin, axes, form,
                          heads);
  TokenResult y(x, out_weight.size(0));
  const Tensor gate = keep ? torch::stable::view(linear(in.rows, gate_weight, gate_bias),
                                                 {x.size(0), x.size(1), gate_weight.size(0)})
                           : torch::stable::new_empty(x, {0, 0, 0});
  const Optional kept = keep ? Optional(matrix_of(gate)) : Optional();
  each_block(x, in.channels, [&](const Block& block, int64_t first) {
    const Tensor mixed = in.read(block, in.gates(block, first, kept), in.bounds.within(block));
    y.write(first, linear(mixed, out_weight, out_bias));
  });
  return {y.tensor, gate};
}

// What is read and projected, and its derivative along directions of the tokens and of the state, in one pass.
std::tuple<Tensor, Tensor> project_readout_along(const Tensor& x_tangent, const Tensor& total_tangent,
                                                 const Tensor& residual_tangent, const Tensor& x,
                                                 const Tensor& gate_weight, const Optional& gate_bias,
                                                 const Tensor& total, const Tensor& residual, const Tensor& count,
                                                 const Tensor& out_weight, const Optional& out_bias,
                                                 const Optional& offsets, const Optional& cos, const Optional& sin,
                                                 int64_t axes, int64_t form, int64_t heads) {
  const ProjectedGates in(x, gate_weight, gate_bias, total, residual, count, out_weight, offsets, cos, sin, axes, form,
                          heads);
  const State moved = in.state_along(total_tangent, residual_tangent);
  const Tensor direction = direction_of(x_tangent, x);
  TokenResult y(x, out_weight.size(0)), along(x, out_weight.size(0));
  each_block(x, in.channels, [&](const Block& block, int64_t first) {
    const Bounds::Local local = in.bounds.within(block);
    const Gates gates = in.gates(block, first);
    y.write(first, linear(in.read(block, gates, local), out_weight, out_bias));
    const Gates gates_along = in.gates_along(block, first, gates, direction);
    along.write(first, linear(in.read(block, gates_along, local, &moved), out_weight));
  });
  return {y.tensor, along.tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> project_readout_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& gate_weight, const Optional& gate_bias, const Tensor& total,
    const Tensor& residual, const Tensor& count, const Tensor& out_weight, const Optional& out_bias,
    const Optional& offsets, const Optional& cos, const Optional& sin, int64_t axes, int64_t form, int64_t heads,
    const Optional& kept_) {
  const ProjectedGates in(x, gate_weight, gate_bias, total, residual, count, out_weight, offsets, cos, sin, axes, form,
                          heads);
  const int64_t dim = out_weight.size(0);
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "grad_y: unexpected dtype");
  expect_shape(grad_y, {x.size(0), x.size(1), dim}, "grad_y");
  const Optional kept = kept_matrix(kept_, x, gate_weight.size(0));
  const Tensor grad_y_rows = matrix_of(grad_y), back = transposed(out_weight), gate_back = transposed(gate_weight);
  Tensor grad_x = new_like(x), grad_total = new_like(*in.state.total.tensor);
  const Tensor grad_rows = matrix_of(grad_x);
  std::vector<double> sums(grad_total.numel());
  Sum grad_gate_weight, grad_gate_bias, grad_out_weight, grad_out_bias;
  each_block(x, in.channels, [&](const Block& block, int64_t first) {
    const Gates gates = in.gates(block, first, kept);
    const Bounds::Local local = in.bounds.within(block);
    const Tensor dy = rows_of(grad_y_rows, first, block.rows()), dmixed = linear(dy, back);
    grad_out_weight.add(linear(transposed(dy), transposed(in.read(block, gates, local))));
    if (out_bias) grad_out_bias.add(column_sums(dy));
    Tensor dgate = new_like(gates.gate);
    Tensor dtotal = torch::stable::new_empty(x, {block.samples, local.count, in.channels}, acc_of(x));
    const int64_t row = in.row(block, local);
    call(pom::ReadoutBackwardArgs{gates.args, local.count, local.data(), in.view(in.state, row),
                                  dmixed.const_data_ptr(), block.tokens * in.channels, in.channels,
                                  dgate.mutable_data_ptr(), dtotal.mutable_data_ptr()},
         gates.gate, POM_OPERATION(readout_backward));
    with_acc(x, [&](auto acc) {
      const auto* const part = static_cast<const decltype(acc)*>(dtotal.const_data_ptr());
      for (int64_t i = 0; i < dtotal.numel(); ++i) sums[row * in.channels + i] += part[i];
    });
    const Tensor dgate_rows = matrix_of(dgate);
    Tensor part = rows_of(grad_rows, first, block.rows());
    torch::stable::copy_(part, linear(dgate_rows, gate_back));
    grad_gate_weight.add(linear(transposed(dgate_rows), transposed(in.tokens(block, first))));
    if (gate_bias) grad_gate_bias.add(column_sums(dgate_rows));
  }, kBackBlockBytes);
  with_acc(x, [&](auto acc) {
    std::copy(sums.begin(), sums.end(), static_cast<decltype(acc)*>(grad_total.mutable_data_ptr()));
  });
  return {grad_x, grad_gate_weight.as(x, {gate_weight.size(0), gate_weight.size(1)}),
          grad_gate_bias.as(x, {gate_bias ? gate_weight.size(0) : 0}), grad_total,
          grad_out_weight.as(x, {dim, in.channels}), grad_out_bias.as(x, {out_bias ? dim : 0})};
}

// Queries with one gate per head, which read the mean features of a head through the output projection.
struct FoldedGates : ProjectedGates {
  FoldedGates(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& total, const Tensor& residual,
              const Tensor& count, const Tensor& out_weight, const Optional& offsets, const Optional& cos,
              const Optional& sin, int64_t axes, int64_t form)
      : ProjectedGates(x, weight, bias, total, residual, count, out_weight, offsets, cos, sin, axes, form, 1) {
    gated = weight.size(0);
    STD_TORCH_CHECK(gated >= 1 && channels % gated == 0, "gate_weight: expected a divisor of ", channels, " heads");
  }

  // (B * G, heads, D): the mean features of every head through its columns of the projection.
  Tensor folded(const State& of) const {
    const int64_t rows = x.size(0) * groups, dim = out_weight.size(0), width = channels / gated;
    const Tensor mean = torch::stable::new_empty(x, {rows, gated, width}, acc_of(x));
    with_acc(x, [&](auto acc) {
      pom::cpu::means({of.view.total, of.view.residual, state.view.count}, rows, channels,
                      static_cast<decltype(acc)*>(mean.mutable_data_ptr()), kTorchThreads);
    });
    const Tensor columns = torch::stable::reshape(torch::stable::to(out_weight, acc_of(x)), {dim, gated, width});
    const Tensor maps = torch::stable::transpose(transposed(columns), 1, 2);     // (heads, C / heads, D)
    const Tensor of_heads = torch::stable::matmul(transposed(mean), maps);       // (heads, B * G, D)
    return torch::stable::to(torch::stable::contiguous(transposed(of_heads)), x.scalar_type());
  }
  // (rows, heads): γ of the queries of a block, or its derivative: what they read of a state of ones.
  Tensor values(const Gates& gates) const {
    const int64_t samples = gates.args.batch;
    Tensor value = torch::stable::new_empty(x, {samples * gates.args.tokens, gated});
    with_acc(x, [&](auto acc) {
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

Tensor folded_readout(const Tensor& x, const Tensor& gate_weight, const Optional& gate_bias, const Tensor& total,
                      const Tensor& residual, const Tensor& count, const Tensor& out_weight, const Optional& out_bias,
                      const Optional& offsets, const Optional& cos, const Optional& sin, int64_t axes, int64_t form) {
  const FoldedGates in(x, gate_weight, gate_bias, total, residual, count, out_weight, offsets, cos, sin, axes, form);
  const Tensor folded = in.folded(in.state);
  TokenResult y(x, out_weight.size(0));
  each_block(x, out_weight.size(0), [&](const Block& block, int64_t first) {
    in.multiply(block, first, in.values(in.gates(block, first)), folded, out_bias, y);
  }, kResultBytes);
  return y.tensor;
}

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

// The same, and its derivative along directions of the tokens and of the state: both terms of it as one product.
std::tuple<Tensor, Tensor> folded_readout_along(const Tensor& x_tangent, const Tensor& total_tangent,
                                                const Tensor& residual_tangent, const Tensor& x,
                                                const Tensor& gate_weight, const Optional& gate_bias,
                                                const Tensor& total, const Tensor& residual, const Tensor& count,
                                                const Tensor& out_weight, const Optional& out_bias,
                                                const Optional& offsets, const Optional& cos, const Optional& sin,
                                                int64_t axes, int64_t form) {
  const FoldedGates in(x, gate_weight, gate_bias, total, residual, count, out_weight, offsets, cos, sin, axes, form);
  const Tensor direction = direction_of(x_tangent, x), folded = in.folded(in.state);
  const Tensor both = side_by_side(in.folded(in.state_along(total_tangent, residual_tangent)), folded);
  TokenResult y(x, out_weight.size(0)), along(x, out_weight.size(0));
  each_block(x, out_weight.size(0), [&](const Block& block, int64_t first) {
    const Gates gates = in.gates(block, first);
    const Tensor value = in.values(gates), value_along = in.values(in.gates_along(block, first, gates, direction));
    in.multiply(block, first, value, folded, out_bias, y);
    in.multiply(block, first, side_by_side(value, value_along), both, {}, along);
  });
  return {y.tensor, along.tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def(
      "project_readout(Tensor x, Tensor gate_weight, Tensor? gate_bias, Tensor total, Tensor residual, Tensor count, "
      "Tensor out_weight, Tensor? out_bias, Tensor? offsets, Tensor? cos, Tensor? sin, int axes, int form, int heads, "
      "bool keep) -> (Tensor y, Tensor kept)");
  m.def(
      "project_readout_backward(Tensor grad_y, Tensor x, Tensor gate_weight, Tensor? gate_bias, Tensor total, "
      "Tensor residual, Tensor count, Tensor out_weight, Tensor? out_bias, Tensor? offsets, Tensor? cos, Tensor? sin, "
      "int axes, int form, int heads, Tensor? kept) -> (Tensor grad_x, Tensor grad_gate_weight, Tensor grad_gate_bias, "
      "Tensor grad_total, Tensor grad_out_weight, Tensor grad_out_bias)");
  m.def(
      "project_readout_along(Tensor x_tangent, Tensor total_tangent, Tensor residual_tangent, Tensor x, "
      "Tensor gate_weight, Tensor? gate_bias, Tensor total, Tensor residual, Tensor count, Tensor out_weight, "
      "Tensor? out_bias, Tensor? offsets, Tensor? cos, Tensor? sin, int axes, int form, int heads) "
      "-> (Tensor y, Tensor y_tangent)");
  m.def(
      "folded_readout(Tensor x, Tensor gate_weight, Tensor? gate_bias, Tensor total, Tensor residual, Tensor count, "
      "Tensor out_weight, Tensor? out_bias, Tensor? offsets, Tensor? cos, Tensor? sin, int axes, int form) -> Tensor");
  m.def(
      "folded_readout_along(Tensor x_tangent, Tensor total_tangent, Tensor residual_tangent, Tensor x, "
      "Tensor gate_weight, Tensor? gate_bias, Tensor total, Tensor residual, Tensor count, Tensor out_weight, "
      "Tensor? out_bias, Tensor? offsets, Tensor? cos, Tensor? sin, int axes, int form) "
      "-> (Tensor y, Tensor y_tangent)");
}

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CPU, m) {
  m.impl("project_readout", TORCH_BOX(&project_readout));
  m.impl("project_readout_backward", TORCH_BOX(&project_readout_backward));
  m.impl("project_readout_along", TORCH_BOX(&project_readout_along));
  m.impl("folded_readout", TORCH_BOX(&folded_readout));
  m.impl("folded_readout_along", TORCH_BOX(&folded_readout_along));
}
