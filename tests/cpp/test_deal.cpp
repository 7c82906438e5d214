// Tests widths of vector accesses, partitions of work, sums over channel tiles, and how the last of several blocks
// finds out in memory that nobody has cleared.

#include "cuda_on_cpu.h"

#include <vector>

#include "check.h"
#include "cuda/channel_tile_sum.cuh"
#include "cuda/last_block.cuh"
#include "cuda/work_partition.h"

using check::expect;
using check::section;
using namespace pom::cuda;

// `multiple`: what one pointer (bytes) or size (elements) is a multiple of; all others allow more.
void test_alignment(pom::Dtype dtype, int64_t multiple, int of_pointers, int of_numbers, int of_sizes) {
  const void* const at = reinterpret_cast<const void*>(uintptr_t(48 + multiple));
  const Alignment wide = Alignment(dtype).pointers({nullptr}).numbers({nullptr}).sizes({0, -64, 48});
  auto check = [&](const char* what, Alignment alignment, int wanted) {
    const int found = alignment.vec(), combined = Alignment(wide).with(alignment).vec();
    expect(found == wanted && combined == wanted && alignment.with(wide).vec() == wanted,
           "dtype %d, %s of %d: %d elements, %d with others, not %d", int(dtype), what, int(multiple), found, combined,
           wanted);
  };
  check("pointers", Alignment(wide).pointers({nullptr, at}), of_pointers);
  check("numbers", Alignment(wide).numbers({at, nullptr}), of_numbers);
  check("sizes", Alignment(wide).sizes({48 + multiple, 48}), of_sizes);
  check("sizes below zero", Alignment(wide).sizes({-48 - multiple}), of_sizes);
}

void test_deal(const WorkPartition& d) {
  expect(d.first(0) == 0 && d.first(d.blocks) == d.pieces, "%u pieces, %u blocks: not all dealt", d.pieces, d.blocks);
  for (unsigned block = 0; block < d.blocks; ++block) {
    const unsigned begin = d.first(block), end = d.first(block + 1), least = d.pieces / d.blocks;
    expect(end - begin == least || end - begin == least + 1, "%u pieces, %u blocks: block %u has %u", d.pieces,
           d.blocks, block, end - begin);
    for (unsigned piece : {begin, (begin + end) / 2, end - 1})
      expect(begin == end || d.block_of(piece) == block, "%u pieces, %u blocks: piece %u is of block %u, not of %u",
             d.pieces, d.blocks, piece, block, d.block_of(piece));
  }
}

// Blocks of a grid share arrival counters, `sharing` blocks each; `lasts` counts, for each counter, the blocks that were
// the last.
void count_lasts(ArrivalCounter* arrival_counters, unsigned sharing, int* lasts, int* done) {
  const unsigned arrival_counter = blockIdx.x % 5;
  if (threadIdx.x == 0) {
    atomicAdd(done + arrival_counter, 1);
    __threadfence();
    if (is_last(arrival_counters + arrival_counter, sharing)) {
      atomicAdd(lasts + arrival_counter, 1);
      expect(done[arrival_counter] == int(sharing), "the last block of arrival_counter %u came before %d others",
             arrival_counter, int(sharing) - done[arrival_counter]);
    }
  }
}

void test_arrival_counters(ArrivalCounter before) {
  constexpr unsigned kSharing = 41;
  std::vector<ArrivalCounter> arrival_counters(5, before);
  for (int round = 0; round < 3; ++round) {  // reuses the counters as the last block left them
    int lasts[5] = {}, done[5] = {};
    cuda_on_cpu::launch(5 * kSharing, 64, 0, [&] { count_lasts(arrival_counters.data(), kSharing, lasts, done); });
    for (int i = 0; i < 5; ++i) expect(lasts[i] == 1, "%d blocks were the last of arrival_counter %d", lasts[i], i);
  }
  for (ArrivalCounter left : arrival_counters)
    expect(left >> kCounterBits != kInUse >> kCounterBits, "an arrival counter was left in use");
}

