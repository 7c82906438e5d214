// What kernels in the stand-in for CUDA moved, as count_on_cpu.cpp counts it. It is part of a program whose kernels are
// compiled with -fsanitize=thread and that is linked without that sanitizer's library: see there.
#pragma once

#include <cstddef>
#include <cstdint>

struct CountedLaunch {
  uint64_t kernel;  // where its code lies, from the start of the program or library; else kClear or kCopy
  uint32_t blocks, threads;
  uint64_t loaded, stored;  // bytes of global memory
};
constexpr uint64_t kClear = 0, kCopy = 1;  // cudaMemsetAsync, cudaMemcpyAsync

extern "C" {
__attribute__((visibility("default"))) void count_on_cpu_reset();
// Copies up to `room` launches since the reset, in order. Returns how many there were.
__attribute__((visibility("default"))) size_t count_on_cpu_launches(CountedLaunch* launches, size_t room);
}
