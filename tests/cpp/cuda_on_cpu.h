// As much of CUDA as the kernels use, on a CPU: their sources are compiled as C++ against this header, and each thread
// of a block is a fiber that runs until it waits for others. A block runs on one thread of the operating system; so do
// the blocks of a cluster, side by side.
//
// What a GPU may let pass ends the program, with the block and the thread that did it: a barrier that not all threads
// of the block reach, a shuffle or __syncwarp with lanes that have exited or wait elsewhere, a source lane outside the
// mask, access outside the block's dynamic shared memory, a launch that a GPU refuses. Shared memory is NaNs until it
// is written. With a seed, threads run in a random order between barriers, and so do blocks: a race then shows in
// results.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>  // before the macros: the standard library has a __noinline__ of its own
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define POM_SHARED(name) char* const name = cuda_on_cpu::here.shared

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

constexpr int kWarp = 32;

// What the running thread sees.
struct Here {
  uint3 thread{}, block{};
  dim3 threads, blocks;
  char* shared = nullptr;
  const char* stack = nullptr;  // its own; null while no thread runs, nor code that stands for the GPU's
  int rank = 0, cluster = 1;  // of the block in its cluster; blocks of that
  int index() const { return rank * int(threads.x) + int(thread.x); }  // of the thread in the cluster
};
inline thread_local Here here;

// An operation at which threads wait for each other, and its place in the source.
struct Wait {
  const char* operation;
  const char* file;
  int line;
  bool of_block = true;  // else of the lanes in `mask`
  unsigned mask = 0;
  int source = 0;         // the lane whose value this one gets
  void* value = nullptr;  // of `bytes` bytes, replaced by that lane's
  size_t bytes = 0;
};
void wait(const Wait& wait);

// Lets the others run, as a thread does that reads a word of memory again and again. That all threads do so, and none of
// them finds what it waits for, ends the program.
void poll(const Wait& wait);
void note_progress();  // of something that a thread may poll for
template <class Condition>
void wait_until(const char* operation, const char* file, int line, Condition condition) {
  while (!condition()) poll({operation, file, line, false});
  note_progress();
}

// Leaves time to the blocks that other threads of the operating system run. If there are none, what this one looks for
// between its dozes will never be there, which ends the program.
void doze();

// The barrier of that number, for so many threads of the block.
void meet(int number, int threads, const char* file, int line);

// Of another block of the cluster: what lies there where `p` lies in this block's shared memory, and whether all of its
// threads have exited, after which nobody may touch that.
char* in_block(int rank, const void* p);
bool has_ended(int rank);
// All threads of the cluster.
void sync_cluster(const char* file, int line);
// A number from 0 to n - 1, always 0 with seed 0.
int draw_below(int n);
// Called when the threads of a cluster have exited.
inline thread_local void (*at_end)() = nullptr;

[[noreturn]] void fail_here(const char* message);

// Threads and blocks run in ascending order with seed 0, and in an order drawn from any other. The first seed is that
// in the environment variable CUDA_ON_CPU_SEED, if there is one.
void set_seed(uint64_t seed);

// Bytes of shared memory that the kernel which starts next was allowed beyond those that any may have.
inline thread_local size_t asked_shared = 0;

// Who is told of what runs: count_on_cpu.cpp, in a program that is linked to it. See there.
struct Range {
  const char *begin = nullptr, *end = nullptr;
  bool has(const char* p) const { return p >= begin && p < end; }
};
struct Counter {
  void (*start_grid)(const void* kernel, unsigned blocks, int threads, Range parameters);
  void (*start_block)();
  void (*end_block)();
  void (*transfer)(bool reads, size_t bytes);
};
inline const Counter* counter = nullptr;

bool in_shared(const char* p);  // of the blocks that run

// Lets the other threads of the block have their next access to memory first.
void make_room();

// Code within its life stands for hardware: its accesses to memory are not the kernel's. No thread may wait in it.
class Aside {
 public:
  Aside() : stack_(here.stack) { here.stack = nullptr; }
  ~Aside() { here.stack = stack_; }

 private:
  const char* const stack_;
};

// What the device was asked about a kernel, or told: calls of the functions for it.
inline thread_local int questions = 0;
// The device in use; there are several.
inline thread_local int device = 0;
// The bytes that a kernel was allowed on the device in use: 0 before that.
size_t& allowed_shared(const void* kernel);

void run_grid(unsigned blocks, int threads, size_t shared_bytes, const std::function<void()>& body, const void* kernel,
              Range parameters, int cluster);

// Runs body() in every thread of every block, and returns when all have ended. Every `cluster` blocks run together.
template <class F>
void launch(unsigned blocks, int threads, size_t shared_bytes, F body, const void* kernel = nullptr, int cluster = 1) {
  const char* const parameters = reinterpret_cast<const char*>(&body);
  run_grid(blocks, threads, shared_bytes, std::ref(body), kernel, {parameters, parameters + sizeof body}, cluster);
}

