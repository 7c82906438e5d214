// Tokens cut into blocks, which are projected one after the other: the projections of a block stay in the processor's
// cache.
#pragma once

#include "cpu/elements.h"
#include "cpu/plan.h"

namespace pom::cpu {

constexpr int64_t kBlockBytes = 1 << 20;                // of the projections of a block: they stay in the second cache
constexpr int64_t kBackwardBlockBytes = 2 << 20;        // with gradients: every block adds to those of the weights
constexpr int64_t kResultBlockBytes = kBlockBytes / 2;  // of results alone, which are copied to where they belong
constexpr int64_t kLeastRows = 96, kMostRows = 1024;    // of a block: a product of fewer is slow, of more no faster

// Tokens of whole samples, or of a part of one.
struct Block {
  int64_t sample, samples, token, tokens;
  int64_t first;  // row of the first token among those of all samples
  int64_t rows() const { return samples * tokens; }
};

// The shape alone decides, so that neither threads nor neighbours in the batch change a sum.
class Blocks {
 public:
  // row_bytes: of the projections of a token. Samples share a block only if all tokens are at one stride.
  Blocks(int64_t batch, int64_t tokens, int64_t row_bytes, bool evenly_spaced, int64_t bytes = kBlockBytes)
      : batch_(batch), tokens_(tokens) {
    rows_ = std::clamp(bytes / std::max<int64_t>(1, row_bytes) / 64 * 64, kLeastRows, kMostRows);
    samples_ = evenly_spaced ? std::max<int64_t>(1, rows_ / std::max<int64_t>(1, tokens)) : 1;
    per_sample_ = (tokens + rows_ - 1) / rows_;
  }
  int64_t count() const { return (batch_ + samples_ - 1) / samples_ * per_sample_; }
  int64_t most_samples() const { return std::min(samples_, batch_); }
  int64_t most_rows() const { return most_samples() * std::min(rows_, tokens_); }

  Block operator[](int64_t i) const {
    const int64_t sample = i / per_sample_ * samples_, token = i % per_sample_ * rows_;
    return {sample, std::min(samples_, batch_ - sample), token, std::min(rows_, tokens_ - token),
            sample * tokens_ + token};
  }

 private:
  int64_t batch_, tokens_, rows_, samples_, per_sample_;
};

inline bool evenly_spaced(const Tokens& x, int64_t batch, int64_t tokens) {
  return !x.data || batch <= 1 || x.batch_stride == tokens * x.token_stride;
}

inline Matrix rows_of(const Tokens& x, const Block& block, Dtype dtype) {
  const int64_t elements = block.sample * x.batch_stride + block.token * x.token_stride;
  return {at(x.data, elements * size_of(dtype)), x.token_stride, x.channel_stride};
}

inline Rotary rotary_of(const Rotary& rotary, const Block& block, int64_t acc_bytes) {
  const int64_t bytes = block.token * rotary.axes * rotary.half * acc_bytes;
  return {at(rotary.cos, bytes), at(rotary.sin, bytes), rotary.half, rotary.axes};
}

// The groups that have tokens in a block, and where these begin and end in it.
struct LocalGroups {
  int64_t first, count;
  const int64_t* bounds;  // (count + 1)
  const int64_t* offsets() const { return count > 1 ? bounds : nullptr; }
  Groups groups() const { return {count, offsets()}; }
};

class BlockGroups {
 public:
  BlockGroups(const Segments& segments, Arena& arena)
      : segments_(segments), bounds_(arena.take<int64_t>(segments.count + 1)) {}

  int64_t count() const { return segments_.count; }
  // Valid until the next call.
  LocalGroups of(const Block& block) const {
    const int64_t begin = block.token, end = begin + block.tokens;
    int64_t first = begin_before(begin + 1) - 1, last = begin_before(end);
    if (block.samples > 1) first = 0, last = count();  // states of several samples lie side by side
    for (int64_t g = first; bounds_ && g <= last; ++g)
      bounds_[g - first] =
          std::clamp((g < count() ? segments_.begin(g) : segments_.tokens) - begin, int64_t(0), block.tokens);
    return {first, last - first, bounds_};
  }

 private:
  // Groups that begin before a token.
  int64_t begin_before(int64_t token) const {
    int64_t low = 0, high = count();
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (segments_.begin(middle) < token)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  Segments segments_;
  int64_t* bounds_;
};

}  // namespace pom::cpu
