// Operations that hold the projections of tokens a block at a time, in the processor's cache, and never all of them.
// On the CPU: the products are torch's, what is between them are the operations of pom.h.

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "residual.h"
#include "torch/blocks.h"
#include "torch/linear.h"

namespace {

using namespace pom_torch;

// Tokens and what their projections are summed with.
struct Projected {
  Tensor x, rows, weight;  // x (B, N, D) and as a matrix; weight (C, D)
  Optional bias, coeff, token_weight, cos, sin;
  int64_t axes, form, degree;

  Projected(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& coeff,
            const Optional& token_weight, const Optional& cos, const Optional& sin, int64_t axes, int64_t form,
            int64_t degree)
      : x(x), rows(projected_rows(x, weight, bias, "weight")), weight(weight), bias(bias), coeff(coeff),
        token_weight(token_weight), cos(cos), sin(sin), axes(axes), form(form), degree(degree) {
    if (token_weight) expect_shape(*token_weight, {x.size(0), x.size(1)}, "token_weight");
    for (const Optional* table : {&cos, &sin})
      if (*table) STD_TORCH_CHECK((*table)->dim() == 2 && (*table)->size(0) == x.size(1), "cos, sin: unexpected shape");
  }

  // The tokens of a block as a matrix, and their projections as the operations take them.
  Tensor tokens(const Block& block, int64_t first) const { return rows_of(rows, first, block.rows()); }
  Features features(const Block& block, int64_t first, const Optional& kept = {}) const {
    const Tensor u = kept ? rows_of(*kept, first, block.rows()) : linear(tokens(block, first), weight, bias);
    return Features(as_tokens(u, block), coeff, {}, {}, weights(block), part_of(cos, block), part_of(sin, block), axes,
                    form, degree);
  }
  // The derivative of these, at u, along a direction of the tokens, a matrix.
  Features features_along(const Block& block, int64_t first, const Tensor& u, const Tensor& direction) const {
    const Tensor along = as_tokens(linear(rows_of(direction, first, block.rows()), weight), block);
    const Optional still = coeff ? Optional(torch::stable::new_zeros(*coeff, {coeff->size(0), coeff->size(1)})) : coeff;
    return Features(u, coeff, along, still, weights(block), part_of(cos, block), part_of(sin, block), axes, form,
                    degree);
  }

  static Tensor projected_rows(const Tensor& x, const Tensor& weight, const Optional& bias, const char* name) {
    STD_TORCH_CHECK(x.dim() == 3 && x.is_cpu(), "x: expected (B, N, D) on the CPU");
    for (const Tensor* t : {&weight, bias ? &*bias : nullptr})
      if (t) STD_TORCH_CHECK(t->scalar_type() == x.scalar_type() && t->is_cpu(), name, ": expected the dtype of x");
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(2), name, ": unexpected shape");
    return matrix_of(x);
  }

  Tensor as_tokens(const Tensor& matrix, const Block& block) const {
    return torch::stable::view(matrix, {block.samples, block.tokens, weight.size(0)});
  }
  static Optional part_of(const Optional& table, const Block& block) {
    return table ? Optional(rows_of(*table, block.token, block.tokens)) : Optional();
  }

 private:
  Optional weights(const Block& block) const {
    if (!token_weight) return {};
    Tensor samples = rows_of(*token_weight, block.sample, block.samples);
    return torch::stable::narrow(samples, 1, block.token, block.tokens);
  }
};

// What the forward kept of its projections (B, N, C), as a matrix.
Optional kept_matrix(const Optional& kept, const Tensor& x, int64_t width) {
  if (!kept || kept->size(0) != x.size(0) || kept->size(1) != x.size(1) || kept->size(2) != width) return {};
  STD_TORCH_CHECK(kept->is_contiguous() && kept->scalar_type() == x.scalar_type(), "kept: expected as it was returned");
  return matrix_of(*kept);
}

