// The modulations that time and label give the blocks of a model. They depend on nothing else, so they are computed
// once per label.
#pragma once

#include <map>

#include "config.h"
#include "weights.h"

namespace example {

template <class Device>
class Conditions {
 public:
  // times: of the evaluations of a frame, on the network's scale from 0 to 1000.
  Conditions(Device& device, const Safetensors& file, const Config& config, const std::vector<float>& times)
      : device_(device),
        config_(config),
        count_(int64_t(times.size())),
        time_in_(device, file, "time.in", 4 * config.dim, config.dim),
        time_out_(device, file, "time.out", config.dim, 4 * config.dim),
        modulation_(device, file, "modulation", config.modulations(), config.dim),
        labels_(config.classes ? uploaded(device, file, "labels", {config.classes + 1, config.dim}) : nullptr),
        waves_(device.floats(count_ * config.dim)),
        hidden_(device.floats(count_ * 4 * config.dim)),
        condition_(device.floats(count_ * config.dim)) {
    const auto frequencies = file.floats("time.frequencies", {config.dim / 2});
    std::vector<float> waves;
    for (const float time : times) {
      for (const float frequency : frequencies) waves.push_back(std::cos(time * frequency));
      for (const float frequency : frequencies) waves.push_back(std::sin(time * frequency));
    }
    device.copy(waves_, waves.data(), waves.size() * sizeof(float));
  }

  int64_t size() const { return count_ * config_.modulations(); }

  // (times, modulations) for a label; label `classes` means none. A model without classes takes any label.
  const float* of(int64_t label) {
    const auto [found, missing] = known_.try_emplace(label, nullptr);
    if (missing) found->second = compute(label);
    return found->second;
  }

 private:
  const float* compute(int64_t label) {
    float* const made = device_.floats(size());
    time_in_.apply(device_, count_, waves_, hidden_);
    device_.rows(count_, Silu{4 * config_.dim, nullptr, hidden_});
    time_out_.apply(device_, count_, hidden_, condition_);
    device_.rows(count_, Silu{config_.dim, labels_ ? labels_ + label * config_.dim : nullptr, condition_});
    modulation_.apply(device_, count_, condition_, made);
    return made;
  }

  Device& device_;
  const Config& config_;
  int64_t count_;
  Linear<Device> time_in_, time_out_, modulation_;
  const float* labels_;
  float *waves_, *hidden_, *condition_;
  std::map<int64_t, const float*> known_;
};

}  // namespace example
