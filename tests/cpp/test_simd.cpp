// Tests the vectors of cpu/simd.h, with the instruction set this file is compiled for.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/simd.h"

using namespace pom;
using namespace pom::cpu::POM_ISA;
using check::expect;
using check::section;

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

// All exponents, the interesting range densely, and special values; in whole vectors.
const std::vector<float>& sweep() {
  static const std::vector<float> values = [] {
    std::vector<float> x = {0.f,
                            -0.f,
                            kInf,
                            -kInf,
                            kNan,
                            -kNan,
                            1e-45f,
                            -1e-45f,
                            1.17549435e-38f,
                            -1.17549435e-38f,
                            3.40282347e38f,
                            -3.40282347e38f,
                            5.656f,
                            5.657f,
                            -5.657f,
                            88.f,
                            88.7228394f,
                            -87.f,
                            -104.f};
    for (int64_t bits = 0; bits < int64_t(1) << 32; bits += 4093) x.push_back(bits_to_float(uint32_t(bits)));
    for (int i = -500'000; i <= 500'000; ++i) x.push_back(float(i) * 1.2e-5f);
    for (int i = -300'000; i <= 300'000; ++i) x.push_back(float(i) * 3.5e-4f);
    x.resize(x.size() / Floats::lanes * Floats::lanes);
    return x;
  }();
  return values;
}

// Calls body(x, f(x)) for every number of the sweep.
template <class V, class Body>
void each_of(V (*f)(V), Body body) {
  for (size_t first = 0; first < sweep().size(); first += V::lanes) {
    const V y = f(V::load(&sweep()[first]));
    for (int i = 0; i < V::lanes; ++i) body(sweep()[first + i], float(y.v[i]));
  }
}

// The distance of neighbouring floats at x.
double ulp(double x) { return std::ldexp(1.0, std::max(-149, std::ilogb(x) - 23)); }

double exact_erf(double x) { return std::erf(x / std::sqrt(2.0)); }

// `allowed`: the error that a result of this size may have.
template <class V>
void check_erf(double (*allowed)(double)) {
  V (*f)(V) = [](V x) { return erf_over_root2(x); };
  each_of(f, [&](float x, float y) {
    if (std::isnan(x)) return expect(std::isnan(y), "erf(NaN / √2) is %a", y);
    const double exact = exact_erf(x);
    const double error = std::abs(y - exact);
    expect(error <= allowed(exact), "erf(%a / √2) is %a, exactly %a, an error of %g ulp", x, y, exact,
           error / ulp(exact));
    expect(std::signbit(y) == std::signbit(x), "erf(%a / √2) is %a: the sign is lost", x, y);
    expect(std::abs(y) <= 1, "erf(%a / √2) is %a, beyond 1", x, y);
    if (std::abs(x) > 5.656f) expect(std::abs(y) == 1, "erf(%a / √2) is %.9g, not 1", x, y);
  });
}

void check_exp() {
  Floats (*f)(Floats) = [](Floats x) { return exp(x); };
  each_of(f, [&](float x, float y) {
    if (std::isnan(x)) return expect(std::isnan(y), "exp(NaN) is %a", y);
    const double exact = std::exp(double(x));
    if (x <= -104) return expect(y == 0 && !std::signbit(y), "exp(%a) is %a, not 0", x, y);
    if (exact >= 0x1p128) return expect(y == kInf, "exp(%a) is %a, not infinity", x, y);
    expect(std::abs(y - exact) <= 2 * ulp(exact), "exp(%a) is %a, exactly %a, an error of %g ulp", x, y, exact,
           std::abs(y - exact) / ulp(exact));
  });
}

void check_double_functions() {
  for (double x : {-40.0, -3.0, -1e-300, -0.0, 0.0, 1e-9, 0.7, 5.0, 40.0, 1e300, double(kInf), double(kNan)}) {
    const Doubles e = exp(Doubles(x)), erf = erf_over_root2(Doubles(x));
    for (int i = 0; i < Doubles::lanes; ++i) {
      const double wanted = exact_erf(x);
      expect(e.v[i] == std::exp(x) || x != x, "exp(%a) is %a in lane %d", x, double(e.v[i]), i);
      expect(std::abs(erf.v[i] - wanted) <= 4e-16 * std::abs(wanted) || x != x, "erf(%a / √2) is %a in lane %d", x,
             double(erf.v[i]), i);
      if (x != x) expect(e.v[i] != e.v[i] && erf.v[i] != erf.v[i], "a NaN is lost in lane %d", i);
    }
  }
}

