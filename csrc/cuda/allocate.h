// Fills, copies and waits for device memory, in order with the kernels of a CUDA stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pom/pom.h"

namespace pom::cuda {

Status fill(void* to, uint8_t byte, size_t bytes, void* stream);
Status copy(void* to, const void* from, size_t bytes, void* stream);  // between device and host, either way
Status wait(void* stream);

}  // namespace pom::cuda
