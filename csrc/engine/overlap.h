// Whether two arrays overlap.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pom::engine {

struct Range {
  const char* begin = nullptr;
  int64_t bytes = 0;

  Range(const void* data, int64_t bytes) : begin(static_cast<const char*>(data)), bytes(data ? bytes : 0) {}
  // Rows (batch, tokens, width) at strides that are not negative.
  Range(const void* data, int64_t batch, int64_t tokens, int64_t width, int64_t batch_stride, int64_t token_stride,
        int64_t size)
      : Range(data, batch > 0 && tokens > 0 ? ((batch - 1) * batch_stride + (tokens - 1) * token_stride + width) * size
                                            : 0) {}

  bool overlaps(const Range& other) const {
    return bytes && other.bytes && begin < other.begin + other.bytes && other.begin < begin + bytes;
  }
};

}  // namespace pom::engine
