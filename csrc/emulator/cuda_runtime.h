// The part of CUDA that memkern's kernels use, on the processor: one block after another, its threads as fibers that
// give way at barriers and shuffles. It finds wrong indices, missing barriers that every thread must reach, and wrong
// values; not races between threads that never wait for each other, nor what depends on the hardware's memory order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static  // blocks run one after another; those of a cluster may use dynamic shared memory alone
#define __restrict__ __restrict

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 8;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  std::memset(to, value, size);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** to, size_t size) {
  *to = static_cast<T*>(std::malloc(size));
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

namespace emulated {

// Where a fiber waits until `mask` says that all living threads of its block, or of its warp, are here.
void wait_for_block();
void wait_for_warp(unsigned int mask);
// What the lanes of a warp show each other: a slot for this lane, and that of another lane of the same round.
void* shown();
const void* shown_by(int lane);
void next_round();
// Runs body() as every thread of every block, `cluster` blocks at a time (these share what is __shared__ by name).
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body, int cluster = 1);
void* dynamic_shared();
void wait_for_cluster();
// The same place in the dynamic shared memory of another block of the cluster.
const void* of_peer(const void* own, int rank);

struct Launch {
  dim3 grid, block;
  size_t shared;
  Launch(dim3 grid_, dim3 block_, size_t shared_ = 0, cudaStream_t = nullptr)
      : grid(grid_), block(block_), shared(shared_) {}

  template <class Kernel, class... Args>
  void operator()(Kernel kernel, Args... args) const {
    run(grid, block, shared, [&] { kernel(args...); });
  }
};

inline int lane() { return int(threadIdx.x % 32); }

template <class T>
T exchange(unsigned int mask, T x, int from) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  std::memcpy(shown(), &x, sizeof(T));
  wait_for_warp(mask);
  std::memcpy(&x, shown_by(from), sizeof(T));
  next_round();
  return x;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait_for_block(); }
inline void __syncwarp(unsigned int mask = 0xffffffffu) { emulated::wait_for_warp(mask); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned int mask, T x, int other) {
  return emulated::exchange(mask, x, emulated::lane() ^ other);
}
template <class T>
T __shfl_sync(unsigned int mask, T x, int from) {
  return emulated::exchange(mask, x, from % 32);
}
template <class T>
T __shfl_up_sync(unsigned int mask, T x, unsigned int step) {
  const int from = emulated::lane() - int(step);
  return emulated::exchange(mask, x, from < 0 ? emulated::lane() : from);
}
template <class T>
T __shfl_down_sync(unsigned int mask, T x, unsigned int step) {
  const int from = emulated::lane() + int(step);
  return emulated::exchange(mask, x, from > 31 ? emulated::lane() : from);
}
inline unsigned int __ballot_sync(unsigned int mask, bool x) {
  const unsigned int bit = x ? 1u : 0u;
  std::memcpy(emulated::shown(), &bit, sizeof(bit));
  emulated::wait_for_warp(mask);
  unsigned int all = 0;
  for (int i = 0; i < 32; ++i) {
    unsigned int other;
    std::memcpy(&other, emulated::shown_by(i), sizeof(other));
    if (mask >> i & 1) all |= other << i;
  }
  emulated::next_round();
  return all;
}

template <class T, class U>
T atomicAdd(T* at, U x) {
  const T old = *at;
  *at = old + T(x);
  return old;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}

// As by nvcc, products and sums contract; not these.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
