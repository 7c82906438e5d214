// Chooses, once, the inner loops for the processor at hand.

#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

#define POM_DECLARE(isa)                                                   \
  namespace pom::cpu::isa {                                                \
  const FeatureKernels<float>* feature_kernels(Dtype, Form, int, float);   \
  const FeatureKernels<double>* feature_kernels(Dtype, Form, int, double); \
  const GateKernels<float>* gate_kernels(Dtype, Form, float);              \
  const GateKernels<double>* gate_kernels(Dtype, Form, double);            \
  const LinearKernels<float>* linear_kernels(float);                       \
  const LinearKernels<double>* linear_kernels(double);                     \
  }
POM_DECLARE(generic)
#ifdef POM_X86
POM_DECLARE(avx2)
POM_DECLARE(avx512)
#endif

namespace pom::cpu {
namespace {

enum class Isa { generic, avx2, avx512 };

Isa detect() {
  Isa best = Isa::generic;
#ifdef POM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2"))
    best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
#endif
  const char* asked = std::getenv("POM_EXT_ISA");
  if (asked && !std::strcmp(asked, "generic")) return Isa::generic;
  if (asked && !std::strcmp(asked, "avx2") && best == Isa::avx512) return Isa::avx2;
  return best;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

}  // namespace

#ifdef POM_X86
#define POM_CHOOSE(call) (isa() == Isa::avx512 ? *avx512::call : isa() == Isa::avx2 ? *avx2::call : *generic::call)
#else
#define POM_CHOOSE(call) (*generic::call)
#endif

template <class Acc>
const FeatureKernels<Acc>& feature_kernels(Dtype dtype, Form form, int degree) {
  return POM_CHOOSE(feature_kernels(dtype, form, degree, Acc{}));
}
template <class Acc>
const GateKernels<Acc>& gate_kernels(Dtype dtype, Form form) {
  return POM_CHOOSE(gate_kernels(dtype, form, Acc{}));
}
template <class Acc>
const LinearKernels<Acc>& linear_kernels() {
  return POM_CHOOSE(linear_kernels(Acc{}));
}

template const FeatureKernels<float>& feature_kernels<float>(Dtype, Form, int);
template const FeatureKernels<double>& feature_kernels<double>(Dtype, Form, int);
template const GateKernels<float>& gate_kernels<float>(Dtype, Form);
template const GateKernels<double>& gate_kernels<double>(Dtype, Form);
template const LinearKernels<float>& linear_kernels<float>();
template const LinearKernels<double>& linear_kernels<double>();

const char* instruction_set() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "generic"; }

}  // namespace pom::cpu
