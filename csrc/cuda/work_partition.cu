// How many blocks a GPU runs at once.

#include "cuda/work_partition.h"

#include <atomic>

#include "cuda/last_block.cuh"

namespace pom::cuda {
namespace {

constexpr int kUsual = 132;  // multiprocessors of a GPU that does not tell

int multiprocessors() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, count = 0;
  if (checked(cudaGetDevice(&device)) != Status::ok || device >= kDevices) return kUsual;
  if (const int n = known[device]) return n;
  if (checked(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) != Status::ok) return kUsual;
  return known[device] = count;
}

}  // namespace

Deal deal(unsigned pieces, int slabs, int resident) {
  // One wave. Where its blocks would be few for each slab, their number would not come out even: then several waves.
  constexpr int kFew = 8, kWaves = 4;
  const int64_t at_once = int64_t(multiprocessors()) * resident;
  const int64_t blocks = (int64_t(slabs) * kFew > at_once ? kWaves : 1) * at_once / slabs;
  return {pieces, unsigned(most(1, least(least(blocks, pieces), kMostBlocks)))};
}

}  // namespace pom::cuda
