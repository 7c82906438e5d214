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

// Channels that turn with the gates: with a gate per head they turn among themselves and no thread needs pairs.
inline bool turns_channels(const Gates& g) { return g.rotary.axes && g.heads == 1; }

inline Alignment is_aligned(const Gates& g, const StateView& state) {
  Alignment aligned(g.dtype);
  aligned.pointers({state.total}).sizes({g.channels, g.channels / g.heads});
  if (g.heads == 1)
    aligned.pointers({g.gate, g.rotary.cos, g.rotary.sin}).sizes({g.gate_batch_stride, g.gate_token_stride, g.rotary.half});
  return aligned;
}

// The gradient of a head's gate is a sum over its channels. A row of threads sums runs of `span` channels: as long as
// they lie in one head and one range, and are a power of two of threads. What is left is added in a second pass.
struct HeadParts {
  int64_t heads, per_head, span, count;  // parts of a token

  HeadParts(const Gates& g, const Slabs& slabs) : heads(g.heads), per_head(g.channels / g.heads), span(slabs.vec) {
    const int64_t most_span = int64_t(kLanes) * slabs.vec;
    auto fits = [&](int64_t n) { return per_head % n == 0 && slabs.width % n == 0 && (!slabs.axis_slabs || slabs.half % n == 0); };
    while (2 * span <= most_span && fits(2 * span)) span *= 2;
    count = g.channels / span;
  }
};

// parts[channel / span] = Σ dvalue over runs of span channels
template <int Vec, int ranges, class Acc>
__device__ void write_head_parts(const Acc* dvalue, const Place& place, int64_t span, Acc* parts) {
  POM_UNROLL
  for (int r = 0; r < ranges; ++r) {
    Acc sum = Acc(0);
    POM_UNROLL
    for (int i = 0; i < Vec; ++i) sum += dvalue[r * Vec + i];
    for (int apart = int(span / Vec) / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    const int64_t channel = place.channel + r * place.stride;
    if (r < place.ranges && channel % span == 0) parts[channel / span] = sum;
  }
}

// dgate (batch, tokens, heads) from the parts (batch, tokens, channels / span)
template <class Acc>
Status finish_heads(const Gates& gates, const HeadParts& plan, const Acc* parts, void* dgate, void* stream);

}  // namespace pom::cuda
