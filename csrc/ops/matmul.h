// out = a b, or out += a b, in float32 on the CPU: for factors of a few hundred rows that share a large second factor.
#pragma once

#include <cstdint>

#include "common/host.h"
#include "cpu/dispatch.h"

namespace memkern::cpu {

// a (M, K), b (K, N), out (M, N); strides in elements. out has stride 1 along N.
struct MatMul {
  ParallelFor run;
  int64_t M, N, K;
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_row, b_col;
  float* out;
  int64_t out_row;
  bool add;
};

struct MatMulTable {
  void (*matmul)(const MatMul&);
};

}  // namespace memkern::cpu

MK_CPU_TABLE(MatMulTable, matmul)
