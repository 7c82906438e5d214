// Operations together with their projections, by the tensor cores of the GPUs that have what it takes (pom.h,
// ProjectStateArgs and FoldedReadoutArgs).

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/arguments.h"

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def(
      "projects_at_once(Tensor x, Tensor weight, Tensor? bias, Tensor coeff, Tensor? token_weight, Tensor? offsets, "
      "bool cumulative, Tensor? total, Tensor? residual, Tensor? count, int degree) -> bool");
  m.def(
      "project_state_at_once(Tensor x, Tensor weight, Tensor? bias, Tensor coeff, Tensor? token_weight, "
      "Tensor? offsets, bool cumulative, Tensor? total, Tensor? residual, Tensor? count, int degree) "
      "-> (Tensor total, Tensor residual, Tensor count)");
  m.def(
      "folds_at_once(Tensor x, Tensor gate_weight, Tensor? gate_bias, Tensor total, Tensor residual, Tensor count, "
      "Tensor out_weight, Tensor? out_bias, Tensor? offsets, int form) -> bool");
  m.def(
      "folded_readout_at_once(Tensor x, Tensor gate_weight, Tensor? gate_bias, Tensor total, Tensor residual, "
      "Tensor count, Tensor out_weight, Tensor? out_bias, Tensor? offsets, int form) -> Tensor");
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

struct ProjectStateCall {
  Tensor x;
  Projection projection;
  Plain coeff, token_weight, offsets;
  Prior prior;
  pom::ProjectStateArgs args;

  ProjectStateCall(const Tensor& x_, const Tensor& weight, const Optional& bias, const Tensor& coeff_,
                   const Optional& token_weight_, const Optional& offsets_, bool cumulative, const Optional& total,
                   const Optional& residual, const Optional& count, int64_t degree)
      : x(checked_tokens(x_)),
        projection(weight, bias, x_, x_.size(2), "weight"),
        coeff(coeff_, x_, acc_of(x_), {weight.size(0), degree}, "coeff"),
        token_weight(token_weight_, x_, acc_of(x_), {x_.size(0), x_.size(1)}, "token_weight"),
        offsets(offsets_, x_, ScalarType::Long, {offsets_ ? offsets_->size(0) : 0}, "offsets"),
        prior(total, residual, count, x_, weight.size(0)) {
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
    args.weight = projection.weight.const_data_ptr();
    args.bias = projection.bias_data();
    args.groups.offsets = checked_offsets(offsets, x.size(1));
    args.groups.count = offsets_ ? offsets_->size(0) - 1 : 1;
    args.groups.cumulative = cumulative;
    args.prior = prior.view;
  }
};

struct FoldedReadoutCall {
  Tensor x;
  Projection gates, out;
  State state;
  Plain offsets;
  pom::FoldedReadoutArgs args;

  FoldedReadoutCall(const Tensor& x_, const Tensor& gate_weight, const Optional& gate_bias, const Tensor& total,
                    const Tensor& residual, const Tensor& count, const Tensor& out_weight, const Optional& out_bias,
                    const Optional& offsets_, int64_t form)
      : x(checked_tokens(x_)),
        gates(gate_weight, gate_bias, x_, x_.size(2), "gate_weight"),
        out(out_weight, out_bias, x_, total.size(2), "out_weight"),
        state(total, residual, count, x_, x_.size(0), total.size(1), total.size(2)),
        offsets(offsets_, x_, ScalarType::Long, {total.size(1) + 1}, "offsets") {
    args.form = form_of(form);
    args.dtype = dtype_of(x, "x");
    args.batch = x.size(0);
    args.queries = x.size(1);
    args.dim = x.size(2);
    args.heads = gate_weight.size(0);
    args.channels = total.size(2);
    args.out_dim = out_weight.size(0);
    args.x = x.const_data_ptr();
    args.x_batch_stride = x.stride(0);
    args.x_token_stride = x.stride(1);
    args.gate_weight = gates.weight.const_data_ptr();
    args.gate_bias = gates.bias_data();
    args.out_weight = out.weight.const_data_ptr();
    args.out_bias = out.bias_data();
    args.groups = total.size(1);
    args.offsets = checked_offsets(offsets, x.size(1));
    args.state = state.view;
  }
};

// Asks a question of the GPU that x is on.
template <class Args>
bool ask(const Tensor& x, const Args& args, bool (*question)(const Args&)) {
#ifdef POM_CUDA
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
#else
  (void)x;
#endif
  return question(args);
}

// Whether there is a kernel for a call of project_state_at_once.
bool projects_at_once(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& coeff,
                      const Optional& token_weight, const Optional& offsets, bool cumulative, const Optional& total,
                      const Optional& residual, const Optional& count, int64_t degree) {
  ProjectStateCall in(x, weight, bias, coeff, token_weight, offsets, cumulative, total, residual, count, degree);
  double nothing;  // nobody looks at the outputs
  in.args.out = {&nothing, &nothing, &nothing};
  return ask(x, in.args, pom::cuda::projects);
}

std::tuple<Tensor, Tensor, Tensor> project_state_at_once(const Tensor& x, const Tensor& weight, const Optional& bias,
                                                         const Tensor& coeff, const Optional& token_weight,
                                                         const Optional& offsets, bool cumulative,
                                                         const Optional& total, const Optional& residual,
                                                         const Optional& count, int64_t degree) {
  ProjectStateCall in(x, weight, bias, coeff, token_weight, offsets, cumulative, total, residual, count, degree);
  NewState out(x, x.size(0), in.args.groups.count, weight.size(0));
  in.args.out = out.out;
  call_cuda(in.args, x, pom::cuda::project_state);
  return {out.total, out.residual, out.count};
}

// The same of folded_readout_at_once.
bool folds_at_once(const Tensor& x, const Tensor& gate_weight, const Optional& gate_bias, const Tensor& total,
                   const Tensor& residual, const Tensor& count, const Tensor& out_weight, const Optional& out_bias,
                   const Optional& offsets, int64_t form) {
  FoldedReadoutCall in(x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, form);
  alignas(16) char nothing[16];
  in.args.y = nothing;
  return ask(x, in.args, pom::cuda::folds);
}

Tensor folded_readout_at_once(const Tensor& x, const Tensor& gate_weight, const Optional& gate_bias,
                              const Tensor& total, const Tensor& residual, const Tensor& count,
                              const Tensor& out_weight, const Optional& out_bias, const Optional& offsets,
                              int64_t form) {
  FoldedReadoutCall in(x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, form);
  Tensor y = new_result(x, {x.size(0), x.size(1), out_weight.size(0)}, x.scalar_type());
  in.args.y = y.mutable_data_ptr();
  call_cuda(in.args, x, pom::cuda::folded_readout);
  return y;
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
  m.impl("folds_at_once", TORCH_BOX(&folds_at_once));
  m.impl("folded_readout_at_once", TORCH_BOX(&folded_readout_at_once));
}

#endif
