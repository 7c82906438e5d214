// State of tokens that the kernel projects itself: u = x Wᵀ + b goes from the registers of the product through the
// polynomial into sums over tokens, and is never stored. Compute capability 9.0, 16-bit types.

#include "cuda/project.cuh"
#include "cuda/reduce.cuh"

#include <map>
#include <mutex>

namespace pom::cuda {
namespace {

// Sums over the eight threads of a warp that hold the same columns. Each thread ends with an eighth of the sums, in x[0
// … 7]; returns their offset within the original x.
template <int half = kProductNumbers / 4>
__device__ inline int sum_lanes(float (&x)[kProductNumbers / 2], int lane, int offset = 0) {
  const bool upper = lane & half / 2;
  POM_UNROLL for (int i = 0; i < half; ++i) {
    const float own = upper ? x[i + half] : x[i], other = upper ? x[i] : x[i + half];
    x[i] = own + __shfl_xor_sync(0xffffffffu, other, half / 2);
  }
  if (upper) offset += half;
  if constexpr (half > 8) return sum_lanes<half / 2>(x, lane, offset);
  return offset;
}

// The work of a group, and the weights of this thread's two tokens: zero after the end of the piece.
struct Sum {
  Work work;
  float of_token[2] = {};

  Sum() = default;
  __device__ Sum(const ProjectKernelArgs& args, unsigned round, int group) : work(args, round, group) {
    const float* const weights = args.weights(work.b);
    POM_UNROLL for (int row = 0; row < 2; ++row) {
      const int64_t token = this->token(row);
      of_token[row] = token >= work.piece.end ? 0.0f : weights ? weights[token] : 1.0f;
    }
  }
  __device__ int64_t token(int row) const {
    return work.piece.begin + int(threadIdx.x) % kWarpGroup / kWarp * 16 + int(threadIdx.x) % kWarp / 4 + 8 * row;
  }
};

// Applies the polynomial to a group's products and sums over the piece's tokens; also sums the tokens' weights.
template <class Form, class T>
__device__ void sum_features(const ProjectKernelArgs& args, ProjectShared& shared, const Sum& prepared,
                             float (&u)[kProductNumbers], int group, unsigned round_parity) {
  const int thread = int(threadIdx.x) % kWarpGroup, warp = thread / kWarp, lane = thread % kWarp;
  const Work& work = prepared.work;
  float (*const sums)[kProductColumns] = shared.sums[group];
  const Form form(0);
  constexpr int degree = decltype(form.degree)::capacity;
  if (work.piece.end - work.piece.begin < kProductRows) {  // other rows belong to other pieces, and may hold no numbers
    POM_UNROLL for (int i = 0; i < kProductNumbers; ++i)
      if (prepared.token(i / 2 % 2) >= work.piece.end) u[i] = 0;
  }
  shared.coeff_full.wait(round_parity);
  const float* const coeffs = shared.coeff + 2 * (lane % 4) * degree;
  const float* const biases = shared.bias + 2 * (lane % 4);
  float x[kProductNumbers / 2];
  POM_UNROLL for (int pair = 0; pair < kProductNumbers / 4; ++pair) {  // neighbouring channels of two tokens
    float coeff[2 * degree], bias[2];
    POM_UNROLL for (int i = 0; i < degree; ++i)
      load_numbers<2>(coeffs + 8 * pair * degree + 2 * i, coeff + 2 * i);
    load_numbers<2>(biases + 8 * pair, bias);
    POM_UNROLL for (int i = 0; i < 2; ++i) {
      float sum = 0;
      POM_UNROLL for (int row = 0; row < 2; ++row) {
        const float projected = u[4 * pair + 2 * row + i] + bias[i];
        float phi;
        form.value(&projected, coeff + i * degree, &phi);
        sum += prepared.of_token[row] * phi;
      }
      x[2 * pair + i] = sum;
    }
  }
  const int offset = sum_lanes(x, lane);
  POM_UNROLL for (int i = 0; i < 8; i += 2)
    store_numbers<2>(sums[warp] + 4 * (i + offset) + 2 * (lane % 4), x + i);
  sync_threads(1 + group, kWarpGroup);
  if (thread == 0) shared.coeff_empty.arrive();
  const int own = 2 * thread;
  if (work.slot < args.all_slots && work.column + own < args.channels) {
    float total[2] = {};
    POM_UNROLL for (int other = 0; other < kGroupWarps; ++other) {
      POM_UNROLL for (int i = 0; i < 2; ++i)
        total[i] += sums[other][own + i];
    }
    store_numbers<2>(args.rows + int64_t(work.slot) * args.channels + work.column + own, total);
  }
  sync_threads(1 + group, kWarpGroup);  // the sums may be overwritten
  if (warp > 0 || work.column > 0 || !args.weight_rows || work.slot >= args.all_slots) return;
  const float* const weights = args.weights(work.b);
  double weight = 0;
  for (int64_t token = work.piece.begin + lane; token < work.piece.end; token += kWarp)
    weight += double(weights[token]);
  for (int apart = kWarp / 2; apart > 0; apart /= 2) weight += __shfl_xor_sync(0xffffffffu, weight, apart);
  if (lane == 0) args.weight_rows[work.slot] = weight;
}

template <class Form, class T>
__device__ void multiply(const ProjectKernelArgs& args, ProjectShared& shared, int group) {
  const unsigned lane = threadIdx.x % kWarp;
  const int ahead = int(min(kBehind, args.steps / 2));
  TokenRing::Barriers& token_barriers = shared.token_barriers[group];
  unsigned step = 0, parity = 0;
  auto release = [&](unsigned step) {
    if (lane < kCluster) shared.weight_barriers.empty[RingPosition<kWeightStages>(step).stage].arrive_in(lane);
    if (lane == 0) token_barriers.empty[RingPosition<kTokenStages>(step).stage].arrive();
  };
  each_round(args, [&](unsigned round) {
    // A group begins when the other is a few steps ahead: the first in the round before, the second in this one.
    shared.ahead[1 - group].wait(group == 0 ? parity ^ 1 : parity);
    float u[kProductNumbers];
    Sum sum;
    for (int i = 0; i < args.steps; ++i, ++step) {
      const RingPosition<kWeightStages> weight(step);
      const RingPosition<kTokenStages> tokens(step);
      token_barriers.full[tokens.stage].wait(tokens.parity);
      shared.weight_barriers.full[weight.stage].wait(weight.parity);
      fence_products();
      queue_step<T>(u, shared.tokens[group].tiles[tokens.stage], shared.weight.tiles[weight.stage], i > 0);
      commit_products();
      if (i == 0) sum = Sum(args, round, group);  // while the tensor cores are busy
      wait_for_products<1>();
      if (i > 0) release(step - 1);
      if (i == ahead && lane == 0) shared.ahead[group].arrive();
    }
    wait_for_products<0>();
    fence_sums(u);
    release(step - 1);
    sum_features<Form, T>(args, shared, sum, u, group, parity);
    parity ^= 1;
  });
}

// For other GPUs a kernel of one warp that does nothing (see check_kernel()).
template <class Form, class T>
__global__ void __launch_bounds__(POM_HOPPER ? kProjectThreads : kWarp, 1)
    project_state_kernel(const POM_GRID_CONSTANT ProjectKernelArgs args) {
  if constexpr (POM_HOPPER) {
    POM_SHARED(memory);
    ProjectShared& shared = *reinterpret_cast<ProjectShared*>(memory + -shared_address(memory) % kTileAlignment);
    const int group = int(threadIdx.x) / kWarpGroup;
    if (threadIdx.x == 0) {
      shared.init();
      publish_barriers();
    }
    sync_cluster();
    if (group == kGroups) {
      dealloc_registers<kCopierRegisters>();
      const int copier = int(threadIdx.x) % kWarpGroup / kWarp;
      const bool first = threadIdx.x % kWarp == 0;
      if (copier == kCopiesCoefficients)
        copy_coefficients<T, decltype(Form::degree)::capacity>(args, shared);
      else if (copier == kCopiesWeight && first)
        copy_weight(args, shared);
      else if (copier >= kCopiesTokens && first)
        copy_tokens(args, shared, copier - kCopiesTokens);
    } else {
      alloc_registers<kProductRegisters>();
      multiply<Form, T>(args, shared, group);
    }
    sync_cluster();  // a block's shared memory must last while the other one copies to it or arrives at its barriers
  }
}

struct ProjectPlan {
  Arena arena;
  ProjectKernelArgs sums;
  int64_t slots, rounds;  // of all samples

