// Projected tokens and gates as the CPU operations see them: sums, features, values and slopes of a few tokens by a
// tile of channels, with rotary positions and weights taken care of.
#pragma once

#include <cstring>

#include "cpu/plan.h"

namespace pom::cpu {

// Scratch holds a panel of tokens by a tile of channels: [token][range][channel].
inline int64_t row_width(const Tile& tile) { return tile.ranges * tile.width; }

// body(range, channel) for the runs of a tile, channel being the first of the run.
template <class Body>
void each_range(const Tile& tile, Body body) {
  for (int64_t range = 0; range < tile.ranges; ++range) body(range, tile.begin + range * tile.range_stride);
}

// body(token, count) for the panels of tokens begin … end-1.
template <class Body>
void each_panel(int64_t begin, int64_t end, Body body) {
  for (int64_t token = begin; token < end; token += kPanel) body(token, std::min(kPanel, end - token));
}

template <class Acc>
class FeatureTokens {
 public:
  FeatureTokens(const Features& features, Arena& arena)
      : f_(features),
        kernels_(feature_kernels<Acc>(features.dtype, features.form, features.degree)),
        tiles(features.form == Form::product ? features.degree : 1, features.width, features.rotary),
        coeff_(coeff_size() ? arena.take<Acc>(coeff_size()) : nullptr),
        coeff_tangent_(coeff_size() && features.u_tangent ? arena.take<Acc>(coeff_size()) : nullptr) {}

  // Coefficients with the channel innermost, as the inner loops read them.
  void transpose_coeff() {
    transpose(f_.coeff, coeff_);
    transpose(f_.coeff_tangent, coeff_tangent_);
  }

  int64_t channels() const { return f_.channels(); }
  // Doubles that one task needs for its part of the coefficient gradient.
  int64_t coeff_size() const { return f_.form == Form::power ? f_.degree * f_.width : 0; }

  const Acc* weight(int64_t batch, int64_t token) const {
    return f_.weight ? static_cast<const Acc*>(f_.weight) + batch * f_.tokens + token : nullptr;
  }

  // dcoeff (E, degree) = Σ of the parts that the tasks found, in their order
  void sum_coeff(const double* parts, int64_t count, void* dcoeff, const Executor& executor) const {
    if (!coeff_) return;
    const int64_t blocks = (f_.width + kTileWidth - 1) / kTileWidth;
    parallel(executor, blocks * f_.degree, [&](int64_t task) {
      const int64_t i = task / blocks, first = task % blocks * kTileWidth,
                    width = std::min(kTileWidth, f_.width - first);
      double sum[kTileWidth] = {};
      for (int64_t part = 0; part < count; ++part)
        for (int64_t c = 0; c < width; ++c) sum[c] += parts[part * coeff_size() + i * f_.width + first + c];
      for (int64_t c = 0; c < width; ++c) static_cast<Acc*>(dcoeff)[(first + c) * f_.degree + i] = Acc(sum[c]);
    });
  }

  // total[channel] += Σ w φ over the tokens begin … end-1
  void sum(int64_t batch, int64_t begin, int64_t end, int64_t first_tile, int64_t last_tile, double* total) const {
    each_panel(begin, end, [&](int64_t token, int64_t count) {
      for (int64_t i = first_tile; i < last_tile; ++i) {
        const Tile tile = tiles[i];
        if (tile.rotary_begin < 0) {
          kernels_.sum(rows(tile, count), f_.degree, point(batch, token, tile.begin), tangent(batch, token, tile.begin),
                       f_.width, weight(batch, token), total + tile.begin);
        } else {
          alignas(64) Acc phi[kScratch];
          features(batch, token, count, tile, phi);
          add(phi, count, tile, weight(batch, token), total);
        }
      }
    });
  }

  // scratch = φ, turned by the rotary positions, not weighted
  void features(int64_t batch, int64_t token, int64_t count, const Tile& tile, Acc* phi) const {
    const bool rotary = tile.rotary_begin >= 0;
    for (int64_t range = 0; range < (rotary ? 2 : 1); ++range) {
      const int64_t channel = tile.begin + range * tile.range_stride;
      kernels_.features(rows(tile, count), f_.degree, point(batch, token, channel), tangent(batch, token, channel),
                        f_.width, phi + range * tile.width);
    }
    rotate(token, count, tile, phi, false);
  }

