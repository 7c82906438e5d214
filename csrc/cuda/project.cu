// The state of tokens that this kernel projects itself: u = x Wᵀ + b goes from the product's registers through the
// polynomial into sums over tokens, and to no memory. For GPUs of compute capability 9.0, 16-bit types.
//
// A block has two groups of four warps that multiply, each a piece of up to 64 tokens by the same 256 channels, and a
// group of four warps that bring what these need: the weight's tiles, either piece's tiles, and the channels' coefficients.
// The second piece stays two steps behind the first, so that while one group makes sums of its products, the other one's
// keep the tensor cores busy. Two blocks, a cluster, share the channels: each copies half of the weight's tile to both.
//
// Why not a tile of its own for either group, one multiplying while the other sums: what a multiprocessor can take in. A
// step of 64 tokens by 256 channels by 64 inputs keeps the tensor cores busy for 512 cycles. With tiles of its own a group
// takes in 8 + 32 KiB for it, 80 bytes a cycle where 64 are the most that reach a multiprocessor, and products read 80 more
// from shared memory, which gives 128. With the weight shared by both it is 48 KiB in 1,024 cycles, of which the cluster
// leaves 32 to be read from L2: 32 bytes a cycle.

#include "cuda/hopper.cuh"
#include "cuda/rows.cuh"
#include "cuda/tokens.cuh"

#include <map>
#include <mutex>

namespace pom::cuda {
namespace {

constexpr int kGroups = 2;   // that multiply
constexpr int kCluster = 2;  // blocks
constexpr int kWeightStages = 5, kTokenStages = 3;
constexpr int kBehind = 2;  // steps, of the second group; then there is a stage of the weight on its way
constexpr int kPieceShift = 6;
constexpr int kGroupWarps = kWarpGroup / kWarp;
constexpr int kProjectThreads = (kGroups + 1) * kWarpGroup;
constexpr int kCopierRegisters = 40, kProductRegisters = 232;
constexpr int kShareRows = kProductColumns / kCluster;  // of the weight's tile that one block copies
static_assert(kProductRows == 1 << kPieceShift, "a group multiplies a piece");
static_assert(kBehind + 2 < kWeightStages, "that of the second group's last product is held, too");

// What the warps of the third group do.
enum Copier { kCopiesWeight, kCopiesTokens, kCopiesCoefficients = kCopiesTokens + kGroups };
static_assert(kCopiesCoefficients + 1 == kGroupWarps);

// Where a step lies in a ring of stages.
template <int stages>
struct Turn {
  int stage;
  unsigned parity;
  __device__ explicit Turn(unsigned step) : stage(int(step % stages)), parity(step / stages & 1) {}
};

// A ring of tiles, with what says that one is there, and that it is needed no more.
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
  float coeff[kProductColumns * 4], bias[kProductColumns];  // of the channels, zeros behind the last one
  WeightRing::Barriers weight_barriers;
  TokenRing::Barriers token_barriers[kGroups];
  Barrier coeff_full, coeff_empty;
  Barrier ahead[kGroups];  // a phase for every piece of which that group has begun kBehind steps
};
constexpr size_t kProjectBytes = sizeof(ProjectShared) + kTileAlignment;  // memory of a block is less aligned
static_assert(kProjectBytes <= 227 << 10, "a block has no more");

struct ProjectSums {
  TileMap x, weight;
  Pieces pieces;
  int64_t tokens = 0;
  int channels = 0, steps = 0;                  // steps of kDepth inputs
  unsigned slots = 0, all_slots = 0;            // of a sample, of all
  unsigned column_blocks = 0, all_rounds = 0;   // of kProductColumns channels; these times what slots a cluster takes
  const void* bias = nullptr;
  const float *coeff = nullptr, *token_weight = nullptr;
  float* rows = nullptr;          // (batch, slots, channels)
  double* weight_rows = nullptr;  // (batch, slots), null for ones
};

// A cluster's rounds: a few slots and 256 channels in each.
template <class Body>
__device__ __forceinline__ void each_round(const ProjectSums& args, Body body) {
  for (unsigned round = blockIdx.x / kCluster; round < args.all_rounds; round += gridDim.x / kCluster) body(round);
}

// What one group makes of a round.
struct Work {
  Piece piece = {};       // empty where there is none
  unsigned slot = 0, b = 0;  // of all, of which sample
  int column = 0;         // the first

