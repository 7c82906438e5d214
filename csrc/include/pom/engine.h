/* The engine: what a frame-causal model with polynomial mixers remembers, for programs that draw frame after frame.
 *
 * A stream holds the states of all layers for a batch of videos and, for models trained with shared noise, one for
 * every evaluation of the solver. A frame's tokens read the state with the frame itself added: `peek` leaves the state
 * as it was, for the evaluations of a frame that is still noisy, `commit` keeps the frame. States do not grow.
 *
 * Plain C. Functions return a status and write nothing unless it is POM_OK. Nothing here allocates, waits for a GPU
 * (but where it says so) or keeps a global: streams of different threads do not disturb each other, one stream belongs
 * to one thread at a time. Structs are filled with zeros first; what is zero then has the meaning said below.
 *
 * `dtype` is that of the layer, `acc` is float, and double where the dtype is. C is the width of a state: degree *
 * width in product form, width in power form. Arrays are row-major, strides count elements and may be zero. On a GPU
 * all arrays, the memory of the stream and the workspace are the device's, kernels are queued on the place's stream,
 * and peek, commit, step, reset and fork can be captured in a CUDA graph and replayed for every frame.
 */
#ifndef POM_ENGINE_H
#define POM_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#ifdef POM_EXPORTS
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t pom_status;
enum {
  POM_OK,
  POM_BAD_DEGREE,
  POM_BAD_SIZE,
  POM_BAD_DTYPE,
  POM_NULL_POINTER,
  POM_ROTARY_NEEDS_POWER,
  POM_WORKSPACE_TOO_SMALL,
  POM_NO_DEVICE_CODE,
  POM_DEVICE_ERROR,
  POM_NO_CUDA,
  POM_BAD_INDEX,
  POM_OVERLAP,
  POM_MEMORY_TOO_SMALL,
  POM_BAD_FILE,
  POM_LATER_VERSION,
  POM_OTHER_SHAPE
};
enum { POM_PRODUCT, POM_POWER };              /* forms */
enum { POM_F32, POM_F64, POM_BF16, POM_F16 }; /* dtypes */
enum { POM_DEVICE_CPU, POM_DEVICE_CUDA };     /* devices */

const char* pom_status_message(pom_status status);
const char* pom_cuda_error(void); /* what CUDA said of this thread's last POM_DEVICE_ERROR */

/* One polynomial mixer. */
typedef struct pom_layer {
  int32_t form;
  int32_t degree; /* 1 to 16 */
  int32_t dtype;
  int32_t heads; /* 1: a gate per channel; more: one per head of C / heads channels */
  int64_t width; /* of one polynomial factor */
  size_t kept;   /* bytes beside the state for whatever else the caller remembers of this layer, such as the frames
                    that a convolution reaches back to: zeroed, forked and saved with it */
} pom_layer;

typedef struct pom_shape {
  const pom_layer* layers; /* not copied: they stay where they are as long as the stream is used */
  int64_t layer_count;
  int64_t batch;       /* videos; with guidance twice as many */
  int64_t evaluations; /* 1; shared noise: of the model in a frame */
} pom_shape;

/* Runs body(argument, i) for i = 0 ... n-1 in any order on any threads. Null runs them on the calling thread. */
typedef struct pom_executor {
  void (*parallel_for)(void* context, int64_t n, void (*body)(void* argument, int64_t i), void* argument);
  void* context;
} pom_executor;

/* Where a stream lives, and what runs its kernels. */
typedef struct pom_place {
  int32_t device;
  pom_executor executor; /* of POM_DEVICE_CPU */
  void* cuda_stream;     /* of POM_DEVICE_CUDA, a cudaStream_t of the current device */
} pom_place;

/* Plain data: a copy is another name for the same stream. The place may be changed between calls. */
typedef struct pom_stream {
  pom_shape shape;
  pom_place place;
  void* memory;
} pom_stream;

/* Bytes of memory that a stream of this shape needs, at any address; 0 where open would refuse the shape. */
size_t pom_stream_bytes(const pom_shape* shape);

/* Makes an empty stream in the caller's memory. */
pom_status pom_stream_open(pom_stream* stream, const pom_shape* shape, const pom_place* place, void* memory,
                           size_t bytes);

/* Angles of every token for `axes` blocks of 2 * half channels; channel p of a block turns with channel p + half. */
typedef struct pom_rotary {
  const void* cos; /* acc (tokens, axes * half) */
  const void* sin;
  int64_t half;
  int32_t axes; /* 0: no positions */
} pom_rotary;