// The states of all groups, summed from those of the blocks.
class BlockStates {
 public:
  BlockStates(const Tensor& x, int64_t groups, int64_t channels)
      : out(x, x.size(0), groups, channels), x_(x), groups_(groups), channels_(channels),
        sums_(x.size(0) * groups * channels), counts_(x.size(0) * groups) {}

  void add(const Features& features, const Block& block, const Bounds::Local& local) {
    NewState part(features.u, block.samples, local.count, channels_);
    call(pom::StateArgs{features.args, {local.count, local.data()}, part.out}, features.u, POM_OPERATION(state));
    const int64_t first = block.sample * groups_ + local.first;
    with_acc(x_, [&](auto acc) {
      const auto* const total = static_cast<const decltype(acc)*>(part.out.total);
      const auto* const residual = static_cast<const decltype(acc)*>(part.out.residual);
      parallel(block.samples * local.count, [&](int64_t row) {
        double* const sums = &sums_[(first + row) * channels_];
        for (int64_t c = 0, i = row * channels_; c < channels_; ++c, ++i) sums[c] += double(total[i]) + double(residual[i]);
        counts_[first + row] += part.out.count[row];
      });
    });
  }

  void finish(bool cumulative) {
    with_acc(x_, [&](auto acc) {
      auto *const total = static_cast<decltype(acc)*>(out.out.total), *const residual = static_cast<decltype(acc)*>(out.out.residual);
      parallel(x_.size(0), [&](int64_t b) {
        for (int64_t row = b * groups_; row < (b + 1) * groups_; ++row) {
          double* const sums = &sums_[row * channels_];
          if (cumulative && row > b * groups_) {
            for (int64_t c = 0; c < channels_; ++c) sums[c] += sums[c - channels_];
            counts_[row] += counts_[row - 1];
          }
          for (int64_t c = 0, i = row * channels_; c < channels_; ++c, ++i) pom::split(sums[c], 0.0, total[i], residual[i]);
          out.out.count[row] = counts_[row];
        }
      });
    });
  }

  NewState out;

 private:
  Tensor x_;
  int64_t groups_, channels_;
  std::vector<double> sums_, counts_;
};

