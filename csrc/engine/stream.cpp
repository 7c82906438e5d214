// A stream: its memory, and a frame of one layer read or kept.

#include <algorithm>

#include "engine/device.h"
#include "engine/layout.h"
#include "engine/overlap.h"

namespace pom::engine {
namespace {

// The numbers of C are those of C++.
static_assert(POM_OK == int(Status::ok) && POM_BAD_DEGREE == int(Status::bad_degree));
static_assert(POM_BAD_SIZE == int(Status::bad_size) && POM_BAD_DTYPE == int(Status::bad_dtype));
static_assert(POM_NULL_POINTER == int(Status::null_pointer) && POM_NO_DEVICE_CODE == int(Status::no_device_code));
static_assert(POM_ROTARY_NEEDS_POWER == int(Status::rotary_needs_power) && POM_NO_CUDA == int(Status::no_cuda));
static_assert(POM_WORKSPACE_TOO_SMALL == int(Status::workspace_too_small) && POM_OVERLAP == int(Status::overlap));
static_assert(POM_DEVICE_ERROR == int(Status::device_error) && POM_BAD_INDEX == int(Status::bad_index));
static_assert(POM_MEMORY_TOO_SMALL == int(Status::memory_too_small) && POM_BAD_FILE == int(Status::bad_file));
static_assert(POM_LATER_VERSION == int(Status::later_version) && POM_OTHER_SHAPE == int(Status::other_shape));
static_assert(POM_PRODUCT == int(Form::product) && POM_POWER == int(Form::power));
static_assert(POM_F32 == int(Dtype::f32) && POM_F64 == int(Dtype::f64));
static_assert(POM_BF16 == int(Dtype::bf16) && POM_F16 == int(Dtype::f16));

pom_state state_of(const pom_stream& stream, int64_t evaluation, int64_t layer) {
  const pom_shape& shape = stream.shape;
  const Parts parts(shape.layers[layer], shape.batch);
  const size_t before = size_t(evaluation) * layers_bytes(shape, shape.layer_count) + layers_bytes(shape, layer);
  char *const total = memory_of(stream) + before, *const residual = total + parts.sums;
  char *const counts = residual + parts.sums, *const kept = counts + parts.counts;
  return {total, residual, reinterpret_cast<double*>(counts), parts.kept ? kept : nullptr};
}

uint32_t* arrival_counters_of(const pom_stream& stream, int64_t evaluation, int64_t layer) {
  const pom_shape& shape = stream.shape;
  return reinterpret_cast<uint32_t*>(memory_of(stream) + states_bytes(shape)) +
         (evaluation * shape.layer_count + layer) * shape.batch;
}

Rotary rotary(const pom_rotary& r) { return {r.cos, r.sin, r.half, r.axes}; }

Features features_of(const pom_layer& layer, int64_t batch, const pom_frame& f) {
  return {form(layer), layer.degree,     dtype(layer),     batch,   f.tokens, layer.width,
          f.u,         f.u_batch_stride, f.u_token_stride, f.coeff, f.weight, rotary(f.rotary)};
}

Gates gates_of(const pom_layer& layer, int64_t batch, const pom_frame& f) {
  return {form(layer),         dtype(layer),         batch,  f.queries,
          channels(layer),     layer.heads,          f.gate, f.gate_batch_stride,
          f.gate_token_stride, rotary(f.gate_rotary)};
}

// The two things that can be done with a frame. To peek is to mix, and to throw the new state away.
struct FramePlan {
  Arena arena;
  MixArgs mix;
  UpdateArgs update;
  size_t bytes;
  char* memory;

  FramePlan(const pom_stream& stream, int64_t evaluation, int64_t layer, const pom_frame& frame, void* workspace)
      : arena(workspace) {
    const pom_layer& shape = stream.shape.layers[layer];
    const int64_t batch = stream.shape.batch, sums = batch * channels(shape) * size_of_acc(dtype(shape));
    const pom_state at = state_of(stream, evaluation, layer);
    const StateOut state = {at.total, at.residual, at.count};
    const StateOut scratch = {arena.take<char>(sums), arena.take<char>(sums), arena.take<double>(batch)};
    mix = {features_of(shape, batch, frame), gates_of(shape, batch, frame), state.view(), frame.y, scratch};
    update = {mix.features, mix.gates, state, arrival_counters_of(stream, evaluation, layer), frame.y};
    bytes = std::max(workspace_of(stream.place, mix), workspace_of(stream.place, update));
    memory = arena.take<char>(int64_t(bytes));
  }
};

Status check_frame(const pom_stream* stream, int64_t evaluation, int64_t layer, const pom_frame* frame, void* workspace,
                   size_t bytes) {
  if (const Status s = check(stream, evaluation, layer); s != Status::ok) return s;
  if (!frame) return Status::null_pointer;
  const pom_frame& f = *frame;
  if (std::min({f.tokens, f.queries, f.u_batch_stride, f.u_token_stride, f.gate_batch_stride, f.gate_token_stride}) < 0)
    return Status::bad_size;
  if (!workspace || bytes < pom_stream_workspace(stream, layer, frame)) return Status::workspace_too_small;
  const pom_layer& shape = stream->shape.layers[layer];
  const int64_t batch = stream->shape.batch, width = channels(shape), size = size_of(dtype(shape));
  const Range y(f.y, batch * f.queries * width * size), scratch(workspace, int64_t(bytes)),
      memory(stream->memory, int64_t(pom_stream_bytes(&stream->shape))),
      u(f.u, batch, f.tokens, width, f.u_batch_stride, f.u_token_stride, size),
      gate(f.gate, batch, f.queries, gates(shape), f.gate_batch_stride, f.gate_token_stride, size);
  const bool overlap = y.overlaps(u) || y.overlaps(gate) || y.overlaps(memory) || y.overlaps(scratch) ||
                       scratch.overlaps(memory) || scratch.overlaps(u) || scratch.overlaps(gate);
  return overlap ? Status::overlap : Status::ok;
}

bool same(const pom_shape& a, const pom_shape& b) {
  const auto equal = [](const pom_layer& x, const pom_layer& y) {
    return x.form == y.form && x.degree == y.degree && size_of_acc(dtype(x)) == size_of_acc(dtype(y)) &&
           x.width == y.width && x.kept == y.kept;
  };
  return a.layer_count == b.layer_count && a.batch == b.batch && a.evaluations == b.evaluations &&
         std::equal(a.layers, a.layers + a.layer_count, b.layers, equal);
}

}  // namespace
}  // namespace pom::engine

