#include "pom/pom.h"

namespace pom {

const char* message(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::bad_degree:
      return "degree: expected 1 to 16";
    case Status::bad_size:
      return "a size is negative, does not divide, or does not agree with another argument's";
    case Status::bad_dtype:
      return "dtypes of the arguments do not go together";
    case Status::null_pointer:
      return "a pointer that this call needs is null";
    case Status::rotary_needs_power:
      return "rotary positions are defined for the power form only";
    case Status::workspace_too_small:
      return "the workspace is smaller than workspace(args) asks for";
    case Status::no_device_code:
      return "the library holds no code for this GPU: build it with TORCH_CUDA_ARCH_LIST set to its compute capability";
    case Status::device_error:
      return "CUDA refused the call";
  }
  return "unknown status";
}

}  // namespace pom
