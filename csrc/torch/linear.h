// Matrix products by torch. float32 goes to oneDNN where torch was built with it: on processors that are not Intel's it
// is up to twice as fast as the BLAS that torch takes by itself. So do the 16-bit types where the processor has no
// instructions for them: torch would take many times as long as for float32.
#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <array>
#include <cstring>

#include "cpu/kernels.h"
#include "torch/arguments.h"

// Weak: a torch without oneDNN lacks it. (Its declaration in torch's headers is for builds with it alone.)
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* y);

namespace pom_torch {

// Whether oneDNN reads the matrix as it lies: one of the two dimensions is dense.
inline bool is_plain_matrix(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1);
  return (t.stride(1) == 1 && t.stride(0) >= columns) || (t.stride(0) == 1 && t.stride(1) >= rows);
}

// Whether the processor multiplies numbers of this type as they are.
inline bool has_products_of(ScalarType dtype) {
#ifdef __x86_64__
  if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) return true;
  unsigned eax, ebx, ecx, edx;
  if (std::strcmp(pom::cpu::instruction_set(), "avx512")) return false;
  if (dtype == ScalarType::BFloat16) return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 5 & 1;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx >> 23 & 1;
#else
  return true;
#endif
}

// y (n, out) = x (n, in) weightᵀ (in, out) + bias
inline Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias = {}) {
  if (aoti_torch_cpu__linear_pointwise && x.is_cpu() && x.scalar_type() == ScalarType::Float && x.numel() &&
      weight.numel()) {
    const Tensor a = is_plain_matrix(x) ? x : torch::stable::contiguous(x);
    const Tensor b = is_plain_matrix(weight) ? weight : torch::stable::contiguous(weight);
    AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, y = nullptr;
    const char* algorithm = "";
    const AOTITorchError failed = aoti_torch_cpu__linear_pointwise(
        a.get(), b.get(), bias ? &bias_handle : nullptr, "none", nullptr, 0, &algorithm, &y);
    STD_TORCH_CHECK(!failed, "pom_ext: oneDNN refuses a product of (", x.size(0), ", ", x.size(1), ") and (",
                    weight.size(0), ", ", weight.size(1), ")");
    return Tensor(y);
  }
  if (x.is_cpu() && !has_products_of(x.scalar_type())) {
    const auto wide = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
    const Tensor y = linear(wide(x), wide(weight), bias ? Optional(wide(*bias)) : bias);
    return torch::stable::to(y, x.scalar_type());
  }
  std::array<StableIValue, 3> stack = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                       torch::stable::detail::from(bias)};
  const AOTITorchError failed = torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(!failed, "pom_ext: torch refuses a product of (", x.size(0), ", ", x.size(1), ") and (",
                  weight.size(0), ", ", weight.size(1), ")");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// Rows first … first + count - 1 of a matrix, a view.
inline Tensor rows_of(const Tensor& t, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, count);
}

// (1, columns) sums over the rows of a matrix, in the accumulator's dtype.
inline Tensor column_sums(const Tensor& t) {
  const int64_t rows = 0;
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1), false, acc_of(t));
}

// The matrix (batch * tokens, width) of tokens (batch, tokens, width); a copy only where their strides forbid a view.
inline Tensor matrix_of(const Tensor& t) { return torch::stable::reshape(t, {t.size(0) * t.size(1), t.size(2)}); }

}  // namespace pom_torch
