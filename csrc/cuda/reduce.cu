// Second passes: reductions and scans of partial sums, in double.

#include "cuda/reduce.cuh"

namespace pom::cuda {
namespace {

constexpr int kReduceThreads = 64, kScanWarps = 16;
constexpr int kAhead = 16;  // rows that a thread loads before it adds the first

// The sum over rows first, first + step, … last, added four at a time, with kAhead loads in flight.
template <class Number>
__device__ double strided_sum(const Number* rows, int64_t stride, int64_t first, int64_t last, int64_t step) {
  double sum = 0;
  int64_t row = first;
  for (; row + (kAhead - 1) * step <= last; row += kAhead * step) {
    Number x[kAhead];
    POM_UNROLL for (int i = 0; i < kAhead; ++i)
      x[i] = rows[(row + i * step) * stride];
    POM_UNROLL for (int i = 0; i < kAhead; i += 4)
      sum += double(x[i]) + double(x[i + 1]) + (double(x[i + 2]) + double(x[i + 3]));
  }
  for (; row + 3 * step <= last; row += 4 * step) {
    const Number a = rows[row * stride], b = rows[(row + step) * stride], c = rows[(row + 2 * step) * stride],
                 d = rows[(row + 3 * step) * stride];
    sum += double(a) + double(b) + (double(c) + double(d));
  }
  for (; row <= last; row += step) sum += double(rows[row * stride]);
  return sum;
}

// One channel per thread. The last tile reduces the count.
template <class Acc>
__global__ void __launch_bounds__(kReduceThreads) reduce_groups_kernel(ReduceArgs<Acc> args, int tiles) {
  const BlockIndex block(tiles + 1);
  const unsigned groups = unsigned(args.pieces.groups), b = block.row / groups, group = block.row % groups;
  const int64_t channel = int64_t(block.tile) * kReduceThreads + threadIdx.x;
  if (int(block.tile) < tiles) {
    if (channel < args.channels) reduce_channel(args, b, group, channel);
  } else if (args.out.count && threadIdx.x == 0) {
    reduce_count(args, b, group);
  }
}

// The end of a scan in which every group is one row: writes steps begin … end-1 of one channel, in the order of the
// scan; `sum` is the sum before them. Rows are loaded before sums may overwrite them.
template <class Acc>
__device__ void scan_rows(const ReduceArgs<Acc>& args, int64_t b, int64_t channel, int64_t begin, int64_t end,
                          bool backwards, double sum, double remainder) {
  const int64_t groups = args.pieces.groups, step = backwards ? -args.channels : args.channels;
  int64_t at = (b * groups + (backwards ? groups - 1 - begin : begin)) * args.channels + channel;
  for (int64_t i = begin; i < end; i += kAhead, at += kAhead * step) {
    const int count = int(min(kAhead, end - i));
    Acc x[kAhead];
    POM_UNROLL for (int j = 0; j < kAhead; ++j)
      if (j < count) x[j] = args.rows[at + j * step];
    POM_UNROLL for (int j = 0; j < kAhead; ++j) {
      if (j >= count) break;
      sum += double(x[j]);
      write_state<Acc>(args.out, at + j * step, sum, remainder);
    }
  }
}

// Every warp sums a run of groups, adds what lies before it, and goes through its run again.
template <class Acc>
__global__ void __launch_bounds__(kScanWarps* kWarp)
    scan_groups_kernel(ReduceArgs<Acc> args, int tiles, bool backwards) {
  POM_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const Pieces& pieces = args.pieces;
  const BlockIndex block(tiles + 1);
  const int64_t tile = block.tile, b = block.row, groups = pieces.groups;
  const int64_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, channel = tile * kWarp + lane;
  const bool counts = tile == tiles, mine = counts ? lane == 0 && args.out.count : channel < args.channels;

  const Acc* rows = args.rows + b * pieces.slots() * args.channels + channel;
  const double* weights = args.weights ? args.weights + b * pieces.slots() : nullptr;
  auto sum_of = [&](int64_t first_group, int64_t last_group) {
    if (counts && !weights) return double(pieces.border(last_group + 1) - pieces.border(first_group));
    const int64_t first = pieces.first_slot(first_group), last = pieces.last_slot(last_group);
    return counts ? strided_sum(weights, 1, first, last, 1) : strided_sum(rows, args.channels, first, last, 1);
  };

  // In the order of the scan: groups begin … end-1 of this warp.
  const int64_t begin = groups * warp / kScanWarps, end = groups * (warp + 1) / kScanWarps;
  double sum = 0, remainder = 0;
  if (mine && begin < end) sum = backwards ? sum_of(groups - end, groups - 1 - begin) : sum_of(begin, end - 1);
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (!mine) return;
  sum = 0;
  for (int before = 0; before < warp; ++before) sum += shared[before * kWarp + lane];
  if (counts)
    sum += args.prior.count ? args.prior.count[b] : 0.0;
  else
    remainder = add_prior<Acc>(args.prior, b * args.channels + channel, sum);
  if (!counts && pieces.apart && pieces.chunks == 1)
    return scan_rows(args, b, channel, begin, end, backwards, sum, remainder);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = backwards ? groups - 1 - i : i;
    sum += sum_of(group, group);
    if (counts)
      args.out.count[b * groups + group] = sum;
    else
      write_state<Acc>(args.out, (b * groups + group) * args.channels + channel, sum, remainder);
  }
}

template <class Acc>
__global__ void __launch_bounds__(kScanWarps* kWarp)
    reduce_coeff_kernel(const Acc* rows, int64_t count, int64_t degree, int64_t width, Acc* out) {
  POM_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double sum = 0;
  if (column < degree * width) sum = strided_sum(rows + column, degree * width, warp, count - 1, kScanWarps);
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || column >= degree * width) return;
  for (int other = 1; other < kScanWarps; ++other) sum += shared[other * kWarp + threadIdx.x];
  out[column % width * degree + column / width] = Acc(sum);
}

}  // namespace

template <class Acc>
Status reduce_groups(const ReduceArgs<Acc>& args, void* stream) {
  const int tiles = int(ceil_div(args.channels, kReduceThreads));
  return launch(reduce_groups_kernel<Acc>, int64_t(tiles + 1) * args.pieces.groups * args.batch, kReduceThreads, 0,
                stream, args, tiles);
}

template <class Acc>
Status scan_groups(const ReduceArgs<Acc>& args, bool backwards, void* stream) {
  const int tiles = int(ceil_div(args.channels, kWarp));
  if (args.pieces.groups == 0) return Status::ok;
  return launch(scan_groups_kernel<Acc>, int64_t(tiles + 1) * args.batch, kScanWarps * kWarp,
                kScanWarps * kWarp * sizeof(double), stream, args, tiles, backwards);
}

template <class Acc>
Status reduce_coeff(const Acc* rows, int64_t count, const Features& f, void* grad_coeff, void* stream) {
  return launch(reduce_coeff_kernel<Acc>, ceil_div(f.degree * f.width, kWarp), kScanWarps * kWarp,
                kScanWarps * kWarp * sizeof(double), stream, rows, count, f.degree, f.width,
                static_cast<Acc*>(grad_coeff));
}

template Status reduce_groups(const ReduceArgs<float>&, void*);
template Status reduce_groups(const ReduceArgs<double>&, void*);
template Status scan_groups(const ReduceArgs<float>&, bool, void*);
template Status scan_groups(const ReduceArgs<double>&, bool, void*);
template Status reduce_coeff(const float*, int64_t, const Features&, void*, void*);
template Status reduce_coeff(const double*, int64_t, const Features&, void*, void*);

}  // namespace pom::cuda
