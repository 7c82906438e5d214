// Counts the bytes of global memory that kernels load and store in the stand-in for CUDA.
//
// The kernels are compiled with -fsanitize=thread, which puts a call before every load and store. The functions that it
// calls are these: they take the place of the sanitizer's library. Not counted is what is no global memory on a GPU:
// the threads' stacks, shared memory, a kernel's parameters, thread-local variables (registers of the stand-in) and
// constants of the program.
//
// A byte moves in sectors of 32 bytes. A sector counts when a block touches it and has not touched it within its last
// 64 KiB of sectors that counted: about what a block has of a multiprocessor's L1 cache. So the lanes of a warp that
// read one number move one sector, coefficients that a block reads again and again are moved once, and a second pass
// over more than the cache holds moves everything again. Loads and stores are kept apart; a store moves its sector
// once, an atomic operation loads and stores it. Threads take turns with every sector, as they do on a GPU, or one would
// be through with its tokens before its neighbour touches the other half of their sectors. There is no L2: what two
// blocks load counts twice. Copies of tiles by Hopper's own unit (hopper_on_cpu.h) are not counted.

#include "count_on_cpu.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "cuda_on_cpu.h"
#include "fiber.h"

namespace {

using cuda_on_cpu::here;
using cuda_on_cpu::Range;

constexpr int kSectorBits = 5;                           // 32 bytes
constexpr uint64_t kKept = (64 << 10) >> kSectorBits;  // sectors that a block finds again

// The sectors that a block has touched lately.
class Sectors {
 public:
  void start_block() {
    ++block_;
    used_ = counted_ = 0;
  }
  uint64_t counted() const { return counted_; }

  // Whether it counts.
  bool touch(uint64_t sector) {
    const uint64_t before = counted_;
    Entry* entry = find(sector);
    if (entry->block != block_) {
      if (2 * ++used_ > entries_.size()) {
        drop_old();
        entry = find(sector);
      }
      *entry = {sector, counted_++, block_};
    } else if (is_old(*entry)) {
      ++counted_;
    }
    entry->stamp = counted_;
    return counted_ > before;
  }

 private:
  struct Entry {
    uint64_t sector, stamp, block;  // another block's are empty
  };
  bool is_old(const Entry& entry) const { return counted_ - entry.stamp > kKept; }

  // The sector's entry, or the empty one where it belongs.
  Entry* find(uint64_t sector) {
    const size_t mask = entries_.size() - 1;
    size_t i = (sector * 0x9e3779b97f4a7c15 >> 32) & mask;
    while (entries_[i].block == block_ && entries_[i].sector != sector) i = (i + 1) & mask;
    return &entries_[i];
  }

  // Makes room, in a larger table if most are still found.
  void drop_old() {
    std::vector<Entry> kept;
    for (const Entry& entry : entries_)
      if (entry.block == block_ && !is_old(entry)) kept.push_back(entry);
    const size_t size = 4 * kept.size() > entries_.size() ? 2 * entries_.size() : entries_.size();
    entries_.assign(size, Entry{});
    for (const Entry& entry : kept) *find(entry.sector) = entry;
    used_ = kept.size() + 1;
  }

  std::vector<Entry> entries_ = std::vector<Entry>(8 * kKept);
  uint64_t block_ = 0, counted_ = 0;
  size_t used_ = 0;
};

// What a block on this thread of the operating system moves.
struct Traffic {
  Sectors loads, stores;
  Range thread_local_variables;
};
thread_local Traffic* traffic = nullptr;  // a constant to begin with: every access asks for it

// Of the grid that runs: one at a time.
Range parameters, program;

std::mutex mutex;  // of what follows
std::vector<CountedLaunch> launches;

// Calls of(its description, Range of its code and constants) for the program or library that this is part of.
template <class F>
void with_program(F of) {
  auto each = [](dl_phdr_info* info, size_t, void* f) {
    Range all{reinterpret_cast<char*>(~uintptr_t(0)), nullptr};
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      const char* const begin = reinterpret_cast<char*>(info->dlpi_addr + part.p_vaddr);
      if (part.p_type == PT_LOAD) all = {std::min(all.begin, begin), std::max(all.end, begin + part.p_memsz)};
    }
    if (!all.has(reinterpret_cast<const char*>(&program))) return 0;
    (*static_cast<F*>(f))(*info, all);
    return 1;
  };
  dl_iterate_phdr(each, &of);
}

void start_grid(const void* kernel, unsigned blocks, int threads, Range of_kernel) {
  uint64_t at = 0;
  with_program([&](const dl_phdr_info& info, Range all) {
    program = all;
    at = reinterpret_cast<uint64_t>(kernel) - info.dlpi_addr;
  });
  parameters = of_kernel;
  const std::lock_guard<std::mutex> lock(mutex);
  launches.push_back({at, blocks, uint32_t(threads), 0, 0});
}

