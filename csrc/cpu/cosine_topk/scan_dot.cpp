// The scan on pairs of bfloat16: twice the rate of float, for processors that have the instruction.
#include "ops/cosine_topk.h"

#include "cpu/isa.h"

#if defined(MK_ISA_AVX512)
#pragma GCC target("avx512bf16")
#define MK_DOT_BF16 1
#include "common/vec.h"
#include "cpu/cosine_topk/scan.h"
#include "cpu/cosine_topk/scan_library.h"

namespace memkern::cpu::MK_NS {
const ScanKernels* bf16_scan(bool library) {
  static const bool here = __builtin_cpu_supports("avx512bf16");
  return !here ? nullptr : library ? &kLibraryKernels : &kScanKernels;
}
}  // namespace memkern::cpu::MK_NS
#else
#include "common/vec.h"
#include "cpu/cosine_topk/scan_types.h"

namespace memkern::cpu::MK_NS {
const ScanKernels* bf16_scan(bool) { return nullptr; }
}  // namespace memkern::cpu::MK_NS
#endif
