// Every way in which the torch-free library refuses a call: the status is right, and no output is touched.

#include <set>
#include <string>
#include <tuple>

#include "inputs.h"
#ifdef POM_TEST_CUDA
#include "cuda/launch.h"
#endif

using check::expect;
using check::section;

// Calls with one fault each: the status names it, and no output is touched.
template <class Args>
class Refusals {
 public:
  // Without the fault the call is accepted.
  Refusals(const char* operation, const Args& valid, const Outputs& outputs)
      : operation_(operation), valid_(valid), outputs_(outputs) {
    run(operation_, valid, outputs);
    const size_t bytes = device::workspace(valid);
    const Workspace workspace(bytes);
    refused(Status::workspace_too_small, "one byte too small", valid, workspace.data(), bytes - 1);
    refused(Status::workspace_too_small, "no workspace", valid, nullptr, bytes);
  }

  template <class Change>
  void when(const char* fault, Status wanted, Change change) const {
    Args args = valid_;
    change(args);
    device::workspace(args);  // must not fail before the faulty call
    const size_t bytes = device::workspace(valid_);
    const Workspace workspace(bytes);
    refused(wanted, fault, args, workspace.data(), bytes);
  }

 private:
  void refused(Status wanted, const char* fault, const Args& args, void* workspace, size_t bytes) const {
    for (Buffer* out : outputs_) out->clear();
    const Status status = call(args, workspace, bytes, in_order(true));
    expect(status == wanted, "%s, %s: '%s', not '%s'", operation_.c_str(), fault, message(status), message(wanted));
    for (const Buffer* out : outputs_)
      expect(out->untouched(), "%s, %s: an output was written", operation_.c_str(), fault);
  }

  std::string operation_;
  Args valid_;
  Outputs outputs_;
};

// `part` picks the features or the gates out of the arguments.
template <class Args, class Part>
void refuse_tokens(const Refusals<Args>& refused, Part part) {
  refused.when("batch -1", Status::bad_size, [&](auto& args) { part(args).batch = -1; });
  refused.when("tokens -1", Status::bad_size, [&](auto& args) { part(args).tokens = -1; });
  refused.when("-1 axes", Status::bad_size, [&](auto& args) { part(args).rotary.axes = -1; });
  refused.when("axes without pairs", Status::bad_size, [&](auto& args) { part(args).rotary.half = 0; });
  refused.when("too many pairs", Status::bad_size, [&](auto& args) { part(args).rotary.half = 3; });
  refused.when("cos", Status::null_pointer, [&](auto& args) { part(args).rotary.cos = nullptr; });
  refused.when("sin", Status::null_pointer, [&](auto& args) { part(args).rotary.sin = nullptr; });
  refused.when("rotary positions in product form", Status::rotary_needs_power,
               [&](auto& args) { part(args).form = Form::product; });
}

template <class Args>
void refuse_features(const Refusals<Args>& refused) {
  refuse_tokens(refused, [](auto& args) -> auto& { return args.features; });
  for (int degree : {-1, 0, 17}) {
    refused.when("degree", Status::bad_degree, [&](auto& args) { args.features.degree = degree; });
    refused.when("degree of the product form", Status::bad_degree, [&](auto& args) {
      args.features.degree = degree;
      args.features.form = Form::product;
      args.features.rotary = {};
    });
  }
  refused.when("width 0", Status::bad_size, [](auto& args) { args.features.width = 0; });
  refused.when("u", Status::null_pointer, [](auto& args) { args.features.u = nullptr; });
  refused.when("coeff", Status::null_pointer, [](auto& args) { args.features.coeff = nullptr; });
  refused.when("coeff_tangent", Status::null_pointer, [](auto& args) { args.features.u_tangent = args.features.u; });
}

// Tangents that an operation does not take: of features, of gates, or of both.
template <class Args>
void refuse_tangents(const Refusals<Args>& refused, const char* fault, bool of_features, bool of_gates) {
  refused.when(fault, Status::no_tangents, [=](auto& args) {
    if (of_features) args.features.u_tangent = args.features.u, args.features.coeff_tangent = args.features.coeff;
    if (of_gates) args.gates.tangent = args.gates.gate;
  });
}

