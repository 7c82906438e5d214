// Sums kept as a total and the residual that the total cannot hold, on any device.
#pragma once

#include "pom/pom.h"

namespace pom {

// 1 / count, or 0 if the count is 0.
POM_HD double inverse(double count) { return count != 0 ? 1 / count : 0; }

// The rounding error of sum = a + b, exactly (Knuth, TAOCP 4.2.2); 0 if the sum is infinite or NaN.
POM_HD double rounded_off(double a, double b, double sum) {
  const double part = sum - a;
  return sum - sum == 0 ? (a - (sum - part)) + (b - part) : 0;
}

// Splits sum + remainder into total + residual, to twice the precision of Acc.
template <class Acc>
POM_HD void split(double sum, double remainder, Acc& total, Acc& residual) {
  total = Acc(sum + remainder);
  // An infinite or NaN sum has no residual.
  residual = total - total == Acc(0) ? Acc((sum - double(total)) + remainder) : Acc(0);
}

// Adds element `at` of a prior state to `sum`; returns what `sum` cannot hold, or 0 without a prior.
template <class Acc>
POM_HD double add_prior(const StateView& prior, int64_t at, double& sum) {
  if (!prior.total) return 0;
  const double before = static_cast<const Acc*>(prior.total)[at], own = sum;
  sum = before + own;
  const double lost = rounded_off(before, own, sum);
  return prior.residual ? lost + double(static_cast<const Acc*>(prior.residual)[at]) : lost;
}

}  // namespace pom
