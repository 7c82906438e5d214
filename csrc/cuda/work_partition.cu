// Chooses how many blocks share the work, by what the GPU runs at a time.

#include "cuda/work_partition.h"

#include <atomic>

#include "cuda/last_block.cuh"

namespace pom::cuda {
namespace {

constexpr int kDefaultSms = 132;  // if the GPU does not tell

int multiprocessors() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, count = 0;
  if (checked(cudaGetDevice(&device)) != Status::ok || device >= kDevices) return kDefaultSms;
  if (const int n = known[device]) return n;
  if (checked(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) != Status::ok) return kDefaultSms;
  return known[device] = count;
}

}  // namespace

WorkPartition partition_work(unsigned pieces, int channel_tiles, int resident) {
  // One wave of blocks. With few blocks per channel tile their number would not divide evenly: then several waves.
  constexpr int kFew = 8, kWaves = 4;
  const int64_t resident_blocks = int64_t(multiprocessors()) * resident;
  const int waves = int64_t(channel_tiles) * kFew > resident_blocks ? kWaves : 1;
  const int64_t blocks = waves * resident_blocks / channel_tiles;
  return {pieces, unsigned(max(1, min(min(blocks, pieces), kMaxSharingBlocks)))};
}

}  // namespace pom::cuda
