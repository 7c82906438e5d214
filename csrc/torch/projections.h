// Tokens with their projections turned into the argument structs of pom.h, for the CPU and the fused kernels of GPUs.
#pragma once

#include "torch/tensors.h"

namespace pom_torch {

// Tokens (B, N, D) as they lie, or a copy if the kernels cannot read them so.
struct TokenArg {
  Tensor tensor;
  pom::Tokens args;

  // For a kernel of a GPU: channels next to each other.
  static TokenArg of_gpu(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3, "x: expected (B, N, D)");
    const Tensor t = channels_together(x);
    return {t, {t.const_data_ptr(), t.stride(0), t.stride(1)}};
  }
  // For the CPU, which takes them as a matrix: a copy only if their strides forbid a view.
  static TokenArg of_cpu(const Tensor& t, const Tensor& like, int64_t width, const char* name) {
    STD_TORCH_CHECK(t.dim() == 3 && t.is_cpu(), name, ": expected (B, N, D) on the CPU");
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of x");
    expect_shape(t, {like.size(0), like.size(1), width}, name);
    const Tensor matrix = torch::stable::reshape(t, {t.size(0) * t.size(1), width});
    return {matrix, {matrix.const_data_ptr(), t.size(1) * matrix.stride(0), matrix.stride(0), matrix.stride(1)}};
  }
};

// The weight (out, in) of a projection and its bias, in memory without gaps.
struct Projection {
  Tensor weight;
  Optional bias;
  Projection(const Tensor& weight_, const Optional& bias_, const Tensor& like, int64_t inputs, const char* name)
      : weight(torch::stable::contiguous(weight_)),
        bias(bias_ ? Optional(torch::stable::contiguous(*bias_)) : Optional()) {
    STD_TORCH_CHECK(weight.dim() == 2, name, ": expected a matrix");
    expect_shape(weight, {weight.size(0), inputs}, name);
    if (bias) expect_shape(*bias, {weight.size(0)}, name);
    for (const Tensor* t : {&weight, bias ? &*bias : &weight}) {
      expect_device(*t, like, name);
      STD_TORCH_CHECK(t->scalar_type() == like.scalar_type(), name, ": expected the dtype of x");
    }
  }
  const void* bias_data() const { return bias ? bias->const_data_ptr() : nullptr; }
};

#define POM_PROJECTED                                                                                                \
  "Tensor x, Tensor context_weight, Tensor? context_bias, Tensor? coeff, Tensor? weight, Tensor? cos, Tensor? sin, " \
  "int axes, int form, int degree, Tensor? offsets, bool cumulative"
struct ProjectedInputs {
  Tensor x, context_weight;
  Optional context_bias, coeff, weight, cos, sin;
  int64_t axes, form, degree;
  Optional offsets;
  bool cumulative;
  static ProjectedInputs read(Arguments& from) {
    return {from.tensor(),   from.tensor(),  from.optional(), from.optional(), from.optional(), from.optional(),
            from.optional(), from.integer(), from.integer(),  from.integer(),  from.optional(), from.boolean()};
  }
};

// Tokens, their projection and what the polynomial takes beside them.
struct Projected {
  TokenArg x;
  Projection projection;
  DenseArg coeff, weight, offsets;
  Angles angles;
  pom::ProjectStateArgs args;

  Projected(const ProjectedInputs& in, const TokenArg& tokens)
      : x(tokens),
        projection(in.context_weight, in.context_bias, in.x, in.x.size(2), "context_weight"),
        coeff(in.coeff, in.x, acc_of(in.x), {channels(), in.degree}, "coeff"),
        weight(in.weight, in.x, acc_of(in.x), {in.x.size(0), in.x.size(1)}, "weight"),
        offsets(in.offsets, in.x, ScalarType::Long, {in.offsets ? in.offsets->size(0) : 0}, "offsets"),
        angles(in.cos, in.sin, in.axes, in.x.size(1), in.x) {
    pom::Features& f = args.features;
    set_polynomial(f, in.form, in.degree, channels(), "context_weight");
    f.dtype = dtype_of(in.x, "x");
    f.batch = in.x.size(0), f.tokens = in.x.size(1);
    f.coeff = coeff.data(), f.weight = weight.data(), f.rotary = angles.rotary;
    args.x = x.args, args.dim = in.x.size(2);
    args.weight = projection.weight.const_data_ptr(), args.bias = projection.bias_data();
    args.groups = {in.offsets ? in.offsets->size(0) - 1 : 1, checked_offsets(offsets, in.x.size(1)), in.cumulative};
  }
  int64_t channels() const { return projection.weight.size(0); }
};

#define POM_READING                                             \
  "Tensor x, Tensor gate_weight, Tensor? gate_bias, " POM_STATE \
  ", Tensor out_weight, Tensor? out_bias, "                     \
  "Tensor? offsets, Tensor? gate_cos, Tensor? gate_sin, int gate_axes, int form"
struct ReadingInputs {
  Tensor x, gate_weight;
  Optional gate_bias;
  StateInputs state;
  Tensor out_weight;
  Optional out_bias, offsets, cos, sin;
  int64_t axes, form;
  static ReadingInputs read(Arguments& from) {
    return {from.tensor(),   from.tensor(),   from.optional(), StateInputs::read(from), from.tensor(), from.optional(),
            from.optional(), from.optional(), from.optional(), from.integer(),          from.integer()};
  }
};

// Queries, the projections before and behind the gates, and the state that is read.
struct Reading {
  TokenArg x;
  Projection gates, out;
  State state;
  DenseArg offsets;
  Angles angles;
  pom::Form form;
  Tensor like;

  Reading(const ReadingInputs& in, const TokenArg& tokens)
      : x(tokens),
        gates(in.gate_weight, in.gate_bias, in.x, in.x.size(2), "gate_weight"),
        out(in.out_weight, in.out_bias, in.x, in.state.total.size(2), "out_weight"),
        state(in.state, in.x),
        offsets(in.offsets, in.x, ScalarType::Long, {in.state.total.size(1) + 1}, "offsets"),
        angles(in.cos, in.sin, in.axes, in.x.size(1), in.x),
        form(form_of(in.form)),
        like(in.x) {}

  pom::FoldedReadoutArgs args(int64_t heads, void* y) const {
    const Tensor& total = *state.total.tensor;
    return {form,
            dtype_of(like, "x"),
            like.size(0),
            like.size(1),
            like.size(2),
            heads,
            total.size(2),
            out.weight.size(0),
            x.args,
            gates.weight.const_data_ptr(),
            gates.bias_data(),
            out.weight.const_data_ptr(),
            out.bias_data(),
            total.size(1),
            checked_offsets(offsets, like.size(1)),
            state.view,
            y,
            {},
            angles.rotary};
  }
  Tensor new_y() const {
    return new_result(like, {like.size(0), like.size(1), out.weight.size(0)}, like.scalar_type());
  }
};

}  // namespace pom_torch
