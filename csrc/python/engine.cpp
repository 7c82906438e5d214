// pom_ext._engine: the streams of pom/engine.h for Python. Needs no torch. What its functions mean is said in
// pom_ext/engine.py.

#include "pom/engine.hpp"
#include "python/array.h"

using pom::Dtype;
using pom::Status;

namespace {

[[noreturn]] void fail(Status status) {
  std::string words = pom_status_message(int(status));
  if (status == Status::device_error || status == Status::no_device_code) words += std::string(": ") + pom_cuda_error();
  if (status == Status::bad_index) throw py::index_error(words);
  if (status == Status::no_cuda || status == Status::device_error || status == Status::no_device_code)
    throw std::runtime_error(words);
  throw py::value_error(words);
}

// The arrays of one call: as long as this lives, so do they.
class Arrays {
 public:
  explicit Arrays(int32_t device) : device_(device) {}

  const Array* take(const char* name, const py::object& source, Dtype dtype, const std::vector<int64_t>& shape,
                    size_t dense) {
    if (source.is_none()) return nullptr;
    arrays_.push_back(std::make_unique<Array>(name, source));
    const Array& array = *arrays_.back();
    array.expect(dtype);
    array.expect_device(device_);
    array.expect(shape);
    array.expect_dense(dense);
    return &array;
  }
  void* data(const char* name, const py::object& source, Dtype dtype, const std::vector<int64_t>& shape) {
    const Array* const array = take(name, source, dtype, shape, shape.size());
    return array ? array->data() : nullptr;
  }

 private:
  int32_t device_;
  std::vector<std::unique_ptr<Array>> arrays_;
};

std::vector<int64_t> shape_of(const char* name, const py::object& source, size_t dimensions) {
  const std::vector<int64_t> shape = Array(name, source).shape;
  if (shape.size() == dimensions) return shape;
  throw py::value_error(std::string(name) + ": expected " + std::to_string(dimensions) + " dimensions, got shape " +
                        shown(shape));
}

class Stream {
 public:
  // Layers as tuples (form, degree, dtype, heads, width, kept); memory comes from allocate(bytes) -> 1-D uint8 array.
  Stream(const py::sequence& layers, int64_t batch, int64_t evaluations, py::function allocate)
      : allocate_(std::move(allocate)) {
    for (const py::handle& given : layers) {
      const auto [form, degree, dtype, heads, width, kept] =
          given.cast<std::tuple<int32_t, int32_t, int32_t, int32_t, int64_t, size_t>>();
      layers_.push_back({form, degree, dtype, heads, width, kept});
    }
    const pom_shape shape = {layers_.data(), int64_t(layers_.size()), batch, evaluations};
    batch_ = batch;
    memory_ = bytes_of(std::max<size_t>(1, pom::Stream::bytes(shape)));
    place_.device = memory_->device() == kDLCuda ? POM_DEVICE_CUDA : POM_DEVICE_CPU;
    check(stream_.open(shape, place_, memory_->data(), size_t(memory_->shape[0])));
  }