// Sums every thread's numbers over the rows, each column once, in the order of sum_rows().
template <int Vec, int ranges, class Acc>
void test_channel_tile_sum(int64_t width) {
  using Row = ChannelTileSum<Acc, Vec, ranges>;
  const ChannelTiles channel_tiles(width, ranges, {}, Vec, kLanes);
  const int64_t columns = width * ranges;
  std::vector<Acc> found(columns, Acc(-1)), expected(columns, Acc(0));
  auto number = [](int row, int64_t column) { return Acc(1) / Acc(3 + row * 7 + column % 11); };
  cuda_on_cpu::launch(unsigned(channel_tiles.count), kThreads, Row::kBytes, [&] {
    char* const shared = cuda_on_cpu::here.shared;
    const int row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
    const Place place = channel_tiles.place(blockIdx.x, lane);
    Acc x[Row::kNumbers] = {};
    for (int r = 0; r < place.ranges; ++r)
      for (int i = 0; i < Vec; ++i) x[r * Vec + i] = number(row, place.channel + r * place.stride + i);
    const Row sums(channel_tiles, blockIdx.x);
    for (int round = 0; round < 2; ++round) sums.sum(x, reinterpret_cast<Acc*>(shared), found.data());
  });
  for (int64_t column = 0; column < columns; ++column) {
    Acc of_row[Row::kRows];
    for (int row = 0; row < Row::kRows; ++row) of_row[row] = number(row, column);
    for (int half = Row::kRows / 2; half > 0; half /= 2)
      for (int row = 0; row < half; ++row) of_row[row] += of_row[row + half];
    expected[column] = of_row[0];
    expect(found[column] == expected[column], "width %d, column %d: %.9g, not %.9g", int(width), int(column),
           double(found[column]), double(expected[column]));
  }
}

int main() {
  section("elements at a time");
  for (pom::Dtype dtype : {pom::Dtype::bf16, pom::Dtype::f16}) {
    test_alignment(dtype, 16, 8, 8, 8);
    test_alignment(dtype, 8, 4, 1, 8);
    test_alignment(dtype, 4, 1, 1, 4);
    test_alignment(dtype, 2, 1, 1, 1);
    test_alignment(dtype, 1, 1, 1, 1);
  }
  test_alignment(pom::Dtype::f32, 16, 4, 4, 4);
  test_alignment(pom::Dtype::f32, 8, 1, 1, 4);
  test_alignment(pom::Dtype::f32, 4, 1, 1, 4);
  test_alignment(pom::Dtype::f32, 2, 1, 1, 1);
  test_alignment(pom::Dtype::f64, 16, 1, 1, 1);
  section("pieces dealt to blocks");
  for (unsigned pieces : {1u, 2u, 7u, 64u, 255u, 256u, 100'003u, 2'147'483'000u})
    for (unsigned blocks : {1u, 2u, 33u, 49u, 264u, 65'535u})
      if (blocks <= pieces) test_deal({pieces, blocks});
  section("as many blocks as there is room for");
  for (unsigned pieces : {1u, 5u, 256u, 1u << 30})
    for (int channel_tiles : {1, 2, 8, 9, 100, 5000}) {
      const WorkPartition d = partition_work(pieces, channel_tiles, 2);
      const bool fits = d.pieces == pieces && d.blocks >= 1 && d.blocks <= pieces && d.blocks <= kMaxSharingBlocks;
      expect(fits, "%u blocks", d.blocks);
      const int64_t all = int64_t(d.blocks) * channel_tiles, room = 2 * 3;  // the stand-in's SMs
      expect(all <= 4 * room || d.blocks == 1, "%u blocks for each of %d channel tiles", d.blocks, channel_tiles);
    }
  section("the last block");
  const ArrivalCounter next = kInUse + (ArrivalCounter(1) << kCounterBits);
  for (ArrivalCounter before :
       {ArrivalCounter(0), ~ArrivalCounter(0), ArrivalCounter(40), ArrivalCounter(1) << 63, kInUse >> 1, next})
    for (uint64_t seed : {0, 1, 2}) {
      cuda_on_cpu::set_seed(seed);
      test_arrival_counters(before);
    }
  section("sums over the rows of a block");
  test_channel_tile_sum<8, 1, float>(2048);
  test_channel_tile_sum<8, 2, float>(264);
  test_channel_tile_sum<4, 1, float>(100);
  test_channel_tile_sum<4, 4, float>(132);
  test_channel_tile_sum<1, 3, float>(37);
  test_channel_tile_sum<1, 16, double>(33);
  return check::finish();
}