template <class Args>
void refuse_groups(const Refusals<Args>& refused) {
  refused.when("-1 groups", Status::bad_size, [](auto& args) { args.groups.count = -1; });
  refused.when("no groups for the tokens", Status::bad_size, [](auto& args) { args.groups.count = 0; });
  refused.when("groups without offsets", Status::bad_size, [](auto& args) { args.groups.offsets = nullptr; });
  refused.when("a mask and offsets", Status::bad_size, [](auto& args) {
    args.groups.mask = args.features.weight;
    args.features.weight = nullptr;
  });
  refused.when("a mask and weights", Status::bad_size, [](auto& args) {
    args.groups.mask = args.features.weight;
    args.groups.offsets = nullptr;
  });
}

template <class Args>
void refuse_gates(const Refusals<Args>& refused) {
  refuse_tokens(refused, [](auto& args) -> auto& { return args.gates; });
  refused.when("0 channels", Status::bad_size, [](auto& args) { args.gates.channels = 0; });
  refused.when("0 heads", Status::bad_size, [](auto& args) { args.gates.heads = 0; });
  refused.when("heads that do not divide", Status::bad_size, [](auto& args) { args.gates.heads = 2; });
  refused.when("too many heads", Status::bad_size, [](auto& args) { args.gates.channels = args.gates.heads = 1025; });
  refused.when("gate", Status::null_pointer, [](auto& args) { args.gates.gate = nullptr; });
}

template <class Args>
void refuse_readout(const Refusals<Args>& refused) {
  refuse_gates(refused);
  refused.when("-1 groups", Status::bad_size, [](auto& args) { args.groups = -1; });
  refused.when("no groups for the tokens", Status::bad_size,
               [](auto& args) { args.groups = 0, args.offsets = nullptr; });
  refused.when("groups that do not divide", Status::bad_size, [](auto& args) { args.offsets = nullptr; });
  refused.when("total", Status::null_pointer, [](auto& args) { args.state.total = nullptr; });
  refused.when("residual", Status::null_pointer, [](auto& args) { args.state.residual = nullptr; });
  refused.when("count", Status::null_pointer, [](auto& args) { args.state.count = nullptr; });
}

template <class Args>
void refuse_causal(const Refusals<Args>& refused) {
  refuse_features(refused);
  refuse_gates(refused);
  refused.when("gates of another batch", Status::bad_size, [](auto& args) { args.gates.batch = 1; });
  refused.when("gates of other tokens", Status::bad_size, [](auto& args) { args.gates.tokens = 6; });
  refused.when("gates of other channels", Status::bad_size, [](auto& args) { args.gates.channels = 10; });
  refused.when("other axes of the gates", Status::bad_size, [](auto& args) { args.gates.rotary.axes = 1; });
  refused.when("other pairs of the gates", Status::bad_size, [](auto& args) { args.gates.rotary.half = 1; });
  refused.when("gates of another dtype", Status::bad_dtype, [](auto& args) { args.gates.dtype = Dtype::f64; });
  refuse_tangents(refused, "tangents of both", true, true);
}

template <class Args>
void refuse_mix(const Refusals<Args>& refused) {
  refuse_features(refused);
  refuse_gates(refused);
  refused.when("gates of another batch", Status::bad_size, [](auto& args) { args.gates.batch = 1; });
  refused.when("gates of other channels", Status::bad_size, [](auto& args) { args.gates.channels = 10; });
  refused.when("gates of the other form", Status::bad_size, [](auto& args) {
    args.gates.form = Form::product;
    args.gates.rotary = {};
  });
  refused.when("gates of another dtype", Status::bad_dtype, [](auto& args) { args.gates.dtype = Dtype::f64; });
  refused.when("y", Status::null_pointer, [](auto& args) { args.y = nullptr; });
  refuse_tangents(refused, "a tangent of the features", true, false);
  refuse_tangents(refused, "a tangent of the gates", false, true);
}

template <class Args>
void refuse_prior(const Refusals<Args>& refused) {
  refused.when("total of the prior state", Status::null_pointer, [](auto& args) { args.prior.total = nullptr; });
  refused.when("residual of the prior state", Status::null_pointer, [](auto& args) { args.prior.residual = nullptr; });
  refused.when("count of the prior state", Status::null_pointer, [](auto& args) { args.prior.count = nullptr; });
}

template <class Args>
void refuse_state_out(const Refusals<Args>& refused) {
  refused.when("total", Status::null_pointer, [](auto& args) { args.out.total = nullptr; });
  refused.when("residual", Status::null_pointer, [](auto& args) { args.out.residual = nullptr; });
  refused.when("count", Status::null_pointer, [](auto& args) { args.out.count = nullptr; });
}

