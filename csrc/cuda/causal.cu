// Token-causal mix, linear in tokens, in one pass: a block sums its tile, looks up the sum of the tiles before it, and
// goes through the tile again in shared memory, now with the gates. The states of single tokens are never stored.

#include "cuda/causal_scan.cuh"

namespace pom::cuda {
namespace {

template <class I>
__global__ void __launch_bounds__(kScanThreads, scan_blocks<I>())
    causal_mix_kernel(ScanArgs<CausalArgs, typename I::Acc> scan) {
  using W = ScanTile<I, CausalArgs>;
  using Acc = typename I::Acc;
  constexpr int kNumbers = W::kNumbers, kGates = kNumbers > 8 ? 2 : 4;
  const CausalArgs& call = scan.call;
  const ScanStep step = claim_step(scan.sums);
  const W own(scan, step, step.index);
  const typename W::Tokens tokens(call.features, own.b, own.place);
  const typename W::Gates gates(call.gates, own.b, own.place);
  const int64_t channels = call.features.channels();
  const typename W::Rows y(call.y, own.b * call.features.tokens * channels, channels, own.place);

  own.store_inverse_counts(scan);
  Acc sum[kNumbers] = {}, base[kNumbers];
  own.load(tokens, sum);
  typename W::Gates::Raw raw_gate[kGates];
  auto load = [&](int j, int64_t token) { gates.load(token, raw_gate[j]); };
  load_tokens<kGates>(own.begin, own.end, 1, load);  // in flight while the block waits

  const double of_tile = own.sum_rows(sum);
  const bool is_last = step.index + 1 == scan.sums.steps;
  double before = 0;
  if (own.column >= 0) {
    before = sum_before(scan.sums, step, own.column, of_tile);
    const int64_t at = own.b * channels + own.column;
    double total = before + of_tile;
    if (is_last) {
      const double remainder = add_prior<Acc>(call.prior, at, total);
      write_state<Acc>(call.out, at, total, remainder);
    }
    before = with_prior<Acc>(call.prior, at, before);
  }
  if (is_last && call.out.count && step.channel_tile == 0 && threadIdx.x == 0)
    call.out.count[own.b] = scan.count_before(own.b, scan.tiles, call.features.tokens);
  own.sum_before_row(before, false, base);

  Acc running[kNumbers] = {};
  typename W::Raw raw;
  use_tokens<kGates>(own.begin, own.end, 1, load, [&](int j, int64_t token) {
    Acc mean[kNumbers], value[kNumbers];
    own.restore(tokens, token, raw);
    tokens.add(token, raw, running);
    const Acc scale = own.inverse_count(token);
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      mean[i] = (base[i] + running[i]) * scale;
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
struct CausalPlan : ScanPlan<ScanArgs<CausalArgs, Acc>> {
  double* weights = nullptr;  // (batch, tiles): sum of each tile

  CausalPlan(const CausalArgs& call, void* workspace)
      : ScanPlan<ScanArgs<CausalArgs, Acc>>(call, Alignment(call.features.dtype).pointers({call.y}), workspace) {
    const Features& f = call.features;
    if (!f.weight) return;
    weights = this->arena.template take<double>(f.batch * this->scan.tiles);
    this->scan.counts = this->arena.template take<double>(f.batch * this->scan.tiles);
  }

  Status count(void* stream) const {
    const Features& f = this->scan.call.features;
    const int64_t tiles = this->scan.tiles;
    const Status s = launch(tile_weights_kernel<Acc>, ceil_div(f.batch * tiles, kScanThreads / kWarp), kScanThreads, 0,
                            stream, static_cast<const Acc*>(f.weight), f.batch, f.tokens, tiles, this->shift, weights);
    ReduceArgs<Acc> counted = {Pieces::rows(tiles), f.batch};
    counted.weights = weights;
    counted.prior.count = this->scan.call.prior.count;
    counted.out.count = this->scan.counts;
    return s == Status::ok ? scan_groups(counted, false, stream) : s;
  }

  Status run(void* stream) const {
    const auto& scan = this->scan;
    if (scan.call.features.batch == 0) return Status::ok;
    if (weights) {
      if (const Status s = count(stream); s != Status::ok) return s;
    }
    if (const Status s = scan.sums.start(stream); s != Status::ok) return s;
    return this->with_scan_instance([&](auto instance) {
      using I = decltype(instance);
      return launch(causal_mix_kernel<I>, scan.sums.blocks, kScanThreads, ScanTile<I, CausalArgs>::kBytes, stream,
                    scan);
    });
  }
};

}  // namespace

size_t workspace(const CausalArgs& args) { return planned_bytes<CausalPlan>(args, args.features.dtype); }

Status causal_mix(const CausalArgs& args, void* workspace, size_t bytes, void* stream) {
  return run_plan<CausalPlan>(args, args.features.dtype, workspace, bytes, stream);
}

}  // namespace pom::cuda
