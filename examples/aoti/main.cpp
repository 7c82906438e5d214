// Draws video with libtorch and a package that `pom-ext export --aoti` wrote, as raw rgb24 on standard output:
//   ./frames clip.pt2 pom_ext/_C.abi3.so | ffplay -f rawvideo -pixel_format rgb24 -video_size 64x64 -
// The videos of a batch stand side by side. noise: a float32 file with the noise of all frames; else the program draws
// it.

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

using Tensors = std::vector<at::Tensor>;

int main(int argc, char** argv) try {
  TORCH_CHECK(argc > 2, "usage: ", argv[0], " PACKAGE.pt2 LIBRARY [frames=64] [steps=8] [label=0] [noise]");
  const auto number = [&](int i, int64_t otherwise) {
    if (i < argc) TORCH_CHECK(std::istringstream(argv[i]) >> otherwise, "expected a number, got ", argv[i]);
    return otherwise;
  };
  const int64_t frames = number(3, 64), steps = number(4, 8), label = number(5, 0);
  TORCH_CHECK(steps > 0, "steps: expected at least 1, got ", steps);
  std::ifstream noise(argc > 6 ? argv[6] : "", std::ios::binary);
  // Loading it registers the operations with torch. Lazily, since it is also a Python module, and nothing calls Python.
  TORCH_CHECK(dlopen(argv[2], RTLD_LAZY), "library: ", dlerror());
  std::signal(SIGPIPE, SIG_IGN);  // when nobody reads any more, the loop below ends and the package is cleaned up
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  auto notes = package.get_metadata();
  TORCH_CHECK(notes["objective"] == "flow", "package: expected flow matching, got '", notes["objective"], "'");
  TORCH_CHECK(label >= 0 && label <= std::stoll(notes["n_classes"]), "label: expected 0 to ", notes["n_classes"]);
  const double shift = std::stod(notes["shift"]);
  const bool shared = notes["context"] == "shared";  // frames see each other's noise at the same step

  // The inputs, one line each of name, dtype and sizes: frame, time, labels if there are classes, state (0 at first).
  std::istringstream lines(notes["inputs"]);
  Tensors inputs, state;
  for (std::string line, name, dtype; std::getline(lines, line);) {
    std::istringstream words(line);
    words >> name >> dtype;
    const std::vector<int64_t> sizes(std::istream_iterator<int64_t>(words), {});
    const auto type = c10::getStringToDtypeMap().at(dtype);
    at::Tensor tensor = at::zeros(sizes, at::device(notes["AOTI_DEVICE_KEY"]).dtype(type));
    const bool given = name == "frame" || name == "time" || name == "labels";
    (given ? inputs : state).push_back(name == "labels" ? tensor.fill_(label) : tensor);
  }
  std::vector<Tensors> states(shared ? steps : 1, state);

  const auto predict = [&](const at::Tensor& x, double time, Tensors& state, bool remember) {
    Tensors given = inputs;
    given[0] = x;
    given[1] = at::full_like(inputs[1], 1000 * time);
    given.insert(given.end(), state.begin(), state.end());
    const Tensors out = package.run(given);
    if (remember) state.assign(out.begin() + 1, out.end());
    return out[0];
  };
  const auto time = [&](int64_t step) {
    const double t = 1 - static_cast<double>(step) / steps;
    return shift * t / (1 + (shift - 1) * t);
  };
  for (int64_t frame = 0; frame < frames && std::cout; ++frame) {
    at::Tensor x = at::randn(inputs[0].sizes());
    if (argc > 6) noise.read(static_cast<char*>(x.data_ptr()), x.nbytes());
    TORCH_CHECK(argc <= 6 || noise, "noise: ", argv[6], " has none for frame ", frame);
    x = x.to(inputs[0]);
    for (int64_t i = 0; i < steps; ++i)
      x = x + (time(i + 1) - time(i)) * predict(x, time(i), states[shared ? i : 0], shared);
    if (!shared) predict(x, 0, states[0], true);
    x = ((x.to(at::kCPU, at::kFloat).clamp(-1, 1) + 1) * 127.5).round().to(at::kByte).expand({-1, 3, -1, -1, -1});
    x = x.permute({2, 3, 0, 4, 1}).contiguous();  // (frames of a token, H, videos, W, rgb)
    std::cout.write(static_cast<const char*>(x.data_ptr()), x.nbytes()).flush();
  }
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << '\n';
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