  Work() = default;
  __device__ Work(const ProjectSums& args, unsigned round, int group)
      : slot((round / args.column_blocks * kCluster + cluster_rank()) * kGroups + group),
        b(slot / args.slots),
        column(int(round % args.column_blocks) * kProductColumns) {
    if (slot < args.all_slots) piece = args.pieces.at(slot - b * args.slots);
  }
};

// Both blocks' halves of the weight's tiles come at one barrier each.
__device__ inline void copy_weight(const ProjectSums& args, ProjectShared& shared) {
  const int share = int(cluster_rank());
  unsigned step = 0;
  each_round(args, [&](unsigned round) {
    const int row = int(round % args.column_blocks) * kProductColumns + share * kShareRows;
    for (int i = 0; i < args.steps; ++i, ++step) {
      const Turn<kWeightStages> turn(step);
      Barrier& full = shared.weight_barriers.full[turn.stage];
      shared.weight_barriers.empty[turn.stage].wait(turn.parity ^ 1);  // in both blocks
      full.arrive_expecting(WeightRing::bytes);
      char* const tile = shared.weight.tiles[turn.stage] + share * kShareRows * kTileRowBytes;
      load_tile_in_all(args.weight, tile, i * kDepth, row, 0, full);
    }
  });
}

__device__ inline void copy_tokens(const ProjectSums& args, ProjectShared& shared, int group) {
  TokenRing::Barriers& barriers = shared.token_barriers[group];
  unsigned step = 0;
  each_round(args, [&](unsigned round) {
    const Work work(args, round, group);
    for (int i = 0; i < args.steps; ++i, ++step) {
      const Turn<kTokenStages> turn(step);
      Barrier& full = barriers.full[turn.stage];
      barriers.empty[turn.stage].wait(turn.parity ^ 1);
      full.arrive_expecting(TokenRing::bytes);
      // Tokens of samples that are not there are zeros.
      load_tile(args.x, shared.tokens[group].tiles[turn.stage], i * kDepth, int(work.piece.begin), int(work.b), full);
    }
  });
}

// By a warp. Products read the coefficients at the end of a round.
template <class T, int degree>
__device__ inline void copy_coefficients(const ProjectSums& args, ProjectShared& shared) {
  const int lane = int(threadIdx.x) % kWarp;
  unsigned parity = 0;
  each_round(args, [&](unsigned round) {
    const int column = int(round % args.column_blocks) * kProductColumns;
    const int channels = int(least(kProductColumns, args.channels - column));  // a multiple of 8
    shared.coeff_empty.wait(parity ^ 1);
    POM_UNROLL_4
    for (int j = 0; j < kProductColumns * degree / 4; j += kWarp) {
      const int i = 4 * (j + lane);
      float numbers[4] = {};
      if (i < channels * degree) load_numbers<4>(args.coeff + int64_t(column) * degree + i, numbers);
      store_numbers<4>(shared.coeff + i, numbers);
    }
    static_assert(kProductColumns == 8 * kWarp, "a lane's channels are one vector");
    float bias[8] = {};
    if (args.bias && 8 * lane < channels) {
      Packed<T, 8> packed;
      packed.load(static_cast<const T*>(args.bias) + column + 8 * lane);
      packed.unpack(bias);
    }
    store_numbers<8>(shared.bias + 8 * lane, bias);
    shared.coeff_full.arrive();
    parity ^= 1;
  });
}

// Adds up the numbers of the eight threads of a warp that hold the same columns, each of which keeps the sums of an
// eighth of them: those that x[0 … 7] were `offset` further on.
template <int half = kProductNumbers / 4>
__device__ inline int sum_lanes(float (&x)[kProductNumbers / 2], int lane, int offset = 0) {
  const bool upper = lane & half / 2;
  POM_UNROLL
  for (int i = 0; i < half; ++i) {
    const float kept = upper ? x[i + half] : x[i], given = upper ? x[i] : x[i + half];
    x[i] = kept + __shfl_xor_sync(0xffffffffu, given, half / 2);
  }
  if (upper) offset += half;
  if constexpr (half > 8) return sum_lanes<half / 2>(x, lane, offset);
  return offset;
}

// What a thread of a group needs to sum its products: its two tokens' weights, zero behind the piece's end.
struct Sum {
  Work work;
  float of_token[2] = {};

