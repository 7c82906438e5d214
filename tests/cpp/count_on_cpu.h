// What kernels in the stand-in for CUDA moved, counted by count_on_cpu.cpp. For programs whose kernels are compiled
// with -fsanitize=thread and that are linked without the sanitizer's library.
#pragma once

#include <cstddef>
#include <cstdint>

struct CountedLaunch {
  uint64_t kernel;  // code address within the program or library; or kClear or kCopy
  uint32_t blocks, threads;
  uint64_t loaded, stored;  // bytes of global memory
};
constexpr uint64_t kClear = 0, kCopy = 1;  // cudaMemsetAsync, cudaMemcpyAsync

extern "C" {
__attribute__((visibility("default"))) void count_on_cpu_reset();
// Copies up to `room` launches since the reset, in order, and returns how many there were.
__attribute__((visibility("default"))) size_t count_on_cpu_launches(CountedLaunch* launches, size_t room);
}
