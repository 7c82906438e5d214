// The state of tokens that this kernel projects itself: u = x Wᵀ + b goes from the product's registers through the
// polynomial into sums over tokens, and to no memory. For GPUs of compute capability 9.0, 16-bit types.
//
// A block has two groups of four warps that multiply, and one whose first thread copies tiles for them, as many steps
// ahead as there are stages. Each of the two takes a piece of up to 64 tokens, both the same 256 channels. The second
// stays two steps behind the first, so that while one makes sums of its products, the other one's keep the tensor cores
// busy.

#include "cuda/hopper.cuh"
#include "cuda/rows.cuh"
#include "cuda/tokens.cuh"

namespace pom::cuda {
namespace {

constexpr int kGroups = 2;  // that multiply
constexpr int kStages = 4;
constexpr int kPieceShift = 6;
constexpr int kGroupWarps = kWarpGroup / kWarp;
constexpr int kProjectThreads = (kGroups + 1) * kWarpGroup;
constexpr int kCopierRegisters = 40, kProductRegisters = 232;
static_assert(kProductRows == 1 << kPieceShift, "a group multiplies a piece");

struct Stage {
  char tokens[kGroups][kProductRows * kTileRowBytes];
  char weight[kProductColumns * kTileRowBytes];
};
struct ProjectShared {
  Stage stages[kStages];
  float sums[kGroups][kGroupWarps][kProductColumns];
  Barrier full[kStages], empty[kStages];
};
constexpr size_t kProjectBytes = sizeof(ProjectShared) + kTileAlignment;  // memory of a block is less aligned

struct ProjectSums {
  TileMap x, weight;
  Pieces pieces;
  int64_t tokens = 0;
  int channels = 0, steps = 0;                // steps of kDepth inputs
  unsigned slots = 0, all_slots = 0;          // of a sample, of all
  unsigned column_blocks = 0, all_blocks = 0;  // of kProductColumns channels; these times pairs of slots
  const void* bias = nullptr;
  const float *coeff = nullptr, *token_weight = nullptr;
  float* rows = nullptr;          // (batch, slots, channels)
  double* weight_rows = nullptr;  // (batch, slots), null for ones
};

// What one group makes of one block of work.
struct Work {
  Piece piece = {};  // empty where there is none
  unsigned slot, b;  // of all, of which sample
  int column;        // the first

