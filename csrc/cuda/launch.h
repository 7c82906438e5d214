// Launches kernels: on a GPU with nvcc, or in the tests' stand-in for CUDA if the same sources are compiled as C++.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Declares a block's dynamic shared memory, aligned to 16 bytes.
#define POM_SHARED(name) extern __shared__ __align__(16) char name[]
#else
#include "cuda_on_cpu.h"
#endif

#include <cstdint>

#include "pom/pom.h"

namespace pom::cuda {

constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;  // of a grid's first dimension
constexpr size_t kDefaultSharedBytes = 48 << 10;        // shared memory that a block may use without asking for more

// Turns a CUDA error into a status and stores its message, or a clearer one, for error().
Status checked(cudaError_t code);
// Stores a message of the caller.
Status refused(const char* words, Status status = Status::device_error);

template <class T>
struct non_deduced {  // keeps template argument deduction from using a parameter
  using type = T;
};

// Queues a kernel on a one-dimensional grid. Does nothing if there are no blocks.
template <class... Parameters>
Status launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
              typename non_deduced<Parameters>::type... arguments) {
  if (blocks == 0) return Status::ok;
  if (blocks > kMaxBlocks) return Status::bad_size;
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaFuncAttribute room = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const Status s = checked(cudaFuncSetAttribute(kernel, room, int(shared_bytes))); s != Status::ok) return s;
  }
#ifdef __CUDACC__
  void* pointers[] = {&arguments...};
  return checked(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(threads),
                                  pointers, shared_bytes, static_cast<cudaStream_t>(stream)));
#else
  (void)stream;
  return checked(cuda_on_cpu::run(kernel, unsigned(blocks), threads, shared_bytes, 1, arguments...));
#endif
}

// Blocks that run together and can access each other's shared memory: compute capability 9.0 or later.
struct Clusters {
  int blocks, threads;  // of a cluster; of a block
  size_t shared_bytes;  // of a block
};

#ifdef __CUDACC__
struct ClusterLaunch {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  ClusterLaunch(const Clusters& shape, int64_t clusters, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(shape.blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(clusters * shape.blocks));
    config.blockDim = dim3(unsigned(shape.threads));
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};
#endif

// Counts how many clusters of a kernel the current GPU runs at a time; an error if none fits.
template <class... Parameters>
Status count_clusters(void (*kernel)(Parameters...), const Clusters& shape, int& count) {
#ifdef __CUDACC__
  const ClusterLaunch one(shape, 1, nullptr);
  const Status s = checked(cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void*>(kernel), &one.config));
#else
  const Status s = checked(cudaOccupancyMaxActiveClusters(&count, kernel, shape.blocks));
#endif
  if (s == Status::ok && count < 1)
    return refused("no cluster of the kernel's blocks fits on this GPU", Status::no_device_code);
  return s;
}

template <class... Parameters>
Status launch_clusters(void (*kernel)(Parameters...), int64_t clusters, const Clusters& shape, void* stream,
                       typename non_deduced<Parameters>::type... arguments) {
  if (clusters == 0) return Status::ok;
  if (clusters > kMaxBlocks / shape.blocks) return Status::bad_size;
#ifdef __CUDACC__
  const ClusterLaunch launch(shape, clusters, stream);
  void* pointers[] = {&arguments...};
  return checked(cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(kernel), pointers));
#else
  (void)stream;
  const unsigned blocks = unsigned(clusters * shape.blocks);
  return checked(cuda_on_cpu::run(kernel, blocks, shape.threads, shape.shared_bytes, shape.blocks, arguments...));
#endif
}

// Whether the current GPU has code for a kernel with blocks of this many threads. GPUs that lack the instructions get
// an empty kernel of the same name, with fewer threads.
template <class... Parameters>
Status check_kernel(void (*kernel)(Parameters...), int threads) {
  cudaFuncAttributes attributes;
  if (const Status s = checked(cudaFuncGetAttributes(&attributes, kernel)); s != Status::ok) return s;
  if (attributes.maxThreadsPerBlock >= threads) return Status::ok;
  return refused("this GPU lacks the instructions that the kernel is made of", Status::no_device_code);
}

// Whether to try a call for which check_kernel() returned this: the call reports what is wrong with the device.
inline bool is_worth_a_try(Status status) { return status == Status::ok || status == Status::device_error; }

}  // namespace pom::cuda
