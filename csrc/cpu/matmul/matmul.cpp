#include "ops/matmul.h"

#include "cpu/isa.h"

#include "common/vec.h"
#include "cpu/matmul/pairs.h"
#include "cpu/matmul/product.h"

namespace memkern::cpu::MK_NS {

extern const MatMulTable matmul = {product, product_of_pairs};

}  // namespace memkern::cpu::MK_NS
