// 10,000 frames of a stream: nothing is allocated, and the process does not grow.

#include <atomic>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "pom/engine.hpp"

namespace {
std::atomic<int64_t> allocations{0};
}

// Replace the C library's functions, to count every allocation of this program.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void* malloc(size_t bytes) { return ++allocations, __libc_malloc(bytes); }
void* calloc(size_t n, size_t bytes) { return ++allocations, __libc_calloc(n, bytes); }
void* realloc(void* p, size_t bytes) { return ++allocations, __libc_realloc(p, bytes); }
void* memalign(size_t alignment, size_t bytes) { return ++allocations, __libc_memalign(alignment, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return ++allocations, __libc_memalign(alignment, bytes); }
int posix_memalign(void** p, size_t alignment, size_t bytes) {
  return ++allocations, (*p = __libc_memalign(alignment, bytes)) ? 0 : 12;
}
}

namespace {

// Memory not backed by a file. Exact, unlike the counters of /proc/self/statm.
int64_t anonymous_bytes() {
  FILE* const file = std::fopen("/proc/self/smaps_rollup", "r");
  char line[256];
  long kilobytes = -1;
  while (file && kilobytes < 0 && std::fgets(line, sizeof line, file)) std::sscanf(line, "Anonymous: %ld", &kilobytes);
  if (kilobytes < 0) std::abort();
  std::fclose(file);
  return int64_t(kilobytes) << 10;
}

void test_stream(pom_layer layer, int64_t layer_count, int64_t tokens) {
  constexpr int64_t kBatch = 2, kDim = 24, kFrames = 10'000;
  const std::vector<pom_layer> layers(layer_count, layer);
  const pom_shape shape = {layers.data(), layer_count, kBatch, 1};
  std::vector<char> memory(pom::Stream::bytes(shape)), file;
  pom::Stream stream;
  check::expect(stream.open(shape, {}, memory.data(), memory.size()) == pom::Status::ok, "open");

  const int64_t width = layer.form == POM_PRODUCT ? layer.degree * layer.width : layer.width;
  const int64_t gates = layer.heads > 1 ? layer.heads : width;
  std::vector<float> x(kBatch * tokens * kDim, 0.5f), y(x.size()), in((width + gates) * kDim, 0.01f);
  std::vector<float> coeff(layer.width * layer.degree, 0.3f), out(kDim * width, 0.02f);
  pom_step step = {};
  step.tokens = tokens, step.dim = kDim, step.x = x.data(), step.y = y.data(), step.coeff = coeff.data();
  step.in_weight = in.data(), step.out_weight = out.data();
  std::vector<char> workspace(stream.workspace(0, step));
  file.resize(stream.saved_bytes());

  int64_t allocated = 0, grown = 0, failures = 0;
  for (int64_t frame = 0; frame < kFrames; ++frame) {
    if (frame == 2) grown = anonymous_bytes(), allocated = allocations;  // saved once before
    for (const bool commit : {false, true})
      for (int64_t l = 0; l < layer_count; ++l)
        failures += stream.step(l, step, commit, workspace.data(), workspace.size()) != pom::Status::ok;
    if (frame % 1000 == 1) failures += stream.save(file.data(), file.size()) != pom::Status::ok;
  }
  allocated = allocations - allocated;
  grown = anonymous_bytes() - grown;
  check::expect(failures == 0, "%d calls failed", int(failures));
  check::expect(allocated == 0, "%d allocations after the first frame", int(allocated));
  check::expect(grown <= 0, "%d KiB more after 10,000 frames", int(grown >> 10));
  const double count = stream.state(layer_count - 1).count[0];
  check::expect(count == double(kFrames * tokens), "a count of %g", count);
}

}  // namespace

int main() {
  check::section("allocations are seen");
  const int64_t before = allocations;
  void* volatile p = std::malloc(100);
  std::free(p);
  delete static_cast<std::vector<int>*>(p = new std::vector<int>(100));
  check::expect(allocations == before + 3, "%d, not 3", int(allocations - before));
  check::section("power form");
  test_stream({POM_POWER, 3, POM_F32, 4, 32, 64}, 3, 16);
  check::section("product form");
  test_stream({POM_PRODUCT, 2, POM_F32, 1, 16, 0}, 2, 9);
  return check::finish();
}
