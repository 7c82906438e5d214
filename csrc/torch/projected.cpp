// The state of tokens whose projections are held a block at a time, in the processor's cache, and never all of them. On the
// CPU: the products are torch's, what is between them are the operations of pom.h.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "residual.h"
#include "torch/projections.h"

namespace {

using namespace pom_torch;

#define POM_PROJECTED                                                                                       \
  "Tensor x, Tensor context_weight, Tensor? context_bias, Tensor? coeff, Tensor? weight, Tensor? cos, Tensor? sin, " \
  "int axes, int form, int degree, Tensor? offsets, bool cumulative"
struct ProjectedInputs {
  Tensor x, context_weight;
  Optional context_bias, coeff, weight, cos, sin;
  int64_t axes, form, degree;
  Optional offsets;
  bool cumulative;
  static ProjectedInputs read(Arguments& from) {
    return {from.tensor(),   from.tensor(),   from.optional(), from.optional(), from.optional(), from.optional(),
            from.optional(), from.integer(),  from.integer(),  from.integer(),  from.optional(), from.boolean()};
  }
};

// Tokens and what their projections are summed with.
struct Projected {
  const ProjectedInputs& in;
  Tensor rows;  // x as a matrix

  explicit Projected(const ProjectedInputs& in)
      : in(in), rows(projected_rows(in.x, in.context_weight, in.context_bias, "context_weight")) {
    if (in.weight) expect_shape(*in.weight, {in.x.size(0), in.x.size(1)}, "weight");
    for (const Optional* table : {&in.cos, &in.sin})
      if (*table)
        STD_TORCH_CHECK((*table)->dim() == 2 && (*table)->size(0) == in.x.size(1), "cos, sin: unexpected shape");
  }

  // The tokens of a block as a matrix, and their projections as the operations take them.
  Tensor tokens(const Block& block, int64_t first) const { return rows_of(rows, first, block.rows()); }
  Features features(const Block& block, int64_t first, const Optional& saved = {}) const {
    return features_at(block, as_tokens(saved ? rows_of(*saved, first, block.rows())
                                              : linear(tokens(block, first), in.context_weight, in.context_bias),
                                        block));
  }
  // The derivative of these, at u, along a direction of the tokens, a matrix.
  Features features_along(const Block& block, int64_t first, const Tensor& u, const Tensor& direction) const {
    const Tensor along = as_tokens(linear(rows_of(direction, first, block.rows()), in.context_weight), block);
    const Optional& c = in.coeff;
    return features_at(block, u, along, c ? torch::stable::new_zeros(*c, {c->size(0), c->size(1)}) : c);
  }

  Tensor as_tokens(const Tensor& matrix, const Block& block) const {
    return torch::stable::view(matrix, {block.samples, block.tokens, in.context_weight.size(0)});
  }

 private:
  Features features_at(const Block& block, const Tensor& u, const Optional& u_tangent = {},
                       const Optional& coeff_tangent = {}) const {
    return Features({u, in.coeff, u_tangent, coeff_tangent, weights(block), part_of(in.cos, block),
                     part_of(in.sin, block), in.axes, in.form, in.degree});
  }
  Optional weights(const Block& block) const {
    if (!in.weight) return {};
    Tensor samples = rows_of(*in.weight, block.sample, block.samples);
    return torch::stable::narrow(samples, 1, block.token, block.tokens);
  }
};

// The states of all groups, summed from those of the blocks and what came before.
class BlockStates {
 public:
  BlockStates(const Tensor& x, int64_t groups, int64_t channels, const pom::StateView& prior)
      : out(x, x.size(0), groups, channels), x_(x), groups_(groups), channels_(channels), prior_(prior),
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
      using Acc = decltype(acc);
      auto *const total = static_cast<Acc*>(out.out.total), *const residual = static_cast<Acc*>(out.out.residual);
      parallel(x_.size(0), [&](int64_t b) {
        for (int64_t row = b * groups_; row < (b + 1) * groups_; ++row) {
          double* const sums = &sums_[row * channels_];
          if (cumulative && row > b * groups_) {
            for (int64_t c = 0; c < channels_; ++c) sums[c] += sums[c - channels_];
            counts_[row] += counts_[row - 1];
          }
          for (int64_t c = 0, i = row * channels_; c < channels_; ++c, ++i) {
            double sum = sums[c];
            const double rest = pom::add_prior<Acc>(prior_, b * channels_ + c, sum);
            pom::split(sum, rest, total[i], residual[i]);
          }
          out.out.count[row] = counts_[row] + (prior_.count ? prior_.count[b] : 0.0);
        }
      });
    });
  }

  NewState out;

 private:
  Tensor x_;
  int64_t groups_, channels_;
  pom::StateView prior_;
  std::vector<double> sums_, counts_;
};

