// Matrix products by torch or oneDNN: as an operation, and for the operations that project tokens on a CPU.

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cstring>
#include <string>

#include "cpu/kernels.h"
#include "cpu/products.h"
#include "torch/linear.h"

// Weak: a torch without oneDNN lacks it. (Its declaration in torch's headers is for builds with it alone.)
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* y);

namespace pom_torch {
namespace {

// Whether the rows or the columns of a matrix are dense, as oneDNN reads the weight of a product.
bool is_plain_matrix(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1);
  return (t.stride(1) == 1 && t.stride(0) >= columns) || (t.stride(0) == 1 && t.stride(1) >= rows);
}

// A matrix with its rows dense. torch would copy one whose columns are dense number by number.
Tensor dense(const Tensor& t) {
  if (!t.is_cpu() || t.stride(0) != 1 || t.stride(1) < t.size(0) || t.size(1) < 2) return torch::stable::contiguous(t);
  Tensor out = torch::stable::new_empty(t, {t.size(0), t.size(1)});
  pom::cpu::copy_dense({t.const_data_ptr(), 1, t.stride(1)}, t.size(0), t.size(1), t.element_size(),
                       out.mutable_data_ptr(), kTorchThreads);
  return out;
}

// Whether the processor multiplies numbers of this type as they are.
bool has_products_of(ScalarType dtype) {
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

constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};

// A view of memory that somebody else owns.
Tensor view_of(const void* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
               pom::Dtype dtype) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU, -1);
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, cpu, kTypes[int(dtype)]);
}

Tensor linear_of_tokens(const Tensor& x, const Tensor& weight, const Optional& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x: expected (N, D)");
  return linear(x, weight, bias);
}

// The 16-bit types whose products the processor has; of the others they are taken in float32.
std::string native_products() {
  std::string names;
  if (has_products_of(ScalarType::BFloat16)) names += "bfloat16 ";
  if (has_products_of(ScalarType::Half)) names += "float16 ";
  return names;
}

}  // namespace

Tensor linear(const Tensor& x_, const Tensor& weight, const Optional& bias) {
  const Tensor x = x_.stride(1) == 1 ? x_ : dense(x_);
  if (aoti_torch_cpu__linear_pointwise && x.is_cpu() && x.scalar_type() == ScalarType::Float && x.numel() &&
      weight.numel()) {
    const Tensor a = is_plain_matrix(x) ? x : torch::stable::contiguous(x);
    const Tensor b = is_plain_matrix(weight) ? weight : torch::stable::contiguous(weight);
    const Optional c = bias ? Optional(torch::stable::contiguous(*bias)) : bias;  // oneDNN reads it as dense
    AtenTensorHandle bias_handle = c ? c->get() : nullptr, y = nullptr;
    const char* algorithm = "";
    const AOTITorchError failed = aoti_torch_cpu__linear_pointwise(a.get(), b.get(), c ? &bias_handle : nullptr, "none",
                                                                   nullptr, 0, &algorithm, &y);
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

const void* TorchProducts::multiply(void* self, const pom::MatrixProduct& p, int slot) {
  Optional& result = static_cast<TorchProducts*>(self)->results_[slot];
  result.reset();
  const pom::Matrix &x = p.x, &w = p.weight;
  if (p.batch) {
    const Tensor xs =
        view_of(x.data, {p.batch, p.rows, p.inputs}, {x.batch_stride, x.row_stride, x.column_stride}, p.dtype);
    result = torch::stable::matmul(
        xs, view_of(w.data, {p.batch, p.inputs, p.outputs}, {w.batch_stride, w.column_stride, w.row_stride}, p.dtype));
  } else {
    result = pom_torch::linear(view_of(x.data, {p.rows, p.inputs}, {x.row_stride, x.column_stride}, p.dtype),
                               view_of(w.data, {p.outputs, p.inputs}, {w.row_stride, w.column_stride}, p.dtype),
                               p.bias ? Optional(view_of(p.bias, {p.outputs}, {1}, p.dtype)) : Optional());
  }
  result = torch::stable::contiguous(*result);
  if (dtype_of(*result, "product") != p.dtype)  // under autocast torch multiplies in its dtype
    result = torch::stable::to(*result, kTypes[int(p.dtype)]);
  return result->const_data_ptr();
}

void TorchProducts::column_sums(void*, pom::Dtype dtype, const pom::Matrix& m, int64_t rows, int64_t columns,
                                void* sums) {
  const Tensor matrix = view_of(m.data, {rows, columns}, {m.row_stride, m.column_stride}, dtype);
  const int64_t dimension = 0;
  const Tensor result =
      torch::stable::sum(matrix, torch::headeronly::IntHeaderOnlyArrayRef(&dimension, 1), false, acc_of(matrix));
  std::memcpy(sums, result.const_data_ptr(), columns * result.element_size());
}

}  // namespace pom_torch

using namespace pom_torch;

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def("native_products() -> str");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CPU, m) { m.impl("linear", TORCH_BOX(&linear_of_tokens)); }

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CompositeExplicitAutograd, m) {
  m.impl("native_products", TORCH_BOX(&native_products));
}
