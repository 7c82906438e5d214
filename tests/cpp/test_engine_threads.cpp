// Two streams in two threads give the same results as alone. For the thread sanitizer.

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "pom/engine.hpp"

namespace {

// 50 frames of a stream of its own; returns its saved bytes and the last readout.
std::string run(int seed) {
  constexpr int64_t kTokens = 70, kBatch = 2, kFrames = 50;
  const pom_layer layers[] = {{POM_POWER, 3, POM_F32, 4, 32, 0}, {POM_PRODUCT, 2, POM_BF16, 1, 16, 0}};
  const pom_shape shape = {layers, 2, kBatch, 1};
  std::vector<char> memory(pom::Stream::bytes(shape));
  pom::Stream stream;
  if (stream.open(shape, {}, memory.data(), memory.size()) != pom::Status::ok) return "open";
  std::vector<float> numbers(kBatch * kTokens * 32), coeff(32 * 3, 0.2f);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = float((i * 7 + size_t(seed)) % 19) / 9 - 1;
  std::vector<uint16_t> halves(numbers.size());
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = pom::to_bf16(numbers[i]).bits;
  std::vector<float> y(numbers.size());
  std::vector<char> workspace;
  for (int64_t frame = 0; frame < kFrames; ++frame)
    for (int64_t layer : {0, 1}) {
      const void* const data = layer ? static_cast<const void*>(halves.data()) : numbers.data();
      pom_frame f = {};
      f.tokens = f.queries = kTokens, f.u = f.gate = data, f.u_token_stride = f.gate_token_stride = 32;
      f.u_batch_stride = f.gate_batch_stride = kTokens * 32, f.coeff = coeff.data(), f.y = y.data();
      workspace.resize(stream.workspace(layer, f));
      if (stream.peek(layer, f, workspace.data(), workspace.size()) != pom::Status::ok) return "peek";
      if (stream.commit(layer, f, workspace.data(), workspace.size()) != pom::Status::ok) return "commit";
    }
  std::string result(stream.saved_bytes(), 0);
  if (stream.save(result.data(), result.size()) != pom::Status::ok) return "save";
  return result + std::string(reinterpret_cast<char*>(y.data()), y.size() * sizeof(float));
}

}  // namespace

int main() {
  check::section("two threads");
  std::string together[2];
  {
    std::thread one([&] { together[0] = run(1); }), other([&] { together[1] = run(2); });
    one.join(), other.join();
  }
  for (int i : {0, 1}) {
    check::expect(together[i].size() > 1000, "thread %d: %s", i, together[i].c_str());
    check::expect(together[i] == run(i + 1), "thread %d is not what it is alone", i);
  }
  check::expect(together[0] != together[1], "two seeds are alike");
  return check::finish();
}