void test_refusals() {
  const Shape shape = {2, 7, 9};
  const Inputs in({Form::power, 3, Dtype::f32, Context::offsets, true, false, shape, 1, 2});
  const int64_t rows = shape.batch * in.p.groups, channels = in.p.channels(), size = int64_t(in.p.u.size());
  const Before before(in.acc, rows, channels, true);
  StateBuffers out(in.acc, rows, channels);
  Buffer y(in.acc, size), grad_u(in.acc, size), grad_gate(in.acc, size), grad_total(in.acc, rows * channels);
  Buffer grad_coeff(in.acc, int64_t(in.p.coeff.size()));

  const Refusals state("state", StateArgs{in.features, in.groups, out.view(), before.view()}, out.outputs());
  refuse_prior(state);
  refuse_features(state);
  refuse_groups(state);
  refuse_state_out(state);

  const Refusals state_backward(
      "state_backward",
      StateBackwardArgs{in.features, in.groups, before.total.data(), grad_u.data(), grad_coeff.data()},
      {&grad_u, &grad_coeff});
  refuse_features(state_backward);
  refuse_groups(state_backward);
  state_backward.when("grad_total", Status::null_pointer, [](auto& args) { args.grad_total = nullptr; });
  state_backward.when("grad_u", Status::null_pointer, [](auto& args) { args.grad_u = nullptr; });
  state_backward.when("grad_coeff", Status::null_pointer, [](auto& args) { args.grad_coeff = nullptr; });

  const Refusals readout("readout", ReadoutArgs{in.gates, in.p.groups, in.groups.offsets, before.view(), y.data()},
                         {&y});
  refuse_readout(readout);
  readout.when("y", Status::null_pointer, [](auto& args) { args.y = nullptr; });
  readout.when("a tangent of the state alone", Status::null_pointer, [](auto& args) { args.tangent = args.state; });
  readout.when("residual of the tangent", Status::null_pointer, [](auto& args) {
    args.gates.tangent = args.gates.gate;
    args.tangent.total = args.state.total;
  });

  const Refusals readout_backward(
      "readout_backward",
      ReadoutBackwardArgs{in.gates, in.p.groups, in.groups.offsets, before.view(), in.u.buffer.data(),
                          in.u.batch_stride, in.u.token_stride, grad_gate.data(), grad_total.data()},
      {&grad_gate, &grad_total});
  refuse_readout(readout_backward);
  readout_backward.when("grad_y", Status::null_pointer, [](auto& args) { args.grad_y = nullptr; });
  readout_backward.when("grad_gate", Status::null_pointer, [](auto& args) { args.grad_gate = nullptr; });
  readout_backward.when("grad_total", Status::null_pointer, [](auto& args) { args.grad_total = nullptr; });

  const Refusals causal("causal_mix", CausalArgs{in.features, in.gates, before.view(), y.data(), out.view()},
                        {&y, &out.total, &out.residual, &out.count});
  refuse_causal(causal);
  refuse_prior(causal);
  refuse_state_out(causal);
  causal.when("y", Status::null_pointer, [](auto& args) { args.y = nullptr; });

  const Refusals causal_backward(
      "causal_mix_backward",
      CausalBackwardArgs{in.features, in.gates, before.view(), in.u.buffer.data(), in.u.batch_stride, in.u.token_stride,
                         nullptr, grad_u.data(), grad_gate.data(), grad_coeff.data(), grad_total.data()},
      {&grad_u, &grad_gate, &grad_coeff, &grad_total});
  refuse_causal(causal_backward);
  refuse_prior(causal_backward);
  causal_backward.when("grad_y", Status::null_pointer, [](auto& args) { args.grad_y = nullptr; });
  causal_backward.when("grad_u", Status::null_pointer, [](auto& args) { args.grad_u = nullptr; });
  causal_backward.when("grad_gate", Status::null_pointer, [](auto& args) { args.grad_gate = nullptr; });
  causal_backward.when("grad_coeff", Status::null_pointer, [](auto& args) { args.grad_coeff = nullptr; });
  causal_backward.when("grad_prior", Status::null_pointer, [](auto& args) { args.grad_prior = nullptr; });

  const Refusals mix("mix", MixArgs{in.features, in.gates, before.view(), y.data(), out.view()},
                     {&y, &out.total, &out.residual, &out.count});
  refuse_mix(mix);
  refuse_prior(mix);
  refuse_state_out(mix);
}

