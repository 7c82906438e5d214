// Tests the stand-in for CUDA: kernels with known results, and kernels with one mistake each, which it must name.

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_on_cpu.h"
#include "faults.h"
#include "guarded.h"

using check::expect;
using check::section;
using cuda_on_cpu::launch;

// A tree in shared memory: block b sums the numbers b * threads … b * threads + threads - 1.
__global__ void __launch_bounds__(1024) tree_sum(const int* numbers, int* sums) {
  POM_SHARED(memory);
  int* const shared = reinterpret_cast<int*>(memory);
  shared[threadIdx.x] = numbers[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

void test_sums() {
  for (int threads : {1, 32, 256, 1024})
    for (unsigned blocks : {1u, 3u, 200u}) {
      std::vector<int> numbers(blocks * threads), sums(blocks, -1);
      std::iota(numbers.begin(), numbers.end(), 5);
      launch(blocks, threads, threads * sizeof(int), [&] { tree_sum(numbers.data(), sums.data()); });
      for (unsigned b = 0; b < blocks; ++b) {
        const int* const first = &numbers[b * threads];
        expect(sums[b] == std::accumulate(first, first + threads, 0), "block %u of %u: %d", b, blocks, sums[b]);
      }
    }
}

// Values of every size that a shuffle may have, converted from and to a number.
struct Sixteen {
  double low;
  int number, more;
};
template <class T>
T make(int n) {
  return T(n);
}
template <>
Sixteen make<Sixteen>(int n) {
  return {n / 2.0, n, -n};
}
template <class T>
int number(T x) {
  return int(x);
}
template <>
int number(Sixteen x) {
  return x.low * 2 == x.number && x.more == -x.number ? x.number : -1;
}

template <class T>
void test_shuffles_of() {
  constexpr int kThreads = 64;
  for (int width : {1, 2, 8, 32})
    for (int by : {0, 1, 3, 7, 16, 31}) {
      int got[4][kThreads];
      launch(1, kThreads, 0, [&] {
        const int t = int(threadIdx.x);
        const T own = make<T>(t);
        got[0][t] = number(__shfl_sync(~0u, own, by, width));
        got[1][t] = number(__shfl_up_sync(~0u, own, by, width));
        got[2][t] = number(__shfl_down_sync(~0u, own, by, width));
        got[3][t] = number(__shfl_xor_sync(~0u, own, by, width));
      });
      for (int t = 0; t < kThreads; ++t) {
        const int within = t % width, first = t - within, x = (t % 32) ^ by, warp = t / 32 * 32;
        const int wanted[] = {first + by % width, within < by ? t : t - by, within + by >= width ? t : t + by,
                              warp + x < first + width ? warp + x : t};
        for (int kind = 0; kind < 4; ++kind)
          expect(got[kind][t] == wanted[kind], "shuffle %d by %d, width %d, thread %d: %d, not %d", kind, by, width, t,
                 got[kind][t], wanted[kind]);
      }
    }
}

// Parts of a warp that diverge and converge.
void test_masks() {
  int sums[32];
  launch(1, 32, 0, [&] {
    const unsigned lane = threadIdx.x, mask = lane < 8 ? 0xffu : lane % 2 ? 0xaaaaaa00u : 0x55555500u;
    int sum = int(lane);
    if (lane < 8) {
      for (int by = 4; by > 0; by /= 2) sum += __shfl_xor_sync(mask, sum, by);
    } else {
      __syncwarp(mask);
      sum = __shfl_sync(mask, sum, lane % 2 ? 31 : 8);
    }
    __syncwarp();
    sums[lane] = sum;
  });
  for (int lane = 0; lane < 32; ++lane) {
    const int wanted = lane < 8 ? 28 : lane % 2 ? 31 : 8;
    expect(sums[lane] == wanted, "lane %d: %d, not %d", lane, sums[lane], wanted);
  }
}

// Every block adds; the last one sees what all have added.
void test_atomics() {
  constexpr unsigned kBlocks = 100;
  unsigned arrival_counter = 0, turns = 0, count = 0;
  int sum = 0, seen = 0;
  float real = 0;
  launch(kBlocks, 128, 0, [&] {
    atomicAdd(&count, 1u);
    atomicAdd(&sum, -int(threadIdx.x));
    atomicAdd(&real, 0.5f);
    atomicInc(&turns, 6);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && atomicInc(&arrival_counter, kBlocks - 1) == kBlocks - 1) seen = __ldg(&sum);
  });
  const int wanted = -int(kBlocks) * 127 * 64;
  expect(count == kBlocks * 128 && real == kBlocks * 64, "atomicAdd counted %u and %g", count, double(real));
  expect(sum == wanted && seen == wanted, "the last block saw %d of %d", seen, sum);
  expect(arrival_counter == 0 && turns == kBlocks * 128 % 7, "atomicInc counted %u and %u", arrival_counter, turns);
}

void test_geometry() {
  std::vector<int> visits(3 * 40);
  launch(3, 40, 0, [&] {
    const bool plain = threadIdx.y + threadIdx.z + blockIdx.y + blockIdx.z == 0 && gridDim.y * gridDim.z == 1;
    if (plain && gridDim.x == 3 && blockDim.x == 40) ++visits[blockIdx.x * 40 + threadIdx.x];
  });
  expect(visits == std::vector<int>(3 * 40, 1), "a thread did not run once");
}

// Shared memory is aligned, and NaN until it is written, even after an earlier block.
void test_fresh_memory() {
  for (size_t bytes : {16, 20, 48 << 10}) {
    std::vector<int> fresh(5);
    launch(5, 1, bytes, [&] {
      POM_SHARED(memory);
      fresh[blockIdx.x] = uintptr_t(memory) % 16 == 0 && untouched(memory, memory + bytes);
      std::memset(memory, 0, bytes);
    });
    expect(fresh == std::vector<int>(5, 1), "%zu bytes of shared memory are used or not aligned", bytes);
  }
}

// The order of threads before and after a barrier.
std::vector<unsigned> passes(unsigned blocks, unsigned threads) {
  std::vector<unsigned> order;
  launch(blocks, int(threads), 0, [&] {
    order.push_back(threadIdx.x + 1000 * blockIdx.x);
    __syncthreads();
    order.push_back(threadIdx.x + 1000 * blockIdx.x);
  });
  return order;
}

void test_order() {
  const std::vector<unsigned> ascending = passes(4, 100);
  expect(std::is_sorted(ascending.begin(), ascending.begin() + 100), "seed 0: threads are not in order");
  expect(ascending[200] == 1000 && ascending[400] == 2000, "seed 0: blocks are not in order");
  cuda_on_cpu::set_seed(5);
  std::vector<unsigned> drawn = passes(4, 100);
  const std::vector<unsigned> other = passes(4, 100);
  cuda_on_cpu::set_seed(5);
  expect(passes(4, 100) == drawn, "the same seed draws another order");
  expect(drawn != ascending && other != drawn, "seed 5 draws no order");
  expect(!std::is_sorted(drawn.begin(), drawn.begin() + 100), "seed 5: threads are in order");
  cuda_on_cpu::set_seed(0);
  std::vector<unsigned> sorted = ascending;
  std::sort(sorted.begin(), sorted.end());
  std::sort(drawn.begin(), drawn.end());
  expect(drawn == sorted, "seed 5: a thread did not run once");
}

// A missing barrier, which nobody would notice if threads ran in order.
void test_race() {
  std::vector<std::vector<int>> results;
  for (uint64_t seed : kSeeds) {
    cuda_on_cpu::set_seed(seed);
    std::vector<int> got(64);
    launch(1, 64, 64 * sizeof(int), [&] {
      POM_SHARED(memory);
      int* const shared = reinterpret_cast<int*>(memory);
      shared[threadIdx.x] = int(threadIdx.x);
      got[threadIdx.x] = shared[threadIdx.x / 2];
    });
    results.push_back(got);
  }
  cuda_on_cpu::set_seed(0);
  expect(results[1] != results[0] && results[2] != results[1], "a race does not show");
}

void test_guarded_buffer() {
  for (size_t bytes : {0, 1, 100, 4096, 5000})
    for (size_t gap : {0, 1, 2, 15}) {
      const GuardedBuffer begin(bytes, GuardedBuffer::Side::begin, gap), end(bytes, GuardedBuffer::Side::end, gap);
      expect(uintptr_t(begin.data()) % page_size() == gap, "%zu bytes do not begin %zu behind a page", bytes, gap);
      expect(uintptr_t(end.data() + bytes + gap) % page_size() == 0, "%zu bytes do not end %zu before one", bytes, gap);
      expect(untouched(end.data(), end.data() + bytes), "%zu bytes are not fresh", bytes);
      std::memset(begin.data(), 0, bytes);
      std::memset(end.data(), 0, bytes);
    }
}

void test_divergence() {
  expect_fault_of_kernel(", but thread 5 has exited", [] {
    if (threadIdx.x != 5) __syncthreads();
  });
  expect_fault_of_kernel("block 0, thread 0: waits at __syncthreads (test_cuda_on_cpu.cpp:", [] {
    if (threadIdx.x < 40)
      __syncthreads();
    else
      __syncthreads();
  });
  expect_fault_of_kernel("for ever: thread 1 waits at __syncthreads", [] {
    if (threadIdx.x == 0) __syncwarp();
    __syncthreads();
  });
  expect_fault_of_kernel("for ever: thread 32 waits at __shfl_sync", [] {
    if (threadIdx.x == 32) __shfl_sync(~0u, 1, 0);
    __syncthreads();
  });
  expect_fault_of_kernel("for ever", [] {  // three threads that wait in a circle
    const unsigned masks[] = {3u, 6u, 5u};
    if (threadIdx.x < 3) __syncwarp(masks[threadIdx.x]);
    __syncthreads();
  });
}

void test_wrong_masks() {
  expect_fault_of_kernel("names lane 7, which has exited", [] {
    if (threadIdx.x % 32 != 7) __shfl_down_sync(~0u, 1.0f, 1);
  });
  expect_fault_of_kernel("names lane 7, which has exited", [] {
    if (threadIdx.x % 32 != 7) __syncwarp();
  });
  expect_fault("names lane 20, which has exited or never was", [] { launch(1, 20, 0, [] { __syncwarp(); }); });
  expect_fault_of_kernel("does not name its own lane", [] { __shfl_xor_sync(0x7fffffffu, 1, 0); });
  expect_fault_of_kernel("reads lane 30, which it does not name", [] {
    if (threadIdx.x % 32 < 4) __shfl_sync(0xfu, 1, 30);
  });
  expect_fault_of_kernel("meets thread", [] {
    if (threadIdx.x % 2)
      __shfl_sync(~0u, 1, 0);
    else
      __syncwarp();
  });
  expect_fault_of_kernel("meets thread", [] {
    if (threadIdx.x % 2)
      __shfl_sync(~0u, 1.0, 0);
    else
      __shfl_sync(~0u, 1, 0);
  });
}

// Writes one byte, hidden from the optimiser.
__attribute__((noinline)) void poke(char* p) { *const_cast<volatile char*>(p) = 1; }

__attribute__((noinline)) int deep(volatile int depth) {
  volatile char room[1000];
  room[depth % 1000] = 1;
  return depth ? deep(depth - 1) + room[depth % 1000] : 0;
}

void test_bounds() {
  expect_fault_of_kernel("thread 3: access past its shared memory", [] {
    POM_SHARED(memory);
    if (threadIdx.x == 3) poke(memory + 32);
  });
  expect_fault_of_kernel("wrote past the 20 bytes of its shared memory", [] {
    POM_SHARED(memory);
    poke(memory + 20);
  });
  expect_fault_of_kernel("wrote before its shared memory", [] {
    POM_SHARED(memory);
    poke(memory - 1);
  });
  expect_fault_of_kernel("access before its shared memory", [] {
    POM_SHARED(memory);
    poke(memory - 4096);
  });
  expect_fault_of_kernel("thread 9: its stack is full", [] {
    if (threadIdx.x == 9) deep(1000);
  });
  const GuardedBuffer end(10), begin(10, GuardedBuffer::Side::begin);
  expect_fault_of_kernel("thread 10: access to memory that it does not have", [&] {
    if (threadIdx.x <= 10) poke(end.data() + threadIdx.x);
  });
  expect_fault_of_kernel("thread 1: access to memory that it does not have", [&] {
    if (threadIdx.x < 2) poke(begin.data() - threadIdx.x);
  });
  for (int64_t at : {-1, 10})
    expect_fault("written outside a buffer of 10 bytes", [&] {
      GuardedBuffer buffer(10, GuardedBuffer::Side::end, 5);
      poke(buffer.data() + at);
    });
}

// A thread may wait for a block that has started; then blocks on other processors may start, too.
void test_blocks_that_wait() {
  for (uint64_t seed : kSeeds) {
    cuda_on_cpu::set_seed(seed);
    unsigned started = 0;
    volatile bool done[256] = {};
    launch(256, 64, 16, [&] {
      unsigned* const number = reinterpret_cast<unsigned*>(cuda_on_cpu::here.shared);
      if (threadIdx.x == 0) *number = atomicAdd(&started, 1u);
      __syncthreads();
      while (*number > 0 && !done[*number - 1]) __nanosleep(32);
      __syncthreads();
      if (threadIdx.x == 0) done[*number] = true;
    });
    expect(done[255], "the last block did not come to its end");
  }
  expect_fault_of_kernel("waits for ever for a block that has not started", [] {
    volatile bool done = false;
    while (!done) __nanosleep(32);
  });
}

void test_refused_launches() {
  expect_fault("a GPU refuses 0 blocks", [] { launch(0, 32, 0, [] {}); });
  expect_fault("a GPU refuses 1 blocks of 0 threads", [] { launch(1, 0, 0, [] {}); });
  expect_fault("a GPU refuses 1 blocks of 1025 threads", [] { launch(1, 1025, 0, [] {}); });
  expect_fault("with 49153 bytes of shared memory", [] { launch(1, 32, (48 << 10) + 1, [] {}); });
  expect_fault("with 49153 bytes of shared memory", [] {
    for (int i = 0; i < 2; ++i) {
      if (i == 0) cudaFuncSetAttribute(0, cudaFuncAttributeMaxDynamicSharedMemorySize, 50 << 10);
      launch(1, 32, (48 << 10) + 1, [] {});
    }
  });
}

int main() {
  for (uint64_t seed : kSeeds) {
    cuda_on_cpu::set_seed(seed);
    section("sums");
    test_sums();
    section("shuffles");
    test_shuffles_of<int8_t>();
    test_shuffles_of<float>();
    test_shuffles_of<double>();
    test_shuffles_of<Sixteen>();
    section("masks");
    test_masks();
    section("atomics");
    test_atomics();
    section("geometry");
    test_geometry();
    section("fresh shared memory");
    test_fresh_memory();
  }
  cuda_on_cpu::set_seed(0);
  section("order");
  test_order();
  section("race");
  test_race();
  section("guarded buffers");
  test_guarded_buffer();
  section("divergent barriers");
  test_divergence();
  section("wrong masks");
  test_wrong_masks();
  section("bounds");
  test_bounds();
  section("blocks that wait for others");
  test_blocks_that_wait();
  section("refused launches");
  test_refused_launches();
  return check::finish();
}
