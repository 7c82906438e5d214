// What csrc/cuda/hopper.cuh uses of a GPU of compute capability 9.0, on a CPU.
//
// Copies and products happen as late as a GPU may do them: a copy when a thread of the destination block waits at a
// barrier, a product when its thread waits for it. So a tile that is used too early is not there yet, and one that is
// freed too early has been replaced. A copy to all blocks of a cluster arrives in each at a different time; in random
// order also while a thread of another block waits, before the destination's own threads have seen earlier copies.
// Access to a block that has ended fails. Descriptors are decoded as the hardware does.
#pragma once

#include <cstddef>
#include <deque>
#include <vector>

#include "cuda_on_cpu.h"
#include "driver_on_cpu.h"
#include "pom/types.h"

namespace pom::cuda {

// Addresses in shared memory count from a multiple of 1,024 bytes, as on a GPU.
inline char* shared_origin(const char* shared = cuda_on_cpu::here.shared) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(shared) / 1024 * 1024);
}
inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const char*>(p) - shared_origin()); }
// Where the 16-byte chunk of an address lies after the swizzle.
inline uint32_t swizzled_address(uint32_t address) { return address ^ (address >> 3 & 0x70); }
inline char* swizzled(uint32_t address) { return shared_origin() + swizzled_address(address); }

class Barrier {
 public:
  void init(int count) { *this = {}, left_ = count_ = uint16_t(count); }
  void arrive() { arrive_expecting(0); }
  void arrive_in(unsigned rank);
  void arrive_expecting(int bytes) {
    expect_initialised();
    bytes_ += bytes;
    if (left_ == 0) cuda_on_cpu::fail_here("arrives at a barrier where nobody is missing");
    --left_;
    finish();
  }
  void receive(int bytes) {
    expect_initialised();
    bytes_ -= bytes;
    finish();
  }
  void wait(unsigned parity, const char* file = __builtin_FILE(), int line = __builtin_LINE());

  void expect_initialised() const {  // shared memory is all ones at first
    if (count_ == 0x7fff) cuda_on_cpu::fail_here("uses a barrier that is not initialised");
  }

 private:
  void finish() {
    if (left_ == 0 && bytes_ == 0) phase_ ^= 1, left_ = count_, cuda_on_cpu::note_progress();
  }
  int32_t bytes_ = 0;
  uint16_t left_ = 0;
  uint16_t count_ : 15, phase_ : 1;
};
static_assert(sizeof(Barrier) == 8, "as on a GPU");

struct Copy {
  const CUtensorMap* map;
  char* tile;
  int element, row, sample;
  Barrier* barrier;

  void run(int rank) const {  // `rank`: the destination block
    char* const origin = shared_origin(cuda_on_cpu::in_block(rank, cuda_on_cpu::here.shared));
    const uint32_t first = uint32_t(tile - origin);
    if (first % 1024) cuda_on_cpu::fail_here("copies a tile that does not start at 1,024 bytes");
    for (int r = 0; r < map->tile_rows; ++r)
      for (int e = 0; e < 64; ++e) {
        const int64_t at = int64_t(row) + r, i = int64_t(element) + e;
        const bool inside =
            i >= 0 && i < map->elements && at >= 0 && at < map->rows && sample >= 0 && sample < map->samples;
        const uint16_t value = inside ? map->data[sample * map->sample_stride + at * map->row_stride + i] : 0;
        std::memcpy(origin + swizzled_address(first + r * 128 + e * 2), &value, sizeof value);
      }
    barrier->receive(map->tile_rows * 128);
  }
};
struct QueuedProduct {
  void (*multiply)(float* sums, uint64_t tokens, uint64_t weight, bool add);
  float* sums;
  uint64_t tokens, weight;
  bool add;
};

// Of the running cluster: started copies by destination block, and every thread's products in batches, the last of
// which is open.
struct Pending {
  std::deque<Copy> copies[8];
  std::vector<std::deque<std::vector<QueuedProduct>>> products;
};
inline thread_local Pending pending;

inline void expect_all_copied() {
  for (const std::deque<Copy>& copies : pending.copies)
    if (!copies.empty()) cuda_on_cpu::fail_here("has ended before all copies have landed");
}

inline void Barrier::wait(unsigned parity, const char* file, int line) {
  expect_initialised();
  cuda_on_cpu::wait_until("Barrier::wait", file, line, [&] {
    if (phase_ != parity) return true;
    const cuda_on_cpu::Aside hardware;
    const auto& here = cuda_on_cpu::here;
    int rank = (here.rank + cuda_on_cpu::draw_below(here.cluster)) % here.cluster;
    if (pending.copies[rank].empty()) rank = here.rank;
    if (!pending.copies[rank].empty()) {
      const Copy copy = pending.copies[rank].front();
      pending.copies[rank].pop_front();
      if (cuda_on_cpu::has_ended(rank)) cuda_on_cpu::fail_here("copies into a block that has ended");
      copy.run(rank);
      cuda_on_cpu::note_progress();
    }
    return false;
  });
}

