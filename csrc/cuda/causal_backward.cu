// Backward of the token-causal mix: one walk forwards through every chunk for the gates, one backwards for the
// features.

#include "cuda/walk.cuh"

namespace pom::cuda {
namespace {

struct WalkBackward {
  Walk walk;
  const void* grad_y = nullptr;
  int64_t grad_y_batch_stride = 0, grad_y_token_stride = 0;
  const void* grad_total = nullptr;  // acc (batch, 1, C), or null
  void* grad_gate = nullptr;
  void* parts = nullptr;  // acc (batch, tokens, channels >> shift), with heads
  int parts_shift = 0;
  int64_t parts_of_token = 0;
  void* later = nullptr;  // acc (batch, chunks, C): dL/dS of the tokens of a chunk, then of those from it on
  void* grad_u = nullptr;
  int64_t stride = 0;          // blocks that share the chunks of a slab
  void* coeff_rows = nullptr;  // acc (stride, degree, width)
};

// Forwards through every chunk: gradients of the gates, and the sum of what the chunk sends back.
template <class I>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks<I>) causal_gate_slopes(WalkBackward args) {
  using W = Walker<I>;
  using Acc = typename I::Acc;
  constexpr int kNumbers = W::kNumbers, kUnroll = kNumbers > 8 ? 1 : 2;
  const Walk& walk = args.walk;
  const int lane = int(threadIdx.x) % kWarp;
  const BlockIndex block(walk.slabs.count);
  const int64_t index = int64_t(block.row) * (kWalkThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= walk.features.batch * walk.chunks) return;
  const Chunk chunk(walk, unsigned(index));
  const Place place = walk.slabs.place(block.slab, lane);
  const typename W::Tokens tokens(walk.features, chunk.b, place);
  const typename W::Gates gates(walk.gates, chunk.b, place);
  const int64_t channels = walk.features.channels();
  const typename W::Rows dy(args.grad_y, chunk.b * args.grad_y_batch_stride, args.grad_y_token_stride, place);
  const typename W::Rows dgate(args.grad_gate, chunk.b * walk.features.tokens * channels, channels, place);

  const Acc inverses = inverse_counts<Acc>(walk, chunk, lane);
  Acc sum[kNumbers], back[kNumbers] = {};
  load_base<I::Vec, W::kRanges>(walk, chunk, place, sum);
  typename W::Tokens::Raw raw[kUnroll];
  typename W::Rows::Raw raw_dy[kUnroll];
  typename W::Gates::Raw raw_gate[kUnroll];
  auto load = [&](int j, int64_t token) {
    tokens.load(token, raw[j]);
    dy.load(token, raw_dy[j]);
    gates.load(token, raw_gate[j]);
  };
  for_tokens<kUnroll>(chunk.begin, chunk.end, 1, load, [&](int j, int64_t token) {
    Acc value[kNumbers], d[kNumbers];
    tokens.add(token, raw[j], sum);
    gates.value(token, raw_gate[j], value);
    W::Rows::unpack(raw_dy[j], d);
    const Acc scale = __shfl_sync(kAll, inverses, int(token - chunk.begin));
    POM_UNROLL
    for (int i = 0; i < kNumbers; ++i) {
      back[i] += d[i] * value[i] * scale;
      value[i] = d[i] * sum[i] * scale;
    }
    if (walk.gates.heads > 1) {
      write_head_parts<I::Vec, W::kRanges>(
          value, place, args.parts_shift,
          static_cast<Acc*>(args.parts) + (chunk.b * walk.features.tokens + token) * args.parts_of_token);
    } else {
      gates.slope(token, raw_gate[j], value);
      dgate.store(token, value);
    }
  });
  store_row<I::Vec, W::kRanges>(static_cast<Acc*>(args.later) + (chunk.b * walk.chunks + chunk.number) * channels,
                                place, back);
}

// Backwards through every chunk: the gradient of a token's features is what it and all later tokens send back.
template <class I>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks<I>) causal_slopes(WalkBackward args) {
  using W = Walker<I>;
  using Acc = typename I::Acc;
  constexpr int kNumbers = W::kNumbers, kUnroll = kNumbers > 8 || W::kRanges * W::Tokens::kCoeffs > 4 ? 1 : 2;
  const Walk& walk = args.walk;
  const int lane = int(threadIdx.x) % kWarp;
  const BlockIndex block(walk.slabs.count);
  const Place place = walk.slabs.place(block.slab, lane);
  const int64_t channels = walk.features.channels(), step = args.stride * (kWalkThreads / kWarp);

  Acc dc[W::kRanges][I::Vec][W::Tokens::kCoeffs] = {};
  for (int64_t index = int64_t(block.row) * (kWalkThreads / kWarp) + threadIdx.x / kWarp;
       index < walk.features.batch * walk.chunks; index += step) {
    const Chunk chunk(walk, unsigned(index));
    const typename W::Tokens tokens(walk.features, chunk.b, place);
    const typename W::Gates gates(walk.gates, chunk.b, place);
    const typename W::Rows dy(args.grad_y, chunk.b * args.grad_y_batch_stride, args.grad_y_token_stride, place);
    const typename W::Rows du_rows(args.grad_u, chunk.b * walk.features.tokens * channels, channels, place);
    const Acc inverses = inverse_counts<Acc>(walk, chunk, lane);
    Acc base[kNumbers] = {}, sum[kNumbers] = {};
    if (chunk.number + 1 < walk.chunks)
      load_row<I::Vec, W::kRanges>(static_cast<const Acc*>(args.later) + (index + 1) * channels, place, base);
    else if (args.grad_total)
      load_row<I::Vec, W::kRanges>(static_cast<const Acc*>(args.grad_total) + chunk.b * channels, place, base);
    typename W::Tokens::Raw raw[kUnroll];
    typename W::Rows::Raw raw_dy[kUnroll];
    typename W::Gates::Raw raw_gate[kUnroll];
    auto load = [&](int j, int64_t i) {
      const int64_t token = chunk.end - 1 - i;
      tokens.load(token, raw[j]);
      dy.load(token, raw_dy[j]);
      gates.load(token, raw_gate[j]);
    };
    for_tokens<kUnroll>(int64_t(0), chunk.end - chunk.begin, 1, load, [&](int j, int64_t i) {
      const int64_t token = chunk.end - 1 - i;
      Acc value[kNumbers], d[kNumbers], du[kNumbers];
      gates.value(token, raw_gate[j], value);
      W::Rows::unpack(raw_dy[j], d);
      const Acc scale = __shfl_sync(kAll, inverses, int(token - chunk.begin));
      POM_UNROLL
      for (int n = 0; n < kNumbers; ++n) {
        sum[n] += d[n] * value[n] * scale;
        d[n] = base[n] + sum[n];
      }
      tokens.slope(token, raw[j], d, du, dc);
      du_rows.store(token, du);
    });
  }
  if constexpr (I::Form::has_coeff)
    write_coeff_row<I, kWalkThreads>(
        dc, walk.features, walk.slabs, block.slab,
        static_cast<Acc*>(args.coeff_rows) + block.row * walk.features.degree * walk.features.width);
}

