// Tests the stand-in for compute capability 9.0: barriers in memory, barriers of parts of a block, tiles.

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "faults.h"
#include "guarded.h"
#include "hopper_on_cpu.h"

using check::expect;
using check::section;
using cuda_on_cpu::launch;

// A barrier in the block's shared memory, for `count` arrivals per phase.
pom::cuda::Barrier& make_barrier(int count) {
  POM_SHARED(memory);
  auto& barrier = *reinterpret_cast<pom::cuda::Barrier*>(memory);
  if (threadIdx.x == 0) barrier.init(count);
  __syncthreads();
  return barrier;
}

// Threads that wait for parts of the block: no thread is a phase, or a barrier, ahead.
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
    for (int barrier = 0; barrier < 5; ++barrier) {
      meetings[threadIdx.x] = barrier;
      pom::cuda::sync_threads(1 + first / 32, 32);
      ahead += *std::min_element(&meetings[first], &meetings[first] + 32) < barrier;
    }
  });
  expect(ahead == 0, "%d threads went on alone", ahead);
}

// The map of a tensor (2, 70, 40) for tiles of 64 rows; `row_bytes`: bytes between rows.
CUresult describe(const std::vector<uint16_t>& numbers, uint64_t row_bytes, CUtensorMap& map) {
  const cuuint64_t sizes[] = {40, 70, 2}, bytes[] = {row_bytes, 70 * row_bytes};
  const cuuint32_t box[] = {64, 64, 1}, every[] = {1, 1, 1};
  return cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<uint16_t*>(numbers.data()), sizes,
                                bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// A tile arrives when it is waited for, with zeros beyond the tensor, and a product reads the right elements.
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

// Blocks that access each other's shared memory: ranks, and barriers of the cluster.
void test_clusters() {
  constexpr unsigned kBlocks = 6;
  std::vector<int> ranks(kBlocks, -1), sums(kBlocks);
  int ahead = 0;
  std::vector<int> phases(kBlocks * 32);
  launch(
      kBlocks, 32, 16,
      [&] {
        auto& barrier = make_barrier(2 * 32);
        pom::cuda::sync_cluster();
        ranks[blockIdx.x] = int(pom::cuda::cluster_rank());
        const unsigned other = blockIdx.x ^ 1;
        for (int phase = 0; phase < 5; ++phase) {  // a phase ends when the threads of both blocks have arrived
          phases[blockIdx.x * 32 + threadIdx.x] = phase;
          barrier.arrive_in(0);
          barrier.arrive_in(1);
          barrier.wait(phase % 2);
          ahead += *std::min_element(&phases[other * 32], &phases[other * 32] + 32) < phase;
        }
        pom::cuda::sync_cluster();
      },
      nullptr, 2);
  for (unsigned b = 0; b < kBlocks; ++b) expect(ranks[b] == int(b % 2), "block %u is number %d", b, ranks[b]);
  expect(ahead == 0, "%d threads went on without the other block", ahead);
}

// As in the kernels, two blocks share tiles: each copies half of each tile to both, into a ring of two stages, once
// both have released the previous tile. One mistake at a time can be made.
enum class Mistake { none, early_start, own_readers_only, early_reading, early_end, half_the_bytes };

struct SharedRing {
  std::vector<uint16_t> numbers;
  CUtensorMap map;
  static constexpr int kTiles = 6;

  SharedRing() : numbers(2 * 70 * 48) {
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = uint16_t(i);
    describe(numbers, 96, map);
  }

  // How many numbers the blocks found where others belong.
  int wrong(Mistake mistake, unsigned blocks) const {
    std::vector<int> wrong(blocks * 64);
    launch(
        blocks, 64, 2 * 2 * 64 * 128 + 1024 + 64,
        [&] {
          using namespace pom::cuda;
          POM_SHARED(memory);
          Barrier *const full = reinterpret_cast<Barrier*>(memory), *const empty = full + 2;
          char* const tiles = shared_origin() + 1024;
          constexpr int kHalf = 64 * 128;
          if (threadIdx.x == 0)
            for (int i = 0; i < 2; ++i) full[i].init(1), empty[i].init(mistake == Mistake::own_readers_only ? 1 : 2);
          if (mistake != Mistake::early_start) sync_cluster();
          const int rank = int(cluster_rank());
          if (threadIdx.x < 32) {
            if (threadIdx.x == 0)
              for (int tile = 0; tile < kTiles; ++tile) {
                const int stage = tile % 2;
                empty[stage].wait(tile / 2 % 2 ^ 1);
                full[stage].arrive_expecting(mistake == Mistake::half_the_bytes ? kHalf : 2 * kHalf);
                load_tile_multicast<2>(map, tiles + (2 * stage + rank) * kHalf, 0, tile, rank, full[stage]);
              }
          } else {
            for (int tile = 0; tile < kTiles; ++tile) {
              const int stage = tile % 2;
              if (mistake != Mistake::early_reading) full[stage].wait(tile / 2 % 2);
              for (int i = 0; i < 2 * 64 * 32; ++i) {
                const int half = i / (64 * 32), row = i / 32 % 64, element = i % 32;
                uint16_t got;
                std::memcpy(&got,
                            swizzled(shared_address(tiles + (2 * stage + half) * kHalf) + row * 128 + element * 2), 2);
                wrong[blockIdx.x * 64 + threadIdx.x] +=
                    tile + row < 70 && got != numbers[(half * 70 + tile + row) * 48 + element];
              }
              __syncwarp();
              if (threadIdx.x == 32) empty[stage].arrive();
              if (threadIdx.x == 33 && mistake != Mistake::own_readers_only) empty[stage].arrive_in(rank ^ 1);
            }
          }
          if (mistake != Mistake::early_end) sync_cluster();
        },
        nullptr, 2);
    return std::accumulate(wrong.begin(), wrong.end(), 0);
  }
};

void test_shared_tiles() {
  const SharedRing ring;
  expect(ring.wrong(Mistake::none, 4) == 0, "a shared tile is another one");
}

// Every mistake shows in some order of threads, in results or as an error that a GPU would not survive.
void test_mistakes_with_shared_tiles() {
  const SharedRing ring;
  for (Mistake mistake : {Mistake::early_start, Mistake::own_readers_only, Mistake::early_reading, Mistake::early_end,
                          Mistake::half_the_bytes}) {
    int noticed = 0;
    for (uint64_t seed = 0; seed < 10; ++seed)
      noticed += last_words([&] {
                   cuda_on_cpu::set_seed(seed);
                   if (ring.wrong(mistake, 2)) std::abort();
                 }).rfind("no fault", 0) != 0;
    expect(noticed >= 2, "mistake %d shows in %d orders of 10", int(mistake), noticed);
  }
  expect_fault("reaches into a block that has ended", [] {
    launch(
        2, 32, 16,
        [] {
          auto& barrier = make_barrier(32);
          pom::cuda::sync_cluster();
          if (pom::cuda::cluster_rank() == 1) return;
          barrier.arrive();
          barrier.wait(0);
          __syncthreads();
          barrier.arrive_in(1);
        },
        nullptr, 2);
  });
  expect_fault("has ended before all copies have landed", [&] {
    launch(1, 32, 64 * 128 + 1024 + 16, [&] {
      auto& barrier = make_barrier(1);
      if (threadIdx.x == 0) pom::cuda::load_tile(ring.map, pom::cuda::shared_origin() + 1024, 0, 0, 0, barrier);
    });
  });
  expect_fault("waits at the cluster's barrier (test_hopper_on_cpu.cpp", [] {
    launch(
        2, 32, 0,
        [] {
          if (blockIdx.x == 0) pom::cuda::sync_cluster();
        },
        nullptr, 2);
  });
  expect_fault("uses a barrier that is not initialised", [] {
    launch(1, 32, 16, [] {
      POM_SHARED(memory);
      reinterpret_cast<pom::cuda::Barrier*>(memory)->arrive();
    });
  });
  expect_fault("reaches for a block that is not in its cluster",
               [] { launch(2, 32, 16, [] { make_barrier(1).arrive_in(1); }); });
  expect_fault("a GPU refuses clusters of 2 in 3 blocks", [] { launch(3, 32, 0, [] {}, nullptr, 2); });
  expect_fault("block 3, thread 5: waits at __syncthreads", [] {
    launch(
        4, 32, 0,
        [] {
          if (blockIdx.x == 3 && threadIdx.x == 4) return;
          if (blockIdx.x < 3 || threadIdx.x >= 5) __syncthreads();
        },
        nullptr, 2);
  });
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
    section("clusters");
    test_clusters();
    section("shared tiles");
    test_shared_tiles();
  }
  cuda_on_cpu::set_seed(0);
  section("endless waits");
  test_endless_waits();
  section("mistakes with shared tiles");
  test_mistakes_with_shared_tiles();
  return check::finish();
}