inline unsigned cluster_rank() { return unsigned(cuda_on_cpu::here.rank); }
inline void sync_cluster(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::sync_cluster(file, line);
}
// The corresponding address in another block of the cluster.
template <class T>
T* in_block(unsigned rank, T* p) {
  if (int(rank) >= cuda_on_cpu::here.cluster) cuda_on_cpu::fail_here("reaches for a block that is not in its cluster");
  if (cuda_on_cpu::has_ended(int(rank))) cuda_on_cpu::fail_here("reaches into a block that has ended");
  return reinterpret_cast<T*>(cuda_on_cpu::in_block(int(rank), p));
}
inline void Barrier::arrive_in(unsigned rank) { in_block(rank, this)->arrive(); }

inline void publish_barriers() {}
inline void load_tile(const CUtensorMap& map, void* tile, int element, int row, int sample, Barrier& barrier) {
  const cuda_on_cpu::Aside hardware;
  cuda_on_cpu::at_end = expect_all_copied;
  pending.copies[cuda_on_cpu::here.rank].push_back({&map, static_cast<char*>(tile), element, row, sample, &barrier});
}
template <int blocks>
void load_tile_multicast(const CUtensorMap& map, void* tile, int element, int row, int sample, Barrier& barrier) {
  if (blocks != cuda_on_cpu::here.cluster) cuda_on_cpu::fail_here("copies to other blocks than its cluster has");
  const cuda_on_cpu::Aside hardware;
  cuda_on_cpu::at_end = expect_all_copied;
  for (int rank = 0; rank < blocks; ++rank)
    pending.copies[rank].push_back(
        {&map, in_block(rank, static_cast<char*>(tile)), element, row, sample, in_block(rank, &barrier)});
}
inline void sync_threads(int number, int threads, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::sync_barrier(number, threads, file, line);
}
template <int>
void dealloc_registers() {}
template <int>
void alloc_registers() {}

inline std::deque<std::vector<QueuedProduct>>& own_products() {
  const size_t i = size_t(cuda_on_cpu::here.index());
  if (pending.products.size() <= i) pending.products.resize(i + 1024);
  return pending.products[i];
}
inline void fence_products() {
  const cuda_on_cpu::Aside hardware;
  if (!own_products().empty() && own_products().back().empty()) cuda_on_cpu::fail_here("opens products twice");
  own_products().emplace_back();
}
inline void commit_products() {}  // the next fence_products() closes the batch
template <int n>
void wait_for_products() {
  __syncwarp();
  {
    const cuda_on_cpu::Aside hardware;
    for (auto& batches = own_products(); int(batches.size()) > n; batches.pop_front())
      for (const QueuedProduct& p : batches.front()) p.multiply(p.sums, p.tokens, p.weight, p.add);
  }
  __syncwarp();
}
inline void fence_sums(float (&)[128]) {}

// Reads an element of a tile by its descriptor, as wgmma does: rows of 128 bytes, eight of them `eight_rows` apart.
template <class T>
float tile_element(uint64_t descriptor, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) cuda_on_cpu::fail_here("describes a tile whose chunks are not swizzled within 128 bytes");
  T value;
  std::memcpy(&value, swizzled(start + row / 8 * eight_rows + row % 8 * 128 + k * 2), sizeof value);
  return to_float(value);
}
template <class T>
void queue_product(float (&sums)[128], uint64_t tokens, uint64_t weight, bool add) {
  auto multiply = [](float* sums, uint64_t tokens, uint64_t weight, bool add) {
    const int thread = int(threadIdx.x) % 128, row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int k = 0; k < 16; ++k) {
      const float token[] = {tile_element<T>(tokens, row, k), tile_element<T>(tokens, row + 8, k)};
      for (int pair = 0; pair < 32; ++pair)
        for (int i = 0; i < 2; ++i) {
          const float w = tile_element<T>(weight, column + 8 * pair + i, k);
          for (int r = 0; r < 2; ++r) {
            float& sum = sums[4 * pair + 2 * r + i];
            sum = (add || k > 0 ? sum : 0) + token[r] * w;
          }
        }
    }
  };
  const cuda_on_cpu::Aside hardware;
  own_products().back().push_back({multiply, sums, tokens, weight, add});
}

}  // namespace pom::cuda
