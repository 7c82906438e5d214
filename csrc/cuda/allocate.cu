#include "cuda/allocate.h"

#include "cuda/launch.h"

namespace pom::cuda {

Status fill(void* to, uint8_t byte, size_t bytes, void* stream) {
  return bytes ? checked(cudaMemsetAsync(to, byte, bytes, static_cast<cudaStream_t>(stream))) : Status::ok;
}

Status copy(void* to, const void* from, size_t bytes, void* stream) {
  if (!bytes) return Status::ok;
  return checked(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}

Status wait(void* stream) { return checked(cudaStreamSynchronize(static_cast<cudaStream_t>(stream))); }

}  // namespace pom::cuda