// The groups of the tokens x (B, N, D) by their offsets.
struct Grouped {
  DenseArg offsets;
  Bounds bounds;
  Grouped(const Optional& offsets_, const Tensor& x)
      : offsets(offsets_, x, ScalarType::Long, {offsets_ ? offsets_->size(0) : 0}, "offsets"),
        bounds(offsets, x.size(1), offsets_ ? offsets_->size(0) - 1 : 1) {}
};

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The state and, along directions of the tokens and of what came before, its derivative, in one pass over the tokens.
SixTensors project_state_along(const Projected& p, const Prior& prior, const PriorInputs& before,
                               const TangentInputs& tangent, const Bounds& bounds) {
  const Tensor &x = p.in.x, direction = direction_of(*tangent.x, x);
  const int64_t channels = p.in.context_weight.size(0);
  const Prior moved({tangent.total, tangent.residual, tangent.total ? before.count : Optional()}, x, channels);
  BlockStates states(x, bounds.count(), channels, prior.view), along(x, bounds.count(), channels, moved.view);
  each_block(x, channels, [&](const Block& block, int64_t first) {
    const Bounds::Local local = bounds.within(block);
    const Features features = p.features(block, first);
    states.add(features, block, local);
    along.add(p.features_along(block, first, features.u, direction), block, local);
  });
  states.finish(p.in.cumulative);
  along.finish(p.in.cumulative);
  return {states.out.total, states.out.residual, states.out.count, along.out.total, along.out.residual,
          empty_result(x)};
}

SixTensors project_state(const ProjectedInputs& in, const PriorInputs& before, const TangentInputs& tangent,
                         bool save_projection) {
  const Projected p(in);
  const Tensor& x = in.x;
  const int64_t channels = in.context_weight.size(0);
  const Prior prior(before, x, channels);
  const Bounds bounds = Grouped(in.offsets, x).bounds;
  if (tangent.x) {
    STD_TORCH_CHECK(!save_projection, "save_projection: expected no tangents");
    return project_state_along(p, prior, before, tangent, bounds);
  }
  if (save_projection) {
    NewState out(x, x.size(0), bounds.count(), channels);
    const Features features = p.features({0, x.size(0), 0, x.size(1)}, 0);
    call(pom::StateArgs{features.args, {bounds.count(), bounds.data(), in.cumulative}, out.out, prior.view}, features.u,
         POM_OPERATION(state));
    return {out.total, out.residual, out.count, empty_result(x), empty_result(x), features.u};
  }
  BlockStates states(x, bounds.count(), channels, prior.view);
  each_block(x, channels, [&](const Block& block, int64_t first) {
    states.add(p.features(block, first), block, bounds.within(block));
  });
  states.finish(in.cumulative);
  return {states.out.total, states.out.residual, states.out.count, empty_result(x), empty_result(x), empty_result(x)};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> project_state_backward(const Tensor& grad_total, const ProjectedInputs& in,
                                                                  const Optional& saved_projection, bool needs_x,
                                                                  bool needs_weight) {
  const Projected p(in);
  const Tensor &x = in.x, &weight = in.context_weight;
  const Optional& bias = in.context_bias;
  const Bounds bounds = Grouped(in.offsets, x).bounds;
  const int64_t groups = bounds.count(), channels = weight.size(0), dim = x.size(2);
  STD_TORCH_CHECK(grad_total.scalar_type() == acc_of(x), "grad_total: unexpected dtype");
  expect_shape(grad_total, {x.size(0), groups, channels}, "grad_total");
  const Optional saved_rows = saved_matrix(saved_projection, x, channels);
  const Tensor own = own_gradients(grad_total, in.cumulative);
  const Tensor back = transposed(weight);
  Tensor grad_x = needs_x ? new_like(x) : torch::stable::new_empty(x, {0, 0, 0});
  const Tensor grad_rows = needs_x ? matrix_of(grad_x) : grad_x;
  Sum grad_weight, grad_bias, grad_coeff;
  each_block(x, channels, [&](const Block& block, int64_t first) {
    const Features features = p.features(block, first, saved_rows);
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
    if (needs_weight) grad_weight.add(linear(transposed(grad_matrix), transposed(p.tokens(block, first))));
    if (bias) grad_bias.add(column_sums(grad_matrix));
    grad_coeff.add(grad_c);
  }, kBackBlockBytes);
  const bool power = form_of(in.form) == pom::Form::power;
  const Tensor acc = torch::stable::new_empty(x, {0}, acc_of(x));
  return {grad_x, grad_weight.as(x, {needs_weight ? channels : 0, dim}), grad_bias.as(x, {bias ? channels : 0}),
          grad_coeff.as(acc, {power ? channels : 0, power ? in.degree : 0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def(
      "project_state(" POM_PROJECTED ", " POM_PRIOR ", " POM_TANGENTS ", bool save_projection) -> (" POM_STATE
      ", Tensor total_tangent_out, Tensor residual_tangent_out, Tensor saved_projection)");
  m.def(
      "project_state_backward(Tensor grad_total, " POM_PROJECTED ", Tensor? saved_projection, bool needs_x, "
      "bool needs_weight) -> (Tensor grad_x, Tensor grad_context_weight, Tensor grad_context_bias, Tensor grad_coeff)");
}

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CPU, m) {
  m.impl("project_state", Boxed<&project_state>::call);
  m.impl("project_state_backward", Boxed<&project_state_backward>::call);
}
