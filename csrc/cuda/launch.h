// How kernels are started: by nvcc on a GPU; by a test's stand-in for CUDA where the same sources are compiled as C++.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Dynamic shared memory of a block, aligned to 16 bytes.
#define POM_SHARED(name) extern __shared__ __align__(16) char name[]
#else
#include "cuda_on_cpu.h"
#endif

#include <cstdint>

#include "pom/pom.h"

namespace pom::cuda {

constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;  // of a grid's first dimension

// Keeps CUDA's own words for `error()`.
Status checked(cudaError_t code);
// Keeps other words for it, which must last: Status::device_error.
Status refused(const char* words);

template <class T>
struct given {  // keeps a parameter's type from being deduced from its argument
  using type = T;
};

// Queues a kernel on a one-dimensional grid. No blocks, no launch.
template <class... Parameters>
Status launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
              typename given<Parameters>::type... arguments) {
  if (blocks == 0) return Status::ok;
  if (blocks > kMaxBlocks) return Status::bad_size;
#ifdef __CUDACC__
  void* pointers[] = {&arguments...};
  return checked(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(threads),
                                  pointers, shared_bytes, static_cast<cudaStream_t>(stream)));
#else
  (void)stream;
  cuda_on_cpu::launch(unsigned(blocks), threads, shared_bytes, [=] { kernel(arguments...); });
  return Status::ok;
#endif
}

// Whether there is code of a kernel for the current GPU that blocks of so many threads can run. Where a GPU lacks a
// kernel's instructions, there is a kernel of the same name in their place that does nothing, of fewer threads.
template <class... Parameters>
Status check_kernel(void (*kernel)(Parameters...), int threads) {
  cudaFuncAttributes attributes;
  if (const Status s = checked(cudaFuncGetAttributes(&attributes, kernel)); s != Status::ok) return s;
  return attributes.maxThreadsPerBlock < threads ? Status::no_device_code : Status::ok;
}

}  // namespace pom::cuda
