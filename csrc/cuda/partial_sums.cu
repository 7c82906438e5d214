// φ summed over pieces: the first pass of every operation except the mix of short contexts.

#include "cuda/partial_sums.cuh"

namespace pom::cuda {
namespace {

template <class I>
constexpr int kBlocks = has_tangent<typename I::Form> ? 1 : 2;  // minimum resident blocks per SM
// Tokens that a thread loads before it uses the first. With one range these are all it has of a piece of 64 tokens.
template <class I>
constexpr int kLoads = FeatureTokens<I>::kNumbers > 16 || FeatureTokens<I>::kRanges > 3 ? 2
                       : FeatureTokens<I>::kRanges > 1 || has_tangent<typename I::Form> ? 4
                                                                                        : 8;

template <class I>
using RowOf = ChannelTileSum<typename I::Acc, I::Vec, FeatureTokens<I>::kRanges>;

// Each block goes through neighbouring pieces of one channel tile, and loads the first tokens of a piece ahead.
template <class I>
__global__ void __launch_bounds__(kThreads, kBlocks<I>) sum_features_kernel(SumArgs<typename I::Acc> args) {
  using Acc = typename I::Acc;
  using Tokens = FeatureTokens<I>;
  constexpr int kNumbers = Tokens::kNumbers, kUnroll = kLoads<I>;
  POM_SHARED(memory);
  const int rows = kThreads / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const BlockIndex block(args.channel_tiles.count);
  const Features& f = args.features;
  const Pieces& pieces = args.pieces;
  const Place place = args.channel_tiles.place(block.tile, lane);
  const RowOf<I> out(args.channel_tiles, block.tile);
  const unsigned slots = unsigned(pieces.slots()), end = args.partition.first(block.row + 1);

  for (unsigned index = args.partition.first(block.row); index < end;) {
    const unsigned b = index / slots, sample_end = unsigned(min(end, (b + 1) * slots));
    const Tokens tokens(f, b, place);
    typename Tokens::Raw raw[kUnroll];
    auto load = [&](int j, int64_t token) { tokens.load(token, raw[j]); };
    int token, last;  // 32 bits, to save registers
    auto begin = [&](unsigned index) {
      const Piece piece = pieces.at(index - b * slots);
      token = int(piece.begin) + row, last = int(piece.end);
      load_tokens<kUnroll>(token, last, rows, load);
    };
    for (begin(index); index < sample_end; ++index) {
      Acc sum[kNumbers] = {};
      use_tokens<kUnroll>(token, last, rows, load, [&](int j, int64_t token) { tokens.add(token, raw[j], sum); });
      if (index + 1 < sample_end) begin(index + 1);
      out.sum(sum, reinterpret_cast<Acc*>(memory), args.rows + int64_t(index) * f.channels());

      if (!args.weight_rows || block.tile > 0) continue;  // the first channel tile also sums the weights
      const Piece summed = pieces.at(index - b * slots);
      double weights[1] = {0};
      for (int64_t token = summed.begin + threadIdx.x; token < summed.end; token += kThreads)
        weights[0] += double(tokens.weight(token));
      __syncthreads();
      sum_rows(weights, 1, reinterpret_cast<double*>(memory));
      if (threadIdx.x == 0) args.weight_rows[index] = weights[0];
    }
  }
  if (args.arrival_counters)
    reduce_samples(reduce_args(args), args.partition, block, args.channel_tiles.count, out, args.arrival_counters);
}

}  // namespace

template <class Acc>
Status sum_pieces(const SumArgs<Acc>& call, void* stream) {
  const Features& f = call.features;
  if (const Status s = check_partition(f.batch, call.pieces); s != Status::ok) return s;
  return with_instance<Acc>(f, call.channel_tiles, [&](auto instance) {
    using I = decltype(instance);
    SumArgs<Acc> args = call;
    args.partition = partition_work(unsigned(f.batch * args.pieces.slots()), args.channel_tiles.count, kBlocks<I>);
    const size_t shared = max(RowOf<I>::kBytes, sizeof(double) * kThreads / 2);
    return launch(sum_features_kernel<I>, int64_t(args.channel_tiles.count) * args.partition.blocks, kThreads, shared,
                  stream, args);
  });
}

template Status sum_pieces(const SumArgs<float>&, void*);
template Status sum_pieces(const SumArgs<double>&, void*);

}  // namespace pom::cuda
