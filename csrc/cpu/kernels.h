// What the CPU operations are made of: inner loops over a few tokens by a tile of channels, compiled once for each
// instruction set and chosen at run time. The operations themselves (state.cpp, readout.cpp, causal.cpp) know
// neither dtypes nor forms.
#pragma once

#include <cstdint>

#include "pom/pom.h"

namespace pom::cpu {

// A tile of channels: `ranges` runs of `width` channels, the j-th starting at channel begin + j * range_stride. The
// factors of the product form are such runs, and so are the two halves that rotary positions pair.
struct Tile {
  int64_t begin = 0, width = 0;
  int64_t ranges = 1, range_stride = 0;
  int64_t rotary_begin = -1;  // first pair in the angle tables, or -1
};

// Rows of tokens in a tensor or in scratch: pointers are to the tile's first channel of the first token.
struct Rows {
  int64_t count;         // tokens
  int64_t width;         // channels of one range
  int64_t ranges;        // factors of the product form; 1 in power form
  int64_t range_stride;  // elements between ranges
};

// Projected tokens, or a direction of them: at the tile's first channel of the first token, elements of the dtype with
// `stride` elements between tokens. coeff: (degree, E) rows, at the same channel.
template <class Acc>
struct Point {
  const void* u;
  int64_t stride;
  const Acc* coeff;
};

// Inner loops over projected tokens of one dtype, form and degree. `weight` may be null. With a tangent whose u is not
// null, φ stands for its derivative in that direction, and so do du and dcoeff, dphi held fixed.
template <class Acc>
struct FeatureKernels {
  int element_size;
  // total[channel] += Σ_rows w φ(u)
  void (*sum)(const Rows& rows, int degree, const Point<Acc>& at, const Point<Acc>& tangent, int64_t coeff_stride,
              const Acc* weight, double* total);
  // phi[row][range][channel] = φ(u)
  void (*features)(const Rows& rows, int degree, const Point<Acc>& at, const Point<Acc>& tangent, int64_t coeff_stride,
                   Acc* phi);
  // du = w φ'(u)ᵀ dphi and dcoeff[degree][channel] += Σ_rows w a^i dphi; dphi has strides of its own, 0 to share a row
  void (*slopes)(const Rows& rows, int degree, const Point<Acc>& at, const Point<Acc>& tangent, int64_t coeff_stride,
                 const Acc* weight, const Acc* dphi, int64_t dphi_stride, int64_t dphi_range_stride, void* du,
                 int64_t du_stride, double* dcoeff);
};

// Inner loops over the gates of one token, of one dtype and form. With a tangent that is not null, γ stands for its
// derivative in that direction, and so does dgate, dvalue held fixed.
template <class Acc>
struct GateKernels {
  int element_size;
  // value = γ(gate)
  void (*value)(int64_t width, const void* gate, const void* tangent, Acc* value);
  // dgate = γ'(gate) dvalue
  void (*slope)(int64_t width, const void* gate, const void* tangent, const Acc* dvalue, void* dgate);
  // y = value ⊙ mean
  void (*multiply)(int64_t width, const Acc* value, const Acc* mean, void* y);
  // y = value ⊙ dmean + dvalue ⊙ mean
  void (*multiply_along)(int64_t width, const Acc* value, const Acc* mean, const Acc* dvalue, const Acc* dmean,
                         void* y);
  // dmean = dy ⊙ value, and value becomes dvalue = dy ⊙ mean
  void (*multiply_backward)(int64_t width, const void* dy, const Acc* mean, Acc* value, Acc* dmean);
};

// Inner loops over scratch rows, `stride` apart.
template <class Acc>
struct LinearKernels {
  // Σ x
  double (*total)(int64_t width, const Acc* x);
  // total[channel] += Σ_rows w row; weights are `weight_stride` apart, a null weight is 1
  void (*sum)(int64_t rows, int64_t width, const Acc* x, int64_t stride, const Acc* weight, int64_t weight_stride,
              double* total);
  // Turns the pairs (low, high) by angles (cos, sin) of each token, backwards if `transpose`.
  void (*rotate)(int64_t rows, int64_t width, Acc* low, Acc* high, int64_t stride, const Acc* cos, const Acc* sin,
                 int64_t angle_stride, bool transpose);
  // x[row] = base + w[0] x[0] + … + w[row] x[row], times scale[row] if there is a scale, and base += Σ_rows w x.
  // `reverse` sums from the last row to the first.
  void (*scan)(int64_t rows, int64_t width, Acc* x, int64_t stride, const Acc* weight, const Acc* scale, bool reverse,
               double* base);
};

template <class Acc>
const FeatureKernels<Acc>& feature_kernels(Dtype dtype, Form form, int degree);
template <class Acc>
const GateKernels<Acc>& gate_kernels(Dtype dtype, Form form);
template <class Acc>
const LinearKernels<Acc>& linear_kernels();

// "avx512", "avx2" or "generic": what this processor gets. The variable POM_EXT_ISA asks for a lesser one.
const char* instruction_set();

}  // namespace pom::cpu
