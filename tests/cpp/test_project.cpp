// Compares cuda::project_state, the state fused with its projection on GPUs of compute capability 9.0, with naive.h.

#include <algorithm>
#include <limits>
#include <thread>
#include <vector>

#include "driver_on_cpu.h"
#include "expectations.h"

using check::expect;
using check::section;

struct ProjectCase {
  Case c;
  int64_t dim;
  bool bias;
  std::string name() const {
    return c.name("project_state") + "D" + std::to_string(dim) + (bias ? " with bias: " : ": ");
  }
};

// A case's groups, weights and coefficients, with tokens that are projected.
struct Tokens {
  Inputs in;
  Rows x;
  Buffer weight, bias;

  explicit Tokens(const ProjectCase& p) : in(p.c) {
    const auto [batch, tokens, width] = p.c.shape;
    Array numbers = draw(batch * tokens * p.dim, -1, 1.2), weights = draw(width * p.dim, -1, 1), biases(width);
    for (double& w : weights) w *= 4 / std::sqrt(double(p.dim));
    if (p.bias) biases = draw(width, -1, 1);
    x = Rows(p.c.dtype, numbers, batch, tokens, p.dim, p.c.layout);
    weight = Buffer(p.c.dtype, weights);
    bias = Buffer(p.c.dtype, biases);
    for (int64_t row = 0; row < batch * tokens; ++row)
      for (int64_t c = 0; c < width; ++c) {
        double& u = in.p.u[row * width + c] = biases[c];
        for (int64_t i = 0; i < p.dim; ++i) u += numbers[row * p.dim + i] * weights[c * p.dim + i];
      }
  }

  ProjectStateArgs args(const ProjectCase& p, const StateOut& out, const StateView& prior = {}) const {
    Features features = in.features;
    features.u = nullptr;
    return {features,
            x.buffer.data(),
            p.dim,
            x.batch_stride,
            x.token_stride,
            weight.data(),
            p.bias ? bias.data() : nullptr,
            in.groups,
            out,
            prior};
  }
};

void test(const ProjectCase& p) {
  const Tokens tokens(p);
  StateBuffers out(Dtype::f32, p.c.shape.batch * tokens.in.p.groups, p.c.shape.width);
  Before prior(Dtype::f32, p.c.shape.batch, p.c.shape.width, false);
  const ProjectStateArgs args = tokens.args(p, out.view(), p.c.prior ? prior.view() : StateView{});
  expect(pom::cuda::projects(args), "%sis not taken", p.name().c_str());
  run(p.name(), args, out.outputs());
  expect_state(p.c, p.name(), out, p.c.prior ? added(prior.values, tokens.in.p) : naive::state(tokens.in.p));
}

// Inputs that fill a step or not, with more steps than stages; pieces cut by groups; channels that fill a block or not;
// more blocks than SMs.
void test_sizes() {
  constexpr struct {
    Shape shape;
    int64_t dim;
  } kSizes[] = {{{1, 1, 8}, 8},      {{2, 70, 16}, 64},  {{1, 64, 256}, 128}, {{3, 129, 264}, 72},
                {{1, 300, 40}, 320}, {{2, 65, 520}, 40}, {{1, 640, 512}, 64}, {{5, 9, 24}, 584}};
  for (const auto& [shape, dim] : kSizes)
    for (Context context : {Context::whole, Context::offsets, Context::cumulative})
      for (bool weighted : {false, true}) {
        Case c = {Form::power, 2 + int(choose(3)), choose(2) ? Dtype::bf16 : Dtype::f16, context, weighted};
        c.prior = choose(2) == 0;
        c.shape = shape;
        c.layout = choose(2) ? Layout::dense : Layout::spaced;
        test({c, dim, choose(2) == 0});
      }
}

void test_instances() {
  for (Dtype dtype : {Dtype::bf16, Dtype::f16})
    for (int degree : {2, 3, 4})
      for (bool bias : {false, true})
        test({{Form::power, degree, dtype, Context::whole, bias, false, {2, 100, 48}}, 96, bias});
}

