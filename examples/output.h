// Writes frames to standard output.
#pragma once

#include <cerrno>
#include <cmath>
#include <cstdio>

#include "patches.h"

namespace example {

enum class Format {
  ppm,   // a sequence of pictures, which players and tools read as they arrive
  rgb,   // their bytes only: rgb24
  f32,   // the model's own numbers, float32 (channels, frames, height, width), such as latents for a decoder
  none,  // nothing
};

class Output {
 public:
  Output(const Config& config, Format format) : config_(config), format_(format) {
    if ((format == Format::ppm || format == Format::rgb) && config.channels != 1 && config.channels != 3)
      throw std::runtime_error("the model's frames have " + std::to_string(config.channels) +
                               " channels, which are no picture; use --format f32");
    if (format == Format::ppm)
      header_ = "P6\n" + std::to_string(config.width) + " " + std::to_string(config.height) + "\n255\n";
    numbers_.resize(size_t(config.tokens() * config.values()));
    bytes_.resize(size_t(3 * config.height * config.width));
  }

  // The command that shows the frames; empty if they are no pictures.
  std::string command() const {
    if (format_ == Format::f32 || format_ == Format::none) return "";
    if (format_ == Format::ppm) return "ffplay -framerate " + rate() + " -";
    return "ffplay -f rawvideo -pixel_format rgb24 -video_size " + std::to_string(config_.width) + "x" +
           std::to_string(config_.height) + " -framerate " + rate() + " -";
  }

  // Writes a frame (tokens, values). Returns false if nobody reads any more.
  bool write(const float* patches) {
    if (format_ == Format::none) return true;
    for_each_number(config_, [&](int64_t patch, int64_t pixel) { numbers_[size_t(pixel)] = patches[patch]; });
    if (format_ == Format::f32)
      std::fwrite(numbers_.data(), sizeof(float), numbers_.size(), stdout);
    else
      for (int64_t frame = 0; frame < config_.frames; ++frame) write_picture(frame);
    if (!std::fflush(stdout) && !std::ferror(stdout)) return true;
    if (errno == EPIPE) return false;
    throw std::runtime_error("standard output cannot be written");
  }

 private:
  void write_picture(int64_t frame) {
    const int64_t pixels = config_.height * config_.width;
    for (int64_t i = 0; i < 3 * pixels; ++i) {
      const int64_t channel = config_.channels == 3 ? i % 3 : 0;  // grey: red, green and blue are equal
      const float number = numbers_[size_t((channel * config_.frames + frame) * pixels + i / 3)];
      const float light = number < -1 ? -1 : number > 1 ? 1 : number;
      bytes_[size_t(i)] = char(std::nearbyint((light + 1) * 127.5f));
    }
    std::fwrite(header_.data(), 1, header_.size(), stdout);
    std::fwrite(bytes_.data(), 1, bytes_.size(), stdout);
  }

  std::string rate() const {
    char text[32];
    std::snprintf(text, sizeof text, "%g", config_.fps);
    return text;
  }

  const Config& config_;
  Format format_;
  std::string header_;
  std::vector<float> numbers_;
  std::vector<char> bytes_;
};

}  // namespace example
