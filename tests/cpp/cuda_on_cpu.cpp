// The device of cuda_on_cpu.h: runs grids on OS threads and explains faults.

#include "cuda_on_cpu.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "guarded.h"
#include "multiprocessor.h"

namespace cuda_on_cpu {
namespace {

constexpr int kMaxThreads = 1024;                 // of a block
constexpr size_t kMaxShared = 48 << 10;           // bytes that a launch may use without asking for more
constexpr size_t kAllShared = 227 << 10;          // bytes that it may use at all
constexpr int64_t kMinParallelThreads = 1 << 13;  // threads of a grid from which several processors run it

struct sigaction earlier_action;

// Names the thread that made an invalid access. The access is then repeated and ends the program.
void explain_fault(int signal, siginfo_t* info, void*) {
  if (running)
    std::fprintf(stderr, "cuda_on_cpu: block %u, thread %u: %s\n", here.block.x, here.thread.x,
                 running->describe(static_cast<const char*>(info->si_addr)));
  sigaction(signal, &earlier_action, nullptr);
}

// A stack for explain_fault(), since a fiber's stack may be full. Sanitizers install their own.
void make_signal_stack() {
  thread_local bool made = false;
  stack_t stack;
  if (made || sigaltstack(nullptr, &stack) || !(stack.ss_flags & SS_DISABLE)) return;
  constexpr size_t kBytes = 64 << 10;
  stack = {map_guarded(kBytes), 0, kBytes};
  sigaltstack(&stack, nullptr);
  made = true;
}

// All processors. Its threads run until the program ends, so it is never destroyed.
class Device {
 public:
  static Device& get() {
    static Device* const device = new Device;
    return *device;
  }

  void set_seed(uint64_t seed) {
    const std::lock_guard<std::mutex> one(launching_);
    seed_ = seed;
    launches_ = 0;
  }

  void run(Grid& grid) {
    const std::lock_guard<std::mutex> one(launching_);
    if (counter) counter->start_grid(grid.kernel, grid.blocks, grid.threads, grid.parameters);
    if (seed_) {
      grid.seed = (seed_ * 0x9e3779b97f4a7c15 + ++launches_ * 0xd1b54a32d192ed03) | 1;
      grid.order.resize(grid.blocks / grid.cluster);
      std::iota(grid.order.begin(), grid.order.end(), 0u);
      Random(grid.seed).shuffle(grid.order);
    }
    // OS threads do not survive a fork.
    const bool shared = int64_t(grid.blocks) * grid.threads >= kMinParallelThreads && getpid() == process_;
    if (shared) offer(grid);
    run_on(processors_[0], grid);
    if (shared) wait_for_others();
  }

 private:
  Device() : processors_(std::max(1u, std::thread::hardware_concurrency())) {
    if (const char* seed = std::getenv("CUDA_ON_CPU_SEED")) seed_ = std::strtoull(seed, nullptr, 10);
    struct sigaction action = {};
    action.sa_sigaction = explain_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &earlier_action);
    for (size_t i = 1; i < processors_.size(); ++i) std::thread([this, i] { serve(processors_[i]); }).detach();
  }

  static void run_on(Multiprocessor& processor, Grid& grid) {
    make_signal_stack();
    running = &processor;
    processor.run(grid);
    running = nullptr;
  }

  void offer(Grid& grid) {
    const std::lock_guard<std::mutex> lock(mutex_);
    offered_ = &grid;
    ++offers_;
    busy_ = processors_.size() - 1;
    changed_.notify_all();
  }
  void wait_for_others() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return busy_ == 0; });
  }
  void serve(Multiprocessor& processor) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = 0;;) {
      changed_.wait(lock, [&] { return offers_ != seen; });
      seen = offers_;
      Grid& grid = *offered_;
      lock.unlock();
      run_on(processor, grid);
      lock.lock();
      if (--busy_ == 0) changed_.notify_all();
    }
  }

  const pid_t process_ = getpid();
  std::mutex launching_;  // one grid at a time
  uint64_t seed_ = 0, launches_ = 0;
  std::vector<Multiprocessor> processors_;

  std::mutex mutex_;  // guards the members below
  std::condition_variable changed_;
  Grid* offered_ = nullptr;
  uint64_t offers_ = 0;
  size_t busy_ = 0;
};

}  // namespace

void wait(const Wait& wait) { running->wait(wait); }
void poll(const Wait& wait) { running->poll(wait); }
void note_progress() { running->note_progress(); }
void back_off() { running->back_off(); }
void yield_thread() { running->yield_thread(); }
void sync_barrier(int number, int threads, const char* file, int line) {
  running->sync_barrier(number, threads, file, line);
}
void fail_here(const char* message) { running->fail_here(message); }
char* in_block(int rank, const void* p) { return running->in_block(rank, p); }
bool in_shared(const char* p) { return running->in_shared(p); }
int draw_below(int n) { return running->draw_below(n); }
bool has_ended(int rank) { return running->has_ended(rank); }
void sync_cluster(const char* file, int line) { running->sync_cluster(file, line); }

size_t& allowed_shared(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  return allowed[{kernel, device}];
}

void set_seed(uint64_t seed) { Device::get().set_seed(seed); }

void run_grid(unsigned blocks, int threads, size_t shared_bytes, const std::function<void()>& body, const void* kernel,
              Range parameters, int cluster) {
  if (cluster < 1 || cluster > 8 || blocks % cluster || (cluster > 1 && threads % kWarp))
    fail("a GPU refuses clusters of " + std::to_string(cluster) + " in " + std::to_string(blocks) + " blocks of " +
         std::to_string(threads) + " threads");
  if (blocks < 1 || threads < 1 || threads > kMaxThreads || shared_bytes > kAllShared ||
      shared_bytes > std::max(kMaxShared, requested_shared))
    fail("a GPU refuses " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads with " +
         std::to_string(shared_bytes) + " bytes of shared memory");
  requested_shared = 0;  // applies to this launch only
  // The function belongs to the launch, like its parameters, and lies beside them.
  const char* const function = reinterpret_cast<const char*>(&body);
  parameters = {std::min(parameters.begin, function), std::max(parameters.end, function + sizeof body)};
  Grid grid{blocks, threads, shared_bytes, &body, kernel, parameters, cluster};
  Device::get().run(grid);
}

}  // namespace cuda_on_cpu
