// What the CUDA kernels share: element types, 16-byte packs, reductions in a fixed order, and the last block to arrive.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

// Runs the block with T one of float, __nv_bfloat16, __half; another dtype gives cudaErrorInvalidValue.
#define MK_DISPATCH_CUDA(dtype, T, ...)                                              \
  switch (dtype) {                                                                   \
    case ::memkern::DType::kF32: { using T = float; __VA_ARGS__; } break;            \
    case ::memkern::DType::kBF16: { using T = __nv_bfloat16; __VA_ARGS__; } break;   \
    case ::memkern::DType::kF16: { using T = __half; __VA_ARGS__; } break;           \
    default: return cudaErrorInvalidValue;                                           \
  }

namespace memkern::cuda {

constexpr int kWarp = 32;

// Written out, because torch's own flags for nvcc forbid the implicit conversions.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// N elements that move in one access; the address must be a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
// How many elements of T make 16 bytes.
template <class T>
constexpr int kPack = 16 / int(sizeof(T));

template <class T, int N>
__device__ __forceinline__ void load(const T* p, float (&x)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(pack.v[i]);
}
template <class T, int N>
__device__ __forceinline__ void store(T* p, const float (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = from_float<T>(x[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Over a whole warp; every lane gets the same bits.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
// The largest; NaN when there is one.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, step);
    x = (other > x || other != other) ? other : x;
  }
  return x;
}

// Over a one-dimensional block of whole warps; every thread gets the result. `scratch`: 32 floats of shared memory,
// which the next call may use again at once.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  return warp_max(lane < warps ? scratch[lane] : -INFINITY);
}

// True, for every thread of it, in exactly one of `arrivals` one-dimensional blocks: the last to come, which sees what
// the others stored before. It leaves the counter at zero for the next launch. What it reads it has to add in an order
// that no race decides.
__device__ __forceinline__ bool arrive_last(int32_t* ticket, int arrivals) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1) == arrivals - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Multiprocessors of the current device, asked once.
inline int sm_count() {
  static int counts[64] = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) return 132;
  if (counts[device] == 0) cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device);
  return counts[device];
}

}  // namespace memkern::cuda
