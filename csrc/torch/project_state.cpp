// The state of tokens whose projections are held a block at a time, in the processor's cache, and never all of them. On the
// CPU: the products are torch's, what is between them are the operations of pom.h.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "residual.h"
#include "torch/projections.h"

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

  Tensor as_tokens(const Tensor& matrix, const Block& block) const {
    return torch::stable::view(matrix, {block.samples, block.tokens, weight.size(0)});
  }

 private:
  Optional weights(const Block& block) const {
    if (!token_weight) return {};
    Tensor samples = rows_of(*token_weight, block.sample, block.samples);
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
  Plain offsets;
  Bounds bounds;
  Grouped(const Optional& offsets_, const Tensor& x)
      : offsets(offsets_, x, ScalarType::Long, {offsets_ ? offsets_->size(0) : 0}, "offsets"),
        bounds(offsets, x.size(1), offsets_ ? offsets_->size(0) - 1 : 1) {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor> project_state(const Tensor& x, const Tensor& weight, const Optional& bias,
                                                         const Optional& coeff, const Optional& token_weight,
                                                         const Optional& offsets, bool cumulative,
                                                         const Optional& total, const Optional& residual,
                                                         const Optional& count, const Optional& cos,
                                                         const Optional& sin, int64_t axes, int64_t form,
                                                         int64_t degree, bool keep) {
  const Projected in(x, weight, bias, coeff, token_weight, cos, sin, axes, form, degree);
  const Prior prior(total, residual, count, x, weight.size(0));
  const Bounds bounds = Grouped(offsets, x).bounds;
  if (keep) {
    NewState out(x, x.size(0), bounds.count(), weight.size(0));
    const Features features = in.features({0, x.size(0), 0, x.size(1)}, 0);
    call(pom::StateArgs{features.args, {bounds.count(), bounds.data(), cumulative}, out.out, prior.view}, features.u,
         POM_OPERATION(state));
    return {out.total, out.residual, out.count, features.u};
  }
  BlockStates states(x, bounds.count(), weight.size(0), prior.view);
  each_block(x, weight.size(0), [&](const Block& block, int64_t first) {
    states.add(in.features(block, first), block, bounds.within(block));
  });
  states.finish(cumulative);
  return {states.out.total, states.out.residual, states.out.count, torch::stable::new_empty(x, {0, 0, 0})};
}

// The state, and its derivative along directions of the tokens and of what came before, in one pass over the tokens.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> project_state_along(
    const Tensor& x, const Tensor& x_tangent, const Tensor& weight, const Optional& bias, const Optional& coeff,
    const Optional& token_weight, const Optional& offsets, bool cumulative, const Optional& total,
    const Optional& residual, const Optional& count, const Optional& total_tangent, const Optional& residual_tangent,
    const Optional& cos, const Optional& sin, int64_t axes, int64_t form, int64_t degree) {
  const Projected in(x, weight, bias, coeff, token_weight, cos, sin, axes, form, degree);
  const Bounds bounds = Grouped(offsets, x).bounds;
  const Tensor direction = direction_of(x_tangent, x);
  const int64_t channels = weight.size(0);
  const Prior prior(total, residual, count, x, channels);
  const Prior moved(total_tangent, residual_tangent, total_tangent ? count : Optional(), x, channels);
  BlockStates states(x, bounds.count(), channels, prior.view), along(x, bounds.count(), channels, moved.view);
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def(
      "project_state(Tensor x, Tensor weight, Tensor? bias, Tensor? coeff, Tensor? token_weight, Tensor? offsets, "
      "bool cumulative, Tensor? total, Tensor? residual, Tensor? count, Tensor? cos, Tensor? sin, int axes, int form, "
      "int degree, bool keep) -> (Tensor total, Tensor residual, Tensor count, Tensor kept)");
  m.def(
      "project_state_along(Tensor x, Tensor x_tangent, Tensor weight, Tensor? bias, Tensor? coeff, "
      "Tensor? token_weight, Tensor? offsets, bool cumulative, Tensor? total, Tensor? residual, Tensor? count, "
      "Tensor? total_tangent, Tensor? residual_tangent, Tensor? cos, Tensor? sin, int axes, int form, int degree) "
      "-> (Tensor total, Tensor residual, Tensor count, Tensor total_tangent, Tensor residual_tangent)");
  m.def(
      "project_state_backward(Tensor grad_total, Tensor x, Tensor weight, Tensor? bias, Tensor? coeff, "
      "Tensor? token_weight, Tensor? offsets, bool cumulative, Tensor? cos, Tensor? sin, int axes, int form, "
      "int degree, Tensor? kept, bool needs_x, bool needs_weight) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_coeff)");
}

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CPU, m) {
  m.impl("project_state", TORCH_BOX(&project_state));
  m.impl("project_state_along", TORCH_BOX(&project_state_along));
  m.impl("project_state_backward", TORCH_BOX(&project_state_backward));
}