// The groups of the tokens x (B, N, D) by their offsets.
struct Grouped {
  Plain offsets;
  Bounds bounds;
  Grouped(const Optional& offsets_, const Tensor& x)
      : offsets(offsets_, x, ScalarType::Long, {offsets_ ? offsets_->size(0) : 0}, "offsets"),
        bounds(offsets, x.size(1), offsets_ ? offsets_->size(0) - 1 : 1) {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor> project_state(const Tensor& x, const Tensor& weight, const Optional& bias,
                                                         const Optional& coeff, const Optional& token_weight,
                                                         const Optional& offsets, bool cumulative, const Optional& cos,
                                                         const Optional& sin, int64_t axes, int64_t form,
                                                         int64_t degree, bool keep) {
  const Projected in(x, weight, bias, coeff, token_weight, cos, sin, axes, form, degree);
  const Bounds bounds = Grouped(offsets, x).bounds;
  if (keep) {
    NewState out(x, x.size(0), bounds.count(), weight.size(0));
    const Features features = in.features({0, x.size(0), 0, x.size(1)}, 0);
    call(pom::StateArgs{features.args, {bounds.count(), bounds.data(), cumulative}, out.out}, features.u,
         POM_OPERATION(state));
    return {out.total, out.residual, out.count, features.u};
  }
  BlockStates states(x, bounds.count(), weight.size(0));
  each_block(x, weight.size(0), [&](const Block& block, int64_t first) {
    states.add(in.features(block, first), block, bounds.within(block));
  });
  states.finish(cumulative);
  return {states.out.total, states.out.residual, states.out.count, torch::stable::new_empty(x, {0, 0, 0})};
}

// A direction of tokens, as a matrix.
Tensor direction_of(const Tensor& x_tangent, const Tensor& x) {
  STD_TORCH_CHECK(x_tangent.scalar_type() == x.scalar_type() && x_tangent.is_cpu(), "x_tangent: expected the dtype of x");
  expect_shape(x_tangent, {x.size(0), x.size(1), x.size(2)}, "x_tangent");
  return matrix_of(x_tangent);
}

// The state, and its derivative along a direction of the tokens, in one pass over them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> project_state_along(
    const Tensor& x, const Tensor& x_tangent, const Tensor& weight, const Optional& bias, const Optional& coeff,
    const Optional& token_weight, const Optional& offsets, bool cumulative, const Optional& cos, const Optional& sin,
    int64_t axes, int64_t form, int64_t degree) {
  const Projected in(x, weight, bias, coeff, token_weight, cos, sin, axes, form, degree);
  const Bounds bounds = Grouped(offsets, x).bounds;
  const Tensor direction = direction_of(x_tangent, x);
  BlockStates states(x, bounds.count(), weight.size(0)), along(x, bounds.count(), weight.size(0));
  each_block(x, weight.size(0), [&](const Block& block, int64_t first) {
    const Bounds::Local local = bounds.within(block);
    const Features features = in.features(block, first);
    states.add(features, block, local);
    along.add(in.features_along(block, first, features.u, direction), block, local);
  });
  states.finish(cumulative);
  along.finish(cumulative);
  return {states.out.total, states.out.residual, states.out.count, along.out.total, along.out.residual};
}

// Gradients of every group's own tokens: with cumulative groups those of the groups behind it too.
Tensor own_gradients(const Tensor& grad_total, bool cumulative) {
  Tensor own = torch::stable::clone(torch::stable::contiguous(grad_total));
  const int64_t groups = own.size(1), channels = own.size(2);
  if (cumulative)
    with_acc(own, [&](auto acc) {
      auto* const grad = static_cast<decltype(acc)*>(own.mutable_data_ptr());
      parallel(own.size(0), [&](int64_t b) {
        std::vector<double> sum(channels);
        for (int64_t row = (b + 1) * groups - 1; row >= b * groups; --row)
          for (int64_t c = 0; c < channels; ++c) {
            sum[c] += grad[row * channels + c];
            grad[row * channels + c] = decltype(acc)(sum[c]);
          }
      });
    });
  return own;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> project_state_backward(
    const Tensor& grad_total, const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& coeff,
    const Optional& token_weight, const Optional& offsets, bool cumulative, const Optional& cos, const Optional& sin,
    int64_t axes, int64_t form, int64_t degree, const Optional& kept, bool needs_x, bool needs_weight) {
  const Projected in(x, weight, bias, coeff, token_weight, cos, sin, axes, form, degree);
  const Bounds bounds = Grouped(offsets, x).bounds;
  const int64_t groups = bounds.count(), channels = weight.size(0), dim = x.size(2);
  STD_TORCH_CHECK(grad_total.scalar_type() == acc_of(x), "grad_total: unexpected dtype");
  expect_shape(grad_total, {x.size(0), groups, channels}, "grad_total");
  const Optional kept_rows = kept_matrix(kept, x, channels);
  const Tensor own = own_gradients(grad_total, cumulative);
  const Tensor back = transposed(weight);
  Tensor grad_x = needs_x ? new_like(x) : torch::stable::new_empty(x, {0, 0, 0});
  const Tensor grad_rows = needs_x ? matrix_of(grad_x) : grad_x;
  Sum grad_weight, grad_bias, grad_coeff;
  each_block(x, channels, [&](const Block& block, int64_t first) {
    const Features features = in.features(block, first, kept_rows);
    const Bounds::Local local = bounds.within(block);
    Tensor grad_u = new_like(features.u), grad_c = new_coeff_grad(features);
    const char* const grad = static_cast<const char*>(own.const_data_ptr()) +
                             (block.sample * groups + local.first) * channels * own.element_size();
    call(pom::StateBackwardArgs{features.args, {local.count, local.data()}, grad, grad_u.mutable_data_ptr(),
                                grad_c.mutable_data_ptr()},
         features.u, POM_OPERATION(state_backward));
    const Tensor grad_matrix = matrix_of(grad_u);
    if (needs_x) {
      Tensor part = rows_of(grad_rows, first, block.rows());
      torch::stable::copy_(part, linear(grad_matrix, back));
    }
    if (needs_weight) grad_weight.add(linear(transposed(grad_matrix), transposed(in.tokens(block, first))));
    if (bias) grad_bias.add(column_sums(grad_matrix));
    grad_coeff.add(grad_c);
  }, kBackBlockBytes);
  const bool power = form_of(form) == pom::Form::power;
  const Tensor acc = torch::stable::new_empty(x, {0}, acc_of(x));
  return {grad_x, grad_weight.as(x, {needs_weight ? channels : 0, dim}), grad_bias.as(x, {bias ? channels : 0}),
          grad_coeff.as(acc, {power ? channels : 0, power ? degree : 0})};
}

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
      : x(x), rows(Projected::projected_rows(x, weight, bias, "gate_weight")), weight(weight), out_weight(out_weight),
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
                 Projected::part_of(cos, block), Projected::part_of(sin, block), axes, form, heads);
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
      using Acc = decltype(acc);
      const auto* const total = static_cast<const Acc*>(of.view.total);
      const auto* const residual = static_cast<const Acc*>(of.view.residual);
      auto* const to = static_cast<Acc*>(mean.mutable_data_ptr());
      parallel(rows, [&](int64_t row) {
        const double count = state.view.count[row];
        for (int64_t i = row * channels; i < (row + 1) * channels; ++i)
          to[i] = count == 0 ? Acc(0) : Acc((double(total[i]) + double(residual[i])) / count);
      });
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
  });
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

