// The operations as torch sees them: schemas, and results made and filled. With its two headers the only code that
// knows torch, through its stable ABI alone, so that one build serves later versions of torch and Python.

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "torch/arguments.h"

namespace {

using namespace pom_torch;

std::tuple<Tensor, Tensor, Tensor> state(const Tensor& u, const Optional& coeff, const Optional& u_tangent,
                                         const Optional& coeff_tangent, const Optional& weight, const Optional& mask,
                                         const Optional& offsets, bool cumulative, const Optional& total,
                                         const Optional& residual, const Optional& count, const Optional& cos,
                                         const Optional& sin, int64_t axes, int64_t form, int64_t degree) {
  const Features features(u, coeff, u_tangent, coeff_tangent, weight, cos, sin, axes, form, degree);
  const Groups groups(features, mask, offsets, cumulative);
  const Prior prior(total, residual, count, u, u.size(2));
  NewState out(u, u.size(0), groups.args.count, u.size(2));
  call(pom::StateArgs{features.args, groups.args, out.out, prior.view}, u, POM_OPERATION(state));
  return {out.total, out.residual, out.count};
}

// What is written in place must be the caller's own memory.
void expect_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, since it is written in place");
}

// Adds all tokens to a state in place or, if there is nothing in it yet, makes it theirs and what came before's.
void add_to_state(const Tensor& u, const Optional& coeff, const Optional& weight, const Optional& prior_total,
                  const Optional& prior_residual, const Optional& prior_count, const Optional& cos,
                  const Optional& sin, int64_t axes, int64_t form, int64_t degree, bool empty, Tensor total,
                  Tensor residual, Tensor count) {
  const Features features(u, coeff, {}, {}, weight, cos, sin, axes, form, degree);
  const Prior prior(prior_total, prior_residual, prior_count, u, u.size(2));
  const Prior state(total, residual, count, u, u.size(2));
  STD_TORCH_CHECK(empty || !prior_total, "prior: expected None, since the state is added to");
  expect_contiguous(total, "total");
  expect_contiguous(residual, "residual");
  expect_contiguous(count, "count");
  const pom::StateOut out = {total.mutable_data_ptr(), residual.mutable_data_ptr(),
                             static_cast<double*>(count.mutable_data_ptr())};
  call(pom::StateArgs{features.args, {}, out, empty ? prior.view : state.view}, u, POM_OPERATION(state));
}

std::tuple<Tensor, Tensor> state_backward(const Tensor& grad_total, const Tensor& u, const Optional& coeff,
                                          const Optional& u_tangent, const Optional& coeff_tangent,
                                          const Optional& weight, const Optional& mask, const Optional& offsets,
                                          bool cumulative, const Optional& cos, const Optional& sin, int64_t axes,
                                          int64_t form, int64_t degree) {
  const Features features(u, coeff, u_tangent, coeff_tangent, weight, cos, sin, axes, form, degree);
  const Groups groups(features, mask, offsets, cumulative);
  const Plain grad(grad_total, u, acc_of(u), {u.size(0), groups.args.count, u.size(2)}, "grad_total");
  Tensor grad_u = new_like(u), grad_coeff = new_coeff_grad(features);
  call(pom::StateBackwardArgs{features.args, groups.args, grad.data(), grad_u.mutable_data_ptr(),
                              grad_coeff.mutable_data_ptr()},
       u, POM_OPERATION(state_backward));
  return {grad_u, grad_coeff};
}

Tensor readout(const Tensor& gate, const Optional& gate_tangent, const Tensor& total, const Tensor& residual,
               const Optional& total_tangent, const Optional& residual_tangent, const Tensor& count,
               const Optional& offsets_, const Optional& cos, const Optional& sin, int64_t axes, int64_t form,
               int64_t heads) {
  const int64_t groups = total.size(1), channels = total.size(2);
  const Gates gates(gate, gate_tangent, channels, cos, sin, axes, form, heads);
  const State state(total, residual, count, gate, gate.size(0), groups, channels);
  const State tangent(total_tangent, residual_tangent, {}, gate, gate.size(0), groups, channels);
  const Plain offsets(offsets_, gate, ScalarType::Long, {groups + 1}, "offsets");
  Tensor y = new_result(gate, {gate.size(0), gate.size(1), channels}, gate.scalar_type());
  call(pom::ReadoutArgs{gates.args, groups, checked_offsets(offsets, gate.size(1)), state.view, y.mutable_data_ptr(),
                        tangent.view},
       gate, POM_OPERATION(readout));
  return y;
}

