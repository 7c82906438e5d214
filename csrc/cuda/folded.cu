// The readout with one gate per head, through the projection behind it: the mean features of every head are folded into
// its columns of the weight, once per group, and a query then multiplies as many numbers as there are heads. Two
// kernels, whose products the tensor cores take: 16-bit types.

#include "cuda/block.cuh"
#include "cuda/mma.cuh"
#include "cuda/plan.h"

namespace pom::cuda {
namespace {

constexpr int kRunLength = 8;       // neighbours that a lane loads at once: 16 bytes
constexpr int kRunsAtOnce = 4;      // that a lane has in flight
constexpr int kRowShift = 4;        // queries of a block: 16 rows of a product
constexpr int kHeadsAtOnce = 16;    // inputs of a product
constexpr int kMostHeads = 64;
constexpr int kReadThreads = 128;
constexpr int kParts = kReadThreads / kWarp;
constexpr int64_t kMostFolded = 6 << 10;  // channels, whose means and sums are in the shared memory of a block
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorCores = false;  // for 16-bit types (check_kernel)
#else
constexpr bool kHasTensorCores = true;
#endif

// Head `head` of the 16 that a product takes lies where a lane finds its four inputs (mma.cuh) next to each other.
POM_HD int place_of(int head) { return head % 8 / 2 * 4 + head / 8 * 2 + head % 2; }

struct Folding {
  int64_t rows = 0, channels = 0, width = 0;  // samples times groups; channels of a head
  int heads = 0, padded = 0;                  // padded: heads with zeros behind them, a multiple of 16
  int out_dim = 0;
  StateView state;
  const void* weight = nullptr;  // (out_dim, channels)
  void* folded = nullptr;        // (rows, out_dim, padded)
};

// A block folds the row of its group into 8 outputs, a warp each.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) fold_heads(Folding args) {
  POM_SHARED(memory);
  float* const mean = reinterpret_cast<float*>(memory);
  const int blocks = int(ceil_div(args.out_dim, kThreads / kWarp)), warp = int(threadIdx.x) / kWarp;
  const BlockIndex block(blocks);
  const int out = int(block.slab) * (kThreads / kWarp) + warp, lane = int(threadIdx.x) % kWarp;
  const int64_t row = block.row, from = row * args.channels;
  const int runs = out < args.out_dim ? int(args.channels / kRunLength) : 0;
  const T* const weight = static_cast<const T*>(args.weight) + out * args.channels;
  Packed<T, kRunLength> packed[kRunsAtOnce];
  auto load = [&](int first) {
    POM_UNROLL
    for (int i = 0; i < kRunsAtOnce; ++i)
      if (const int run = first + i * kWarp; run < runs) packed[i].load(weight + int64_t(run) * kRunLength);
  };
  load(lane);  // on their way while the means are made

  const double scale = inverse(args.state.count[row]);
  const float *total = static_cast<const float*>(args.state.total) + from,
              *residual = static_cast<const float*>(args.state.residual) + from;
  POM_UNROLL_4
  for (int c = int(threadIdx.x); c < int(args.channels); c += kThreads)
    mean[c] = scale != 0 ? float((double(total[c]) + double(residual[c])) * scale) : 0.f;  // of infinite sums too
  __syncthreads();

