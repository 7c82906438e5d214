// Runs the blocks of a grid for cuda_on_cpu.cpp, one block or cluster at a time; their threads are fibers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cuda_on_cpu.h"
#include "fiber.h"
#include "shared_memory.h"

namespace cuda_on_cpu {

constexpr int kBarriers = 16;  // named barriers of a block

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message.c_str());
  std::abort();
}

inline bool differ(const char* a, const char* b) { return a != b && std::strcmp(a, b); }

inline std::string place(const Wait& wait) {
  const char* const slash = std::strrchr(wait.file, '/');
  return std::string(wait.operation) + " (" + (slash ? slash + 1 : wait.file) + ":" + std::to_string(wait.line) + ")";
}

// Pseudo-random numbers (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  int64_t below(int64_t n) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return int64_t((z ^ (z >> 31)) % uint64_t(n));
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(int64_t(i))]);
  }

 private:
  uint64_t state_;
};

struct Grid {
  unsigned blocks;
  int threads;
  size_t shared_bytes;
  const std::function<void()>* body;
  const void* kernel;
  Range parameters;
  int cluster;  // blocks that run together
  uint64_t seed = 0;
  std::vector<unsigned> order = {};  // of the clusters; empty: ascending
  std::atomic<unsigned> next{0};
  std::atomic<int> running{0};  // clusters
};

struct Thread {
  enum State { held, ready, waiting, polling, exited };
  Fiber fiber;
  State state = ready;
  Wait wait{};
};

// Runs one cluster at a time, usually of one block. Keeps its memory for the next launch. Threads are numbered through
// the cluster.
class Multiprocessor {
 public:
  // Runs clusters of the grid until none is left.
  void run(Grid& grid) {
    grid_ = &grid;
    count_ = grid.threads * grid.cluster;
    here.threads = dim3(unsigned(grid.threads));
    here.blocks = dim3(grid.blocks);
    here.cluster = grid.cluster;
    if (int(threads_.size()) < count_) threads_ = std::vector<Thread>(count_);
    if (int(shared_.size()) < grid.cluster) shared_.resize(grid.cluster);
    barriers_.resize(grid.cluster * kBarriers + 1);
    const unsigned clusters = grid.blocks / grid.cluster;
    for (unsigned i; (i = grid.next++) < clusters;) run_cluster(grid.order.empty() ? i : grid.order[i]);
    grid_ = nullptr;
  }

  void wait(const Wait& wait) {
    progress_ = true;
    stop(wait, Thread::waiting);
  }
  void poll(const Wait& wait) { stop(wait, Thread::polling); }
  void note_progress() { progress_ = true; }
  // The block that is waited for runs beside this cluster or has just ended, which one more call will show.
  void back_off() {
    constexpr int kMaxBackOffs = 100000;  // many more than there are waits in a block
    if (grid_->running == 1 && ++lone_back_offs_ > kMaxBackOffs)
      fail_in(here.index(), "waits for ever for a block that has not started");
    std::this_thread::yield();
  }
  void yield_thread() {
    yielded_ = true;
    threads_[here.index()].fiber.switch_to(scheduler_);
  }

  void sync_barrier(int number, int threads, const char* file, int line) {
    if (number < 0 || number >= kBarriers || threads % kWarp)
      fail_in(here.index(), "a GPU refuses barrier " + std::to_string(number) + " for " + std::to_string(threads));
    sync_barrier(barriers_[here.rank * kBarriers + number], threads, "barrier", file, line);
  }
  void sync_cluster(const char* file, int line) {
    sync_barrier(barriers_.back(), count_, "the cluster's barrier", file, line);
  }

  char* in_block(int rank, const void* p) const {
    return shared_[rank].data() + (static_cast<const char*>(p) - here.shared);
  }
  bool in_shared(const char* p) const {
    for (int rank = 0; rank < grid_->cluster; ++rank)
      if (p >= shared_[rank].data() && p < shared_[rank].data() + grid_->shared_bytes) return true;
    return false;
  }
  int draw_below(int n) { return grid_->seed ? int(random_.below(n)) : 0; }
  bool has_ended(int rank) const {
    for (int i = rank * grid_->threads; i < (rank + 1) * grid_->threads; ++i)
      if (threads_[i].state != Thread::exited) return false;
    return true;
  }

  [[noreturn]] void fail_here(const std::string& message) const { fail_in(here.index(), message); }

  // Describes an address that the running thread must not access.
  const char* describe(const char* address) const {
    const char* const below_stack = threads_[here.index()].fiber.stack() - page_size();
    if (address >= below_stack && address < below_stack + page_size()) return "its stack is full";
    if (shared_[here.rank].is_before(address)) return "access before its shared memory";
    if (shared_[here.rank].is_past(address)) return "access past its shared memory";
    return "access to memory that it does not have";
  }