using namespace pom;
using namespace pom::engine;

const char* pom_status_message(pom_status status) { return message(Status(status)); }

const char* pom_cuda_error(void) {
#ifdef POM_CUDA
  return cuda::error();
#else
  return "no error";
#endif
}

size_t pom_stream_bytes(const pom_shape* shape) {
  if (check(shape) != Status::ok) return 0;
  return states_bytes(*shape) + arrival_counters_bytes(*shape) + kAlignment;
}

pom_status pom_stream_open(pom_stream* stream, const pom_shape* shape, const pom_place* place, void* memory,
                           size_t bytes) {
  if (const Status s = check(shape); s != Status::ok) return int(s);
  if (!stream || !place || !memory) return POM_NULL_POINTER;
  if (const Status s = check(*place); s != Status::ok) return int(s);
  if (bytes < pom_stream_bytes(shape)) return POM_MEMORY_TOO_SMALL;
  const pom_stream opened = {*shape, *place, memory};
  if (const Status s = clear(*place, memory, pom_stream_bytes(shape)); s != Status::ok) return int(s);
  *stream = opened;
  return POM_OK;
}

pom_status pom_stream_reset(pom_stream* stream) {
  if (const Status s = check(stream); s != Status::ok) return int(s);
  return int(clear(stream->place, stream->memory, pom_stream_bytes(&stream->shape)));
}

pom_status pom_stream_fork(const pom_stream* from, pom_stream* to) {
  for (const pom_stream* stream : {from, static_cast<const pom_stream*>(to)})
    if (const Status s = check(stream); s != Status::ok) return int(s);
  if (!same(from->shape, to->shape) || from->place.device != to->place.device) return POM_OTHER_SHAPE;
  const Range one(memory_of(*from), int64_t(states_bytes(from->shape))),
      other(memory_of(*to), int64_t(states_bytes(to -> shape)));
  if (one.begin == other.begin) return POM_OK;
  if (one.overlaps(other)) return POM_OVERLAP;
  return int(copy(to->place, memory_of(*to), memory_of(*from), states_bytes(from->shape)));
}

pom_status pom_stream_state(const pom_stream* stream, int64_t evaluation, int64_t layer, pom_state* state) {
  if (const Status s = check(stream, evaluation, layer); s != Status::ok) return int(s);
  if (!state) return POM_NULL_POINTER;
  *state = state_of(*stream, evaluation, layer);
  return POM_OK;
}

size_t pom_stream_workspace(const pom_stream* stream, int64_t layer, const pom_frame* frame) {
  if (check(stream, 0, layer) != Status::ok || !frame) return 0;
  return FramePlan(*stream, 0, layer, *frame, nullptr).arena.used();
}

pom_status pom_stream_peek(const pom_stream* stream, int64_t evaluation, int64_t layer, const pom_frame* frame,
                           void* workspace, size_t bytes) {
  if (const Status s = check_frame(stream, evaluation, layer, frame, workspace, bytes); s != Status::ok) return int(s);
  const FramePlan plan(*stream, evaluation, layer, *frame, Arena::align(workspace));
  return int(run(stream->place, plan.mix, plan.memory, plan.bytes));
}

pom_status pom_stream_commit(pom_stream* stream, int64_t evaluation, int64_t layer, const pom_frame* frame,
                             void* workspace, size_t bytes) {
  if (const Status s = check_frame(stream, evaluation, layer, frame, workspace, bytes); s != Status::ok) return int(s);
  const FramePlan plan(*stream, evaluation, layer, *frame, Arena::align(workspace));
  return int(run(stream->place, plan.update, plan.memory, plan.bytes));
}
