// Counts the bytes of global memory that kernels load and store in the stand-in for CUDA.
//
// The kernels are compiled with -fsanitize=thread, which inserts a call before every load and store. The functions
// below receive these calls, in place of the sanitizer's library. Not counted is what a GPU would not keep in global
// memory: stacks of threads, shared memory, kernel parameters, thread-local variables (registers of the stand-in) and
// constants of the program.
//
// Memory moves in sectors of 32 bytes. A sector counts if a block touches it and has not touched it within its last 64
// KiB of counted sectors, about a block's share of the L1 cache of an SM. So lanes of a warp that read the same number
// move one sector, coefficients that a block reads repeatedly move once, and a second pass over more than the cache
// moves everything again. Loads and stores are counted separately; an atomic operation is both. Threads switch at every
// counted sector, as they do on a GPU; otherwise one would finish its tokens before its neighbour touches the other
// half of their sectors. There is no L2: what two blocks load counts twice. Tile copies (hopper_on_cpu.h) are not
// counted.

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

constexpr int kSectorBits = 5;                                 // 32 bytes
constexpr uint64_t kCacheSectors = (64 << 10) >> kSectorBits;  // sectors in a block's cache

// The sectors that a block touched recently.
class Sectors {
 public:
  void start_block() {
    ++block_;
    used_ = counted_ = 0;
  }
  uint64_t counted() const { return counted_; }

  // Returns whether the access counts.
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
    uint64_t sector, stamp, block;  // entries of another block are empty
  };
  bool is_old(const Entry& entry) const { return counted_ - entry.stamp > kCacheSectors; }

  // The sector's entry, or the empty one where it belongs.
  Entry* find(uint64_t sector) {
    const size_t mask = entries_.size() - 1;
    size_t i = (sector * 0x9e3779b97f4a7c15 >> 32) & mask;
    while (entries_[i].block == block_ && entries_[i].sector != sector) i = (i + 1) & mask;
    return &entries_[i];
  }

  // Removes old entries; doubles the table if most are recent.
  void drop_old() {
    std::vector<Entry> kept;
    for (const Entry& entry : entries_)
      if (entry.block == block_ && !is_old(entry)) kept.push_back(entry);
    const size_t size = 4 * kept.size() > entries_.size() ? 2 * entries_.size() : entries_.size();
    entries_.assign(size, Entry{});
    for (const Entry& entry : kept) *find(entry.sector) = entry;
    used_ = kept.size() + 1;
  }

  std::vector<Entry> entries_ = std::vector<Entry>(8 * kCacheSectors);
  uint64_t block_ = 0, counted_ = 0;
  size_t used_ = 0;
};

// What blocks on this OS thread move.
struct Traffic {
  Sectors loads, stores;
  Range thread_local_variables;
};
thread_local Traffic* traffic = nullptr;  // constant-initialised: every access reads it

// Of the running grid; only one runs at a time.
Range parameters, program;

std::mutex mutex;  // guards the launches
std::vector<CountedLaunch> launches;

// Calls of(description, Range of code and constants) for the program or library that contains this file.
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
    traffic = new Traffic;  // never freed: the thread lives until the program ends
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
  if (counts) cuda_on_cpu::yield_thread();
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

// The names that the compiler calls.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, true, false); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, false, true); }

#define ACCESSES(bytes)                                                         \
  void __tsan_read##bytes(void* p) { access(p, bytes, true, false); }           \
  void __tsan_write##bytes(void* p) { access(p, bytes, false, true); }          \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, true, false); } \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, false, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

#define ATOMICS(bits)                                                                                                  \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile void* p, int) {                                             \
    access(const_cast<const void*>(p), bits / 8, true, false);                                                         \
    return __atomic_load_n(static_cast<const volatile uint##bits##_t*>(p), __ATOMIC_SEQ_CST);                          \
  }                                                                                                                    \
  void __tsan_atomic##bits##_store(volatile void* p, uint##bits##_t x, int) {                                          \
    access(const_cast<const void*>(p), bits / 8, false, true);                                                         \
    __atomic_store_n(static_cast<volatile uint##bits##_t*>(p), x, __ATOMIC_SEQ_CST);                                   \
  }                                                                                                                    \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile void* p, uint##bits##_t x, int) {                             \
    access(const_cast<const void*>(p), bits / 8, true, true);                                                          \
    return __atomic_exchange_n(static_cast<volatile uint##bits##_t*>(p), x, __ATOMIC_SEQ_CST);                         \
  }                                                                                                                    \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile void* p, uint##bits##_t x, int) {                            \
    access(const_cast<const void*>(p), bits / 8, true, true);                                                          \
    return __atomic_fetch_add(static_cast<volatile uint##bits##_t*>(p), x, __ATOMIC_SEQ_CST);                          \
  }                                                                                                                    \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile void* p, void* old, uint##bits##_t x, int, int) {        \
    access(const_cast<const void*>(p), bits / 8, true, true);                                                          \
    return __atomic_compare_exchange_n(static_cast<volatile uint##bits##_t*>(p), static_cast<uint##bits##_t*>(old), x, \
                                       false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                     \
  }                                                                                                                    \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile void* p, void* old, uint##bits##_t x, int a, int b) {      \
    return __tsan_atomic##bits##_compare_exchange_strong(p, old, x, a, b);                                             \
  }
ATOMICS(8)
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)

}  // extern "C"
