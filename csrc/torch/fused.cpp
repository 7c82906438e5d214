// Operations together with their projections, by the tensor cores of the GPUs that have what it takes (pom.h,
// ProjectStateArgs and FoldedReadoutArgs).

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/tensors.h"

#define POM_FUSED_STATE                                                                                             \
  "(Tensor x, Tensor context_weight, Tensor? context_bias, Tensor coeff, Tensor? weight, Tensor? offsets, " \
  "bool cumulative, " POM_PRIOR ", int degree)"
#define POM_FUSED_READOUT                                                                                    \
  "(Tensor x, Tensor gate_weight, Tensor? gate_bias, " POM_STATE ", Tensor out_weight, Tensor? out_bias, " \
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

// The weight (out, in) of a projection and its bias, as they lie in memory without gaps.
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

Tensor checked_tokens(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected (B, N, D)");
  return channels_together(x);
}

struct FusedStateInputs {
  Tensor x, context_weight;
  Optional context_bias;
  Tensor coeff;
  Optional weight, offsets;
  bool cumulative;
  PriorInputs prior;
  int64_t degree;
  static FusedStateInputs read(Arguments& from) {
    return {from.tensor(),   from.tensor(),  from.optional(),         from.tensor(), from.optional(),
            from.optional(), from.boolean(), PriorInputs::read(from), from.integer()};
  }
};

struct ProjectStateCall {
  Tensor x;
  Projection projection;
  DenseArg coeff, weight, offsets;
  Prior prior;
  pom::ProjectStateArgs args;

  explicit ProjectStateCall(const FusedStateInputs& in)
      : x(checked_tokens(in.x)),
        projection(in.context_weight, in.context_bias, x, x.size(2), "context_weight"),
        coeff(in.coeff, x, acc_of(x), {in.context_weight.size(0), in.degree}, "coeff"),
        weight(in.weight, x, acc_of(x), {x.size(0), x.size(1)}, "weight"),
        offsets(in.offsets, x, ScalarType::Long, {in.offsets ? in.offsets->size(0) : 0}, "offsets"),
        prior(in.prior, x, in.context_weight.size(0)) {
    pom::Features& f = args.features;
    f.form = pom::Form::power;
    f.degree = int(in.degree);
    f.dtype = dtype_of(x, "x");
    f.batch = x.size(0);
    f.tokens = x.size(1);
    f.width = in.context_weight.size(0);
    f.coeff = coeff.data();
    f.weight = weight.data();
    args.x = x.const_data_ptr();
    args.dim = x.size(2);
    args.x_batch_stride = x.stride(0);
    args.x_token_stride = x.stride(1);
    args.weight = projection.weight.const_data_ptr();
    args.bias = projection.bias_data();
    args.groups.offsets = checked_offsets(offsets, x.size(1));
    args.groups.count = in.offsets ? in.offsets->size(0) - 1 : 1;
    args.groups.cumulative = in.cumulative;
    args.prior = prior.view;
  }
};

struct FusedReadoutInputs {
  Tensor x, gate_weight;
  Optional gate_bias;
  StateInputs state;
  Tensor out_weight;
  Optional out_bias, offsets;
  int64_t form;
  static FusedReadoutInputs read(Arguments& from) {
    return {from.tensor(), from.tensor(),   from.optional(), StateInputs::read(from),
            from.tensor(), from.optional(), from.optional(), from.integer()};
  }
};

struct FoldedReadoutCall {
  Tensor x;
  Projection gates, out;
  State state;
  DenseArg offsets;
  pom::FoldedReadoutArgs args;

  explicit FoldedReadoutCall(const FusedReadoutInputs& in)
      : x(checked_tokens(in.x)),
        gates(in.gate_weight, in.gate_bias, x, x.size(2), "gate_weight"),
        out(in.out_weight, in.out_bias, x, in.state.total.size(2), "out_weight"),
        state(in.state, x),
        offsets(in.offsets, x, ScalarType::Long, {in.state.total.size(1) + 1}, "offsets") {
    args.form = form_of(in.form);
    args.dtype = dtype_of(x, "x");
    args.batch = x.size(0);
    args.queries = x.size(1);
    args.dim = x.size(2);
    args.heads = in.gate_weight.size(0);
    args.channels = in.state.total.size(2);
    args.out_dim = in.out_weight.size(0);
    args.x = x.const_data_ptr();
    args.x_batch_stride = x.stride(0);
    args.x_token_stride = x.stride(1);
    args.gate_weight = gates.weight.const_data_ptr();
    args.gate_bias = gates.bias_data();
    args.out_weight = out.weight.const_data_ptr();
    args.out_bias = out.bias_data();
    args.groups = in.state.total.size(1);
    args.offsets = checked_offsets(offsets, x.size(1));
    args.state = state.view;
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

bool supports_fused_project_state(const FusedStateInputs& in) {
  ProjectStateCall state(in);
  double unused;  // the outputs: nobody looks at them
  state.args.out = {&unused, &unused, &unused};
  return supports(in.x, state.args, pom::cuda::projects);
}

std::tuple<Tensor, Tensor, Tensor> fused_project_state(const FusedStateInputs& in) {
  ProjectStateCall state(in);
  NewState out(in.x, in.x.size(0), state.args.groups.count, in.context_weight.size(0));
  state.args.out = out.out;
  call_cuda(state.args, in.x, pom::cuda::project_state);
  return {out.total, out.residual, out.count};
}

bool supports_fused_folded_readout(const FusedReadoutInputs& in) {
  FoldedReadoutCall readout(in);
  alignas(16) char unused[16];
  readout.args.y = unused;
  return supports(in.x, readout.args, pom::cuda::folds);
}

Tensor fused_folded_readout(const FusedReadoutInputs& in) {
  FoldedReadoutCall readout(in);
  Tensor y = new_result(in.x, {in.x.size(0), in.x.size(1), in.out_weight.size(0)}, in.x.scalar_type());
  readout.args.y = y.mutable_data_ptr();
  call_cuda(readout.args, in.x, pom::cuda::folded_readout);
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