  py::object frame(int64_t layer, const py::object& u, const py::object& gate, const py::object& coeff,
                   const py::object& weight, const py::object& rotary, const py::object& gate_rotary,
                   int64_t evaluation, py::object out, bool commit) {
    const pom_layer& l = layer_of(layer);
    Arrays arrays(memory_->device());
    pom_frame f = {};
    f.tokens = shape_of("u", u, 3)[1], f.queries = gate.is_none() ? 0 : shape_of("gate", gate, 3)[1];
    const Array& rows = *arrays.take("u", u, Dtype(l.dtype), {batch_, f.tokens, channels(l)}, 1);
    f.u = rows.data(), f.u_batch_stride = rows.strides[0], f.u_token_stride = rows.strides[1];
    f.coeff = arrays.data("coeff", coeff, acc(l), {l.width, l.degree});
    f.weight = arrays.data("weight", weight, acc(l), {batch_, f.tokens});
    f.rotary = angles("rotary", rotary, arrays, acc(l), f.tokens);
    if (!gate.is_none()) {
      const Array& gates = *arrays.take("gate", gate, Dtype(l.dtype), {batch_, f.queries, gates_of(l)}, 1);
      f.gate = gates.data(), f.gate_batch_stride = gates.strides[0], f.gate_token_stride = gates.strides[1];
      f.gate_rotary = angles("gate_rotary", gate_rotary, arrays, acc(l), f.queries);
      if (out.is_none()) out = empty({batch_, f.queries, channels(l)}, l);
      f.y = arrays.data("out", out, Dtype(l.dtype), {batch_, f.queries, channels(l)});
    }
    const auto [workspace, bytes] = workspace_of(stream_.workspace(layer, f));
    stream_.place() = place_;
    check(unlocked([&, workspace = workspace, bytes = bytes] {
      return commit ? stream_.commit(layer, f, workspace, bytes, evaluation)
                    : stream_.peek(layer, f, workspace, bytes, evaluation);
    }));
    return gate.is_none() ? py::none() : out;
  }

  py::object step(int64_t layer, const py::object& x, const py::object& in_weight, const py::object& out_weight,
                  const py::object& in_bias, const py::object& out_bias, const py::object& coeff,
                  const py::object& rotary, const py::object& gate_rotary, int64_t evaluation, py::object out,
                  bool commit) {
    const pom_layer& l = layer_of(layer);
    if (place_.device == POM_DEVICE_CUDA)
      throw std::runtime_error("step: on a GPU the projections are the caller's; use peek and commit");
    Arrays arrays(memory_->device());
    const Dtype dtype = Dtype(l.dtype);
    const int64_t width = channels(l), both = width + gates_of(l);
    pom_step s = {};
    const std::vector<int64_t> shape = shape_of("x", x, 3);
    s.tokens = shape[1], s.dim = shape[2];
    if (out.is_none()) out = empty({batch_, s.tokens, s.dim}, l);
    s.x = arrays.data("x", x, dtype, {batch_, s.tokens, s.dim});
    s.y = arrays.data("out", out, dtype, {batch_, s.tokens, s.dim});
    s.in_weight = arrays.data("in_weight", in_weight, dtype, {both, s.dim});
    s.out_weight = arrays.data("out_weight", out_weight, dtype, {s.dim, width});
    s.in_bias = arrays.data("in_bias", in_bias, dtype, {both});
    s.out_bias = arrays.data("out_bias", out_bias, dtype, {s.dim});
    s.coeff = arrays.data("coeff", coeff, acc(l), {l.width, l.degree});
    s.rotary = angles("rotary", rotary, arrays, acc(l), s.tokens);
    s.gate_rotary = angles("gate_rotary", gate_rotary, arrays, acc(l), s.tokens);
    const auto [workspace, bytes] = workspace_of(stream_.workspace(layer, s));
    check(unlocked([&, workspace = workspace, bytes = bytes] {
      return stream_.step(layer, s, commit, workspace, bytes, evaluation);
    }));
    return out;
  }

  void copy_to(Stream& other) const { check(stream_.fork_to(other.stream_)); }
  void reset() { check(stream_.reset()); }

  py::bytes save() const {
    std::string file(stream_.saved_bytes(), 0);
    check(stream_.save(file.data(), file.size()));
    return file;
  }
  void load(const py::bytes& file) {
    const std::string_view bytes = file;
    check(stream_.load(bytes.data(), bytes.size()));
  }

  // Addresses of total, residual, count and what is kept; 0 for nothing kept.
  py::tuple state(int64_t layer, int64_t evaluation) const {
    const pom_state state = stream_.state(layer, evaluation);
    if (!state.total) fail(Status::bad_index);
    const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    return py::make_tuple(address(state.total), address(state.residual), address(state.count), address(state.kept));
  }
  bool on_gpu() const { return place_.device == POM_DEVICE_CUDA; }

