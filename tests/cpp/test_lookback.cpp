// Tests the sums before each step, computed by blocks that wait for each other.

#include "cuda_on_cpu.h"

#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/lookback.cuh"

using check::expect;
using check::section;
using pom::Arena;
using namespace pom::cuda;

constexpr int kColumns = 64;

struct Shape {
  int64_t batch, steps;
  int channel_tiles;
};

float number(int64_t at) { return 1.0f / float(3 + at % 1009); }

// (batch, steps, channels) sums of `number` before each step. The last channel tile has half the columns.
template <class Acc>
std::vector<double> found(const Shape& shape) {
  const int64_t channels = shape.channel_tiles * kColumns - kColumns / 2;
  Arena counted;
  Lookback<Acc>(shape.batch, shape.steps, shape.channel_tiles, channels, counted);
  std::vector<char> memory(counted.used(), char(0xff));
  Arena arena(Arena::align(memory.data()));
  const Lookback<Acc> sums(shape.batch, shape.steps, shape.channel_tiles, channels, arena);
  std::vector<double> before(shape.batch * shape.steps * channels, -1);
  for (int round = 0; round < 2; ++round) {  // also in memory that has been used
    expect(sums.start(nullptr) == pom::Status::ok, "not started");
    cuda_on_cpu::launch(unsigned(sums.blocks), kColumns, 16, [&] {
      const ScanStep step = claim_step(sums);
      // some are late, while their neighbours run on other processors
      if (sums.blocks < 1000 && step.index % 3 == 0 && threadIdx.x == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      const int64_t own = int64_t(step.channel_tile) * kColumns + threadIdx.x, column = own < channels ? own : -1;
      const int64_t at = (int64_t(step.b) * sums.steps + step.index) * channels + column;
      if (column >= 0) before[at] = sum_before(sums, step, column, double(number(at)));
    });
  }
  return before;
}

template <class Acc>
void test(const Shape& shape) {
  const int64_t channels = shape.channel_tiles * kColumns - kColumns / 2;
  std::vector<double> first;
  for (uint64_t seed : {0, 1, 2, 3}) {
    cuda_on_cpu::set_seed(seed);
    const std::vector<double> sums = found<Acc>(shape);
    if (first.empty()) first = sums;
    expect(sums == first, "%d steps: other bits with seed %d", int(shape.steps), int(seed));
  }
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t column = 0; column < channels; ++column) {
      double sum = 0;
      for (int64_t step = 0; step < shape.steps; ++step) {
        const int64_t at = (b * shape.steps + step) * channels + column;
        expect(std::fabs(first[at] - sum) <= 1e-14 * sum, "%d steps, sample %d, step %d, column %d: %.9g, not %.9g",
               int(shape.steps), int(b), int(step), int(column), first[at], sum);
        sum += double(number(at));
      }
    }
}

// Numbers that are not finite reach all later steps, even the bit patterns that mean "unwritten".
template <class Acc>
void test_special_numbers() {
  const uint64_t ones = ~uint64_t(0);
  Acc blank;
  double wide_blank;
  std::memcpy(&blank, &ones, sizeof blank);
  std::memcpy(&wide_blank, &ones, sizeof wide_blank);
  expect(is_unwritten(blank) && !is_unwritten(Acc(NAN)) && !is_unwritten(Acc(-NAN)) && !is_unwritten(Acc(0)),
         "what is blank");
  for (const double special : {double(blank), wide_blank, double(NAN), double(INFINITY), -double(INFINITY)}) {
    constexpr int64_t kSteps = 40;
    Arena counted;
    Lookback<Acc>(1, kSteps, 1, kColumns, counted);
    std::vector<char> memory(counted.used());
    Arena arena(Arena::align(memory.data()));
    const Lookback<Acc> sums(1, kSteps, 1, kColumns, arena);
    std::vector<double> before(kSteps * kColumns);
    expect(sums.start(nullptr) == pom::Status::ok, "not started");
    cuda_on_cpu::launch(unsigned(sums.blocks), kColumns, 16, [&] {
      const ScanStep step = claim_step(sums);
      const bool is_special = step.index == threadIdx.x % kSteps;
      before[step.index * kColumns + threadIdx.x] = sum_before(sums, step, threadIdx.x, is_special ? special : 1.0);
    });
    for (int64_t step = 0; step < kSteps; ++step)
      for (int column = 0; column < kColumns; ++column) {
        const double sum = before[step * kColumns + column];
        const bool spoilt = step > column % kSteps;
        expect(spoilt ? !std::isfinite(sum) : sum == double(step), "step %d, column %d: %g", int(step), column, sum);
      }
  }
}

int main() {
  section("sums of the steps before");
  for (int64_t steps : {1, 2, 7, 8, 9, 16, 17, 100})
    for (const Shape& shape : {Shape{1, steps, 1}, Shape{3, steps, 2}, Shape{2, steps, 30}}) {
      test<float>(shape);
      test<double>(shape);
    }
  test<float>({1, 300, 1});
  section("numbers that are not finite");
  test_special_numbers<float>();
  test_special_numbers<double>();
  section("a launch for all of them");
  Arena arena;
  expect(Lookback<float>(2, 1, 3, 96, arena).blocks == 6 && !Lookback<float>(2, 1, 3, 96, arena).started,
         "one step needs no memory to wait in");
  for (const int64_t batch : {int64_t(1) << 31, (int64_t(1) << 32) + 1, int64_t(1) << 62})
    expect(Lookback<float>(batch, 1, 1, 1, arena).blocks > kMaxBlocks, "too many samples for a grid");
  return check::finish();
}