template <class Acc>
struct BackwardPlan : CausalPlan<Acc, CausalBackwardArgs> {
  HeadParts heads;
  WalkBackward args;

  BackwardPlan(const CausalBackwardArgs& given, void* workspace)
      : CausalPlan<Acc, CausalBackwardArgs>(given,
                                            Alignment(given.features.dtype)
                                                .pointers({given.grad_y, given.grad_u, given.grad_gate})
                                                .numbers({given.grad_total})
                                                .sizes({given.grad_y_batch_stride, given.grad_y_token_stride}),
                                            workspace),
        heads(given.gates, this->walk.slabs) {
    const Features& f = given.features;
    const Gates& g = given.gates;
    Arena& arena = this->arena;
    args.walk = this->walk;
    args.grad_y = given.grad_y;
    args.grad_y_batch_stride = given.grad_y_batch_stride;
    args.grad_y_token_stride = given.grad_y_token_stride;
    args.grad_total = given.grad_total;
    args.grad_gate = given.grad_gate;
    args.parts = g.heads > 1 ? arena.take<Acc>(f.batch * f.tokens * heads.count) : nullptr;
    args.parts_shift = heads.shift;
    args.parts_of_token = heads.count;
    args.later = arena.take<Acc>(f.batch * this->walk.chunks * f.channels());
    args.grad_u = given.grad_u;
    args.stride = least(ceil_div(f.batch * this->walk.chunks, kWalkThreads / kWarp),
                        most(1, kCoeffBlocks / this->walk.slabs.count));
    args.coeff_rows = f.form == Form::power ? arena.take<Acc>(args.stride * f.degree * f.width) : nullptr;
  }
};

template <class Acc>
Status run(const CausalBackwardArgs& given, void* workspace, void* stream) {
  const BackwardPlan<Acc> plan(given, workspace);
  const WalkBackward& args = plan.args;
  const Features& f = given.features;
  if (f.batch > 0) {
    if (const Status s = plan.prefix_sums({}, stream); s != Status::ok) return s;
    Status status = plan.with_walker([&](auto instance) {
      return launch(causal_gate_slopes<decltype(instance)>, plan.walk_blocks(), kWalkThreads, 0, stream, args);
    });
    if (status == Status::ok && given.gates.heads > 1)
      status = finish_heads(given.gates, plan.heads, static_cast<const Acc*>(args.parts), given.grad_gate, stream);
    if (status != Status::ok) return status;
    Join<Acc> suffix = {plan.rows, f.batch, f.channels(), static_cast<const Acc*>(args.later)};
    suffix.prior.total = given.grad_total;
    suffix.out.total = args.later;
    suffix.last.total = given.grad_prior;
    if (const Status s = scan(suffix, true, stream); s != Status::ok) return s;
  }
  const Status status = plan.with_walker([&](auto instance) {
    using I = decltype(instance);
    return launch(causal_slopes<I>, args.stride * args.walk.slabs.count, kWalkThreads,
                  kCoeffBytes<I, kWalkThreads>, stream, args);
  });
  if (status != Status::ok || f.form != Form::power) return status;
  return join_coeff(static_cast<const Acc*>(args.coeff_rows), args.stride, f.degree, f.width,
                    static_cast<Acc*>(given.grad_coeff), stream);
}

}  // namespace

size_t workspace(const CausalBackwardArgs& args) { return planned_bytes<BackwardPlan>(args, args.features.dtype); }

Status causal_mix_backward(const CausalBackwardArgs& args, void* workspace, size_t bytes, void* stream) {
  return checked_run(args, args.features.dtype, workspace, bytes,
                     [&](auto acc, void* memory) { return run<decltype(acc)>(args, memory, stream); });
}

}  // namespace pom::cuda