  // total[channel] += Σ_rows w scratch
  static void add(const Acc* scratch, int64_t count, const Tile& tile, const Acc* weight, double* total) {
    each_range(tile, [&](int64_t range, int64_t channel) {
      linear_kernels<Acc>().sum(count, tile.width, scratch + range * tile.width, row_width(tile), weight, 1,
                                total + channel);
    });
  }

  // du and the coefficient gradient from dL/dφ of one row that all tokens share, indexed by channel
  void slopes_shared(int64_t batch, int64_t token, int64_t count, const Tile& tile, const Acc* dphi, void* du,
                     double* dcoeff) const {
    if (tile.rotary_begin < 0)
      return slopes(batch, token, count, tile, tile.begin, dphi + tile.begin, 0, tile.range_stride, du, dcoeff);
    alignas(64) Acc rows[kScratch];
    for (int64_t row = 0; row < count; ++row)
      each_range(tile, [&](int64_t range, int64_t channel) {
        memcpy(rows + row * row_width(tile) + range * tile.width, dphi + channel, tile.width * sizeof(Acc));
      });
    slopes_scratch(batch, token, count, tile, rows, du, dcoeff);
  }

  // the same from a scratch of rows, which is overwritten
  void slopes_scratch(int64_t batch, int64_t token, int64_t count, const Tile& tile, Acc* dphi, void* du,
                      double* dcoeff) const {
    rotate(token, count, tile, dphi, true);
    const bool rotary = tile.rotary_begin >= 0;
    for (int64_t range = 0; range < (rotary ? 2 : 1); ++range)
      slopes(batch, token, count, tile, tile.begin + range * tile.range_stride, dphi + range * tile.width,
             row_width(tile), tile.width, du, dcoeff);
  }

 private:
  Rows rows(const Tile& tile, int64_t count) const { return {count, tile.width, tile.ranges, tile.range_stride}; }
  void transpose(const void* given, Acc* rows) const {
    if (!rows) return;
    for (int64_t c = 0; c < f_.width; ++c)
      for (int i = 0; i < f_.degree; ++i) rows[i * f_.width + c] = static_cast<const Acc*>(given)[c * f_.degree + i];
  }

  Point<Acc> point(int64_t batch, int64_t token, int64_t channel) const {
    const int64_t at = batch * f_.u_batch_stride + token * f_.u_token_stride + channel;
    return {static_cast<const char*>(f_.u) + at * kernels_.element_size, f_.u_token_stride,
            coeff_ ? coeff_ + channel : nullptr};
  }
  Point<Acc> tangent(int64_t batch, int64_t token, int64_t channel) const {
    if (!f_.u_tangent) return {};
    const int64_t at = batch * f_.u_tangent_batch_stride + token * f_.u_tangent_token_stride + channel;
    return {static_cast<const char*>(f_.u_tangent) + at * kernels_.element_size, f_.u_tangent_token_stride,
            coeff_tangent_ ? coeff_tangent_ + channel : nullptr};
  }

  void rotate(int64_t token, int64_t count, const Tile& tile, Acc* scratch, bool transpose) const {
    if (tile.rotary_begin < 0) return;
    const int64_t stride = f_.rotary.half * f_.rotary.axes, first = token * stride + tile.rotary_begin;
    linear_kernels<Acc>().rotate(count, tile.width, scratch, scratch + tile.width, row_width(tile),
                                 static_cast<const Acc*>(f_.rotary.cos) + first,
                                 static_cast<const Acc*>(f_.rotary.sin) + first, stride, transpose);
  }

  void slopes(int64_t batch, int64_t token, int64_t count, const Tile& tile, int64_t channel, const Acc* dphi,
              int64_t dphi_stride, int64_t dphi_range_stride, void* du, double* dcoeff) const {
    char* out = static_cast<char*>(du) + ((batch * f_.tokens + token) * channels() + channel) * kernels_.element_size;
    kernels_.slopes(rows(tile, count), f_.degree, point(batch, token, channel), tangent(batch, token, channel),
                    f_.width, weight(batch, token), dphi, dphi_stride, dphi_range_stride, out, channels(),
                    dcoeff ? dcoeff + channel : nullptr);
  }

