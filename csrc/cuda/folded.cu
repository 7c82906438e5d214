// Readout with one gate per head, fused with the gate projection before it and the output projection after it. The mean
// features of every head are folded into its columns of the output weight, once per group; a query then multiplies only
// as many numbers as there are heads. Two kernels, on tensor cores: 16-bit types.

#include "cuda/block.cuh"
#include "cuda/mma.cuh"
#include "cuda/plan.h"

namespace pom::cuda {
namespace {

constexpr int kRunLength = 8;         // elements of one load: 16 bytes
constexpr int kRunsInFlight = 4;      // loads that a lane has in flight
constexpr int kRowShift = 4;          // log2 of the queries of a block: 16 rows of a product
constexpr int kHeadsPerProduct = 16;  // inputs of one product
constexpr int kMaxFoldedHeads = 64;
constexpr int kReadThreads = 128;
constexpr int kParts = kReadThreads / kWarp;
constexpr int64_t kMaxFoldedChannels = 6 << 10;  // their means and sums must fit in the shared memory of a block
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorCores = false;  // for 16-bit types; see check_kernel()
#else
constexpr bool kHasTensorCores = true;
#endif

// Where head `head` of the 16 of a product is stored, so that the four inputs of a lane (mma.cuh) are neighbours.
POM_HD int place_of(int head) { return head % 8 / 2 * 4 + head / 8 * 2 + head % 2; }

// Arguments of both kernels.
struct FoldedKernelArgs {
  FoldedReadoutArgs call;
  Pieces pieces;             // of the queries, one per block of the second kernel
  unsigned slots = 0;        // of one sample
  int padded = 0;            // heads rounded up to a multiple of 16, with zeros
  int64_t runs_of_head = 0;  // loads of the channels of a head
  void* folded = nullptr;    // (batch, groups, out_dim, padded)
};

// A block folds the state of one group into 8 outputs, one per warp.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) fold_weight_kernel(FoldedKernelArgs args) {
  const FoldedReadoutArgs& call = args.call;
  const int out_dim = int(call.out_dim), heads = int(call.heads);
  POM_SHARED(memory);
  float* const mean = reinterpret_cast<float*>(memory);
  const int blocks = int(ceil_div(out_dim, kThreads / kWarp)), warp = int(threadIdx.x) / kWarp;
  const BlockIndex block(blocks);
  const int out = int(block.tile) * (kThreads / kWarp) + warp, lane = int(threadIdx.x) % kWarp;
  const int64_t row = block.row, from = row * call.channels;
  const int runs = out < out_dim ? int(call.channels / kRunLength) : 0;
  const T* const weight = static_cast<const T*>(call.out_weight) + out * call.channels;
  Packed<T, kRunLength> packed[kRunsInFlight];
  auto load = [&](int first) {
    POM_UNROLL for (int i = 0; i < kRunsInFlight; ++i)
      if (const int run = first + i * kWarp; run < runs) packed[i].load(weight + int64_t(run) * kRunLength);
  };
  load(lane);  // in flight while the means are computed

  const double scale = inverse(call.state.count[row]);
  const float *total = static_cast<const float*>(call.state.total) + from,
              *residual = static_cast<const float*>(call.state.residual) + from;
  POM_UNROLL_4 for (int c = int(threadIdx.x); c < int(call.channels); c += kThreads)
    mean[c] = scale != 0 ? float((double(total[c]) + double(residual[c])) * scale) : 0.f;  // for infinite sums too
  __syncthreads();

