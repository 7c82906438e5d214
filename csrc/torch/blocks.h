// Tokens cut into blocks, and what is summed over these.
#pragma once

#include <algorithm>
#include <vector>

#include "torch/tensors.h"

namespace pom_torch {

constexpr int64_t kBlockBytes = 1 << 20;      // of what is projected at once: it stays in the second cache
constexpr int64_t kBackBlockBytes = 2 << 20;  // of gradients, where every block adds to those of the weights
constexpr int64_t kResultBytes = kBlockBytes / 2;  // of results alone, a second time beside where they go
constexpr int64_t kLeastRows = 96, kMostRows = 1024;  // of a block: a product of fewer is slow, of more no faster

// Tokens that are projected at once: of whole samples, or of a part of one. The shape alone decides, so that neither
// threads nor neighbours in the batch change a sum.
struct Block {
  int64_t sample, samples, token, tokens;
  int64_t rows() const { return samples * tokens; }
};

template <class Body>
void each_block(const Tensor& x, int64_t width, Body body, int64_t bytes = kBlockBytes) {
  const int64_t batch = x.size(0), tokens = x.size(1), row = width * x.element_size();
  if (tokens == 0) return;
  const int64_t rows = std::clamp(bytes / std::max<int64_t>(1, row) / 64 * 64, kLeastRows, kMostRows);
  const int64_t samples = std::max<int64_t>(1, rows / tokens);
  for (int64_t b = 0; b < batch; b += samples)
    for (int64_t n = 0; n < tokens; n += rows)
      body(Block{b, std::min(samples, batch - b), n, std::min(rows, tokens - n)}, b * tokens + n);
}

// The groups of consecutive tokens of a sample, and those that have tokens in a block.
class Bounds {
 public:
  Bounds(const DenseArg& offsets, int64_t tokens, int64_t groups) : bounds_(groups + 1) {
    const int64_t* given = checked_offsets(offsets, tokens);
    for (int64_t g = 0; g <= groups; ++g)
      bounds_[g] = given ? given[g] : g == groups ? tokens : g * (tokens / std::max<int64_t>(1, groups));
  }
  int64_t count() const { return int64_t(bounds_.size()) - 1; }
  const int64_t* data() const { return count() > 1 ? bounds_.data() : nullptr; }

  struct Local {
    int64_t first, count;
    std::vector<int64_t> offsets;
    const int64_t* data() const { return count > 1 ? offsets.data() : nullptr; }
  };
  Local within(const Block& block) const {
    const int64_t begin = block.token, end = begin + block.tokens;
    int64_t first = std::upper_bound(bounds_.begin(), bounds_.end() - 1, begin) - bounds_.begin() - 1;
    int64_t last = std::lower_bound(bounds_.begin(), bounds_.end() - 1, end) - bounds_.begin();
    if (block.samples > 1) first = 0, last = count();  // states of several samples lie side by side
    Local local = {first, last - first, {}};
    for (int64_t g = first; g <= last; ++g) local.offsets.push_back(std::clamp(bounds_[g] - begin, int64_t(0), block.tokens));
    return local;
  }

 private:
  std::vector<int64_t> bounds_;
};

template <class Body>
void parallel(int64_t n, Body body) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

template <class Body>
void with_acc(const Tensor& like, Body body) {
  acc_of(like) == ScalarType::Double ? body(double{}) : body(float{});
}

// A sum of tensors of one shape, kept in the accumulator's dtype whatever theirs is.
class Sum {
 public:
  void add(const Tensor& part) {
    if (!sum_)
      sum_ = torch::stable::to(part, acc_of(part));
    else if (part.scalar_type() != acc_of(part) || !part.is_contiguous() || !sum_->is_contiguous())
      sum_ = torch::stable::subtract(*sum_, part, -1);
    else
      with_acc(part, [&](auto acc) {
        auto* const sum = static_cast<decltype(acc)*>(sum_->mutable_data_ptr());
        const auto* const p = static_cast<const decltype(acc)*>(part.const_data_ptr());
        torch::stable::parallel_for(0, part.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) sum[i] += p[i];
        });
      });
  }
  // In the dtype of `like`; zeros of the shape where nothing was added.
  Tensor as(const Tensor& like, std::initializer_list<int64_t> shape) const {
    return sum_ ? torch::stable::to(*sum_, like.scalar_type()) : torch::stable::new_zeros(like, shape);
  }

 private:
  Optional sum_;
};

}  // namespace pom_torch
