// The state of tokens that this kernel projects itself: u = x Wᵀ + b goes from the product's registers through the
// polynomial into sums over tokens, and to no memory. For GPUs of compute capability 9.0, 16-bit types.

#include "cuda/project.cuh"
#include "cuda/rows.cuh"

#include <map>
#include <mutex>

namespace pom::cuda {
namespace {

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
  for (int64_t token = work.piece.begin + lane; token < work.piece.end; token += kWarp)
    weight += double(weights[token]);
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
    ProjectShared& shared = *reinterpret_cast<ProjectShared*>(memory + -shared_address(memory) % kTileAlignment);
    const int group = int(threadIdx.x) / kWarpGroup;
    if (threadIdx.x == 0) {
      shared.init();
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

// Makes a kernel ready on the current device, the first time that it is asked for there: later calls find how many
// clusters of it a device runs at once, which takes the driver microseconds to say.
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
  const Clusters shape = {kCluster, kProjectThreads, kProjectBytes};
  if (const Status s = count_clusters(kernel, shape, clusters); s != Status::ok) return s;
  prepared[{kernel, device}] = clusters;
  return Status::ok;
}

Status launch_project(ProjectKernel kernel, const ProjectSums& sums, int clusters, void* stream) {
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

Status check_fused(const ProjectStateArgs& args) {
  Features f = args.features;
  f.u = args.x.data;
  if (const Status s = pom::check(StateArgs{f, args.groups, args.out, args.prior}); s != Status::ok) return s;
  if (!args.weight) return Status::null_pointer;
  if (args.x_tangent.data) return Status::no_tangents;
  if (f.dtype != Dtype::bf16 && f.dtype != Dtype::f16) return Status::bad_dtype;
  if (f.degree < 2 || f.degree > 4) return Status::bad_degree;
  if (f.form != Form::power || f.rotary.axes || f.u_tangent || args.groups.mask || f.tokens < 1 || args.dim < 1)
    return Status::bad_size;
  const bool aligned = Alignment(f.dtype)
                           .pointers({args.x.data, args.weight, args.bias})
                           .numbers({f.coeff})
                           .sizes({f.width, args.dim, args.x.batch_stride, args.x.token_stride})
                           .vec() == 8;
  const ProjectPlan plan(args, nullptr);
  bool fits = true;  // in 32 bits, steps of all rounds too
  for (const int64_t n : {f.tokens, f.batch, f.width, args.dim, plan.slots, plan.rounds * plan.sums.steps})
    fits = fits && n <= kMaxBlocks;
  const bool strided = args.x.channel_stride == 1 && (f.batch <= 1 || args.x.batch_stride > 0) && (f.tokens <= 1 || args.x.token_stride > 0);
  return aligned && fits && strided ? Status::ok : Status::bad_size;
}

Status run(const ProjectStateArgs& args, void* workspace, void* stream) {
  ProjectPlan plan(args, workspace);
  const Features& f = args.features;
  if (f.batch * args.groups.count == 0) return Status::ok;
  int clusters;
  const Status found = with_project(f, [&](auto kernel) { return prepare(kernel, clusters); });
  if (found != Status::ok) return found;
  const int64_t token_stride = most(8, args.x.token_stride), batch_stride = most(8, args.x.batch_stride);
  const Tensor16 x = {args.x.data, args.dim, f.tokens, f.batch, token_stride, batch_stride};
  const Tensor16 weight = {args.weight, args.dim, f.width, 1, args.dim, args.dim * f.width};
  if (const Status s = make_tile_map(x, kProductRows, plan.sums.x); s != Status::ok) return s;
  if (const Status s = make_tile_map(weight, kShareRows, plan.sums.weight); s != Status::ok) return s;
  const Status s = with_project(f, [&](auto kernel) { return launch_project(kernel, plan.sums, clusters, stream); });
  if (s != Status::ok) return s;
  const Join<float> joined = {plan.sums.pieces, f.batch, f.width, plan.sums.rows, plan.sums.weight_rows,
                              args.prior, nullptr, args.out};
  return args.groups.cumulative ? scan(joined, false, stream) : join(joined, stream);
}

}  // namespace

bool projects(const ProjectStateArgs& args) {
  int clusters;
  return check_fused(args) == Status::ok &&
         is_worth_a_try(with_project(args.features, [&](auto kernel) { return prepare(kernel, clusters); }));
}

size_t workspace(const ProjectStateArgs& args) {
  const Status s = check_fused(args);
  return s == Status::ok || s == Status::null_pointer ? ProjectPlan(args, nullptr).arena.used() : 0;
}

Status project_state(const ProjectStateArgs& args, void* workspace, size_t bytes, void* stream) {
  if (const Status s = check_fused(args); s != Status::ok) return s;
  if (!workspace || bytes < cuda::workspace(args)) return Status::workspace_too_small;
  return run(args, Arena::align(workspace), stream);
}

}  // namespace pom::cuda
