// The readout with one gate per head, through the projection behind it: the mean features of every head are folded into
// its columns of the weight, once per group, and a query then multiplies as many numbers as there are heads. Two
// kernels, whose products the tensor cores take: 16-bit types.

#include "cuda/block.cuh"
#include "cuda/mma.cuh"
#include "cuda/plan.h"

namespace pom::cuda {
namespace {

constexpr int kRunLength = 8;       // neighbours that a lane loads at once: 16 bytes
constexpr int kRowShift = 4;        // queries of a warp: 16 rows of a product
constexpr int kHeadsAtOnce = 16;    // inputs of a product
constexpr int kMostHeads = 64;
constexpr int kReadThreads = 128;
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
__global__ void __launch_bounds__(kThreads) fold_heads(Folding args) {
  POM_SHARED(memory);
  float* const mean = reinterpret_cast<float*>(memory);
  const int blocks = int(ceil_div(args.out_dim, kThreads / kWarp)), warp = int(threadIdx.x) / kWarp;
  const BlockIndex block(blocks);
  const int64_t row = block.row, first = row * args.channels;
  const double scale = inverse(args.state.count[row]);
  const float *total = static_cast<const float*>(args.state.total), *residual = static_cast<const float*>(args.state.residual);
  for (int64_t c = threadIdx.x; c < args.channels; c += kThreads)
    mean[c] = float((double(total[first + c]) + double(residual[first + c])) * scale);
  __syncthreads();

  const int out = int(block.slab) * (kThreads / kWarp) + warp, lane = int(threadIdx.x) % kWarp;
  const int64_t runs = args.channels / kRunLength, runs_of_head = args.width / kRunLength;
  float* const sums = mean + args.channels + warp * runs;  // of every run
  if (out < args.out_dim) {
    const T* const weight = static_cast<const T*>(args.weight) + out * args.channels;
    for (int64_t run = lane; run < runs; run += kWarp) {
      Packed<T, kRunLength> packed;
      packed.load(weight + run * kRunLength);
      float w[kRunLength], m[kRunLength];
      packed.unpack(w);
      load_numbers<kRunLength>(mean + run * kRunLength, m);
      float sum = 0;
      POM_UNROLL
      for (int i = 0; i < kRunLength; ++i) sum += w[i] * m[i];
      sums[run] = sum;
    }
  }
  __syncwarp();
  if (out >= args.out_dim) return;
  T* const to = static_cast<T*>(args.folded) + (row * args.out_dim + out) * args.padded;
  for (int head = lane; head < args.padded; head += kWarp) {
    float sum = 0;
    if (head < args.heads)
      for (int64_t run = head * runs_of_head; run < (head + 1) * runs_of_head; ++run) sum += sums[run];
    Packed<T, 1> packed;
    packed.pack(&sum);
    packed.store(to + head / kHeadsAtOnce * kHeadsAtOnce + place_of(head % kHeadsAtOnce));
  }
}

struct Reading {
  Pieces pieces;  // of the queries, a warp each
  unsigned slots = 0, all_slots = 0;
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

// The gates of a warp's queries, lanes and numbers as in mma.cuh, for `count` times 8 heads.
//
// Which input is which does not matter to a sum as long as both factors agree: a lane takes eight neighbours of a row.
template <class T, int count>
__device__ void project_gates(const Reading& args, const T* const (&rows)[2], float (&gates)[count][4]) {
  const int lane = int(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const T* const weight = static_cast<const T*>(args.gate_weight) + int64_t(g) * args.dim;
  constexpr int kStep = 4 * kRunLength;
  POM_UNROLL_4
  for (int k = kRunLength * q; k < args.dim + kRunLength * q; k += kStep) {
    const bool inside = k < args.dim;
    const Words<16> low = load_run(rows[0] + k, inside && rows[0]), high = load_run(rows[1] + k, inside && rows[1]);
    POM_UNROLL
    for (int i = 0; i < count; ++i) {
      const Words<16> w = load_run(weight + int64_t(8 * i) * args.dim + k, inside && 8 * i + g < args.heads);
      POM_UNROLL
      for (int j = 0; j < 4; j += 2)
        multiply_add<T>(gates[i], {low.word[j], high.word[j], low.word[j + 1], high.word[j + 1]}, w.word[j],
                        w.word[j + 1]);
    }
  }
}

template <class Gate, class T, int sixteens>
__global__ void __launch_bounds__(kHasTensorCores ? kReadThreads : kWarp) read_folded(Reading args) {
  if constexpr (kHasTensorCores) {
    const unsigned slot = blockIdx.x * (kReadThreads / kWarp) + threadIdx.x / kWarp;
    if (slot >= args.all_slots) return;
    const unsigned b = slot / args.slots;
    const Piece piece = args.pieces.at(slot - b * args.slots);
    const int lane = int(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
    const int64_t query[] = {piece.begin + g, piece.begin + g + 8};
    const bool there[] = {query[0] < piece.end, query[1] < piece.end};
    if (piece.begin >= piece.end) return;

    const T *const x = static_cast<const T*>(args.x) + b * args.x_batch_stride, *rows[2];
    POM_UNROLL
    for (int i = 0; i < 2; ++i) rows[i] = there[i] ? x + query[i] * args.x_token_stride : nullptr;
    float gates[2 * sixteens][4] = {};
    project_gates<T>(args, rows, gates);

    // The sums of two products are, two neighbours to a word, the inputs of the next one.
    uint32_t values[sixteens][4];
    POM_UNROLL
    for (int i = 0; i < 2 * sixteens; ++i) {
      const int head = 8 * i + 2 * q;
      POM_UNROLL
      for (int j = 0; j < 4; j += 2) {
        float value[2];
        POM_UNROLL
        for (int k = 0; k < 2; ++k) {
          Packed<T, 1> bias = {};
          float added = 0;
          if (args.gate_bias && head + k < args.heads) {
            bias.load(static_cast<const T*>(args.gate_bias) + head + k);
            bias.unpack(&added);
          }
          value[k] = Gate::value(gates[i][j + k] + added);
        }
        Packed<T, 2> packed;
        packed.pack(value);
        values[i / 2][i % 2 * 2 + j / 2] = packed.words.word[0];
      }
    }

    const int padded = sixteens * kHeadsAtOnce;
    const int64_t group = int64_t(b) * args.pieces.groups + piece.group;
    const T* const folded = static_cast<const T*>(args.folded) + group * args.out_dim * padded;
    // Column g of product j is output 8 (g / 2) + 2 j + g % 2 of 32: a lane's sums are eight neighbours of a row.
    for (int first = 0; first < args.out_dim; first += 4 * kRunLength) {
      float sums[4][4] = {};
      POM_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int out = first + g / 2 * kRunLength + 2 * j + g % 2;
        POM_UNROLL
        for (int i = 0; i < sixteens; ++i) {
          Words<8> inputs = {};
          if (out < args.out_dim)
            inputs = *reinterpret_cast<const Words<8>*>(folded + int64_t(out) * padded + i * kHeadsAtOnce + 4 * q);
          multiply_add<T>(sums[j], values[i], inputs.word[0], inputs.word[1]);
        }
      }
      const int out = first + kRunLength * q;
      if (out >= args.out_dim) continue;
      float bias[kRunLength] = {};
      if (args.out_bias) {
        Packed<T, kRunLength> packed;
        packed.load(static_cast<const T*>(args.out_bias) + out);
        packed.unpack(bias);
      }
      POM_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (!there[i]) continue;
        float y[kRunLength];
        POM_UNROLL
        for (int n = 0; n < kRunLength; ++n) y[n] = sums[n / 2][2 * i + n % 2] + bias[n];
        Packed<T, kRunLength> packed;
        packed.pack(y);
        packed.store(static_cast<T*>(args.y) + (b * args.queries + query[i]) * args.out_dim + out);
      }
    }
  }
}

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
    read.slots = unsigned(read.pieces.slots()), read.all_slots = unsigned(slots);
    read.queries = args.queries;
    read.dim = int(args.dim), read.heads = int(args.heads), read.out_dim = int(args.out_dim);
    read.x = args.x, read.x_batch_stride = args.x_batch_stride, read.x_token_stride = args.x_token_stride;
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

Status check(const FoldedReadoutArgs& args) {
  if (args.dtype != Dtype::bf16 && args.dtype != Dtype::f16) return Status::bad_dtype;
  if (args.batch < 0 || args.queries < 1 || args.groups < 1 || args.dim < 1 || args.out_dim < 1) return Status::bad_size;
  if (args.heads < 1 || args.heads > kMostHeads || args.channels % args.heads) return Status::bad_size;
  if (args.channels < 1 || args.channels > kMostFolded || (args.channels / args.heads) % kRunLength) return Status::bad_size;
  if (!args.offsets && args.queries % args.groups) return Status::bad_size;
  const bool aligned = Alignment(args.dtype)
                           .pointers({args.x, args.gate_weight, args.out_weight, args.out_bias, args.y})
                           .sizes({args.dim, args.out_dim, args.x_batch_stride, args.x_token_stride});
  const FoldedPlan plan(args, nullptr);
  bool fits = true;  // in 32 bits
  for (const int64_t n : {args.queries, args.dim, args.out_dim, plan.slots, plan.fold.rows * args.out_dim})
    fits = fits && n <= kMaxBlocks;
  if (!aligned || !fits) return Status::bad_size;
  const StateView& s = args.state;
  return args.batch && !(args.x && args.gate_weight && args.out_weight && args.y && s.total && s.residual && s.count)
             ? Status::null_pointer
             : Status::ok;
}

}  // namespace

bool folds(const FoldedReadoutArgs& args) {
  return check(args) == Status::ok &&
         is_worth_a_try(with_kernels(args, [](auto, auto read) { return check_kernel(read, kReadThreads); }));
}

size_t workspace(const FoldedReadoutArgs& args) {
  const Status s = check(args);
  return s == Status::ok || s == Status::null_pointer ? FoldedPlan(args, nullptr).arena.used() : 0;
}

Status folded_readout(const FoldedReadoutArgs& args, void* workspace, size_t bytes, void* stream) {
  if (const Status s = check(args); s != Status::ok) return s;
  if (!workspace || bytes < cuda::workspace(args)) return Status::workspace_too_small;
  const FoldedPlan plan(args, Arena::align(workspace));
  return with_kernels(args, [&](auto fold, auto read) {
    constexpr int kWarps = kThreads / kWarp;
    if (const Status s = check_kernel(read, kReadThreads); s != Status::ok) return s;
    const size_t shared = plan.fold.channels * (1 + kWarps / kRunLength) * sizeof(float);
    const Status s = launch(fold, plan.fold.rows * ceil_div(args.out_dim, kWarps), kThreads, shared, stream, plan.fold);
    if (s != Status::ok) return s;
    return launch(read, ceil_div(plan.slots, kReadThreads / kWarp), kReadThreads, 0, stream, plan.read);
  });
}

}  // namespace pom::cuda