  Sum() = default;
  __device__ Sum(const ProjectSums& args, unsigned round, int group) : work(args, round, group) {
    const float* const weights = args.token_weight ? args.token_weight + work.b * args.tokens : nullptr;
    POM_UNROLL
    for (int row = 0; row < 2; ++row) {
      const int64_t token = this->token(row);
      of_token[row] = token >= work.piece.end ? 0.0f
                      : weights               ? weights[token]
                                              : 1.0f;
    }
  }
  __device__ int64_t token(int row) const {
    return work.piece.begin + int(threadIdx.x) % kWarpGroup / kWarp * 16 + int(threadIdx.x) % kWarp / 4 + 8 * row;
  }
};

// The polynomial of a group's products, summed over the piece's tokens, into its row; and the tokens' weights.
template <class Form, class T>
__device__ void sum_features(const ProjectSums& args, ProjectShared& shared, const Sum& prepared,
                             float (&u)[kProductNumbers], int group, unsigned round_parity) {
  const int thread = int(threadIdx.x) % kWarpGroup, warp = thread / kWarp, lane = thread % kWarp;
  const Work& work = prepared.work;
  float(*const sums)[kProductColumns] = shared.sums[group];
  const Form form(0);
  constexpr int degree = decltype(form.degree)::capacity;
  if (work.piece.end - work.piece.begin < kProductRows) {  // the others are somebody else's, and maybe no numbers
    POM_UNROLL
    for (int i = 0; i < kProductNumbers; ++i)
      if (prepared.token(i / 2 % 2) >= work.piece.end) u[i] = 0;
  }
  shared.coeff_full.wait(round_parity);
  const float* const coeffs = shared.coeff + 2 * (lane % 4) * degree;
  const float* const biases = shared.bias + 2 * (lane % 4);
  float x[kProductNumbers / 2];
  POM_UNROLL
  for (int pair = 0; pair < kProductNumbers / 4; ++pair) {  // neighbouring channels, of two tokens
    float coeff[2 * degree], bias[2];
    POM_UNROLL
    for (int i = 0; i < degree; ++i) load_pair(coeffs + 8 * pair * degree + 2 * i, coeff + 2 * i);
    load_pair(biases + 8 * pair, bias);
    POM_UNROLL
    for (int i = 0; i < 2; ++i) {
      float sum = 0;
      POM_UNROLL
      for (int row = 0; row < 2; ++row) {
        const float projected = u[4 * pair + 2 * row + i] + bias[i];
        float phi;
        form.value(&projected, coeff + i * degree, &phi);
        sum += prepared.of_token[row] * phi;
      }
      x[2 * pair + i] = sum;
    }
  }
  const int offset = sum_lanes(x, lane);
  POM_UNROLL
  for (int i = 0; i < 8; i += 2) store_pair(x + i, sums[warp] + 4 * (i + offset) + 2 * (lane % 4));
  sync_threads(1 + group, kWarpGroup);
  if (thread == 0) shared.coeff_empty.arrive();
  const int own = 2 * thread;
  if (work.slot < args.all_slots && work.column + own < args.channels) {
    float total[2] = {};
    POM_UNROLL
    for (int other = 0; other < kGroupWarps; ++other) {
      POM_UNROLL
      for (int i = 0; i < 2; ++i) total[i] += sums[other][own + i];
    }
    store_pair(total, args.rows + int64_t(work.slot) * args.channels + work.column + own);
  }
  sync_threads(1 + group, kWarpGroup);  // the sums are free
  if (warp > 0 || work.column > 0 || !args.weight_rows || work.slot >= args.all_slots) return;
  const float* const weights = args.token_weight + work.b * args.tokens;
  double weight = 0;
  for (int64_t token = work.piece.begin + lane; token < work.piece.end; token += kWarp) weight += double(weights[token]);
  for (int apart = kWarp / 2; apart > 0; apart /= 2) weight += __shfl_xor_sync(0xffffffffu, weight, apart);
  if (lane == 0) args.weight_rows[work.slot] = weight;
}

template <class Form, class T>
__device__ void multiply(const ProjectSums& args, ProjectShared& shared, int group) {
  const unsigned lane = threadIdx.x % kWarp;
  const int ahead = int(least(kBehind, args.steps / 2));
  TokenRing::Barriers& token_barriers = shared.token_barriers[group];
  unsigned step = 0, parity = 0;
  auto release = [&](unsigned step) {
    if (lane < kCluster) shared.weight_barriers.empty[Turn<kWeightStages>(step).stage].arrive_in(lane);
    if (lane == 0) token_barriers.empty[Turn<kTokenStages>(step).stage].arrive();
  };
  each_round(args, [&](unsigned round) {
    // A group begins when the other one is a few steps ahead: the first in the round before, the second in this one.
    shared.ahead[1 - group].wait(group == 0 ? parity ^ 1 : parity);
    float u[kProductNumbers];
    Sum sum;
    for (int i = 0; i < args.steps; ++i, ++step) {
      const Turn<kWeightStages> weight(step);
      const Turn<kTokenStages> tokens(step);
      token_barriers.full[tokens.stage].wait(tokens.parity);
      shared.weight_barriers.full[weight.stage].wait(weight.parity);
      open_products();
      queue_step<T>(u, shared.tokens[group].tiles[tokens.stage], shared.weight.tiles[weight.stage], i > 0);
      close_products();
      if (i == 0) sum = Sum(args, round, group);  // while the tensor cores are busy
      wait_for_products<1>();
      if (i > 0) release(step - 1);
      if (i == ahead && lane == 0) shared.ahead[group].arrive();
    }
    wait_for_products<0>();
    keep_behind(u);
    release(step - 1);
    sum_features<Form, T>(args, shared, sum, u, group, parity);
    parity ^= 1;
  });
}

// For other GPUs of one warp that does nothing (check_kernel).
template <class Form, class T>
__global__ void __launch_bounds__(POM_HOPPER ? kProjectThreads : kWarp, 1)
    project_pieces(const POM_GRID_CONSTANT ProjectSums args) {
  if constexpr (POM_HOPPER) {
    POM_SHARED(memory);
    ProjectShared& shared = *reinterpret_cast<ProjectShared*>(memory + (kTileAlignment - shared_address(memory) % kTileAlignment) % kTileAlignment);
    const int group = int(threadIdx.x) / kWarpGroup;
    if (threadIdx.x == 0) {
      shared.weight_barriers.init(kCluster * kGroups * kGroupWarps);
      for (TokenRing::Barriers& barriers : shared.token_barriers) barriers.init(kGroupWarps);
      for (Barrier& barrier : shared.ahead) barrier.init(kGroupWarps);
      shared.coeff_full.init(kWarp);
      shared.coeff_empty.init(kGroups);
      publish_barriers();
    }
    meet_cluster();
    if (group == kGroups) {
      drop_registers<kCopierRegisters>();
      const int copier = int(threadIdx.x) % kWarpGroup / kWarp;
      const bool first = threadIdx.x % kWarp == 0;
      if (copier == kCopiesCoefficients)
        copy_coefficients<T, decltype(Form::degree)::capacity>(args, shared);
      else if (copier == kCopiesWeight && first)
        copy_weight(args, shared);
      else if (copier >= kCopiesTokens && first)
        copy_tokens(args, shared, copier - kCopiesTokens);
    } else {
      take_registers<kProductRegisters>();
      multiply<Form, T>(args, shared, group);
    }
    meet_cluster();  // neither block's memory is gone while the other one copies to it, or arrives there
  }
}

struct ProjectPlan {
  Arena arena;
  ProjectSums sums;
  int64_t slots, rounds;  // of all samples

