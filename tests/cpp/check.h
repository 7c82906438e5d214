// Checks that print failures and continue. A program runs sections and returns finish().
#pragma once

#include <cinttypes>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace check {

constexpr int64_t kMaxPrinted = 5;  // failures printed per section

inline const char* name = nullptr;  // of the current section
inline int64_t checks = 0, failures = 0;
inline bool failed = false;  // in any section

// A section without checks fails too.
inline void end_section() {
  if (!name) return;
  if (failures > kMaxPrinted) std::printf("  … and %" PRId64 " more\n", failures - kMaxPrinted);
  std::printf("  %" PRId64 " checks, %" PRId64 " failed\n", checks, failures);
  failed = failed || failures || !checks;
}

// The name is flushed first, so that a crash shows its section.
inline void section(const char* next) {
  end_section();
  name = next;
  checks = failures = 0;
  std::printf("%s\n", name);
  std::fflush(stdout);
}

__attribute__((format(printf, 2, 3))) inline void expect(bool ok, const char* format, ...) {
  ++checks;
  if (ok || ++failures > kMaxPrinted) return;
  std::printf("  FAILED: ");
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  std::fflush(stdout);
}

inline int finish() {
  end_section();
  return failed ? 1 : 0;
}

}  // namespace check
