// States and readouts of tokens that are projected on the way, on a CPU: a block at a time, by torch's matrix product.

#include "torch/linear.h"
#include "torch/projections.h"

namespace {

using namespace pom_torch;

// The direction of a derivative: of the tokens, and of the state that they are added to or read. None, or at least `x`.
#define POM_TANGENTS "Tensor? x_tangent, Tensor? total_tangent, Tensor? residual_tangent"
struct TangentInputs {
  Optional x, total, residual;
  static TangentInputs read(Arguments& from) { return {from.optional(), from.optional(), from.optional()}; }
};

// The pointer to a tensor without elements is null, which pom.h takes for a result that nobody needs.
Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0, 0, 0}); }

// Projections (B, N, C) of all tokens, as they are saved for the backward pass.
Tensor project_all(const TokenArg& x, const Projection& projection, const Tensor& like) {
  return torch::stable::view(linear(x.tensor, projection.weight, projection.bias),
                             {like.size(0), like.size(1), projection.weight.size(0)});
}

// Projections that were saved, or null for none.
const void* saved_data(const Optional& saved, const Tensor& x, int64_t width) {
  if (!saved || saved->size(0) != x.size(0) || saved->size(1) != x.size(1) || saved->size(2) != width) return nullptr;
  STD_TORCH_CHECK(saved->is_contiguous() && saved->scalar_type() == x.scalar_type(),
                  "saved_projection: expected as it was returned");
  return saved->const_data_ptr();
}

TokenArg tokens_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected (B, N, D) on the CPU");
  return TokenArg::of_cpu(x, x, x.size(2), "x");
}

Tensors<6> project_state(const ProjectedInputs& in, const PriorInputs& before, const TangentInputs& tangent,
                         bool save_projection) {
  Projected call_of(in, tokens_of(in.x));
  pom::ProjectStateArgs& args = call_of.args;
  const Prior prior(before, in.x, call_of.channels());
  NewState out(in.x, in.x.size(0), args.groups.count, call_of.channels());
  args.out = out.out, args.prior = prior.view;
  if (save_projection) {
    STD_TORCH_CHECK(!tangent.x, "save_projection: expected no tangents");
    const Tensor u = project_all(call_of.x, call_of.projection, in.x);
    const Features features({u, in.coeff, {}, {}, in.weight, in.cos, in.sin, in.axes, in.form, in.degree});
    call(pom::StateArgs{features.args, args.groups, out.out, prior.view}, u, POM_OPERATION(state));
    return {out.total, out.residual, out.count, nothing(in.x), nothing(in.x), u};
  }
  TorchProducts products;
  args.linear = products.linear();
  if (!tangent.x) {
    call_cpu(args, in.x, pom::cpu::project_state);
    return {out.total, out.residual, out.count, nothing(in.x), nothing(in.x), nothing(in.x)};
  }
  const TokenArg x_tangent = TokenArg::of_cpu(*tangent.x, in.x, in.x.size(2), "x_tangent");
  const Prior prior_tangent({tangent.total, tangent.residual, tangent.total ? before.count : Optional()}, in.x,
                            call_of.channels());
  NewState derived(in.x, in.x.size(0), args.groups.count, call_of.channels());
  args.x_tangent = x_tangent.args, args.prior_tangent = prior_tangent.view, args.tangent_out = derived.out;
  call_cpu(args, in.x, pom::cpu::project_state);
  return {out.total, out.residual, out.count, derived.total, derived.residual, nothing(in.x)};
}

Tensors<4> project_state_backward(const Tensor& grad_total, const ProjectedInputs& in, const Optional& saved_projection,
                                  bool needs_x, bool needs_weight) {
  Projected call_of(in, tokens_of(in.x));
  const int64_t channels = call_of.channels(), dim = in.x.size(2);
  const bool power = call_of.args.features.form == pom::Form::power;
  const DenseArg grad(grad_total, in.x, acc_of(in.x), {in.x.size(0), call_of.args.groups.count, channels},
                      "grad_total");
  Tensor grad_x = needs_x ? new_like(in.x) : nothing(in.x),
         grad_weight = new_result(in.x, {needs_weight ? channels : 0, dim}, in.x.scalar_type()),
         grad_bias = new_result(in.x, {in.context_bias ? channels : 0}, in.x.scalar_type()),
         grad_coeff = new_result(in.x, {power ? channels : 0, power ? in.degree : 0}, acc_of(in.x));
  TorchProducts products;
  call_of.args.linear = products.linear();
  call_cpu(pom::ProjectStateBackwardArgs{call_of.args, grad.data(), saved_data(saved_projection, in.x, channels),
                                         grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr(),
                                         grad_bias.mutable_data_ptr(), grad_coeff.mutable_data_ptr()},
           in.x, pom::cpu::project_state_backward);
  return {grad_x, grad_weight, grad_bias, grad_coeff};
}

// A readout with room for y and, along a direction, its derivative.
struct ReadoutCall {
  Reading reading;
  TorchProducts products;
  Tensor y, y_tangent;
  std::optional<TokenArg> x_tangent;
  std::optional<State> state_tangent;

