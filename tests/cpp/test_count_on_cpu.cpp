// Checks the byte counts of count_on_cpu.cpp with kernels whose traffic is known.

#include "count_on_cpu.h"

#include <cstdlib>
#include <vector>

#include "check.h"
#include "cuda/block.cuh"

using check::expect;
using check::section;

namespace {

constexpr int kThreads = 256;
constexpr size_t kBytes = 1 << 20;  // of each of two buffers

std::vector<CountedLaunch> launches() {
  std::vector<CountedLaunch> found(count_on_cpu_launches(nullptr, 0));
  count_on_cpu_launches(found.data(), found.size());
  return found;
}

template <class F>
void expect_bytes(const char* name, uint64_t loaded, uint64_t stored, unsigned blocks, F kernel, size_t shared = 0) {
  for (uint64_t seed : {0, 1}) {
    cuda_on_cpu::set_seed(seed);
    count_on_cpu_reset();
    cuda_on_cpu::launch(blocks, kThreads, shared, kernel);
    const auto found = launches();
    expect(found.size() == 1 && found[0].blocks == blocks && found[0].threads == kThreads, "%s: not one launch", name);
    expect(found[0].loaded == loaded && found[0].stored == stored, "%s: %zu bytes loaded, %zu stored", name,
           size_t(found[0].loaded), size_t(found[0].stored));
  }
  cuda_on_cpu::set_seed(0);
}

struct Parameters {
  float numbers[100];
};

int index() { return int(blockIdx.x) * kThreads + int(threadIdx.x); }

}  // namespace

int main() {
  float* const from = static_cast<float*>(std::aligned_alloc(64, kBytes));
  float* const to = static_cast<float*>(std::aligned_alloc(64, kBytes));
  std::memset(from, 0, kBytes);
  std::memset(to, 0, kBytes);

  section("loads and stores");
  expect_bytes("numbers", 4096, 4096, 4, [=] { to[index()] = from[index()]; });
  expect_bytes("numbers of 16 bits", 2048, 2048, 4,
               [=] { reinterpret_cast<uint16_t*>(to)[index()] = reinterpret_cast<uint16_t*>(from)[index()]; });
  expect_bytes("vectors", 16384, 32768, 4, [=] {
    pom::cuda::Packed<pom::bf16, 8> packed;
    packed.load(reinterpret_cast<pom::bf16*>(from) + 8 * index());
    float x[8];
    packed.unpack(x);
    for (float& value : x) value += 1;
    pom::cuda::store_numbers<8>(to + 8 * index(), x);
  });
  expect_bytes("vectors as they are", 16384, 16384, 4, [=] {
    using Vector = pom::cuda::Words<16>;
    reinterpret_cast<Vector*>(to)[index()] = reinterpret_cast<const Vector*>(from)[index()];
  });
  struct Large {
    double numbers[9];
  };
  expect_bytes("larger structs", 72 * 1024, 72 * 1024, 4,
               [=] { reinterpret_cast<Large*>(to)[index()] = reinterpret_cast<const Large*>(from)[index()]; });
  expect_bytes("rows with gaps", 32 * 1024, 32 * 1024, 4, [=] { to[16 * index()] = from[16 * index()]; });
  expect_bytes("across two sectors", 64, 0, 1, [=] {
    uint64_t x;
    std::memcpy(&x, reinterpret_cast<char*>(from) + 28, sizeof x);
    if (x) to[0] = 1;
  });

  section("what many threads touch");
  expect_bytes("one number for all", 4 * 32, 4096, 4, [=] { to[index()] = from[0]; });
  expect_bytes("one number for all, again and again", 4 * 32, 4096, 4, [=] {
    float sum = 0;
    for (int i = 0; i < 100; ++i) sum += static_cast<const volatile float*>(from)[i % 8];
    to[index()] = sum;
  });
  expect_bytes("atomic operations", 2 * 32, 2 * 32, 2, [=] {
    atomicAdd(reinterpret_cast<unsigned*>(to), 1u);
    atomicAdd(reinterpret_cast<unsigned*>(to) + 1, 1u);
  });
  expect_bytes("neighbours that walk far together", kBytes, 32, 1, [=] {
    float sum = 0;
    for (size_t i = threadIdx.x; i < kBytes / 4; i += kThreads) sum += from[i];
    to[0] = sum;
  });

  section("second passes");
  const auto twice = [=](size_t bytes) {
    return [=] {
      for (int pass = 0; pass < 2; ++pass)
        for (size_t i = threadIdx.x; i < bytes / 4; i += kThreads) to[i] = from[i];
    };
  };
  expect_bytes("within the cache", 64 << 10, 64 << 10, 1, twice(64 << 10));
  expect_bytes("beyond it", 2 * (128 << 10), 2 * (128 << 10), 1, twice(128 << 10));
  expect_bytes("of another block", 3 * (32 << 10), 3 * (32 << 10), 3, twice(32 << 10));

  section("what is not global memory");
  expect_bytes("nothing", 0, 0, 2, [] {});
  expect_bytes(
      "shared memory", 0, 0, 2,
      [] {
        POM_SHARED(memory);
        float* const x = reinterpret_cast<float*>(memory);
        x[threadIdx.x] = float(threadIdx.x);
        __syncthreads();
        x[threadIdx.x] += __shfl_xor_sync(~0u, x[threadIdx.x ^ 1], 1);
      },
      4 * kThreads);
  Parameters given{};
  expect_bytes("parameters", 0, 4096, 4, [=] { to[index()] = given.numbers[threadIdx.x % 100]; });
  expect_bytes("local arrays", 0, 4096, 4, [=] {
    volatile float x[64];
    for (int i = 0; i < 64; ++i) x[i] = float(i);
    to[index()] = x[threadIdx.x % 64];
  });

  section("copies");
  count_on_cpu_reset();
  cudaMemsetAsync(to, 0, 1000, nullptr);
  cudaMemcpyAsync(to, from, 500, cudaMemcpyDefault, nullptr);
  const auto found = launches();
  expect(found.size() == 2 && found[0].kernel == kClear && found[0].loaded == 0 && found[0].stored == 1000 &&
             found[1].kernel == kCopy && found[1].loaded == 500 && found[1].stored == 500,
         "copies are not counted");

  std::free(from);
  std::free(to);
  return check::finish();
}
