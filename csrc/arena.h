// The scratch memory of an operation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pom {

// Takes arrays from the caller's workspace; without a workspace it only counts their bytes.
class Arena {
 public:
  explicit Arena(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t n) {
    used_ = (used_ + 63) / 64 * 64;
    T* p = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += n * sizeof(T);
    return p;
  }
  size_t used() const { return used_ + 64; }  // room to align the caller's pointer

  static void* align(void* memory) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace pom
