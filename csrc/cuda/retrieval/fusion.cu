// Fusion of gated sources: one block per row, whose gates every thread makes for itself.
#include "cuda/common.cuh"
#include "cuda/retrieval.h"

namespace memkern::cuda {

namespace {

constexpr int kThreads = 128;

// Softmax of one row over the present sources.
template <int N>
__device__ __forceinline__ void gates_of(const FuseSources& p, int64_t row, float (&gate)[N]) {
  const float* logits = p.gates + row * p.columns;
  float best = -INFINITY, mass = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    gate[i] = i < p.sources ? logits[p.column[i]] : -INFINITY;
    best = fmaxf(best, gate[i]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    gate[i] = i < p.sources ? expf(gate[i] - best) : 0.0f;
    mass += gate[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) gate[i] /= mass;
}

template <class T, int P, int N>
__global__ void __launch_bounds__(kThreads) forward(const FuseSources p) {
  const int64_t row = blockIdx.x;
  float gate[N];
  gates_of(p, row, gate);
  for (int64_t d = threadIdx.x * P; d < p.width; d += kThreads * P) {
    float sum[P];
#pragma unroll
    for (int j = 0; j < P; ++j) sum[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < p.sources) {
        float x[P];
        load(static_cast<const T*>(p.source[i]) + row * p.width + d, x);
#pragma unroll
        for (int j = 0; j < P; ++j) sum[j] = fmaf(gate[i], x[j], sum[j]);
      }
    }
    store(static_cast<T*>(p.out) + row * p.width + d, sum);
  }
}

template <class T, int P, int N>
__global__ void __launch_bounds__(kThreads) backward(const FuseSources p) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  float gate[N], slope[N];
  gates_of(p, row, gate);
#pragma unroll
  for (int i = 0; i < N; ++i) slope[i] = 0.0f;
  for (int64_t d = threadIdx.x * P; d < p.width; d += kThreads * P) {
    float grad[P];
    load(static_cast<const T*>(p.grad) + row * p.width + d, grad);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < p.sources) {
        float x[P], d_x[P];
        load(static_cast<const T*>(p.source[i]) + row * p.width + d, x);
#pragma unroll
        for (int j = 0; j < P; ++j) {
          slope[i] = fmaf(grad[j], x[j], slope[i]);
          d_x[j] = gate[i] * grad[j];
        }
        store(static_cast<T*>(p.d_source[i]) + row * p.width + d, d_x);
      }
    }
  }
  float mean = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < p.sources) slope[i] = block_sum(slope[i], scratch);
    mean = fmaf(gate[i], slope[i], mean);
  }
  if (threadIdx.x != 0) return;
  float* d_gates = p.d_gates + row * p.columns;
  for (int c = 0; c < p.columns; ++c) d_gates[c] = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < p.sources) d_gates[p.column[i]] = gate[i] * (slope[i] - mean);
  }
}

template <class T>
bool wide(const FuseSources& p) {
  auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  bool all = p.width % kPack<T> == 0 && aligned(p.out) && aligned(p.grad);
  for (int i = 0; i < p.sources; ++i) all = all && aligned(p.source[i]) && aligned(p.d_source[i]);
  return all;
}

template <bool Forward, class T, int P, int N>
cudaError_t launch(const FuseSources& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned int>(p.rows);
  if constexpr (Forward) {
    forward<T, P, N><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    backward<T, P, N><<<blocks, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

template <bool Forward, class T, int P>
cudaError_t by_count(const FuseSources& p, cudaStream_t stream) {
  if (p.sources <= 2) return launch<Forward, T, P, 2>(p, stream);
  if (p.sources <= 4) return launch<Forward, T, P, 4>(p, stream);
  // Half the pack: all sources are in flight at once.
  return launch<Forward, T, (P > 1 ? P / 2 : 1), kMaxSources>(p, stream);
}

template <bool Forward>
cudaError_t run(const FuseSources& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  MK_DISPATCH_CUDA(p.dtype, T, {
    return wide<T>(p) ? by_count<Forward, T, kPack<T>>(p, stream) : by_count<Forward, T, 1>(p, stream);
  })
  return cudaSuccess;
}

}  // namespace

cudaError_t fuse_fwd(const FuseSources& p, cudaStream_t stream) { return run<true>(p, stream); }
cudaError_t fuse_bwd(const FuseSources& p, cudaStream_t stream) { return run<false>(p, stream); }

}  // namespace memkern::cuda