  uintptr_t cuda_stream() const { return reinterpret_cast<uintptr_t>(place_.cuda_stream); }
  void set_cuda_stream(uintptr_t stream) {
    place_.cuda_stream = reinterpret_cast<void*>(stream);
    stream_.place() = place_;
  }

 private:
  static void check(Status status) {
    if (status != Status::ok) fail(status);
  }
  template <class Body>
  static Status unlocked(Body body) {
    const py::gil_scoped_release release;
    return body();
  }
  static int64_t channels(const pom_layer& l) { return l.form == POM_PRODUCT ? l.degree * l.width : l.width; }
  static int64_t gates_of(const pom_layer& l) { return l.heads > 1 ? l.heads : channels(l); }
  static Dtype acc(const pom_layer& l) { return l.dtype == POM_F64 ? Dtype::f64 : Dtype::f32; }

  const pom_layer& layer_of(int64_t layer) const {
    if (layer < 0 || layer >= int64_t(layers_.size())) fail(Status::bad_index);
    return layers_[size_t(layer)];
  }

  // (cos, sin, axes), cos and sin (tokens, axes * half).
  static pom_rotary angles(const char* name, const py::object& given, Arrays& arrays, Dtype acc, int64_t tokens) {
    if (given.is_none()) return {};
    if (!py::isinstance<py::tuple>(given) || py::len(given) != 3)
      throw py::type_error(std::string(name) + ": expected a tuple (cos, sin, axes)");
    const auto [cos, sin, axes] = given.cast<std::tuple<py::object, py::object, int32_t>>();
    const int64_t columns = shape_of(name, cos, 2)[1];
    if (axes < 1 || columns % axes)
      throw py::value_error(std::string(name) + ": expected (cos, sin, axes) with tables of axes * half columns");
    return {arrays.data(name, cos, acc, {tokens, columns}), arrays.data(name, sin, acc, {tokens, columns}),
            columns / axes, axes};
  }

  py::object empty(const std::vector<int64_t>& shape, const pom_layer& l) const {
    constexpr const char* kNames[] = {"float32", "float64", nullptr, "float16"};
    if (on_gpu() || !kNames[l.dtype])
      throw py::value_error("out: expected an array to write to, since numpy has none on a GPU or in bfloat16");
    return py::module_::import("numpy").attr("empty")(py::cast(shape), kNames[l.dtype]);
  }

  std::unique_ptr<Array> bytes_of(size_t bytes) const {
    auto array = std::make_unique<Array>("allocate", allocate_(bytes));
    const DLDataType type = array->type();
    if (type.code != kDLUnsigned || type.bits != 8 || array->shape.size() != 1 || array->shape[0] < int64_t(bytes))
      throw py::value_error("allocate: expected a function of a number that returns as many bytes, an array of uint8");
    array->expect_dense(1);
    return array;
  }
  std::pair<void*, size_t> workspace_of(size_t bytes) {
    if (!workspace_ || workspace_->shape[0] < int64_t(bytes)) workspace_ = bytes_of(bytes);
    return {workspace_->data(), size_t(workspace_->shape[0])};
  }

  py::function allocate_;
  std::vector<pom_layer> layers_;
  std::unique_ptr<Array> memory_, workspace_;
  int64_t batch_;
  pom_place place_ = {};
  pom::Stream stream_;
};

}  // namespace

PYBIND11_MODULE(_engine, module) {
  py::class_<Stream>(module, "Stream")
      .def(py::init<py::sequence, int64_t, int64_t, py::function>())
      .def("frame", &Stream::frame)
      .def("step", &Stream::step)
      .def("copy_to", &Stream::copy_to)
      .def("reset", &Stream::reset)
      .def("save", &Stream::save)
      .def("load", &Stream::load)
      .def("state", &Stream::state)
      .def_property_readonly("on_gpu", &Stream::on_gpu)
      .def_property("cuda_stream", &Stream::cuda_stream, &Stream::set_cuda_stream);
#ifdef POM_CUDA
  module.attr("CUDA") = true;
#else
  module.attr("CUDA") = false;
#endif
}
