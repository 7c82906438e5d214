// Gates as one thread sees them, in the operations that read a state: loads, values, gradients, alignment, and partial
// sums for the gradient of gates that serve a whole head.
#pragma once

#include "cuda/tokens.cuh"

namespace pom::cuda {

// With one gate per head, rotary positions rotate pairs of heads. One head, its partner, and their angle.
struct RotatedHead {
  int64_t head = 0, other = 0;
  int64_t pair = -1;  // column of the angle tables; -1 if it is not rotated
  bool low = true;    // whether it is the first of the pair

  RotatedHead() = default;
  POM_HD RotatedHead(const Rotary& rotary, int64_t head) : head(head) {
    if (head >= 2 * rotary.half * rotary.axes) return;
    const int64_t axis = head / (2 * rotary.half), within = head - axis * 2 * rotary.half;
    low = within < rotary.half;
    other = low ? head + rotary.half : head - rotary.half;
    pair = axis * rotary.half + (low ? within : within - rotary.half);
  }

  // The head after the rotation (its inverse if `transpose`); own() and paired() return the two heads before it.
  template <class Acc, class Own, class Paired>
  POM_HD Acc rotate(const Rotary& rotary, int64_t token, bool transpose, Own own, Paired paired) const {
    if (pair < 0) return own();
    const int64_t at = token * rotary.half * rotary.axes + pair;
    const Acc cos = static_cast<const Acc*>(rotary.cos)[at], sin = static_cast<const Acc*>(rotary.sin)[at];
    return own() * cos + (low != transpose ? -paired() : paired()) * sin;
  }
};

// Loads one element into a register of its own within Packed, so that nothing waits for it before it is used.
template <class T, int Vec>
POM_HD void load_one(const T* p, int word, Packed<T, Vec>& packed) {
  if constexpr (Vec == 1)
    packed.x = *p;
  else if constexpr (sizeof(T) == 4)
    packed.words.word[word] = float_to_bits(*p);
  else
    packed.words.word[word] = p->bits;
}
template <class Acc, class T, int Vec>
POM_HD Acc unpack_one(int word, const Packed<T, Vec>& packed) {
  Packed<T, 1> one;
  if constexpr (Vec == 1)
    one = packed;
  else if constexpr (sizeof(T) == 4)
    one.x = bits_to_float(packed.words.word[word]);
  else
    one.x = {uint16_t(packed.words.word[word])};
  Acc x;
  one.unpack(&x);
  return x;
}

// Registers of one token's gates: those of the thread's channels or, in the same registers, the gate of each range's
// head and of its rotary partner. With Vec == 1 the partner has registers of its own.
template <class Rows, bool dual, bool has_room>
struct LoadedGates : Loaded<Rows, dual> {
  using Own = Loaded<Rows, dual>;
  POM_HD Own& paired() { return *this; }
  POM_HD const Own& paired() const { return *this; }
};
template <class Rows, bool dual>
struct LoadedGates<Rows, dual, false> : Loaded<Rows, dual> {
  using Own = Loaded<Rows, dual>;
  Own other;
  POM_HD Own& paired() { return other; }
  POM_HD const Own& paired() const { return other; }
};

// The gates of one sample's queries at the channels of a thread: one per channel, or one for all channels of a head.
// With WithTangent<Gate>: their derivatives along a tangent.
template <class Gate, class T_, int Vec_, int ranges>
struct GateTokens {
  using T = T_;
  using Acc = typename accumulator<T>::type;
  static constexpr int Vec = Vec_;
  static constexpr int kNumbers = ranges * Vec;
  static constexpr bool kDual = has_tangent<Gate>;
  using Num = Number<Acc, kDual>;
  using Rows = RowsOf<T, Vec, ranges>;
  static constexpr bool kPairs = std::is_base_of_v<HardSigmoid, Gate>;  // the power form, which can be rotated
  using Raw = LoadedGates<Rows, kDual, Vec != 1 || !kPairs>;

  const Place place;
  const Rows gate, tangent;
  const Rotary rotary;
  const bool by_head;
  RotatedHead heads[ranges];

  POM_HD GateTokens(const Gates& g, int64_t batch, const Place& place)
      : place(place),
        gate(g.gate, batch * g.gate_batch_stride, g.gate_token_stride, place),
        tangent(g.tangent, batch * g.tangent_batch_stride, g.tangent_token_stride, place),
        rotary(g.rotary),
        by_head(g.heads > 1) {
    if (!by_head) return;
    const unsigned per_head = unsigned(g.channels / g.heads);
    POM_UNROLL for (int r = 0; r < ranges; ++r)
      if (r < place.ranges) heads[r] = RotatedHead(rotary, unsigned(place.channel + r * place.stride) / per_head);
  }

  POM_HD bool rotates() const { return ranges == 2 && !by_head && place.pair >= 0 && rotary.axes; }

  POM_HD void load(int64_t token, Raw& raw) const {
    if (by_head) {
      POM_UNROLL for (int r = 0; r < ranges; ++r) {
        if (r >= place.ranges) continue;
        load_head(token, r, heads[r].head, 0, raw);
        if (kPairs && heads[r].pair >= 0) load_head(token, r, heads[r].other, 1, raw.paired());
      }
      return;
    }
    gate.load(token, raw.primal);
    if constexpr (kDual) tangent.load(token, raw.tangent);
  }

  // Rotated γ(g), or its derivative.
  POM_HD void value(int64_t token, const Raw& raw, Acc* value) const {
    rotated(token, raw, [](Num x) { return primal_or_tangent(Gate::value(x)); }, value);
  }

