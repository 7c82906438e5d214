// Latency of frames drawn by the engine alone: `engine_benchmark TOKENS WIDTH DEGREE HEADS FRAMES commit|overhead`.
//
// Writes a double for each frame to standard output, microseconds: of a commit; or of a commit less the kernel that it
// calls.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "pom/engine.hpp"

namespace {

constexpr int64_t kWarmUp = 200;  // frames

double microseconds() {
  using namespace std::chrono;
  return duration<double, std::micro>(steady_clock::now().time_since_epoch()).count();
}

void require(pom::Status status) {
  if (status == pom::Status::ok) return;
  std::fprintf(stderr, "%s\n", pom::message(status));
  std::exit(1);
}

}  // namespace

int main(int count, char** words) {
  if (count != 7) return std::fprintf(stderr, "expected TOKENS WIDTH DEGREE HEADS FRAMES commit|overhead\n"), 2;
  const int64_t tokens = std::atoll(words[1]), width = std::atoll(words[2]), frames = std::atoll(words[5]);
  const int32_t degree = std::atoi(words[3]), heads = std::atoi(words[4]);
  const bool overhead = !std::strcmp(words[6], "overhead");
  const pom_layer layer = {POM_POWER, degree, POM_F32, heads, width, 0};
  const pom_shape shape = {&layer, 1, 1, 1};
  std::vector<char> memory(pom::Stream::bytes(shape));
  pom::Stream stream;
  require(stream.open(shape, {}, memory.data(), memory.size()));

  const int64_t gates = heads > 1 ? heads : width;
  std::vector<float> u(tokens * width), gate(tokens * gates), coeff(width * degree, 0.1f), y(tokens * width);
  for (size_t i = 0; i < u.size(); ++i) u[i] = float(i * 37 % 101) / 50 - 1;
  for (size_t i = 0; i < gate.size(); ++i) gate[i] = float(i * 41 % 97) / 12 - 4;
  pom_frame frame = {};
  frame.tokens = frame.queries = tokens, frame.u = u.data(), frame.gate = gate.data(), frame.y = y.data();
  frame.u_token_stride = width, frame.gate_token_stride = gates, frame.coeff = coeff.data();
  std::vector<char> workspace(stream.workspace(0, frame));

  const pom_state state = stream.state(0);
  const pom::UpdateArgs update = {
      {pom::Form::power, degree, pom::Dtype::f32, 1, tokens, width, u.data(), 0, width, coeff.data(), nullptr, {}},
      {pom::Form::power, pom::Dtype::f32, 1, tokens, width, heads, gate.data(), 0, gates, {}},
      {state.total, state.residual, state.count},
      nullptr,
      y.data()};
  std::vector<char> scratch(pom::cpu::workspace(update));

  std::vector<double> times(frames);
  for (int64_t i = -kWarmUp; i < frames; ++i) {
    const double begin = microseconds();
    require(stream.commit(0, frame, workspace.data(), workspace.size()));
    const double middle = microseconds();
    if (overhead) require(pom::cpu::update(update, scratch.data(), scratch.size()));
    const double end = microseconds();
    if (i >= 0) times[i] = overhead ? (middle - begin) - (end - middle) : middle - begin;
  }
  std::fwrite(times.data(), sizeof(double), times.size(), stdout);
  return 0;
}
