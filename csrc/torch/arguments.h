// Tensors turned into the argument structs of pom.h.
//
// Values and shapes are checked with friendly messages in pom_ext/ops.py; what is checked here keeps memory safe for
// those who call torch.ops.pom_ext directly.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>

#include "torch/device.h"

namespace pom_torch {

using Optional = std::optional<Tensor>;

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
struct Plain {
  Optional tensor;
  Plain(const Optional& t, const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> shape,
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
  Plain cos, sin;
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
    static const double nothing = 0;  // as in Plain
    data = tensor->numel() ? tensor->const_data_ptr() : &nothing;
    batch_stride = tensor->stride(0);
    token_stride = tensor->stride(1);
  }
};

struct Features {
  Tensor u;
  Plain coeff;
  Tangent u_tangent;
  Plain coeff_tangent, weight;
  Angles angles;
  pom::Features args;

  Features(const Tensor& u_, const Optional& coeff_, const Optional& u_tangent_, const Optional& coeff_tangent_,
           const Optional& weight_, const Optional& cos, const Optional& sin, int64_t axes, int64_t form,
           int64_t degree)
      : u((check_dim(u_), channels_together(u_))),
        coeff(coeff_, u_, acc_of(u_), {u_.size(2), degree}, "coeff"),
        u_tangent(u_tangent_, u_, "u_tangent"),
        coeff_tangent(coeff_tangent_, u_, acc_of(u_), {u_.size(2), degree}, "coeff_tangent"),
        weight(weight_, u_, acc_of(u_), {u_.size(0), u_.size(1)}, "weight"),
        angles(cos, sin, axes, u_.size(1), u_) {
    args.form = form_of(form);
    STD_TORCH_CHECK(degree >= 1 && degree <= 16, "degree: expected 1 to 16, got ", degree);
    const int64_t factors = args.form == pom::Form::product ? degree : 1;
    STD_TORCH_CHECK(u.size(2) > 0 && u.size(2) % factors == 0, "u: ", u.size(2),
                    " channels are not a multiple of degree ", degree);
    args.degree = int(degree);
    args.dtype = dtype_of(u, "u");
    args.batch = u.size(0);
    args.tokens = u.size(1);
    args.width = u.size(2) / factors;
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
inline const int64_t* checked_offsets(const Plain& offsets, int64_t tokens) {
  if (!offsets.tensor) return nullptr;
  const int64_t* p = static_cast<const int64_t*>(offsets.data());
  if (!offsets.tensor->is_cpu()) return p;
  const int64_t n = offsets.tensor->size(0);
  STD_TORCH_CHECK(n >= 1 && p[0] == 0 && p[n - 1] == tokens, "offsets: expected to run from 0 to ", tokens);
  for (int64_t i = 1; i < n; ++i) STD_TORCH_CHECK(p[i] >= p[i - 1], "offsets: expected to never decrease");
  return p;
}

struct Groups {
  Plain mask, offsets;
  pom::Groups args;
  Groups(const Features& f, const Optional& mask_, const Optional& offsets_, bool cumulative)
      : mask(mask_, f.u, acc_of(f.u), {f.u.size(0), mask_ ? mask_->size(1) : 0, f.u.size(1)}, "mask"),
        offsets(offsets_, f.u, ScalarType::Long, {offsets_ ? offsets_->size(0) : 0}, "offsets") {
    args.offsets = checked_offsets(offsets, f.u.size(1));
    args.mask = mask.data();
    args.count = mask_ ? mask_->size(1) : offsets_ ? offsets_->size(0) - 1 : 1;
    args.cumulative = cumulative;
    STD_TORCH_CHECK(!(args.mask && (args.offsets || f.args.weight)), "mask: excludes offsets and weight");
  }
};

struct State {
  Plain total, residual, count;
  pom::StateView view;
  State(const Optional& total_, const Optional& residual_, const Optional& count_, const Tensor& like, int64_t batch,
        int64_t groups, int64_t channels)
      : total(total_, like, acc_of(like), {batch, groups, channels}, "total"),
        residual(residual_, like, acc_of(like), {batch, groups, channels}, "residual"),
        count(count_, like, ScalarType::Double, {batch, groups}, "count") {
    view = {total.data(), residual.data(), static_cast<const double*>(count.data())};
  }
};

// A state that was there before, with one group, or nothing.
struct Prior : State {
  Prior(const Optional& total, const Optional& residual, const Optional& count, const Tensor& like, int64_t channels)
      : State(total, residual, count, like, like.size(0), 1, channels) {
    STD_TORCH_CHECK(bool(total) == bool(residual) && bool(total) == bool(count), "prior: incomplete state");
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

struct Gates {
  Tensor gate;
  Tangent tangent;
  Angles angles;
  pom::Gates args;
  Gates(const Tensor& gate_, const Optional& tangent_, int64_t channels, const Optional& cos, const Optional& sin,
        int64_t axes, int64_t form, int64_t heads)
      : gate((check_dim(gate_), channels_together(gate_))),
        tangent(tangent_, gate_, "gate_tangent"),
        angles(cos, sin, axes, gate_.size(1), gate_) {
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
struct GradY {
  Tensor tensor;
  GradY(const Tensor& t, const Gates& gates) : tensor(channels_together(t)) {
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

// Features, gates and what came before, as the mixes take them.
struct Mixed {
  Features features;
  Gates gates;
  Prior prior;
  Mixed(const Tensor& u, const Tensor& gate, const Optional& coeff, const Optional& u_tangent,
        const Optional& gate_tangent, const Optional& coeff_tangent, const Optional& weight, const Optional& total,
        const Optional& residual, const Optional& count, const Optional& cos, const Optional& sin, int64_t axes,
        const Optional& gate_cos, const Optional& gate_sin, int64_t gate_axes, int64_t form, int64_t degree,
        int64_t heads)
      : features(u, coeff, u_tangent, coeff_tangent, weight, cos, sin, axes, form, degree),
        gates(gate, gate_tangent, u.size(2), gate_cos, gate_sin, gate_axes, form, heads),
        prior(total, residual, count, u, u.size(2)) {
    expect_device(gate, u, "gate");
  }
};

}  // namespace pom_torch
