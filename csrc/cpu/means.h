// Between the doubles of a task and a state: total + residual, and the mean H = (total + residual) / count.
#pragma once

#include "cpu/plan.h"

namespace pom::cpu {

// total + residual = sum, to twice the precision of Acc.
template <class Acc>
void split(double sum, Acc& total, Acc& residual) {
  total = Acc(sum);
  // An infinite or NaN sum has no rest.
  residual = total - total == Acc(0) ? Acc(sum - double(total)) : Acc(0);
}

// 1 / count, and 0 where there is nothing to average.
inline double inverse(double count) { return count != 0 ? 1 / count : 0; }

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
