// Calls and files that the engine refuses: nothing is written, and the stream stays as it was.

#include "engine_cases.h"

using check::expect;
using check::section;

const Case kCase = {Form::power, 3, Dtype::f32, Context::whole, true, false, {2, 9, 12}, 4, 1};

// Calls of one valid frame with one fault each.
template <class Change>
void refuse(const char* fault, Status wanted, Change change) {
  OpenStream s({layer_of(kCase), layer_of(kCase)}, 2, 2);
  Frame first(kCase), frame(kCase);
  act("first", Act::commit, s, 1, first, 1);
  const std::string before = s.bits();
  int64_t layer = 1, evaluation = 1;
  size_t bytes = s.stream.workspace(1, frame.view);
  const Workspace workspace(bytes);
  void* memory = workspace.data();
  frame.y.clear();
  const pom_place kept = s.stream.place();
  change(s, frame.view, layer, evaluation, memory, bytes);
  s.stream.workspace(layer, frame.view);  // must not fail before the faulty call
  for (const bool commit : {false, true}) {
    const Status status = commit ? s.stream.commit(layer, frame.view, memory, bytes, evaluation)
                                 : s.stream.peek(layer, frame.view, memory, bytes, evaluation);
    expect(status == wanted, "%s: '%s', not '%s'", fault, message(status), message(wanted));
  }
  expect(frame.y.untouched(), "%s: y was written", fault);
  s.stream.place() = kept;
  expect(s.bits() == before, "%s: the state was written", fault);
}

#define REFUSE(fault, status, ...)                                                                           \
  refuse(fault, Status::status,                                                                              \
         [&]([[maybe_unused]] OpenStream& s, [[maybe_unused]] pom_frame& f, [[maybe_unused]] int64_t& layer, \
             [[maybe_unused]] int64_t& evaluation, [[maybe_unused]] void*& workspace,                        \
             [[maybe_unused]] size_t& bytes) { __VA_ARGS__; })

void test_frames() {
  REFUSE("layer -1", bad_index, layer = -1);
  REFUSE("layer 2", bad_index, layer = 2);
  REFUSE("evaluation -1", bad_index, evaluation = -1);
  REFUSE("evaluation 2", bad_index, evaluation = 2);
  REFUSE("tokens -1", bad_size, f.tokens = -1);
  REFUSE("queries -1", bad_size, f.queries = -1);
  REFUSE("a negative stride of u", bad_size, f.u_token_stride = -12);
  REFUSE("a negative batch stride of u", bad_size, f.u_batch_stride = -1);
  REFUSE("a negative stride of the gates", bad_size, f.gate_token_stride = -4);
  REFUSE("a negative batch stride of the gates", bad_size, f.gate_batch_stride = -1);
  REFUSE("u", null_pointer, f.u = nullptr);
  REFUSE("coeff", null_pointer, f.coeff = nullptr);
  REFUSE("gate", null_pointer, f.gate = nullptr);
  REFUSE("y", null_pointer, f.y = nullptr);
  REFUSE("cos", null_pointer, f.rotary.cos = nullptr);
  REFUSE("sin of the gates", null_pointer, f.gate_rotary.sin = nullptr);
  REFUSE("too many axes", bad_size, f.rotary.axes = 7);
  REFUSE("-1 axes", bad_size, f.gate_rotary.axes = -1);
  REFUSE("no workspace", workspace_too_small, workspace = nullptr);
  REFUSE("a workspace one byte too small", workspace_too_small, --bytes);
  REFUSE("y in u", overlap, f.y = const_cast<void*>(f.u));
  REFUSE("y in the gates", overlap, f.y = const_cast<void*>(f.gate));
  REFUSE("y in the state", overlap, f.y = s.stream.state(0).total);
  REFUSE("y in the workspace", overlap, f.y = workspace);
  REFUSE("the workspace in the stream", overlap, workspace = s.memory.data());
  REFUSE("u in the workspace", overlap, f.u = workspace);
  REFUSE("a device that is none", no_cuda, s.stream.place().device = 7);
#ifndef POM_TEST_CUDA
  REFUSE("a GPU, without CUDA", no_cuda, s.stream.place().device = POM_DEVICE_CUDA);
#endif
}

