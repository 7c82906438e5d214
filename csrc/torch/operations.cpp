// The operations as torch sees them: their schemas, and results allocated and filled. This folder alone knows torch,
// and of torch only the stable ABI, so that one build serves later versions of torch and Python.

#include <string>

#include "cpu/kernels.h"
#include "torch/tensors.h"

namespace {

using namespace pom_torch;

Tensors<3> state(const FeatureInputs& in, const GroupInputs& group, const PriorInputs& before) {
  const Features features(in);
  const Groups groups(group, features);
  const Prior prior(before, in.u, in.u.size(2));
  NewState out(in.u, in.u.size(0), groups.args.count, in.u.size(2));
  call(pom::StateArgs{features.args, groups.args, out.out, prior.view}, in.u, POM_OPERATION(state));
  return {out.total, out.residual, out.count};
}

// A state in the caller's own memory, which is written in place.
struct StateInPlace {
  Prior state;
  pom::StateOut out;
  StateInPlace(const StateInputs& in, const Tensor& like, int64_t channels)
      : state({in.total, in.residual, in.count}, like, channels),
        out{written(in.total, "total"), written(in.residual, "residual"),
            static_cast<double*>(written(in.count, "count"))} {}

  static void* written(Tensor t, const char* name) {
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, since it is written in place");
    return t.mutable_data_ptr();
  }
};

// Adds all tokens to a state in place or, if the state is empty, sets it to the sum of `before` and the tokens.
void add_to_state(const FeatureInputs& in, const PriorInputs& before, bool empty, const StateInputs& state_) {
  const Features features(in);
  STD_TORCH_CHECK(!in.u_tangent && !in.coeff_tangent, "u_tangent, coeff_tangent: expected None");
  const Prior prior(before, in.u, in.u.size(2));
  STD_TORCH_CHECK(empty || !before.total, "prior: expected None, since the state is added to");
  const StateInPlace state(state_, in.u, in.u.size(2));
  call(pom::StateArgs{features.args, {}, state.out, empty ? prior.view : state.state.view}, in.u, POM_OPERATION(state));
}

Tensors<2> state_backward(const Tensor& grad_total, const FeatureInputs& in, const GroupInputs& group) {
  const Features features(in);
  const Groups groups(group, features);
  const DenseArg grad(grad_total, in.u, acc_of(in.u), {in.u.size(0), groups.args.count, in.u.size(2)}, "grad_total");
  Tensor grad_u = new_like(in.u), grad_coeff = new_coeff_grad(features);
  call(pom::StateBackwardArgs{features.args, groups.args, grad.data(), grad_u.mutable_data_ptr(),
                              grad_coeff.mutable_data_ptr()},
       in.u, POM_OPERATION(state_backward));
  return {grad_u, grad_coeff};
}

// Gates, and the state that they read.
struct Readout {
  Gates gates;
  State state;
  DenseArg offsets;
  int64_t groups;
  Readout(const GateInputs& gate, int64_t form, const StateInputs& state, const Optional& offsets)
      : gates(gate, form, state.total.size(2)),
        state(state, gate.gate),
        offsets(offsets, gate.gate, ScalarType::Long, {state.total.size(1) + 1}, "offsets"),
        groups(state.total.size(1)) {}
  const int64_t* offset_data() const { return checked_offsets(offsets, gates.args.tokens); }
};

Tensor readout(const GateInputs& gate, int64_t form, const StateInputs& state, const Optional& total_tangent,
               const Optional& residual_tangent, const Optional& offsets) {
  const Readout in(gate, form, state, offsets);
  const int64_t channels = in.gates.args.channels;
  const State tangent({total_tangent, residual_tangent, {}}, gate.gate, in.groups, channels);
  Tensor y = new_result(gate.gate, {gate.gate.size(0), gate.gate.size(1), channels}, gate.gate.scalar_type());
  call(pom::ReadoutArgs{in.gates.args, in.groups, in.offset_data(), in.state.view, y.mutable_data_ptr(), tangent.view},
       gate.gate, POM_OPERATION(readout));
  return y;
}

Tensors<2> readout_backward(const Tensor& grad_y, const GateInputs& gate, int64_t form, const StateInputs& state,
                            const Optional& offsets) {
  const Readout in(gate, form, state, offsets);
  const OutputGrad dy(grad_y, in.gates);
  Tensor grad_gate = new_like(gate.gate), grad_total = new_like(state.total);
  call(pom::ReadoutBackwardArgs{in.gates.args, in.groups, in.offset_data(), in.state.view, dy.tensor.const_data_ptr(),
                                dy.tensor.stride(0), dy.tensor.stride(1), grad_gate.mutable_data_ptr(),
                                grad_total.mutable_data_ptr()},
       gate.gate, POM_OPERATION(readout_backward));
  return {grad_gate, grad_total};
}

// What mixes return: y, and the state with the tokens added.
struct Mixed {
  NewState out;
  Tensor y;
  Mixed(const Tensor& u, const Tensor& gate)
      : out(u, u.size(0), 1, u.size(2)),
        y(new_result(gate, {gate.size(0), gate.size(1), u.size(2)}, gate.scalar_type())) {}
  Tensors<4> results() const { return {y, out.total, out.residual, out.count}; }
};

Tensors<4> mix(const FeatureInputs& feature, const GateInputs& gate, const PriorInputs& prior) {
  const MixInputs in(feature, gate, prior);
  Mixed mixed(feature.u, gate.gate);
  call(pom::MixArgs{in.features.args, in.gates.args, in.prior.view, mixed.y.mutable_data_ptr(), mixed.out.out},
       feature.u, POM_OPERATION(mix));
  return mixed.results();
}

Tensors<4> causal_mix(const FeatureInputs& feature, const GateInputs& gate, const PriorInputs& prior) {
  const MixInputs in(feature, gate, prior);
  Mixed mixed(feature.u, gate.gate);
  call(pom::CausalArgs{in.features.args, in.gates.args, in.prior.view, mixed.y.mutable_data_ptr(), mixed.out.out},
       feature.u, POM_OPERATION(causal_mix));
  return mixed.results();
}

Tensors<4> causal_mix_backward(const Tensor& grad_y, const Optional& grad_total, const FeatureInputs& feature,
                               const GateInputs& gate, const PriorInputs& prior) {
  const MixInputs in(feature, gate, prior);
  const Tensor& u = feature.u;
  const OutputGrad dy(grad_y, in.gates);
  const DenseArg grad(grad_total, u, acc_of(u), {u.size(0), 1, u.size(2)}, "grad_total");
  Tensor grad_u = new_like(u), grad_gate = new_like(gate.gate), grad_coeff = new_coeff_grad(in.features);
  Tensor grad_prior = torch::stable::new_empty(u, {u.size(0), 1, u.size(2)}, acc_of(u));
  call(pom::CausalBackwardArgs{in.features.args, in.gates.args, in.prior.view, dy.tensor.const_data_ptr(),
                               dy.tensor.stride(0), dy.tensor.stride(1), grad.data(), grad_u.mutable_data_ptr(),
                               grad_gate.mutable_data_ptr(), grad_coeff.mutable_data_ptr(),
                               grad_prior.mutable_data_ptr()},
       u, POM_OPERATION(causal_mix_backward));
  return {grad_u, grad_gate, grad_coeff, grad_prior};
}

Tensor update(const FeatureInputs& feature, const GateInputs& gate, const StateInputs& state_,
              const Tensor& arrival_counter) {
  const Tensor& u = feature.u;
  const MixInputs in(feature, gate, {});
  const DenseArg counter(arrival_counter, u, ScalarType::Int, {u.size(0)}, "arrival_counter");
  const StateInPlace state(state_, u, u.size(2));
  void* const arrivals = StateInPlace::written(arrival_counter, "arrival_counter");
  Tensor y = new_result(gate.gate, {gate.gate.size(0), gate.gate.size(1), u.size(2)}, gate.gate.scalar_type());
  call(pom::UpdateArgs{in.features.args, in.gates.args, state.out, static_cast<uint32_t*>(arrivals),
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

#define POM_STATE_IN_PLACE "Tensor(a!) total, Tensor(b!) residual, Tensor(c!) count"

STABLE_TORCH_LIBRARY(pom_ext, m) {
  m.def("state(" POM_FEATURES ", " POM_GROUPS ", " POM_PRIOR ") -> (" POM_STATE ")");
  m.def("state_backward(Tensor grad_total, " POM_FEATURES ", " POM_GROUPS ") -> (Tensor grad_u, Tensor grad_coeff)");
  m.def("add_to_state(" POM_FEATURES
        ", Tensor? prior_total, Tensor? prior_residual, Tensor? prior_count, bool empty, " POM_STATE_IN_PLACE
        ") -> ()");
  m.def("readout(" POM_GATES ", int form, " POM_STATE
        ", Tensor? total_tangent, Tensor? residual_tangent, "
        "Tensor? offsets) -> Tensor");
  m.def("readout_backward(Tensor grad_y, " POM_GATES ", int form, " POM_STATE
        ", Tensor? offsets) "
        "-> (Tensor grad_gate, Tensor grad_total)");
  m.def("mix(" POM_FEATURES ", " POM_GATES ", " POM_PRIOR ") -> (Tensor y, " POM_STATE ")");
  m.def("causal_mix(" POM_FEATURES ", " POM_GATES ", " POM_PRIOR ") -> (Tensor y, " POM_STATE ")");
  m.def("causal_mix_backward(Tensor grad_y, Tensor? grad_total, " POM_FEATURES ", " POM_GATES ", " POM_PRIOR
        ") "
        "-> (Tensor grad_u, Tensor grad_gate, Tensor grad_coeff, Tensor grad_total)");
  m.def("update(" POM_FEATURES ", " POM_GATES ", " POM_STATE_IN_PLACE ", Tensor(d!) arrival_counter) -> Tensor");
  m.def("instruction_set() -> str");
  m.def("cuda_architectures() -> str");
  m.def("cuda_versions() -> str");
}

namespace {

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("state", Boxed<&state>::call);
  m.impl("state_backward", Boxed<&state_backward>::call);
  m.impl("add_to_state", Boxed<&add_to_state>::call);
  m.impl("readout", Boxed<&readout>::call);
  m.impl("readout_backward", Boxed<&readout_backward>::call);
  m.impl("mix", Boxed<&mix>::call);
  m.impl("causal_mix", Boxed<&causal_mix>::call);
  m.impl("causal_mix_backward", Boxed<&causal_mix_backward>::call);
  m.impl("update", Boxed<&update>::call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CPU, m) { implement(m); }
#ifdef POM_CUDA
STABLE_TORCH_LIBRARY_IMPL(pom_ext, CUDA, m) { implement(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("cuda_versions", TORCH_BOX(&cuda_versions));
}
