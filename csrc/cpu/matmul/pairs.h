// The product on pairs of bfloat16; null where the processor has no such instruction.
#pragma once

#include "ops/matmul.h"

namespace memkern::cpu::MK_NS {

using Product = void (*)(const MatMul&);
Product product_of_pairs();

}  // namespace memkern::cpu::MK_NS