  ProjectPlan(const ProjectStateArgs& args, void* workspace) : arena(workspace) {
    const Features& f = args.features;
    sums.pieces = Pieces(f.tokens, kPieceShift, args.groups.count, args.groups.offsets);
    sums.tokens = f.tokens, sums.channels = int(f.width), sums.steps = int(ceil_div(args.dim, kDepth));
    slots = f.batch * sums.pieces.slots();
    rounds = ceil_div(slots, kCluster * kGroups) * ceil_div(f.width, kProductColumns);
    sums.slots = unsigned(sums.pieces.slots()), sums.all_slots = unsigned(slots);
    sums.column_blocks = unsigned(ceil_div(f.width, kProductColumns)), sums.all_rounds = unsigned(rounds);
    sums.bias = args.bias;
    sums.coeff = static_cast<const float*>(f.coeff);
    sums.token_weight = static_cast<const float*>(f.weight);
    sums.rows = arena.take<float>(slots * f.width);
    sums.weight_rows = f.weight ? arena.take<double>(slots) : nullptr;
  }
};

using ProjectKernel = void (*)(ProjectSums);

// Makes a kernel ready on the current device, the first time that it is asked for there: later calls find how many clusters
// of it a device runs at once, which takes the driver microseconds to say.
Status prepare(ProjectKernel kernel, int& clusters) {
  static std::mutex mutex;
  static std::map<std::pair<ProjectKernel, int>, int> prepared;  // by kernel and device
  int device;
  if (const Status s = checked(cudaGetDevice(&device)); s != Status::ok) return s;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = prepared.find({kernel, device}); found != prepared.end()) {
    clusters = found->second;
    return Status::ok;
  }
  if (const Status s = check_kernel(kernel, kProjectThreads); s != Status::ok) return s;
  const cudaFuncAttribute most_shared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const Status s = checked(cudaFuncSetAttribute(kernel, most_shared, int(kProjectBytes))); s != Status::ok) return s;
  const Clusters shape = {kCluster, kProjectThreads, kProjectBytes};
  if (const Status s = count_clusters(kernel, shape, clusters); s != Status::ok) return s;
  prepared[{kernel, device}] = clusters;
  return Status::ok;
}