 private:
  static void thread_main();

  struct BarrierState {
    int arrived = 0;
    unsigned phase = 0;
  };

  void sync_barrier(BarrierState& barrier, int threads, const char* operation, const char* file, int line) {
    const unsigned phase = barrier.phase;
    if (++barrier.arrived == threads)
      barrier = {0, phase + 1}, progress_ = true;
    else
      wait_until(operation, file, line, [&] { return barrier.phase != phase; });
  }

  void stop(const Wait& wait, Thread::State state) {
    Thread& thread = threads_[here.index()];
    thread.wait = wait;
    thread.state = state;
    thread.fiber.switch_to(scheduler_);
  }

  // Sets `here` to the thread with this number.
  void enter(int i) {
    here.rank = i / grid_->threads;
    here.thread = {unsigned(i % grid_->threads), 0, 0};
    here.block = {first_block_ + unsigned(here.rank), 0, 0};
    here.shared = shared_[here.rank].data();
  }

  void run_cluster(unsigned cluster) {
    first_block_ = cluster * grid_->cluster;
    random_ = Random(grid_->seed + first_block_);
    for (int rank = 0; rank < grid_->cluster; ++rank) shared_[rank].clear(grid_->shared_bytes);
    // In random order a block other than the first may start as late as possible.
    const int late = grid_->seed && grid_->cluster > 1 ? int(random_.below(grid_->cluster)) : 0;
    for (int i = 0; i < count_; ++i) {
      threads_[i].fiber.start(thread_main, i);
      threads_[i].state = late > 0 && i / grid_->threads == late ? Thread::held : Thread::ready;
    }
    for (BarrierState& barrier : barriers_) barrier = {};
    lone_back_offs_ = 0;
    ++grid_->running;
    if (counter) counter->start_block();
    do {
      all_warps();
      while (!warps_.empty()) {  // warps with threads that can run
        const size_t at = grid_->seed ? random_.below(int64_t(warps_.size())) : 0;
        run_warp(warps_[at]);
        if (yielded_)  // can go on, after the other warps
          std::rotate(warps_.begin() + int64_t(at), warps_.begin() + int64_t(at) + 1, warps_.end());
        else if (!release_warp(warps_[at]))
          warps_.erase(warps_.begin() + int64_t(at));
      }
    } while (release_polling() || release_blocks());
    if (counter) counter->end_block();
    --grid_->running;
    check_shared_memory();
    if (at_end) at_end();
  }

  void all_warps() {
    warps_.resize((count_ + kWarp - 1) / kWarp);
    std::iota(warps_.begin(), warps_.end(), 0);
  }

  // Runs every ready thread until it waits or exits.
  void run_warp(int warp) {
    const int first = warp * kWarp, last = std::min(first + kWarp, count_);
    lanes_.resize(last - first);
    std::iota(lanes_.begin(), lanes_.end(), first);
    if (grid_->seed) random_.shuffle(lanes_);
    yielded_ = false;
    for (int lane : lanes_)
      if (threads_[lane].state == Thread::ready) {
        enter(lane);
        here.stack = threads_[lane].fiber.stack();
        scheduler_.switch_to(threads_[lane].fiber);
        here.stack = nullptr;
      }
  }

  // Releases lanes whose whole mask waits. No lane of the warp is ready.
  bool release_warp(int warp) {
    bool released = false;
    const int first = warp * kWarp;
    for (int i = first; i < std::min(first + kWarp, count_); ++i)
      if (threads_[i].state == Thread::waiting && !threads_[i].wait.of_block && is_complete(i, first)) {
        exchange_values(threads_[i].wait.mask, first);
        released = true;
      }
    return released;
  }

