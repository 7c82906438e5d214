// State with a dense mask: φ of every token, then the product of mask and φ in tiles of 64 by 64 numbers.

#include "cuda/mask.cuh"

namespace pom::cuda {
namespace {

constexpr int kDepth = 16;              // of a tile in shared memory
constexpr int kSide = 4;                // a thread sums 4 by 4 numbers
constexpr int kStride = kMaskTile + 4;  // of a tile's rows: whole 16 bytes, few bank conflicts

template <class I>
constexpr int kFeatureBlocks = (I::rotated && has_tangent<typename I::Form>) || sizeof(typename I::T) == 8 ? 1 : 2;

// phi: (batch, tokens, C)
template <class I>
__global__ void __launch_bounds__(kThreads, kFeatureBlocks<I>)
    features_kernel(Features f, ChannelTiles channel_tiles, Pieces pieces, typename I::Acc* phi) {
  using Acc = typename I::Acc;
  using Tokens = FeatureTokens<I>;
  constexpr int kRanges = Tokens::kRanges, kNumbers = Tokens::kNumbers, kUnroll = kNumbers > 16 ? 1 : 2;
  const int rows = int(blockDim.x) / kLanes, row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const BlockIndex block(channel_tiles.count);
  const Place place = channel_tiles.place(block.tile, lane);
  const unsigned slots = unsigned(pieces.slots()), b = block.row / slots;
  const Piece piece = pieces.at(block.row - b * slots);
  const Tokens tokens(f, b, place);
  Acc* const rows_of_phi = phi + b * f.tokens * f.channels();
  typename Tokens::Raw raw[kUnroll];
  for_tokens<kUnroll>(
      piece.begin + row, piece.end, rows, [&](int j, int64_t token) { tokens.load(token, raw[j]); },
      [&](int j, int64_t token) {
        Acc value[kNumbers];
        tokens.value(token, raw[j], value);
        store_row<I::Vec, kRanges>(rows_of_phi + token * f.channels(), place, value);
      });
}

// Loads four neighbours of a row of `width` numbers from column `at` on; zeros outside.
template <class Acc>
__device__ inline void load_four(const Acc* row, int64_t at, int64_t width, bool valid, bool aligned, Acc (&x)[4]) {
  POM_UNROLL for (int i = 0; i < 4; ++i)
    x[i] = Acc(0);
  if (!valid) return;
  if (aligned) {
    if (at < width) load_numbers<4>(row + at, x);
    return;
  }
  POM_UNROLL for (int i = 0; i < 4; ++i)
    if (at + i < width) x[i] = row[at + i];
}

// A block computes 64 rows by 64 channels of the product over one cut of the depth. It adds in the order of the depth:
// 64 products each in Acc, these sums in double.
template <class Acc, bool transposed>
__global__ void __launch_bounds__(kThreads, sizeof(Acc) == 8 ? 1 : 2) masked_matmul_kernel(MaskProduct<Acc> args) {
  POM_SHARED(memory);
  Acc(*const of_mask)[kDepth][kStride] = reinterpret_cast<Acc(*)[kDepth][kStride]>(memory);  // double-buffered
  Acc(*const of_x)[kDepth][kStride] = of_mask + 2;
  const BlockIndex block(args.channel_tiles);
  const unsigned cut = block.row % unsigned(args.cuts), above = block.row / unsigned(args.cuts);
  const unsigned b = above / unsigned(args.row_tiles);
  const int64_t first_row = int64_t(above - b * unsigned(args.row_tiles)) * kMaskTile;
  const int64_t first_channel = int64_t(block.tile) * kMaskTile;
  const int64_t begin = cut * args.length, end = min(args.depth, begin + args.length);
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int at_row = (warp / 2 * 4 + lane / 8) * kSide, at_channel = (warp % 2 * 8 + lane % 8) * kSide;
  const int sixteenth = thread / 16, four = thread % 16 * 4, quarter = thread / 4, of_quarter = thread % 4 * 4;
  const Acc* const mask = args.mask + b * args.rows * args.depth;
  const Acc* const x = args.x + b * args.depth * args.channels;

  Acc next_mask[4], next_x[4];
  auto load = [&](int64_t at) {
    const int64_t k = at + sixteenth;
    load_four(x + k * args.channels, first_channel + four, args.channels, k < end, args.aligned, next_x);
    if constexpr (transposed)
      load_four(mask + k * args.rows, first_row + four, args.rows, k < end, args.aligned, next_mask);
    else
      load_four(mask + (first_row + quarter) * args.depth, at + of_quarter, end, first_row + quarter < args.rows,
                args.aligned, next_mask);
  };
  auto store = [&](int buffer) {
    store_numbers<4>(&of_x[buffer][sixteenth][four], next_x);
    if constexpr (transposed) {
      store_numbers<4>(&of_mask[buffer][sixteenth][four], next_mask);
    } else {
      POM_UNROLL for (int i = 0; i < 4; ++i)
        of_mask[buffer][of_quarter + i][quarter] = next_mask[i];
    }
  };

  // The blocks of the first channels also sum the weights of their rows, one row per thread.
  const bool counts = !transposed && block.tile == 0 && thread < kMaskTile;
  double totals[kSide][kSide] = {}, count = 0;
  Acc sums[kSide][kSide] = {};
  if (begin < end) {
    load(begin);
    store(0);
  }
  __syncthreads();
  int buffer = 0;
  for (int64_t at = begin; at < end; at += kDepth, buffer ^= 1) {
    const bool more = at + kDepth < end;
    if (more) load(at + kDepth);
    POM_UNROLL for (int k = 0; k < kDepth; ++k) {
      Acc w[kSide], phi[kSide];
      load_numbers<kSide>(&of_mask[buffer][k][at_row], w);
      load_numbers<kSide>(&of_x[buffer][k][at_channel], phi);
      POM_UNROLL for (int i = 0; i < kSide; ++i) {
        POM_UNROLL for (int j = 0; j < kSide; ++j)
          sums[i][j] += w[i] * phi[j];
      }
    }
    if (counts) {
      for (int k = 0; k < kDepth; ++k) count += double(of_mask[buffer][k][thread]);
    }
    if (more) store(buffer ^ 1);
    __syncthreads();
    if (more && (at + kDepth - begin) % kMaskChunk) continue;
    POM_UNROLL for (int i = 0; i < kSide; ++i) {
      POM_UNROLL for (int j = 0; j < kSide; ++j)
        totals[i][j] += double(sums[i][j]), sums[i][j] = Acc(0);
    }
  }

  if (const int64_t row = first_row + thread; counts && row < args.rows) {
    const int64_t of_batch = b * args.rows + row;
    if (args.partial_weights)
      args.partial_weights[of_batch * args.cuts + cut] = count;
    else if (args.out.count)
      args.out.count[of_batch] = count + (args.prior.count ? args.prior.count[b] : 0.0);
  }
  POM_UNROLL for (int i = 0; i < kSide; ++i) {
    const int64_t row = first_row + at_row + i, channel = first_channel + at_channel;
    if (row >= args.rows) break;
    Acc total[kSide], residual[kSide];
    if (args.partial) {
      POM_UNROLL for (int j = 0; j < kSide; ++j)
        total[j] = Acc(totals[i][j]);
    } else {
      POM_UNROLL for (int j = 0; j < kSide; ++j) {
        double sum = totals[i][j], remainder = 0;
        if (channel + j < args.channels) remainder = add_prior<Acc>(args.prior, b * args.channels + channel + j, sum);
        split(sum, remainder, total[j], residual[j]);
      }
    }
    const int64_t of_batch = b * args.rows + row;
    auto write = [&](Acc* to, const Acc* numbers) {
      if (args.aligned) {
        if (channel < args.channels) store_numbers<kSide>(to + channel, numbers);
        return;
      }
      POM_UNROLL for (int j = 0; j < kSide; ++j)
        if (channel + j < args.channels) to[channel + j] = numbers[j];
    };
    if (args.partial) {
      write(args.partial + (of_batch * args.cuts + cut) * args.channels, total);
      continue;
    }
    write(static_cast<Acc*>(args.out.total) + of_batch * args.channels, total);
    if (args.out.residual) write(static_cast<Acc*>(args.out.residual) + of_batch * args.channels, residual);
  }
}

}  // namespace

template <class Acc>
Status MaskProduct<Acc>::launch(void* stream) const {
  MaskProduct args = *this;
  args.aligned = Alignment(sizeof(Acc) == 4 ? Dtype::f32 : Dtype::f64)
                     .numbers({mask, x, out.total, out.residual})
                     .sizes({transposed ? rows : depth, channels})
                     .vec() > 1;
  const int64_t blocks = batch * row_tiles * channel_tiles * cuts;
  const size_t shared = sizeof(Acc) * 4 * kDepth * kStride;
  const auto kernel = transposed ? masked_matmul_kernel<Acc, true> : masked_matmul_kernel<Acc, false>;
  const Status s = cuda::launch(kernel, blocks, kThreads, shared, stream, args);
  if (s != Status::ok || cuts == 1) return s;
  return reduce_groups(
      ReduceArgs<Acc>{Pieces::rows(rows, cuts), batch, channels, partial, partial_weights, prior, nullptr, out},
      stream);
}

template <class Acc>
Status MaskedStatePlan<Acc>::run(void* stream) const {
  const Features& f = args.features;
  if (f.batch * args.groups.count == 0) return Status::ok;
  const ChannelTiles channel_tiles = make_channel_tiles(f, f.rotary, alignment_of(f).vec());
  if (f.tokens) {
    const Pieces pieces(f.tokens, 6, 1, nullptr);
    const Status s = with_instance<Acc>(f, channel_tiles, [&](auto instance) {
      return cuda::launch(features_kernel<decltype(instance)>, channel_tiles.count * f.batch * pieces.slots(), kThreads,
                          0, stream, f, channel_tiles, pieces, phi);
    });
    if (s != Status::ok) return s;
  }
  return product.launch(stream);
}

template struct MaskProduct<float>;
template struct MaskProduct<double>;
template struct MaskedStatePlan<float>;
template struct MaskedStatePlan<double>;

}  // namespace pom::cuda
