// One row of K values, and sums over rows that no race can change: every block stores its terms, the last block of each
// group adds its group's in order, the last group those of all groups.
#pragma once

#include "cuda/common.cuh"
#include "cuda/routing/routing.h"

namespace memkern::cuda {

constexpr int kThreads = 256;
constexpr float kEntropyEps = 1e-10f;
constexpr float kZeroRow = 1e-10f;

__device__ __forceinline__ float load_param(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::kBF16: return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    case DType::kF16: return to_float(static_cast<const __half*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ float clamp_logit(float z, float limit) {
  return z == z ? fminf(fmaxf(z, -limit), limit) : z;
}

__device__ __forceinline__ float entropy_slope(float p) {
  return -(logf(p + kEntropyEps) + p / (p + kEntropyEps));
}

// The largest of (value, lowest index); a NaN never wins, so a row of NaN gives index 0.
__device__ __forceinline__ int warp_argmax(float value, int index) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, step);
    const int other_index = __shfl_xor_sync(0xffffffffu, index, step);
    if (other > value || (other == value && other_index < index) || (value != value && other == other)) {
      value = other;
      index = other_index;
    }
  }
  return index;
}

// Thread k's column of `count` rows of terms, in order; other blocks wrote them, so the read passes the L1 cache.
__device__ __forceinline__ float sum_column(const float* terms, int64_t count, int64_t stride) {
  float total = 0.0f;
  for (int64_t i = 0; i < count; ++i) total += __ldcg(terms + i * stride);
  return total;
}

// Writes the loss and its weights from columns that each thread below K holds. One-dimensional block, K <= threads.
__device__ __forceinline__ void write_loss(float count, float mass, float rows, int64_t experts, float* loss,
                                           float* loss_weights, float* scratch) {
  const int k = threadIdx.x;
  rows = fmaxf(rows, 1.0f);
  const float share = k < experts ? count / rows : 0.0f;
  const float total = block_sum(k < experts ? share * (mass / rows) : 0.0f, scratch);
  if (k == 0) *loss = float(experts) * total;
  if (loss_weights != nullptr && k < experts) loss_weights[k] = float(experts) * share / rows;
}

}  // namespace memkern::cuda
