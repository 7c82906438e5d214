// How project.cu loads tiles: the warps of a block, its shared memory, and its copies.
//
// A block has two groups of four warps that multiply, each a piece of up to 64 tokens by the same 256 channels, and a
// third group whose warps copy the tiles of the weight, the tiles of either piece, and the coefficients of the
// channels. The second group stays two steps behind the first, so that one group's products keep the tensor cores busy
// while the other applies the polynomial. The two blocks of a cluster share the channels: each copies half of the
// weight to both.
//
// Why both groups share the weight's tiles: a step of 64 tokens by 256 channels by 64 inputs keeps the tensor cores
// busy for 512 cycles. With weight tiles of its own a group would load 8 + 32 KiB for it, 80 bytes a cycle, where an SM
// receives at most about 64; its products read another 80 from shared memory, which delivers 128. With shared tiles
// both groups together load 48 KiB in 1,024 cycles, of which the cluster leaves 32 KiB to read from L2: 32 bytes a
// cycle.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/tokens.cuh"

namespace pom::cuda {

constexpr int kGroups = 2;   // that multiply
constexpr int kCluster = 2;  // blocks
constexpr int kWeightStages = 5, kTokenStages = 3;
constexpr int kBehind = 2;  // steps, of the second group; leaves a stage of the weight in flight
constexpr int kPieceShift = 6;
constexpr int kGroupWarps = kWarpGroup / kWarp;
constexpr int kProjectThreads = (kGroups + 1) * kWarpGroup;
constexpr int kCopierRegisters = 40, kProductRegisters = 232;
constexpr int kShareRows = kProductColumns / kCluster;  // of the weight's tile that one block copies
static_assert(kProductRows == 1 << kPieceShift, "a group multiplies a piece");
static_assert(kBehind + 2 < kWeightStages, "that of the second group's last product is held, too");

// The tasks of the third group's warps.
enum Copier { kCopiesWeight, kCopiesTokens, kCopiesCoefficients = kCopiesTokens + kGroups };
static_assert(kCopiesCoefficients + 1 == kGroupWarps);

// A step's stage in a ring, and the parity of its barriers' phase.
template <int stages>
struct RingPosition {
  int stage;
  unsigned parity;
  __device__ explicit RingPosition(unsigned step) : stage(int(step % stages)), parity(step / stages & 1) {}
};

// A ring of tiles, with barriers that say when a tile is full and when it may be overwritten.
template <int rows, int stages_>
struct Ring {
  static constexpr int stages = stages_, bytes = rows * kTileRowBytes;
  char tiles[stages][bytes];

  struct Barriers {
    Barrier full[stages], empty[stages];
    __device__ void init(int readers) {
      for (int i = 0; i < stages; ++i) full[i].init(1), empty[i].init(readers);
    }
  };
};
using WeightRing = Ring<kProductColumns, kWeightStages>;
using TokenRing = Ring<kProductRows, kTokenStages>;

struct ProjectShared {
  WeightRing weight;
  TokenRing tokens[kGroups];
  float sums[kGroups][kGroupWarps][kProductColumns];
  float coeff[kProductColumns * 4], bias[kProductColumns];  // zeros after the last channel
  WeightRing::Barriers weight_barriers;
  TokenRing::Barriers token_barriers[kGroups];
  Barrier coeff_full, coeff_empty;
  Barrier ahead[kGroups];  // a phase for every piece of which that group has begun more than kBehind steps

  __device__ void init() {
    weight_barriers.init(kCluster * kGroups * kGroupWarps);
    for (TokenRing::Barriers& barriers : token_barriers) barriers.init(kGroupWarps);
    for (Barrier& barrier : ahead) barrier.init(kGroupWarps);
    coeff_full.init(kWarp);
    coeff_empty.init(kGroups);
  }
};
constexpr size_t kProjectBytes = sizeof(ProjectShared) + kTileAlignment;  // dynamic shared memory is less aligned
static_assert(kProjectBytes <= 227 << 10, "a block has no more");

struct ProjectKernelArgs {
  TileMap x, weight;
  ProjectStateArgs call;
  Pieces pieces;
  int channels = 0, steps = 0;                 // steps of kDepth inputs
  unsigned slots = 0, all_slots = 0;           // of one sample; of all samples
  unsigned column_blocks = 0, all_rounds = 0;  // of kProductColumns channels; these times fours of slots
  float* rows = nullptr;                       // (batch, slots, channels)
  double* weight_rows = nullptr;               // (batch, slots); null if all weights are 1