std::tuple<Tensor, Tensor> readout_backward(const Tensor& grad_y, const Tensor& gate, const Optional& gate_tangent,
                                            const Tensor& total, const Tensor& residual, const Tensor& count,
                                            const Optional& offsets_, const Optional& cos, const Optional& sin,
                                            int64_t axes, int64_t form, int64_t heads) {
  const int64_t groups = total.size(1), channels = total.size(2);
  const Gates gates(gate, gate_tangent, channels, cos, sin, axes, form, heads);
  const State state(total, residual, count, gate, gate.size(0), groups, channels);
  const Plain offsets(offsets_, gate, ScalarType::Long, {groups + 1}, "offsets");
  const GradY dy(grad_y, gates);
  Tensor grad_gate = new_like(gate), grad_total = new_like(total);
  call(pom::ReadoutBackwardArgs{gates.args, groups, checked_offsets(offsets, gate.size(1)), state.view,
                                dy.tensor.const_data_ptr(), dy.tensor.stride(0), dy.tensor.stride(1),
                                grad_gate.mutable_data_ptr(), grad_total.mutable_data_ptr()},
       gate, POM_OPERATION(readout_backward));
  return {grad_gate, grad_total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_mix(const Tensor& u, const Tensor& gate, const Optional& coeff,
                                                      const Optional& u_tangent, const Optional& gate_tangent,
                                                      const Optional& coeff_tangent, const Optional& weight,
                                                      const Optional& total, const Optional& residual,
                                                      const Optional& count, const Optional& cos, const Optional& sin,
                                                      const Optional& gate_cos, const Optional& gate_sin, int64_t axes,
                                                      int64_t form, int64_t degree, int64_t heads) {
  const Mixed in(u, gate, coeff, u_tangent, gate_tangent, coeff_tangent, weight, total, residual, count, cos, sin, axes,
                 gate_cos, gate_sin, axes, form, degree, heads);
  NewState out(u, u.size(0), 1, u.size(2));
  Tensor y = new_result(gate, {u.size(0), u.size(1), u.size(2)}, gate.scalar_type());
  call(pom::CausalArgs{in.features.args, in.gates.args, in.prior.view, y.mutable_data_ptr(), out.out}, u,
       POM_OPERATION(causal_mix));
  return {y, out.total, out.residual, out.count};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_mix_backward(
    const Tensor& grad_y, const Optional& grad_total, const Tensor& u, const Tensor& gate, const Optional& coeff,
    const Optional& u_tangent, const Optional& gate_tangent, const Optional& coeff_tangent, const Optional& weight,
    const Optional& total, const Optional& residual, const Optional& count, const Optional& cos, const Optional& sin,
    const Optional& gate_cos, const Optional& gate_sin, int64_t axes, int64_t form, int64_t degree, int64_t heads) {
  const Mixed in(u, gate, coeff, u_tangent, gate_tangent, coeff_tangent, weight, total, residual, count, cos, sin, axes,
                 gate_cos, gate_sin, axes, form, degree, heads);
  const GradY dy(grad_y, in.gates);
  const Plain grad(grad_total, u, acc_of(u), {u.size(0), 1, u.size(2)}, "grad_total");
  Tensor grad_u = new_like(u), grad_gate = new_like(gate), grad_coeff = new_coeff_grad(in.features);
  Tensor grad_prior = torch::stable::new_empty(u, {u.size(0), 1, u.size(2)}, acc_of(u));
  call(pom::CausalBackwardArgs{in.features.args, in.gates.args, in.prior.view, dy.tensor.const_data_ptr(),
                               dy.tensor.stride(0), dy.tensor.stride(1), grad.data(), grad_u.mutable_data_ptr(),
                               grad_gate.mutable_data_ptr(), grad_coeff.mutable_data_ptr(),
                               grad_prior.mutable_data_ptr()},
       u, POM_OPERATION(causal_mix_backward));
  return {grad_u, grad_gate, grad_coeff, grad_prior};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix(const Tensor& u, const Tensor& gate, const Optional& coeff,
                                               const Optional& weight, const Optional& total, const Optional& residual,
                                               const Optional& count, const Optional& cos, const Optional& sin,
                                               int64_t axes, const Optional& gate_cos, const Optional& gate_sin,
                                               int64_t gate_axes, int64_t form, int64_t degree, int64_t heads) {
  const Mixed in(u, gate, coeff, {}, {}, {}, weight, total, residual, count, cos, sin, axes, gate_cos, gate_sin,
                 gate_axes, form, degree, heads);
  NewState out(u, u.size(0), 1, u.size(2));
  Tensor y = new_result(gate, {gate.size(0), gate.size(1), u.size(2)}, gate.scalar_type());
  call(pom::MixArgs{in.features.args, in.gates.args, in.prior.view, y.mutable_data_ptr(), out.out}, u,
       POM_OPERATION(mix));
  return {y, out.total, out.residual, out.count};
}

Tensor update(const Tensor& u, const Tensor& gate, const Optional& coeff, const Optional& weight, Tensor total,
              Tensor residual, Tensor count, Tensor ticket, const Optional& cos, const Optional& sin, int64_t axes,
              const Optional& gate_cos, const Optional& gate_sin, int64_t gate_axes, int64_t form, int64_t degree,
              int64_t heads) {
  const Mixed in(u, gate, coeff, {}, {}, {}, weight, total, residual, count, cos, sin, axes, gate_cos, gate_sin,
                 gate_axes, form, degree, heads);
  const Plain ticket_of(ticket, u, ScalarType::Int, {u.size(0)}, "ticket");
  expect_contiguous(total, "total");
  expect_contiguous(residual, "residual");
  expect_contiguous(count, "count");
  expect_contiguous(ticket, "ticket");
  const pom::StateOut state = {total.mutable_data_ptr(), residual.mutable_data_ptr(),
                               static_cast<double*>(count.mutable_data_ptr())};
  Tensor y = new_result(gate, {gate.size(0), gate.size(1), u.size(2)}, gate.scalar_type());
  call(pom::UpdateArgs{in.features.args, in.gates.args, state, static_cast<uint32_t*>(ticket.mutable_data_ptr()),
                       y.mutable_data_ptr()},
       u, POM_OPERATION(update));
  return y;
}

std::string instruction_set() { return pom::cpu::instruction_set(); }

// The GPUs that the library holds code for, as in TORCH_CUDA_ARCH_LIST; nothing where it was built without CUDA.
std::string cuda_architectures() {
#ifdef POM_CUDA
  return POM_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

// CUDA's version in the runtime that the library is linked to, and the latest that the driver here serves: "13.0 12.8",
// "13.0 0.0" without a driver, nothing where the library was built without CUDA.
std::string cuda_versions() {
#ifdef POM_CUDA
  auto text = [](int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); };
  const pom::cuda::Versions versions = pom::cuda::versions();
  return text(versions.runtime) + " " + text(versions.driver);
#else
  return "";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(pom_ext, m) {
  m.def(
      "state(Tensor u, Tensor? coeff, Tensor? u_tangent, Tensor? coeff_tangent, Tensor? weight, Tensor? mask, "
      "Tensor? offsets, bool cumulative, Tensor? total, Tensor? residual, Tensor? count, Tensor? cos, Tensor? sin, "
      "int axes, int form, int degree) -> (Tensor total, Tensor residual, Tensor count)");
  m.def(
      "add_to_state(Tensor u, Tensor? coeff, Tensor? weight, Tensor? prior_total, Tensor? prior_residual, "
      "Tensor? prior_count, Tensor? cos, Tensor? sin, int axes, int form, int degree, bool empty, Tensor(a!) total, "
      "Tensor(b!) residual, Tensor(c!) count) -> ()");
  m.def(
      "state_backward(Tensor grad_total, Tensor u, Tensor? coeff, Tensor? u_tangent, Tensor? coeff_tangent, "
      "Tensor? weight, Tensor? mask, Tensor? offsets, bool cumulative, Tensor? cos, Tensor? sin, int axes, int form, "
      "int degree) -> (Tensor grad_u, Tensor grad_coeff)");
  m.def(
      "readout(Tensor gate, Tensor? gate_tangent, Tensor total, Tensor residual, Tensor? total_tangent, "
      "Tensor? residual_tangent, Tensor count, Tensor? offsets, Tensor? cos, Tensor? sin, int axes, int form, "
      "int heads) -> Tensor");
  m.def(
      "readout_backward(Tensor grad_y, Tensor gate, Tensor? gate_tangent, Tensor total, Tensor residual, "
      "Tensor count, Tensor? offsets, Tensor? cos, Tensor? sin, int axes, int form, int heads) "
      "-> (Tensor grad_gate, Tensor grad_total)");
  m.def(
      "causal_mix(Tensor u, Tensor gate, Tensor? coeff, Tensor? u_tangent, Tensor? gate_tangent, "
      "Tensor? coeff_tangent, Tensor? weight, Tensor? total, Tensor? residual, Tensor? count, Tensor? cos, "
      "Tensor? sin, Tensor? gate_cos, Tensor? gate_sin, int axes, int form, int degree, int heads) "
      "-> (Tensor y, Tensor total, Tensor residual, Tensor count)");
  m.def(
      "causal_mix_backward(Tensor grad_y, Tensor? grad_total, Tensor u, Tensor gate, Tensor? coeff, "
      "Tensor? u_tangent, Tensor? gate_tangent, Tensor? coeff_tangent, Tensor? weight, Tensor? total, "
      "Tensor? residual, Tensor? count, Tensor? cos, Tensor? sin, Tensor? gate_cos, Tensor? gate_sin, int axes, "
      "int form, int degree, int heads) "
      "-> (Tensor grad_u, Tensor grad_gate, Tensor grad_coeff, Tensor grad_total)");
  m.def(
      "mix(Tensor u, Tensor gate, Tensor? coeff, Tensor? weight, Tensor? total, Tensor? residual, Tensor? count, "
      "Tensor? cos, Tensor? sin, int axes, Tensor? gate_cos, Tensor? gate_sin, int gate_axes, int form, int degree, "
      "int heads) -> (Tensor y, Tensor total, Tensor residual, Tensor count)");
  m.def(
      "update(Tensor u, Tensor gate, Tensor? coeff, Tensor? weight, Tensor(a!) total, Tensor(b!) residual, "
      "Tensor(c!) count, Tensor(d!) ticket, Tensor? cos, Tensor? sin, int axes, Tensor? gate_cos, Tensor? gate_sin, "
      "int gate_axes, int form, int degree, int heads) -> Tensor");
  m.def("instruction_set() -> str");
  m.def("cuda_architectures() -> str");
  m.def("cuda_versions() -> str");
}

#define POM_IMPLEMENT(m)                                          \
  m.impl("state", TORCH_BOX(&state));                             \
  m.impl("add_to_state", TORCH_BOX(&add_to_state));               \
  m.impl("state_backward", TORCH_BOX(&state_backward));           \
  m.impl("readout", TORCH_BOX(&readout));                         \
  m.impl("readout_backward", TORCH_BOX(&readout_backward));       \
  m.impl("causal_mix", TORCH_BOX(&causal_mix));                   \
  m.impl("causal_mix_backward", TORCH_BOX(&causal_mix_backward)); \
  m.impl("mix", TORCH_BOX(&mix));                                 \
  m.impl("update", TORCH_BOX(&update))

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CPU, m) { POM_IMPLEMENT(m); }
#ifdef POM_CUDA
STABLE_TORCH_LIBRARY_IMPL(pom_ext, CUDA, m) { POM_IMPLEMENT(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("cuda_versions", TORCH_BOX(&cuda_versions));
}