Status launch_project(ProjectKernel kernel, const ProjectSums& sums, void* stream) {
  int clusters;
  if (const Status s = prepare(kernel, clusters); s != Status::ok) return s;
  const Clusters shape = {kCluster, kProjectThreads, kProjectBytes};
  return launch_clusters(kernel, least(sums.all_rounds, clusters), shape, stream, sums);
}

template <class Body>
Status with_project(const Features& f, Body body) {
  auto with_type = [&](auto type) {
    using T = decltype(type);
    if (f.degree == 2) return body(project_pieces<Power<2>, T>);
    if (f.degree == 3) return body(project_pieces<Power<3>, T>);
    return body(project_pieces<Power<4>, T>);
  };
  return f.dtype == Dtype::bf16 ? with_type(bf16{}) : with_type(f16{});
}

Status check(const ProjectStateArgs& args) {
  Features f = args.features;
  f.u = args.x;
  if (const Status s = pom::check(StateArgs{f, args.groups, args.out}); s != Status::ok) return s;
  if (!args.weight) return Status::null_pointer;
  if (f.dtype != Dtype::bf16 && f.dtype != Dtype::f16) return Status::bad_dtype;
  if (f.degree < 2 || f.degree > 4) return Status::bad_degree;
  if (f.form != Form::power || f.rotary.axes || f.u_tangent || args.groups.mask || f.tokens < 1 || args.dim < 1)
    return Status::bad_size;
  const bool aligned = Alignment(f.dtype)
                           .pointers({args.x, args.weight, args.bias, f.coeff})
                           .sizes({f.width, args.dim, args.x_batch_stride, args.x_token_stride});
  const ProjectPlan plan(args, nullptr);
  bool fits = true;  // in 32 bits, steps of all rounds too
  for (const int64_t n : {f.tokens, f.batch, f.width, args.dim, plan.slots, plan.rounds * plan.sums.steps})
    fits = fits && n <= kMaxBlocks;
  const bool strided = (f.batch <= 1 || args.x_batch_stride > 0) && (f.tokens <= 1 || args.x_token_stride > 0);
  return aligned && fits && strided ? Status::ok : Status::bad_size;
}

Status run(const ProjectStateArgs& args, void* workspace, void* stream) {
  ProjectPlan plan(args, workspace);
  const Features& f = args.features;
  if (f.batch * args.groups.count == 0) return Status::ok;
  const int64_t token_stride = most(8, args.x_token_stride), batch_stride = most(8, args.x_batch_stride);
  const Tensor16 x = {args.x, args.dim, f.tokens, f.batch, token_stride, batch_stride};
  const Tensor16 weight = {args.weight, args.dim, f.width, 1, args.dim, args.dim * f.width};
  if (const Status s = make_tile_map(x, kProductRows, plan.sums.x); s != Status::ok) return s;
  if (const Status s = make_tile_map(weight, kShareRows, plan.sums.weight); s != Status::ok) return s;
  const Status s = with_project(f, [&](auto kernel) { return launch_project(kernel, plan.sums, stream); });
  if (s != Status::ok) return s;
  const Join<float> joined = {plan.sums.pieces, f.batch, f.width, plan.sums.rows, plan.sums.weight_rows, {}, nullptr,
                              args.out};
  return args.groups.cumulative ? scan(joined, false, stream) : join(joined, stream);
}

}  // namespace

bool projects(const ProjectStateArgs& args) {
  int clusters;
  return check(args) == Status::ok &&
         with_project(args.features, [&](auto kernel) { return prepare(kernel, clusters); }) == Status::ok;
}

size_t workspace(const ProjectStateArgs& args) {
  const Status s = check(args);
  return s == Status::ok || s == Status::null_pointer ? ProjectPlan(args, nullptr).arena.used() : 0;
}

Status project_state(const ProjectStateArgs& args, void* workspace, size_t bytes, void* stream) {
  if (const Status s = check(args); s != Status::ok) return s;
  if (!workspace || bytes < cuda::workspace(args)) return Status::workspace_too_small;
  return run(args, Arena::align(workspace), stream);
}

}  // namespace pom::cuda
