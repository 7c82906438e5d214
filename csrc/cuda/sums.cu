// φ summed over pieces: the first pass of every operation but the mix of short contexts.

#include "cuda/sums.cuh"

namespace pom::cuda {
namespace {

// Blocks of a multiprocessor at the least: fewer where a thread holds more numbers.
template <class I>
constexpr int kBlocks = 3 - (FeatureTokens<I>::kNumbers > 8 || I::turned) - is_along<typename I::Form>;

template <class I>
__global__ void __launch_bounds__(kThreads, kBlocks<I>) features_of_pieces(SumArgs<typename I::Acc> args) {
  using Acc = typename I::Acc;
  using Tokens = FeatureTokens<I>;
  constexpr int kRanges = Tokens::kRanges, kNumbers = Tokens::kNumbers, kUnroll = kNumbers > 16 ? 2 : 4;
  POM_SHARED(memory);
  const int rows = int(blockDim.x) / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const BlockIndex block(args.slabs.count);
  const Place place = args.slabs.place(block.slab, lane);
  const unsigned slots = unsigned(args.pieces.slots()), b = block.row / slots;
  const Piece piece = args.pieces.at(block.row - b * slots);

  const Features& features = args.features;
  const Tokens tokens(features, b, place);
  Acc sum[kNumbers] = {};
  typename Tokens::Raw raw[kUnroll];
  for_tokens<kUnroll>(
      piece.begin + row, piece.end, rows, [&](int j, int64_t token) { tokens.load(token, raw[j]); },
      [&](int j, int64_t token) { tokens.add(token, raw[j], sum); });
  sum_rows(sum, kLanes, reinterpret_cast<Acc*>(memory));
  if (row == 0) store_row<I::Vec, kRanges>(args.rows + block.row * features.channels(), place, sum);

  if (!args.weight_rows || block.slab > 0) return;  // the first slab also adds up the weights
  double weights[1] = {0};
  for (int64_t token = piece.begin + threadIdx.x; token < piece.end; token += blockDim.x)
    weights[0] += double(tokens.weight(token));
  __syncthreads();
  sum_rows(weights, 1, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) args.weight_rows[block.row] = weights[0];
}

}  // namespace

template <class Acc>
Status sum_pieces(const SumArgs<Acc>& args, bool aligned, void* stream) {
  const Features& f = args.features;
  return with_instance(f, f.rotary.axes > 0, aligned, [&](auto instance) {
    using I = decltype(instance);
    if constexpr (std::is_same_v<typename I::Acc, Acc>) {
      const size_t shared = most(FeatureTokens<I>::kNumbers * sizeof(Acc), sizeof(double)) * kThreads / 2;
      return launch(features_of_pieces<I>, int64_t(args.slabs.count) * f.batch * args.pieces.slots(), kThreads, shared,
                    stream, args);
    }
    return Status::bad_dtype;
  });
}

template Status sum_pieces(const SumArgs<float>&, bool, void*);
template Status sum_pieces(const SumArgs<double>&, bool, void*);

}  // namespace pom::cuda
