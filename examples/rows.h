// The work on tokens between the matrix products, row by row; the same code for both devices.
//
// On the CPU one thread handles a row, in vectors; on a GPU the threads of a block share it. A row belongs to one
// token: patch after patch of each frame of the batch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define POM_BOTH __host__ __device__
#else
#define POM_BOTH
#endif

namespace example {

// A single thread. `width` neighbouring numbers make a vector.
struct Alone {
  static constexpr int64_t first = 0, step = 1;
  static constexpr int width = 8;
  float sum(float own) const { return own; }
};

// The sum of term(i) for i < n, n a multiple of 8, over all threads that share the row.
template <class Lanes, class Term>
POM_BOTH float sum_of_row(int64_t n, const Lanes& lanes, Term term) {
  constexpr int W = Lanes::width;
  float parts[W] = {}, sum = 0;
  for (int64_t i = lanes.first * W; i < n; i += lanes.step * W)
    for (int k = 0; k < W; ++k) parts[k] += term(i + k);
  for (const float part : parts) sum += part;
  return lanes.sum(sum);
}

// The modulation of every video: `values` of the first one, `stride` to the next. A video has `tokens` rows.
struct Modulation {
  const float* values;
  int64_t stride, tokens;
  POM_BOTH const float* of(int64_t row) const { return values + row / tokens * stride; }
};

// y = x, the same for every row.
struct Repeat {
  int64_t n;
  const float* x;
  float* y;
  template <class Lanes>
  POM_BOTH void operator()(int64_t row, const Lanes& lanes) const {
    for (int64_t i = lanes.first; i < n; i += lanes.step) y[row * n + i] = x[i];
  }
};

// y (videos, tokens, n) = x + positions (tokens, n), the same positions for every video.
struct Embed {
  int64_t n, tokens;
  const float *x, *positions;
  float* y;
  template <class Lanes>
  POM_BOTH void operator()(int64_t row, const Lanes& lanes) const {
    const int64_t from = row % tokens * n;
    for (int64_t i = lanes.first; i < n; i += lanes.step) y[row * n + i] = x[from + i] + positions[from + i];
  }
};

// y = x + depthwise convolution over 3 x 3 patches of the frame and of the `earlier` frames before it, of which `cache`
// (videos, earlier, tokens, n) holds the tokens.
struct Convolve {
  int64_t n, height, width, earlier;
  const float *x, *cache, *weight, *bias;  // weight ((earlier + 1) * 9, n)
  float* y;
  template <class Lanes>
  POM_BOTH void operator()(int64_t token, const Lanes& lanes) const {
    constexpr int W = Lanes::width;
    const int64_t frame = height * width * n, video = token / (height * width), place = token % (height * width);
    const int64_t row = place / width, column = place % width;
    const int64_t top = row > 0 ? -1 : 0, bottom = row + 1 < height ? 1 : 0;
    const int64_t left = column > 0 ? -1 : 0, right = column + 1 < width ? 1 : 0;
    for (int64_t i = lanes.first * W; i < n; i += lanes.step * W) {
      float sums[W];
      for (int k = 0; k < W; ++k) sums[k] = bias[i + k];
      for (int64_t f = 0; f <= earlier; ++f) {
        const float* const patches = f < earlier ? cache + (earlier * video + f) * frame : x + video * frame;
        for (int64_t r = top; r <= bottom; ++r)
          for (int64_t c = left; c <= right; ++c) {
            const float* const w = weight + ((3 * f + r + 1) * 3 + c + 1) * n + i;
            const float* const from = patches + (place + r * width + c) * n + i;
            for (int k = 0; k < W; ++k) sums[k] += w[k] * from[k];
          }
      }
      for (int k = 0; k < W; ++k) y[token * n + i + k] = x[token * n + i + k] + sums[k];
    }
  }
};

// Moves the frame into the convolution's cache (videos, earlier, tokens, n), and the oldest one out.
struct UpdateCache {
  int64_t n, tokens, earlier;
  const float* x;
  float* cache;
  template <class Lanes>
  POM_BOTH void operator()(int64_t row, const Lanes& lanes) const {
    float* const oldest = cache + (row / tokens * earlier * tokens + row % tokens) * n;
    for (int64_t i = lanes.first; i < n; i += lanes.step) {
      for (int64_t f = 0; f + 1 < earlier; ++f) oldest[f * tokens * n + i] = oldest[(f + 1) * tokens * n + i];
      if (earlier) oldest[(earlier - 1) * tokens * n + i] = x[row * n + i];
    }
  }
};

// x += gate * branch.
struct AddGated {
  int64_t n;
  Modulation gate;
  const float* branch;
  float* x;
  template <class Lanes>
  POM_BOTH void operator()(int64_t row, const Lanes& lanes) const {
    const float* const g = gate.of(row);
    for (int64_t i = lanes.first; i < n; i += lanes.step) x[row * n + i] += g[i] * branch[row * n + i];
  }
};

// y = layer norm of x * scale + shift; the shift follows the scale.
struct Normalise {
  int64_t n;
  Modulation scale;
  const float* x;
  float* y;
  template <class Lanes>
  POM_BOTH void operator()(int64_t row, const Lanes& lanes) const {
    const float *const s = scale.of(row), *const t = s + n, *const from = x + row * n;
    const float mean = sum_of_row(n, lanes, [=](int64_t i) { return from[i]; }) / float(n);
    const float variance =
        sum_of_row(n, lanes, [=](int64_t i) { return (from[i] - mean) * (from[i] - mean); }) / float(n);
    const float factor = 1 / std::sqrt(variance + 1e-6f);
    for (int64_t i = lanes.first; i < n; i += lanes.step) y[row * n + i] = (from[i] - mean) * factor * s[i] + t[i];
  }
};

// erf within 4 units in the last place, from arithmetic alone so that compilers vectorise it: a rational function of x
// * x fitted to erf(x) / x for |x| < 3.92. Beyond that, a float is 1.
POM_BOTH inline float error_function(float x) {
  constexpr float kEnd = 3.92f;
  x = x < -kEnd ? -kEnd : x > kEnd ? kEnd : x;
  const float t = x * x;
  const float above =
      ((((2.050061822e-6f * t + 2.848648759e-4f) * t + 3.765159202e-3f) * t + 5.274727745e-2f) * t + 1.903968798e-1f) *
          t +
      1.128379146f;
  const float below =
      ((((3.809051704e-5f * t + 1.162410553e-3f) * t + 1.496830276e-2f) * t + 1.141049892e-1f) * t + 5.020675848e-1f) *
          t +
      1;
  return x * above / below;
}

struct Gelu {
  int64_t n;
  float* x;
  template <class Lanes>
  POM_BOTH void operator()(int64_t row, const Lanes& lanes) const {
    for (int64_t i = lanes.first; i < n; i += lanes.step) {
      const float given = x[row * n + i];
      x[row * n + i] = 0.5f * given * (1 + error_function(0.70710678f * given));
    }
  }
};

// x = silu(x + added); `added` is null or the same for every row.
struct Silu {
  int64_t n;
  const float* added;
  float* x;
  template <class Lanes>
  POM_BOTH void operator()(int64_t row, const Lanes& lanes) const {
    for (int64_t i = lanes.first; i < n; i += lanes.step) {
      const float given = x[row * n + i] + (added ? added[i] : 0);
      x[row * n + i] = given / (1 + std::exp(-given));
    }
  }
};

// x += step * velocity. With guidance, velocity (2, rows, n) holds the one for the label, then the one for no label.
struct Follow {
  int64_t n, rows;
  float step, guidance;
  bool guided;
  const float* velocity;
  float* x;
  template <class Lanes>
  POM_BOTH void operator()(int64_t row, const Lanes& lanes) const {
    for (int64_t i = lanes.first; i < n; i += lanes.step) {
      float v = velocity[row * n + i];
      if (guided) {
        const float free = velocity[(rows + row) * n + i];
        v = free + guidance * (v - free);
      }
      x[row * n + i] += step * v;
    }
  }
};

// y = (1 - time) * x + time * noise.
struct AddNoise {
  int64_t n;
  float time;
  const float *x, *noise;
  float* y;
  template <class Lanes>
  POM_BOTH void operator()(int64_t row, const Lanes& lanes) const {
    for (int64_t i = lanes.first; i < n; i += lanes.step)
      y[row * n + i] = (1 - time) * x[row * n + i] + time * noise[row * n + i];
  }
};

}  // namespace example