  // y = γ(g) ⊙ H
  POM_HD void multiply(int64_t token, const Raw& raw, const Acc (&mean)[kNumbers], Acc (&y)[kNumbers]) const {
    value(token, raw, y);
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      y[i] *= mean[i];
  }
  // The derivative of y, if the mean has a tangent.
  POM_HD void multiply(int64_t token, const Raw& raw, const Dual<Acc> (&mean)[kNumbers], Acc (&y)[kNumbers]) const {
    Acc gamma[kNumbers];
    rotated(token, raw, [](Num x) { return Gate::value(x).value; }, gamma);
    value(token, raw, y);
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      y[i] = primal_or_tangent(Dual<Acc>(gamma[i], y[i]) * mean[i]);
  }

  // With one gate per channel: overwrites the gradient of γ with that of g.
  POM_HD void slope(int64_t token, const Raw& raw, Acc* dvalue) const {
    if (rotates()) rotate<Vec>(rotary, token, place.pair, true, dvalue);
    Num x[kNumbers];
    unpack(raw, x);
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      dvalue[i] *= primal_or_tangent(Gate::slope(x[i]));
  }

 private:
  // Rotated of(g) at every channel.
  template <class Of>
  POM_HD void rotated(int64_t token, const Raw& raw, Of of, Acc* value) const {
    if (by_head) {
      POM_UNROLL for (int r = 0; r < ranges; ++r) {
        auto own = [&] { return of(loaded_head(r, 0, raw)); };
        auto paired = [&] { return of(loaded_head(r, 1, raw.paired())); };
        Acc of_head = Acc(0);
        if (r < place.ranges)
          of_head = kPairs ? heads[r].template rotate<Acc>(rotary, token, false, own, paired) : own();
        POM_UNROLL for (int i = 0; i < Vec; ++i)
          value[r * Vec + i] = of_head;
      }
      return;
    }
    Num x[kNumbers];
    unpack(raw, x);
    POM_UNROLL for (int i = 0; i < kNumbers; ++i)
      value[i] = of(x[i]);
    if (rotates()) rotate<Vec>(rotary, token, place.pair, false, value);
  }

  POM_HD void load_head(int64_t token, int r, int64_t head, int word, Loaded<Rows, kDual>& raw) const {
    load_one(gate.row0 - place.channel + token * gate.token_stride + head, word, raw.primal[r]);
    if constexpr (kDual)
      load_one(tangent.row0 - place.channel + token * tangent.token_stride + head, word, raw.tangent[r]);
  }
  POM_HD static Num loaded_head(int r, int word, const Loaded<Rows, kDual>& raw) {
    if constexpr (kDual)
      return {unpack_one<Acc>(word, raw.primal[r]), unpack_one<Acc>(word, raw.tangent[r])};
    else
      return unpack_one<Acc>(word, raw.primal[r]);
  }
};

// Whether rotary positions are applied per channel; with one gate per head they are applied to the gates.
inline bool rotates_channels(const Gates& g) { return g.rotary.axes && g.heads == 1; }

inline Alignment alignment_of(const Gates& g, const StateView& state) {
  Alignment alignment(g.dtype);
  alignment.numbers({state.total, state.residual}).sizes({g.channels, g.channels / g.heads});
  if (g.heads == 1)
    alignment.pointers({g.gate, g.tangent})
        .numbers({g.rotary.cos, g.rotary.sin})
        .sizes({g.gate_batch_stride, g.gate_token_stride, g.rotary.half})
        .sizes({g.tangent_batch_stride, g.tangent_token_stride});
  return alignment;
}

// The gradient of a head's gate is a sum over the head's channels. In the first pass a row of threads sums runs of
// 2^shift channels, which lie in one head and one range; a second pass sums these.
template <class Acc>
struct HeadPartials {
  int64_t per_head = 0, count = 0;  // channels of a head; partial sums per token
  int shift = 0;
  Acc* rows = nullptr;  // (batch, tokens, count); null without heads

  HeadPartials() = default;
  HeadPartials(const Gates& g, const ChannelTiles& channel_tiles, Arena& arena) : per_head(g.channels / g.heads) {
    if (g.heads == 1) return;
    const int64_t whole_row = int64_t(channel_tiles.lanes) * channel_tiles.vec;
    auto fits = [&](int64_t n) {
      return n <= whole_row && per_head % n == 0 && channel_tiles.width % n == 0 &&
             (!channel_tiles.axis_tiles || channel_tiles.half % n == 0);
    };
    while (1 << shift < channel_tiles.vec || fits(int64_t(2) << shift)) ++shift;
    count = g.channels >> shift;
    rows = arena.take<Acc>(g.batch * g.tokens * count);
  }

  // Writes Σ dvalue over runs of 2^shift channels. `lanes`: mask of the lanes that share a row.
  template <int Vec, int ranges>
  __device__ void write(const Acc* dvalue, const Place& place, unsigned lanes, int64_t row) const {
    Acc* const partials = rows + row * count;
    POM_UNROLL for (int r = 0; r < ranges; ++r) {
      Acc sum = Acc(0);
      POM_UNROLL for (int i = 0; i < Vec; ++i)
        sum += dvalue[r * Vec + i];
      for (int apart = (1 << shift) / Vec / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(lanes, sum, apart);
      const int64_t channel = place.channel + r * place.stride;
      if (r < place.ranges && (channel & ((1 << shift) - 1)) == 0) partials[channel >> shift] = sum;
    }
  }
};

// dgate (batch, tokens, heads) from the partial sums, if there are heads.
template <class Acc>
Status reduce_head_partials(const Gates& gates, const HeadPartials<Acc>& partials, void* dgate, void* stream);

}  // namespace pom::cuda
