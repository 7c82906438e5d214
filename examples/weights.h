// A file's weights on the device.
#pragma once

#include "check.h"
#include "rows.h"
#include "safetensors.h"

namespace example {

template <class Device>
const float* uploaded(Device& device, const Safetensors& file, const std::string& name,
                      const std::vector<int64_t>& shape) {
  const auto numbers = file.floats(name, shape);
  float* const there = device.floats(int64_t(numbers.size()));
  device.copy(there, numbers.data(), numbers.size() * sizeof(float));
  return there;
}

// y (rows, outputs) = x (rows, inputs) times the transpose of weight (outputs, inputs), plus bias (outputs).
template <class Device>
struct Linear {
  int64_t outputs, inputs;
  const float *weight, *bias;

  Linear(Device& device, const Safetensors& file, const std::string& name, int64_t outputs, int64_t inputs)
      : outputs(outputs),
        inputs(inputs),
        weight(uploaded(device, file, name + ".weight", {outputs, inputs})),
        bias(uploaded(device, file, name + ".bias", {outputs})) {}

  void apply(Device& device, int64_t rows, const float* x, float* y) const {
    const pom_linear map = {POM_F32, rows, inputs, outputs, x, weight, bias, y};
    check(Device::linear(&device, &map));
  }
};

}  // namespace example