  __device__ Work(const ProjectSums& args, unsigned block, int group)
      : slot(block / args.column_blocks * kGroups + group),
        b(slot / args.slots),
        column(int(block % args.column_blocks) * kProductColumns) {
    if (slot < args.all_slots) piece = args.pieces.at(slot - b * args.slots);
  }
};

// Where a step lies in the ring of stages.
struct Turn {
  int stage;
  unsigned parity;
  __device__ explicit Turn(unsigned step) : stage(int(step % kStages)), parity(step / kStages & 1) {}
};

__device__ inline void copy_tiles(const ProjectSums& args, ProjectShared& shared) {
  unsigned step = 0;
  for (unsigned block = blockIdx.x; block < args.all_blocks; block += gridDim.x) {
    const Work work[kGroups] = {Work(args, block, 0), Work(args, block, 1)};
    for (int i = 0; i < args.steps; ++i, ++step) {
      const Turn turn(step);
      Stage& stage = shared.stages[turn.stage];
      Barrier& full = shared.full[turn.stage];
      shared.empty[turn.stage].wait(turn.parity ^ 1);
      full.arrive_expecting(sizeof(Stage));
      // Tokens of samples that are not there are zeros.
      for (int group = 0; group < kGroups; ++group)
        load_tile(args.x, stage.tokens[group], i * kDepth, int(work[group].piece.begin), int(work[group].b), full);
      load_tile(args.weight, stage.weight, i * kDepth, work[0].column, 0, full);
    }
  }
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

// The polynomial of a group's products, summed over the piece's tokens, into its row; and the tokens' weights.
template <class Form, class T>
__device__ void sum_features(const ProjectSums& args, const Work& work, float (&u)[kProductNumbers],
                             float (*sums)[kProductColumns], int group) {
  const int thread = int(threadIdx.x) % kWarpGroup, warp = thread / kWarp, lane = thread % kWarp;
  const Form form(0);
  constexpr int degree = decltype(form.degree)::capacity;
  float of_token[2];  // weights, zero behind the end
  const int64_t first = work.piece.begin + 16 * warp + lane / 4;
  const float* const weights = args.token_weight ? args.token_weight + work.b * args.tokens : nullptr;
  POM_UNROLL
  for (int row = 0; row < 2; ++row) {
    const int64_t token = first + 8 * row;
    of_token[row] = token >= work.piece.end ? 0.0f
                    : weights               ? weights[token]
                                            : 1.0f;
  }
  if (work.piece.end - work.piece.begin < kProductRows) {  // the others are somebody else's, and maybe no numbers
    POM_UNROLL
    for (int i = 0; i < kProductNumbers; ++i)
      if (first + 8 * (i / 2 % 2) >= work.piece.end) u[i] = 0;
  }
  const int column = work.column + 2 * (lane % 4), pairs = (args.channels - work.column) / 8;
  const float* const coeffs = args.coeff + int64_t(column) * degree;
  const T* const biases = static_cast<const T*>(args.bias) + (args.bias ? column : 0);
  float x[kProductNumbers / 2];
  POM_UNROLL
  for (int pair = 0; pair < kProductNumbers / 4; ++pair) {  // neighbouring channels, of two tokens
    float coeff[2 * degree] = {}, bias[2] = {};
    if (pair < pairs) {
      POM_UNROLL
      for (int i = 0; i < degree; ++i) load_pair(coeffs + 8 * pair * degree + 2 * i, coeff + 2 * i);
      if (biases) load_pair(biases + 8 * pair, bias);
    }
    POM_UNROLL
    for (int i = 0; i < 2; ++i) {
      float sum = 0;
      POM_UNROLL
      for (int row = 0; row < 2; ++row) {
        const float projected = u[4 * pair + 2 * row + i] + bias[i];
        float phi;
        form.value(&projected, coeff + i * degree, &phi);
        sum += of_token[row] * phi;
      }
      x[2 * pair + i] = sum;
    }
  }
  const int offset = sum_lanes(x, lane);
  POM_UNROLL
  for (int i = 0; i < 8; i += 2) store_pair(x + i, sums[warp] + 4 * (i + offset) + 2 * (lane % 4));
  sync_threads(1 + group, kWarpGroup);
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
  double weight = 0;
  for (int64_t token = work.piece.begin + lane; token < work.piece.end; token += kWarp) weight += double(weights[token]);
  for (int apart = kWarp / 2; apart > 0; apart /= 2) weight += __shfl_xor_sync(0xffffffffu, weight, apart);
  if (lane == 0) args.weight_rows[work.slot] = weight;
}

template <class Form, class T>
__device__ void multiply(const ProjectSums& args, ProjectShared& shared, int group) {
  constexpr int kBehind = kStages - 2;  // steps, of the second group: with more the two would wait for each other
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned all_steps = (1 + (args.all_blocks - 1 - blockIdx.x) / gridDim.x) * args.steps;
  unsigned step = 0;
  auto release = [&](unsigned step) {
    if (lane == 0) shared.empty[Turn(step).stage].arrive();
  };
  for (unsigned block = blockIdx.x; block < args.all_blocks; block += gridDim.x) {
    float u[kProductNumbers];
    for (int i = 0; i < args.steps; ++i, ++step) {
      if (group > 0 && step + kBehind < all_steps) {
        const Turn ahead(step + kBehind);
        shared.full[ahead.stage].wait(ahead.parity);
      }
      const Turn turn(step);
      const Stage& stage = shared.stages[turn.stage];
      shared.full[turn.stage].wait(turn.parity);
      open_products();
      queue_step<T>(u, stage.tokens[group], stage.weight, i > 0);
      close_products();
      wait_for_products<1>();
      if (i > 0) release(step - 1);
    }
    wait_for_products<0>();
    keep_behind(u);
    release(step - 1);
    const Work work(args, block, group);
    sum_features<Form, T>(args, work, u, shared.sums[group], group);
  }
}

// For other GPUs of one warp that does nothing (check_kernel).
template <class Form, class T>
__global__ void __launch_bounds__(POM_HOPPER ? kProjectThreads : kWarp, 1)
    project_pieces(const POM_GRID_CONSTANT ProjectSums args) {
  if constexpr (POM_HOPPER) {
    POM_SHARED(memory);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory) + kTileAlignment - 1;
    ProjectShared& shared = *reinterpret_cast<ProjectShared*>(address / kTileAlignment * kTileAlignment);
    const int group = int(threadIdx.x) / kWarpGroup;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        shared.full[i].init(1);
        shared.empty[i].init(kGroups * kGroupWarps);
      }
      publish_barriers();
    }
    __syncthreads();
    if (group == kGroups) {
      drop_registers<kCopierRegisters>();
      if (threadIdx.x == kGroups * kWarpGroup) copy_tiles(args, shared);
    } else {
      take_registers<kProductRegisters>();
      multiply<Form, T>(args, shared, group);
    }
  }
}

struct ProjectPlan {
  Arena arena;
  ProjectSums sums;
  int64_t slots, blocks;  // of all samples