  float* const sums = mean + args.channels + warp * (args.channels / kRunLength);  // of every run
  for (int first = lane; first < runs; first += kRunsAtOnce * kWarp) {
    if (first != lane) load(first);
    POM_UNROLL
    for (int i = 0; i < kRunsAtOnce; ++i) {
      const int run = first + i * kWarp;
      if (run >= runs) break;
      float w[kRunLength], m[kRunLength];
      packed[i].unpack(w);
      load_numbers<kRunLength>(mean + run * kRunLength, m);
      float sum = 0;
      POM_UNROLL
      for (int k = 0; k < kRunLength; ++k) sum += w[k] * m[k];
      sums[run] = sum;
    }
  }
  __syncwarp();
  if (out >= args.out_dim) return;
  const int64_t runs_of_head = args.width / kRunLength;
  T* const to = static_cast<T*>(args.folded) + (row * args.out_dim + out) * args.padded;
  for (int head = lane; head < args.padded; head += kWarp) {
    float sum = 0;
    if (head < args.heads)
      for (int64_t run = head * runs_of_head; run < (head + 1) * runs_of_head; ++run) sum += sums[run];
    Packed<T, 1> number;
    number.pack(&sum);
    number.store(to + head / kHeadsAtOnce * kHeadsAtOnce + place_of(head % kHeadsAtOnce));
  }
}

struct Reading {
  Pieces pieces;  // of the queries, a block each
  unsigned slots = 0;
  int64_t queries = 0;
  int dim = 0, heads = 0, out_dim = 0;
  const void* x = nullptr;
  int64_t x_batch_stride = 0, x_token_stride = 0;
  const void *gate_weight = nullptr, *gate_bias = nullptr, *folded = nullptr, *out_bias = nullptr;
  void* y = nullptr;
};

// Neighbours in memory, or zeros where nothing is.
template <class T>
__device__ inline Words<16> load_run(const T* p, bool there) {
  Words<16> words = {};
  if (there) words = *reinterpret_cast<const Words<16>*>(p);
  return words;
}

// What part `part` of the channels adds to the gates, lanes and numbers as in mma.cuh, for `count` times 8 heads.
//
// Which input is which does not matter to a sum as long as both factors agree: a lane takes eight neighbours of a row.
template <class T, int count>
__device__ void project_gates(const Reading& args, const T* const (&rows)[2], int part, float (&gates)[count][4]) {
  const int lane = int(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const T* const weight = static_cast<const T*>(args.gate_weight) + int64_t(g) * args.dim;
  constexpr int kStep = 4 * kRunLength;
  const int length = int(ceil_div(args.dim, kStep * kParts)) * kStep, begin = part * length;
  const int end = int(least(args.dim, begin + length));
  for (int first = begin; first < end; first += kRunsAtOnce * kStep) {
    // All loads ahead of all products: the bounds of the kernel leave the registers for it (test_cuda_code.py).
    Words<16> low[kRunsAtOnce], high[kRunsAtOnce], w[kRunsAtOnce][count];
    POM_UNROLL
    for (int step = 0; step < kRunsAtOnce; ++step) {
      const int k = first + step * kStep + kRunLength * q;
      const bool inside = k < end;
      low[step] = load_run(rows[0] + k, inside && rows[0]), high[step] = load_run(rows[1] + k, inside && rows[1]);
      POM_UNROLL
      for (int i = 0; i < count; ++i)
        w[step][i] = load_run(weight + int64_t(8 * i) * args.dim + k, inside && 8 * i + g < args.heads);
    }
    POM_UNROLL
    for (int step = 0; step < kRunsAtOnce; ++step) {
      POM_UNROLL
      for (int i = 0; i < count; ++i) {
        POM_UNROLL
        for (int j = 0; j < 4; j += 2)
          multiply_add<T>(gates[i],
                          {low[step].word[j], high[step].word[j], low[step].word[j + 1], high[step].word[j + 1]},
                          w[step][i].word[j], w[step][i].word[j + 1]);
      }
    }
  }
}

// 32 neighbouring outputs of a warp: what its lanes multiply with, and add.
template <class T, int sixteens>
struct Outputs {
  Words<8> inputs[4][sixteens];
  Packed<T, kRunLength> bias;

  // Column g of product j is output 8 (g / 2) + 2 j + g % 2 of 32: a lane's sums are eight neighbours of a row.
  __device__ void load(const Reading& args, const T* folded, int first) {
    const int lane = int(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
    POM_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int out = first + g / 2 * kRunLength + 2 * j + g % 2;
      const T* const row = folded + int64_t(out) * (sixteens * kHeadsAtOnce) + 4 * q;
      POM_UNROLL
      for (int i = 0; i < sixteens; ++i) {
        inputs[j][i] = {};
        if (out < args.out_dim) inputs[j][i] = *reinterpret_cast<const Words<8>*>(row + i * kHeadsAtOnce);
      }
    }
    bias = {};
    if (const int out = first + kRunLength * q; args.out_bias && out < args.out_dim)
      bias.load(static_cast<const T*>(args.out_bias) + out);
  }

  __device__ void multiply(const uint32_t (&values)[sixteens][4], float (&sums)[4][4]) const {
    POM_UNROLL
    for (int j = 0; j < 4; ++j) {
      POM_UNROLL
      for (int i = 0; i < sixteens; ++i)
        multiply_add<T>(sums[j], values[i], inputs[j][i].word[0], inputs[j][i].word[1]);
    }
  }
};

// A block takes 16 queries. Its four warps add up the gates of a quarter of the channels each, and then write a quarter
// of the outputs each. The quarters depend on `dim` and `out_dim` alone, so the bits on nothing else of the call.
template <class Gate, class T, int sixteens>
__global__ void __launch_bounds__(kHasTensorCores ? kReadThreads : kWarp, sixteens == 1 ? 4 : 2)
    read_folded(Reading args) {
  if constexpr (kHasTensorCores) {
    constexpr int kGates = 2 * sixteens, kPadded = sixteens * kHeadsAtOnce;
    POM_SHARED(memory);
    float* const parts = reinterpret_cast<float*>(memory);  // (kParts, kGates * 4, kWarp)
    const unsigned b = blockIdx.x / args.slots;
    const Piece piece = args.pieces.at(blockIdx.x - b * args.slots);
    if (piece.begin >= piece.end) return;
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
    const int64_t query[] = {piece.begin + g, piece.begin + g + 8};
    const bool there[] = {query[0] < piece.end, query[1] < piece.end};

    const T *const x = static_cast<const T*>(args.x) + b * args.x_batch_stride, *rows[2];
    POM_UNROLL
    for (int i = 0; i < 2; ++i) rows[i] = there[i] ? x + query[i] * args.x_token_stride : nullptr;
    float gates[kGates][4] = {};
    if (warp == 0 && args.gate_bias) {
      POM_UNROLL
      for (int i = 0; i < kGates; ++i) {
        POM_UNROLL
        for (int k = 0; k < 2; ++k)
          if (const int head = 8 * i + 2 * q + k; head < args.heads) {
            Packed<T, 1> bias;
            bias.load(static_cast<const T*>(args.gate_bias) + head);
            bias.unpack(&gates[i][k]);
            gates[i][k + 2] = gates[i][k];
          }
      }
    }
    project_gates<T>(args, rows, warp, gates);
    POM_UNROLL
    for (int i = 0; i < kGates * 4; ++i) parts[(warp * kGates * 4 + i) * kWarp + lane] = gates[i / 4][i % 4];

    // A warp's next outputs are on their way while it writes the ones before; the first ones, while it waits here.
    constexpr int kStep = 4 * kRunLength * kParts;
    const int64_t group = int64_t(b) * args.pieces.groups + piece.group;
    const T* const folded = static_cast<const T*>(args.folded) + group * args.out_dim * kPadded;
    Outputs<T, sixteens> outputs;
    outputs.load(args, folded, warp * 4 * kRunLength);
    __syncthreads();

    // The sums of two products are, two neighbours to a word, the inputs of the next one.
    uint32_t values[sixteens][4];
    POM_UNROLL
    for (int i = 0; i < kGates; ++i) {
      POM_UNROLL
      for (int j = 0; j < 4; j += 2) {
        float value[2];
        POM_UNROLL
        for (int k = 0; k < 2; ++k) {
          float of_part[kParts];
          POM_UNROLL
          for (int part = 0; part < kParts; ++part)
            of_part[part] = parts[((part * kGates + i) * 4 + j + k) * kWarp + lane];
          value[k] = Gate::value((of_part[0] + of_part[1]) + (of_part[2] + of_part[3]));
        }
        Packed<T, 2> packed;
        packed.pack(value);
        values[i / 2][i % 2 * 2 + j / 2] = packed.words.word[0];
      }
    }

    T* const y = static_cast<T*>(args.y) + (b * args.queries + query[0]) * args.out_dim;
    for (int first = warp * 4 * kRunLength; first < args.out_dim; first += kStep) {
      float sums[4][4] = {}, bias[kRunLength];
      outputs.multiply(values, sums);
      outputs.bias.unpack(bias);
      outputs.load(args, folded, first + kStep);
      const int out = first + kRunLength * q;
      if (out >= args.out_dim) continue;
      POM_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (!there[i]) continue;
        float numbers[kRunLength];
        POM_UNROLL
        for (int n = 0; n < kRunLength; ++n) numbers[n] = sums[n / 2][2 * i + n % 2] + bias[n];
        Packed<T, kRunLength> packed;
        packed.pack(numbers);
        packed.store(y + int64_t(8 * i) * args.out_dim + out);
      }
    }
  }
}
static_assert(kParts == 4, "the parts of a gate are added by name");

struct FoldedPlan {
  Arena arena;
  Folding fold;
  Reading read;
  int64_t slots;  // of all samples

