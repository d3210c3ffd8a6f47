// out = a b, or out += a b, on the CPU with sums in float32: for factors of a few hundred rows that share a large second
// factor.
#pragma once

#include <cstdint>

#include "common/host.h"
#include "cpu/dispatch.h"

namespace memkern::cpu {

// a (M, K), b (K, N), out (M, N) float. K counts steps: one float, or a pair of bfloat16 that lie side by side. Strides of
// a and b are in steps. out has stride 1 along N.
struct MatMul {
  ParallelFor run;
  int64_t M, N, K;
  const void* a;
  int64_t a_row, a_col;
  const void* b;
  int64_t b_row, b_col;
  float* out;
  int64_t out_row;
  bool add;
};

struct MatMulTable {
  void (*floats)(const MatMul&);
  // The product of pairs, or null where the processor does not multiply them.
  void (*(*pairs)())(const MatMul&);
};

}  // namespace memkern::cpu

MK_CPU_TABLE(MatMulTable, matmul)
