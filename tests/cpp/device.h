// The device that a test program is compiled for: the CPU or, with POM_TEST_CUDA, the CUDA kernels run by
// cuda_on_cpu.h.
#pragma once

#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "pom/pom.h"

#ifdef POM_TEST_CUDA

#include "cuda_on_cpu.h"
#include "guarded.h"

namespace device = pom::cuda;
constexpr bool kCuda = true;

// Exactly as many bytes as requested, starting `offset` bytes after a multiple of 16, the alignment that vector
// accesses need.
class Memory {
 public:
  explicit Memory(size_t bytes, size_t offset = 0, bool guard_end = true)
      : buffer_(bytes, guard_end ? GuardedBuffer::Side::end : GuardedBuffer::Side::begin,
                guard_end ? (32 - offset - bytes % 16) % 16 : offset) {}
  char* data() const { return buffer_.data(); }

 private:
  GuardedBuffer buffer_;
};

// Threads in ascending order, or in one that differs from call to call.
using Order = void*;
inline Order in_order(bool ascending) {
  static uint64_t seed = 0;
  cuda_on_cpu::set_seed(ascending ? 0 : ++seed);
  return nullptr;
}

inline pom::Status call(const pom::ProjectStateArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::project_state(args, memory, bytes, order);
}
inline pom::Status call(const pom::FoldedReadoutArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::folded_readout(args, memory, bytes, order);
}

#else

namespace device = pom::cpu;
constexpr bool kCuda = false;

// A heap block of exactly that many bytes, so that the address sanitizer sees any overrun.
class Memory {
 public:
  explicit Memory(size_t bytes, size_t = 0, bool = true) : block_(new char[bytes]) {}
  char* data() const { return block_.get(); }

 private:
  std::unique_ptr<char[]> block_;
};

inline void run_reversed(void*, int64_t n, void (*body)(void*, int64_t), void* argument) {
  std::atomic<int64_t> left{n};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&] {
      for (int64_t task; (task = --left) >= 0;) body(argument, task);
    });
  for (std::thread& thread : threads) thread.join();
}

// Runs one task after the other, or in reverse on several threads.
using Order = pom::Executor;
inline Order in_order(bool ascending) { return ascending ? Order{} : Order{run_reversed}; }

inline pom::Status call(const pom::ProjectStateArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::project_state(args, memory, bytes, order);
}
inline pom::Status call(const pom::ProjectStateBackwardArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::project_state_backward(args, memory, bytes, order);
}
inline pom::Status call(const pom::ProjectReadoutArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::project_readout(args, memory, bytes, order);
}
inline pom::Status call(const pom::ProjectReadoutBackwardArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::project_readout_backward(args, memory, bytes, order);
}
inline pom::Status call(const pom::FoldedReadoutArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::folded_readout(args, memory, bytes, order);
}

#endif

// Calls the operation that takes these arguments.
inline pom::Status call(const pom::StateArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::state(args, memory, bytes, order);
}
inline pom::Status call(const pom::StateBackwardArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::state_backward(args, memory, bytes, order);
}
inline pom::Status call(const pom::ReadoutArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::readout(args, memory, bytes, order);
}
inline pom::Status call(const pom::ReadoutBackwardArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::readout_backward(args, memory, bytes, order);
}
inline pom::Status call(const pom::CausalArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::causal_mix(args, memory, bytes, order);
}
inline pom::Status call(const pom::CausalBackwardArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::causal_mix_backward(args, memory, bytes, order);
}
inline pom::Status call(const pom::MixArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::mix(args, memory, bytes, order);
}
inline pom::Status call(const pom::UpdateArgs& args, void* memory, size_t bytes, const Order& order) {
  return device::update(args, memory, bytes, order);
}
