// Checks that print what they saw and go on. A program runs sections, and returns what finish() says.
#pragma once

#include <cinttypes>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace check {

constexpr int64_t kShown = 5;  // failures of one section that are printed

inline const char* name = nullptr;  // of the section that runs
inline int64_t checks = 0, failures = 0;
inline bool failed = false;  // any section

// A section that checked nothing has failed too.
inline void end_section() {
  if (!name) return;
  if (failures > kShown) std::printf("  … and %" PRId64 " more\n", failures - kShown);
  std::printf("  %" PRId64 " checks, %" PRId64 " failed\n", checks, failures);
  failed = failed || failures || !checks;
}

// The name is printed at once, so that a crash is seen where it happens.
inline void section(const char* next) {
  end_section();
  name = next;
  checks = failures = 0;
  std::printf("%s\n", name);
  std::fflush(stdout);
}

__attribute__((format(printf, 2, 3))) inline void expect(bool ok, const char* format, ...) {
  ++checks;
  if (ok || ++failures > kShown) return;
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