template <class V>
void check_bounds() {
  using L = std::decay_t<decltype(V{}.v[0])>;
  for (L x : {L(-kInf), L(-3), L(-0.5), L(0), L(0.5), L(3), L(kInf), L(kNan)})
    for (L bound : {L(-0.5), L(0), L(6)}) {
      const V high = larger(V(double(bound)), V(double(x))), low = smaller(V(double(bound)), V(double(x)));
      const L scalar_high = pom::larger(bound, x), scalar_low = pom::smaller(bound, x);
      for (int i = 0; i < V::lanes; ++i) {
        if (x != x) {
          expect(high.v[i] != high.v[i] && low.v[i] != low.v[i], "larger or smaller loses a NaN in lane %d", i);
          expect(scalar_high != scalar_high && scalar_low != scalar_low, "larger or smaller of a number loses a NaN");
        } else {
          expect(high.v[i] == std::max(bound, x) && low.v[i] == std::min(bound, x), "larger(%g, %g) = %g, smaller = %g",
                 double(bound), double(x), double(high.v[i]), double(low.v[i]));
          expect(high.v[i] == scalar_high && low.v[i] == scalar_low, "vector and number differ at %g", double(x));
        }
      }
    }
}

// The value of a 16-bit type's bits, by definition.
double decode(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  double x = exponent ? std::ldexp(double(fraction + (1 << fraction_bits)), exponent - bias - fraction_bits)
                      : std::ldexp(double(fraction), 1 - bias - fraction_bits);
  if (exponent == (1 << exponent_bits) - 1) x = fraction ? double(kNan) : double(kInf);
  return bits & 0x8000 ? -x : x;
}

template <class T>
struct Format;
template <>
struct Format<bf16> {
  static constexpr int exponent_bits = 8;
  static constexpr uint16_t infinity = 0x7f80;
  static bf16 rounded(float x) { return to_bf16(x); }
};
template <>
struct Format<f16> {
  static constexpr int exponent_bits = 5;
  static constexpr uint16_t infinity = 0x7c00;
  static f16 rounded(float x) { return to_f16(x); }
};

// All magnitudes of a type in order, with the number that would follow in place of infinity.
template <class T>
std::vector<double> magnitudes() {
  std::vector<double> all;
  for (int bits = 0; bits < Format<T>::infinity; ++bits)
    all.push_back(decode(uint16_t(bits), Format<T>::exponent_bits));
  all.push_back(2 * all.back() - all[all.size() - 2]);
  return all;
}

// The bits of the nearest neighbour of x; of the even one if x is in the middle.
uint16_t nearest(const std::vector<double>& all, float x) {
  const double magnitude = std::min(std::abs(double(x)), all.back());
  const size_t above = std::lower_bound(all.begin(), all.end(), magnitude) - all.begin();
  size_t bits = above;
  if (above) {
    const double to_below = magnitude - all[above - 1], to_above = all[above] - magnitude;
    if (to_below < to_above || (to_below == to_above && above % 2)) bits = above - 1;
  }
  return uint16_t(bits | (std::signbit(x) ? 0x8000 : 0));
}

