// Draws a video frame by frame: Euler steps from noise to the frame, which the stream then remembers.
#pragma once

#include "video_dit.h"

namespace example {

struct Sampling {
  int64_t steps = 8;
  float guidance = 1;       // of classifier-free guidance; 1 is none, others evaluate every frame twice
  float context_noise = 0;  // share of noise in frames that the stream remembers
};

template <class Device>
class Sampler {
 public:
  Sampler(Device& device, const Safetensors& file, const Sampling& sampling)
      : device_(device),
        sampling_(sampling),
        batch_(sampling.guidance == 1 ? 1 : 2),
        config_(ConfigReader(file).read(batch_)),
        conditions_(device, file, config_, network_times()),
        model_(device, file, config_, batch_) {
    const int64_t numbers = size();
    for (float** const frame : {&noise_, &memory_noise_, &x_, &remembered_}) *frame = device.floats(numbers);
    velocity_ = device.floats(batch_ * numbers);
    active_ = device.floats(batch_ * conditions_.size());
    const pom_shape shape = {config_.layers.data(), int64_t(config_.layers.size()), batch_,
                             config_.shared ? sampling.steps : 1};
    const size_t bytes = pom_stream_bytes(&shape);
    if (!bytes) file.fail("has layers that the engine does not know");
    const pom_place place = device.place();
    check(pom_stream_open(&stream_, &shape, &place, device.floats(int64_t(bytes / sizeof(float) + 1)), bytes));
    model_.prepare(stream_);
  }
  Sampler(const Sampler&) = delete;

  const Config& config() const { return config_; }
  pom_stream& stream() { return stream_; }
  int64_t size() const { return config_.tokens() * config_.values(); }  // numbers of a frame

  // How many frames the stream remembers.
  int64_t frames() {
    pom_state state;
    check(pom_stream_state(&stream_, 0, 0, &state));
    double tokens;
    device_.copy(&tokens, state.count, sizeof tokens);
    device_.wait();
    return int64_t(tokens) / config_.tokens();
  }

  // Prepares this label, so that its first frame is as fast as the others.
  void expect(int64_t label) { conditions_.of(label); }

  // The next frame (tokens, values) from noise of that shape; `memory_noise` is for context noise, else null.
  void next(int64_t label, const float* noise, const float* memory_noise, float* frame) {
    if (label != label_) {
      const int64_t numbers = conditions_.size();
      device_.copy(active_, conditions_.of(label), size_t(numbers) * sizeof(float));
      if (batch_ > 1) device_.copy(active_ + numbers, conditions_.of(config_.classes), size_t(numbers) * sizeof(float));
      label_ = label;
    }
    const size_t bytes = size_t(size()) * sizeof(float);
    device_.copy(noise_, noise, bytes);
    if (memory_noise) device_.copy(memory_noise_, memory_noise, bytes);
    device_.repeat([this] { draw(); });
    device_.copy(frame, x_, bytes);
    device_.wait();
  }

 private:
  // The times 1 = t_0 > ... > t_steps = 0 of the solver. The shift moves more of them to high noise.
  std::vector<double> times() const {
    std::vector<double> all;
    for (int64_t i = 0; i <= sampling_.steps; ++i) {
      const double time = 1 - double(i) / double(sampling_.steps);
      all.push_back(config_.shift * time / (1 + (config_.shift - 1) * time));
    }
    return all;
  }

  // The times of the evaluations on the network's scale: of the steps, and of remembering the frame.
  std::vector<float> network_times() const {
    std::vector<float> all;
    for (const double time : times()) all.push_back(float(1000 * time));
    all.back() = float(1000 * double(sampling_.context_noise));
    return all;
  }

  Modulation condition(int64_t evaluation) const {
    return {active_ + evaluation * config_.modulations(), conditions_.size(), config_.tokens()};
  }

  void draw() {
    const int64_t tokens = config_.tokens(), values = config_.values();
    device_.copy(x_, noise_, size_t(size()) * sizeof(float));
    for (int64_t i = 0; i < sampling_.steps; ++i) {
      const bool shared = config_.shared;
      model_.evaluate(stream_, shared ? i : 0, shared ? Memory::goes_on : Memory::stays, x_, condition(i), velocity_);
      const auto step = float(times_[size_t(i) + 1] - times_[size_t(i)]);
      device_.rows(tokens, Follow{values, tokens, step, sampling_.guidance, batch_ > 1, velocity_, x_});
    }
    if (config_.shared) return;
    const float* finished = x_;
    if (sampling_.context_noise > 0) {
      device_.rows(tokens, AddNoise{values, sampling_.context_noise, x_, memory_noise_, remembered_});
      finished = remembered_;
    }
    model_.evaluate(stream_, 0, Memory::goes_on, finished, condition(sampling_.steps), nullptr);
  }

  Device& device_;
  Sampling sampling_;
  int64_t batch_;
  Config config_;
  std::vector<double> times_ = times();
  Conditions<Device> conditions_;
  VideoDit<Device> model_;
  pom_stream stream_ = {};
  float *noise_, *memory_noise_, *x_, *remembered_, *velocity_, *active_;
  int64_t label_ = -1;
};

}  // namespace example
