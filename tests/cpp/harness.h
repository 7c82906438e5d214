// What the tests of the torch-free library call it with: arrays and workspaces in heap blocks of exactly their size, so
// that the address sanitizer sees any overrun, and an executor that runs tasks in the opposite order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
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

// Numbers of one dtype. The bytes are those of NaNs until something is written.
class Buffer {
 public:
  Buffer() : Buffer(pom::Dtype::f64, 0) {}
  Buffer(pom::Dtype dtype, int64_t size) : dtype_(dtype), size_(size), memory_(new char[bytes()]) { forget(); }
  // Rounds the values to what the dtype holds.
  Buffer(pom::Dtype dtype, Array& values) : Buffer(dtype, int64_t(values.size())) {
    for (int64_t i = 0; i < size_; ++i) set(i, values[i]), values[i] = get(i);
  }

  int64_t size() const { return size_; }
  size_t bytes() const { return size_ * size_of(dtype_); }
  pom::Dtype dtype() const { return dtype_; }
  void* data() const { return memory_.get(); }
  double* doubles() const { return static_cast<double*>(data()); }
  void forget() { std::memset(memory_.get(), 0xff, bytes()); }
  bool untouched() const {
    return std::all_of(memory_.get(), memory_.get() + bytes(), [](char c) { return c == '\xff'; });
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
  template <class T>
  T& at(int64_t i) const {
    return static_cast<T*>(data())[i];
  }

  pom::Dtype dtype_;
  int64_t size_;
  std::unique_ptr<char[]> memory_;
};

// Rows (batch, tokens, width) at strides of their own.
enum class Layout { dense, padded, one_sample, one_row };
struct Rows {
  Buffer buffer;
  int64_t batch_stride = 0, token_stride = 0;

  Rows() = default;
  // The values become what is read at these strides.
  Rows(pom::Dtype dtype, Array& values, int64_t batch, int64_t tokens, int64_t width, Layout layout)
      : batch_stride(tokens * width), token_stride(width) {
    if (layout == Layout::padded) token_stride = width + 3, batch_stride = tokens * token_stride + 5;
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

// As many bytes as asked for, at an odd address.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : block_(new char[bytes + 1]) { std::memset(block_.get(), 0xff, bytes + 1); }
  void* data() const { return block_.get() + 1; }

 private:
  std::unique_ptr<char[]> block_;
};

inline void run_reversed(void*, int64_t n, void (*body)(void*, int64_t), void* argument) {
  std::atomic<int64_t> left{n};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&] {
      for (int64_t task; (task = --left) >= 0;) body(argument, task);
    });
  for (std::thread& thread : threads) thread.join();
}

// The operation that takes these arguments.
inline pom::Status call(const pom::StateArgs& args, void* memory, size_t bytes, const pom::Executor& executor = {}) {
  return pom::cpu::state(args, memory, bytes, executor);
}
inline pom::Status call(const pom::StateBackwardArgs& args, void* memory, size_t bytes,
                        const pom::Executor& executor = {}) {
  return pom::cpu::state_backward(args, memory, bytes, executor);
}
inline pom::Status call(const pom::ReadoutArgs& args, void* memory, size_t bytes, const pom::Executor& executor = {}) {
  return pom::cpu::readout(args, memory, bytes, executor);
}
inline pom::Status call(const pom::ReadoutBackwardArgs& args, void* memory, size_t bytes,
                        const pom::Executor& executor = {}) {
  return pom::cpu::readout_backward(args, memory, bytes, executor);
}
inline pom::Status call(const pom::CausalArgs& args, void* memory, size_t bytes, const pom::Executor& executor = {}) {
  return pom::cpu::causal_mix(args, memory, bytes, executor);
}
inline pom::Status call(const pom::CausalBackwardArgs& args, void* memory, size_t bytes,
                        const pom::Executor& executor = {}) {
  return pom::cpu::causal_mix_backward(args, memory, bytes, executor);
}

using Outputs = std::vector<Buffer*>;

// Fills the outputs twice, task after task and reversed on several threads: the same bits.
template <class Args>
void run(const std::string& name, const Args& args, const Outputs& outputs) {
  std::vector<std::string> serial;
  for (const bool reversed : {false, true}) {
    for (Buffer* out : outputs) out->forget();
    const size_t bytes = pom::cpu::workspace(args);
    const Workspace workspace(bytes);
    const pom::Status status =
        call(args, workspace.data(), bytes, reversed ? pom::Executor{run_reversed} : pom::Executor{});
    check::expect(status == pom::Status::ok, "%s: %s", name.c_str(), pom::message(status));
    for (size_t i = 0; i < outputs.size(); ++i) {
      const std::string bits(static_cast<char*>(outputs[i]->data()), outputs[i]->bytes());
      if (reversed)
        check::expect(bits == serial[i], "%s: output %d depends on the executor", name.c_str(), int(i));
      else
        serial.push_back(bits);
    }
  }
}

// Every number is near the wanted one, relative to it and to the root mean square of its part. The last dimension has
// `last` numbers in `parts` parts: the factors of the product form, or the powers of the coefficients, differ in size.
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