  ReadoutCall(const ReadingInputs& in, const TangentInputs& tangent)
      : reading(in, tokens_of(in.x)), y(reading.new_y()), y_tangent(tangent.x ? reading.new_y() : nothing(in.x)) {
    if (!tangent.x) return;
    STD_TORCH_CHECK(tangent.total && tangent.residual, "total_tangent, residual_tangent: expected with x_tangent");
    x_tangent = TokenArg::of_cpu(*tangent.x, in.x, in.x.size(2), "x_tangent");
    state_tangent.emplace(PriorInputs{tangent.total, tangent.residual, {}}, in.x, in.state.total.size(1),
                          in.state.total.size(2));
  }
  pom::FoldedReadoutArgs args(int64_t heads) {
    pom::FoldedReadoutArgs args = reading.args(heads, y.mutable_data_ptr());
    args.linear = products.linear();
    if (x_tangent)
      args.x_tangent = x_tangent->args, args.state_tangent = state_tangent->view,
      args.y_tangent = y_tangent.mutable_data_ptr();
    return args;
  }
};

Tensors<3> project_readout(const ReadingInputs& in, int64_t heads, const TangentInputs& tangent, bool save_projection) {
  ReadoutCall readout(in, tangent);
  STD_TORCH_CHECK(!(tangent.x && save_projection), "save_projection: expected no tangents");
  const Tensor gate = save_projection ? project_all(readout.reading.x, readout.reading.gates, in.x) : nothing(in.x);
  call_cpu(pom::ProjectReadoutArgs{readout.args(heads), save_projection ? gate.const_data_ptr() : nullptr}, in.x,
           pom::cpu::project_readout);
  return {readout.y, readout.y_tangent, gate};
}

Tensors<6> project_readout_backward(const Tensor& grad_y, const ReadingInputs& in, int64_t heads,
                                    const Optional& saved_projection) {
  const Reading reading(in, tokens_of(in.x));
  const int64_t gates = reading.gates.weight.size(0), dim = in.x.size(2), out_dim = reading.out.weight.size(0);
  const ScalarType dtype = in.x.scalar_type();
  Tensor grad_x = new_like(in.x), grad_total = new_like(*reading.state.total.tensor),
         grad_gate_weight = new_result(in.x, {gates, dim}, dtype),
         grad_gate_bias = new_result(in.x, {in.gate_bias ? gates : 0}, dtype),
         grad_out_weight = new_result(in.x, {out_dim, in.state.total.size(2)}, dtype),
         grad_out_bias = new_result(in.x, {in.out_bias ? out_dim : 0}, dtype);
  const TokenArg dy = TokenArg::of_cpu(grad_y, in.x, out_dim, "grad_y");
  TorchProducts products;
  pom::FoldedReadoutArgs args = reading.args(heads, nullptr);
  args.linear = products.linear();
  call_cpu(pom::ProjectReadoutBackwardArgs{{args, saved_data(saved_projection, in.x, gates)},
                                           dy.args,
                                           grad_x.mutable_data_ptr(),
                                           grad_gate_weight.mutable_data_ptr(),
                                           grad_gate_bias.mutable_data_ptr(),
                                           grad_total.mutable_data_ptr(),
                                           grad_out_weight.mutable_data_ptr(),
                                           grad_out_bias.mutable_data_ptr()},
           in.x, pom::cpu::project_readout_backward);
  return {grad_x, grad_gate_weight, grad_gate_bias, grad_total, grad_out_weight, grad_out_bias};
}

Tensors<2> folded_readout(const ReadingInputs& in, const TangentInputs& tangent) {
  ReadoutCall readout(in, tangent);
  call_cpu(readout.args(in.gate_weight.size(0)), in.x, pom::cpu::folded_readout);
  return {readout.y, readout.y_tangent};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def("project_state(" POM_PROJECTED ", " POM_PRIOR ", " POM_TANGENTS ", bool save_projection) -> (" POM_STATE
        ", Tensor total_tangent_out, Tensor residual_tangent_out, Tensor saved_projection)");
  m.def(
      "project_state_backward(Tensor grad_total, " POM_PROJECTED
      ", Tensor? saved_projection, bool needs_x, "
      "bool needs_weight) -> (Tensor grad_x, Tensor grad_context_weight, Tensor grad_context_bias, Tensor grad_coeff)");
  m.def("project_readout(" POM_READING ", int heads, " POM_TANGENTS
        ", bool save_projection) "
        "-> (Tensor y, Tensor y_tangent, Tensor saved_projection)");
  m.def("project_readout_backward(Tensor grad_y, " POM_READING
        ", int heads, Tensor? saved_projection) "
        "-> (Tensor grad_x, Tensor grad_gate_weight, Tensor grad_gate_bias, Tensor grad_total, Tensor grad_out_weight, "
        "Tensor grad_out_bias)");
  m.def("folded_readout(" POM_READING ", " POM_TANGENTS ") -> (Tensor y, Tensor y_tangent)");
}

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CPU, m) {
  m.impl("project_state", Boxed<&project_state>::call);
  m.impl("project_state_backward", Boxed<&project_state_backward>::call);
  m.impl("project_readout", Boxed<&project_readout>::call);
  m.impl("project_readout_backward", Boxed<&project_readout_backward>::call);
  m.impl("folded_readout", Boxed<&folded_readout>::call);
}
