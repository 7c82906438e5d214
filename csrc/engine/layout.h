// Where the parts of a stream lie in its memory, and which shapes there are.
//
// Evaluation by evaluation and in it layer by layer: total, residual, count, what the caller keeps. Behind all of them
// the arrival counters of the layers, which only a GPU uses and nobody saves.
#pragma once

#include "arena.h"
#include "checks.h"
#include "pom/engine.h"

namespace pom::engine {

constexpr size_t kAlignment = 64;
inline size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

inline Form form(const pom_layer& layer) { return Form(layer.form); }
inline Dtype dtype(const pom_layer& layer) { return Dtype(layer.dtype); }
inline int64_t channels(const pom_layer& layer) {
  return layer.form == POM_PRODUCT ? layer.degree * layer.width : layer.width;
}
inline int64_t gates(const pom_layer& layer) { return layer.heads > 1 ? layer.heads : channels(layer); }
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
inline int64_t size_of_acc(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

// Bytes of the parts of one layer.
struct Parts {
  size_t sums, counts, kept;  // `sums` of total, and as many of residual
  Parts(const pom_layer& layer, int64_t batch)
      : sums(aligned(size_t(batch * channels(layer) * size_of_acc(dtype(layer))))),
        counts(aligned(size_t(batch) * sizeof(double))),
        kept(aligned(layer.kept)) {}
  size_t bytes() const { return 2 * sums + counts + kept; }
};

// Bytes of the first `layers` layers of one evaluation.
inline size_t layers_bytes(const pom_shape& shape, int64_t layers) {
  size_t bytes = 0;
  for (int64_t i = 0; i < layers; ++i) bytes += Parts(shape.layers[i], shape.batch).bytes();
  return bytes;
}
inline size_t states_bytes(const pom_shape& shape) {
  return size_t(shape.evaluations) * layers_bytes(shape, shape.layer_count);
}
inline size_t arrival_counters_bytes(const pom_shape& shape) {
  return size_t(shape.evaluations * shape.layer_count * shape.batch) * sizeof(uint32_t);
}
inline char* memory_of(const pom_stream& stream) { return static_cast<char*>(Arena::align(stream.memory)); }

inline Status check(const pom_layer& layer) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (layer.degree < 1 || layer.degree > kMaxDegree) return Status::bad_degree;
  if (layer.dtype < POM_F32 || layer.dtype > POM_F16) return Status::bad_dtype;
  if (layer.form != POM_PRODUCT && layer.form != POM_POWER) return Status::bad_size;
  if (layer.width < 1 || layer.width > kMost || layer.heads < 1 || layer.heads > kMaxHeads) return Status::bad_size;
  return channels(layer) % layer.heads ? Status::bad_size : Status::ok;
}

inline Status check(const pom_shape* shape) {
  if (!shape || !shape->layers) return Status::null_pointer;
  if (shape->layer_count < 1 || shape->batch < 0 || shape->evaluations < 1) return Status::bad_size;
  double bytes = 0;
  for (int64_t i = 0; i < shape->layer_count; ++i) {
    const pom_layer& layer = shape->layers[i];
    if (const Status s = check(layer); s != Status::ok) return s;
    bytes += (16.0 * double(channels(layer)) + 16) * double(shape->batch) + double(layer.kept) + 256;
  }
  return bytes * double(shape->evaluations) > 0x1p60 ? Status::bad_size : Status::ok;  // no size_t runs over
}

inline Status check(const pom_place& place) {
  if (place.device == POM_DEVICE_CPU) return Status::ok;
#ifdef POM_CUDA
  if (place.device == POM_DEVICE_CUDA) return Status::ok;
#endif
  return Status::no_cuda;
}

// An open stream, and one of its layers.
inline Status check(const pom_stream* stream, int64_t evaluation = 0, int64_t layer = 0) {
  if (!stream || !stream->memory || !stream->shape.layers) return Status::null_pointer;
  if (const Status s = check(stream->place); s != Status::ok) return s;
  const pom_shape& shape = stream->shape;
  const bool there = evaluation >= 0 && evaluation < shape.evaluations && layer >= 0 && layer < shape.layer_count;
  return there ? Status::ok : Status::bad_index;
}

}  // namespace pom::engine
