// Projected tokens as one thread sees them: Vec channels in each of a few ranges, with weights and rotary positions
// applied. The numbers of a thread are arrays [range * Vec + i].
#pragma once

#include "cuda/block.cuh"
#include "cuda/plan.h"

namespace pom::cuda {

// Rotates the pairs (x[i], x[Vec + i]) by a token's angles; by the inverse if `transpose`.
template <int Vec, class Acc>
POM_HD void rotate(const Rotary& rotary, int64_t token, int64_t pair, bool transpose, Acc* x) {
  Acc cos[Vec], sin[Vec];
  const int64_t at = token * rotary.half * rotary.axes + pair;
  load_numbers<Vec>(static_cast<const Acc*>(rotary.cos) + at, cos);
  load_numbers<Vec>(static_cast<const Acc*>(rotary.sin) + at, sin);
  POM_UNROLL for (int i = 0; i < Vec; ++i) {
    const Acc low = x[i], high = x[Vec + i], s = transpose ? -sin[i] : sin[i];
    x[i] = low * cos[i] - high * s;
    x[Vec + i] = high * cos[i] + low * s;
  }
}

// The channels of one thread in the rows of a tensor.
template <class T, int Vec, int ranges>
struct RowsOf {
  using Raw = Packed<T, Vec>[ranges];
  T* row0 = nullptr;  // first channel of the first token
  int64_t token_stride = 0, range_stride = 0;
  int count = 0;  // ranges that the thread has

  POM_HD RowsOf(const void* p, int64_t offset, int64_t token_stride, const Place& place)
      : row0(static_cast<T*>(const_cast<void*>(p)) + offset + place.channel),
        token_stride(token_stride),
        range_stride(place.stride),
        count(place.ranges) {}

  POM_HD void load(int64_t token, Raw& raw) const {
    POM_UNROLL for (int r = 0; r < ranges; ++r) {
      raw[r] = {};
      if (r < count) raw[r].load(row0 + token * token_stride + r * range_stride);
    }
  }
  template <class Acc>
  POM_HD void store(int64_t token, const Acc* x) const {
    POM_UNROLL for (int r = 0; r < ranges; ++r)
      if (r < count) {
        Packed<T, Vec> packed;
        packed.pack(x + r * Vec);
        packed.store(row0 + token * token_stride + r * range_stride);
      }
  }
  template <class Acc>
  POM_HD static void unpack(const Raw& raw, Acc* x) {
    POM_UNROLL for (int r = 0; r < ranges; ++r)
      raw[r].unpack(x + r * Vec);
  }
};

// Calls load(j, token) for the first `count` of every step-th token from `first` on.
template <int count, class Index, class Load>
POM_HD void load_tokens(Index first, Index end, int step, Load load) {
  POM_UNROLL for (int j = 0; j < count; ++j)
    if (first + j * step < end) load(j, first + j * step);
}
// Calls use(j, token) for all of them. The first `count` are already loaded; after each `count` tokens the next are.
template <int count, class Index, class Load, class Use>
POM_HD void use_tokens(Index first, Index end, int step, Load load, Use use) {
  while (first < end) {
    POM_UNROLL for (int j = 0; j < count; ++j) {
      if (first + j * step >= end) break;
      use(j, first + j * step);
    }
    first += count * step;
    load_tokens<count>(first, end, step, load);
  }
}
template <int count, class Index, class Load, class Use>
POM_HD void for_tokens(Index first, Index end, int step, Load load, Use use) {
  load_tokens<count>(first, end, step, load);
  use_tokens<count>(first, end, step, load, use);
}

// Loads a row that all tokens share, at the thread's channels; zero if it has none.
template <int Vec, int ranges, class Acc>
POM_HD void load_row(const Acc* row, const Place& place, Acc* x) {
  POM_UNROLL for (int r = 0; r < ranges; ++r) {
    POM_UNROLL for (int i = 0; i < Vec; ++i)
      x[r * Vec + i] = Acc(0);
    if (r < place.ranges) load_numbers<Vec>(row + place.channel + r * place.stride, x + r * Vec);
  }
}
template <int Vec, int ranges, class Acc>
POM_HD void store_row(Acc* row, const Place& place, const Acc* x) {
  POM_UNROLL for (int r = 0; r < ranges; ++r)
    if (r < place.ranges) store_numbers<Vec>(row + place.channel + r * place.stride, x + r * Vec);
}

// Registers of one token: its values and, if present, its tangent.
template <class Rows, bool dual>
struct Loaded {
  typename Rows::Raw primal;
};
template <class Rows>
struct Loaded<Rows, true> {
  typename Rows::Raw primal, tangent;
};

// A number of a thread: plain, or dual if there is a tangent.
template <class Acc, bool dual>
using Number = std::conditional_t<dual, Dual<Acc>, Acc>;

template <class Rows, bool dual, class Num, int count>
POM_HD void unpack(const Loaded<Rows, dual>& raw, Num (&x)[count]) {
  if constexpr (dual) {
    decltype(x->value) primal[count], tangent[count];
    Rows::unpack(raw.primal, primal);
    Rows::unpack(raw.tangent, tangent);
    POM_UNROLL for (int i = 0; i < count; ++i)
      x[i] = {primal[i], tangent[i]};
  } else {
    Rows::unpack(raw.primal, x);
  }
}

// The polynomial of one sample's tokens, or its derivative along their tangent. I is an Instance.
template <class I>
struct FeatureTokens {
  using Form = typename I::Form;
  using T = typename I::T;
  using Acc = typename I::Acc;
  static constexpr int Vec = I::Vec;
  static constexpr int kRanges = I::rotated ? 2 : Form::capacity;
  static constexpr int kNumbers = kRanges * Vec;
  static constexpr int kCoeffs = Form::has_coeff ? decltype(Form::degree)::capacity : 1;
  static constexpr bool kDual = has_tangent<Form>;
  using Num = Number<Acc, kDual>;
  using Rows = RowsOf<T, Vec, kRanges>;
  struct Raw : Loaded<Rows, kDual> {
    Acc weight;
  };

