// Matrix products by torch. float32 goes to oneDNN if torch was built with it: on processors that are not Intel's it is
// up to twice as fast as the BLAS that torch takes by itself. So do the 16-bit types if the processor has no
// instructions for them: torch would take many times as long as for float32.
#pragma once

#include <array>

#include "torch/tensors.h"

namespace pom_torch {

// y (n, out) = x (n, in) weightᵀ (in, out) + bias
Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias = {});

// The same for the operations of pom.h; to be kept while they run.
class TorchProducts {
 public:
  pom::Linear linear() { return {nullptr, this, multiply, column_sums}; }

 private:
  static const void* multiply(void* self, const pom::MatrixProduct& product, int slot);
  static void column_sums(void* self, pom::Dtype dtype, const pom::Matrix& matrix, int64_t rows, int64_t columns,
                          void* sums);

  std::array<Optional, pom::Linear::kSlots> results_;
};

}  // namespace pom_torch
