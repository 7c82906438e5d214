// Matrix products on GPUs of compute capability 9.0: barriers that count bytes (mbarrier), asynchronous copies of tiles
// into shared memory (TMA), products of four warps straight from there (wgmma), and clusters of blocks that can do all
// this in each other's shared memory.
//
// A row of a tile is 128 bytes. Its eight chunks of 16 bytes are swizzled (chunk i of row r at i ^ r % 8), so that
// neither copies nor products have bank conflicts. Tiles start at multiples of 1,024 bytes.
#pragma once

#include "cuda/launch.h"

// POM_HOPPER: whether this pass compiles for such a GPU. Other GPUs get empty kernels, which are never launched.
#ifdef __CUDACC__
#include <cuda.h>
#if CUDA_VERSION < 12000
#error "pom_ext: the CUDA kernels need a toolkit of CUDA 12 or later; POM_EXT_CUDA=0 builds without them"
#endif
#define POM_GRID_CONSTANT __grid_constant__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define POM_HOPPER 1
#else
#define POM_HOPPER 0
#endif
#else
#include "hopper_on_cpu.h"
#define POM_GRID_CONSTANT
#define POM_HOPPER 1
#endif

namespace pom::cuda {

using TileMap = CUtensorMap;

constexpr int kWarpGroup = 128;     // threads
constexpr int kTileRowBytes = 128;  // of a tile
constexpr int kTileAlignment = 1024;
constexpr int kDepth = 64;  // elements of a row: inputs of one step of a product, which takes 16 at a time
constexpr int kProductRows = 64, kProductColumns = 256;                       // tokens by channels
constexpr int kProductNumbers = kProductRows * kProductColumns / kWarpGroup;  // of one thread

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Lies in shared memory. A phase ends when `count` threads have arrived and all bytes they expect are there.
class Barrier {
 public:
  __device__ void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count) : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  __device__ void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  // Arrives at the same barrier of another block of the cluster, or of this one.
  __device__ void arrive_in(unsigned rank) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there]; }" ::
            "r"(shared_address(this)),
        "r"(rank)
        : "memory");
  }
  // Waits until a phase of this parity has ended. Phases count from 0.
  __device__ void wait(unsigned parity) {
    unsigned done;
    do
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(shared_address(this)), "r"(parity)
                   : "memory");
    while (!done);
  }

 private:
  uint64_t state_;
};

// Makes initialised barriers visible to copies.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Starts the copy of the tile whose first element is (element, row, sample). Elements outside the tensor become zeros.
__device__ __forceinline__ void load_tile(const TileMap& map, void* tile, int element, int row, int sample,
                                          Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(element), "r"(row), "r"(sample)
      : "memory");
}

// The same into all blocks of the cluster. The barrier at the same address of each block counts its bytes.
template <int blocks>
__device__ __forceinline__ void load_tile_multicast(const TileMap& map, void* tile, int element, int row, int sample,
                                                    Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(element), "r"(row), "r"(sample), "h"(uint16_t((1 << blocks) - 1))
      : "memory");
}

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster and makes their writes visible. Blocks may access each other's shared memory
// only between the first and the last of these calls.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Waits for `threads` threads of the block (whole warps) at named barrier `number`, 1 to 15.
__device__ __forceinline__ void sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Changes how many registers each thread of a warp group has: a multiple of 8.
template <int registers>
__device__ __forceinline__ void dealloc_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void alloc_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Products are queued between fence_products() and commit_products(). After wait_for_products<n>() at most the last n
// batches are unfinished. Until a batch is finished, nobody may touch its sums and tiles.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

// Keeps the compiler from moving uses of the sums before this point; it does not know that waiting concerns them.
__device__ __forceinline__ void fence_sums(float (&sums)[kProductNumbers]) {
  POM_UNROLL for (int i = 0; i < kProductNumbers; ++i)
    asm volatile("" : "+f"(sums[i])::"memory");
}

#define POM_SUMS8(i)                                                                                            \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define POM_SUMS32(i) POM_SUMS8(i), POM_SUMS8(i + 8), POM_SUMS8(i + 16), POM_SUMS8(i + 24)
#define POM_PRODUCT(type)                                                                                 \
  asm volatile(                                                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                        \
      " {"                                                                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                  \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, p, 1, 1, 0, 0;\n}"                                                                     \
      : POM_SUMS32(0), POM_SUMS32(32), POM_SUMS32(64), POM_SUMS32(96)                                     \
      : "l"(tokens), "l"(weight), "r"(int(add)))

// One product: 16 inputs of 64 rows by 256 columns, given by two tile descriptors.
template <class T>
__device__ __forceinline__ void queue_product(float (&sums)[kProductNumbers], uint64_t tokens, uint64_t weight,
                                              bool add) {
  if constexpr (std::is_same_v<T, bf16>)
    POM_PRODUCT("bf16");
  else
    POM_PRODUCT("f16");
}

#undef POM_PRODUCT
#undef POM_SUMS32
#undef POM_SUMS8

#endif  // __CUDACC__

// The wgmma descriptor of a tile: its address, 1,024 bytes between groups of eight rows, 128-byte swizzle.
__device__ inline uint64_t tile_descriptor(const char* tile) {
  const uint64_t address = shared_address(tile) & 0x3ffff, eight_rows = 8 * kTileRowBytes, swizzled = 1;
  return address >> 4 | uint64_t(1) << 16 | eight_rows >> 4 << 32 | swizzled << 62;
}

// sums (+)= tokens weightᵀ over one step. Without `add` the first product replaces the sums. Thread t of the group
// holds row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2.
template <class T>
__device__ __forceinline__ void queue_step(float (&sums)[kProductNumbers], const char* tokens, const char* weight,
                                           bool add) {
  constexpr int kBytes = 16 * 2;  // 16 inputs of a row
  const uint64_t first_tokens = tile_descriptor(tokens), first_weight = tile_descriptor(weight);
  POM_UNROLL for (int i = 0; i < kTileRowBytes / kBytes; ++i)
    queue_product<T>(sums, first_tokens + i * (kBytes >> 4), first_weight + i * (kBytes >> 4), add || i > 0);
}

// A tensor (samples, rows, elements) of a 16-bit type, aligned to 16 bytes. Strides in elements, multiples of 8.
struct Tensor16 {
  const void* data;
  int64_t elements, rows, samples, row_stride, sample_stride;
};
// Host only: the map with which load_tile() copies tiles of `rows` rows. If the driver refuses, see error().
Status make_tile_map(const Tensor16& tensor, int rows, TileMap& map);

}  // namespace pom::cuda
