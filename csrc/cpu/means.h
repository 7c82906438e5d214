// The mean H = (total + residual) / count of a state.
#pragma once

#include "cpu/plan.h"
#include "residual.h"

namespace pom::cpu {

// mean (batch, groups, channels) of the state, in parallel
template <class Acc>
void means(const StateView& state, int64_t rows, int64_t channels, Acc* mean, const Executor& executor) {
  parallel(executor, rows, [&](int64_t row) {
    const double scale = inverse(state.count[row]);
    const Acc* total = static_cast<const Acc*>(state.total) + row * channels;
    const Acc* residual = static_cast<const Acc*>(state.residual) + row * channels;
    for (int64_t c = 0; c < channels; ++c)
      mean[row * channels + c] = scale != 0 ? Acc((double(total[c]) + double(residual[c])) * scale) : Acc(0);
  });
}

}  // namespace pom::cpu