  // Of the tokens of a sample; null if all are 1.
  __device__ const float* weights(unsigned b) const {
    const Features& f = call.features;
    return f.weight ? static_cast<const float*>(f.weight) + b * f.tokens : nullptr;
  }
};

// Calls body(round) for each round of this cluster: a few slots and 256 channels.
template <class Body>
__device__ __forceinline__ void each_round(const ProjectKernelArgs& args, Body body) {
  for (unsigned round = blockIdx.x / kCluster; round < args.all_rounds; round += gridDim.x / kCluster) body(round);
}

// What one group does in a round.
struct Work {
  Piece piece = {};          // empty if there is none
  unsigned slot = 0, b = 0;  // slot among those of all samples; sample
  int column = 0;            // the first channel

  Work() = default;
  __device__ Work(const ProjectKernelArgs& args, unsigned round, int group)
      : slot((round / args.column_blocks * kCluster + cluster_rank()) * kGroups + group),
        b(slot / args.slots),
        column(int(round % args.column_blocks) * kProductColumns) {
    if (slot < args.all_slots) piece = args.pieces.at(slot - b * args.slots);
  }
};

// Copies the weight. Both blocks' halves of a tile arrive at one barrier in each block.
__device__ inline void copy_weight(const ProjectKernelArgs& args, ProjectShared& shared) {
  const int share = int(cluster_rank());
  unsigned step = 0;
  each_round(args, [&](unsigned round) {
    const int row = int(round % args.column_blocks) * kProductColumns + share * kShareRows;
    for (int i = 0; i < args.steps; ++i, ++step) {
      const RingPosition<kWeightStages> position(step);
      Barrier& full = shared.weight_barriers.full[position.stage];
      shared.weight_barriers.empty[position.stage].wait(position.parity ^ 1);  // waits for both blocks
      full.arrive_expecting(WeightRing::bytes);
      char* const tile = shared.weight.tiles[position.stage] + share * kShareRows * kTileRowBytes;
      load_tile_multicast<kCluster>(args.weight, tile, i * kDepth, row, 0, full);
    }
  });
}

__device__ inline void copy_tokens(const ProjectKernelArgs& args, ProjectShared& shared, int group) {
  TokenRing::Barriers& barriers = shared.token_barriers[group];
  unsigned step = 0;
  each_round(args, [&](unsigned round) {
    const Work work(args, round, group);
    for (int i = 0; i < args.steps; ++i, ++step) {
      const RingPosition<kTokenStages> position(step);
      Barrier& full = barriers.full[position.stage];
      barriers.empty[position.stage].wait(position.parity ^ 1);
      full.arrive_expecting(TokenRing::bytes);
      // Outside the tensor the copy writes zeros.
      load_tile(args.x, shared.tokens[group].tiles[position.stage], i * kDepth, int(work.piece.begin), int(work.b),
                full);
    }
  });
}

// Copies coefficients and biases; called by a whole warp. Products use them at the end of a round.
template <class T, int degree>
__device__ inline void copy_coefficients(const ProjectKernelArgs& args, ProjectShared& shared) {
  const int lane = int(threadIdx.x) % kWarp;
  const float* const coeff = static_cast<const float*>(args.call.features.coeff);
  unsigned parity = 0;
  each_round(args, [&](unsigned round) {
    const int column = int(round % args.column_blocks) * kProductColumns;
    const int channels = int(min(kProductColumns, args.channels - column));  // a multiple of 8
    shared.coeff_empty.wait(parity ^ 1);
    POM_UNROLL_4 for (int j = 0; j < kProductColumns * degree / 4; j += kWarp) {
      const int i = 4 * (j + lane);
      float numbers[4] = {};
      if (i < channels * degree) load_numbers<4>(coeff + int64_t(column) * degree + i, numbers);
      store_numbers<4>(shared.coeff + i, numbers);
    }
    static_assert(kProductColumns == 8 * kWarp, "a lane's channels are one vector");
    float bias[8] = {};
    if (args.call.bias && 8 * lane < channels) {
      Packed<T, 8> packed;
      packed.load(static_cast<const T*>(args.call.bias) + column + 8 * lane);
      packed.unpack(bias);
    }
    store_numbers<8>(shared.bias + 8 * lane, bias);
    shared.coeff_full.arrive();
    parity ^= 1;
  });
}

}  // namespace pom::cuda
