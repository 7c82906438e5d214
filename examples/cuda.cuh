// A GPU: memory, kernels, the matrix product by cuBLAS, and a frame recorded once and replayed.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <vector>

#include "check.h"
#include "rows.h"

namespace example {

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}
inline void check_cublas(cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("cuBLAS: ") + cublasGetStatusString(status));
}

// The threads of a block; all of them call sum() together.
struct Block {
  static constexpr int width = 1;
  int64_t first, step;

  POM_BOTH float sum(float own) const {
#ifdef __CUDA_ARCH__
    __shared__ float warps[32];
    for (int lane = 16; lane; lane /= 2) own += __shfl_xor_sync(~0u, own, lane);
    __syncthreads();  // all threads have read the last sum
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    own = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) own += warps[warp];
#endif
    return own;
  }
};

template <class Function>
__global__ void run_row(Function function) {
  function(int64_t(blockIdx.x), Block{int64_t(threadIdx.x), int64_t(blockDim.x)});
}

class Cuda {
 public:
  Cuda() {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    check_cublas(cublasCreate(&blas_));
    check_cublas(cublasSetStream(blas_, stream_));
    // Replays need a workspace of their own.
    check_cublas(cublasSetWorkspace(blas_, floats(kBlasBytes / sizeof(float)), kBlasBytes));
  }
  ~Cuda() {
    if (graph_) cudaGraphExecDestroy(graph_);
    cublasDestroy(blas_);
    for (void* const memory : memory_) cudaFree(memory);
    cudaStreamDestroy(stream_);
  }
  Cuda(const Cuda&) = delete;

  pom_place place() {
    pom_place place = {};
    place.device = POM_DEVICE_CUDA;
    place.cuda_stream = stream_;
    return place;
  }

  float* floats(int64_t n) {
    void* memory;
    check_cuda(cudaMalloc(&memory, size_t(n) * sizeof(float)));
    memory_.push_back(memory);
    check_cuda(cudaMemsetAsync(memory, 0, size_t(n) * sizeof(float), stream_));
    return static_cast<float*>(memory);
  }

  void copy(void* to, const void* from, size_t bytes) {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
  }
  void wait() { check_cuda(cudaStreamSynchronize(stream_)); }

  template <class Function>
  void rows(int64_t n, const Function& function) {
    launch(n, function);
    check_cuda(cudaGetLastError());
  }

  // A pom_linear_function; its context is the device. The engine is C, so no exception may pass through it.
  static pom_status linear(void* self, const pom_linear* map) {
    Cuda& cuda = *static_cast<Cuda*>(self);
    const auto *const bias = static_cast<const float*>(map->bias), *const x = static_cast<const float*>(map->x);
    float* const y = static_cast<float*>(map->y);
    if (bias) cuda.launch(map->rows, Repeat{map->outputs, bias, y});
    // cuBLAS stores matrices by columns, so every matrix is the transpose of ours.
    const int m = int(map->outputs), n = int(map->rows), k = int(map->inputs);
    const float one = 1, beta = bias ? 1 : 0;
    const cublasStatus_t status = cublasSgemm(cuda.blas_, CUBLAS_OP_T, CUBLAS_OP_N, m, n, k, &one,
                                              static_cast<const float*>(map->weight), k, x, k, &beta, y, m);
    return status == CUBLAS_STATUS_SUCCESS && cudaGetLastError() == cudaSuccess ? POM_OK : POM_DEVICE_ERROR;
  }

  // The first frame runs directly, which loads all kernels. The second one is recorded, and replayed from then on.
  template <class Frame>
  void repeat(const Frame& frame) {
    if (!ran_) {
      ran_ = true;
      return frame();
    }
    if (!graph_) {
      cudaGraph_t recorded;
      check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
      frame();
      check_cuda(cudaStreamEndCapture(stream_, &recorded));
      check_cuda(cudaGraphInstantiate(&graph_, recorded, 0));
      cudaGraphDestroy(recorded);
    }
    check_cuda(cudaGraphLaunch(graph_, stream_));
  }

 private:
  template <class Function>
  void launch(int64_t n, const Function& function) {
    run_row<<<unsigned(n), kThreads, 0, stream_>>>(function);
  }

  static constexpr unsigned kThreads = 128;
  static constexpr size_t kBlasBytes = size_t(32) << 20;

  cudaStream_t stream_ = nullptr;
  cublasHandle_t blas_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  bool ran_ = false;
  std::vector<void*> memory_;
};

}  // namespace example
