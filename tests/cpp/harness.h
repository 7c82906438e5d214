// How tests call the torch-free library: with arrays and workspaces in which every overrun shows, and in several orders
// of execution, which must not change results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "device.h"
#include "naive.h"
#include "pom/pom.h"

using naive::Array;

inline double uniform(double low, double high) {
  static std::mt19937 random;
  return low + (high - low) * double(random()) / 4294967296.0;
}
inline int64_t choose(int64_t n) { return int64_t(uniform(0, double(n))); }
inline Array draw(int64_t n, double low, double high) {
  Array x(n);
  for (double& value : x) value = uniform(low, high);
  return x;
}

inline size_t size_of(pom::Dtype dtype) { return dtype == pom::Dtype::f64 ? 8 : dtype == pom::Dtype::f32 ? 4 : 2; }

// Numbers of one dtype. All bytes are 0xff (NaN) until they are written.
class Buffer {
 public:
  // Whether the next buffers start at a multiple of 16 bytes or one element after it. If until_odd is not negative,
  // that many buffers are made before one that starts 8 bytes after it.
  inline static bool aligned = true;
  inline static int until_odd = -1;

  Buffer() : Buffer(pom::Dtype::f64, 0) {}
  Buffer(pom::Dtype dtype, int64_t size) : dtype_(dtype), size_(size), memory_(bytes(), offset(), choose(2) == 0) {
    clear();
  }
  // Rounds the values to the dtype.
  Buffer(pom::Dtype dtype, Array& values) : Buffer(dtype, int64_t(values.size())) {
    for (int64_t i = 0; i < size_; ++i) set(i, values[i]), values[i] = get(i);
  }

  int64_t size() const { return size_; }
  size_t bytes() const { return size_ * size_of(dtype_); }
  pom::Dtype dtype() const { return dtype_; }
  void* data() const { return memory_.data(); }
  double* doubles() const { return static_cast<double*>(data()); }
  void clear() { std::memset(data(), 0xff, bytes()); }
  bool untouched() const {
    return std::all_of(memory_.data(), memory_.data() + bytes(), [](char c) { return c == '\xff'; });
  }

  double get(int64_t i) const {
    switch (dtype_) {
      case pom::Dtype::f64:
        return at<double>(i);
      case pom::Dtype::f32:
        return at<float>(i);
      case pom::Dtype::bf16:
        return pom::to_float(at<pom::bf16>(i));
      default:
        return pom::to_float(at<pom::f16>(i));
    }
  }
  void set(int64_t i, double x) {
    switch (dtype_) {
      case pom::Dtype::f64:
        at<double>(i) = x;
        break;
      case pom::Dtype::f32:
        at<float>(i) = float(x);
        break;
      case pom::Dtype::bf16:
        at<pom::bf16>(i) = pom::to_bf16(float(x));
        break;
      default:
        at<pom::f16>(i) = pom::to_f16(float(x));
    }
  }

 private:
  size_t offset() const {
    if (size_ && until_odd-- == 0) return 8;
    return aligned ? 0 : size_of(dtype_);
  }
  template <class T>
  T& at(int64_t i) const {
    return static_cast<T*>(data())[i];
  }

  pom::Dtype dtype_;
  int64_t size_;
  Memory memory_;
};

// Rows (batch, tokens, width) with strides.
enum class Layout { dense, padded, spaced, one_sample, one_row, by_four, odd_rows, odd_samples };
struct Rows {
  // If not negative, that many rows are made before some with layout `odd`.
  inline static int until_odd = -1;
  inline static Layout odd = Layout::odd_rows;

  Buffer buffer;
  int64_t batch_stride = 0, token_stride = 0;