void test_open() {
  const auto refused = [](const char* fault, pom_layer layer, int64_t count, int64_t batch, int64_t evaluations,
                          Status wanted) {
    const pom_shape shape = {&layer, count, batch, evaluations};
    const Workspace memory(1 << 16);
    expect(Stream::bytes(shape) == 0, "%s: a size", fault);
    Stream stream;
    const Status status = stream.open(shape, place(), memory.data(), 1 << 16);
    expect(status == wanted, "%s: '%s', not '%s'", fault, message(status), message(wanted));
    expect(stream.saved_bytes() == 0 && !stream.state(0).total, "%s: a stream was made", fault);
  };
  const auto layer = [](auto change) {
    pom_layer layer = layer_of(kCase);
    change(layer);
    return layer;
  };
  const pom_layer good = layer_of(kCase);
  refused("no layers", good, 0, 1, 1, Status::bad_size);
  refused("batch -1", good, 1, -1, 1, Status::bad_size);
  refused("no evaluation", good, 1, 1, 0, Status::bad_size);
  refused("more than memory", good, 1, int64_t(1) << 60, 1, Status::bad_size);
  refused("degree 0", layer([](pom_layer& l) { l.degree = 0; }), 1, 1, 1, Status::bad_degree);
  refused("degree 17", layer([](pom_layer& l) { l.degree = 17; }), 1, 1, 1, Status::bad_degree);
  refused("a form that is none", layer([](pom_layer& l) { l.form = 2; }), 1, 1, 1, Status::bad_size);
  refused("a dtype that is none", layer([](pom_layer& l) { l.dtype = 4; }), 1, 1, 1, Status::bad_dtype);
  refused("width 0", layer([](pom_layer& l) { l.width = 0; }), 1, 1, 1, Status::bad_size);
  refused("heads 0", layer([](pom_layer& l) { l.heads = 0; }), 1, 1, 1, Status::bad_size);
  refused("heads that do not divide", layer([](pom_layer& l) { l.heads = 5; }), 1, 1, 1, Status::bad_size);
  refused("kept by nobody", layer([](pom_layer& l) { l.kept = size_t(-1); }), 1, 1, 1, Status::bad_size);

  const pom_shape shape = {&good, 1, 1, 1}, none = {nullptr, 1, 1, 1};
  const pom_place here = place();
  const size_t bytes = pom_stream_bytes(&shape);
  const Workspace memory(bytes);
  pom_stream stream;
  expect(pom_stream_open(&stream, &shape, &here, memory.data(), bytes - 1) == POM_MEMORY_TOO_SMALL, "memory");
  expect(pom_stream_open(&stream, &shape, &here, nullptr, bytes) == POM_NULL_POINTER, "no memory");
  expect(pom_stream_open(nullptr, &shape, &here, memory.data(), bytes) == POM_NULL_POINTER, "no stream");
  expect(pom_stream_open(&stream, nullptr, &here, memory.data(), bytes) == POM_NULL_POINTER, "no shape");
  expect(pom_stream_open(&stream, &none, &here, memory.data(), bytes) == POM_NULL_POINTER, "no layers");
  expect(pom_stream_open(&stream, &shape, nullptr, memory.data(), bytes) == POM_NULL_POINTER, "no place");
}

// Functions on a stream that was never opened, or on other memory.
void test_nothing() {
  pom_stream closed = {}, *nobody = nullptr;
  Frame frame(kCase);
  pom_state state;
  char bytes[64];
  for (pom_stream* stream : {&closed, nobody}) {
    expect(pom_stream_workspace(stream, 0, &frame.view) == 0 && pom_stream_saved_bytes(stream) == 0, "a size");
    expect(pom_stream_peek(stream, 0, 0, &frame.view, bytes, 64) == POM_NULL_POINTER, "peek");
    expect(pom_stream_commit(stream, 0, 0, &frame.view, bytes, 64) == POM_NULL_POINTER, "commit");
    expect(pom_stream_state(stream, 0, 0, &state) == POM_NULL_POINTER, "state");
    expect(pom_stream_reset(stream) == POM_NULL_POINTER, "reset");
    expect(pom_stream_fork(stream, &closed) == POM_NULL_POINTER, "fork");
    expect(pom_stream_save(stream, bytes, 64) == POM_NULL_POINTER, "save");
    expect(pom_stream_load(stream, bytes, 64) == POM_NULL_POINTER, "load");
  }
  expect(pom_cpu_linear(nullptr, nullptr) == POM_NULL_POINTER, "linear of nothing");
  expect(*pom_status_message(12345) && *pom_status_message(-1) && *pom_cuda_error(), "no words");
}

