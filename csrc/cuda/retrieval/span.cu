// The document-level span loss: a warp per segment and side, a warp per document, a sum in the order of documents.
#include "cuda/common.cuh"
#include "cuda/retrieval.h"

namespace memkern::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

// A sum of exponentials that is not finished: maximum, and sum of exp(x - maximum).
struct Mass {
  float best = -INFINITY, mass = 0.0f;

  __device__ __forceinline__ void add(float x) {
    const float higher = fmaxf(best, x), base = higher == -INFINITY ? 0.0f : higher;
    mass = mass * expf(best - base) + expf(x - base);
    best = higher;
  }
  // Logarithm of the sum over the warp, -inf for nothing; every lane gets it.
  __device__ __forceinline__ float log_over_warp() const {
    float highest = best;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
    }
    const float base = highest == -INFINITY ? 0.0f : highest, all = warp_sum(mass * expf(best - base));
    return all == 0.0f ? -INFINITY : base + logf(all);
  }
};

__global__ void __launch_bounds__(kThreads) segments(const SpanLoss p) {
  const int64_t s = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int side = blockIdx.y, lane = threadIdx.x % kWarp;
  if (s >= p.segments) return;
  const float* logits = p.logits[side] + s * p.tokens;
  const bool *positive = p.positive[side] + s * p.tokens, *valid = p.valid + s * p.tokens;
  Mass all, right;
  for (int64_t t = lane; t < p.tokens; t += kWarp) {
    if (!valid[t]) continue;
    const float x = logits[t];
    all.add(x);
    if (positive[t]) right.add(x);
  }
  __syncwarp();
  const float log_all = all.log_over_warp(), log_right = right.log_over_warp();
  if (lane == 0) {
    p.partial[2 * side * p.segments + s] = log_all;
    p.partial[(2 * side + 1) * p.segments + s] = log_right;
  }
}

__global__ void __launch_bounds__(kThreads) documents(const SpanLoss p) {
  __shared__ float losses[kWarps], counts[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t d = int64_t(blockIdx.x) * kWarps + warp;
  float loss = 0.0f, counted = 0.0f;
  if (d < p.segments) {
    Mass mass[4];
    for (int64_t s = lane; s < p.segments; s += kWarp) {
      if (p.document[s] != d) continue;
#pragma unroll
      for (int side = 0; side < 4; ++side) mass[side].add(p.partial[side * p.segments + s]);
    }
    __syncwarp();
    float log_mass[4];
#pragma unroll
    for (int side = 0; side < 4; ++side) log_mass[side] = mass[side].log_over_warp();
    const bool in_loss = log_mass[1] != -INFINITY && log_mass[3] != -INFINITY;
    if (in_loss) {
      loss = 0.5f * ((log_mass[0] - log_mass[1]) + (log_mass[2] - log_mass[3]));
      counted = 1.0f;
    }
    if (lane == 0) {
#pragma unroll
      for (int side = 0; side < 4; ++side) p.stats[side * p.segments + d] = in_loss ? log_mass[side] : INFINITY;
    }
  }
  if (lane == 0) {
    losses[warp] = loss;
    counts[warp] = counted;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f, number = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      total += losses[w];
      number += counts[w];
    }
    p.sums[2 * blockIdx.x] = total;
    p.sums[2 * blockIdx.x + 1] = number;
  }
  if (!arrive_last(p.ticket, gridDim.x) || threadIdx.x != 0) return;
  float total = 0.0f, number = 0.0f;
  for (unsigned int b = 0; b < gridDim.x; ++b) {
    total += __ldcg(p.sums + 2 * b);
    number += __ldcg(p.sums + 2 * b + 1);
  }
  *p.loss = total / fmaxf(number, 1.0f);
}

__global__ void __launch_bounds__(kThreads) backward(const SpanLoss p) {
  __shared__ float scratch[32];
  float counted = 0.0f;
  for (int64_t d = threadIdx.x; d < p.segments; d += kThreads) counted += p.stats[d] != INFINITY ? 1.0f : 0.0f;
  const float factor = 0.5f * *p.grad / fmaxf(block_sum(counted, scratch), 1.0f);
  const int64_t s = blockIdx.x, d = p.document[s];
  const int side = blockIdx.y;
  const bool known = d >= 0 && d < p.segments;
  const float norm = known ? p.stats[2 * side * p.segments + d] : INFINITY;
  const float right_norm = known ? p.stats[(2 * side + 1) * p.segments + d] : INFINITY;
  const float* logits = p.logits[side] + s * p.tokens;
  const bool *positive = p.positive[side] + s * p.tokens, *valid = p.valid + s * p.tokens;
  float* out = p.d_logits[side] + s * p.tokens;
  for (int64_t t = threadIdx.x; t < p.tokens; t += kThreads) {
    float slope = 0.0f;
    if (norm != INFINITY && valid[t]) {
      const float x = logits[t];
      slope = factor * (expf(x - norm) - (positive[t] ? expf(x - right_norm) : 0.0f));
    }
    out[t] = slope;
  }
}

}  // namespace

int64_t span_blocks(int64_t segments_) { return (segments_ + kWarps - 1) / kWarps; }

cudaError_t span_fwd(const SpanLoss& p, cudaStream_t stream) {
  if (p.segments == 0) return cudaMemsetAsync(p.loss, 0, sizeof(float), stream);
  const auto blocks = static_cast<unsigned int>(span_blocks(p.segments));
  segments<<<dim3(blocks, 2), kThreads, 0, stream>>>(p);
  documents<<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t span_bwd(const SpanLoss& p, cudaStream_t stream) {
  if (p.segments == 0 || p.tokens == 0) return cudaSuccess;
  backward<<<dim3(static_cast<unsigned int>(p.segments), 2), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace memkern::cuda
