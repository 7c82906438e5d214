// Token-causal mix, linear in tokens, in one pass: a block sums its tile, looks up the sum of the tiles before it, and
// goes through the tile again in shared memory, now with the gates. The states of single tokens are never stored.

#include "cuda/causal_scan.cuh"

namespace pom::cuda {
namespace {

template <class Acc>
struct ForwardArgs {
  ScanArgs scan;
  Lookback<Acc> sums;
  void* y = nullptr;
  StateOut out;
};

template <class I>
__global__ void __launch_bounds__(kScanThreads, scan_blocks<I>()) causal_mix_kernel(ForwardArgs<typename I::Acc> args) {
  using W = ScanTile<I, false>;
  using Acc = typename I::Acc;
  constexpr int kNumbers = W::kNumbers, kGates = kNumbers > 8 ? 2 : 4;
  const ScanArgs& scan = args.scan;
  const ScanStep step = claim_step(args.sums);
  const W own(scan, step, step.index);
  const typename W::Tokens tokens(scan.features, own.b, own.place);
  const typename W::Gates gates(scan.gates, own.b, own.place);
  const int64_t channels = scan.features.channels();
  const typename W::Rows y(args.y, own.b * scan.features.tokens * channels, channels, own.place);

  own.store_inverse_counts(scan);
  Acc sum[kNumbers] = {}, base[kNumbers];
  own.load(tokens, sum);
  typename W::Gates::Raw raw_gate[kGates];
  auto load = [&](int j, int64_t token) { gates.load(token, raw_gate[j]); };
  load_tokens<kGates>(own.begin, own.end, 1, load);  // in flight while the block waits

  const double of_tile = own.sum_rows(sum);
  const bool is_last = step.index + 1 == args.sums.steps;
  double before = 0;
  if (own.column >= 0) {
    before = sum_before(args.sums, step, own.column, of_tile);
    const int64_t at = own.b * channels + own.column;
    double total = before + of_tile;
    if (is_last) {
      const double remainder = add_prior<Acc>(scan.prior, at, total);
      write_state<Acc>(args.out, at, total, remainder);
    }
    before = with_prior<Acc>(scan.prior, at, before);
  }
  if (is_last && args.out.count && step.channel_tile == 0 && threadIdx.x == 0)
    args.out.count[own.b] = scan.count_before(own.b, scan.tiles, scan.features.tokens);
  own.sum_before_row(before, false, base);

  POM_UNROLL
  for (int i = 0; i < kNumbers; ++i) sum[i] = Acc(0);
  typename W::Raw raw;
  use_tokens<kGates>(own.begin, own.end, 1, load, [&](int j, int64_t token) {
    Acc mean[kNumbers], value[kNumbers];
    own.restore(tokens, token, raw);
    tokens.add(token, raw, sum);
    const Acc scale = own.inverse_count(token);
    POM_UNROLL
    for (int i = 0; i < kNumbers; ++i) mean[i] = (base[i] + sum[i]) * scale;
    gates.multiply(token, raw_gate[j], mean, value);
    y.store(token, value);
  });
}

// Sums the weights of a tile; one warp per tile.
template <class Acc>
__global__ void __launch_bounds__(kScanThreads)
    tile_weights_kernel(const Acc* weight, int64_t batch, int64_t tokens, int64_t tiles, int shift, double* sums) {
  const int64_t index = (int64_t(blockIdx.x) * kScanThreads + threadIdx.x) / kWarp;
  if (index >= batch * tiles) return;
  const int64_t b = index / tiles, begin = (index - b * tiles) << shift, end = min(tokens, begin + (1 << shift));
  double sum = 0;
  for (int64_t token = begin + threadIdx.x % kWarp; token < end; token += kWarp)
    sum += double(weight[b * tokens + token]);
  for (int apart = kWarp / 2; apart > 0; apart /= 2) sum += __shfl_down_sync(0xffffffffu, sum, apart);
  if (threadIdx.x % kWarp == 0) sums[index] = sum;
}

template <class Acc>
struct ForwardPlan : ScanPlan<Acc, false> {
  double *weights = nullptr, *counts = nullptr;  // (batch, tiles): sum of each tile, and prefix sums

  ForwardPlan(const CausalArgs& args, void* workspace)
      : ScanPlan<Acc, false>(args.features, args.gates, args.prior, Alignment(args.features.dtype).pointers({args.y}),
                             workspace) {
    const Features& f = args.features;
    if (!f.weight) return;
    weights = this->arena.template take<double>(f.batch * this->scan.tiles);
    this->scan.counts = counts = this->arena.template take<double>(f.batch * this->scan.tiles);
  }

  Status count(void* stream) const {
    const Features& f = this->scan.features;
    const int64_t tiles = this->scan.tiles;
    const Status s = launch(tile_weights_kernel<Acc>, ceil_div(f.batch * tiles, kScanThreads / kWarp), kScanThreads, 0,
                            stream, static_cast<const Acc*>(f.weight), f.batch, f.tokens, tiles, this->shift, weights);
    ReduceArgs<Acc> counted = {Pieces::rows(tiles), f.batch};
    counted.weights = weights;
    counted.prior.count = this->scan.prior.count;
    counted.out.count = counts;
    return s == Status::ok ? scan_groups(counted, false, stream) : s;
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
  return plan.with_scan_instance([&](auto instance) {
    using I = decltype(instance);
    return launch(causal_mix_kernel<I>, plan.sums.blocks, kScanThreads, ScanTile<I, false>::kBytes, stream,
                  {plan.scan, plan.sums, args.y, args.out});
  });
}

}  // namespace

size_t workspace(const CausalArgs& args) { return planned_bytes<ForwardPlan>(args, args.features.dtype); }

Status causal_mix(const CausalArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, stream); });
}

}  // namespace pom::cuda