  const Form form;
  const Place place;
  const Rows u, u_tangent;
  const Rotary rotary;
  const Acc* const weights;  // of the sample's tokens, or null for ones
  Num c[kRanges][Vec][kCoeffs] = {};

  POM_HD FeatureTokens(const Features& f, int64_t batch, const Place& place)
      : form(f.degree),
        place(place),
        u(f.u, batch * f.u_batch_stride, f.u_token_stride, place),
        u_tangent(f.u_tangent, batch * f.u_tangent_batch_stride, f.u_tangent_token_stride, place),
        rotary(f.rotary),
        weights(f.weight ? static_cast<const Acc*>(f.weight) + batch * f.tokens : nullptr) {
    if constexpr (Form::has_coeff) {
      POM_UNROLL for (int r = 0; r < kRanges; ++r) {
        if (r >= place.ranges) continue;
        const int64_t offset = (place.channel + r * place.stride) * form.degree;
        const Acc *coeff = static_cast<const Acc*>(f.coeff) + offset,
                  *tangent = static_cast<const Acc*>(f.coeff_tangent) + offset;
        if constexpr (kDual) {
          POM_UNROLL for (int i = 0; i < Vec; ++i) {
            POM_UNROLL for (int k = 0; k < form.degree; ++k)
              c[r][i][k] = {coeff[i * form.degree + k], tangent[i * form.degree + k]};
          }
        } else if constexpr (Vec > 1) {
          load_numbers<Vec * kCoeffs>(coeff, &c[r][0][0]);
        } else {
          for (int k = 0; k < form.degree; ++k) c[r][0][k] = coeff[k];
        }
      }
    }
  }

  POM_HD void load(int64_t token, Raw& raw) const {
    u.load(token, raw.primal);
    if constexpr (kDual) u_tangent.load(token, raw.tangent);
    raw.weight = weight(token);
  }

  POM_HD Acc weight(int64_t token) const { return weights ? weights[token] : Acc(1); }
  POM_HD bool rotates() const { return I::rotated && place.pair >= 0 && rotary.axes; }

