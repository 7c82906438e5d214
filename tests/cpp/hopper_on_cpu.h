// What csrc/cuda/hopper.cuh takes from a GPU of compute capability 9.0, on a CPU.
//
// Copies and products are done as late as a GPU may do them: a copy when a thread has to wait at a barrier, a product when
// its thread waits for it. So a tile that is used too early is not there yet, and one that is freed too early is another
// one by then. A descriptor is taken apart as the hardware does it.
#pragma once

#include <cstddef>
#include <deque>
#include <vector>

#include "cuda_on_cpu.h"
#include "pom/pom.h"

namespace pom::cuda {

struct TileMap {
  const uint16_t* data = nullptr;
  int64_t elements = 0, rows = 0, samples = 0, row_stride = 0, sample_stride = 0;
  int tile_rows = 0;
};
// Status::bad_size for what a GPU refuses.
template <class Tensor>
Status describe_tensor(const Tensor& t, int rows, TileMap& map) {
  map = {static_cast<const uint16_t*>(t.data), t.elements, t.rows, t.samples, t.row_stride, t.sample_stride, rows};
  const bool sizes = t.elements > 0 && t.rows > 0 && t.samples > 0 && rows > 0 && rows <= 256;
  const bool strides = t.row_stride % 8 == 0 && t.sample_stride % 8 == 0 && t.row_stride > 0 && t.sample_stride > 0;
  return sizes && strides && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 ? Status::ok : Status::bad_size;
}

// Addresses in shared memory count from a multiple of 1,024 bytes, as on a GPU.
inline char* shared_origin() {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(cuda_on_cpu::here.shared) / 1024 * 1024);
}
inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const char*>(p) - shared_origin()); }
// Of chunks of 16 bytes in 1,024: where the one lies that is meant by an address.
inline char* swapped(uint32_t address) { return shared_origin() + (address ^ (address >> 3 & 0x70)); }

class Barrier {
 public:
  void init(int count) { *this = {}, left_ = count_ = uint16_t(count); }
  void arrive() { arrive_expecting(0); }
  void arrive_expecting(int bytes) {
    bytes_ += bytes;
    if (left_ == 0) cuda_on_cpu::fail_here("arrives at a barrier where nobody is missing");
    --left_;
    finish();
  }
  void receive(int bytes) {
    bytes_ -= bytes;
    finish();
  }
  void wait(unsigned parity, const char* file = __builtin_FILE(), int line = __builtin_LINE());

 private:
  void finish() {
    if (left_ == 0 && bytes_ == 0) phase_ ^= 1, left_ = count_;
  }
  int32_t bytes_ = 0;
  uint16_t left_ = 0;
  uint16_t count_ : 15, phase_ : 1;
};
static_assert(sizeof(Barrier) == 8, "as on a GPU");

struct Copy {
  const TileMap* map;
  char* tile;
  int element, row, sample;
  Barrier* barrier;

  void run() const {
    if (shared_address(tile) % 1024) cuda_on_cpu::fail_here("copies a tile that does not start at 1,024 bytes");
    for (int r = 0; r < map->tile_rows; ++r)
      for (int e = 0; e < 64; ++e) {
        const int64_t at = int64_t(row) + r, i = int64_t(element) + e;
        const bool inside = i >= 0 && i < map->elements && at >= 0 && at < map->rows && sample >= 0 && sample < map->samples;
        const uint16_t value = inside ? map->data[sample * map->sample_stride + at * map->row_stride + i] : 0;
        std::memcpy(swapped(shared_address(tile) + r * 128 + e * 2), &value, sizeof value);
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

// Of the block that runs: copies that were started, and every thread's products, in batches of which the last is open.
struct Pending {
  std::deque<Copy> copies;
  std::vector<std::deque<std::vector<QueuedProduct>>> products;
};
inline thread_local Pending pending;

inline void Barrier::wait(unsigned parity, const char* file, int line) {
  cuda_on_cpu::wait_until("Barrier::wait", file, line, [&] {
    if (phase_ != parity) return true;
    const cuda_on_cpu::Aside hardware;
    if (!pending.copies.empty()) {
      pending.copies.front().run();
      pending.copies.pop_front();
      cuda_on_cpu::note_progress();
    }
    return false;
  });
}

inline void publish_barriers() {}
inline void load_tile(const TileMap& map, void* tile, int element, int row, int sample, Barrier& barrier) {
  const cuda_on_cpu::Aside hardware;
  pending.copies.push_back({&map, static_cast<char*>(tile), element, row, sample, &barrier});
}
inline void sync_threads(int number, int threads, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::meet(number, threads, file, line);
}
template <int>
void drop_registers() {}
template <int>
void take_registers() {}

inline std::deque<std::vector<QueuedProduct>>& own_products() {
  if (pending.products.size() <= threadIdx.x) pending.products.resize(1024);
  return pending.products[threadIdx.x];
}
inline void open_products() {
  const cuda_on_cpu::Aside hardware;
  if (!own_products().empty() && own_products().back().empty()) cuda_on_cpu::fail_here("opens products twice");
  own_products().emplace_back();
}
inline void close_products() {}  // a batch is closed where the next one opens
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
inline void keep_behind(float (&)[128]) {}

// An element of a tile by its descriptor, as an instruction finds it: rows of 128 bytes, eight of them `eight_rows` apart.
template <class T>
float tile_element(uint64_t descriptor, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) cuda_on_cpu::fail_here("describes a tile whose chunks are not swapped within 128 bytes");
  T value;
  std::memcpy(&value, swapped(start + row / 8 * eight_rows + row % 8 * 128 + k * 2), sizeof value);
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