  const Features& f_;
  const FeatureKernels<Acc>& kernels_;

 public:
  const Tiles tiles;

 private:
  Acc *coeff_, *coeff_tangent_;
};

template <class Acc>
class GateTokens {
 public:
  explicit GateTokens(const Gates& gates) : g_(gates), kernels_(gate_kernels<Acc>(gates.dtype, gates.form)) {}

  bool heads() const { return g_.heads > 1; }
  int element_size() const { return kernels_.element_size; }

  // The rotary positions that the tiles of the gated channels must respect: with one gate per head the gates are
  // turned among themselves and the channels need not be paired.
  static Rotary channel_rotary(const Gates& gates) { return gates.heads > 1 ? Rotary{} : gates.rotary; }

  // scratch = γ(g), or its derivative along the tangent, for every channel of the tile, turned by the rotary positions
  void values(int64_t batch, int64_t token, int64_t count, const Tile& tile, Acc* value) const {
    values(batch, token, count, tile, g_.tangent, value);
  }
  // the same, for a tangent or null
  void values(int64_t batch, int64_t token, int64_t count, const Tile& tile, const void* along, Acc* value) const {
    if (!heads()) {
      each_row_range(count, tile, [&](int64_t row, int64_t offset, int64_t channel) {
        kernels_.value(tile.width, gate(batch, token + row, channel), tangent(along, batch, token + row, channel),
                       value + offset);
      });
      if (tile.rotary_begin >= 0)
        rotate(token, count, tile.width, tile.rotary_begin, value, value + tile.width, row_width(tile), false);
      return;
    }
    for (int64_t row = 0; row < count; ++row) {
      alignas(64) Acc head_value[kMaxHeads];
      head_values(batch, token + row, along, head_value);
      each_run(tile, [&](int64_t offset, int64_t width, int64_t head) {
        std::fill_n(value + row * row_width(tile) + offset, width, head_value[head]);
      });
    }
  }

  // y = value ⊙ mean for the tile; the mean is a scratch, or one row that all tokens share, indexed by channel
  void multiply(int64_t batch, int64_t token, int64_t count, const Tile& tile, const Acc* value, const Acc* mean,
                bool mean_is_scratch, void* y) const {
    each_row_range(count, tile, [&](int64_t row, int64_t offset, int64_t channel) {
      kernels_.multiply(tile.width, value + offset, mean + (mean_is_scratch ? offset : channel),
                        out(y, batch, token + row, channel, g_.channels));
    });
  }

  // y = value ⊙ dmean + dvalue ⊙ mean for the tile; means are rows that all tokens share
  void multiply_along(int64_t batch, int64_t token, int64_t count, const Tile& tile, const Acc* value, const Acc* mean,
                      const Acc* dvalue, const Acc* dmean, void* y) const {
    each_row_range(count, tile, [&](int64_t row, int64_t offset, int64_t channel) {
      kernels_.multiply_along(tile.width, value + offset, mean + channel, dvalue + offset, dmean + channel,
                              out(y, batch, token + row, channel, g_.channels));
    });
  }

  // dmean = dy ⊙ value, and value becomes dy ⊙ mean, the gradient of γ(g) at every channel
  void multiply_backward(const void* dy, int64_t dy_token_stride, int64_t count, const Tile& tile, const Acc* mean,
                         bool mean_is_scratch, Acc* value, Acc* dmean) const {
    each_row_range(count, tile, [&](int64_t row, int64_t offset, int64_t channel) {
      const char* d = static_cast<const char*>(dy) + (row * dy_token_stride + channel) * kernels_.element_size;
      kernels_.multiply_backward(tile.width, d, mean + (mean_is_scratch ? offset : channel), value + offset,
                                 dmean + offset);
    });
  }

