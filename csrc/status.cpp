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
      return "the library holds no code for this GPU: build it again where this GPU is visible, or with "
             "TORCH_CUDA_ARCH_LIST (in CMake, CMAKE_CUDA_ARCHITECTURES) set to its compute capability";
    case Status::device_error:
      return "CUDA refused the call";
    case Status::no_cuda:
      return "the library was built without CUDA";
    case Status::bad_index:
      return "the stream has no such layer or evaluation";
    case Status::overlap:
      return "an output, the workspace or the memory of a stream overlaps something else";
    case Status::memory_too_small:
      return "the memory is smaller than the stream or its file needs";
    case Status::bad_file:
      return "not a saved stream, or one that is truncated or damaged";
    case Status::later_version:
      return "the stream was saved by a later version of the library";
    case Status::other_shape:
      return "the other stream, or the saved one, has other layers, another batch or other evaluations";
    case Status::no_tangents:
      return "mix and update take no tangents, the causal mix takes one of features or gates: add such calls up";
  }
  return "unknown status";
}

}  // namespace pom
