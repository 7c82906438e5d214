// The device memory of a stream: queued on a stream of CUDA, in order with its kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pom/pom.h"

namespace pom::cuda {

Status fill(void* to, uint8_t byte, size_t bytes, void* stream);
Status copy(void* to, const void* from, size_t bytes, void* stream);  // between any two of device and host
Status wait(void* stream);

}  // namespace pom::cuda