  // Takes the gradient of γ at every channel of a tile one step further: with a gate per channel to dgate itself,
  // with heads to their sums in head_grad (batch, tokens, heads), which `finish_heads` turns to dgate.
  void backward(int64_t batch, int64_t token, int64_t count, const Tile& tile, Acc* dvalue, void* dgate,
                double* head_grad) const {
    if (heads()) {
      for (int64_t row = 0; row < count; ++row)
        each_run(tile, [&](int64_t offset, int64_t width, int64_t head) {
          head_grad[(batch * g_.tokens + token + row) * g_.heads + head] +=
              linear_kernels<Acc>().total(width, dvalue + row * row_width(tile) + offset);
        });
      return;
    }
    if (tile.rotary_begin >= 0)
      rotate(token, count, tile.width, tile.rotary_begin, dvalue, dvalue + tile.width, row_width(tile), true);
    each_row_range(count, tile, [&](int64_t row, int64_t offset, int64_t channel) {
      kernels_.slope(tile.width, gate(batch, token + row, channel), tangent(g_.tangent, batch, token + row, channel),
                     dvalue + offset, out(dgate, batch, token + row, channel, g_.channels));
    });
  }

  void finish_heads(int64_t batch, int64_t begin, int64_t end, const double* head_grad, void* dgate) const {
    for (int64_t token = begin; token < end; ++token) {
      alignas(64) Acc dvalue[kMaxHeads];
      const double* given = head_grad + (batch * g_.tokens + token) * g_.heads;
      std::copy_n(given, g_.heads, dvalue);
      rotate_heads(token, dvalue, true);
      kernels_.slope(g_.heads, gate(batch, token, 0), tangent(g_.tangent, batch, token, 0), dvalue,
                     out(dgate, batch, token, 0, g_.heads));
    }
  }

 private:
  const char* gate(int64_t batch, int64_t token, int64_t channel) const {
    return static_cast<const char*>(g_.gate) +
           (batch * g_.gate_batch_stride + token * g_.gate_token_stride + channel) * kernels_.element_size;
  }
  const char* tangent(const void* along, int64_t batch, int64_t token, int64_t channel) const {
    if (!along) return nullptr;
    return static_cast<const char*>(along) +
           (batch * g_.tangent_batch_stride + token * g_.tangent_token_stride + channel) * kernels_.element_size;
  }
  char* out(void* p, int64_t batch, int64_t token, int64_t channel, int64_t width) const {
    return static_cast<char*>(p) + ((batch * g_.tokens + token) * width + channel) * kernels_.element_size;
  }

  // body(row, offset in scratch, channel) for every run of every row of a tile
  template <class Body>
  static void each_row_range(int64_t count, const Tile& tile, Body body) {
    for (int64_t row = 0; row < count; ++row)
      each_range(tile, [&](int64_t range, int64_t channel) {
        body(row, row * row_width(tile) + range * tile.width, channel);
      });
  }

  // body(offset in a scratch row, channels, head) for the runs of a tile that share a head
  template <class Body>
  void each_run(const Tile& tile, Body body) const {
    const int64_t per_head = g_.channels / g_.heads;
    each_range(tile, [&](int64_t range, int64_t channel) {
      for (int64_t c = 0; c < tile.width;) {
        const int64_t head = (channel + c) / per_head,
                      width = std::min(tile.width - c, (head + 1) * per_head - channel - c);
        body(range * tile.width + c, width, head);
        c += width;
      }
    });
  }

  void head_values(int64_t batch, int64_t token, const void* along, Acc* value) const {
    kernels_.value(g_.heads, gate(batch, token, 0), tangent(along, batch, token, 0), value);
    rotate_heads(token, value, false);
  }

  void rotate_heads(int64_t token, Acc* value, bool transpose) const {
    for (int axis = 0; axis < g_.rotary.axes; ++axis) {
      Acc* low = value + 2 * g_.rotary.half * axis;
      rotate(token, 1, g_.rotary.half, g_.rotary.half * axis, low, low + g_.rotary.half, 0, transpose);
    }
  }

  void rotate(int64_t token, int64_t count, int64_t width, int64_t pair, Acc* low, Acc* high, int64_t stride,
              bool transpose) const {
    const int64_t angles = g_.rotary.half * g_.rotary.axes, first = token * angles + pair;
    linear_kernels<Acc>().rotate(count, width, low, high, stride, static_cast<const Acc*>(g_.rotary.cos) + first,
                                 static_cast<const Acc*>(g_.rotary.sin) + first, angles, transpose);
  }

  const Gates& g_;
  const GateKernels<Acc>& kernels_;
};

}  // namespace pom::cpu
