// Compares cuda::folded_readout with plain loops over doubles: readout with one gate per head, fused with its
// projections, on GPUs with tensor cores for 16-bit types.

#include <limits>

#include "harness.h"

using namespace pom;
using check::expect;
using check::section;

struct FoldedCase {
  Form form;
  Dtype dtype;
  int64_t batch, queries, dim, heads, width, out_dim;  // width: channels of a head
  std::vector<int64_t> offsets = {};
  int64_t groups = 1;  // if there are no offsets
  bool biases = false;
  Layout layout = Layout::dense;

  int64_t channels() const { return heads * width; }
  std::string name() const {
    std::string name = "folded_readout";
    for (int64_t n :
         {int64_t(form), int64_t(dtype), batch, queries, dim, heads, width, out_dim, groups, int64_t(biases)})
      name += " " + std::to_string(n);
    return name + ": ";
  }
};

struct FoldedInputs {
  int64_t groups;
  Rows x;
  Buffer gate_weight, gate_bias, out_weight, out_bias, total, residual, count;
  Array wanted, allowed;  // y, and its allowed rounding error
  FoldedReadoutArgs args;

  explicit FoldedInputs(const FoldedCase& c) : groups(c.offsets.empty() ? c.groups : int64_t(c.offsets.size()) - 1) {
    const int64_t rows = c.batch * groups;
    Array numbers = draw(c.batch * c.queries * c.dim, -1, 1.2), of_gates = draw(c.heads * c.dim, -1, 1),
          gate_biases(c.heads), of_out = draw(c.out_dim * c.channels(), -1, 1), out_biases(c.out_dim),
          totals = draw(rows * c.channels(), -20, 30), rest = draw(rows * c.channels(), -1e-6, 1e-6),
          counts = draw(rows, 5, 9);
    for (double& w : of_gates) w *= 3 / std::sqrt(double(c.dim));
    if (c.biases) gate_biases = draw(c.heads, -1, 1), out_biases = draw(c.out_dim, -1, 1);
    if (rows > 1) {  // the last group has count 0, whatever its sums are
      counts.back() = 0;
      for (int64_t i = 0; i < c.channels(); ++i)
        totals[(rows - 1) * c.channels() + i] =
            i % 2 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    }
    x = Rows(c.dtype, numbers, c.batch, c.queries, c.dim, c.layout);
    gate_weight = Buffer(c.dtype, of_gates), gate_bias = Buffer(c.dtype, gate_biases);
    out_weight = Buffer(c.dtype, of_out), out_bias = Buffer(c.dtype, out_biases);
    total = Buffer(Dtype::f32, totals), residual = Buffer(Dtype::f32, rest), count = Buffer(Dtype::f64, counts);

    naive::Problem gates{};
    gates.form = c.form;
    for (int64_t row = 0; row < c.batch * c.queries; ++row) {
      const int64_t query = row % c.queries;
      const int64_t group = c.offsets.empty()
                                ? query * groups / c.queries
                                : std::upper_bound(c.offsets.begin(), c.offsets.end(), query) - c.offsets.begin() - 1;
      const int64_t state = row / c.queries * groups + group;
      Array value(c.heads);
      for (int64_t h = 0; h < c.heads; ++h) {
        double gate = gate_biases[h];
        for (int64_t i = 0; i < c.dim; ++i) gate += numbers[row * c.dim + i] * of_gates[h * c.dim + i];
        value[h] = naive::gate_value(gates, gate);
      }
      // Half a unit in the last place of every gate, of its factor, and of the result.
      const double half = c.dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11;
      for (int64_t out = 0; out < c.out_dim; ++out) {
        double y = out_biases[out], size = 0;
        for (int64_t h = 0; h < c.heads; ++h) {
          double folded = 0;
          for (int64_t i = h * c.width; counts[state] && i < (h + 1) * c.width; ++i)
            folded += of_out[out * c.channels() + i] *
                      (totals[state * c.channels() + i] + rest[state * c.channels() + i]) / counts[state];
          y += value[h] * folded;
          size += std::abs(value[h] * folded);
        }
        wanted.push_back(y);
        allowed.push_back(half * std::abs(y) + (2 * half + 1e-5) * size + 1e-7);
      }
    }
    args = {c.form,
            c.dtype,
            c.batch,
            c.queries,
            c.dim,
            c.heads,
            c.channels(),
            c.out_dim,
            x.buffer.data(),
            x.batch_stride,
            x.token_stride,
            gate_weight.data(),
            c.biases ? gate_bias.data() : nullptr,
            out_weight.data(),
            c.biases ? out_bias.data() : nullptr,
            groups,
            c.offsets.empty() ? nullptr : c.offsets.data(),
            {total.data(), residual.data(), count.doubles()}};
  }
};

void test(const FoldedCase& c) {
  FoldedInputs in(c);
  Buffer y(c.dtype, c.batch * c.queries * c.out_dim);
  in.args.y = y.data();
  expect(pom::cuda::folds(in.args), "%sis not taken", c.name().c_str());
  run(c.name(), in.args, {&y});
  for (int64_t i = 0; i < y.size(); ++i)
    expect(std::abs(y.get(i) - in.wanted[i]) <= in.allowed[i], "%snumber %d is %.9g, not %.9g; allowed %.2g",
           c.name().c_str(), int(i), y.get(i), in.wanted[i], in.allowed[i]);
}

