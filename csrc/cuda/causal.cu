// Token-causal mix, linear in tokens: sums of chunks, a scan over the chunks, and a walk of one warp through every
// chunk that carries the running sum. The states of the tokens are never stored.

#include "cuda/walk.cuh"

namespace pom::cuda {
namespace {

template <class I>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks<I>) causal_means(Walk walk, void* y_) {
  using W = Walker<I>;
  using Acc = typename I::Acc;
  constexpr int kNumbers = W::kNumbers, kUnroll = kNumbers > 8 ? 2 : 4;
  const int lane = int(threadIdx.x) % kWarp;
  const BlockIndex block(walk.slabs.count);
  const int64_t index = int64_t(block.row) * (kWalkThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= walk.features.batch * walk.chunks) return;
  const Chunk chunk(walk, unsigned(index));
  const Place place = walk.slabs.place(block.slab, lane);
  const typename W::Tokens tokens(walk.features, chunk.b, place);
  const typename W::Gates gates(walk.gates, chunk.b, place);
  const int64_t channels = walk.features.channels();
  const typename W::Rows y(y_, chunk.b * walk.features.tokens * channels, channels, place);

  const Acc inverses = inverse_counts<Acc>(walk, chunk, lane);
  Acc base[kNumbers], sum[kNumbers] = {};
  load_base<I::Vec, W::kRanges>(walk, chunk, place, base);
  typename W::Tokens::Raw raw[kUnroll];
  typename W::Gates::Raw raw_gate[kUnroll];
  auto load = [&](int j, int64_t token) {
    tokens.load(token, raw[j]);
    gates.load(token, raw_gate[j]);
  };
  for_tokens<kUnroll>(chunk.begin, chunk.end, 1, load, [&](int j, int64_t token) {
    Acc mean[kNumbers], value[kNumbers];
    tokens.add(token, raw[j], sum);
    const Acc scale = __shfl_sync(kAll, inverses, int(token - chunk.begin));
    POM_UNROLL
    for (int i = 0; i < kNumbers; ++i) mean[i] = (base[i] + sum[i]) * scale;
    gates.multiply(token, raw_gate[j], mean, value);
    y.store(token, value);
  });
}

template <class Acc>
struct ForwardPlan : CausalPlan<Acc, CausalArgs> {
  ForwardPlan(const CausalArgs& args, void* workspace)
      : CausalPlan<Acc, CausalArgs>(args, Alignment(args.features.dtype).pointers({args.y}), workspace) {}
};

template <class Acc>
Status run(const CausalArgs& args, void* workspace, void* stream) {
  const ForwardPlan<Acc> plan(args, workspace);
  if (args.features.batch == 0) return Status::ok;
  if (const Status s = plan.prefix_sums(args.out, stream); s != Status::ok || args.features.tokens == 0) return s;
  return plan.with_walker([&](auto instance) {
    return launch(causal_means<decltype(instance)>, plan.walk_blocks(), kWalkThreads, 0, stream, plan.walk, args.y);
  });
}

}  // namespace

size_t workspace(const CausalArgs& args) { return planned_bytes<ForwardPlan>(args, args.features.dtype); }

Status causal_mix(const CausalArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, stream); });
}

}  // namespace pom::cuda
