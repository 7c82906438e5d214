// Numbers of the four element types, where no inner loop reads them.
#pragma once

#include "pom/pom.h"

namespace pom::cpu {

inline float number(float x) { return x; }
inline double number(double x) { return x; }
inline float number(bf16 x) { return to_float(x); }
inline float number(f16 x) { return to_float(x); }
inline void put(float x, float* y) { *y = x; }
inline void put(double x, double* y) { *y = x; }
inline void put(float x, bf16* y) { *y = to_bf16(x); }
inline void put(float x, f16* y) { *y = to_f16(x); }

// body(a number of that type)
template <class Body>
void with_type(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::f32:
      return body(float{});
    case Dtype::f64:
      return body(double{});
    case Dtype::bf16:
      return body(bf16{});
    case Dtype::f16:
      return body(f16{});
  }
}

template <class Acc>
constexpr Dtype kAccDtype = sizeof(Acc) == 8 ? Dtype::f64 : Dtype::f32;

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// The address that many bytes behind; null stays null.
inline const char* at(const void* data, int64_t bytes) {
  return data ? static_cast<const char*>(data) + bytes : nullptr;
}
inline char* at(void* data, int64_t bytes) { return data ? static_cast<char*>(data) + bytes : nullptr; }

}  // namespace pom::cpu
