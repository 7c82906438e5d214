// One layer: projections by the caller's matrix product, and the frame between them.

#include <algorithm>

#include "engine/layout.h"
#include "engine/overlap.h"

namespace pom::engine {
namespace {

// Context and gates of a token side by side, as one product makes them; what is read; the frame's workspace.
struct StepPlan {
  Arena arena;
  pom_linear in, out;
  pom_frame frame = {};
  size_t bytes;
  char* memory;

  StepPlan(const pom_stream& stream, int64_t layer, const pom_step& step, void* workspace) : arena(workspace) {
    const pom_layer& shape = stream.shape.layers[layer];
    const int64_t batch = stream.shape.batch, size = size_of(dtype(shape)), rows = batch * step.tokens;
    const int64_t width = channels(shape), both = width + gates(shape);
    char *const projected = arena.take<char>(rows * both * size), *const read = arena.take<char>(rows * width * size);
    in = {shape.dtype, rows, step.dim, both, step.x, step.in_weight, step.in_bias, projected};
    out = {shape.dtype, rows, width, step.dim, read, step.out_weight, step.out_bias, step.y};
    frame.tokens = frame.queries = step.tokens;
    frame.u = projected, frame.gate = projected ? projected + width * size : nullptr, frame.y = read;
    frame.u_token_stride = frame.gate_token_stride = both;
    frame.u_batch_stride = frame.gate_batch_stride = step.tokens * both;
    frame.coeff = step.coeff, frame.rotary = step.rotary, frame.gate_rotary = step.gate_rotary;
    bytes = pom_stream_workspace(&stream, layer, &frame);
    memory = arena.take<char>(int64_t(bytes));
  }
};

Status check_step(const pom_stream* stream, int64_t evaluation, int64_t layer, const pom_step* step, void* workspace,
                  size_t bytes) {
  if (const Status s = check(stream, evaluation, layer); s != Status::ok) return s;
  if (!step) return Status::null_pointer;
  if (step->tokens < 0 || step->dim < 1) return Status::bad_size;
  const pom_layer& shape = stream->shape.layers[layer];
  const int64_t tokens = stream->shape.batch * step->tokens, row = step->dim * size_of(dtype(shape));
  if (!step->in_weight || !step->out_weight || (tokens && !(step->x && step->y))) return Status::null_pointer;
  if (!step->linear && stream->place.device != POM_DEVICE_CPU) return Status::null_pointer;
  if (!workspace || bytes < pom_stream_step_workspace(stream, layer, step)) return Status::workspace_too_small;
  const Range y(step->y, tokens * row), x(step->x, tokens * row), scratch(workspace, int64_t(bytes)),
      memory(stream->memory, int64_t(pom_stream_bytes(&stream->shape)));
  const bool overlap = y.overlaps(x) || y.overlaps(memory) || y.overlaps(scratch) || scratch.overlaps(x);
  return overlap ? Status::overlap : Status::ok;
}

}  // namespace
}  // namespace pom::engine

using namespace pom;
using namespace pom::engine;

size_t pom_stream_step_workspace(const pom_stream* stream, int64_t layer, const pom_step* step) {
  if (check(stream, 0, layer) != Status::ok || !step) return 0;
  return StepPlan(*stream, layer, *step, nullptr).arena.used();
}

pom_status pom_stream_step(pom_stream* stream, int64_t evaluation, int64_t layer, const pom_step* step, int32_t commit,
                           void* workspace, size_t bytes) {
  if (const Status s = check_step(stream, evaluation, layer, step, workspace, bytes); s != Status::ok) return int(s);
  const StepPlan plan(*stream, layer, *step, Arena::align(workspace));
  pom_executor executor = stream->place.executor;
  const pom_linear_function linear = step->linear ? step->linear : pom_cpu_linear;
  void* const context = step->linear ? step->linear_context : &executor;
  if (const pom_status s = linear(context, &plan.in); s != POM_OK) return s;
  const pom_status read = commit ? pom_stream_commit(stream, evaluation, layer, &plan.frame, plan.memory, plan.bytes)
                                 : pom_stream_peek(stream, evaluation, layer, &plan.frame, plan.memory, plan.bytes);
  return read == POM_OK ? linear(context, &plan.out) : read;
}