// In place: the prior state must stay as it is.
void test_refused_updates() {
  const Shape shape = {2, 7, 9};
  const Inputs in({Form::power, 3, Dtype::f32, Context::whole, true, false, shape, 1, 2});
  StateBuffers state(in.acc, shape.batch, in.p.channels());
  Buffer y(in.acc, int64_t(in.p.u.size()));
  Array zeros(shape.batch);
  const Buffer arrivals(Dtype::f32, zeros);
  const UpdateArgs valid = {in.features, in.gates, state.view(), static_cast<uint32_t*>(arrivals.data()), y.data()};
  const Refusals update("update", valid, {&y, &state.total, &state.residual, &state.count});
  refuse_mix(update);
  update.when("total", Status::null_pointer, [](auto& args) { args.state.total = nullptr; });
  update.when("residual", Status::null_pointer, [](auto& args) { args.state.residual = nullptr; });
  update.when("count", Status::null_pointer, [](auto& args) { args.state.count = nullptr; });
  if (kCuda) update.when("arrival_counter", Status::null_pointer, [](auto& args) { args.arrival_counter = nullptr; });
}

#ifdef POM_TEST_CUDA
// A CUDA error becomes a status, and its message is stored.
void test_cuda_errors() {
  using pom::cuda::checked;
  auto says = [](const char* part) { return std::strstr(pom::cuda::error(), part) != nullptr; };
  expect(checked(cudaSuccess) == Status::ok, "success is an error");
  for (const auto& [code, status] : {std::pair{cudaErrorNoKernelImageForDevice, Status::no_device_code},
                                     {cudaErrorInvalidDeviceFunction, Status::no_device_code},
                                     {cudaErrorInvalidValue, Status::device_error}}) {
    expect(checked(code) == status, "%s: '%s'", cudaGetErrorString(code), message(checked(code)));
    expect(says(cudaGetErrorString(code)), "error() says '%s'", pom::cuda::error());
    const bool no_code = status == Status::no_device_code;
    expect(says("of compute capability 9.0") == no_code, "error() says '%s'", pom::cuda::error());
  }
}

// The message says what is wrong, and which driver would do.
void test_an_old_driver() {
  const pom::cuda::Versions here = pom::cuda::versions();
  expect(here.runtime == cuda_on_cpu::runtime && here.driver == cuda_on_cpu::driver, "other versions");
  for (const auto& [runtime, driver, words] :
       {std::tuple{13000, 12040, "serves CUDA 12.4, and this library is linked to CUDA 13.0: install driver 580 or"},
        {12080, 11080, "serves CUDA 11.8, and this library is linked to CUDA 12.8: install driver 525 or later"},
        {14020, 13010, "serves CUDA 13.1, and this library is linked to CUDA 14.2: install a later driver, or build"},
        {13000, 0, "there is no NVIDIA driver that loads, and this library is linked to CUDA 13.0: install driver"}}) {
    cuda_on_cpu::runtime = runtime, cuda_on_cpu::driver = driver;
    expect(pom::cuda::checked(cudaErrorInsufficientDriver) == Status::device_error, "another status");
    const std::string said = pom::cuda::error();
    expect(said.find(words) != said.npos && said.find("torch.version.cuda names") != said.npos, "error() says '%s'",
           said.c_str());
  }
  cuda_on_cpu::runtime = here.runtime, cuda_on_cpu::driver = here.driver;
}

// Every operation returns the status of its first kernel.
void test_a_refused_launch() {
  const Shape shape = {2, 7, 9};
  const Inputs in({Form::power, 3, Dtype::f32, Context::whole, true, false, shape, 1, 2});
  StateBuffers out(in.acc, shape.batch, in.p.channels());
  const StateArgs args = {in.features, in.groups, out.view()};
  const size_t bytes = device::workspace(args);
  const Workspace workspace(bytes);
  cuda_on_cpu::refusal = cudaErrorInsufficientDriver;
  const Status status = call(args, workspace.data(), bytes, in_order(true));
  cuda_on_cpu::refusal = cudaSuccess;
  expect(status == Status::device_error && out.total.untouched(), "state: '%s'", message(status));
}
#endif

void test_messages() {
  std::set<std::string> messages;
  for (int status = 0; status <= int(Status::device_error); ++status) {
    const char* text = message(Status(status));
    expect(text && *text && messages.insert(text).second, "status %d has no message of its own", status);
  }
}

int main() {
  section("refused calls");
  test_refusals();
  test_refused_updates();
  section("messages");
  test_messages();
#ifdef POM_TEST_CUDA
  section("CUDA's errors");
  test_cuda_errors();
  test_an_old_driver();
  test_a_refused_launch();
#endif
  return check::finish();
}