/* What a mixer is given of a frame, or of any other context and the queries that read it. */
typedef struct pom_frame {
  int64_t tokens; /* of the context */
  const void* u;  /* dtype (batch, tokens, C), projected context */
  int64_t u_batch_stride, u_token_stride;
  const void* coeff;  /* acc (width, degree), power form only */
  const void* weight; /* acc (batch, tokens); null: all one */
  pom_rotary rotary;  /* of the context; power form only */
  int64_t queries;
  const void* gate; /* dtype (batch, queries, heads, or C where heads is 1) */
  int64_t gate_batch_stride, gate_token_stride;
  pom_rotary gate_rotary;
  void* y; /* dtype (batch, queries, C), dense; overlaps nothing */
} pom_frame;

/* Bytes of workspace for peek and commit of this frame, whose pointers count: aligned ones can need less. */
size_t pom_stream_workspace(const pom_stream* stream, int64_t layer, const pom_frame* frame);

/* Reads the state with the frame added, and leaves it as it was. */
pom_status pom_stream_peek(const pom_stream* stream, int64_t evaluation, int64_t layer, const pom_frame* frame,
                           void* workspace, size_t bytes);

/* Adds the frame to the state and reads it. With no queries it is added only. */
pom_status pom_stream_commit(pom_stream* stream, int64_t evaluation, int64_t layer, const pom_frame* frame,
                             void* workspace, size_t bytes);

/* A linear map, y (rows, outputs) = x (rows, inputs) times the transpose of weight (outputs, inputs), plus bias
 * (outputs) or null. All dense and of one dtype. */
typedef struct pom_linear {
  int32_t dtype;
  int64_t rows, inputs, outputs;
  const void *x, *weight, *bias;
  void* y;
} pom_linear;
typedef pom_status (*pom_linear_function)(void* context, const pom_linear* map);

/* Plain loops, for where there is no BLAS; context: a pom_executor, or null. */
pom_status pom_cpu_linear(void* context, const pom_linear* map);

/* A whole layer of a frame's tokens, which mix with each other and what came before: y = out(gate(x) * mean). */
typedef struct pom_step {
  int64_t tokens, dim;
  const void* x;                   /* dtype (batch, tokens, dim), dense */
  const void *in_weight, *in_bias; /* (C + gates, dim): context projection, under it that of the gates; bias or null */
  const void* coeff;               /* acc (width, degree), power form only */
  const void *out_weight, *out_bias; /* (dim, C); (dim) or null */
  pom_rotary rotary, gate_rotary;
  pom_linear_function linear; /* null: pom_cpu_linear; on a GPU there must be one */
  void* linear_context;
  void* y; /* dtype (batch, tokens, dim), dense */
} pom_step;

/* `commit` 0: the state stays as it was. A status other than POM_OK of `linear` is passed on. */
size_t pom_stream_step_workspace(const pom_stream* stream, int64_t layer, const pom_step* step);
pom_status pom_stream_step(pom_stream* stream, int64_t evaluation, int64_t layer, const pom_step* step, int32_t commit,
                           void* workspace, size_t bytes);

/* Where the state of a layer lies: the sum is total + residual, its mean that over count. */
typedef struct pom_state {
  void* total;    /* acc (batch, C) */
  void* residual; /* acc (batch, C), what total cannot hold */
  double* count;  /* (batch) */
  void* kept;     /* the caller's bytes, aligned to 64; null where there are none */
} pom_state;
pom_status pom_stream_state(const pom_stream* stream, int64_t evaluation, int64_t layer, pom_state* state);

/* Back to the empty stream. */
pom_status pom_stream_reset(pom_stream* stream);

/* Makes `to`, an open stream of the same shape on the same device, what `from` is: a fork, or a return to one. */
pom_status pom_stream_fork(const pom_stream* from, pom_stream* to);

/* A stream as the bytes of a small file with a version and a checksum, the same for both devices, little-endian. Bytes
 * that are damaged, of a later version or of another shape are refused, and the stream stays as it was. On a GPU save
 * and load wait for the place's stream. */
size_t pom_stream_saved_bytes(const pom_stream* stream);
pom_status pom_stream_save(const pom_stream* stream, void* file, size_t bytes);
pom_status pom_stream_load(pom_stream* stream, const void* file, size_t bytes);

#ifdef __cplusplus
}
#endif
#ifdef POM_EXPORTS
#pragma GCC visibility pop
#endif

#endif
