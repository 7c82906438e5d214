// The product of matrices that the operations take themselves, as an operation.

#include <torch/csrc/stable/library.h>

#include <string>

#include "torch/linear.h"

namespace {

using namespace pom_torch;

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

STABLE_TORCH_LIBRARY_FRAGMENT(pom_ext, m) {
  m.def("native_products() -> str");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear_of_tokens));
}

STABLE_TORCH_LIBRARY_IMPL(pom_ext, CompositeExplicitAutograd, m) {
  m.impl("native_products", TORCH_BOX(&native_products));
}
