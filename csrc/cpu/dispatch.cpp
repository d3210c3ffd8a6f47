#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace memkern::cpu {

namespace {

constexpr Isa kAll[] = {Isa::kAvx512, Isa::kAvx2, Isa::kDefault};  // best first

Isa choose() {
  const char* wanted = std::getenv("MEMKERN_CPU_ISA");
  std::string available;
  for (Isa candidate : kAll) {
    if (!isa_available(candidate)) continue;
    if (wanted == nullptr || *wanted == '\0' || isa_name(candidate) == std::string(wanted)) return candidate;
    available += std::string(available.empty() ? "" : ", ") + isa_name(candidate);
  }
  throw std::runtime_error(std::string("MEMKERN_CPU_ISA=") + wanted +
                           " is not available here; choose one of: " + available);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "default";
  }
}

bool isa_available(Isa isa) {
#if defined(MK_MULTI_ISA)
  // Exactly the features that the target regions of isa.h name; gcc's test includes the operating system's support.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::kDefault;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace memkern::cpu
