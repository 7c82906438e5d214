// What the engine asks of a device: the operations on states, and its memory.
#pragma once

#include <cstring>

#include "pom/engine.h"
#include "pom/pom.h"

// A build without CUDA does not even name its functions.
#ifdef POM_CUDA
#include "cuda/allocate.h"
#define POM_ON_DEVICE(place, gpu, cpu) ((place).device == POM_DEVICE_CUDA ? (gpu) : (cpu))
#else
#define POM_ON_DEVICE(place, gpu, cpu) (cpu)
#endif

namespace pom::engine {

inline Executor executor(const pom_place& place) { return {place.executor.parallel_for, place.executor.context}; }

template <class Args>
size_t workspace_of([[maybe_unused]] const pom_place& place, const Args& args) {
  return POM_ON_DEVICE(place, cuda::workspace(args), cpu::workspace(args));
}
inline Status run(const pom_place& place, const MixArgs& args, void* memory, size_t bytes) {
  return POM_ON_DEVICE(place, cuda::mix(args, memory, bytes, place.cuda_stream),
                       cpu::mix(args, memory, bytes, executor(place)));
}
inline Status run(const pom_place& place, const UpdateArgs& args, void* memory, size_t bytes) {
  return POM_ON_DEVICE(place, cuda::update(args, memory, bytes, place.cuda_stream),
                       cpu::update(args, memory, bytes, executor(place)));
}
inline Status clear([[maybe_unused]] const pom_place& place, void* to, size_t bytes) {
  return POM_ON_DEVICE(place, cuda::fill(to, 0, bytes, place.cuda_stream), (std::memset(to, 0, bytes), Status::ok));
}
// Between any two of the device's arrays and the host's.
inline Status copy([[maybe_unused]] const pom_place& place, void* to, const void* from, size_t bytes) {
  return POM_ON_DEVICE(place, cuda::copy(to, from, bytes, place.cuda_stream),
                       (std::memcpy(to, from, bytes), Status::ok));
}
inline Status wait([[maybe_unused]] const pom_place& place) {
  return POM_ON_DEVICE(place, cuda::wait(place.cuda_stream), Status::ok);
}

}  // namespace pom::engine