  ProjectPlan(const ProjectStateArgs& args, void* workspace) : arena(workspace) {
    const Features& f = args.features;
    sums.pieces = Pieces(f.tokens, kPieceShift, args.groups.count, args.groups.offsets);
    sums.call = args;
    sums.channels = int(f.width), sums.steps = int(ceil_div(args.dim, kDepth));
    slots = f.batch * sums.pieces.slots();
    rounds = ceil_div(slots, kCluster * kGroups) * ceil_div(f.width, kProductColumns);
    sums.slots = unsigned(sums.pieces.slots()), sums.all_slots = unsigned(slots);
    sums.column_blocks = unsigned(ceil_div(f.width, kProductColumns)), sums.all_rounds = unsigned(rounds);
    sums.rows = arena.take<float>(slots * f.width);
    sums.weight_rows = f.weight ? arena.take<double>(slots) : nullptr;
  }
};

using ProjectKernel = void (*)(ProjectKernelArgs);
constexpr Clusters kShape = {kCluster, kProjectThreads, kProjectBytes};

// Prepares a kernel on the current device at its first use and counts the clusters that the device runs at a time.
// Later calls look this up: the driver takes microseconds to count them.
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
  const cudaFuncAttribute room = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const Status s = checked(cudaFuncSetAttribute(kernel, room, int(kProjectBytes))); s != Status::ok) return s;
  if (const Status s = count_clusters(kernel, kShape, clusters); s != Status::ok) return s;
  prepared[{kernel, device}] = clusters;
  return Status::ok;
}