template <class T>
void check_16_bit_type() {
  for (int first = 0; first < 1 << 16; first += Floats::lanes) {
    T given[Floats::lanes], back[Floats::lanes];
    for (int i = 0; i < Floats::lanes; ++i) given[i].bits = uint16_t(first + i);
    const auto x = load(given);
    store(back, x);
    for (int i = 0; i < Floats::lanes; ++i) {
      const uint16_t bits = given[i].bits;
      const double wanted = decode(bits, Format<T>::exponent_bits);
      if (wanted != wanted) {
        expect(x.v[i] != x.v[i] && (back[i].bits & 0x7fff) > Format<T>::infinity, "NaN %04x is lost", bits);
        expect(to_float(given[i]) != to_float(given[i]), "to_float loses NaN %04x", bits);
      } else {
        expect(x.v[i] == wanted && std::signbit(float(x.v[i])) == std::signbit(wanted), "%04x loads as %a, not %a",
               bits, double(x.v[i]), wanted);
        expect(to_float(given[i]) == wanted, "to_float(%04x) is %a, not %a", bits, double(to_float(given[i])), wanted);
        expect(back[i].bits == bits, "%04x is stored as %04x", bits, back[i].bits);
      }
    }
  }

  // Between all neighbours: the middle, the floats beside it, and the quarters; then floats of all sizes.
  const std::vector<double> all = magnitudes<T>();
  std::vector<float> given;
  for (size_t i = 0; i + 1 < all.size(); ++i) {
    const float middle = float((all[i] + all[i + 1]) / 2);
    for (float x : {middle, std::nextafter(middle, 0.f), std::nextafter(middle, kInf),
                    float(0.75 * all[i] + 0.25 * all[i + 1]), float(0.25 * all[i] + 0.75 * all[i + 1])}) {
      given.push_back(x);
      given.push_back(-x);
    }
  }
  for (int64_t bits = 0; bits < int64_t(1) << 32; bits += 8191) given.push_back(bits_to_float(uint32_t(bits)));
  given.insert(given.end(), {kInf, -kInf, kNan, 65519.96f, 65520.f, 3.40282347e38f});
  given.resize((given.size() + Floats::lanes - 1) / Floats::lanes * Floats::lanes);
  for (size_t first = 0; first < given.size(); first += Floats::lanes) {
    T stored[Floats::lanes];
    store(stored, Floats::load(&given[first]));
    for (int i = 0; i < Floats::lanes; ++i) {
      const float x = given[first + i];
      const uint16_t number = Format<T>::rounded(x).bits;
      if (x != x) {
        expect((stored[i].bits & 0x7fff) > Format<T>::infinity, "NaN is stored as %04x", stored[i].bits);
        expect((number & 0x7fff) > Format<T>::infinity, "NaN is rounded to %04x", number);
      } else {
        const uint16_t wanted = nearest(all, x);
        expect(stored[i].bits == wanted, "%a is stored as %04x, not %04x", double(x), stored[i].bits, wanted);
        expect(number == wanted, "%a is rounded to %04x, not %04x", double(x), number, wanted);
      }
    }
  }
}

