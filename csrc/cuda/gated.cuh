// Gates in the operations that read a state: instances, alignment, and the gradient of gates that serve a whole head.
#pragma once

#include "cuda/tokens.cuh"

namespace pom::cuda {

template <class Form>
struct GateOf;
template <int K, class Activation>
struct GateOf<Product<K, Activation>> {
  using type = Sigmoid;
};
template <int K>
struct GateOf<Power<K>> {
  using type = HardSigmoid;
};
template <class Form>
struct GateOf<Along<Form>> : GateOf<Form> {};
template <class Form>
struct GateOf<GatesAlong<Form>> {
  using type = Along<typename GateOf<Form>::type>;
};

// Channels that turn with the gates: with a gate per head they turn among themselves and no thread needs pairs.
inline bool turns_channels(const Gates& g) { return g.rotary.axes && g.heads == 1; }

inline Alignment is_aligned(const Gates& g, const StateView& state) {
  Alignment aligned(g.dtype);
  aligned.pointers({state.total, state.residual}).sizes({g.channels, g.channels / g.heads});
  if (g.heads == 1)
    aligned.pointers({g.gate, g.tangent, g.rotary.cos, g.rotary.sin})
        .sizes({g.gate_batch_stride, g.gate_token_stride, g.rotary.half})
        .sizes({g.tangent_batch_stride, g.tangent_token_stride});
  return aligned;
}

// The gradient of a head's gate is a sum over its channels. A row of threads sums runs of 2^shift channels: as long as
// they lie in one head and one range. What is left is added in a second pass.
struct HeadParts {
  int64_t per_head;
  int shift;
  int64_t count;  // parts of a token

  HeadParts(const Gates& g, const Slabs& slabs)
      : per_head(g.channels / g.heads),
        shift(slabs.vec == 8   ? 3
              : slabs.vec == 4 ? 2
                               : 0) {
    const int64_t whole_row = int64_t(kLanes) * slabs.vec;
    auto fits = [&](int64_t n) {
      return n <= whole_row && per_head % n == 0 && slabs.width % n == 0 && (!slabs.axis_slabs || slabs.half % n == 0);
    };
    while (fits(int64_t(2) << shift)) ++shift;
    count = g.channels >> shift;
  }
};

// parts[channel >> shift] = Σ dvalue over runs of 2^shift channels
template <int Vec, int ranges, class Acc>
__device__ void write_head_parts(const Acc* dvalue, const Place& place, int shift, Acc* parts) {
  POM_UNROLL
  for (int r = 0; r < ranges; ++r) {
    Acc sum = Acc(0);
    POM_UNROLL
    for (int i = 0; i < Vec; ++i) sum += dvalue[r * Vec + i];
    for (int apart = (1 << shift) / Vec / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    const int64_t channel = place.channel + r * place.stride;
    if (r < place.ranges && (channel & ((1 << shift) - 1)) == 0) parts[channel >> shift] = sum;
  }
}

// dgate (batch, tokens, heads) from the parts (batch, tokens, channels >> shift)
template <class Acc>
Status finish_heads(const Gates& gates, const HeadParts& plan, const Acc* parts, void* dgate, void* stream);

}  // namespace pom::cuda