void find_thread_local_variables() {
  with_program([](const dl_phdr_info& info, Range) {
    const char* const begin = static_cast<const char*>(info.dlpi_tls_data);
    for (int i = 0; i < info.dlpi_phnum; ++i)
      if (info.dlpi_phdr[i].p_type == PT_TLS)
        traffic->thread_local_variables = {begin, begin + info.dlpi_phdr[i].p_memsz};
  });
}

void start_block() {
  if (!traffic) {
    traffic = new Traffic;  // for as long as the thread, which serves until the program ends
    find_thread_local_variables();
  }
  traffic->loads.start_block();
  traffic->stores.start_block();
}

void end_block() {
  const std::lock_guard<std::mutex> lock(mutex);
  launches.back().loaded += traffic->loads.counted() << kSectorBits;
  launches.back().stored += traffic->stores.counted() << kSectorBits;
}

void transfer(bool reads, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  launches.push_back({reads ? kCopy : kClear, 0, 0, reads ? bytes : 0, bytes});
}

constexpr cuda_on_cpu::Counter kCounter = {start_grid, start_block, end_block, transfer};
const bool installed = [] { return cuda_on_cpu::counter = &kCounter, true; }();

bool touch(Sectors& sectors, const char* p, size_t bytes) {
  bool counts = false;
  const uint64_t last = (reinterpret_cast<uint64_t>(p) + bytes - 1) >> kSectorBits;
  for (uint64_t sector = reinterpret_cast<uint64_t>(p) >> kSectorBits; sector <= last; ++sector)
    counts |= sectors.touch(sector);
  return counts;
}

void access(const void* address, size_t bytes, bool loads, bool stores) {
  const char* const p = static_cast<const char*>(address);
  const char* const stack = here.stack;
  if (!stack || size_t(p - stack) < Fiber::kStack) return;
  Traffic& own = *traffic;
  if (own.thread_local_variables.has(p) || cuda_on_cpu::in_shared(p) || parameters.has(p) || program.has(p)) return;
  const bool counts = (loads && touch(own.loads, p, bytes)) | (stores && touch(own.stores, p, bytes));
  if (counts) cuda_on_cpu::make_room();
}

}  // namespace

extern "C" {

void count_on_cpu_reset() {
  const std::lock_guard<std::mutex> lock(mutex);
  launches.clear();
}

size_t count_on_cpu_launches(CountedLaunch* found, size_t room) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::copy_n(launches.begin(), std::min(room, launches.size()), found);
  return launches.size();
}

// By the names that the compiler calls.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, true, false); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, false, true); }

#define ACCESSES(bytes)                                                  \
  void __tsan_read##bytes(void* p) { access(p, bytes, true, false); }    \
  void __tsan_write##bytes(void* p) { access(p, bytes, false, true); }   \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, true, false); } \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, false, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

#define ATOMICS(bits)                                                                              \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile void* p, int) {                         \
    access(const_cast<const void*>(p), bits / 8, true, false);                                     \
    return __atomic_load_n(static_cast<const volatile uint##bits##_t*>(p), __ATOMIC_SEQ_CST);      \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile void* p, uint##bits##_t x, int) {                      \
    access(const_cast<const void*>(p), bits / 8, false, true);                                     \
    __atomic_store_n(static_cast<volatile uint##bits##_t*>(p), x, __ATOMIC_SEQ_CST);               \
  }                                                                                                \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile void* p, uint##bits##_t x, int) {         \
    access(const_cast<const void*>(p), bits / 8, true, true);                                      \
    return __atomic_exchange_n(static_cast<volatile uint##bits##_t*>(p), x, __ATOMIC_SEQ_CST);     \
  }                                                                                                \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile void* p, uint##bits##_t x, int) {        \
    access(const_cast<const void*>(p), bits / 8, true, true);                                      \
    return __atomic_fetch_add(static_cast<volatile uint##bits##_t*>(p), x, __ATOMIC_SEQ_CST);      \
  }                                                                                                \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile void* p, void* old, uint##bits##_t x, int, int) { \
    access(const_cast<const void*>(p), bits / 8, true, true);                                      \
    return __atomic_compare_exchange_n(static_cast<volatile uint##bits##_t*>(p), static_cast<uint##bits##_t*>(old), x, \
                                       false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
  }                                                                                                \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile void* p, void* old, uint##bits##_t x, int a, int b) { \
    return __tsan_atomic##bits##_compare_exchange_strong(p, old, x, a, b);                         \
  }
ATOMICS(8)
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)

}  // extern "C"
