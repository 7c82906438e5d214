// Arrays of any Python library, by the DLPack protocol: numpy, torch, CuPy, JAX. Nothing is copied.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "pom/types.h"

namespace py = pybind11;

// The C structs of DLPack 0.8, which every producer still gives when it is not asked for more.
struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t dimensions;
  DLDataType dtype;
  int64_t *shape, *strides;  // strides may be null: dense
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kDLCuda = 2;
constexpr uint8_t kDLUnsigned = 1, kDLFloat = 2, kDLBfloat = 4;

inline std::string shown(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// One array, borrowed as long as this lives.
class Array {
 public:
  Array(const char* name, const py::object& source) : name_(name) {
    if (!py::hasattr(source, "__dlpack__"))
      throw py::type_error(error("an array with __dlpack__, such as numpy's or torch's",
                                 py::str(py::type::of(source).attr("__name__"))));
    capsule_ = source.attr("__dlpack__")();
    auto* const managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    if (!managed) throw py::error_already_set();
    PyCapsule_SetName(capsule_.ptr(), "used_dltensor");  // ours to give back
    managed_ = managed;
    const DLTensor& t = managed_->tensor;
    shape.assign(t.shape, t.shape + t.dimensions);
    if (t.strides) {
      strides.assign(t.strides, t.strides + t.dimensions);
    } else {
      strides.assign(shape.size(), 1);
      for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
    }
  }
  Array(const Array&) = delete;
  ~Array() {
    if (managed_ && managed_->deleter) managed_->deleter(managed_);
  }

  void* data() const { return static_cast<char*>(managed_->tensor.data) + managed_->tensor.byte_offset; }
  int32_t device() const { return managed_->tensor.device.type; }
  DLDataType type() const { return managed_->tensor.dtype; }

  // Throws unless the array is this.
  void expect(const std::vector<int64_t>& wanted) const {
    if (shape != wanted) throw py::value_error(error("shape " + shown(wanted), shown(shape)));
  }
  void expect(pom::Dtype wanted) const {
    constexpr DLDataType kTypes[] = {{kDLFloat, 32, 1}, {kDLFloat, 64, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};
    constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
    const auto equal = [](DLDataType a, DLDataType b) {
      return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
    };
    if (equal(type(), kTypes[int(wanted)])) return;
    std::string got = "another type";
    for (int i = 0; i < 4; ++i)
      if (equal(type(), kTypes[i])) got = kNames[i];
    throw py::type_error(error(kNames[int(wanted)], got));
  }
  void expect_device(int32_t wanted) const {
    if (device() != wanted)
      throw py::value_error(error(wanted == kDLCuda ? "an array on the GPU, as the stream's memory"
                                                    : "an array of the CPU, as the stream's memory",
                                  device() == kDLCuda ? "one on a GPU" : "one elsewhere"));
  }
  // Numbers of the last `dimensions` dimensions side by side.
  void expect_dense(size_t dimensions) const {
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > shape.size() - dimensions;) {
      if (shape[i] > 1 && strides[i] != stride)
        throw py::value_error(error(dimensions == 1 ? "channels side by side in memory" : "a contiguous array",
                                    "strides " + shown(strides) + "; make it contiguous"));
      stride *= shape[i];
    }
  }

  std::vector<int64_t> shape, strides;

 private:
  std::string error(const std::string& expected, const std::string& got) const {
    return std::string(name_) + ": expected " + expected + ", got " + got;
  }

  const char* name_;
  py::object capsule_;
  DLManagedTensor* managed_ = nullptr;
};