  FoldedPlan(const FoldedReadoutArgs& args, void* workspace) : arena(workspace) {
    const int padded = int(ceil_div(args.heads, kHeadsAtOnce)) * kHeadsAtOnce;
    fold.rows = args.batch * args.groups;
    fold.channels = args.channels, fold.width = args.channels / most(1, args.heads);
    fold.heads = int(args.heads), fold.padded = padded, fold.out_dim = int(args.out_dim);
    fold.state = args.state;
    fold.weight = args.out_weight;
    fold.folded = arena.take<uint16_t>(fold.rows * args.out_dim * padded);
    read.pieces = Pieces(args.queries, kRowShift, args.groups, args.offsets);
    slots = args.batch * read.pieces.slots();
    read.slots = unsigned(read.pieces.slots());
    read.queries = args.queries;
    read.dim = int(args.dim), read.heads = int(args.heads), read.out_dim = int(args.out_dim);
    read.x = args.x.data, read.x_batch_stride = args.x.batch_stride, read.x_token_stride = args.x.token_stride;
    read.gate_weight = args.gate_weight, read.gate_bias = args.gate_bias;
    read.folded = fold.folded;
    read.out_bias = args.out_bias;
    read.y = args.y;
  }
};

template <class Gate, class T, class Body>
Status with_heads(int64_t heads, Body body) {
  switch (ceil_div(heads, kHeadsAtOnce)) {
    case 1:
      return body(fold_heads<T>, read_folded<Gate, T, 1>);
    case 2:
      return body(fold_heads<T>, read_folded<Gate, T, 2>);
    case 3:
      return body(fold_heads<T>, read_folded<Gate, T, 3>);
    default:
      return body(fold_heads<T>, read_folded<Gate, T, 4>);
  }
}

// body(the kernels)
template <class Body>
Status with_kernels(const FoldedReadoutArgs& args, Body body) {
  auto with_type = [&](auto type) {
    using T = decltype(type);
    return args.form == Form::product ? with_heads<Sigmoid, T>(args.heads, body)
                                      : with_heads<HardSigmoid, T>(args.heads, body);
  };
  return args.dtype == Dtype::bf16 ? with_type(bf16{}) : with_type(f16{});
}

Status check_fused(const FoldedReadoutArgs& args) {
  if (args.x_tangent.data) return Status::no_tangents;
  if (args.rotary.axes || args.x.channel_stride != 1) return Status::bad_size;
  if (args.dtype != Dtype::bf16 && args.dtype != Dtype::f16) return Status::bad_dtype;
  if (args.batch < 0 || args.queries < 1 || args.groups < 1 || args.dim < 1 || args.out_dim < 1) return Status::bad_size;
  if (args.heads < 1 || args.heads > kMostHeads || args.channels % args.heads) return Status::bad_size;
  if (args.channels < 1 || args.channels > kMostFolded || (args.channels / args.heads) % kRunLength) return Status::bad_size;
  if (!args.offsets && args.queries % args.groups) return Status::bad_size;
  const bool aligned = Alignment(args.dtype)
                           .pointers({args.x.data, args.gate_weight, args.out_weight, args.out_bias, args.y})
                           .sizes({args.dim, args.out_dim, args.x.batch_stride, args.x.token_stride})
                           .vec() == 8;
  const FoldedPlan plan(args, nullptr);
  bool fits = true;  // in 32 bits
  for (const int64_t n : {args.queries, args.dim, args.out_dim, plan.slots, plan.fold.rows * args.out_dim})
    fits = fits && n <= kMaxBlocks;
  if (!aligned || !fits) return Status::bad_size;
  const StateView& s = args.state;
  return args.batch && !(args.x.data && args.gate_weight && args.out_weight && args.y && s.total && s.residual && s.count)
             ? Status::null_pointer
             : Status::ok;
}

}  // namespace

