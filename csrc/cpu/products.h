// Products of matrices by the caller's function, and sums of them.
#pragma once

#include "cpu/elements.h"
#include "cpu/plan.h"

namespace pom::cpu {

inline Matrix dense(const void* data, int64_t columns) { return {data, columns, 1}; }
inline Matrix transposed(const Matrix& m) { return {m.data, m.column_stride, m.row_stride, m.batch_stride}; }

// Copies a matrix to rows without gaps, tile by tile: also fast if it is the columns that have none.
void copy_dense(const Matrix& from, int64_t rows, int64_t columns, int64_t element_size, void* to,
                const Executor& executor);

// Room for the result of a product, if the caller's function brings none.
struct Slot {
  int number;
  char* memory;
};

// After a status of the caller's function other than ok, nothing is multiplied any more.
class Products {
 public:
  // Elements of the largest x and the largest weight that may have to be made dense.
  struct Most {
    int64_t x, weight;
  };
  Products(const Linear& linear, Dtype dtype, const Most& most, Arena& arena, const Executor& executor)
      : linear_(linear),
        executor_(executor),
        dense_x_(slot(0, dtype, most.x, arena).memory),
        dense_weight_(slot(0, dtype, most.weight, arena).memory) {}

  Slot slot(int number, Dtype dtype, int64_t elements, Arena& arena) const {
    return {number, linear_.multiply ? nullptr : arena.take<char>(elements * size_of(dtype))};
  }
  // The result, which stays until the next product of the same slot.
  const void* multiply(const MatrixProduct& product, const Slot& slot);
  // The result in `y`, by way of the last slot if the caller's function has its own room.
  void multiply_to(const MatrixProduct& product, void* y);
  // sums (columns), acc
  void column_sums(const Matrix& matrix, Dtype dtype, int64_t rows, int64_t columns, void* sums) const;

  Status status() const { return status_; }

 private:
  const void* made_dense(Matrix m, Dtype dtype, int64_t rows, int64_t columns, char* room) const;

  Linear linear_;
  Executor executor_;
  char *dense_x_, *dense_weight_;
  Status status_ = Status::ok;
};

// A sum of arrays, in the accumulator's type whatever theirs is.
template <class Acc>
class Sum {
 public:
  Sum(int64_t elements, Arena& arena, const Executor& executor)
      : elements_(elements), sum_(arena.take<Acc>(elements)), executor_(executor) {}

  void add(const void* part, Dtype dtype) {
    with_type(dtype, [&](auto element) {
      const auto* const p = static_cast<const decltype(element)*>(part);
      each([&](int64_t i) { sum_[i] = empty_ ? Acc(number(p[i])) : sum_[i] + Acc(number(p[i])); });
    });
    empty_ = false;
  }
  // Zeros if nothing was added; to null, nothing.
  void write(void* out, Dtype dtype) const {
    if (!out) return;
    with_type(dtype, [&](auto element) {
      auto* const to = static_cast<decltype(element)*>(out);
      each([&](int64_t i) { put(empty_ ? Acc(0) : sum_[i], to + i); });
    });
  }

 private:
  template <class Body>
  void each(Body body) const {
    constexpr int64_t kElements = 1 << 14;
    parallel(executor_, (elements_ + kElements - 1) / kElements, [&](int64_t task) {
      for (int64_t i = task * kElements; i < std::min(elements_, (task + 1) * kElements); ++i) body(i);
    });
  }

  int64_t elements_;
  Acc* sum_;
  Executor executor_;
  bool empty_ = true;
};

}  // namespace pom::cpu
