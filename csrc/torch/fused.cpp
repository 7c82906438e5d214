// Operations together with their projections, by the tensor cores of the GPUs that have what it takes (pom.h,
// ProjectStateArgs and FoldedReadoutArgs).

#include <torch/csrc/stable/library.h>

#include "torch/projections.h"

#define POM_FUSED_STATE                                                                                     \
  "(Tensor x, Tensor context_weight, Tensor? context_bias, Tensor coeff, Tensor? weight, Tensor? offsets, " \
  "bool cumulative, " POM_PRIOR ", int degree)"
#define POM_FUSED_READOUT                                        \
  "(Tensor x, Tensor gate_weight, Tensor? gate_bias, " POM_STATE \
  ", Tensor out_weight, Tensor? out_bias, "                      \
  "Tensor? offsets, int form)"

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def("supports_fused_project_state" POM_FUSED_STATE " -> bool");
  m.def("fused_project_state" POM_FUSED_STATE " -> (" POM_STATE ")");
  m.def("supports_fused_folded_readout" POM_FUSED_READOUT " -> bool");
  m.def("fused_folded_readout" POM_FUSED_READOUT " -> Tensor");
}

#if defined(POM_CUDA) || defined(POM_CUDA_ON_CPU)

namespace {

using namespace pom_torch;

struct FusedState {
  ProjectedInputs in;
  PriorInputs prior;
  static FusedState read(Arguments& from) {
    ProjectedInputs in = {
        from.tensor(),   from.tensor(), from.optional(), from.tensor(), from.optional(), {}, {}, 0, kPower, 0,
        from.optional(), from.boolean()};
    const PriorInputs prior = PriorInputs::read(from);
    in.degree = from.integer();
    return {in, prior};
  }
  static constexpr int64_t kPower = int64_t(pom::Form::power);
};

struct FusedReadout {
  ReadingInputs in;
  static FusedReadout read(Arguments& from) {
    return {{from.tensor(),
             from.tensor(),
             from.optional(),
             StateInputs::read(from),
             from.tensor(),
             from.optional(),
             from.optional(),
             {},
             {},
             0,
             from.integer()}};
  }
};

// Asks the GPU that x is on whether it supports a call.
template <class Args>
bool supports(const Tensor& x, const Args& args, bool (*question)(const Args&)) {
#ifdef POM_CUDA
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
#else
  (void)x;
#endif
  return question(args);
}

bool supports_fused_project_state(const FusedState& state) {
  Projected projected(state.in, TokenArg::of_gpu(state.in.x));
  const Prior prior(state.prior, state.in.x, projected.channels());
  double unused;  // the outputs: nobody looks at them
  projected.args.prior = prior.view, projected.args.out = {&unused, &unused, &unused};
  return supports(state.in.x, projected.args, pom::cuda::projects);
}

Tensors<3> fused_project_state(const FusedState& state) {
  const Tensor& x = state.in.x;
  Projected projected(state.in, TokenArg::of_gpu(x));
  const Prior prior(state.prior, x, projected.channels());
  NewState out(x, x.size(0), projected.args.groups.count, projected.channels());
  projected.args.prior = prior.view, projected.args.out = out.out;
  call_cuda(projected.args, x, pom::cuda::project_state);
  return {out.total, out.residual, out.count};
}

bool supports_fused_folded_readout(const FusedReadout& readout) {
  const Reading reading(readout.in, TokenArg::of_gpu(readout.in.x));
  alignas(16) char unused[16];
  return supports(readout.in.x, reading.args(readout.in.gate_weight.size(0), unused), pom::cuda::folds);
}

Tensor fused_folded_readout(const FusedReadout& readout) {
  const Reading reading(readout.in, TokenArg::of_gpu(readout.in.x));
  Tensor y = reading.new_y();
  call_cuda(reading.args(readout.in.gate_weight.size(0), y.mutable_data_ptr()), readout.in.x,
            pom::cuda::folded_readout);
  return y;
}

}  // namespace

#ifdef POM_CUDA_ON_CPU
#define POM_DEVICE CPU
#else
#define POM_DEVICE CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(pom_ext, POM_DEVICE, m) {
  m.impl("supports_fused_project_state", Boxed<&supports_fused_project_state>::call);
  m.impl("fused_project_state", Boxed<&fused_project_state>::call);
  m.impl("supports_fused_folded_readout", Boxed<&supports_fused_folded_readout>::call);
  m.impl("fused_folded_readout", Boxed<&fused_folded_readout>::call);
}

#endif
