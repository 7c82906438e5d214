// Products of matrices by the caller's function: where matrices are copied first, and where the results go.

#include "cpu/products.h"

#include <cstring>

#include "pom/engine.h"

namespace pom::cpu {
namespace {

constexpr int64_t kCopyTile = 32, kCopyTiles = 16;  // rows and columns of a tile; tiles of a task

template <class T>
void copy_tile(const Matrix& from, int64_t r0, int64_t r1, int64_t c0, int64_t c1, int64_t columns, T* to) {
  const T* const m = static_cast<const T*>(from.data);
  if (from.row_stride != 1 || r1 - r0 == 1) {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t c = c0; c < c1; ++c) to[r * columns + c] = m[r * from.row_stride + c * from.column_stride];
    return;
  }
  T tile[kCopyTile][kCopyTile];  // read column after column, written row after row
  for (int64_t c = c0; c < c1; ++c)
    for (int64_t r = r0; r < r1; ++r) tile[r - r0][c - c0] = m[r + c * from.column_stride];
  for (int64_t r = r0; r < r1; ++r) std::copy_n(tile[r - r0], c1 - c0, to + r * columns + c0);
}

}  // namespace

void copy_dense(const Matrix& from, int64_t rows, int64_t columns, int64_t element_size, void* to,
                const Executor& executor) {
  const int64_t across = (columns + kCopyTile - 1) / kCopyTile, tiles = (rows + kCopyTile - 1) / kCopyTile * across;
  parallel(executor, (tiles + kCopyTiles - 1) / kCopyTiles, [&](int64_t task) {
    for (int64_t i = task * kCopyTiles; i < std::min(tiles, (task + 1) * kCopyTiles); ++i) {
      const int64_t r = i / across * kCopyTile, c = i % across * kCopyTile;
      const int64_t r1 = std::min(rows, r + kCopyTile), c1 = std::min(columns, c + kCopyTile);
      const auto copy = [&](auto element) {
        copy_tile(from, r, r1, c, c1, columns, static_cast<decltype(element)*>(to));
      };
      element_size == 2 ? copy(uint16_t{}) : element_size == 4 ? copy(uint32_t{}) : copy(uint64_t{});
    }
  });
}

const void* Products::made_dense(Matrix m, Dtype dtype, int64_t rows, int64_t columns, char* room) const {
  if (m.column_stride == 1 && m.row_stride == columns) return m.data;
  copy_dense(m, rows, columns, size_of(dtype), room, executor_);
  return room;
}

const void* Products::multiply(const MatrixProduct& product, const Slot& slot) {
  if (linear_.multiply) return linear_.multiply(linear_.context, product, slot.number);
  multiply_to(product, slot.memory);
  return slot.memory;
}

void Products::multiply_to(const MatrixProduct& product, void* y) {
  const int64_t size = size_of(product.dtype), batch = std::max<int64_t>(1, product.batch),
                bytes = product.rows * product.outputs * size;
  if (linear_.multiply) {
    const void* const result = linear_.multiply(linear_.context, product, Linear::kSlots - 1);
    constexpr int64_t kBytes = 1 << 17;
    return parallel(executor_, (batch * bytes + kBytes - 1) / kBytes, [&](int64_t task) {
      std::memcpy(at(y, task * kBytes), at(result, task * kBytes), std::min(kBytes, batch * bytes - task * kBytes));
    });
  }
  pom_executor threads = {executor_.parallel_for, executor_.context};
  for (int64_t b = 0; b < batch && status_ == Status::ok; ++b) {
    Matrix x = product.x, weight = product.weight;
    x.data = at(x.data, b * x.batch_stride * size), weight.data = at(weight.data, b * weight.batch_stride * size);
    const pom_linear map = {int32_t(product.dtype),
                            product.rows,
                            product.inputs,
                            product.outputs,
                            made_dense(x, product.dtype, product.rows, product.inputs, dense_x_),
                            made_dense(weight, product.dtype, product.outputs, product.inputs, dense_weight_),
                            product.bias,
                            at(y, b * bytes)};
    status_ = Status(linear_.function ? linear_.function(linear_.context, &map) : pom_cpu_linear(&threads, &map));
  }
}

void Products::column_sums(const Matrix& m, Dtype dtype, int64_t rows, int64_t columns, void* sums) const {
  if (linear_.column_sums) return linear_.column_sums(linear_.context, dtype, m, rows, columns, sums);
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    parallel(executor_, (columns + kTileWidth - 1) / kTileWidth, [&](int64_t task) {
      double sum[kTileWidth] = {};
      const int64_t first = task * kTileWidth, width = std::min(kTileWidth, columns - first);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; ++c)
          sum[c] += number(static_cast<const T*>(m.data)[r * m.row_stride + (first + c) * m.column_stride]);
      std::copy_n(sum, width, static_cast<typename accumulator<T>::type*>(sums) + first);
    });
  });
}

}  // namespace pom::cpu
