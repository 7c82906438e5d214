// The linear map for where there is no BLAS.

#include <algorithm>

#include "cpu/elements.h"
#include "pom/engine.h"

namespace pom::cpu {
namespace {

constexpr int64_t kLanes = 16;      // partial sums of a product, which the compiler makes vectors of
constexpr int64_t kRowsOfTask = 8;  // that share what is read of the weight

template <class T>
void multiply(const pom_linear& map, int64_t task) {
  using Acc = typename accumulator<T>::type;
  const T *const weight = static_cast<const T*>(map.weight), *const bias = static_cast<const T*>(map.bias);
  const int64_t first = task * kRowsOfTask, end = std::min(map.rows, first + kRowsOfTask),
                whole = map.inputs / kLanes * kLanes;
  for (int64_t out = 0; out < map.outputs; ++out) {
    const T* const w = weight + out * map.inputs;
    for (int64_t row = first; row < end; ++row) {
      const T* const x = static_cast<const T*>(map.x) + row * map.inputs;
      Acc lanes[kLanes] = {}, sum = bias ? Acc(number(bias[out])) : Acc(0);
      for (int64_t i = 0; i < whole; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += number(x[i + lane]) * number(w[i + lane]);
      for (int64_t i = whole; i < map.inputs; ++i) sum += number(x[i]) * number(w[i]);
      for (const Acc lane : lanes) sum += lane;
      put(sum, static_cast<T*>(map.y) + row * map.outputs + out);
    }
  }
}

void multiply_task(void* argument, int64_t task) {
  const pom_linear& map = *static_cast<const pom_linear*>(argument);
  with_type(Dtype(map.dtype), [&](auto element) { multiply<decltype(element)>(map, task); });
}

}  // namespace
}  // namespace pom::cpu

using namespace pom::cpu;

pom_status pom_cpu_linear(void* context, const pom_linear* map) {
  if (!map) return POM_NULL_POINTER;
  if (map->dtype < POM_F32 || map->dtype > POM_F16) return POM_BAD_DTYPE;
  if (map->rows < 0 || map->inputs < 0 || map->outputs < 0) return POM_BAD_SIZE;
  if (map->rows == 0 || map->outputs == 0) return POM_OK;
  if (!map->y || (map->inputs && !(map->x && map->weight))) return POM_NULL_POINTER;
  const int64_t tasks = (map->rows + kRowsOfTask - 1) / kRowsOfTask;
  const auto* const executor = static_cast<const pom_executor*>(context);
  pom_linear given = *map;
  if (executor && executor->parallel_for && tasks > 1)
    executor->parallel_for(executor->context, tasks, multiply_task, &given);
  else
    for (int64_t task = 0; task < tasks; ++task) multiply_task(&given, task);
  return POM_OK;
}