void test_sizes() {
  for (Form form : {Form::power, Form::product})
    for (Dtype dtype : {Dtype::bf16, Dtype::f16}) {
      test({form, dtype, 1, 1, 8, 1, 8, 8});
      test({form, dtype, 2, 37, 64, 8, 16, 40, {}, 1, true});
      test({form, dtype, 1, 64, 72, 16, 8, 64, {}, 1, false, Layout::spaced});
      test({form, dtype, 3, 33, 136, 20, 8, 72, {}, 1, true});
      test({form, dtype, 1, 70, 40, 40, 16, 24, {}, 1, true});
      test({form, dtype, 1, 20, 32, 64, 8, 264, {}, 1, false});
    }
  // More than the warps of a block have in flight.
  test({Form::power, Dtype::bf16, 1, 18, 1096, 16, 8, 136, {}, 1, true});
  test({Form::power, Dtype::bf16, 1, 3, 40, 16, 136, 24, {}, 1, true});
}

// A query's bits depend only on the query, not on samples and queries beside it.
void test_bits() {
  const FoldedCase c = {Form::power, Dtype::bf16, 3, 50, 200, 20, 8, 136, {}, 1, true};
  FoldedInputs in(c);
  Buffer all(c.dtype, c.batch * c.queries * c.out_dim), few(c.dtype, 7 * c.out_dim);
  in.args.y = all.data();
  run(c.name(), in.args, {&all});
  in.args.batch = 1, in.args.queries = 7, in.args.y = few.data();
  run(c.name(), in.args, {&few});
  for (int64_t i = 0; i < few.size(); ++i)
    expect(few.get(i) == all.get(i), "%snumber %d is %.9g alone, %.9g among others", c.name().c_str(), int(i),
           few.get(i), all.get(i));
}

void test_groups() {
  for (bool biases : {false, true}) {
    test({Form::power, Dtype::bf16, 2, 60, 32, 8, 8, 40, {}, 5, biases});
    test({Form::power, Dtype::f16, 1, 64, 32, 16, 16, 32, {}, 2, biases, Layout::spaced});
    test({Form::power, Dtype::bf16, 2, 50, 32, 8, 8, 40, {0, 0, 13, 13, 40, 50, 50}, 1, biases});
    test({Form::power, Dtype::f16, 1, 50, 32, 3, 24, 16, {0, 1, 17, 50}, 1, biases});
  }
}

// The call reports what is wrong with the device, and nothing else is tried.
void test_an_old_driver() {
  const FoldedCase c = {Form::power, Dtype::bf16, 2, 37, 64, 8, 16, 40, {}, 1, true};
  FoldedInputs in(c);
  Buffer y(c.dtype, c.batch * c.queries * c.out_dim);
  in.args.y = y.data();
  const size_t bytes = pom::cuda::workspace(in.args);
  Workspace memory(bytes);
  cuda_on_cpu::refusal = cudaErrorInsufficientDriver;
  const bool taken = pom::cuda::folds(in.args);
  const Status got = pom::cuda::folded_readout(in.args, memory.data(), bytes, nullptr);
  cuda_on_cpu::refusal = cudaErrorNoKernelImageForDevice;
  const bool without_code = pom::cuda::folds(in.args);
  cuda_on_cpu::refusal = cudaSuccess;
  expect(taken && got == Status::device_error && y.untouched(), "an old driver: %s", message(got));
  expect(!without_code, "a GPU that there is no code for is taken");
}

void test_refusals() {
  const FoldedCase c = {Form::power, Dtype::bf16, 2, 37, 64, 8, 16, 40, {}, 1, true};
  FoldedInputs in(c);
  Buffer y(c.dtype, c.batch * c.queries * c.out_dim);
  in.args.y = y.data();
  auto refuses = [&](const char* what, Status wanted, auto change) {
    FoldedReadoutArgs args = in.args;
    change(args);
    Workspace memory(1 << 20);
    const Status got = pom::cuda::folded_readout(args, memory.data(), 1 << 20, nullptr);
    expect(got == wanted, "%s: %s", what, message(got));
    expect(!pom::cuda::folds(args) && y.untouched(), "%s is taken", what);
  };
  using Args = FoldedReadoutArgs;
  refuses("float32", Status::bad_dtype, [](Args& a) { a.dtype = Dtype::f32; });
  refuses("no queries", Status::bad_size, [](Args& a) { a.queries = 0; });
  refuses("65 heads", Status::bad_size, [](Args& a) { a.heads = 65, a.channels = 65 * 8; });
  refuses("heads of 12 channels", Status::bad_size, [](Args& a) { a.channels = 8 * 12; });
  refuses("heads that do not divide", Status::bad_size, [](Args& a) { a.heads = 7; });
  refuses("6,152 channels", Status::bad_size, [](Args& a) { a.heads = 1, a.channels = 6152; });
  refuses("60 inputs", Status::bad_size, [](Args& a) { a.dim = 60; });
  refuses("36 outputs", Status::bad_size, [](Args& a) { a.out_dim = 36; });
  refuses("groups of unequal length", Status::bad_size, [](Args& a) { a.groups = 2; });
  refuses("rows at odd places", Status::bad_size, [](Args& a) { a.x_token_stride = 65; });
  refuses("an odd address", Status::bad_size, [](Args& a) { a.x = static_cast<const char*>(a.x) + 2; });
  refuses("no queries' memory", Status::null_pointer, [](Args& a) { a.x = nullptr; });
  refuses("no state", Status::null_pointer, [](Args& a) { a.state.count = nullptr; });
  refuses("no result", Status::null_pointer, [](Args& a) { a.y = nullptr; });

  const size_t bytes = pom::cuda::workspace(in.args);
  Workspace memory(bytes);
  const Status got = pom::cuda::folded_readout(in.args, memory.data(), bytes - 1, nullptr);
  expect(got == Status::workspace_too_small && y.untouched(), "too small a workspace: %s", message(got));
}

int main() {
  section("sizes");
  test_sizes();
  section("groups");
  test_groups();
  section("bits");
  test_bits();
  section("refusals");
  test_refusals();
  test_an_old_driver();
  return check::finish();
}