// A token reaches its own group alone, whatever its value.
void test_no_numbers() {
  ProjectCase p = {{Form::power, 3, Dtype::bf16, Context::offsets, false, false, {1, 200, 16}}, 64, true};
  Tokens tokens(p);
  const int64_t groups = tokens.in.p.groups, first = tokens.in.offsets[1], end = tokens.in.offsets[2];
  expect(end - first > 0 && end % 64, "the group with tokens 0 … %d ends within a piece", int(end));
  for (int64_t i = first * p.dim; i < end * p.dim; ++i)
    tokens.x.buffer.set(i, std::numeric_limits<double>::quiet_NaN());
  StateBuffers out(Dtype::f32, groups, p.c.shape.width);
  run(p.name(), tokens.args(p, out.view()), out.outputs());
  for (int64_t i = 0; i < out.total.size(); ++i) {
    const bool of_group = i / p.c.shape.width == 1, is_number = !std::isnan(out.total.get(i));
    expect(is_number != of_group, "group %d: %g", int(i / p.c.shape.width), out.total.get(i));
  }
}

// The call reports what is wrong with the device, and nothing else is tried.
void test_an_old_driver() {
  const ProjectCase p = {{Form::power, 3, Dtype::bf16, Context::whole, false, false, {1, 70, 16}}, 64, true};
  const Tokens tokens(p);
  StateBuffers out(Dtype::f32, 1, 16);
  const ProjectStateArgs args = tokens.args(p, out.view());
  const size_t bytes = pom::cuda::workspace(args);
  Workspace memory(bytes);
  cuda_on_cpu::device = 3;  // one that has not been asked yet
  cuda_on_cpu::refusal = cudaErrorInsufficientDriver;
  const bool taken = pom::cuda::projects(args);
  const Status got = pom::cuda::project_state(args, memory.data(), bytes, nullptr);
  cuda_on_cpu::refusal = cudaErrorNoKernelImageForDevice;
  const bool without_code = pom::cuda::projects(args);
  cuda_on_cpu::refusal = cudaSuccess;
  cuda_on_cpu::device = 0;
  expect(taken && got == Status::device_error && out.total.untouched(), "an old driver: %s", message(got));
  expect(!without_code, "a GPU that there is no code for is taken");
}

// Calls that the kernel does not support are refused, and leave the output alone.
void test_refusals() {
  const ProjectCase p = {{Form::power, 3, Dtype::bf16, Context::whole, false, false, {1, 70, 16}}, 64, true};
  const Tokens tokens(p);
  StateBuffers out(Dtype::f32, 1, 16);
  auto refuses = [&](const char* what, Status wanted, auto change) {
    ProjectStateArgs args = tokens.args(p, out.view());
    change(args);
    Workspace memory(1 << 20);
    const Status got = pom::cuda::project_state(args, memory.data(), 1 << 20, nullptr);
    expect(got == wanted, "%s: %s", what, message(got));
    expect(!pom::cuda::projects(args) && out.total.untouched(), "%s is taken", what);
  };
  using Args = ProjectStateArgs;
  refuses("float32", Status::bad_dtype, [](Args& a) { a.features.dtype = Dtype::f32; });
  refuses("degree 5", Status::bad_degree, [](Args& a) { a.features.degree = 5; });
  refuses("no degree", Status::bad_degree, [](Args& a) { a.features.degree = 0; });
  refuses("the product form", Status::bad_size, [](Args& a) { a.features.form = Form::product, a.features.width = 8; });
  refuses("rotary positions", Status::bad_size,
          [&](Args& a) { a.features.rotary = {out.total.data(), out.total.data(), 2, 1}; });
  refuses("a mask", Status::bad_size, [&](Args& a) { a.groups.mask = out.total.data(); });
  refuses("no tokens", Status::bad_size, [](Args& a) { a.features.tokens = 0; });
  refuses("12 channels", Status::bad_size, [](Args& a) { a.features.width = 12; });
  refuses("60 inputs", Status::bad_size, [](Args& a) { a.dim = 60; });
  refuses("rows at odd places", Status::bad_size, [](Args& a) { a.x_token_stride = 65; });
  refuses("one row for all tokens", Status::bad_size, [](Args& a) { a.x_token_stride = 0; });
  refuses("an odd address", Status::bad_size, [](Args& a) { a.x = static_cast<const char*>(a.x) + 2; });
  refuses("no tokens' memory", Status::null_pointer, [](Args& a) { a.x = nullptr; });
  refuses("no weight", Status::null_pointer, [](Args& a) { a.weight = nullptr; });
  refuses("half a prior state", Status::null_pointer, [](Args& a) { a.prior.total = a.weight; });
  refuses("no coefficients", Status::null_pointer, [](Args& a) { a.features.coeff = nullptr; });

  ProjectStateArgs args = tokens.args(p, out.view());
  const size_t bytes = pom::cuda::workspace(args);
  Workspace memory(bytes);
  const Status got = pom::cuda::project_state(args, memory.data(), bytes - 1, nullptr);
  expect(got == Status::workspace_too_small && out.total.untouched(), "too small a workspace: %s", message(got));
}