  // φ, rotated, not weighted.
  POM_HD void value(int64_t token, const Raw& raw, Acc* phi) const {
    Num x[kNumbers];
    unpack(raw, x);
    if constexpr (Form::has_coeff) {
      POM_UNROLL for (int r = 0; r < kRanges; ++r) {
        POM_UNROLL for (int i = 0; i < Vec; ++i) {
          Num value;
          form.value(x + r * Vec + i, c[r][i], &value);
          phi[r * Vec + i] = primal_or_tangent(value);
        }
      }
    } else {
      POM_UNROLL for (int i = 0; i < Vec; ++i) {
        Num factors[kRanges], products[kRanges];
        gather(x, i, factors);
        form.value(factors, static_cast<const Num*>(nullptr), products);
        scatter(products, i, phi);
      }
    }
    if (rotates()) rotate<Vec>(rotary, token, place.pair, false, phi);
  }

  // sum += w φ
  POM_HD void add(int64_t token, const Raw& raw, Acc (&sum)[kNumbers]) const {
    Acc phi[kNumbers];
    value(token, raw, phi);
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      sum[i] += raw.weight * phi[i];
  }

  // Computes du from dφ, which is overwritten, and adds a^i dφ to dc.
  POM_HD void slope(int64_t token, const Raw& raw, Acc* dphi, Acc* du, Acc (&dc)[kRanges][Vec][kCoeffs]) const {
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      dphi[i] *= raw.weight;
    if (rotates()) rotate<Vec>(rotary, token, place.pair, true, dphi);
    Num x[kNumbers];
    unpack(raw, x);
    if constexpr (Form::has_coeff) {
      POM_UNROLL for (int r = 0; r < kRanges; ++r) {
        POM_UNROLL for (int i = 0; i < Vec; ++i) {
          const Num back = Num(dphi[r * Vec + i]);
          Num slope, terms[kCoeffs];
          form.slope(x + r * Vec + i, c[r][i], &back, &slope, terms);
          du[r * Vec + i] = primal_or_tangent(slope);
          POM_UNROLL for (int k = 0; k < form.degree; ++k)
            dc[r][i][k] += primal_or_tangent(terms[k]);
        }
      }
    } else {
      POM_UNROLL for (int i = 0; i < Vec; ++i) {
        Num factors[kRanges], dproducts[kRanges], dfactors[kRanges];
        gather(x, i, factors);
        POM_UNROLL for (int r = 0; r < form.factors(); ++r)
          dproducts[r] = Num(dphi[r * Vec + i]);
        form.slope(factors, static_cast<const Num*>(nullptr), dproducts, dfactors, static_cast<Num*>(nullptr));
        scatter(dfactors, i, du);
      }
    }
  }

 private:
  POM_HD void gather(const Num* x, int i, Num* factors) const {
    POM_UNROLL for (int r = 0; r < form.factors(); ++r)
      factors[r] = x[r * Vec + i];
  }
  POM_HD void scatter(const Num* factors, int i, Acc* x) const {
    POM_UNROLL for (int r = 0; r < form.factors(); ++r)
      x[r * Vec + i] = primal_or_tangent(factors[r]);
  }
};

// H = (total + residual) / count of one row of a state; 0 if the count is 0.
template <int Vec, int ranges, class Acc>
POM_HD void load_mean(const StateView& state, int64_t row, int64_t channels, const Place& place, Acc* mean) {
  const double scale = inverse(state.count[row]);
  Acc residual[ranges * Vec];
  load_row<Vec, ranges>(static_cast<const Acc*>(state.total) + row * channels, place, mean);
  load_row<Vec, ranges>(static_cast<const Acc*>(state.residual) + row * channels, place, residual);
  POM_UNROLL for (int i = 0; i < ranges * Vec; ++i)  // for infinite sums too
    mean[i] = scale != 0 ? Acc((double(mean[i]) + double(residual[i])) * scale) : Acc(0);
}

}  // namespace pom::cuda