// Memory that ends at an inaccessible page.
class Guarded {
 public:
  Guarded() : page_(sysconf(_SC_PAGESIZE)) {
    memory_ = static_cast<char*>(mmap(nullptr, 2 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_ + page_, page_, PROT_NONE);
  }
  ~Guarded() { munmap(memory_, 2 * page_); }
  // The last n elements before the page.
  template <class T>
  T* last(int64_t n) const {
    return reinterpret_cast<T*>(memory_ + page_) - n;
  }

 private:
  int64_t page_;
  char* memory_;
};

template <class T>
T number(double x) {
  if constexpr (std::is_same_v<T, bf16> || std::is_same_v<T, f16>)
    return Format<T>::rounded(float(x));
  else
    return T(x);
}
double value(double x) { return x; }
double value(bf16 x) { return to_float(x); }
double value(f16 x) { return to_float(x); }

// The first n lanes, at the end of readable memory and among other numbers.
template <class T>
void check_first_lanes() {
  using V = typename vector_of<T>::type;
  const Guarded memory;
  for (int64_t n = 0; n <= V::lanes; ++n) {
    T* end = memory.last<T>(n);
    for (int64_t i = 0; i < n; ++i) end[i] = number<T>(i + 1);
    const V x = load(end, n);
    for (int64_t i = 0; i < V::lanes; ++i)
      expect(x.v[i] == (i < n ? i + 1 : 0), "lane %d of %d loaded is %g", int(i), int(n), double(x.v[i]));
    if (n == V::lanes) {
      const V whole = load(end, AllLanes{});
      for (int64_t i = 0; i < n; ++i) expect(whole.v[i] == i + 1, "lane %d is %g", int(i), double(whole.v[i]));
    }
    store(end, x, n);
    T among[V::lanes + 1];
    std::fill_n(among, V::lanes + 1, number<T>(-7));
    store(among, x + V(1.0), n);
    for (int64_t i = 0; i <= V::lanes; ++i)
      expect(value(among[i]) == (i < n ? i + 2 : -7), "element %d after %d were stored is %g", int(i), int(n),
             value(among[i]));
  }
}

template <class V>
void check_accumulate() {
  const Guarded memory;
  const double start = 1e9 + 1.0 / 1024;  // float cannot hold it
  V x(0.0);
  for (int i = 0; i < V::lanes; ++i) x.v[i] = 0.5f * (i + 1);
  auto check_sums = [&](const double* p, int64_t n, int64_t size) {
    for (int64_t i = 0; i < size; ++i)
      expect(p[i] == (i < n ? start + 0.5 * (i + 1) : start), "element %d of %d accumulated is %.17g", int(i), int(n),
             p[i]);
  };
  for (int64_t n = 0; n <= V::lanes; ++n) {
    double* end = memory.last<double>(n);
    std::fill_n(end, n, start);
    accumulate(end, x, n);
    check_sums(end, n, n);
    double among[V::lanes + 1];
    std::fill_n(among, V::lanes + 1, start);
    accumulate(among, x, n);
    check_sums(among, n, V::lanes + 1);
  }
  double* end = memory.last<double>(V::lanes);
  std::fill_n(end, V::lanes, start);
  accumulate(end, x, AllLanes{});
  check_sums(end, V::lanes, V::lanes);
}

// Vectors of even and odd channels: every channel is where it belongs, and nothing beyond them is touched.
void check_even_odd() {
  constexpr int64_t size = 2 * Floats::lanes;
  const Guarded memory;
  bf16* halves = memory.last<bf16>(size);
  for (int64_t first = 0; first < 1 << 16; first += size) {
    for (int64_t i = 0; i < size; ++i) halves[i].bits = uint16_t(first + i);
    const EvenOdd<CoarseFloats> x = load(halves, EvenOddLanes{});
    for (int64_t i = 0; i < size; ++i) {
      const float got = i % 2 ? x.odd.v[i / 2] : x.even.v[i / 2];
      expect(float_to_bits(got) == uint32_t(halves[i].bits) << 16, "%04x loads as %a", halves[i].bits, double(got));
    }
  }
  float* floats = memory.last<float>(size);
  for (int64_t i = 0; i < size; ++i) floats[i] = 0.5f * float(i + 1);
  const EvenOdd<CoarseFloats> x = load(floats, EvenOddLanes{});
  for (int64_t i = 0; i < size; ++i)
    expect((i % 2 ? x.odd.v[i / 2] : x.even.v[i / 2]) == 0.5 * double(i + 1), "float %d is misplaced", int(i));
  double* sums = memory.last<double>(size);
  std::fill_n(sums, size, 1e9);
  accumulate(sums, x, EvenOddLanes{});
  for (int64_t i = 0; i < size; ++i)
    expect(sums[i] == 1e9 + 0.5 * double(i + 1), "element %d accumulated is %.17g", int(i), sums[i]);
}

// How often each channel was visited.
struct Visits {
  std::vector<int> times;
  void operator()(int64_t channel, EvenOddLanes) { (*this)(channel, int64_t(2 * Floats::lanes)); }
  void operator()(int64_t channel, AllLanes) { (*this)(channel, int64_t(Floats::lanes)); }
  void operator()(int64_t channel, int64_t n) {
    for (int64_t i = 0; i < n; ++i) ++times.at(channel + i);
  }
  void expect_once(const char* loop) const {
    expect(std::count(times.begin(), times.end(), 1) == int64_t(times.size()), "%s: not once every channel of %d", loop,
           int(times.size()));
  }
};

void check_channel_loops() {
  for (int64_t width = 0; width <= 5 * Floats::lanes + 1; ++width) {
    Visits plain{std::vector<int>(width)}, floats = plain, halves = plain;
    for_channels<Floats>(width, [&](int64_t channel, auto n) { plain(channel, n); });
    for_stored_channels<float>(width, [&](int64_t channel, auto n) { floats(channel, n); });
    for_stored_channels<bf16>(width, [&](int64_t channel, auto n) { halves(channel, n); });
    plain.expect_once("for_channels");
    floats.expect_once("for_stored_channels of floats");
    halves.expect_once("for_stored_channels of bf16");
  }
}

int main() {
  section("erf_over_root2 of Floats: 2 ulp");
  check_erf<Floats>([](double exact) { return 2 * ulp(exact); });
  section("erf_over_root2 of CoarseFloats: 2^-19");
  check_erf<CoarseFloats>([](double exact) { return std::ldexp(std::abs(exact), -19) + std::ldexp(1.0, -149); });
  section("exp of Floats: 2 ulp");
  check_exp();
  section("exp and erf_over_root2 of Doubles");
  check_double_functions();
  section("larger and smaller");
  check_bounds<Floats>();
  check_bounds<CoarseFloats>();
  check_bounds<Doubles>();
  section("bf16");
  check_16_bit_type<bf16>();
  section("f16");
  check_16_bit_type<f16>();
  section("load and store of the first lanes");
  check_first_lanes<double>();
  check_first_lanes<float>();
  check_first_lanes<bf16>();
  check_first_lanes<f16>();
  section("accumulate");
  check_accumulate<Doubles>();
  check_accumulate<Floats>();
  check_accumulate<CoarseFloats>();
  section("even and odd channels");
  check_even_odd();
  section("for_channels and for_stored_channels");
  check_channel_loops();
  return check::finish();
}
