// Tensors turned into the argument structs of pom.h.
//
// Values and shapes are checked with friendly messages in pom_ext/ops/; what is checked here keeps memory safe for
// those who call torch.ops.pom_ext directly.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "torch/arguments.h"
#include "torch/device.h"

namespace pom_torch {

inline pom::Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return pom::Dtype::f32;
    case ScalarType::Double:
      return pom::Dtype::f64;
    case ScalarType::BFloat16:
      return pom::Dtype::bf16;
    case ScalarType::Half:
      return pom::Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

inline ScalarType acc_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A number, not a name: every call with a string argument would lose 48 bytes, since torch's conversion of it
// (stableivalue_conversions.h of torch 2.13, ToImpl<std::string>) copies it to the heap and leaves it there.
inline pom::Form form_of(int64_t form) {
  STD_TORCH_CHECK(form == 0 || form == 1, "form: expected 0 (product) or 1 (power), got ", form);
  return pom::Form(form);
}

inline void expect_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool same = t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t expected : shape) same = same && t.size(i++) == expected;
  STD_TORCH_CHECK(same, name, ": unexpected shape");
}

// A tensor for a result. Fresh memory of tens of megabytes costs more in page faults than filling it takes: where the
// system leaves the choice to the program, ask for large pages.
inline Tensor new_result(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, shape, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), end = begin + t.numel() * t.element_size();
  const uintptr_t first = (begin + kLarge - 1) / kLarge * kLarge, last = end / kLarge * kLarge;
  if (t.is_cpu() && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

// The tensor with channels next to each other, as the kernels read it; a copy only where they are not.
inline Tensor channels_together(const Tensor& t) {
  return t.size(2) > 1 && t.stride(2) != 1 ? torch::stable::contiguous(t) : t;
}

// An optional contiguous tensor of the accumulator's dtype (or int64), kept alive while its pointer is used.
struct DenseArg {
  Optional tensor;
  DenseArg(const Optional& t, const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> shape,
           const char* name) {
    if (!t) return;
    expect_device(*t, like, name);
    STD_TORCH_CHECK(t->scalar_type() == dtype, name, ": unexpected dtype");
    expect_shape(*t, shape, name);
    tensor = torch::stable::contiguous(*t);
  }
  // Null means "not given": a tensor without elements, whose pointer torch leaves null, is given.
  const void* data() const {
    static const double nothing = 0;
    return !tensor ? nullptr : tensor->numel() ? tensor->const_data_ptr() : &nothing;
  }
};

// Angle tables of `tokens` tokens.
struct Angles {
  DenseArg cos, sin;
  pom::Rotary rotary;
  Angles(const Optional& cos_, const Optional& sin_, int64_t axes, int64_t tokens, const Tensor& like)
      : cos(cos_, like, acc_of(like), {tokens, cos_ ? cos_->size(1) : 0}, "cos"),
        sin(sin_, like, acc_of(like), {tokens, cos_ ? cos_->size(1) : 0}, "sin") {
    if (!cos_) return;
    STD_TORCH_CHECK(sin_ && axes >= 1 && cos_->size(1) % axes == 0, "axes: does not divide the angle table");
    rotary = {cos.data(), sin.data(), cos_->size(1) / axes, int(axes)};
  }
};

// A direction: the shape and dtype of what it belongs to, strides of its own.
struct Tangent {
  Optional tensor;
  Tangent(const Optional& t, const Tensor& like, const char* name) {
    if (!t) return;
    expect_device(*t, like, name);
    STD_TORCH_CHECK(t->scalar_type() == like.scalar_type(), name, ": unexpected dtype");
    expect_shape(*t, {like.size(0), like.size(1), like.size(2)}, name);
    tensor = channels_together(*t);
  }
  void set(const void*& data, int64_t& batch_stride, int64_t& token_stride) const {
    if (!tensor) return;
    static const double nothing = 0;  // as in DenseArg
    data = tensor->numel() ? tensor->const_data_ptr() : &nothing;
    batch_stride = tensor->stride(0);
    token_stride = tensor->stride(1);
  }
};

#define POM_FEATURES                                                                                              \
  "Tensor u, Tensor? coeff, Tensor? u_tangent, Tensor? coeff_tangent, Tensor? weight, Tensor? cos, Tensor? sin, " \
  "int axes, int form, int degree"
struct FeatureInputs {
  Tensor u;
  Optional coeff, u_tangent, coeff_tangent, weight, cos, sin;
  int64_t axes, form, degree;
  static FeatureInputs read(Arguments& from) {
    return {from.tensor(),   from.optional(), from.optional(), from.optional(), from.optional(),
            from.optional(), from.optional(), from.integer(),  from.integer(),  from.integer()};
  }
};

// The polynomial of tokens with that many channels.
inline void set_polynomial(pom::Features& features, int64_t form, int64_t degree, int64_t channels, const char* name) {
  features.form = form_of(form);
  STD_TORCH_CHECK(degree >= 1 && degree <= 16, "degree: expected 1 to 16, got ", degree);
  const int64_t factors = features.form == pom::Form::product ? degree : 1;
  STD_TORCH_CHECK(channels > 0 && channels % factors == 0, name, ": ", channels,
                  " channels are not a multiple of degree ", degree);
  features.degree = int(degree);
  features.width = channels / factors;
}

struct Features {
  Tensor u;
  DenseArg coeff;
  Tangent u_tangent;
  DenseArg coeff_tangent, weight;
  Angles angles;
  pom::Features args;

  explicit Features(const FeatureInputs& in)
      : u((check_dim(in.u), channels_together(in.u))),
        coeff(in.coeff, in.u, acc_of(in.u), {in.u.size(2), in.degree}, "coeff"),
        u_tangent(in.u_tangent, in.u, "u_tangent"),
        coeff_tangent(in.coeff_tangent, in.u, acc_of(in.u), {in.u.size(2), in.degree}, "coeff_tangent"),
        weight(in.weight, in.u, acc_of(in.u), {in.u.size(0), in.u.size(1)}, "weight"),
        angles(in.cos, in.sin, in.axes, in.u.size(1), in.u) {
    set_polynomial(args, in.form, in.degree, u.size(2), "u");
    args.dtype = dtype_of(u, "u");
    args.batch = u.size(0);
    args.tokens = u.size(1);
    args.u = u.const_data_ptr();
    args.u_batch_stride = u.stride(0);
    args.u_token_stride = u.stride(1);
    args.coeff = coeff.data();
    args.weight = weight.data();
    args.rotary = angles.rotary;
    u_tangent.set(args.u_tangent, args.u_tangent_batch_stride, args.u_tangent_token_stride);
    args.coeff_tangent = coeff_tangent.data();
  }

 private:
  static void check_dim(const Tensor& u) { STD_TORCH_CHECK(u.dim() == 3, "u: expected (B, N, C)"); }
};

// Offsets are read by the kernels: they must be sound whoever calls. Those on a GPU are not seen here; its kernels
// never leave the tensors, whatever the offsets.
inline const int64_t* checked_offsets(const DenseArg& offsets, int64_t tokens) {
  if (!offsets.tensor) return nullptr;
  const int64_t* p = static_cast<const int64_t*>(offsets.data());
  if (!offsets.tensor->is_cpu()) return p;
  const int64_t n = offsets.tensor->size(0);
  STD_TORCH_CHECK(n >= 1 && p[0] == 0 && p[n - 1] == tokens, "offsets: expected to run from 0 to ", tokens);
  for (int64_t i = 1; i < n; ++i) STD_TORCH_CHECK(p[i] >= p[i - 1], "offsets: expected to never decrease");
  return p;
}

#define POM_GROUPS "Tensor? mask, Tensor? offsets, bool cumulative"
struct GroupInputs {
  Optional mask, offsets;
  bool cumulative;
  static GroupInputs read(Arguments& from) { return {from.optional(), from.optional(), from.boolean()}; }
};

struct Groups {
  DenseArg mask, offsets;
  pom::Groups args;
  Groups(const GroupInputs& in, const Features& f)
      : mask(in.mask, f.u, acc_of(f.u), {f.u.size(0), in.mask ? in.mask->size(1) : 0, f.u.size(1)}, "mask"),
        offsets(in.offsets, f.u, ScalarType::Long, {in.offsets ? in.offsets->size(0) : 0}, "offsets") {
    args.offsets = checked_offsets(offsets, f.u.size(1));
    args.mask = mask.data();
    args.count = in.mask ? in.mask->size(1) : in.offsets ? in.offsets->size(0) - 1 : 1;
    args.cumulative = in.cumulative;
    STD_TORCH_CHECK(!(args.mask && (args.offsets || f.args.weight)), "mask: excludes offsets and weight");
  }
};

#define POM_PRIOR "Tensor? total, Tensor? residual, Tensor? count"
struct PriorInputs {
  Optional total, residual, count;
  static PriorInputs read(Arguments& from) { return {from.optional(), from.optional(), from.optional()}; }
};

#define POM_STATE "Tensor total, Tensor residual, Tensor count"
struct StateInputs {
  Tensor total, residual, count;
  static StateInputs read(Arguments& from) { return {from.tensor(), from.tensor(), from.tensor()}; }
};

// A state, or no part of one, of the samples of `like`.
struct State {
  DenseArg total, residual, count;
  pom::StateView view;
  State(const PriorInputs& in, const Tensor& like, int64_t groups, int64_t channels)
      : total(in.total, like, acc_of(like), {like.size(0), groups, channels}, "total"),
        residual(in.residual, like, acc_of(like), {like.size(0), groups, channels}, "residual"),
        count(in.count, like, ScalarType::Double, {like.size(0), groups}, "count") {
    view = {total.data(), residual.data(), static_cast<const double*>(count.data())};
  }
  State(const StateInputs& in, const Tensor& like)
      : State(PriorInputs{in.total, in.residual, in.count}, like, in.total.size(1), in.total.size(2)) {}
};

// A state that tokens are added to, with one group, or none.
struct Prior : State {
  Prior(const PriorInputs& in, const Tensor& like, int64_t channels) : State(in, like, 1, channels) {
    STD_TORCH_CHECK(bool(in.total) == bool(in.residual) && bool(in.total) == bool(in.count), "prior: incomplete state");
  }
};

// New tensors for a state.
struct NewState {
  Tensor total, residual, count;
  pom::StateOut out;
  NewState(const Tensor& like, int64_t batch, int64_t groups, int64_t channels)
      : total(new_result(like, {batch, groups, channels}, acc_of(like))),
        residual(new_result(like, {batch, groups, channels}, acc_of(like))),
        count(new_result(like, {batch, groups}, ScalarType::Double)) {
    out = {total.mutable_data_ptr(), residual.mutable_data_ptr(), static_cast<double*>(count.mutable_data_ptr())};
  }
};

#define POM_GATES "Tensor gate, Tensor? gate_tangent, Tensor? gate_cos, Tensor? gate_sin, int gate_axes, int heads"
struct GateInputs {
  Tensor gate;
  Optional tangent, cos, sin;
  int64_t axes, heads;
  static GateInputs read(Arguments& from) {
    return {from.tensor(), from.optional(), from.optional(), from.optional(), from.integer(), from.integer()};
  }
};

struct Gates {
  Tensor gate;
  Tangent tangent;
  Angles angles;
  pom::Gates args;
  Gates(const GateInputs& in, int64_t form, int64_t channels)
      : gate((check_dim(in.gate), channels_together(in.gate))),
        tangent(in.tangent, in.gate, "gate_tangent"),
        angles(in.cos, in.sin, in.axes, in.gate.size(1), in.gate) {
    const int64_t heads = in.heads;
    STD_TORCH_CHECK(heads >= 1 && channels % heads == 0, "heads: expected a divisor of ", channels, ", got ", heads);
    expect_shape(gate, {gate.size(0), gate.size(1), heads > 1 ? heads : channels}, "gate");
    args.form = form_of(form);
    args.dtype = dtype_of(gate, "gate");
    args.batch = gate.size(0);
    args.tokens = gate.size(1);
    args.channels = channels;
    args.heads = heads;
    args.gate = gate.const_data_ptr();
    args.gate_batch_stride = gate.stride(0);
    args.gate_token_stride = gate.stride(1);
    args.rotary = angles.rotary;
    tangent.set(args.tangent, args.tangent_batch_stride, args.tangent_token_stride);
  }

 private:
  static void check_dim(const Tensor& gate) { STD_TORCH_CHECK(gate.dim() == 3, "gate: expected (B, M, C or heads)"); }
};

// A gradient of y: any strides, the dtype of the gates.
struct OutputGrad {
  Tensor tensor;
  OutputGrad(const Tensor& t, const Gates& gates) : tensor(channels_together(t)) {
    expect_device(tensor, gates.gate, "grad_y");
    expect_shape(tensor, {gates.args.batch, gates.args.tokens, gates.args.channels}, "grad_y");
    STD_TORCH_CHECK(tensor.scalar_type() == gates.gate.scalar_type(), "grad_y: unexpected dtype");
  }
};

inline Tensor new_like(const Tensor& like) {
  return new_result(like, {like.size(0), like.size(1), like.size(2)}, like.scalar_type());
}

inline Tensor new_coeff_grad(const Features& f) {
  const bool power = f.args.form == pom::Form::power;
  return torch::stable::new_empty(f.u, {power ? f.args.width : 0, power ? f.args.degree : 0}, acc_of(f.u));
}

// Features, gates and a state that came before, as the mixes take them.
struct MixInputs {
  Features features;
  Gates gates;
  Prior prior;
  MixInputs(const FeatureInputs& in, const GateInputs& gate, const PriorInputs& prior)
      : features(in), gates(gate, in.form, in.u.size(2)), prior(prior, in.u, in.u.size(2)) {
    expect_device(gate.gate, in.u, "gate");
  }
};

}  // namespace pom_torch
