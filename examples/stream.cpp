// Draws endless video from a model that `pom-ext export` wrote, frame by frame, with the engine alone:
//
//   pom-ext export model.safetensors --out engine.safetensors
//   stream engine.safetensors | ffplay -

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "cpu.h"
#include "draw.h"

namespace {

using example::Format;
using example::Options;

constexpr char kUsage[] =
    R"(usage: stream MODEL [options] | ffplay -

MODEL is a file that `pom-ext export` wrote.
  --frames N         draw so many frames of tokens; without it, no end
  --label K[,K...]   class or action of the frames one by one, the last one stays; by default 0
  --steps N          solver steps of a frame, by default 8
  --guidance G       classifier-free guidance, by default 1: none
  --context-noise X  noise with which finished frames are remembered, from 0 to less than 1, by default 0
  --seed S           of the noise, by default 0
  --noise FILE       take the noise from a file: float32 (channels, frames, height, width), frame after frame
  --format F         ppm (by default), rgb (rgb24), f32 (the model's own numbers) or none
  --save FILE        keep the stream when the frames are drawn, or nobody looks any more
  --resume FILE      go on from a kept stream
  --cuda             draw on the GPU
)";

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

double number(const std::string& name, const std::string& text) {
  char* end;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !std::isfinite(value)) refuse(name + ": expected a number, got '" + text + "'");
  return value;
}

int64_t integer(const std::string& name, const std::string& text, int64_t least) {
  char* end;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end || value < least)
    refuse(name + ": expected an integer of at least " + std::to_string(least) + ", got '" + text + "'");
  return value;
}

Format format(const std::string& text) {
  if (text == "ppm") return Format::ppm;
  if (text == "rgb") return Format::rgb;
  if (text == "f32") return Format::f32;
  if (text == "none") return Format::none;
  refuse("--format: expected ppm, rgb, f32 or none, got '" + text + "'");
}

std::vector<int64_t> labels(const std::string& name, const std::string& text) {
  std::istringstream parts(text + ",");
  std::vector<int64_t> all;
  for (std::string part; std::getline(parts, part, ',');) all.push_back(integer(name, part, 0));
  return all;
}

Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string name = words[i];
    if (name.rfind("--", 0) != 0) {
      if (!options.model.empty()) refuse("expected one MODEL, got " + options.model + " and " + name);
      options.model = name;
      continue;
    }
    if (name == "--cuda") {
      options.cuda = true;
      continue;
    }
    if (++i == count) refuse(name + ": expected a value behind it");
    const std::string value = words[i];
    if (name == "--frames")
      options.frames = integer(name, value, 1);
    else if (name == "--label")
      options.labels = labels(name, value);
    else if (name == "--steps")
      options.sampling.steps = integer(name, value, 1);
    else if (name == "--guidance")
      options.sampling.guidance = float(number(name, value));
    else if (name == "--context-noise")
      options.sampling.context_noise = float(number(name, value));
    else if (name == "--seed")
      options.seed = uint64_t(integer(name, value, 0));
    else if (name == "--noise")
      options.noise = value;
    else if (name == "--format")
      options.format = format(value);
    else if (name == "--save")
      options.save = value;
    else if (name == "--resume")
      options.resume = value;
    else
      refuse(name + ": no such option; see --help");
  }
  if (options.model.empty()) refuse("expected a MODEL, a file that `pom-ext export` wrote; see --help");
  if (options.sampling.guidance < 0) refuse("--guidance: expected at least 0");
  if (options.sampling.context_noise < 0 || options.sampling.context_noise >= 1)
    refuse("--context-noise: expected at least 0 and less than 1");
  return options;
}

}  // namespace

int main(int count, char** words) {
  for (int i = 1; i < count; ++i)
    if (!std::strcmp(words[i], "--help")) return std::fputs(kUsage, stdout) < 0;
#ifdef SIGPIPE
  std::signal(SIGPIPE, SIG_IGN);  // closing the window ends the program without an error
#endif
  try {
    const Options options = parse(count, words);
    if (!options.cuda)
      example::draw<example::Cpu>(options);
    else
#ifdef STREAM_WITH_CUDA
      example::draw_on_gpu(options);
#else
      refuse("--cuda: this program was built without CUDA");
#endif
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
