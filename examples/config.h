// The sizes of an exported model, and its layers as the engine takes them.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "pom/engine.h"
#include "safetensors.h"

namespace example {

struct Config {
  int64_t channels, frames, patch_height,
      patch_width;            // of a video and of a patch; `frames` video frames are drawn together
  int64_t height, width;      // of a video frame
  int64_t dim, ffw, classes;  // of a token, of its feed-forward layers; 0 classes: no labels
  std::vector<int64_t> conv_frames;  // that the convolution of each layer sees, its own and those before; 0: no such
  bool shared;  // frames see the noise of earlier frames at the same evaluation; else the finished frames
  double shift, fps;
  std::vector<pom_layer> layers;

  int64_t rows() const { return height / patch_height; }
  int64_t columns() const { return width / patch_width; }
  int64_t tokens() const { return rows() * columns(); }                              // of a frame
  int64_t values() const { return frames * patch_height * patch_width * channels; }  // of a patch
  int64_t modulations() const { return (6 * int64_t(layers.size()) + 2) * dim; }     // that a condition provides
};

// Channels of a state, and gates of a token.
inline int64_t channels_of(const pom_layer& layer) {
  return layer.form == POM_PRODUCT ? layer.degree * layer.width : layer.width;
}
inline int64_t gates_of(const pom_layer& layer) { return layer.heads > 1 ? layer.heads : channels_of(layer); }

class ConfigReader {
 public:
  explicit ConfigReader(const Safetensors& file) : file_(file) {}

  // The bytes beside each layer hold the earlier frames that its convolution sees, for every video.
  Config read(int64_t batch) const {
    if (file_.metadata("format") != "pom_ext video 2")
      file_.fail("is of another version; write it with: pom-ext export");
    const auto patch = integers("patch", 3, 1), size = integers("size", 2, 1);
    Config c = {};
    c.channels = integers("channels", 1, 1)[0];
    c.frames = patch[0], c.patch_height = patch[1], c.patch_width = patch[2];
    c.height = size[0], c.width = size[1];
    if (c.height % c.patch_height || c.width % c.patch_width) file_.fail("has a size that its patch does not divide");
    c.dim = integers("dim", 1, 8)[0], c.ffw = integers("ffw", 1, 1)[0], c.classes = integers("classes", 1, 0)[0];
    if (c.dim % 8) file_.fail("has a 'dim' that is no multiple of 8");
    const double pixels = double(c.height) * double(c.width);
    if (std::max(double(c.values()), double(c.dim)) * pixels > 0x1p31) file_.fail("has sizes that are too large");
    c.shared = file_.metadata("context") == "shared";
    c.shift = positive("shift"), c.fps = positive("fps");
    const auto forms = words("forms");
    const auto degrees = integers("degrees", forms.size(), 1), heads = integers("heads", forms.size(), 1),
               widths = integers("widths", forms.size(), 1);
    c.conv_frames = integers("conv_frames", forms.size(), 0);
    for (size_t i = 0; i < forms.size(); ++i) {
      const auto cached = std::max<int64_t>(0, c.conv_frames[i] - 1) * batch * c.tokens() * c.dim;
      const auto cache_bytes = size_t(cached) * sizeof(float);
      if (forms[i] != "product" && forms[i] != "power") file_.fail("has a layer of the unknown form " + forms[i]);
      const int32_t form = forms[i] == "product" ? POM_PRODUCT : POM_POWER;
      c.layers.push_back({form, int32_t(degrees[i]), POM_F32, int32_t(heads[i]), widths[i], cache_bytes});
    }
    return c;
  }

 private:
  std::vector<std::string> words(const std::string& name) const {
    std::istringstream text(file_.metadata(name));
    std::vector<std::string> all;
    for (std::string word; text >> word;) all.push_back(word);
    return all;
  }

  std::vector<int64_t> integers(const std::string& name, size_t count, int64_t least) const {
    constexpr int64_t kMost = 1 << 15;  // so that no product of sizes overflows
    std::vector<int64_t> all;
    for (const std::string& word : words(name)) {
      char* end;
      all.push_back(std::strtoll(word.c_str(), &end, 10));
      if (*end || all.back() < least || all.back() > kMost) file_.fail("has '" + word + "' for '" + name + "'");
    }
    if (all.size() != count) file_.fail("has not " + std::to_string(count) + " numbers for '" + name + "'");
    return all;
  }

  double positive(const std::string& name) const {
    const std::string& word = file_.metadata(name);
    char* end;
    const double number = std::strtod(word.c_str(), &end);
    if (*end || !(number > 0 && number < 1e9)) file_.fail("has '" + word + "' for '" + name + "'");
    return number;
  }

  const Safetensors& file_;
};

}  // namespace example
