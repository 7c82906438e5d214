// The part of CUDA that the kernels use, on a CPU: their sources are compiled as C++ against this header, and each
// thread of a block is a fiber that runs until it waits for others. A block runs on one OS thread, and so do all blocks
// of a cluster.
//
// Errors that a GPU may let pass end the program and name the block and thread: a barrier that not all threads of the
// block reach, a shuffle or __syncwarp with lanes that have exited or wait elsewhere, a source lane outside the mask,
// an access outside the block's dynamic shared memory, a launch that a GPU refuses. Shared memory is NaN until it is
// written. With a seed, threads run in random order between barriers, and so do blocks: results then show races.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>  // before the macros, since the standard library has a __noinline__ of its own
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

// The running thread and its surroundings.
struct Here {
  uint3 thread{}, block{};
  dim3 threads, blocks;
  char* shared = nullptr;
  const char* stack = nullptr;  // of the thread; null while no thread runs, and in code that stands for hardware
  int rank = 0, cluster = 1;    // the block's rank in its cluster; blocks of the cluster
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
  int source = 0;         // the lane whose value this lane receives
  void* value = nullptr;  // of `bytes` bytes; replaced by that lane's
  size_t bytes = 0;
};
void wait(const Wait& wait);

// Lets other threads run, for a thread that polls a word of memory. Ends the program if all threads poll and none makes
// progress.
void poll(const Wait& wait);
void note_progress();  // call after a change that a thread may poll for
template <class Condition>
void wait_until(const char* operation, const char* file, int line, Condition condition) {
  while (!condition()) poll({operation, file, line, false});
  note_progress();
}

// Gives time to blocks on other OS threads. If there are none, a thread that keeps calling this waits for ever, and the
// program ends.
void back_off();

// Waits at the barrier of that number for so many threads of the block.
void sync_barrier(int number, int threads, const char* file, int line);

// For another block of the cluster: the address that corresponds to `p` in this block's shared memory, and whether all
// its threads have exited, after which nobody may access it.
char* in_block(int rank, const void* p);
bool has_ended(int rank);
// Waits for all threads of the cluster.
void sync_cluster(const char* file, int line);
// A random number from 0 to n - 1; always 0 with seed 0.
int draw_below(int n);
// Called when the threads of a cluster have exited.
inline thread_local void (*at_end)() = nullptr;

[[noreturn]] void fail_here(const char* message);

// With seed 0, threads and blocks run in ascending order; with others, in random order. The initial seed is the
// environment variable CUDA_ON_CPU_SEED, if set.
void set_seed(uint64_t seed);

// Bytes of shared memory that the next kernel requested beyond the default.
inline thread_local size_t requested_shared = 0;

// Told what runs: count_on_cpu.cpp, in a program that links it.
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

bool in_shared(const char* p);  // of the running blocks

// Lets the other threads of the block make their next access first.
void yield_thread();

// During its lifetime the code stands for hardware: its accesses are not the kernel's. No thread may wait within it.
class Aside {
 public:
  Aside() : stack_(here.stack) { here.stack = nullptr; }
  ~Aside() { here.stack = stack_; }

 private:
  const char* const stack_;
};

// Calls of the functions that ask the device about a kernel or set its limits.
inline thread_local int questions = 0;
// The current device; there are several.
inline thread_local int device = 0;
// The shared memory that a kernel was allowed on the current device; 0 before that.
size_t& allowed_shared(const void* kernel);

void run_grid(unsigned blocks, int threads, size_t shared_bytes, const std::function<void()>& body, const void* kernel,
              Range parameters, int cluster);

// Runs body() in every thread of every block, and returns when all have ended. Each `cluster` blocks run together.
template <class F>
void launch(unsigned blocks, int threads, size_t shared_bytes, F body, const void* kernel = nullptr, int cluster = 1) {
  const char* const parameters = reinterpret_cast<const char*>(&body);
  run_grid(blocks, threads, shared_bytes, std::ref(body), kernel, {parameters, parameters + sizeof body}, cluster);
}

inline int lane() { return int(here.thread.x) % kWarp; }

// This lane's segment of the warp: first and last lane.
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
  const int source = cuda_on_cpu::lane() ^ bits;  // lanes of earlier segments can be read
  return cuda_on_cpu::exchange("__shfl_xor_sync", file, line, mask, value,
                               source > cuda_on_cpu::Segment(width).last ? cuda_on_cpu::lane() : source);
}

// What a thread does between two reads of memory that another block will write.
inline void __nanosleep(unsigned) { cuda_on_cpu::back_off(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {  // from the cache that all blocks share
  return *p;
}

namespace cuda_on_cpu {
// Atomically sets *p = next(*p) and returns the old value.
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

// A graphics card with few SMs, and kernels compiled for it.
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
// The answer to all kernel launches and queries from now on, and the versions of driver and runtime.
inline thread_local cudaError_t refusal = cudaSuccess;
inline thread_local int driver = 13000, runtime = 13000;

// Launches a kernel with the shared memory that it was allowed.
template <class Kernel, class... Arguments>
cudaError_t run(Kernel kernel, unsigned blocks, int threads, size_t shared_bytes, int cluster, Arguments... arguments) {
  if (refusal != cudaSuccess) return refusal;
  const void* const function = reinterpret_cast<const void*>(kernel);
  requested_shared = allowed_shared(function);
  launch(blocks, threads, shared_bytes, [=] { kernel(arguments...); }, function, cluster);
  return cudaSuccess;
}
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
// Unlike CUDA's: for clusters of so many blocks.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, int blocks) {
  return ++cuda_on_cpu::questions, *clusters = blocks <= 8 ? 3 : 0, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // few, unless the environment says otherwise
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
