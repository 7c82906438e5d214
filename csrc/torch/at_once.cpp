// Projection and state as one kernel, on the GPUs that have it (pom.h, ProjectStateArgs).

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/arguments.h"

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def(
      "projects_at_once(Tensor x, Tensor weight, Tensor? bias, Tensor coeff, Tensor? token_weight, Tensor? offsets, "
      "bool cumulative, int degree) -> bool");
  m.def(
      "project_state_at_once(Tensor x, Tensor weight, Tensor? bias, Tensor coeff, Tensor? token_weight, "
      "Tensor? offsets, bool cumulative, int degree) -> (Tensor total, Tensor residual, Tensor count)");
}

#if defined(POM_CUDA) || defined(POM_CUDA_ON_CPU)

namespace {

using namespace pom_torch;

struct AtOnce {
  Tensor x, weight;
  Optional bias;
  Plain coeff, token_weight, offsets;
  pom::ProjectStateArgs args;

  AtOnce(const Tensor& x_, const Tensor& weight_, const Optional& bias_, const Tensor& coeff_,
         const Optional& token_weight_, const Optional& offsets_, bool cumulative, int64_t degree)
      : x((check_shapes(x_, weight_, bias_), channels_together(x_))),
        weight(torch::stable::contiguous(weight_)),
        bias(bias_ ? Optional(torch::stable::contiguous(*bias_)) : Optional()),
        coeff(coeff_, x_, acc_of(x_), {weight_.size(0), degree}, "coeff"),
        token_weight(token_weight_, x_, acc_of(x_), {x_.size(0), x_.size(1)}, "token_weight"),
        offsets(offsets_, x_, ScalarType::Long, {offsets_ ? offsets_->size(0) : 0}, "offsets") {
    pom::Features& f = args.features;
    f.form = pom::Form::power;
    f.degree = int(degree);
    f.dtype = dtype_of(x, "x");
    f.batch = x.size(0);
    f.tokens = x.size(1);
    f.width = weight.size(0);
    f.coeff = coeff.data();
    f.weight = token_weight.data();
    args.x = x.const_data_ptr();
    args.dim = x.size(2);
    args.x_batch_stride = x.stride(0);
    args.x_token_stride = x.stride(1);
    args.weight = weight.const_data_ptr();
    args.bias = bias ? bias->const_data_ptr() : nullptr;
    args.groups.offsets = checked_offsets(offsets, x.size(1));
    args.groups.count = offsets_ ? offsets_->size(0) - 1 : 1;
    args.groups.cumulative = cumulative;
  }

 private:
  static void check_shapes(const Tensor& x, const Tensor& weight, const Optional& bias) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x, weight: expected (B, N, D) and (C, D)");
    expect_shape(weight, {weight.size(0), x.size(2)}, "weight");
    if (bias) expect_shape(*bias, {weight.size(0)}, "bias");
    for (const Tensor* t : {&weight, bias ? &*bias : &weight}) {
      expect_device(*t, x, "weight, bias");
      STD_TORCH_CHECK(t->scalar_type() == x.scalar_type(), "weight, bias: expected the dtype of x");
    }
  }
};

// Whether there is a kernel for a call of project_state_at_once.
bool projects_at_once(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& coeff,
                      const Optional& token_weight, const Optional& offsets, bool cumulative, int64_t degree) {
  AtOnce in(x, weight, bias, coeff, token_weight, offsets, cumulative, degree);
  double nothing;  // the outputs are not looked at
  in.args.out = {&nothing, &nothing, &nothing};
#ifdef POM_CUDA
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
#endif
  return pom::cuda::projects(in.args);
}

std::tuple<Tensor, Tensor, Tensor> project_state_at_once(const Tensor& x, const Tensor& weight, const Optional& bias,
                                                         const Tensor& coeff, const Optional& token_weight,
                                                         const Optional& offsets, bool cumulative, int64_t degree) {
  AtOnce in(x, weight, bias, coeff, token_weight, offsets, cumulative, degree);
  NewState out(x, x.size(0), in.args.groups.count, weight.size(0));
  in.args.out = out.out;
  call_cuda(in.args, x, pom::cuda::project_state);
  return {out.total, out.residual, out.count};
}

}  // namespace

#ifdef POM_CUDA_ON_CPU
#define POM_DEVICE CPU
#else
#define POM_DEVICE CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(pom_ext, POM_DEVICE, m) {
  m.impl("projects_at_once", TORCH_BOX(&projects_at_once));
  m.impl("project_state_at_once", TORCH_BOX(&project_state_at_once));
}

#endif
