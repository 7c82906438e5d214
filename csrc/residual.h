// Sums kept as a number and what that number cannot hold, on any device.
#pragma once

#include "pom/pom.h"

namespace pom {

// 1 / count, and 0 where there is nothing to average.
POM_HD double inverse(double count) { return count != 0 ? 1 / count : 0; }

// What rounding a + b to `sum` lost, exactly (Knuth, TAOCP 4.2.2). An infinite or NaN sum lost nothing.
POM_HD double rounded_off(double a, double b, double sum) {
  const double part = sum - a;
  return sum - sum == 0 ? (a - (sum - part)) + (b - part) : 0;
}

// sum + rest = total + residual, to twice the precision of Acc.
template <class Acc>
POM_HD void split(double sum, double rest, Acc& total, Acc& residual) {
  total = Acc(sum + rest);
  // An infinite or NaN sum has no rest.
  residual = total - total == Acc(0) ? Acc((sum - double(total)) + rest) : Acc(0);
}

// Adds to `sum` a prior state, total and residual, at element `at`; gives back what rounding lost. No prior, no change.
template <class Acc>
POM_HD double add_prior(const StateView& prior, int64_t at, double& sum) {
  if (!prior.total) return 0;
  const double before = static_cast<const Acc*>(prior.total)[at], own = sum;
  sum = before + own;
  const double lost = rounded_off(before, own, sum);
  return prior.residual ? lost + double(static_cast<const Acc*>(prior.residual)[at]) : lost;
}

}  // namespace pom
