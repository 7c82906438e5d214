// Gradients of gates that serve whole heads: the second pass, over partial sums of their channels.

#include "cuda/gates.cuh"

namespace pom::cuda {
namespace {

template <class Gate, class T>
__global__ void __launch_bounds__(kThreads)
    head_gate_grad_kernel(Gates g, HeadPartials<typename accumulator<T>::type> partials, T* dgate) {
  using Acc = typename accumulator<T>::type;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= g.batch * g.tokens * g.heads) return;
  const int64_t head = index % g.heads, row = index / g.heads, b = row / g.tokens, token = row % g.tokens;
  const int64_t per_head = partials.per_head >> partials.shift;
  auto dvalue = [&](int64_t h) {
    double sum = 0;
    for (int64_t i = 0; i < per_head; ++i) sum += double(partials.rows[row * partials.count + h * per_head + i]);
    return Acc(sum);
  };
  const RotatedHead rotated(g.rotary, head);
  Acc d =
      rotated.rotate<Acc>(g.rotary, token, true, [&] { return dvalue(head); }, [&] { return dvalue(rotated.other); });
  Packed<T, 1> packed;
  Acc x, tangent;
  packed.load(static_cast<const T*>(g.gate) + b * g.gate_batch_stride + token * g.gate_token_stride + head);
  packed.unpack(&x);
  if (g.tangent) {
    packed.load(static_cast<const T*>(g.tangent) + b * g.tangent_batch_stride + token * g.tangent_token_stride + head);
    packed.unpack(&tangent);
    d *= primal_or_tangent(Gate::slope(Dual<Acc>(x, tangent)));
  } else {
    d *= Gate::slope(x);
  }
  packed.pack(&d);
  packed.store(dgate + index);
}

}  // namespace

template <class Acc>
Status reduce_head_partials(const Gates& g, const HeadPartials<Acc>& partials, void* dgate, void* stream) {
  if (!partials.rows) return Status::ok;
  return with_dtype<Acc>(g.dtype, [&](auto type) {
    using T = decltype(type);
    return launch(g.form == Form::product ? head_gate_grad_kernel<Sigmoid, T> : head_gate_grad_kernel<HardSigmoid, T>,
                  ceil_div(g.batch * g.tokens * g.heads, kThreads), kThreads, 0, stream, g, partials,
                  static_cast<T*>(dgate));
  });
}

template Status reduce_head_partials(const Gates&, const HeadPartials<float>&, void*, void*);
template Status reduce_head_partials(const Gates&, const HeadPartials<double>&, void*, void*);

}  // namespace pom::cuda
