// What operations that project tokens block by block have in common.
#pragma once

#include "torch/blocks.h"
#include "torch/linear.h"

namespace pom_torch {

// Tokens (B, N, D) as a matrix, checked against the projection that they take.
inline Tensor projected_rows(const Tensor& x, const Tensor& weight, const Optional& bias, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_cpu(), "x: expected (B, N, D) on the CPU");
  for (const Tensor* t : {&weight, bias ? &*bias : nullptr})
    if (t) STD_TORCH_CHECK(t->scalar_type() == x.scalar_type() && t->is_cpu(), name, ": expected the dtype of x");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(2), name, ": unexpected shape");
  return matrix_of(x);
}

// The rows of a table that belong to the tokens of a block.
inline Optional part_of(const Optional& table, const Block& block) {
  return table ? Optional(rows_of(*table, block.token, block.tokens)) : Optional();
}

// What the forward saved of its projections (B, N, C), as a matrix.
inline Optional saved_matrix(const Optional& saved, const Tensor& x, int64_t width) {
  if (!saved || saved->size(0) != x.size(0) || saved->size(1) != x.size(1) || saved->size(2) != width) return {};
  STD_TORCH_CHECK(saved->is_contiguous() && saved->scalar_type() == x.scalar_type(),
                  "saved_projection: expected as it was returned");
  return matrix_of(*saved);
}

// The direction of a derivative: of the tokens, and of the state they are added to or read. None, or x_tangent at least.
#define POM_TANGENTS "Tensor? x_tangent, Tensor? total_tangent, Tensor? residual_tangent"
struct TangentInputs {
  Optional x, total, residual;
  static TangentInputs read(Arguments& from) { return {from.optional(), from.optional(), from.optional()}; }
};

inline Tensor empty_result(const Tensor& like) { return torch::stable::new_empty(like, {0, 0, 0}); }

// A direction of tokens, as a matrix.
inline Tensor direction_of(const Tensor& x_tangent, const Tensor& x) {
  STD_TORCH_CHECK(x_tangent.scalar_type() == x.scalar_type() && x_tangent.is_cpu(), "x_tangent: expected the dtype of x");
  expect_shape(x_tangent, {x.size(0), x.size(1), x.size(2)}, "x_tangent");
  return matrix_of(x_tangent);
}

}  // namespace pom_torch
