// What the stand-in for CUDA has of a GPU of compute capability 9.0: barriers in memory, parts of a block that meet, tiles.

#include <algorithm>
#include <vector>

#include "faults.h"
#include "guarded.h"
#include "hopper_on_cpu.h"

using check::expect;
using check::section;
using cuda_on_cpu::launch;

// A barrier in the block's shared memory, for `count` arrivals of a phase.
pom::cuda::Barrier& make_barrier(int count) {
  POM_SHARED(memory);
  auto& barrier = *reinterpret_cast<pom::cuda::Barrier*>(memory);
  if (threadIdx.x == 0) barrier.init(count);
  __syncthreads();
  return barrier;
}

// Threads that wait for others a part of the block at a time: nobody is a phase, or a meeting, ahead.
void test_barriers() {
  std::vector<int> phases(64), meetings(64);
  int ahead = 0;
  launch(1, 64, 16, [&] {
    auto& barrier = make_barrier(64);
    for (int phase = 0; phase < 5; ++phase) {
      phases[threadIdx.x] = phase;
      barrier.arrive();
      barrier.wait(phase % 2);
      ahead += *std::min_element(phases.begin(), phases.end()) < phase;
    }
    const int first = int(threadIdx.x) / 32 * 32;
    for (int meeting = 0; meeting < 5; ++meeting) {
      meetings[threadIdx.x] = meeting;
      pom::cuda::sync_threads(1 + first / 32, 32);
      ahead += *std::min_element(&meetings[first], &meetings[first] + 32) < meeting;
    }
  });
  expect(ahead == 0, "%d threads went on alone", ahead);
}

// How a tensor (2, 70, 40) is described to copies of tiles of 64 rows; rows are so many bytes apart.
CUresult describe(const std::vector<uint16_t>& numbers, uint64_t row_bytes, CUtensorMap& map) {
  const cuuint64_t sizes[] = {40, 70, 2}, bytes[] = {row_bytes, 70 * row_bytes};
  const cuuint32_t box[] = {64, 64, 1}, every[] = {1, 1, 1};
  return cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<uint16_t*>(numbers.data()), sizes,
                                bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// A tile comes when it is waited for, zeros where the tensor ends, and a product finds in it what lies there.
void test_tiles() {
  using namespace pom::cuda;
  std::vector<uint16_t> numbers(2 * 70 * 48);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = pom::to_bf16(float(i % 251)).bits;
  CUtensorMap map;
  expect(describe(numbers, 96, map) == CUDA_SUCCESS, "a tensor is refused");
  std::vector<float> found(64 * 64, -1);
  bool early = true;
  launch(1, 128, 64 * 128 + 1024 + 16, [&] {
    auto& barrier = make_barrier(1);
    char* const tile = shared_origin() + 1024;
    if (threadIdx.x == 0) {
      barrier.arrive_expecting(64 * 128);
      load_tile(map, tile, 8, 20, 1, barrier);
      early = !untouched(tile, tile + 64 * 128);
    }
    barrier.wait(0);
    for (int i = int(threadIdx.x); i < 64 * 64; i += 128) {
      const uint64_t descriptor = shared_address(tile) >> 4 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
      found[i] = tile_element<pom::bf16>(descriptor + i % 64 / 16 * 2, i / 64, i % 16);
    }
  });
  int wrong = 0;
  for (int i = 0; i < 64 * 64; ++i) {
    const int row = 20 + i / 64, element = 8 + i % 64;
    const bool inside = row < 70 && element < 40;
    wrong += found[i] != (inside ? pom::to_float(pom::to_bf16(float((70 * 48 + row * 48 + element) % 251))) : 0);
  }
  expect(!early && wrong == 0, "%d elements of a tile are wrong, or it came early", wrong);
  expect(describe(numbers, 82, map) == CUDA_ERROR_INVALID_VALUE, "rows at odd places are not refused");
}

void test_endless_waits() {
  expect_fault_of_kernel("waits at Barrier::wait (test_hopper_on_cpu.cpp", [] {
    auto& barrier = make_barrier(65);
    barrier.arrive();
    barrier.wait(0);
  });
  expect_fault_of_kernel("arrives at a barrier where nobody is missing", [] { make_barrier(0).arrive(); });
  expect_fault_of_kernel("waits at barrier (test_hopper_on_cpu.cpp", [] {
    if (threadIdx.x < 32) pom::cuda::sync_threads(1, 64);
    __syncthreads();
  });
  expect_fault_of_kernel("a GPU refuses barrier 16", [] { pom::cuda::sync_threads(16, 64); });
}

int main() {
  for (uint64_t seed : kSeeds) {
    cuda_on_cpu::set_seed(seed);
    section("barriers");
    test_barriers();
    section("tiles");
    test_tiles();
  }
  cuda_on_cpu::set_seed(0);
  section("endless waits");
  test_endless_waits();
  return check::finish();
}
