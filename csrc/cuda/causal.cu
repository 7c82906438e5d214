// Token-causal mix, linear in tokens, in one pass: a block sums its tile, learns the sum of the tiles before it, and
// walks through the tile again, in shared memory, with the gates. The states of the tokens are never stored.

#include "cuda/causal_scan.cuh"

namespace pom::cuda {
namespace {

template <class Acc>
struct WalkForward {
  Walk walk;
  Lookback<Acc> sums;
  void* y = nullptr;
  StateOut out;
};

template <class I>
__global__ void __launch_bounds__(kWalkThreads, walk_blocks<I>())
    causal_means(WalkForward<typename I::Acc> args) {
  using W = Walker<I, false>;
  using Acc = typename I::Acc;
  constexpr int kNumbers = W::kNumbers, kGates = kNumbers > 8 ? 2 : 4;
  const Walk& walk = args.walk;
  const Turn turn = take_turn(args.sums);
  const W own(walk, turn, turn.step);
  const typename W::Tokens tokens(walk.features, own.b, own.place);
  const typename W::Gates gates(walk.gates, own.b, own.place);
  const int64_t channels = walk.features.channels();
  const typename W::Rows y(args.y, own.b * walk.features.tokens * channels, channels, own.place);

  own.find_inverses(walk);
  Acc sum[kNumbers] = {}, base[kNumbers];
  own.load(tokens, sum);
  typename W::Gates::Raw raw_gate[kGates];
  auto load = [&](int j, int64_t token) { gates.load(token, raw_gate[j]); };
  load_tokens<kGates>(own.begin, own.end, 1, load);  // on their way while the block waits

  const double of_tile = own.sum_rows(sum);
  const bool is_last = turn.step + 1 == args.sums.steps;
  double before = 0;
  if (own.column >= 0) {
    before = sum_before(args.sums, turn, own.column, of_tile);
    const int64_t at = own.b * channels + own.column;
    double total = before + of_tile;
    if (is_last) {
      const double rest = add_prior<Acc>(walk.prior, at, total);
      write_state<Acc>(args.out, at, total, rest);
    }
    before = with_prior<Acc>(walk.prior, at, before);
  }
  if (is_last && args.out.count && turn.slab == 0 && threadIdx.x == 0)
    args.out.count[own.b] = walk.count_before(own.b, walk.tiles, walk.features.tokens);
  own.sum_before_row(before, false, base);

  POM_UNROLL
  for (int i = 0; i < kNumbers; ++i) sum[i] = Acc(0);
  typename W::Raw raw;
  use_tokens<kGates>(own.begin, own.end, 1, load, [&](int j, int64_t token) {
    Acc mean[kNumbers], value[kNumbers];
    own.find(tokens, token, raw);
    tokens.add(token, raw, sum);
    const Acc scale = own.inverse(token);
    POM_UNROLL
    for (int i = 0; i < kNumbers; ++i) mean[i] = (base[i] + sum[i]) * scale;
    gates.multiply(token, raw_gate[j], mean, value);
    y.store(token, value);
  });
}

// A warp to a tile: the sum of its weights.
template <class Acc>
__global__ void __launch_bounds__(kWalkThreads)
    weights_of_tiles(const Acc* weight, int64_t batch, int64_t tokens, int64_t tiles, int shift, double* sums) {
  const int64_t index = (int64_t(blockIdx.x) * kWalkThreads + threadIdx.x) / kWarp;
  if (index >= batch * tiles) return;
  const int64_t b = index / tiles, begin = (index - b * tiles) << shift, end = least(tokens, begin + (1 << shift));
  double sum = 0;
  for (int64_t token = begin + threadIdx.x % kWarp; token < end; token += kWarp)
    sum += double(weight[b * tokens + token]);
  for (int apart = kWarp / 2; apart > 0; apart /= 2) sum += __shfl_down_sync(0xffffffffu, sum, apart);
  if (threadIdx.x % kWarp == 0) sums[index] = sum;
}

template <class Acc>
struct ForwardPlan : WalkPlan<Acc, false> {
  double *weights = nullptr, *counts = nullptr;  // (batch, tiles): of each tile, and up to its end

  ForwardPlan(const CausalArgs& args, void* workspace)
      : WalkPlan<Acc, false>(args.features, args.gates, args.prior, Alignment(args.features.dtype).pointers({args.y}),
                             workspace) {
    const Features& f = args.features;
    if (!f.weight) return;
    weights = this->arena.template take<double>(f.batch * this->walk.tiles);
    this->walk.counts = counts = this->arena.template take<double>(f.batch * this->walk.tiles);
  }

  Status count(void* stream) const {
    const Features& f = this->walk.features;
    const int64_t tiles = this->walk.tiles;
    const Status s = launch(weights_of_tiles<Acc>, ceil_div(f.batch * tiles, kWalkThreads / kWarp), kWalkThreads, 0,
                            stream, static_cast<const Acc*>(f.weight), f.batch, f.tokens, tiles, this->shift, weights);
    Join<Acc> counted = {Pieces::rows(tiles), f.batch};
    counted.weights = weights;
    counted.prior.count = this->walk.prior.count;
    counted.out.count = counts;
    return s == Status::ok ? scan(counted, false, stream) : s;
  }
};

template <class Acc>
Status run(const CausalArgs& args, void* workspace, void* stream) {
  const ForwardPlan<Acc> plan(args, workspace);
  if (args.features.batch == 0) return Status::ok;
  if (plan.counts) {
    if (const Status s = plan.count(stream); s != Status::ok) return s;
  }
  if (const Status s = plan.sums.start(stream); s != Status::ok) return s;
  return plan.with_walker([&](auto instance) {
    using I = decltype(instance);
    return launch(causal_means<I>, plan.sums.blocks, kWalkThreads, Walker<I, false>::kBytes, stream,
                  {plan.walk, plan.sums, args.y, args.out});
  });
}

}  // namespace

size_t workspace(const CausalArgs& args) { return planned_bytes<ForwardPlan>(args, args.features.dtype); }

Status causal_mix(const CausalArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, stream); });
}

}  // namespace pom::cuda
