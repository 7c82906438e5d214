// What CUDA says when it refuses a call.

#include "cuda/launch.h"

namespace pom::cuda {
namespace {
thread_local const char* words = "no error";
}

Status checked(cudaError_t code) {
  if (code == cudaSuccess) return Status::ok;
  words = cudaGetErrorString(code);
  cudaGetLastError();  // said here: nobody else's check should find it again
  return code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction ? Status::no_device_code
                                                                                           : Status::device_error;
}

Status refused(const char* said) {
  words = said;
  return Status::device_error;
}

const char* error() { return words; }

}  // namespace pom::cuda