bool folds(const FoldedReadoutArgs& args) {
  return check_fused(args) == Status::ok &&
         is_worth_a_try(with_kernels(args, [](auto, auto read) { return check_kernel(read, kReadThreads); }));
}

size_t workspace(const FoldedReadoutArgs& args) {
  const Status s = check_fused(args);
  return s == Status::ok || s == Status::null_pointer ? FoldedPlan(args, nullptr).arena.used() : 0;
}

Status folded_readout(const FoldedReadoutArgs& args, void* workspace, size_t bytes, void* stream) {
  if (const Status s = check_fused(args); s != Status::ok) return s;
  if (!workspace || bytes < cuda::workspace(args)) return Status::workspace_too_small;
  const FoldedPlan plan(args, Arena::align(workspace));
  return with_kernels(args, [&](auto fold, auto read) {
    constexpr int kWarps = kThreads / kWarp;
    if (const Status s = check_kernel(read, kReadThreads); s != Status::ok) return s;
    const size_t shared = plan.fold.channels * (1 + kWarps / kRunLength) * sizeof(float);
    const Status s = launch(fold, plan.fold.rows * ceil_div(args.out_dim, kWarps), kThreads, shared, stream, plan.fold);
    if (s != Status::ok) return s;
    const size_t parts = sizeof(float) * kReadThreads * plan.fold.padded / 2;  // of four, eight numbers for 16 heads
    return launch(read, plan.slots, kReadThreads, parts, stream, plan.read);
  });
}

}  // namespace pom::cuda
