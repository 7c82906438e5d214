// Compares the derivatives in pom/math.h, in float and double, with differences of the values in double.

#include <algorithm>
#include <limits>
#include <string>

#include "check.h"
#include "pom/math.h"

using namespace pom;
using check::expect;
using check::section;

constexpr double kInf = std::numeric_limits<double>::infinity();

// A weighted sum of the outputs, and its central differences in double.
template <class Form, int factors, int coeffs>
struct Weighed {
  Form form;
  double dphi[factors];
  double operator()(const double* u, const double* c) const {
    double phi[factors], sum = 0;
    form.value(u, c, phi);
    for (int i = 0; i < factors; ++i) sum += dphi[i] * phi[i];
    return sum;
  }
};

template <class F>
double difference(double& x, F f) {
  const double kept = x, step = 1e-5;
  x = kept + step;
  const double high = f();
  x = kept - step;
  const double low = f();
  x = kept;
  return (high - low) / (2 * step);
}

// The largest error of derivatives, and the largest derivative.
struct Largest {
  double error = 0, slope = 0;
  void add(double got, double wanted) {
    error = got == got ? std::max(error, std::abs(got - wanted)) : kInf;
    slope = std::max(slope, std::abs(wanted));
  }
  void check(const std::string& name, double tolerance) const {
    expect(slope > 0 && error <= tolerance * slope, "slopes of %s are wrong by %g, the largest being %g", name.c_str(),
           error, slope);
  }
};

double uniform(double low, double high) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return low + (high - low) * double(state >> 11) * std::ldexp(1.0, -53);
}

// Far enough from the kinks of the power form and the hardsigmoid for a difference.
double off_kinks(double low, double high) {
  for (;;) {
    const double x = uniform(low, high);
    double distance = kInf;
    for (double kink : {-10.0, -3.0, 0.0, 3.0, 6.0}) distance = std::min(distance, std::abs(x - kink));
    if (distance > 1e-3) return x;
  }
}

template <class T, class Form, int degree>
void check_form_slopes(const char* name, double low, double high, double tolerance) {
  constexpr bool coeffs = Form::has_coeff;
  constexpr int factors = coeffs ? 1 : degree;
  const Form form(degree);
  Largest of_u, of_c;
  for (int round = 0; round < 300; ++round) {
    Weighed<Form, factors, degree> weighed{form, {}};
    double u[factors], c[degree];
    T u_t[factors], c_t[degree], dphi_t[factors], du[factors], dc[degree];
    // Numbers that a float can hold, so that T has the same.
    for (int i = 0; i < factors; ++i) u[i] = u_t[i] = T(float(off_kinks(low, high)));
    for (int i = 0; i < factors; ++i) weighed.dphi[i] = dphi_t[i] = T(float(uniform(-1, 1)));
    for (int i = 0; i < degree; ++i) c[i] = c_t[i] = T(float(uniform(-1, 1)));
    form.slope(u_t, c_t, dphi_t, du, dc);
    for (int i = 0; i < factors; ++i) of_u.add(du[i], difference(u[i], [&] { return weighed(u, c); }));
    if (coeffs)
      for (int i = 0; i < degree; ++i) of_c.add(dc[i], difference(c[i], [&] { return weighed(u, c); }));
  }
  const std::string what = name + ("<" + std::to_string(degree)) + "> in " + (sizeof(T) == 4 ? "float" : "double");
  of_u.check(what, tolerance);
  if (coeffs) of_c.check(what + " by its coefficients", tolerance);
}

template <class T, int degree>
void check_forms_of_degree(double tolerance) {
  check_form_slopes<T, Product<degree>, degree>("Product", -4, 4, tolerance);
  check_form_slopes<T, Power<degree>, degree>("Power", -13, 9, tolerance);
}

template <class T>
void check_slopes(double tolerance) {
  check_forms_of_degree<T, 1>(tolerance);
  check_forms_of_degree<T, 2>(tolerance);
  check_forms_of_degree<T, 3>(tolerance);
  check_forms_of_degree<T, 4>(tolerance);
  check_form_slopes<T, Product<0>, 7>("Product<0> of degree ", -2, 2, tolerance);
  check_form_slopes<T, Power<0>, 7>("Power<0> of degree ", -13, 9, tolerance);
  Largest sigmoid, hard_sigmoid, gelu;
  for (int round = 0; round < 2000; ++round) {
    double x = float(off_kinks(-9, 9));
    T value, slope;
    Gelu::value_and_slope(T(x), value, slope);
    expect(std::abs(value - Gelu::value(x)) <= tolerance, "gelu(%g) is %g", x, double(value));
    gelu.add(slope, difference(x, [&] { return Gelu::value(x); }));
    sigmoid.add(Sigmoid::slope(T(x)), difference(x, [&] { return Sigmoid::value(x); }));
    hard_sigmoid.add(HardSigmoid::slope(T(x)), difference(x, [&] { return HardSigmoid::value(x); }));
  }
  gelu.check("Gelu", tolerance);
  sigmoid.check("Sigmoid", tolerance);
  hard_sigmoid.check("HardSigmoid", tolerance);
}

int main() {
  section("slopes in double");
  check_slopes<double>(1e-7);
  section("slopes in float");
  check_slopes<float>(5e-6);
  return check::finish();
}
