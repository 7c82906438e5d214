// No check sees offsets in a GPU's memory. Whatever they are, the CUDA kernels end, stay within their arrays and spoil
// no later call; and if they only leave out tokens at either end, the results for the others are right.

#include <unistd.h>

#include <cmath>
#include <vector>

#include "check.h"
#include "cuda_on_cpu.h"
#include "guarded.h"
#include "pom/pom.h"

using check::expect;
using check::section;
using namespace pom;

namespace {

constexpr int64_t kTokens = 1024, kWidth = 40, kBatch = 2, kAll = kBatch * kTokens * kWidth;
constexpr int kDegree = 2;

template <class T>
struct Numbers {
  GuardedBuffer buffer;
  explicit Numbers(int64_t n) : buffer(n * sizeof(T)) {}
  T* data() const { return reinterpret_cast<T*>(buffer.data()); }
  T& operator[](int64_t i) const { return data()[i]; }
};

struct Calls {
  Numbers<float> u{kAll}, coeff{kWidth * kDegree}, grad_y{kAll};
  Numbers<char> memory{1 << 21};

  Calls() {
    for (int64_t i = 0; i < kAll; ++i) u[i] = std::sin(0.37f * float(i)), grad_y[i] = std::cos(0.11f * float(i));
    for (int64_t i = 0; i < kWidth * kDegree; ++i) coeff[i] = 0.5f + 0.01f * float(i);
  }

  Features features() const {
    Features f;
    f.form = Form::power, f.degree = kDegree, f.dtype = Dtype::f32;
    f.batch = kBatch, f.tokens = kTokens, f.width = kWidth;
    f.u = u.data(), f.u_batch_stride = kTokens * kWidth, f.u_token_stride = kWidth;
    f.coeff = coeff.data();
    return f;
  }
  Gates gates() const {
    Gates g;
    g.form = Form::power, g.dtype = Dtype::f32, g.batch = kBatch, g.tokens = kTokens, g.channels = kWidth;
    g.gate = u.data(), g.gate_batch_stride = kTokens * kWidth, g.gate_token_stride = kWidth;
    return g;
  }

  // All outputs of the four operations, one after the other.
  std::vector<float> run(const std::vector<int64_t>& given, bool cumulative) const {
    const int64_t groups = int64_t(given.size()) - 1, states = kBatch * groups * kWidth;
    Numbers<int64_t> offsets(groups + 1);
    std::copy(given.begin(), given.end(), offsets.data());
    Numbers<float> total(states), residual(states), grad_u(kAll), grad_coeff(kWidth * kDegree), y(kAll),
        grad_gate(kAll), grad_total(states), ones(states), zeros(states);
    Numbers<double> count(kBatch * groups), counts(kBatch * groups);
    for (int64_t i = 0; i < states; ++i) ones[i] = 1, zeros[i] = 0;
    for (int64_t i = 0; i < kBatch * groups; ++i) counts[i] = 2;
    for (Numbers<float>* out : {&grad_u, &y, &grad_gate}) std::fill(out->data(), out->data() + kAll, 0.0f);
    Groups g;
    g.count = groups, g.offsets = offsets.data(), g.cumulative = cumulative;
    const StateView state = {ones.data(), zeros.data(), counts.data()};
    const StateArgs forward = {features(), g, {total.data(), residual.data(), count.data()}, {}};
    const StateBackwardArgs backward = {features(), g, ones.data(), grad_u.data(), grad_coeff.data()};
    const ReadoutArgs read = {gates(), groups, offsets.data(), state, y.data(), {}};
    const ReadoutBackwardArgs read_backward = {gates(), groups,           offsets.data(),
                                               state,   grad_y.data(),    kTokens * kWidth,
                                               kWidth,  grad_gate.data(), grad_total.data()};
    launched(cuda::state(forward, memory.data(), memory.buffer.bytes(), nullptr));
    launched(cuda::state_backward(backward, memory.data(), memory.buffer.bytes(), nullptr));
    launched(cuda::readout(read, memory.data(), memory.buffer.bytes(), nullptr));
    launched(cuda::readout_backward(read_backward, memory.data(), memory.buffer.bytes(), nullptr));
    std::vector<float> all;
    for (const Numbers<float>* out : {&total, &grad_u, &grad_coeff, &y, &grad_gate, &grad_total})
      all.insert(all.end(), out->data(), out->data() + out->buffer.bytes() / sizeof(float));
    return all;
  }
  static void launched(Status s) { expect(s == Status::ok, "%s", message(s)); }
};

const std::vector<int64_t> kSound = {0, 10, kTokens};

void test_unsound(const Calls& calls) {
  const std::vector<float> right = calls.run(kSound, false), whole = calls.run({0, kTokens}, false);
  const std::vector<std::vector<int64_t>> unsound = {
      {0, 10, 300}, {0, 600, 200},   {700, 900, kTokens},     {0, 394, 812, 191, 414, 375, 279, 220, kTokens},
      {kTokens, 0}, {500, 500, 500}, {-5, 3000, 17, -1, 2000}};
  for (const std::vector<int64_t>& offsets : unsound)
    for (bool cumulative : {false, true}) {
      calls.run(offsets, cumulative);
      expect(calls.run(kSound, false) == right && calls.run({0, kTokens}, false) == whole,
             "offsets %d, %d, ... spoil a later call", int(offsets[0]), int(offsets[1]));
    }
}

// Groups that leave out tokens at either end give the results of a tensor cut to the others.
void test_left_out(const Calls& calls) {
  const std::vector<float> whole = calls.run({0, 100, 300, kTokens}, false);
  for (const std::vector<int64_t>& offsets : std::vector<std::vector<int64_t>>{{0, 100, 300}, {100, 300, kTokens}}) {
    const std::vector<float> part = calls.run(offsets, false);
    const int64_t first = offsets[0] ? 1 : 0;  // of the groups of the whole
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t i = 0; i < 2 * kWidth; ++i)
        expect(part[b * 2 * kWidth + i] == whole[(b * 3 + first) * kWidth + i], "group %d, channel %d", int(i / kWidth),
               int(i % kWidth));
    // Coefficients: the gradient of the tokens of both groups, each counted once.
    const float *const found = part.data() + kBatch * 2 * kWidth + kAll, *const u = calls.u.data();
    for (int64_t c = 0; c < kWidth; ++c) {
      double expected = 0;
      for (int64_t b = 0; b < kBatch; ++b)
        for (int64_t token = offsets[0]; token < offsets[2]; ++token) {
          const double x = u[(b * kTokens + token) * kWidth + c];
          expected += x > 0 ? x : 0.01 * x;
        }
      const bool close = std::abs(found[c * kDegree] - expected) <= 1e-4 * (1 + std::abs(expected));
      expect(close, "coefficient of channel %d: %g, not %g", int(c), double(found[c * kDegree]), expected);
    }
  }
}

}  // namespace

int main() {
  alarm(300);  // for a kernel that does not end
  const Calls calls;
  for (uint64_t seed : {0, 1}) {
    cuda_on_cpu::set_seed(seed);
    section("offsets that are none");
    test_unsound(calls);
    section("tokens that are left out");
    test_left_out(calls);
  }
  return check::finish();
}
