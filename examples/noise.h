// The noise that frames are drawn from.
#pragma once

#include <cmath>
#include <fstream>

#include "patches.h"

namespace example {

// Normal numbers that depend only on the seed, the frame and their place, so that a resumed video continues as it would
// have.
class Generator {
 public:
  Generator(const Config& config, uint64_t seed) : config_(config), seed_(mixed(seed)) {}

  // kind: 0 for the frame that is drawn, 1 for its context noise.
  void fill(int64_t frame, int kind, float* patches) const {
    const int64_t n = config_.tokens() * config_.values();
    const uint64_t key = mixed(seed_ ^ mixed(2 * uint64_t(frame) + uint64_t(kind)));
    for (int64_t i = 0; i < n; ++i) {  // Box and Muller 1958
      const uint64_t bits = mixed(key + uint64_t(i));
      const double one = double((bits >> 32) + 1) * 0x1p-32, two = double(bits & 0xffffffff) * 0x1p-32;
      patches[i] = float(std::sqrt(-2 * std::log(one)) * std::cos(6.283185307179586 * two));
    }
  }

 private:
  // SplitMix64 (Steele, Lea and Flood 2014).
  static uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

  const Config& config_;
  uint64_t seed_;
};

// Noise from a file, for comparisons: float32 (channels, frames, height, width), read in order.
class NoiseFile {
 public:
  NoiseFile(const Config& config, const std::string& path)
      : config_(config), path_(path), file_(path, std::ios::binary), pixels_(config.tokens() * config.values()) {
    if (!file_) throw std::runtime_error("noise: " + path + " cannot be opened");
  }

  void fill(float* patches) {
    if (!file_.read(reinterpret_cast<char*>(pixels_.data()), std::streamsize(pixels_.size() * sizeof(float))))
      throw std::runtime_error("noise: " + path_ + " ends before the video does");
    for_each_number(config_, [&](int64_t patch, int64_t pixel) { patches[patch] = pixels_[size_t(pixel)]; });
  }

 private:
  const Config& config_;
  std::string path_;
  std::ifstream file_;
  std::vector<float> pixels_;
};

}  // namespace example
