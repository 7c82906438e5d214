// Runs an operation on the device of its tensors: the CPU on torch's threads, a GPU on torch's current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef POM_CUDA
#include <dlfcn.h>
#endif

#include <string>

#include "pom/pom.h"

// The name of an operation on both devices. POM_CUDA: the kernels are part of the library. POM_CUDA_ON_CPU: a test has
// compiled them as C++, and they take the place of the CPU's.
#if defined(POM_CUDA) || defined(POM_CUDA_ON_CPU)
#define POM_OPERATION(name) pom::cpu::name, pom::cuda::name
#else
#define POM_OPERATION(name) pom::cpu::name, nullptr
#endif

namespace pom_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Args>
struct Operation {
  using Cpu = pom::Status (*)(const Args&, void* workspace, size_t bytes, const pom::Executor&);
  using Cuda = pom::Status (*)(const Args&, void* workspace, size_t bytes, void* stream);
};

inline const pom::Executor kTorchThreads = {[](void*, int64_t n, void (*body)(void*, int64_t), void* argument) {
                                              torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
                                                for (int64_t i = begin; i < end; ++i) body(argument, i);
                                              });
                                            },
                                            nullptr};

inline std::string name_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

inline void expect_device(const Tensor& t, const Tensor& like, const char* name) {
  const bool same = t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(same, name, ": expected a tensor on ", name_of(like), ", got one on ", name_of(t));
}

inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

#ifdef POM_CUDA
// The library is linked to no CUDA of torch's, so that it also loads where torch has none. Where there is a CUDA
// tensor, torch's CUDA library is loaded.
inline void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "pom_ext: this torch does not tell its current CUDA stream; expected torch >= 2.10");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "pom_ext: torch gives no current stream of cuda:", device);
  return stream;
}

template <class Args>
void call_cuda(const Args& args, const Tensor& like, typename Operation<Args>::Cuda operation) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const int64_t bytes = pom::cuda::workspace(args);
  Tensor workspace = new_workspace(like, bytes);
  const pom::Status status =
      operation(args, workspace.mutable_data_ptr(), bytes, current_stream(like.get_device_index()));
  std::string details;
  if (status == pom::Status::no_device_code || status == pom::Status::device_error)
    details =
        std::string(" (") + pom::cuda::error() + " on " + name_of(like) + "; built for " POM_CUDA_ARCHITECTURES ")";
  if (status == pom::Status::no_device_code)
    details += ". In the source folder, `pip install --no-build-isolation -e .` builds for the GPUs that are visible";
  STD_TORCH_CHECK(status == pom::Status::ok, pom::message(status), details);
}
#elif defined(POM_CUDA_ON_CPU)
template <class Args>
void call_cuda(const Args& args, const Tensor& like, typename Operation<Args>::Cuda operation) {
  const int64_t bytes = pom::cuda::workspace(args);
  Tensor workspace = new_workspace(like, bytes);
  const pom::Status status = operation(args, workspace.mutable_data_ptr(), bytes, nullptr);
  STD_TORCH_CHECK(status == pom::Status::ok, pom::message(status));
}
#endif

template <class Args>
void call_cpu(const Args& args, const Tensor& like, typename Operation<Args>::Cpu operation) {
  const int64_t bytes = pom::cpu::workspace(args);
  Tensor workspace = new_workspace(like, bytes);
  const pom::Status status = operation(args, workspace.mutable_data_ptr(), bytes, kTorchThreads);
  STD_TORCH_CHECK(status == pom::Status::ok, pom::message(status));
}

// Runs the operation of the device that `like` is on, with a workspace of that device.
template <class Args>
void call(const Args& args, const Tensor& like, [[maybe_unused]] typename Operation<Args>::Cpu cpu,
          [[maybe_unused]] typename Operation<Args>::Cuda cuda) {
#if defined(POM_CUDA_ON_CPU)
  call_cuda(args, like, cuda);
#else
#ifdef POM_CUDA
  if (!like.is_cpu()) return call_cuda(args, like, cuda);
#endif
  call_cpu(args, like, cpu);
#endif
}

}  // namespace pom_torch
