// Streams and frames for tests of the engine, built from the inputs of the operations' tests.
#pragma once

#include <memory>

#include "expectations.h"
#include "pom/engine.hpp"

// Frames of a layer, and their Inputs.
struct Frame {
  Inputs in;
  Buffer y;
  pom_frame view;

  explicit Frame(const Case& c) : in(c), y(c.dtype, c.shape.batch * c.queries() * c.channels()) {
    view = {c.shape.tokens,
            in.features.u,
            in.features.u_batch_stride,
            in.features.u_token_stride,
            in.features.coeff,
            in.features.weight,
            rotary(in.features.rotary),
            c.queries(),
            in.gates.gate,
            in.gates.gate_batch_stride,
            in.gates.gate_token_stride,
            rotary(in.gates.rotary),
            y.data()};
  }

 private:
  static pom_rotary rotary(const Rotary& r) { return {r.cos, r.sin, r.half, r.axes}; }
};

inline pom_layer layer_of(const Case& c, size_t kept = 0) {
  return {int32_t(c.form), c.degree, int32_t(c.dtype), int32_t(c.heads), c.shape.width, kept};
}

inline pom_place place(bool ascending = true) {
  const Order order = in_order(ascending);
#ifdef POM_TEST_CUDA
  return {POM_DEVICE_CUDA, {}, order};
#else
  return {POM_DEVICE_CPU, {order.parallel_for, order.context}, nullptr};
#endif
}

// An open stream with exactly as much memory as it asks for.
struct OpenStream {
  std::vector<pom_layer> layers;
  pom_shape shape;
  Workspace memory;
  Stream stream;

  OpenStream(std::vector<pom_layer> given, int64_t batch, int64_t evaluations = 1)
      : layers(std::move(given)),
        shape{layers.data(), int64_t(layers.size()), batch, evaluations},
        memory(Stream::bytes(shape)) {
    const Status status = stream.open(shape, place(), memory.data(), Stream::bytes(shape));
    check::expect(status == Status::ok, "open: %s", message(status));
  }
  OpenStream(const OpenStream& other) = delete;

  // The whole stream as saved bytes.
  std::string bits() const {
    std::string file(stream.saved_bytes(), 0);
    const Status status = stream.save(file.data(), file.size());
    check::expect(status == Status::ok, "save: %s", message(status));
    return file;
  }
};

enum class Act { peek, commit };

// Peeks at or commits a frame; `y` then holds the readout of the state.
inline void act(const std::string& name, Act act, OpenStream& s, int64_t layer, Frame& frame, int64_t evaluation = 0,
                bool ascending = true) {
  s.stream.place() = place(ascending);
  frame.y.clear();
  const size_t bytes = s.stream.workspace(layer, frame.view);
  const Workspace workspace(bytes);
  const Status status = act == Act::peek ? s.stream.peek(layer, frame.view, workspace.data(), bytes, evaluation)
                                         : s.stream.commit(layer, frame.view, workspace.data(), bytes, evaluation);
  check::expect(status == Status::ok, "%s: %s", name.c_str(), message(status));
}

inline StateBuffers state_of(const OpenStream& s, const Case& c, int64_t layer, int64_t evaluation = 0) {
  const pom_state state = s.stream.state(layer, evaluation);
  StateBuffers out(c.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32, c.shape.batch, c.channels());
  std::memcpy(out.total.data(), state.total, out.total.bytes());
  std::memcpy(out.residual.data(), state.residual, out.residual.bytes());
  std::memcpy(out.count.data(), state.count, out.count.bytes());
  return out;
}
