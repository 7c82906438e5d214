// The command line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "output.h"
#include "sampler.h"

namespace example {

struct Options {
  std::string model, noise, save, resume;
  int64_t frames = -1;               // no limit
  std::vector<int64_t> labels = {};  // one per frame; the last one applies to all later frames
  uint64_t seed = 0;
  Format format = Format::ppm;
  Sampling sampling;
  bool cuda = false;
};

}  // namespace example
