// The CPU: memory, threads and the matrix product. Threads are OpenMP's, if the compiler has it.
#pragma once

#include <cstring>
#include <deque>
#include <vector>

#include "check.h"
#include "rows.h"

#ifdef STREAM_WITH_BLAS
extern "C" void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                       const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                       const float* beta, float* c, const int* ldc);
#endif

namespace example {

class Cpu {
 public:
  pom_place place() {
    pom_place place = {};
    place.device = POM_DEVICE_CPU;
    place.executor = executor();
    return place;
  }

  // Returns zeros that last as long as the device.
  float* floats(int64_t n) { return memory_.emplace_back(size_t(n)).data(); }

  // Copies between any two of the device's arrays and the host's. Copies to the host are complete after wait().
  void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
  void wait() {}

  template <class Function>
  void rows(int64_t n, const Function& function) {
#pragma omp parallel for if (n * function.n > kWorthThreads)
    for (int64_t row = 0; row < n; ++row) function(row, Alone());
  }

  // A pom_linear_function; its context is the device.
  static pom_status linear(void* self, const pom_linear* map) {
    Cpu& cpu = *static_cast<Cpu*>(self);
#ifdef STREAM_WITH_BLAS
    const auto *const bias = static_cast<const float*>(map->bias), *const x = static_cast<const float*>(map->x);
    float* const y = static_cast<float*>(map->y);
    if (bias) cpu.rows(map->rows, Repeat{map->outputs, bias, y});
    // Fortran stores matrices by columns, so every matrix is the transpose of ours.
    const int m = int(map->outputs), n = int(map->rows), k = int(map->inputs);
    const float one = 1, beta = bias ? 1 : 0;
    sgemm_("T", "N", &m, &n, &k, &one, static_cast<const float*>(map->weight), &k, x, &k, &beta, y, &m);
    return POM_OK;
#else
    const pom_executor threads = cpu.executor();
    return pom_cpu_linear(const_cast<pom_executor*>(&threads), map);
#endif
  }

  // Runs the work of one frame, which is the same for every frame.
  template <class Frame>
  void repeat(const Frame& frame) {
    frame();
  }

 private:
  static constexpr int64_t kWorthThreads = 1 << 15;  // numbers; waking threads takes microseconds

  static pom_executor executor() {
    return {[](void*, int64_t n, void (*body)(void*, int64_t), void* argument) {
#pragma omp parallel for schedule(dynamic)
              for (int64_t i = 0; i < n; ++i) body(argument, i);
            },
            nullptr};
  }

  std::deque<std::vector<float>> memory_;
};

}  // namespace example