  float* const sums = mean + call.channels + warp * (call.channels / kRunLength);  // of each run
  for (int first = lane; first < runs; first += kRunsInFlight * kWarp) {
    if (first != lane) load(first);
    POM_UNROLL for (int i = 0; i < kRunsInFlight; ++i) {
      const int run = first + i * kWarp;
      if (run >= runs) break;
      float w[kRunLength], m[kRunLength];
      packed[i].unpack(w);
      load_numbers<kRunLength>(mean + run * kRunLength, m);
      float sum = 0;
      POM_UNROLL for (int k = 0; k < kRunLength; ++k)
        sum += w[k] * m[k];
      sums[run] = sum;
    }
  }
  __syncwarp();
  if (out >= out_dim) return;
  T* const to = static_cast<T*>(args.folded) + (row * out_dim + out) * args.padded;
  for (int head = lane; head < args.padded; head += kWarp) {
    float sum = 0;
    if (head < heads)
      for (int64_t run = head * args.runs_of_head; run < (head + 1) * args.runs_of_head; ++run) sum += sums[run];
    Packed<T, 1> number;
    number.pack(&sum);
    number.store(to + head / kHeadsPerProduct * kHeadsPerProduct + place_of(head % kHeadsPerProduct));
  }
}

// Loads kRunLength neighbouring elements, or zeros if not `valid`.
template <class T>
__device__ inline Words<16> load_run(const T* p, bool valid) {
  Words<16> words = {};
  if (valid) words = *reinterpret_cast<const Words<16>*>(p);
  return words;
}

// Adds to `gates` what part `part` of the input channels contributes to 8 * count heads; lanes as in mma.cuh.
//
// The order of the inputs does not matter as long as both factors agree on it: a lane takes eight neighbours of a row.
template <class T, int count>
__device__ void project_gates(const FoldedKernelArgs& args, const T* const (&rows)[2], int part,
                              float (&gates)[count][4]) {
  const int dim = int(args.call.dim), heads = int(args.call.heads);
  const int lane = int(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const T* const weight = static_cast<const T*>(args.call.gate_weight) + int64_t(g) * dim;
  constexpr int kStep = 4 * kRunLength;
  const int length = int(ceil_div(dim, kStep * kParts)) * kStep, begin = part * length;
  const int end = int(min(dim, begin + length));
  for (int first = begin; first < end; first += kRunsInFlight * kStep) {
    // Issues all loads before the first product; the launch bounds leave registers for it (test_cuda_code.py).
    Words<16> low[kRunsInFlight], high[kRunsInFlight], w[kRunsInFlight][count];
    POM_UNROLL for (int step = 0; step < kRunsInFlight; ++step) {
      const int k = first + step * kStep + kRunLength * q;
      const bool inside = k < end;
      low[step] = load_run(rows[0] + k, inside && rows[0]), high[step] = load_run(rows[1] + k, inside && rows[1]);
      POM_UNROLL for (int i = 0; i < count; ++i)
        w[step][i] = load_run(weight + int64_t(8 * i) * dim + k, inside && 8 * i + g < heads);
    }
    POM_UNROLL for (int step = 0; step < kRunsInFlight; ++step) {
      POM_UNROLL for (int i = 0; i < count; ++i) {
        POM_UNROLL for (int j = 0; j < 4; j += 2)
          multiply_add<T>(gates[i],
                          {low[step].word[j], high[step].word[j], low[step].word[j + 1], high[step].word[j + 1]},
                          w[step][i].word[j], w[step][i].word[j + 1]);
      }
    }
  }
}

// 32 neighbouring outputs of a warp: the folded weights and biases that its lanes need.
template <class T, int sixteens>
struct Outputs {
  Words<8> inputs[4][sixteens];
  Packed<T, kRunLength> bias;

  // Column g of product j is output 8 (g / 2) + 2 j + g % 2 of 32, so that a lane's sums are eight neighbours.
  __device__ void load(const FoldedKernelArgs& args, const T* folded, int first) {
    const int out_dim = int(args.call.out_dim);
    const int lane = int(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
    POM_UNROLL for (int j = 0; j < 4; ++j) {
      const int out = first + g / 2 * kRunLength + 2 * j + g % 2;
      const T* const row = folded + int64_t(out) * (sixteens * kHeadsPerProduct) + 4 * q;
      POM_UNROLL for (int i = 0; i < sixteens; ++i) {
        inputs[j][i] = {};
        if (out < out_dim) inputs[j][i] = *reinterpret_cast<const Words<8>*>(row + i * kHeadsPerProduct);
      }
    }
    bias = {};
    if (const int out = first + kRunLength * q; args.call.out_bias && out < out_dim)
      bias.load(static_cast<const T*>(args.call.out_bias) + out);
  }

  __device__ void multiply(const uint32_t (&values)[sixteens][4], float (&sums)[4][4]) const {
    POM_UNROLL for (int j = 0; j < 4; ++j) {
      POM_UNROLL for (int i = 0; i < sixteens; ++i)
        multiply_add<T>(sums[j], values[i], inputs[j][i].word[0], inputs[j][i].word[1]);
    }
  }
};

// A block takes 16 queries. Each of its four warps computes the gates' part of a quarter of the input channels, and
// then a quarter of the outputs. The quarters depend on `dim` and `out_dim` only, and so do the bits of the results.
template <class Gate, class T, int sixteens>
__global__ void __launch_bounds__(kHasTensorCores ? kReadThreads : kWarp, sixteens == 1 ? 4 : 2)
    folded_readout_kernel(FoldedKernelArgs args) {
  if constexpr (kHasTensorCores) {
    const FoldedReadoutArgs& call = args.call;
    const int out_dim = int(call.out_dim), heads = int(call.heads);
    constexpr int kGates = 2 * sixteens, kPadded = sixteens * kHeadsPerProduct;
    POM_SHARED(memory);
    float* const parts = reinterpret_cast<float*>(memory);  // (kParts, kGates * 4, kWarp)
    const unsigned b = blockIdx.x / args.slots;
    const Piece piece = args.pieces.at(blockIdx.x - b * args.slots);
    if (piece.begin >= piece.end) return;
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
    const int64_t query[] = {piece.begin + g, piece.begin + g + 8};
    const bool valid[] = {query[0] < piece.end, query[1] < piece.end};

    const T *const x = static_cast<const T*>(call.x) + b * call.x_batch_stride, *rows[2];
    POM_UNROLL for (int i = 0; i < 2; ++i)
      rows[i] = valid[i] ? x + query[i] * call.x_token_stride : nullptr;
    float gates[kGates][4] = {};
    if (warp == 0 && call.gate_bias) {
      POM_UNROLL for (int i = 0; i < kGates; ++i) {
        POM_UNROLL for (int k = 0; k < 2; ++k)
          if (const int head = 8 * i + 2 * q + k; head < heads) {
            Packed<T, 1> bias;
            bias.load(static_cast<const T*>(call.gate_bias) + head);
            bias.unpack(&gates[i][k]);
            gates[i][k + 2] = gates[i][k];
          }
      }
    }
    project_gates<T>(args, rows, warp, gates);
    POM_UNROLL for (int i = 0; i < kGates * 4; ++i)
      parts[(warp * kGates * 4 + i) * kWarp + lane] = gates[i / 4][i % 4];

    // A warp loads its next outputs while it writes the previous ones, and the first ones while it waits here.
    constexpr int kStep = 4 * kRunLength * kParts;
    const int64_t group = int64_t(b) * args.pieces.groups + piece.group;
    const T* const folded = static_cast<const T*>(args.folded) + group * out_dim * kPadded;
    Outputs<T, sixteens> outputs;
    outputs.load(args, folded, warp * 4 * kRunLength);
    __syncthreads();

    // The sums of two products, two neighbours per word, are the inputs of the next product.
    uint32_t values[sixteens][4];
    POM_UNROLL for (int i = 0; i < kGates; ++i) {
      POM_UNROLL for (int j = 0; j < 4; j += 2) {
        float value[2];
        POM_UNROLL for (int k = 0; k < 2; ++k) {
          float of_part[kParts];
          POM_UNROLL for (int part = 0; part < kParts; ++part)
            of_part[part] = parts[((part * kGates + i) * 4 + j + k) * kWarp + lane];
          value[k] = Gate::value((of_part[0] + of_part[1]) + (of_part[2] + of_part[3]));
        }
        Packed<T, 2> packed;
        packed.pack(value);
        values[i / 2][i % 2 * 2 + j / 2] = packed.words.word[0];
      }
    }

    T* const y = static_cast<T*>(call.y) + (b * call.queries + query[0]) * out_dim;
    for (int first = warp * 4 * kRunLength; first < out_dim; first += kStep) {
      float sums[4][4] = {}, bias[kRunLength];
      outputs.multiply(values, sums);
      outputs.bias.unpack(bias);
      outputs.load(args, folded, first + kStep);
      const int out = first + kRunLength * q;
      if (out >= out_dim) continue;
      POM_UNROLL for (int i = 0; i < 2; ++i) {
        if (!valid[i]) continue;
        float numbers[kRunLength];
        POM_UNROLL for (int n = 0; n < kRunLength; ++n)
          numbers[n] = sums[n / 2][2 * i + n % 2] + bias[n];
        Packed<T, kRunLength> packed;
        packed.pack(numbers);
        packed.store(y + int64_t(8 * i) * out_dim + out);
      }
    }
  }
}
static_assert(kParts == 4, "the parts of a gate are added by name");

struct FoldedPlan {
  Arena arena;
  FoldedKernelArgs kernel;
  int64_t rows, slots;  // samples times groups; pieces of all samples

  FoldedPlan(const FoldedReadoutArgs& args, void* workspace) : arena(workspace), rows(args.batch * args.groups) {
    kernel.call = args;
    kernel.padded = int(ceil_div(args.heads, kHeadsPerProduct)) * kHeadsPerProduct;
    kernel.runs_of_head = args.channels / args.heads / kRunLength;
    kernel.folded = arena.take<uint16_t>(rows * args.out_dim * kernel.padded);
    kernel.pieces = Pieces(args.queries, kRowShift, args.groups, args.offsets);
    slots = args.batch * kernel.pieces.slots();
    kernel.slots = unsigned(kernel.pieces.slots());
  }
};

using FoldedKernel = void (*)(FoldedKernelArgs);
struct FoldedKernels {
  FoldedKernel fold, read;
};

template <class Gate, class T>
FoldedKernels kernels_of(int64_t heads) {
  constexpr FoldedKernel kRead[] = {folded_readout_kernel<Gate, T, 1>, folded_readout_kernel<Gate, T, 2>,
                                    folded_readout_kernel<Gate, T, 3>, folded_readout_kernel<Gate, T, 4>};
  return {fold_weight_kernel<T>, kRead[(heads - 1) / kHeadsPerProduct]};
}

FoldedKernels kernels_for(const FoldedReadoutArgs& args) {
  auto of_type = [&](auto type) {
    using T = decltype(type);
    return args.form == Form::product ? kernels_of<Sigmoid, T>(args.heads) : kernels_of<HardSigmoid, T>(args.heads);
  };
  return args.dtype == Dtype::bf16 ? of_type(bf16{}) : of_type(f16{});
}

Status check(const FoldedReadoutArgs& args) {
  if (args.dtype != Dtype::bf16 && args.dtype != Dtype::f16) return Status::bad_dtype;
  if (args.batch < 0 || args.queries < 1 || args.groups < 1 || args.dim < 1 || args.out_dim < 1)
    return Status::bad_size;
  if (args.heads < 1 || args.heads > kMaxFoldedHeads || args.channels % args.heads) return Status::bad_size;
  if (args.channels < 1 || args.channels > kMaxFoldedChannels || (args.channels / args.heads) % kRunLength)
    return Status::bad_size;
  if (!args.offsets && args.queries % args.groups) return Status::bad_size;
  const bool aligned = Alignment(args.dtype)
                           .pointers({args.x, args.gate_weight, args.out_weight, args.out_bias, args.y})
                           .sizes({args.dim, args.out_dim, args.x_batch_stride, args.x_token_stride})
                           .vec() == 8;
  const FoldedPlan plan(args, nullptr);
  const bool fits = fit({args.queries, args.dim, args.out_dim, plan.slots, plan.rows * args.out_dim});
  if (!aligned || !fits) return Status::bad_size;
  const StateView& s = args.state;
  return args.batch && !(args.x && args.gate_weight && args.out_weight && args.y && s.total && s.residual && s.count)
             ? Status::null_pointer
             : Status::ok;
}

}  // namespace

bool folds(const FoldedReadoutArgs& args) {
  return check(args) == Status::ok && is_worth_a_try(check_kernel(kernels_for(args).read, kReadThreads));
}

size_t workspace(const FoldedReadoutArgs& args) {
  const Status s = check(args);
  return s == Status::ok || s == Status::null_pointer ? FoldedPlan(args, nullptr).arena.used() : 0;
}

Status folded_readout(const FoldedReadoutArgs& args, void* workspace, size_t bytes, void* stream) {
  constexpr int kWarps = kThreads / kWarp;
  if (const Status s = check(args); s != Status::ok) return s;
  if (!workspace || bytes < cuda::workspace(args)) return Status::workspace_too_small;
  const FoldedPlan plan(args, Arena::align(workspace));
  const FoldedKernels kernels = kernels_for(args);
  if (const Status s = check_kernel(kernels.read, kReadThreads); s != Status::ok) return s;
  const size_t shared = args.channels * (1 + kWarps / kRunLength) * sizeof(float);
  const int64_t blocks = plan.rows * ceil_div(args.out_dim, kWarps);
  if (const Status s = launch(kernels.fold, blocks, kThreads, shared, stream, plan.kernel); s != Status::ok) return s;
  const size_t parts = sizeof(float) * kReadThreads * plan.kernel.padded / 2;  // eight numbers a lane for 16 heads
  return launch(kernels.read, plan.slots, kReadThreads, parts, stream, plan.kernel);
}

}  // namespace pom::cuda
