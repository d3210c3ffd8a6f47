// Products between rows of a memory and a few vectors, by one block over a range of rows. What a block reads twice is
// still in its first cache: a range is about 16 KB.
#pragma once

#include "cuda/memory/slots.cuh"

namespace memkern::cuda::slots {

// Rows that a block takes; of the shape alone, so that a result does not depend on the device or the batch.
inline int rows_per_part(int64_t width) {
  const int64_t rows = 4096 / (width > 0 ? width : 1);
  return int(rows < 8 ? 8 : rows > 64 ? 64 : rows);
}
inline int parts_of(int64_t slots, int64_t width) {
  const int rows = rows_per_part(width);
  return int((slots + rows - 1) / rows);
}

// The range of one block.
struct Range {
  int begin, end;
};

// emit(row, c, <row, x_c>, |row|^2) on lane 0 for every row of the range and c < count. Every row goes through the same
// instructions wherever it lies: equal rows give equal bits, and ties stay ties.
template <class Emit>
__device__ __forceinline__ void row_dots(const float* rows, Range range, int width, const float* x, int count,
                                         const Emit& emit) {
  constexpr int C = 4;
  const int lane = threadIdx.x % kWarp;
  for (int i = range.begin + int(threadIdx.x) / kWarp; i < range.end; i += kWarps) {
    const float* row = rows + int64_t(i) * width;
    float square = 0.0f;
    for (int c = 0; c < count; c += C) {
      const int left = min(C, count - c);
      float sums[C] = {};
      for (int k = lane; k < width; k += kWarp) {
        const float m = row[k];
        if (c == 0) square = fmaf(m, m, square);
#pragma unroll
        for (int q = 0; q < C; ++q) {
          if (q < left) sums[q] = fmaf(m, x[int64_t(c + q) * width + k], sums[q]);
        }
      }
      if (c == 0) square = warp_sum(square);
#pragma unroll
      for (int q = 0; q < C; ++q) {
        if (q >= left) break;
        const float sum = warp_sum(sums[q]);
        if (lane == 0) emit(i, c + q, sum, square);
      }
    }
  }
}

// Shared memory of column_sums(), which the next call may use at once.
struct Columns {
  float sums[kWarps][4][kWarp];
};

// put(c, k, sum over the range of term(i, c, k)) for every column k and c < count; each is called by one thread.
template <class Term, class Put>
__device__ __forceinline__ void column_sums(Range range, int width, int count, Columns& shared, const Term& term,
                                            const Put& put) {
  constexpr int C = 4;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int c = 0; c < count; c += C) {
    const int left = min(C, count - c);
    for (int first = 0; first < width; first += kWarp) {
      const int k = first + lane;
      float sums[C] = {};
      if (k < width) {
#pragma unroll 2
        for (int i = range.begin + warp; i < range.end; i += kWarps) {
#pragma unroll
          for (int q = 0; q < C; ++q) {
            if (q < left) sums[q] += term(i, c + q, k);
          }
        }
      }
      __syncthreads();
#pragma unroll
      for (int q = 0; q < C; ++q) shared.sums[warp][q][lane] = sums[q];
      __syncthreads();
      if (warp < left && k < width) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][warp][lane];
        put(c + warp, k, sum);
      }
    }
  }
}

// body(i, k) for every element of the range's rows, neighbours in a row on neighbouring threads.
template <class Body>
__device__ __forceinline__ void each_element(Range range, int width, const Body& body) {
  for (int i = range.begin + int(threadIdx.x) / kWarp; i < range.end; i += kWarps) {
    for (int k = threadIdx.x % kWarp; k < width; k += kWarp) body(i, k);
  }
}

// An element of prod_h (1 - w_h e_h) m + sum_h w_h v_h; `write` is (heads, n), `erase` and `vectors` (heads, width).
__device__ __forceinline__ float written(float m, const float* write, const float* erase, const float* vectors,
                                         int heads, int n, int width, int i, int k) {
  float added = 0.0f;
  for (int h = 0; h < heads; ++h) {
    const float w = write[int64_t(h) * n + i];
    m *= 1.0f - w * erase[int64_t(h) * width + k];
    added = fmaf(w, vectors[int64_t(h) * width + k], added);
  }
  return m + added;
}

// m without the erasures of head h (all of them for -1).
__device__ __forceinline__ float erased(float m, const float* write, const float* erase, int heads, int n, int width,
                                        int i, int k, int h) {
  for (int g = 0; g < heads; ++g) {
    if (g != h) m *= 1.0f - erase[int64_t(g) * width + k] * write[int64_t(g) * n + i];
  }
  return m;
}

}  // namespace memkern::cuda::slots
