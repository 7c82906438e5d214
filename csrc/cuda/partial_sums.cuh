// First passes over projected tokens, shared by the operations: φ summed over each piece, and the gradient of the
// coefficients summed over the tokens of a block.
#pragma once

#include "cuda/channel_tile_sum.cuh"
#include "cuda/reduce.cuh"
#include "cuda/tokens.cuh"

namespace pom::cuda {

// Blocks of a launch that sums gradients of coefficients. Few, since each writes a row that a second pass adds; and the
// same number on every GPU, since it determines which tokens a row sums. Whole waves of 132 SMs.
constexpr int64_t kCoeffBlocks = 1056;

inline WorkPartition partition_coeff_work(int64_t pieces, const ChannelTiles& channel_tiles) {
  return {unsigned(pieces), unsigned(min(pieces, max(1, kCoeffBlocks / channel_tiles.count)))};
}

inline Alignment alignment_of(const Features& f) {
  return Alignment(f.dtype)
      .pointers({f.u, f.u_tangent})
      .numbers({f.coeff, f.coeff_tangent, f.rotary.cos, f.rotary.sin})
      .sizes({f.width, f.u_batch_stride, f.u_token_stride, f.rotary.half})
      .sizes({f.u_tangent_batch_stride, f.u_tangent_token_stride});
}

// `rotary`: of the features, or of the gates beside them. `vec`: elements per access that the alignment allows.
inline ChannelTiles make_channel_tiles(const Features& f, const Rotary& rotary, int vec, int lanes = kLanes) {
  const bool general = f.u_tangent ? is_general_with_tangent(f.dtype, f.degree) : f.degree < 2 || f.degree > 4;
  const int widest = general ? 1 : rotary.axes || f.u_tangent ? 4 : 8;
  return {f.width, f.form == Form::product ? f.degree : 1, rotary, int(min(vec, widest)), lanes};
}

// The gradients of one power's coefficients, without indexing registers at run time.
template <class I>
__device__ void select_power(const typename I::Acc (&dc)[FeatureTokens<I>::kRanges][I::Vec][FeatureTokens<I>::kCoeffs],
                             int power, typename I::Acc (&of_power)[FeatureTokens<I>::kNumbers]) {
  POM_UNROLL for (int r = 0; r < FeatureTokens<I>::kRanges; ++r) {
    POM_UNROLL for (int i = 0; i < I::Vec; ++i) {
      of_power[r * I::Vec + i] = typename I::Acc(0);
      POM_UNROLL for (int j = 0; j < FeatureTokens<I>::kCoeffs; ++j)
        if (j == power) of_power[r * I::Vec + i] = dc[r][i][j];
    }
  }
}

// Sums over the rows of the block and writes (degree, width).
template <class I>
__device__ void write_coeff_row(
    const typename I::Acc (&dc)[FeatureTokens<I>::kRanges][I::Vec][FeatureTokens<I>::kCoeffs], const Features& f,
    const ChannelTiles& channel_tiles, unsigned channel_tile, typename I::Acc* out) {
  using Acc = typename I::Acc;
  constexpr int kRanges = FeatureTokens<I>::kRanges, Vec = I::Vec;
  POM_SHARED(memory);
  const ChannelTileSum<Acc, Vec, kRanges> row(channel_tiles, channel_tile);
  for (int k = 0; k < f.degree; ++k) {
    Acc of_power[kRanges * Vec];
    select_power<I>(dc, k, of_power);
    row.sum(of_power, reinterpret_cast<Acc*>(memory), out + k * f.width);
  }
}
template <class I>
constexpr size_t kCoeffBytes =
    I::Form::has_coeff ? ChannelTileSum<typename I::Acc, I::Vec, FeatureTokens<I>::kRanges>::kBytes : 0;

// Arguments of the kernel that sums φ over pieces and, if a sample is one group, the pieces of each sample.
template <class Acc>
struct SumArgs {
  Features features;
  ChannelTiles channel_tiles;
  Pieces pieces;
  WorkPartition partition;                     // set by the launch
  Acc* rows = nullptr;                         // (batch, slots, C)
  double* weight_rows = nullptr;               // (batch, slots)
  ArrivalCounter* arrival_counters = nullptr;  // (batch, channel tiles); null if samples are not reduced
  StateView prior;                             // added to the reduced sums
  StateOut out;
};

// The second pass over the rows.
template <class Acc>
POM_HD ReduceArgs<Acc> reduce_args(const SumArgs<Acc>& args) {
  const Features& f = args.features;
  return {args.pieces, f.batch, f.channels(), args.rows, args.weight_rows, args.prior, nullptr, args.out};
}

template <class Acc>
Status sum_pieces(const SumArgs<Acc>& args, void* stream);

// φ summed over each piece, into rows of the workspace, and over each sample if `reduce`.
template <class Acc>
class PieceSums {
 public:
  Acc* rows;            // (batch, slots, C)
  double* weight_rows;  // (batch, slots); null without weights

  PieceSums(const Features& f, const Pieces& pieces, bool reduce, Arena& arena)
      : rows(arena.take<Acc>(f.batch * pieces.slots() * f.channels())),
        weight_rows(f.weight ? arena.take<double>(f.batch * pieces.slots()) : nullptr),
        args_{f, make_channel_tiles(f, f.rotary, alignment_of(f).vec()), pieces, {}, rows, weight_rows} {
    if (reduce) args_.arrival_counters = arena.take<ArrivalCounter>(f.batch * args_.channel_tiles.count);
  }

  // `prior` and `out` are used only if samples are reduced.
  Status launch(void* stream, const StateView& prior = {}, const StateOut& out = {}) const {
    SumArgs<Acc> args = args_;
    args.prior = prior, args.out = out;
    return sum_pieces(args, stream);
  }

 private:
  SumArgs<Acc> args_;
};

}  // namespace pom::cuda
