// Error messages of CUDA calls, and the versions of runtime and driver.

#include "cuda/launch.h"

#include <cstdio>

namespace pom::cuda {
namespace {

thread_local char words[256] = "no error";

// The first driver that supports every CUDA release of a major version, from 11 on.
constexpr int kFirstDrivers[] = {450, 525, 580};

// CUDA's own message names neither the driver it needs nor a remedy.
void say_driver_is_old() {
  const Versions v = versions();
  char found[64] = "there is no NVIDIA driver that loads", needed[32] = "a later driver";
  if (v.driver)
    std::snprintf(found, sizeof found, "the NVIDIA driver is too old: it serves CUDA %d.%d", v.driver / 1000,
                  v.driver % 1000 / 10);
  if (const int major = v.runtime / 1000; major >= 11 && major <= 13)
    std::snprintf(needed, sizeof needed, "driver %d or later", kFirstDrivers[major - 11]);
  std::snprintf(words, sizeof words,
                "%s, and this library is linked to CUDA %d.%d: install %s, or build the library here with the toolkit "
                "that torch.version.cuda names",
                found, v.runtime / 1000, v.runtime % 1000 / 10, needed);
}

void say_no_code(cudaError_t code) {
  int device = 0, major = 0, minor = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  if (known)
    std::snprintf(words, sizeof words, "%s, of compute capability %d.%d", cudaGetErrorString(code), major, minor);
  else
    std::snprintf(words, sizeof words, "%s", cudaGetErrorString(code));
}

}  // namespace

Status checked(cudaError_t code) {
  if (code == cudaSuccess) return Status::ok;
  const bool no_code = code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction;
  cudaGetLastError();  // clears it: no later check should report it again
  if (no_code)
    say_no_code(code);
  else if (code == cudaErrorInsufficientDriver)
    say_driver_is_old();
  else
    std::snprintf(words, sizeof words, "%s", cudaGetErrorString(code));
  return no_code ? Status::no_device_code : Status::device_error;
}

Status refused(const char* said, Status status) {
  std::snprintf(words, sizeof words, "%s", said);
  return status;
}

const char* error() { return words; }

Versions versions() {
  Versions v;
  if (cudaRuntimeGetVersion(&v.runtime) != cudaSuccess) v.runtime = 0;
  if (cudaDriverGetVersion(&v.driver) != cudaSuccess) v.driver = 0;
  return v;
}

}  // namespace pom::cuda
