// Matrix products by torch. float32 goes to oneDNN where torch was built with it: on processors that are not Intel's it
// is up to twice as fast as the BLAS that torch takes by itself. So do the 16-bit types where the processor has no
// instructions for them: torch would take many times as long as for float32.
#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/kernels.h"
#include "torch/tensors.h"

// Weak: a torch without oneDNN lacks it. (Its declaration in torch's headers is for builds with it alone.)
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* y);

namespace pom_torch {

// Whether the rows or the columns of a matrix are dense, as oneDNN reads the weight of a product.
inline bool is_plain_matrix(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1);
  return (t.stride(1) == 1 && t.stride(0) >= columns) || (t.stride(0) == 1 && t.stride(1) >= rows);
}

// The transpose of a matrix (rows, columns), dense, tile by tile: row after row of a tile is read, then written.
template <class T>
void transpose_to(const T* from, int64_t rows, int64_t columns, int64_t stride, T* to) {
  constexpr int64_t kTile = 32;
  const int64_t across = (columns + kTile - 1) / kTile;
  torch::stable::parallel_for(0, (rows + kTile - 1) / kTile * across, 16, [&](int64_t begin, int64_t end) {
    T turned[kTile][kTile];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t r0 = tile / across * kTile, r1 = std::min(rows, r0 + kTile);
      const int64_t c0 = tile % across * kTile, c1 = std::min(columns, c0 + kTile);
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t c = c0; c < c1; ++c) turned[c - c0][r - r0] = from[r * stride + c];
      for (int64_t c = c0; c < c1; ++c) std::copy_n(turned[c - c0], r1 - r0, to + c * rows + r0);
    }
  });
}

// A matrix with its rows dense.
inline Tensor dense(const Tensor& t) {
  if (!t.is_cpu() || t.stride(0) != 1 || t.stride(1) < t.size(0) || t.size(1) < 2) return torch::stable::contiguous(t);
  Tensor out = torch::stable::new_empty(t, {t.size(0), t.size(1)});
  const auto copy = [&](auto element) {
    using T = decltype(element);
    transpose_to(static_cast<const T*>(t.const_data_ptr()), t.size(1), t.size(0), t.stride(1),
                 static_cast<T*>(out.mutable_data_ptr()));
  };
  t.element_size() == 2 ? copy(uint16_t{}) : t.element_size() == 4 ? copy(uint32_t{}) : copy(uint64_t{});
  return out;
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
inline Tensor linear(const Tensor& x_, const Tensor& weight, const Optional& bias = {}) {
  const Tensor x = x_.stride(1) == 1 ? x_ : dense(x_);  // torch would copy it number by number
  if (aoti_torch_cpu__linear_pointwise && x.is_cpu() && x.scalar_type() == ScalarType::Float && x.numel() &&
      weight.numel()) {
    const Tensor a = is_plain_matrix(x) ? x : torch::stable::contiguous(x);
    const Tensor b = is_plain_matrix(weight) ? weight : torch::stable::contiguous(weight);
    const Optional c = bias ? Optional(torch::stable::contiguous(*bias)) : bias;  // oneDNN reads it as dense
    AtenTensorHandle bias_handle = c ? c->get() : nullptr, y = nullptr;
    const char* algorithm = "";
    const AOTITorchError failed = aoti_torch_cpu__linear_pointwise(
        a.get(), b.get(), c ? &bias_handle : nullptr, "none", nullptr, 0, &algorithm, &y);
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