void test_steps() {
  OpenStream s({layer_of(kCase)}, 2);
  Array values = draw(12 * 40, -1, 1);
  const Buffer data(Dtype::f32, values), coeff(Dtype::f32, values);
  Buffer y(Dtype::f32, 2 * 3 * 5);
  pom_step good = {};
  good.tokens = 3, good.dim = 5, good.x = data.data(), good.y = y.data(), good.coeff = coeff.data();
  good.in_weight = good.out_weight = data.data(), good.linear = pom_cpu_linear;
  const size_t bytes = s.stream.workspace(0, good);
  const Workspace workspace(bytes);
  const std::string before = s.bits();
  const auto refused = [&](const char* fault, Status wanted, size_t given, auto change) {
    pom_step step = good;
    change(step);
    y.clear();
    const Status status = s.stream.step(0, step, true, workspace.data(), given);
    expect(status == wanted, "%s: '%s', not '%s'", fault, message(status), message(wanted));
    expect(y.untouched() && s.bits() == before, "%s: something was written", fault);
  };
  refused("x", Status::null_pointer, bytes, [](pom_step& step) { step.x = nullptr; });
  refused("y", Status::null_pointer, bytes, [](pom_step& step) { step.y = nullptr; });
  refused("in_weight", Status::null_pointer, bytes, [](pom_step& step) { step.in_weight = nullptr; });
  refused("out_weight", Status::null_pointer, bytes, [](pom_step& step) { step.out_weight = nullptr; });
  refused("coeff", Status::null_pointer, bytes, [](pom_step& step) { step.coeff = nullptr; });
  refused("tokens -1", Status::bad_size, bytes, [](pom_step& step) { step.tokens = -1; });
  refused("dim 0", Status::bad_size, bytes, [](pom_step& step) { step.dim = 0; });
  refused("workspace", Status::workspace_too_small, bytes - 1, [](pom_step&) {});
  refused("y in x", Status::overlap, bytes, [](pom_step& step) { step.x = step.y; });
  expect(s.stream.step(0, good, true, workspace.data(), bytes) == Status::ok && s.bits() != before, "a good step");
}

void test_files() {
  OpenStream s({layer_of(kCase, 5), layer_of(kCase)}, 2, 2), other(s.layers, 2, 2);
  Frame frame(kCase);
  for (int64_t evaluation : {0, 1})
    for (int64_t layer : {0, 1}) act("frame", Act::commit, s, layer, frame, evaluation);
  std::memset(s.stream.state(0, 1).kept, 7, 5);
  const std::string file = s.bits();
  expect(other.stream.load(file.data(), file.size()) == Status::ok && other.bits() == file, "a file loads as it is");
  Frame next(kCase);
  act("next", Act::commit, s, 0, next), act("next", Act::commit, other, 0, next);
  expect(s.bits() == other.bits(), "a loaded stream goes on otherwise");

  const std::string stands = s.bits();
  const auto refused = [&](const char* fault, Status wanted, const std::string& bytes, OpenStream& into) {
    const std::string before = into.bits();
    const Status status = into.stream.load(bytes.data(), bytes.size());
    expect(status == wanted, "%s: '%s', not '%s'", fault, message(status), message(wanted));
    expect(into.bits() == before, "%s: the stream was changed", fault);
  };
  for (size_t i = 0; i < file.size(); ++i) {
    std::string flipped = file;
    flipped[i] ^= char(1 << i % 8);
    // Or a later version.
    refused("a flipped bit", i > 8 && i < 12 ? Status::later_version : Status::bad_file, flipped, s);
    if (i % 7 == 0) refused("truncated", Status::bad_file, file.substr(0, i), s);
  }
  refused("too long", Status::bad_file, file + "x", s);
  refused("not a stream", Status::bad_file, std::string(file.size(), 'x'), s);
  std::string later = file;
  later[8] = 2;
  refused("a later version", Status::later_version, later, s);
  expect(s.bits() == stands, "refusals changed the stream");

  Case wide = kCase, product = kCase, high = kCase, doubles = kCase;
  wide.shape.width = 16, product.form = Form::product, high.degree = 4, doubles.dtype = Dtype::f64;
  for (const Case& c : {wide, product, high, doubles}) {
    OpenStream different({layer_of(c, 5), layer_of(kCase)}, 2, 2);
    refused("another layer", Status::other_shape, file, different);
  }
  OpenStream keeps({layer_of(kCase, 6), layer_of(kCase)}, 2, 2), fewer({layer_of(kCase, 5)}, 2, 2);
  OpenStream batch(s.layers, 3, 2), evaluations(s.layers, 2, 1);
  for (OpenStream* different : {&keeps, &fewer, &batch, &evaluations}) {
    refused("another shape", Status::other_shape, file, *different);
    const std::string before = different->bits();
    expect(s.stream.fork_to(different->stream) == Status::other_shape && different->bits() == before, "a fork");
  }
  std::string room(file.size() - 1, 'x');
  expect(s.stream.save(room.data(), room.size()) == Status::memory_too_small && room == std::string(room.size(), 'x'),
         "a file one byte too small");
  expect(s.stream.save(nullptr, file.size()) == Status::null_pointer, "no file");
  expect(s.stream.load(nullptr, file.size()) == Status::null_pointer, "no file");
}

int main() {
  section("frames");
  test_frames();
  section("open");
  test_open();
  section("nothing");
  test_nothing();
  section("steps");
  test_steps();
  section("files");
  test_files();
  return check::finish();
}
