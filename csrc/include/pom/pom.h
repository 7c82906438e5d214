// The torch-free API: polynomial state, readout and causal mix on plain arrays.
//
// Every function fills outputs the caller owns, with a workspace the caller brings, of one call at a time: ask
// `workspace` for its size first. Arrays are row-major; where strides are given they count elements, may be zero, and
// the channel stride is 1. `acc` below means float, and double where the inputs are double. Arrays of one call share
// one device and must not overlap unless said. The functions check sizes, never values, and touch no output unless they
// return Status::ok.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pom/types.h"

#ifdef POM_EXPORTS  // what a shared library shows
#pragma GCC visibility push(default)
#endif

struct pom_linear;  // of pom/engine.h

namespace pom {

enum class Form : int { product, power };

enum class Status : int {
  ok,
  bad_degree,
  bad_size,
  bad_dtype,
  null_pointer,
  rotary_needs_power,
  workspace_too_small,
  no_device_code,  // this GPU is none of those that the library was built for
  device_error,    // see cuda::error()
  // of the engine
  no_cuda,
  bad_index,
  overlap,
  memory_too_small,
  bad_file,
  later_version,
  other_shape,
  // of derivatives
  no_tangents
};
const char* message(Status status);

// Runs body(argument, i) for i = 0 … n-1 in any order on any threads. A null function runs them here.
struct Executor {
  void (*parallel_for)(void* context, int64_t n, void (*body)(void* argument, int64_t i), void* argument) = nullptr;
  void* context = nullptr;
};

// Angles of every token for `axes` blocks of 2 * half channels; channel p of a block turns with channel p + half.
struct Rotary {
  const void* cos = nullptr;  // acc (tokens, axes * half)
  const void* sin = nullptr;
  int64_t half = 0;
  int axes = 0;
};

// Projected tokens and the polynomial made of them. Width E is that of one factor: a token has degree * E channels in
// product form and E in power form; that number, C, is also the width of the state.
struct Features {
  Form form = Form::product;
  int degree = 0;
  Dtype dtype = Dtype::f32;
  int64_t batch = 0, tokens = 0, width = 0;
  const void* u = nullptr;  // dtype (batch, tokens, C)
  int64_t u_batch_stride = 0, u_token_stride = 0;
  const void* coeff = nullptr;   // acc (width, degree), power form only
  const void* weight = nullptr;  // acc (batch, tokens), or null for ones
  Rotary rotary;
  // A direction, of u and in power form of coeff. Where there is one, φ stands for its derivative in that direction,
  // and the gradients of u and coeff stand for their derivatives, what reaches φ held fixed. Mix and update take no
  // directions, the causal mix takes one of features or of gates: derivatives are sums of such calls.
  const void* u_tangent = nullptr;  // dtype (batch, tokens, C)
  int64_t u_tangent_batch_stride = 0, u_tangent_token_stride = 0;
  const void* coeff_tangent = nullptr;  // acc (width, degree)

  POM_HD int64_t channels() const { return form == Form::product ? degree * width : width; }
};

// Which tokens a group sums. One of: nothing (all tokens, one group); offsets; a dense mask.
//
// A dense mask is multiplied with the features of all tokens: count * tokens * C products, forward and backward. On a
// GPU the workspace then holds a number of acc for every token and channel, and where count and C are small at most 4.2
// MiB of partial sums a sample beside that, 8.3 MiB in double.
struct Groups {
  int64_t count = 1;
  const int64_t* offsets = nullptr;  // (count + 1), from 0 to tokens: group g owns tokens offsets[g] … offsets[g+1]-1
  bool cumulative = false;           // and with this also those of the groups before it
  const void* mask = nullptr;        // acc (batch, count, tokens) weights; excludes offsets and Features::weight
};

// A state: value = total + residual, the residual being what `total` cannot hold; count is the sum of weights.
struct StateView {
  const void* total = nullptr;     // acc (batch, groups, C)
  const void* residual = nullptr;  // acc (batch, groups, C)
  const double* count = nullptr;   // (batch, groups)
};
struct StateOut {
  void* total = nullptr;
  void* residual = nullptr;
  double* count = nullptr;
  StateView view() const { return {total, residual, count}; }
};

// The sum of every group's tokens and of `prior`, if there is one: tokens are added to a state in one call. With one
// group `out` may be the memory of `prior`, which is then added to in place.
struct StateArgs {
  Features features;
  Groups groups;
  StateOut out;
  StateView prior = {};  // (batch, 1, C); null pointers for none
};

struct StateBackwardArgs {
  Features features;
  Groups groups;
  const void* grad_total = nullptr;  // acc (batch, groups, C)
  void* grad_u = nullptr;            // dtype (batch, tokens, C)
  void* grad_coeff = nullptr;        // acc (width, degree), power form only
};

// Gates of query tokens: one per channel (heads = 1) or one scalar per head of C / heads channels.
struct Gates {
  Form form = Form::product;
  Dtype dtype = Dtype::f32;
  int64_t batch = 0, tokens = 0, channels = 0, heads = 1;
  const void* gate = nullptr;  // dtype (batch, tokens, channels or heads)
  int64_t gate_batch_stride = 0, gate_token_stride = 0;
  Rotary rotary;  // over the gates
  // A direction, as in Features: γ stands for its derivative, and the gradient of the gates for its derivative.
  const void* tangent = nullptr;  // dtype (batch, tokens, channels or heads)
  int64_t tangent_batch_stride = 0, tangent_token_stride = 0;

