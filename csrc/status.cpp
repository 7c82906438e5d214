#include "pom/pom.h"

namespace pom {
namespace {

constexpr const char* kMessages[] = {
    // in the order of Status
    "ok",
    "degree: expected 1 to 16",
    "a size is negative, does not divide, or does not agree with another argument's",
    "dtypes of the arguments do not go together",
    "a pointer that this call needs is null",
    "rotary positions are defined for the power form only",
    "the workspace is smaller than workspace(args) asks for",
    "the library holds no code for this GPU: build it again where this GPU is visible, or with "
    "TORCH_CUDA_ARCH_LIST (in CMake, CMAKE_CUDA_ARCHITECTURES) set to its compute capability",
    "CUDA refused the call",
    "the library was built without CUDA",
    "the stream has no such layer or evaluation",
    "an output, the workspace or the memory of a stream overlaps something else",
    "the memory is smaller than the stream or its file needs",
    "not a saved stream, or one that is truncated or damaged",
    "the stream was saved by a later version of the library",
    "the other stream, or the saved one, has other layers, another batch or other evaluations",
    "mix and update take no tangents, the causal mix takes one of features or gates: add such calls up",
};
static_assert(sizeof kMessages / sizeof *kMessages == int(Status::no_tangents) + 1);

}  // namespace

const char* message(Status status) {
  return status >= Status::ok && status <= Status::no_tangents ? kMessages[int(status)] : "unknown status";
}

}  // namespace pom
