// The product on pairs of bfloat16: twice the rate of float, for processors that have the instruction.
#include "cpu/isa.h"

#if defined(MK_ISA_AVX512)
#pragma GCC target("avx512bf16")
#define MK_DOT_BF16 1
#include "common/vec.h"
#include "cpu/matmul/pairs.h"
#include "cpu/matmul/product.h"

namespace memkern::cpu::MK_NS {
Product product_of_pairs() {
  static const bool here = __builtin_cpu_supports("avx512bf16");
  return here ? product : nullptr;
}
}  // namespace memkern::cpu::MK_NS
#else
#include "cpu/matmul/pairs.h"

namespace memkern::cpu::MK_NS {
Product product_of_pairs() { return nullptr; }
}  // namespace memkern::cpu::MK_NS
#endif