  POM_HD int64_t width() const { return heads > 1 ? heads : channels; }
};

struct ReadoutArgs {
  Gates gates;
  int64_t groups = 1;
  const int64_t* offsets = nullptr;  // (groups + 1): queries offsets[g] … read group g; null deals them evenly
  StateView state;
  void* y = nullptr;  // dtype (batch, tokens, channels)
  // A direction of the state, without count, beside one of the gates: y stands for its derivative in both.
  StateView tangent = {};
};

struct ReadoutBackwardArgs {
  Gates gates;
  int64_t groups = 1;
  const int64_t* offsets = nullptr;
  StateView state;
  const void* grad_y = nullptr;  // dtype (batch, tokens, channels)
  int64_t grad_y_batch_stride = 0, grad_y_token_stride = 0;
  void* grad_gate = nullptr;   // dtype (batch, tokens, channels or heads)
  void* grad_total = nullptr;  // acc (batch, groups, channels)
};

// Token-causal mix: token m reads the sum of tokens 0 … m and of `prior`, if there is one (batch, 1, C).
struct CausalArgs {
  Features features;
  Gates gates;
  StateView prior;  // null pointers for none
  void* y = nullptr;
  StateOut out;  // the state after the last token (batch, 1, C)
};

struct CausalBackwardArgs {
  Features features;
  Gates gates;
  StateView prior;
  const void* grad_y = nullptr;
  int64_t grad_y_batch_stride = 0, grad_y_token_stride = 0;
  const void* grad_total = nullptr;  // acc (batch, 1, C): gradient of the final state, or null
  void* grad_u = nullptr;
  void* grad_gate = nullptr;
  void* grad_coeff = nullptr;
  void* grad_prior = nullptr;  // acc (batch, 1, C)
};

// Whole-context mix: every query reads the sum of all context tokens and of `prior`, if there is one (batch, 1, C).
struct MixArgs {
  Features features;
  Gates gates;      // of as many queries as there are
  StateView prior;  // null pointers for none
  void* y = nullptr;
  StateOut out;  // the state that the queries read (batch, 1, C)
};

// The same in place, for a stream: adds the tokens of one frame to a running state, which the frame's queries read.
struct UpdateArgs {
  Features features;
  Gates gates;
  StateOut state;                       // (batch, 1, C), read, and written last
  uint32_t* arrival_counter = nullptr;  // (batch), on a GPU: zero before the first update of a state, and left zero
  void* y = nullptr;
};

// Tokens that are projected, or null. On a CPU the channels may have a stride too.
struct Tokens {
  const void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, channel_stride = 1;
};

// A matrix, or a batch of them, with any strides.
struct Matrix {
  const void* data = nullptr;
  int64_t row_stride = 0, column_stride = 1, batch_stride = 0;
};

// y (rows, outputs) = x (rows, inputs) weight (outputs, inputs)ᵀ + bias. With a batch, that many products without bias.
struct MatrixProduct {
  Dtype dtype = Dtype::f32;
  int64_t batch = 0, rows = 0, inputs = 0, outputs = 0;
  Matrix x, weight;
  const void* bias = nullptr;  // dtype (outputs), or null
};

// How the CPU's operations with projections multiply matrices: by `function`, or by plain loops if all are null.
struct Linear {
  static constexpr int kSlots = 3;
  // A pom_linear_function of pom/engine.h, which reads dense matrices: others are copied first.
  int32_t (*function)(void* context, const pom_linear* map) = nullptr;
  void* context = nullptr;
  // In place of `function`, for a library that reads matrices where they are and makes room for its results: returns y,
  // dense, which it keeps until the next product of the same slot. Errors are exceptions.
  const void* (*multiply)(void* context, const MatrixProduct& product, int slot) = nullptr;
  // sums (columns), acc, of the rows of a matrix. Null: by plain loops.
  void (*column_sums)(void* context, Dtype dtype, const Matrix& matrix, int64_t rows, int64_t columns,
                      void* sums) = nullptr;
};

// The state of tokens before their projection, u = x weightᵀ + bias, which is never stored.
struct ProjectStateArgs {
  Features features;  // without u
  Tokens x;           // dtype (batch, tokens, dim)
  int64_t dim = 0;
  const void* weight = nullptr;  // dtype (C, dim)
  const void* bias = nullptr;    // dtype (C), or null
  Groups groups;                 // without a mask
  StateOut out;
  StateView prior = {};  // as of StateArgs
  // On a CPU alone:
  Linear linear = {};
  Tokens x_tangent = {};         // a direction of x
  StateView prior_tangent = {};  // a direction of prior, without count, or null pointers for none
  StateOut tangent_out = {};     // the derivative of out, without count
};

struct ProjectStateBackwardArgs {
  ProjectStateArgs state;            // without out, prior and tangents
  const void* grad_total = nullptr;  // acc (batch, groups, C)
  const void* saved = nullptr;       // dtype (batch, tokens, C): u, or null to compute it again
  // Null for what is not needed:
  void* grad_x = nullptr;       // dtype (batch, tokens, dim)
  void* grad_weight = nullptr;  // dtype (C, dim)
  void* grad_bias = nullptr;    // dtype (C)
  void* grad_coeff = nullptr;   // acc (C, degree), power form only
};

// The readout of queries that are projected to one gate per head, through a projection of its own:
// y = Σ_h γ_h(x gate_weightᵀ + gate_bias) H_h out_weight_hᵀ + out_bias; H_h and out_weight_h: the channels of head h.
struct FoldedReadoutArgs {
  Form form = Form::power;  // of the gates
  Dtype dtype = Dtype::bf16;
  int64_t batch = 0, queries = 0, dim = 0, heads = 1, channels = 0, out_dim = 0;
  Tokens x;                           // dtype (batch, queries, dim)
  const void* gate_weight = nullptr;  // dtype (heads, dim)
  const void* gate_bias = nullptr;    // dtype (heads), or null
  const void* out_weight = nullptr;   // dtype (out_dim, channels)
  const void* out_bias = nullptr;     // dtype (out_dim), or null
  int64_t groups = 1;
  const int64_t* offsets = nullptr;  // as of ReadoutArgs
  StateView state;                   // (batch, groups, channels)
  void* y = nullptr;                 // dtype (batch, queries, out_dim)
  // On a CPU alone:
  Linear linear = {};
  Rotary rotary = {};     // over the gates
  Tokens x_tangent = {};  // a direction of x and, without count, of the state: y_tangent is the derivative of y
  StateView state_tangent = {};
  void* y_tangent = nullptr;  // dtype (batch, queries, out_dim)
};

// The same for any gates, one per channel if heads is 1, which multiply the mean before it is projected.
struct ProjectReadoutArgs : FoldedReadoutArgs {
  const void* saved = nullptr;  // dtype (batch, queries, gates): the projected gates, or null to compute them
};

struct ProjectReadoutBackwardArgs {
  ProjectReadoutArgs readout;        // without y and tangents
  Tokens grad_y;                     // dtype (batch, queries, out_dim)
  void* grad_x = nullptr;            // dtype (batch, queries, dim)
  void* grad_gate_weight = nullptr;  // dtype (gates, dim)
  void* grad_gate_bias = nullptr;    // dtype (gates), or null if not needed
  void* grad_total = nullptr;        // acc (batch, groups, channels)
  void* grad_out_weight = nullptr;   // dtype (out_dim, channels)
  void* grad_out_bias = nullptr;     // dtype (out_dim), or null if not needed
};

namespace cpu {

size_t workspace(const StateArgs& args);
size_t workspace(const StateBackwardArgs& args);
size_t workspace(const ReadoutArgs& args);
size_t workspace(const ReadoutBackwardArgs& args);
size_t workspace(const CausalArgs& args);
size_t workspace(const CausalBackwardArgs& args);
size_t workspace(const MixArgs& args);
size_t workspace(const UpdateArgs& args);

Status state(const StateArgs& args, void* workspace, size_t bytes, const Executor& executor = {});
Status state_backward(const StateBackwardArgs& args, void* workspace, size_t bytes, const Executor& executor = {});
Status readout(const ReadoutArgs& args, void* workspace, size_t bytes, const Executor& executor = {});
Status readout_backward(const ReadoutBackwardArgs& args, void* workspace, size_t bytes, const Executor& executor = {});
Status causal_mix(const CausalArgs& args, void* workspace, size_t bytes, const Executor& executor = {});
Status causal_mix_backward(const CausalBackwardArgs& args, void* workspace, size_t bytes,
                           const Executor& executor = {});
Status mix(const MixArgs& args, void* workspace, size_t bytes, const Executor& executor = {});
Status update(const UpdateArgs& args, void* workspace, size_t bytes, const Executor& executor = {});

// A block of tokens at a time, whose projections stay in the processor's cache. A status of `linear` other than ok is
// passed on; outputs may then be written in part.
size_t workspace(const ProjectStateArgs& args);
size_t workspace(const ProjectStateBackwardArgs& args);
size_t workspace(const ProjectReadoutArgs& args);
size_t workspace(const ProjectReadoutBackwardArgs& args);
size_t workspace(const FoldedReadoutArgs& args);

Status project_state(const ProjectStateArgs& args, void* workspace, size_t bytes, const Executor& executor = {});
Status project_state_backward(const ProjectStateBackwardArgs& args, void* workspace, size_t bytes,
                              const Executor& executor = {});
Status project_readout(const ProjectReadoutArgs& args, void* workspace, size_t bytes, const Executor& executor = {});
Status project_readout_backward(const ProjectReadoutBackwardArgs& args, void* workspace, size_t bytes,
                                const Executor& executor = {});
Status folded_readout(const FoldedReadoutArgs& args, void* workspace, size_t bytes, const Executor& executor = {});

}  // namespace cpu

// The same on the current CUDA device. All pointers, the offsets and the workspace too, are to its memory; `stream` is
// a cudaStream_t. Calls return when their kernels are queued, never wait, and can be captured in a CUDA graph. Ask for
// a workspace with the pointers of the call: aligned ones need less.
namespace cuda {

size_t workspace(const StateArgs& args);
size_t workspace(const StateBackwardArgs& args);
size_t workspace(const ReadoutArgs& args);
size_t workspace(const ReadoutBackwardArgs& args);
size_t workspace(const CausalArgs& args);
size_t workspace(const CausalBackwardArgs& args);
size_t workspace(const MixArgs& args);
size_t workspace(const UpdateArgs& args);

Status state(const StateArgs& args, void* workspace, size_t bytes, void* stream);
Status state_backward(const StateBackwardArgs& args, void* workspace, size_t bytes, void* stream);
Status readout(const ReadoutArgs& args, void* workspace, size_t bytes, void* stream);
Status readout_backward(const ReadoutBackwardArgs& args, void* workspace, size_t bytes, void* stream);
Status causal_mix(const CausalArgs& args, void* workspace, size_t bytes, void* stream);
Status causal_mix_backward(const CausalBackwardArgs& args, void* workspace, size_t bytes, void* stream);
Status mix(const MixArgs& args, void* workspace, size_t bytes, void* stream);
Status update(const UpdateArgs& args, void* workspace, size_t bytes, void* stream);

// By the tensor cores of GPUs of compute capability 9.0: bf16 and f16, the power form of degrees 2 to 4 without rotary
// positions, directions or a mask, and sizes, strides and addresses of whole 16 bytes. Whether a call is one of these;
// if something is wrong with the device, the call tells:
bool projects(const ProjectStateArgs& args);
size_t workspace(const ProjectStateArgs& args);
Status project_state(const ProjectStateArgs& args, void* workspace, size_t bytes, void* stream);

// By the tensor cores of compute capability 8.0 and later: bf16 and f16, up to 64 heads and 6,144 channels, those of a
// head a multiple of 8, and sizes, strides and addresses of whole 16 bytes. Whether a call is one of these, likewise:
bool folds(const FoldedReadoutArgs& args);
size_t workspace(const FoldedReadoutArgs& args);
Status folded_readout(const FoldedReadoutArgs& args, void* workspace, size_t bytes, void* stream);

// What CUDA said of the last call on this thread that returned no_device_code or device_error.
const char* error();

// 13000 for CUDA 13.0: of the runtime that the library is linked to, and the latest that the driver here serves, 0
// without one. Needs no GPU.
struct Versions {
  int runtime = 0, driver = 0;
};
Versions versions();

}  // namespace cuda
}  // namespace pom

#ifdef POM_EXPORTS
#pragma GCC visibility pop
#endif