Tensor linear_of_tokens(const Tensor& x, const Tensor& weight, const Optional& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x: expected (N, D)");
  return linear(x, weight, bias);
}

// The 16-bit types whose products the processor has; of the others they are taken in float32.
std::string native_products() {
  std::string names;
  if (has_products_of(ScalarType::BFloat16)) names += "bfloat16 ";
  if (has_products_of(ScalarType::Half)) names += "float16 ";
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def("native_products() -> str");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "project_state(Tensor x, Tensor weight, Tensor? bias, Tensor? coeff, Tensor? token_weight, Tensor? offsets, "
      "bool cumulative, Tensor? cos, Tensor? sin, int axes, int form, int degree, bool keep) "
      "-> (Tensor total, Tensor residual, Tensor count, Tensor kept)");
  m.def(
      "project_state_along(Tensor x, Tensor x_tangent, Tensor weight, Tensor? bias, Tensor? coeff, "
      "Tensor? token_weight, Tensor? offsets, bool cumulative, Tensor? cos, Tensor? sin, int axes, int form, "
      "int degree) -> (Tensor total, Tensor residual, Tensor count, Tensor total_tangent, Tensor residual_tangent)");
  m.def(
      "project_state_backward(Tensor grad_total, Tensor x, Tensor weight, Tensor? bias, Tensor? coeff, "
      "Tensor? token_weight, Tensor? offsets, bool cumulative, Tensor? cos, Tensor? sin, int axes, int form, "
      "int degree, Tensor? kept, bool needs_x, bool needs_weight) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_coeff)");
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
  m.impl("linear", TORCH_BOX(&linear_of_tokens));
  m.impl("project_state", TORCH_BOX(&project_state));
  m.impl("project_state_along", TORCH_BOX(&project_state_along));
  m.impl("project_state_backward", TORCH_BOX(&project_state_backward));
  m.impl("project_readout", TORCH_BOX(&project_readout));
  m.impl("project_readout_backward", TORCH_BOX(&project_readout_backward));
  m.impl("project_readout_along", TORCH_BOX(&project_readout_along));
  m.impl("folded_readout", TORCH_BOX(&folded_readout));
  m.impl("folded_readout_along", TORCH_BOX(&folded_readout_along));
}

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CompositeExplicitAutograd, m) {
  m.impl("native_products", TORCH_BOX(&native_products));
}