// Errors for a tensor that the driver refuses, and for a driver without tensor maps. Neither outlasts its cause.
void test_words_of_the_driver() {
  const ProjectCase p = {{Form::power, 3, Dtype::bf16, Context::whole, false, false, {1, 70, 16}}, 64, true};
  const Tokens tokens(p);
  StateBuffers out(Dtype::f32, 1, 16);
  const ProjectStateArgs args = tokens.args(p, out.view());
  Workspace memory(pom::cuda::workspace(args));
  auto call = [&] { return pom::cuda::project_state(args, memory.data(), pom::cuda::workspace(args), nullptr); };
  auto refused = [&](const char* words) {
    const Status got = call();
    expect(got == Status::device_error, "not the driver's error but: %s", message(got));
    expect(std::string(pom::cuda::error()).find(words) != std::string::npos, "not '%s': %s", words, pom::cuda::error());
    expect(out.total.untouched(), "a refused call writes");
  };
  cuda_on_cpu::has_entry_points = false;
  refused("the driver describes no tensors");
  cuda_on_cpu::has_entry_points = true;
  for (const auto& [code, words] : {std::pair{CUDA_ERROR_INVALID_VALUE, "invalid argument"},
                                    {CUDA_ERROR_NOT_SUPPORTED, "operation not supported"},
                                    {CUresult(999), "the driver refuses to describe a tensor"}}) {
    cuda_on_cpu::map_refusal = code;
    refused(words);
  }
  cuda_on_cpu::map_refusal = CUDA_SUCCESS;
  const Status got = call();
  expect(got == Status::ok && !out.total.untouched(), "after refusals: %s", message(got));
}

// Each device is asked about a kernel, and its memory limit set, once: by the first of several threads.
void test_questions() {
  const ProjectCase p = {{Form::power, 3, Dtype::bf16, Context::whole, false, false, {1, 70, 16}}, 64, true};
  const Tokens tokens(p);
  StateBuffers out(Dtype::f32, 1, 16);
  const ProjectStateArgs args = tokens.args(p, out.view());
  auto questions = [&](auto ask) {
    const int before = cuda_on_cpu::questions;
    ask();
    return cuda_on_cpu::questions - before;
  };
  auto call = [&] { run(p.name(), args, out.outputs()); };
  call();
  expect(questions(call) == 0 && questions([&] { pom::cuda::projects(args); }) == 0, "the device is asked again");
  for (int device : {1, 2}) {
    int asked[4];
    std::vector<std::thread> threads;
    for (int& count : asked)
      threads.emplace_back([&, device] {
        cuda_on_cpu::device = device;
        bool taken = false;
        count = questions([&] { taken = pom::cuda::projects(args); });
        if (!taken) count = -1;
      });
    for (std::thread& thread : threads) thread.join();
    std::sort(asked, asked + 4);
    expect(asked[2] == 0 && asked[3] == 3, "on device %d threads ask %d and %d questions", device, asked[2], asked[3]);
    cuda_on_cpu::device = device;
    expect(questions(call) == 0, "device %d is asked again", device);
    cuda_on_cpu::device = 0;
  }
}

int main() {
  section("words of the driver");  // must come first: before a function of the driver is found
  test_words_of_the_driver();
  section("sizes");
  test_sizes();
  section("instances");
  test_instances();
  section("no numbers");
  test_no_numbers();
  section("refusals");
  test_refusals();
  test_an_old_driver();
  section("questions");
  test_questions();
  return check::finish();
}
