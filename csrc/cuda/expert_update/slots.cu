// Weighted sums of experts, means of the rows with a slot's id, and rows replaced by slots. Each result has one owner,
// which adds in a fixed order.
#include "cuda/expert_update.h"

#include "cuda/common.cuh"

namespace memkern::cuda {

namespace {

constexpr int kBlock = 256;

template <class T>
__global__ void aggregate_kernel(const ExpertAggregate p) {
  const int64_t row = blockIdx.x, b = row / p.S, s = row % p.S;
  const T* states = static_cast<const T*>(p.states);
  for (int64_t d = threadIdx.x; d < p.D; d += blockDim.x) {
    float sum = 0.0f;
    for (int64_t k = 0; k < p.K; ++k) {
      sum = fmaf(p.probs[b * p.K + k], to_float(states[((b * p.K + k) * p.S + s) * p.D + d]), sum);
    }
    static_cast<T*>(p.out)[row * p.D + d] = from_float<T>(sum);
  }
}

template <class T>
__global__ void aggregate_backward_kernel(const ExpertAggregate p) {
  __shared__ float scratch[kWarp];
  const int64_t pair = blockIdx.x, b = pair / p.K, size = p.S * p.D;
  const T* grad = static_cast<const T*>(p.grad) + b * size;
  const T* states = static_cast<const T*>(p.states) + pair * size;
  T* d_states = static_cast<T*>(p.d_states);
  const float prob = p.probs[pair];
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const float x = to_float(grad[i]);
    if (p.d_probs) total = fmaf(x, to_float(states[i]), total);
    if (d_states) d_states[pair * size + i] = from_float<T>(prob * x);
  }
  total = block_sum(total, scratch);
  if (p.d_probs && threadIdx.x == 0) p.d_probs[pair] = total;
}

// The first slot with this id, or -1.
__device__ __forceinline__ int64_t slot_of(const ExpertSlots& p, int64_t id) {
  for (int64_t s = 0; s < p.S; ++s) {
    if (p.slot_ids[s] == id) return s;
  }
  return -1;
}

// One block per (b, s). Means in T, or, for the gradient, sums in float that belong to the first of equal slots.
template <class T, class Out, bool Mean>
__global__ void slot_sums_kernel(const ExpertSlots p) {
  const int64_t pair = blockIdx.x, b = pair / p.S, slot = pair % p.S, id = p.slot_ids[slot];
  const int64_t* ids = p.input_ids + b * p.N;
  const T* sequence = static_cast<const T*>(p.sequence) + b * p.N * p.D;
  const bool counts = Mean || slot_of(p, id) == slot;
  for (int64_t d = threadIdx.x; d < p.D; d += blockDim.x) {
    float sum = 0.0f;
    int64_t count = 0;
    for (int64_t t = 0; counts && t < p.N; ++t) {
      if (ids[t] != id) continue;
      ++count;
      sum += to_float(sequence[t * p.D + d]);
    }
    if (Mean && count > 1) sum /= float(count);
    static_cast<Out*>(p.out_slots)[pair * p.D + d] = from_float<Out>(sum);
  }
}

// One block per (b, t).
template <class T>
__global__ void gather_backward_kernel(const ExpertSlots p) {
  const int64_t row = blockIdx.x, b = row / p.N, id = p.input_ids[row];
  const T* grad = static_cast<const T*>(p.slots) + b * p.S * p.D;
  const int64_t first = slot_of(p, id);
  float share = 0.0f;
  if (first >= 0) {
    int64_t count = 0;
    for (int64_t t = 0; t < p.N; ++t) count += p.input_ids[b * p.N + t] == id;
    share = float(count);
  }
  for (int64_t d = threadIdx.x; d < p.D; d += blockDim.x) {
    float sum = 0.0f;
    for (int64_t s = first; first >= 0 && s < p.S; ++s) {
      if (p.slot_ids[s] == id) sum += to_float(grad[s * p.D + d]) / share;
    }
    static_cast<T*>(p.out_sequence)[row * p.D + d] = from_float<T>(sum);
  }
}

// One block per (b, t): the sequence's row, or the slot's that replaces it; zero in its place without slots.
template <class T>
__global__ void splice_kernel(const ExpertSlots p) {
  const int64_t row = blockIdx.x, b = row / p.N, s = slot_of(p, p.input_ids[row]);
  const T* from = s < 0 ? static_cast<const T*>(p.sequence) + row * p.D
                        : static_cast<const T*>(p.slots) + (p.slots ? (b * p.S + s) * p.D : 0);
  for (int64_t d = threadIdx.x; d < p.D; d += blockDim.x) {
    static_cast<T*>(p.out_sequence)[row * p.D + d] = s >= 0 && !p.slots ? from_float<T>(0.0f) : from[d];
  }
}

}  // namespace

cudaError_t aggregate_experts_forward(const ExpertAggregate& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, { aggregate_kernel<T><<<unsigned(p.B * p.S), kBlock, 0, stream>>>(p); })
  return cudaGetLastError();
}

cudaError_t aggregate_experts_backward(const ExpertAggregate& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, { aggregate_backward_kernel<T><<<unsigned(p.B * p.K), kBlock, 0, stream>>>(p); })
  return cudaGetLastError();
}

cudaError_t gather_slots_forward(const ExpertSlots& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, { slot_sums_kernel<T, T, true><<<unsigned(p.B * p.S), kBlock, 0, stream>>>(p); })
  return cudaGetLastError();
}

cudaError_t gather_slots_backward(const ExpertSlots& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, { gather_backward_kernel<T><<<unsigned(p.B * p.N), kBlock, 0, stream>>>(p); })
  return cudaGetLastError();
}

cudaError_t scatter_slots_forward(const ExpertSlots& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, { splice_kernel<T><<<unsigned(p.B * p.N), kBlock, 0, stream>>>(p); })
  return cudaGetLastError();
}

cudaError_t scatter_slots_backward(const ExpertSlots& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, {
    if (p.out_sequence && p.B * p.N * p.D) splice_kernel<T><<<unsigned(p.B * p.N), kBlock, 0, stream>>>(p);
    if (p.out_slots && p.B * p.S * p.D) {
      slot_sums_kernel<T, float, false><<<unsigned(p.B * p.S), kBlock, 0, stream>>>(p);
    }
  })
  return cudaGetLastError();
}

}  // namespace memkern::cuda
