// The engine for C++: a `pom_stream` of pom/engine.h with its functions as members. Nothing more is in it, nothing is
// owned: the caller brings the memory, keeps it and the layers as long as the stream is used, and gives it back.
#pragma once

#include "pom/engine.h"
#include "pom/pom.h"

namespace pom {

class Stream {
 public:
  static size_t bytes(const pom_shape& shape) { return pom_stream_bytes(&shape); }

  Status open(const pom_shape& shape, const pom_place& place, void* memory, size_t bytes) {
    return Status(pom_stream_open(&stream_, &shape, &place, memory, bytes));
  }

  size_t workspace(int64_t layer, const pom_frame& frame) const {
    return pom_stream_workspace(&stream_, layer, &frame);
  }
  Status peek(int64_t layer, const pom_frame& frame, void* workspace, size_t bytes, int64_t evaluation = 0) const {
    return Status(pom_stream_peek(&stream_, evaluation, layer, &frame, workspace, bytes));
  }
  Status commit(int64_t layer, const pom_frame& frame, void* workspace, size_t bytes, int64_t evaluation = 0) {
    return Status(pom_stream_commit(&stream_, evaluation, layer, &frame, workspace, bytes));
  }

  size_t workspace(int64_t layer, const pom_step& step) const {
    return pom_stream_step_workspace(&stream_, layer, &step);
  }
  Status step(int64_t layer, const pom_step& step, bool commit, void* workspace, size_t bytes, int64_t evaluation = 0) {
    return Status(pom_stream_step(&stream_, evaluation, layer, &step, commit, workspace, bytes));
  }

  // All pointers null where there is no such layer or evaluation.
  pom_state state(int64_t layer, int64_t evaluation = 0) const {
    pom_state state = {};
    pom_stream_state(&stream_, evaluation, layer, &state);
    return state;
  }
  Status reset() { return Status(pom_stream_reset(&stream_)); }
  Status fork_to(Stream& to) const { return Status(pom_stream_fork(&stream_, &to.stream_)); }

  size_t saved_bytes() const { return pom_stream_saved_bytes(&stream_); }
  Status save(void* file, size_t bytes) const { return Status(pom_stream_save(&stream_, file, bytes)); }
  Status load(const void* file, size_t bytes) { return Status(pom_stream_load(&stream_, file, bytes)); }

  pom_place& place() { return stream_.place; }

 private:
  pom_stream stream_ = {};
};

}  // namespace pom
