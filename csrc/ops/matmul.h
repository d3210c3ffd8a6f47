// out = a b, or out += a b, on the CPU with sums in float32: for factors of a few hundred rows that share a large second
// factor.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host.h"
#include "cpu/dispatch.h"

namespace memkern::cpu {

// a (M, K), b (K, N), out (M, N): float, or factors of bfloat16 and an output of either. Strides in elements; out has
// stride 1 along N.
struct MatMul {
  ParallelFor run;
  int64_t M, N, K;
  const void* a;
  int64_t a_row, a_col;
  const void* b;
  int64_t b_row, b_col;
  // One of the two.
  float* out;
  bf16* rounded;
  int64_t out_row;
  // To out, never to what is rounded.
  bool add;
};

struct MatMulTable {
  void (*floats)(const MatMul&);
  // The product of bfloat16, or null where the processor does not multiply pairs of them.
  void (*(*pairs)())(const MatMul&);
};

}  // namespace memkern::cpu

MK_CPU_TABLE(MatMulTable, matmul)
