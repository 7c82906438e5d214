// Turns the engine's statuses into exceptions.
#pragma once

#include <stdexcept>
#include <string>

#include "pom/engine.h"

namespace example {

inline void check(pom_status status) {
  if (status == POM_OK) return;
  const std::string cuda = status == POM_DEVICE_ERROR ? std::string(" (") + pom_cuda_error() + ")" : "";
  throw std::runtime_error(pom_status_message(status) + cuda);
}

}  // namespace example