  // Whether all lanes in thread i's mask wait with the same mask.
  bool is_complete(int i, int first) const {
    const Wait& own = threads_[i].wait;
    if (!(own.mask >> (i - first) & 1)) fail_in(i, place(own) + " does not name its own lane");
    bool complete = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(own.mask >> lane & 1)) continue;
      const int other = first + lane;
      if (other >= count_ || threads_[other].state == Thread::exited)
        fail_in(i, place(own) + " names lane " + std::to_string(lane) + ", which has exited or never was");
      const Wait& wait = threads_[other].wait;
      if (wait.of_block || wait.mask != own.mask)
        complete = false;
      else if (differ(wait.operation, own.operation) || wait.bytes != own.bytes)
        fail_in(i, place(own) + " meets thread " + std::to_string(other) + " in " + place(wait));
    }
    return complete;
  }

  void exchange_values(unsigned mask, int first) {
    char values[kWarp][16];
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) {
        const Wait& wait = threads_[first + lane].wait;
        if (wait.bytes) std::memcpy(values[lane], wait.value, wait.bytes);
      }
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) {
        const Wait& wait = threads_[first + lane].wait;
        if (!(mask >> wait.source & 1))
          fail_in(first + lane,
                  place(wait) + " reads lane " + std::to_string(wait.source) + ", which it does not name");
        if (wait.bytes) std::memcpy(wait.value, values[wait.source], wait.bytes);
        threads_[first + lane].state = Thread::ready;
      }
  }

  // Releases polling threads if anything changed since they last looked.
  bool release_polling() {
    bool released = false;
    for (int i = 0; progress_ && i < count_; ++i)
      if (threads_[i].state == Thread::polling) {
        threads_[i].state = Thread::ready;
        released = true;
      }
    progress_ = false;
    return released;
  }

  bool release_held() {
    bool released = false;
    for (int i = 0; i < count_; ++i)
      if (threads_[i].state == Thread::held) threads_[i].state = Thread::ready, released = true;
    return released;
  }

  // Releases blocks whose threads all wait at the same __syncthreads(). False if all have exited. No thread is ready.
  bool release_blocks() {
    int stuck = -1;
    bool released = false;
    for (int rank = 0; rank < grid_->cluster; ++rank) {
      if (has_ended(rank) || threads_[rank * grid_->threads].state == Thread::held) continue;
      if (waits_together(rank))
        released = release_block(rank);
      else
        stuck = rank;
    }
    return released || release_held() || (stuck >= 0 && release_block(stuck));
  }

  bool waits_together(int rank) const {
    const int begin = rank * grid_->threads;
    for (int i = begin; i < begin + grid_->threads; ++i)
      if (threads_[i].state != Thread::waiting || !threads_[i].wait.of_block) return false;
    return true;
  }

  // Fails if the threads do not all wait at the same barrier.
  bool release_block(int rank) {
    const int begin = rank * grid_->threads, n = begin + grid_->threads;
    int first = begin;
    while (threads_[first].state == Thread::exited) ++first;
    const Wait& barrier = threads_[first].wait;
    for (int i = begin; i < n; ++i) {
      const Wait& wait = threads_[i].wait;
      if (threads_[i].state == Thread::exited)
        fail_in(first, "waits at " + place(barrier) + ", but thread " + std::to_string(i - begin) + " has exited");
      if (wait.mask != barrier.mask || wait.line != barrier.line || differ(wait.file, barrier.file))
        fail_in(first, "waits at " + place(barrier) + " for ever: thread " + std::to_string(i - begin) + " waits at " +
                           place(wait));
    }
    if (!barrier.of_block) fail_in(first, "waits at " + place(barrier) + " for ever");
    for (int i = begin; i < n; ++i) threads_[i].state = Thread::ready;
    return true;
  }

  void check_shared_memory() const {
    for (int rank = 0; rank < grid_->cluster; ++rank) {
      if (shared_[rank].written_before()) fail_in_block(rank, "wrote before its shared memory");
      if (shared_[rank].written_past())
        fail_in_block(rank, "wrote past the " + std::to_string(grid_->shared_bytes) + " bytes of its shared memory");
    }
  }

  [[noreturn]] void fail_in(int i, const std::string& message) const {
    fail_in_block(i / grid_->threads, "thread " + std::to_string(i % grid_->threads) + ": " + message);
  }
  [[noreturn]] void fail_in_block(int rank, const std::string& message) const {
    fail("block " + std::to_string(first_block_ + unsigned(rank)) + ", " + message);
  }

  Grid* grid_ = nullptr;
  int count_ = 0;  // threads of a cluster
  unsigned first_block_ = 0;
  std::vector<Thread> threads_;
  Fiber scheduler_;
  std::vector<int> warps_, lanes_;
  int lone_back_offs_ = 0;  // of this cluster
  bool progress_ = false, yielded_ = false;
  std::vector<BarrierState> barriers_;  // of every block; the last one is the cluster's
  Random random_{0};
  std::vector<SharedMemory> shared_;  // of every block
};

inline thread_local Multiprocessor* running = nullptr;  // by this OS thread

inline void Multiprocessor::thread_main() {
  Multiprocessor& self = *running;
  Thread& thread = self.threads_[here.index()];
  thread.fiber.begin(self.scheduler_);
  (*self.grid_->body)();
  thread.state = Thread::exited;
  self.progress_ = true;
  thread.fiber.switch_to(self.scheduler_, true);
}

}  // namespace cuda_on_cpu