inline int lane() { return int(here.thread.x) % kWarp; }

// The lanes of this one's part of the warp: first and last.
struct Segment {
  int first, last;
  explicit Segment(int width) : first(lane() / width * width), last(first + width - 1) {}
};

template <class T>
T exchange(const char* operation, const char* file, int line, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable<T>::value, "a shuffle moves up to 16 bytes");
  wait({operation, file, line, false, mask, source, &value, sizeof value});
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::here.thread)
#define blockIdx (cuda_on_cpu::here.block)
#define blockDim (cuda_on_cpu::here.threads)
#define gridDim (cuda_on_cpu::here.blocks)

// The default arguments name the caller's place in the source.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::wait({"__syncthreads", file, line});
}
inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::wait({"__syncwarp", file, line, false, mask, cuda_on_cpu::lane()});
}

// A source outside the segment of `width` lanes gives the lane its own value; __shfl_sync wraps around.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = cuda_on_cpu::kWarp, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  const cuda_on_cpu::Segment segment(width);
  return cuda_on_cpu::exchange("__shfl_sync", file, line, mask, value, segment.first + (source & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = cuda_on_cpu::kWarp,
                 const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const int source = cuda_on_cpu::lane() - int(delta);
  return cuda_on_cpu::exchange("__shfl_up_sync", file, line, mask, value,
                               source < cuda_on_cpu::Segment(width).first ? cuda_on_cpu::lane() : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = cuda_on_cpu::kWarp,
                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const int source = cuda_on_cpu::lane() + int(delta);
  return cuda_on_cpu::exchange("__shfl_down_sync", file, line, mask, value,
                               source > cuda_on_cpu::Segment(width).last ? cuda_on_cpu::lane() : source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = cuda_on_cpu::kWarp, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const int source = cuda_on_cpu::lane() ^ bits;  // an earlier segment's lanes can be read
  return cuda_on_cpu::exchange("__shfl_xor_sync", file, line, mask, value,
                               source > cuda_on_cpu::Segment(width).last ? cuda_on_cpu::lane() : source);
}

// What a thread does between two looks at memory that another block is to write.
inline void __nanosleep(unsigned) { cuda_on_cpu::doze(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {  // from what all blocks share
  return *p;
}

namespace cuda_on_cpu {
// *p = next(*p) as one step. Returns what was there.
template <class T, class Next>
T update_atomically(T* p, Next next) {
  T old, replaced;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do replaced = next(old);
  while (!__atomic_compare_exchange(p, &old, &replaced, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return old;
}
}  // namespace cuda_on_cpu

inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected, unsigned long long x) {
  __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}
inline int atomicAdd(int* p, int x) { return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL); }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL); }
inline float atomicAdd(float* p, float x) {
  return cuda_on_cpu::update_atomically(p, [x](float old) { return old + x; });
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return cuda_on_cpu::update_atomically(p, [last](unsigned old) { return old >= last ? 0 : old + 1; });
}

// Of a graphics card with few multiprocessors, and kernels that were compiled for it.
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
struct cudaFuncAttributes {
  int maxThreadsPerBlock;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209
};
namespace cuda_on_cpu {
// What kernels are answered that are launched or asked for from now on, and the versions of the driver and the runtime.
inline thread_local cudaError_t refusal = cudaSuccess;
inline thread_local int driver = 13000, runtime = 13000;
}  // namespace cuda_on_cpu
using cudaStream_t = void*;
enum cudaMemcpyKind { cudaMemcpyDefault };
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (cuda_on_cpu::counter) cuda_on_cpu::counter->transfer(false, bytes);
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (cuda_on_cpu::counter) cuda_on_cpu::counter->transfer(true, bytes);
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return ++cuda_on_cpu::questions, *attributes = {1024}, cuda_on_cpu::refusal;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  ++cuda_on_cpu::questions;
  return cuda_on_cpu::allowed_shared(reinterpret_cast<const void*>(kernel)) = size_t(bytes), cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_on_cpu::device, cudaSuccess; }
// Unlike CUDA's: of so many blocks.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, int blocks) {
  return ++cuda_on_cpu::questions, *clusters = blocks <= 8 ? 3 : 0, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Few, unless the environment says otherwise.
  const char* const multiprocessors = std::getenv("CUDA_ON_CPU_MULTIPROCESSORS");
  ++cuda_on_cpu::questions;
  return *value = attribute == cudaDevAttrMultiProcessorCount      ? multiprocessors ? std::atoi(multiprocessors) : 3
                  : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                                   : 0,
         cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = cuda_on_cpu::driver, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = cuda_on_cpu::runtime, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    default:
      return "no kernel image is available for execution on the device";
  }
}
