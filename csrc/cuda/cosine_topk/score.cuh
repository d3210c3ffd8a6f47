// The score of a query and a row in a fixed order, and the packed keys by which rows are compared.
#pragma once

#include "cuda/common.cuh"
#include "cuda/cosine_topk.h"

// Runs the block with S and T the types of queries and rows.
#define MK_DISPATCH_PAIR(p, S, T, ...) \
  MK_DISPATCH_CUDA((p).query_dtype, S, { MK_DISPATCH_CUDA((p).dtype, T, { __VA_ARGS__; }); })

namespace memkern::cuda {

constexpr float kLeastLength = 1e-15f, kMostLength = 1e15f;
constexpr int64_t kLowestKey = INT64_MIN;

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ __forceinline__ double inverse_root(double squared) { return squared == 0 ? 0.0 : 1.0 / sqrt(squared); }

// The inverse of a subnormal norm would overflow, and infinity times zero is NaN.
__device__ __forceinline__ float rounded_inverse(double squared) {
  return static_cast<float>(fmin(inverse_root(squared), 3.4028234663852886e38));
}

// The squared norm of a row, by one warp; every lane gets the same bits.
template <class T>
__device__ __forceinline__ double squared_norm(const T* row, int64_t width) {
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < width; i += kWarp) {
    const double x = to_float(row[i]);
    sum = fma(x, x, sum);
  }
  return warp_sum(sum);
}

// By one warp: lane l adds the products l, l + 32, ...; what a score's bits depend on is the pair alone.
template <class S, class T>
__device__ __forceinline__ float score_row(const S* query, float factor, double query_inverse, const T* row,
                                           int64_t width, bool normalized, const float* given) {
  float dot = 0;
  double squares = 0;
  const bool own = !normalized && given == nullptr;
  for (int64_t i = threadIdx.x % kWarp; i < width; i += kWarp) {
    const float x = to_float(row[i]);
    dot = fmaf(to_float(query[i]) * factor, x, dot);
    if (own) squares = fma(static_cast<double>(x), static_cast<double>(x), squares);
  }
  dot = warp_sum(dot);
  if (normalized) return dot;
  const float inverse = own ? rounded_inverse(warp_sum(squares)) : *given;
  // Adding zero turns -0 into 0.
  return static_cast<float>(static_cast<double>(dot) * static_cast<double>(inverse) * query_inverse) + 0.0f;
}

// float -> int32 with the same order, and back.
__device__ __forceinline__ int32_t ordered(float x) {
  const int32_t bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float unordered(int32_t bits) { return __int_as_float(bits ^ ((bits >> 31) & 0x7fffffff)); }

// Keys descend by (x descending, row ascending).
__device__ __forceinline__ int64_t pack(float x, int64_t row) {
  return static_cast<int64_t>((static_cast<uint64_t>(static_cast<uint32_t>(ordered(x))) << 32) |
                              static_cast<uint64_t>(0xffffffffu - static_cast<uint32_t>(row)));
}
__device__ __forceinline__ float key_value(int64_t key) { return unordered(static_cast<int32_t>(key >> 32)); }
__device__ __forceinline__ int64_t key_row(int64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// Whether a query may find a row at all.
__device__ __forceinline__ bool may_find(const CosineSearch& p, int64_t search, int64_t query, int64_t row) {
  if (p.valid &&
      !p.valid[search * p.valid_stride[0] + query * p.valid_stride[1] + row * p.valid_stride[2]]) {
    return false;
  }
  return !p.query_group || p.query_group[search * p.queries + query] == p.row_group[search * p.rows + row];
}

// The scan, one round of tiles (scan.cu).
cudaError_t cosine_scan(const CosineSearch& p, int64_t tiles, int64_t first, int64_t count, int64_t step,
                        cudaStream_t stream);
int64_t cosine_tile_rows();

}  // namespace memkern::cuda
