// The loop that draws frames, on either device.
#pragma once

#include <algorithm>
#include <chrono>
#include <memory>

#include "files.h"
#include "noise.h"
#include "options.h"

namespace example {

// The times of the latest frames in milliseconds; allocates nothing while it runs.
class Clock {
 public:
  Clock() { latest_.reserve(kKept); }

  void add(double milliseconds) {
    if (latest_.size() < kKept)
      latest_.push_back(milliseconds);
    else
      latest_[count_ % kKept] = milliseconds;
    ++count_;
  }
  size_t frames() const { return count_; }
  double median() {
    std::nth_element(latest_.begin(), latest_.begin() + int64_t(latest_.size() / 2), latest_.end());
    return latest_[latest_.size() / 2];
  }

 private:
  static constexpr size_t kKept = 1000;
  std::vector<double> latest_;
  size_t count_ = 0;
};

inline void resume(pom_stream& stream, const std::string& path) {
  const auto bytes = read_file(path);
  const pom_status status = pom_stream_load(&stream, bytes.data(), bytes.size());
  if (status != POM_OK) throw std::runtime_error("resume: " + path + ": " + pom_status_message(status));
}

inline void save(const pom_stream& stream, const std::string& path) {
  std::vector<char> bytes(pom_stream_saved_bytes(&stream));
  check(pom_stream_save(&stream, bytes.data(), bytes.size()));
  write_file(path, bytes);
}

template <class Device>
void draw(const Options& options) {
  Device device;
  auto file = std::make_unique<Safetensors>(options.model);
  Sampler<Device> sampler(device, *file, options.sampling);
  file.reset();  // the device has its numbers now
  const Config& config = sampler.config();

  std::vector<int64_t> labels = options.labels;
  if (!config.classes && !labels.empty()) throw std::runtime_error("label: the model has no classes");
  if (labels.empty()) labels = {0};
  for (const int64_t label : labels) {
    if (config.classes && label > config.classes)
      throw std::runtime_error("label: expected 0 to " + std::to_string(config.classes) + ", which means none");
    sampler.expect(label);
  }
  if (options.sampling.guidance != 1 && !config.classes)
    throw std::runtime_error("guidance: a model without classes draws with guidance 1 only");
  if (options.sampling.context_noise > 0 && config.shared)
    throw std::runtime_error("context-noise: this model sees the noise of the frames before, and no finished ones");

  if (!options.resume.empty()) resume(sampler.stream(), options.resume);
  std::unique_ptr<NoiseFile> given;
  if (!options.noise.empty()) given = std::make_unique<NoiseFile>(config, options.noise);
  const Generator generator(config, options.seed);
  const bool noisy_memory = options.sampling.context_noise > 0;
  std::vector<float> noise(size_t(sampler.size())), memory_noise(noise), frame(noise);
  Output output(config, options.format);
  if (const std::string command = output.command(); !command.empty())
    std::fprintf(stderr, "to watch, pipe into: %s\n", command.c_str());

  Clock clock;
  const int64_t first = sampler.frames();
  for (int64_t i = 0; i != options.frames; ++i) {
    const auto start = std::chrono::steady_clock::now();
    if (given) {
      given->fill(noise.data());
      if (noisy_memory) given->fill(memory_noise.data());
    } else {
      generator.fill(first + i, 0, noise.data());
      if (noisy_memory) generator.fill(first + i, 1, memory_noise.data());
    }
    const int64_t label = labels[size_t(std::min(i, int64_t(labels.size()) - 1))];
    sampler.next(label, noise.data(), noisy_memory ? memory_noise.data() : nullptr, frame.data());
    clock.add(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    if (!output.write(frame.data())) break;
  }
  std::fprintf(stderr, "%zu frames, %.2f ms each (median)\n", clock.frames(), clock.median());
  if (!options.save.empty()) save(sampler.stream(), options.save);
}

#ifdef STREAM_WITH_CUDA
void draw_on_gpu(const Options& options);
#endif

}  // namespace example