  ProjectPlan(const ProjectStateArgs& args, void* workspace) : arena(workspace) {
    const Features& f = args.features;
    sums.pieces = Pieces(f.tokens, kPieceShift, args.groups.count, args.groups.offsets);
    sums.tokens = f.tokens, sums.channels = int(f.width), sums.steps = int(ceil_div(args.dim, kDepth));
    slots = f.batch * sums.pieces.slots();
    blocks = ceil_div(slots, kGroups) * ceil_div(f.width, kProductColumns);
    sums.slots = unsigned(sums.pieces.slots()), sums.all_slots = unsigned(slots);
    sums.column_blocks = unsigned(ceil_div(f.width, kProductColumns)), sums.all_blocks = unsigned(blocks);
    sums.bias = args.bias;
    sums.coeff = static_cast<const float*>(f.coeff);
    sums.token_weight = static_cast<const float*>(f.weight);
    sums.rows = arena.take<float>(slots * f.width);
    sums.weight_rows = f.weight ? arena.take<double>(slots) : nullptr;
  }
};

template <class Kernel>
Status launch_project(Kernel kernel, const ProjectSums& sums, void* stream) {
  int device, multiprocessors;
  if (const Status s = checked(cudaGetDevice(&device)); s != Status::ok) return s;
  const cudaDeviceAttr how_many = cudaDevAttrMultiProcessorCount;
  if (const Status s = checked(cudaDeviceGetAttribute(&multiprocessors, how_many, device)); s != Status::ok) return s;
  const cudaFuncAttribute most_shared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const Status s = checked(cudaFuncSetAttribute(kernel, most_shared, int(kProjectBytes))); s != Status::ok) return s;
  return launch(kernel, least(sums.all_blocks, multiprocessors), kProjectThreads, kProjectBytes, stream, sums);
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
  if (const Status s = pom::check(StateArgs{f, args.groups, args.out, args.prior}); s != Status::ok) return s;
  if (!args.weight) return Status::null_pointer;
  if (f.dtype != Dtype::bf16 && f.dtype != Dtype::f16) return Status::bad_dtype;
  if (f.degree < 2 || f.degree > 4) return Status::bad_degree;
  if (f.form != Form::power || f.rotary.axes || f.u_tangent || args.groups.mask || f.tokens < 1 || args.dim < 1)
    return Status::bad_size;
  const bool aligned = Alignment(f.dtype)
                           .pointers({args.x, args.weight, args.bias, f.coeff})
                           .sizes({f.width, args.dim, args.x_batch_stride, args.x_token_stride});
  const ProjectPlan plan(args, nullptr);
  bool fits = true;  // in 32 bits, steps of all blocks too
  for (const int64_t n : {f.tokens, f.batch, f.width, args.dim, plan.slots, plan.blocks * plan.sums.steps})
    fits = fits && n <= kMaxBlocks;
  const bool strided = (f.batch <= 1 || args.x_batch_stride > 0) && (f.tokens <= 1 || args.x_token_stride > 0);
  return aligned && fits && strided ? Status::ok : Status::bad_size;
}

Status run(const ProjectStateArgs& args, void* workspace, void* stream) {
  ProjectPlan plan(args, workspace);
  const Features& f = args.features;
  if (f.batch * args.groups.count == 0) return Status::ok;
  const Status found = with_project(f, [](auto kernel) { return check_kernel(kernel, kProjectThreads); });
  if (found != Status::ok) return found;
  const int64_t token_stride = most(8, args.x_token_stride), batch_stride = most(8, args.x_batch_stride);
  const Tensor16 x = {args.x, args.dim, f.tokens, f.batch, token_stride, batch_stride};
  const Tensor16 weight = {args.weight, args.dim, f.width, 1, args.dim, args.dim * f.width};
  if (const Status s = make_tile_map(x, kProductRows, plan.sums.x); s != Status::ok) return s;
  if (const Status s = make_tile_map(weight, kProductColumns, plan.sums.weight); s != Status::ok) return s;
  const Status s = with_project(f, [&](auto kernel) { return launch_project(kernel, plan.sums, stream); });
  if (s != Status::ok) return s;
  const Join<float> joined = {plan.sums.pieces, f.batch, f.width, plan.sums.rows, plan.sums.weight_rows,
                              args.prior, nullptr, args.out};
  return args.groups.cumulative ? scan(joined, false, stream) : join(joined, stream);
}

}  // namespace

bool projects(const ProjectStateArgs& args) {
  return check(args) == Status::ok &&
         is_worth_a_try(with_project(args.features, [](auto kernel) { return check_kernel(kernel, kProjectThreads); }));
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