  Rows() = default;
  // Replaces the values by what is read back at these strides.
  Rows(pom::Dtype dtype, Array& values, int64_t batch, int64_t tokens, int64_t width, Layout layout)
      : batch_stride(tokens * width), token_stride(width) {
    const int64_t half = 8 / size_of(dtype);  // of 16 bytes
    if (until_odd-- == 0) layout = odd;
    if (layout == Layout::padded) token_stride = width + 3, batch_stride = tokens * token_stride + 5;
    if (layout == Layout::spaced) token_stride = width + 8, batch_stride = tokens * token_stride + 16;
    if (layout == Layout::by_four) token_stride = width + 4, batch_stride = tokens * token_stride + 4;
    if (layout == Layout::odd_rows) token_stride = width + half, batch_stride = tokens * token_stride;
    if (layout == Layout::odd_samples) batch_stride = tokens * width + half;
    if (layout == Layout::one_sample || layout == Layout::one_row) batch_stride = 0;
    if (layout == Layout::one_row) token_stride = 0;
    const bool empty = batch * tokens == 0;
    buffer = Buffer(dtype, empty ? 0 : (batch - 1) * batch_stride + (tokens - 1) * token_stride + width);
    auto at = [&](int64_t i) {
      return i / width / tokens * batch_stride + i / width % tokens * token_stride + i % width;
    };
    for (int64_t i = 0; i < int64_t(values.size()); ++i) buffer.set(at(i), values[i]);
    for (int64_t i = 0; i < int64_t(values.size()); ++i) values[i] = buffer.get(at(i));
  }
};

// Exactly as many bytes as requested, at an odd address.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : memory_(bytes + 1) { std::memset(memory_.data(), 0xff, bytes + 1); }
  void* data() const { return memory_.data() + 1; }

 private:
  Memory memory_;
};

using Outputs = std::vector<Buffer*>;

// Copies the bytes to another buffer of the same size and dtype.
inline void copy(const Buffer& from, Buffer& to) { std::memcpy(to.data(), from.data(), from.bytes()); }

inline std::string bits(const Buffer& buffer) { return {static_cast<char*>(buffer.data()), buffer.bytes()}; }

template <class Args>
void run_once(const std::string& name, const Args& args, bool ascending) {
  const size_t bytes = device::workspace(args);
  const Workspace workspace(bytes);
  const pom::Status status = call(args, workspace.data(), bytes, in_order(ascending));
  check::expect(status == pom::Status::ok, "%s: %s", name.c_str(), pom::message(status));
}

// Fills the outputs twice, in ascending order and in another one, and expects the same bits.
template <class Args>
void run(const std::string& name, const Args& args, const Outputs& outputs) {
  std::vector<std::string> first;
  for (const bool ascending : {true, false}) {
    for (Buffer* out : outputs) out->clear();
    run_once(name, args, ascending);
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (ascending)
        first.push_back(bits(*outputs[i]));
      else
        check::expect(bits(*outputs[i]) == first[i], "%s: output %d depends on the order", name.c_str(), int(i));
    }
  }
}

// Expects every number near the wanted one, relative to it and to the root mean square of its part. The last dimension
// has `last` numbers in `parts` parts, since factors of the product form, or powers of the coefficients, differ in
// size.
inline void expect_close(const std::string& name, const Buffer& got, const Array& wanted, int64_t last, int64_t parts,
                         double tolerance) {
  constexpr double kSmallest[] = {0x1p-149, 0, 0x1p-133, 0x1p-24};
  check::expect(got.size() == int64_t(wanted.size()), "%s: %d numbers, not %d", name.c_str(), int(got.size()),
                int(wanted.size()));
  Array squares(parts);
  auto part = [&](int64_t i) { return i % last * parts / last; };
  for (int64_t i = 0; i < got.size(); ++i) squares[part(i)] += wanted[i] * wanted[i];
  for (int64_t i = 0; i < got.size(); ++i) {
    const double size = std::sqrt(squares[part(i)] / (double(got.size()) / double(parts)));
    const double error = std::abs(got.get(i) - wanted[i]);
    const double allowed = tolerance * (std::abs(wanted[i]) + size) + kSmallest[int(got.dtype())];
    check::expect(error <= allowed, "%s: number %d is %.9g, not %.9g; off by %.2g, allowed %.2g", name.c_str(), int(i),
                  got.get(i), wanted[i], error, allowed);
  }
}
