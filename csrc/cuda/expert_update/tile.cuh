// A 64 x 64 tile of a matrix product by one block of four warps: mma.sync for bfloat16 and float16, FMA for float.
//
// Factors pass through shared memory in stages of 32 along the sum. A factor is stored as it lies in memory: with the sum
// along its rows ("deep": 64 rows of 32) or across them (32 rows of 64).
#pragma once

#include <mma.h>

#include "cuda/common.cuh"

namespace memkern::cuda {

constexpr int kTile = 64, kDepth = 32, kStages = 3, kThreads = 128;
// Rows are padded by 16 bytes or more against bank conflicts; fragments need multiples of 32 bytes between 16 rows.
constexpr int kDeepRow = kDepth + 8, kFlatRow = kTile + 8;
constexpr int kFactor = kTile * kDeepRow > kDepth * kFlatRow ? kTile * kDeepRow : kDepth * kFlatRow;
// Floats in a row of a finished tile in shared memory.
constexpr int kOutRow = kTile + 4;

// Copies V elements to shared memory, zeros where the source is null; V T's are 16 bytes, or V is 1.
template <class T, int V>
__device__ __forceinline__ void copy_in(T* to, const T* from) {
  if constexpr (V == 1) {
    *to = from ? *from : from_float<T>(0.0f);
  } else {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const int bytes = from ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from ? from : (const T*)nullptr),
                 "r"(bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_oldest() { asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory"); }
__device__ __forceinline__ void wait_for_all() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// One stage of a factor: `row(i)` gives the start of row i or null, of which columns [first, limit) are taken.
template <class T, int V, bool Deep, class Row>
__device__ __forceinline__ void stage_factor(T* to, const Row& row, int first, int limit) {
  constexpr int kRows = Deep ? kTile : kDepth, kColumns = Deep ? kDepth : kTile, kStride = Deep ? kDeepRow : kFlatRow;
#pragma unroll 2
  for (int i = threadIdx.x; i < kRows * kColumns / V; i += kThreads) {
    const int r = i / (kColumns / V), c = i % (kColumns / V) * V;
    const T* source = row(r);
    copy_in<T, V>(to + r * kStride + c, source && first + c < limit ? source + first + c : nullptr);
  }
}

// The accumulators of a tile. add() takes one stage of both factors; store() leaves rows of kOutRow floats.
template <class T, bool DeepA, bool DeepB>
struct Accumulator {
  using LayoutA = typename std::conditional<DeepA, nvcuda::wmma::row_major, nvcuda::wmma::col_major>::type;
  using LayoutB = typename std::conditional<DeepB, nvcuda::wmma::col_major, nvcuda::wmma::row_major>::type;
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum[2][2];

  __device__ __forceinline__ Accumulator() {
#pragma unroll
    for (int i = 0; i < 4; ++i) nvcuda::wmma::fill_fragment(sum[i / 2][i % 2], 0.0f);
  }
  __device__ __forceinline__ void add(const T* a, const T* b) {
    const int warp = threadIdx.x / kWarp, row0 = warp / 2 * 32, column0 = warp % 2 * 32;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, T, LayoutA> x[2];
      nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, LayoutB> y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = row0 + 16 * i, n = column0 + 16 * i;
        nvcuda::wmma::load_matrix_sync(x[i], DeepA ? a + m * kDeepRow + k : a + k * kFlatRow + m,
                                       DeepA ? kDeepRow : kFlatRow);
        nvcuda::wmma::load_matrix_sync(y[i], DeepB ? b + n * kDeepRow + k : b + k * kFlatRow + n,
                                       DeepB ? kDeepRow : kFlatRow);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) nvcuda::wmma::mma_sync(sum[i / 2][i % 2], x[i / 2], y[i % 2], sum[i / 2][i % 2]);
    }
  }
  __device__ __forceinline__ void store(float* out) const {
    const int warp = threadIdx.x / kWarp, row0 = warp / 2 * 32, column0 = warp % 2 * 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      nvcuda::wmma::store_matrix_sync(out + (row0 + 16 * (i / 2)) * kOutRow + column0 + 16 * (i % 2),
                                      sum[i / 2][i % 2], kOutRow, nvcuda::wmma::mem_row_major);
    }
  }
};

template <bool DeepA, bool DeepB>
struct Accumulator<float, DeepA, DeepB> {
  static constexpr int kRows = 8, kColumns = 4;
  float sum[kRows][kColumns];

  __device__ __forceinline__ Accumulator() {
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) sum[i / kColumns][i % kColumns] = 0.0f;
  }
  // Columns of a thread lie 16 apart and rows 8 apart, so that neighbours read neighbouring words.
  __device__ __forceinline__ void add(const float* a, const float* b) {
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      float x[kRows], y[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) x[i] = DeepA ? a[(row + 8 * i) * kDeepRow + k] : a[k * kFlatRow + row + 8 * i];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        y[j] = DeepB ? b[(column + 16 * j) * kDeepRow + k] : b[k * kFlatRow + column + 16 * j];
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
      }
    }
  }
  __device__ __forceinline__ void store(float* out) const {
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) out[(row + 8 * i) * kOutRow + column + 16 * j] = sum[i][j];
    }
  }
};

// Runs `steps` stages: stage(step, buffer) copies in what step needs, add(buffer) multiplies it. Afterwards shared
// memory is free.
template <class Stage, class Add>
__device__ __forceinline__ void pipeline(int steps, const Stage& stage, const Add& add) {
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) stage(s, s);
    commit();
  }
  for (int step = 0; step < steps; ++step) {
    wait_for_oldest();
    __syncthreads();
    add(step % kStages);
    const int next = step + kStages - 1;
    if (next < steps) stage(next, next % kStages);
    commit();
  }
  wait_for_all();
  __syncthreads();
}

// Bytes of dynamic shared memory for `factors` factors per stage and `tiles` finished tiles in their place.
template <class T>
constexpr size_t tile_memory(int factors, int tiles) {
  const size_t staged = sizeof(T) * kFactor * kStages * factors, finished = sizeof(float) * kTile * kOutRow * tiles;
  return staged > finished ? staged : finished;
}

// Allows a kernel more than 48 KiB of shared memory, and launches it.
template <class... Params, class... Args>
cudaError_t launch_tiles(void (*kernel)(Params...), dim3 grid, size_t memory, cudaStream_t stream, Args... args) {
  if (memory > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, kThreads, memory, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace memkern::cuda