ProjectKernel kernel_for(const Features& f) {
  auto of_type = [&](auto type) -> ProjectKernel {
    using T = decltype(type);
    return f.degree == 2   ? project_state_kernel<Power<2>, T>
           : f.degree == 3 ? project_state_kernel<Power<3>, T>
                           : project_state_kernel<Power<4>, T>;
  };
  return f.dtype == Dtype::bf16 ? of_type(bf16{}) : of_type(f16{});
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
                           .pointers({args.x, args.weight, args.bias})
                           .numbers({f.coeff})
                           .sizes({f.width, args.dim, args.x_batch_stride, args.x_token_stride})
                           .vec() == 8;
  const ProjectPlan plan(args, nullptr);
  const bool fits = fit({f.tokens, f.batch, f.width, args.dim, plan.slots, plan.rounds * plan.sums.steps});
  const bool strided = (f.batch <= 1 || args.x_batch_stride > 0) && (f.tokens <= 1 || args.x_token_stride > 0);
  return aligned && fits && strided ? Status::ok : Status::bad_size;
}

Status run(const ProjectStateArgs& args, void* workspace, void* stream) {
  ProjectPlan plan(args, workspace);
  const Features& f = args.features;
  if (f.batch * args.groups.count == 0) return Status::ok;
  int clusters;
  const ProjectKernel kernel = kernel_for(f);
  if (const Status s = prepare(kernel, clusters); s != Status::ok) return s;
  const int64_t token_stride = max(8, args.x_token_stride), batch_stride = max(8, args.x_batch_stride);
  const Tensor16 x = {args.x, args.dim, f.tokens, f.batch, token_stride, batch_stride};
  const Tensor16 weight = {args.weight, args.dim, f.width, 1, args.dim, args.dim * f.width};
  if (const Status s = make_tile_map(x, kProductRows, plan.sums.x); s != Status::ok) return s;
  if (const Status s = make_tile_map(weight, kShareRows, plan.sums.weight); s != Status::ok) return s;
  const Status s = launch_clusters(kernel, min(plan.sums.all_rounds, clusters), kShape, stream, plan.sums);
  if (s != Status::ok) return s;
  const ReduceArgs<float> reduce = {plan.sums.pieces,      f.batch,    f.width, plan.sums.rows,
                                    plan.sums.weight_rows, args.prior, nullptr, args.out};
  return args.groups.cumulative ? scan_groups(reduce, false, stream) : reduce_groups(reduce, stream);
}

}  // namespace

bool projects(const ProjectStateArgs& args) {
  int clusters;
  return check(args) == Status::ok && is_worth_a_try(prepare(kernel_for(args.features), clusters));
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
