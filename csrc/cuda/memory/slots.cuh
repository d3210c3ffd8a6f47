// What one block does on vectors over the slots of a batch item: softmax, the order of allocation, sharpening.
//
// The vectors lie in global memory, so that any number of slots works. A thread owns the slots threadIdx.x,
// threadIdx.x + kThreads, ... in every loop: passes that stay with a slot need no barrier between them.
#pragma once

#include <cfloat>

#include "cuda/common.cuh"

namespace memkern::cuda::slots {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr float kNormEps = 1e-12f, kUsageEps = 1e-6f, kKept = float(1.0 - 1e-6);

#define MK_FOR_SLOTS(i, n) for (int i = threadIdx.x; i < (n); i += ::memkern::cuda::slots::kThreads)

// Shared memory of the reductions and scans of a block; each call may follow the last at once.
struct Shared {
  float sums[kWarp];
  float2 scan[kWarps];
};

__device__ __forceinline__ float inverse_norm(float square) { return 1.0f / sqrtf(square + kNormEps); }

__device__ __forceinline__ float dot(const float* a, const float* b, int n, Shared& shared) {
  float sum = 0.0f;
  MK_FOR_SLOTS(i, n) sum = fmaf(a[i], b[i], sum);
  return block_sum(sum, shared.sums);
}

__device__ __forceinline__ float square_sum(const float* x, int n, Shared& shared) { return dot(x, x, n, shared); }

// exp(factor x - max) / sum over the slots with a true mask (all without one), in place; nothing at all gives zeros.
__device__ __forceinline__ void softmax(float* x, int n, float factor, const uint8_t* mask, Shared& shared) {
  float best = -INFINITY, seen = 0.0f;
  MK_FOR_SLOTS(i, n) {
    const bool visible = mask == nullptr || mask[i];
    const float logit = visible ? x[i] * factor : -INFINITY;
    seen += visible ? 1.0f : 0.0f;
    best = (logit > best || logit != logit) ? logit : best;
    x[i] = logit;
  }
  if (mask != nullptr && block_sum(seen, shared.sums) == 0.0f) {
    MK_FOR_SLOTS(i, n) x[i] = 0.0f;
    return;
  }
  const float top = block_max(best, shared.sums);
  float sum = 0.0f;
  MK_FOR_SLOTS(i, n) {
    const float e = expf(x[i] - top);
    x[i] = e;
    sum += e;
  }
  const float scale = 1.0f / block_sum(sum, shared.sums);
  MK_FOR_SLOTS(i, n) x[i] *= scale;
}

// Backward of the lookup of one head. On entry `grad` is the gradient of the weights, and `dots` and `norms` are
// those of the rows as the lookup saw them, <key, row> and |row|^2. `grad` becomes the factor of the key in the
// gradient of each row, and of each row in the gradient of the key; own[i] grows by what the row gets along itself,
// negated. Returns the gradient of the strength.
__device__ __forceinline__ float content_backward(float* grad, const float* weights, const float* dots,
                                                  const float* norms, int n, float key_square, float strength,
                                                  float* own, Shared& shared) {
  const float key_inverse = inverse_norm(key_square);
  const float mean = dot(grad, weights, n, shared);
  // Gradients of scores sum to zero: measured from the mean cosine they cancel less.
  float weighted = 0.0f;
  MK_FOR_SLOTS(i, n) weighted = fmaf(weights[i], dots[i] * inverse_norm(norms[i]), weighted);
  const float middle = block_sum(weighted, shared.sums) * key_inverse;
  float d_strength = 0.0f;
  MK_FOR_SLOTS(i, n) {
    const float inverse = inverse_norm(norms[i]), cosine = dots[i] * inverse * key_inverse;
    const float d_score = weights[i] * (grad[i] - mean);
    d_strength = fmaf(d_score, cosine - middle, d_strength);
    const float d_cosine = d_score * strength;
    own[i] = fmaf(d_cosine * cosine, inverse * inverse, own[i]);
    grad[i] = d_cosine * inverse * key_inverse;
  }
  return block_sum(d_strength, shared.sums);
}

// Takes out of a key's gradient the part along the key, which its norm cancels. The part is measured on the sum
// itself, so that what cancels exactly in theory does so here up to the sum's own rounding.
__device__ __forceinline__ void project_key(float* d_key, const float* key, int width, Shared& shared) {
  const float inverse = inverse_norm(square_sum(key, width, shared));
  const float share = -dot(d_key, key, width, shared) * inverse * inverse;
  MK_FOR_SLOTS(k, width) d_key[k] = fmaf(key[k], share, d_key[k]);
}

// 1 - prod_h (1 - w_h) at slot i of (heads, n) weights.
__device__ __forceinline__ float written_at(const float* write, int heads, int n, int i) {
  float total = write[i];
  for (int h = 1; h < heads; ++h) total = fmaf(write[int64_t(h) * n + i], 1.0f - total, total);
  return total;
}

// prod_r (1 - f_r w_r).
__device__ __forceinline__ float retention_at(const float* read, const float* free_gates, int heads, int n, int i) {
  float total = 1.0f - read[i] * free_gates[0];
  for (int r = 1; r < heads; ++r) total *= 1.0f - read[int64_t(r) * n + i] * free_gates[r];
  return total;
}

// Into [0, 1]; a NaN stays.
__device__ __forceinline__ float clamp_unit(float x) { return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x; }

__device__ __forceinline__ float used(float usage, float written, float retention) {
  return clamp_unit(fmaf(written, 1.0f - usage, usage) * retention);
}

// Gradient of used(): d_usage becomes that of the old usage (in place), d_retention grows, and so does d_write unless
// it is null, by each head's share.
__device__ __forceinline__ void usage_backward(float* d_usage, const float* usage, const float* write, int heads,
                                               const float* retention, int n, float* d_retention, float* d_write) {
  MK_FOR_SLOTS(i, n) {
    const float u = usage[i], w = written_at(write, heads, n, i), psi = retention[i];
    const float filled = fmaf(w, 1.0f - u, u), raw = filled * psi;
    const float grad = raw >= 0.0f && raw <= 1.0f ? d_usage[i] : 0.0f;
    d_retention[i] = fmaf(grad, filled, d_retention[i]);
    const float d_filled = grad * psi;
    d_usage[i] = d_filled * (1.0f - w);
    if (d_write == nullptr) continue;
    for (int h = 0; h < heads; ++h) {
      float others = d_filled * (1.0f - u);
      for (int g = 0; g < heads; ++g) {
        if (g != h) others *= 1.0f - write[int64_t(g) * n + i];
      }
      d_write[int64_t(h) * n + i] += others;
    }
  }
}

// Gradient of retention_at(): d_read grows; d_free[r] is set, unless it is null.
__device__ __forceinline__ void retention_backward(const float* d_retention, const float* read, const float* free_gates,
                                                   int heads, int n, float* d_read, float* d_free, Shared& shared) {
  for (int r = 0; r < heads; ++r) {
    float sum = 0.0f;
    MK_FOR_SLOTS(i, n) {
      float grad = d_retention[i];
      for (int q = 0; q < heads; ++q) {
        if (q != r) grad *= 1.0f - read[int64_t(q) * n + i] * free_gates[q];
      }
      sum = fmaf(grad, read[int64_t(r) * n + i], sum);
      d_read[int64_t(r) * n + i] -= grad * free_gates[r];
    }
    const float total = block_sum(sum, shared.sums);
    if (threadIdx.x == 0 && d_free != nullptr) d_free[r] = -total;
  }
}

// x -> a x + b.
__device__ __forceinline__ float2 then(float2 first, float2 second) {
  return make_float2(first.x * second.x, fmaf(second.x, first.y, second.y));
}

// What the maps of all threads before this one compose to, theirs first.
__device__ __forceinline__ float2 before_thread(float2 mine, Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float2 all = mine;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float a = __shfl_up_sync(0xffffffffu, all.x, step), b = __shfl_up_sync(0xffffffffu, all.y, step);
    if (lane >= step) all = then(make_float2(a, b), all);
  }
  __syncthreads();
  if (lane == kWarp - 1) shared.scan[warp] = all;
  __syncthreads();
  float2 start = make_float2(1.0f, 0.0f);
  for (int w = 0; w < warp; ++w) start = then(start, shared.scan[w]);
  const float2 last = make_float2(__shfl_up_sync(0xffffffffu, all.x, 1), __shfl_up_sync(0xffffffffu, all.y, 1));
  return lane == 0 ? start : then(start, last);
}

// The order in which allocation fills the slots: by usage and then by index, NaN behind everything. A slot's rank is
// the number of slots before it; past kRanked slots, where n^2 comparisons lose, a bitonic sort.
constexpr int kRanked = 1024;

// Elements of the sort's memory, in 8 bytes each.
inline int64_t sort_size(int64_t n) {
  int64_t size = 1;
  while (size < n) size *= 2;
  return n > kRanked ? size : 0;
}

// Integers in the order of the floats.
__device__ __forceinline__ uint32_t ordered(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Order {
  float* keys;       // (N) usage as it enters the products
  int32_t* slots;    // (N) in order
  float* before;     // (N) by slot: the product of all keys before it
  uint64_t* sorted;  // (sort_size)
};

// Two roundings, as everywhere: fused, near ties would fall differently.
__device__ __forceinline__ float key_of(float usage) { return __fadd_rn(__fmul_rn(usage, kKept), kUsageEps); }

__device__ __forceinline__ void rank(const Order& order, int n, uint32_t* held) {
  __syncthreads();
  MK_FOR_SLOTS(i, n) held[i] = ordered(order.keys[i]);
  __syncthreads();
  MK_FOR_SLOTS(i, n) {
    const uint32_t own = held[i];
    int place = 0;
#pragma unroll 4
    for (int j = 0; j < i; ++j) place += held[j] <= own;
#pragma unroll 4
    for (int j = i + 1; j < n; ++j) place += held[j] < own;
    order.slots[place] = i;
  }
  __syncthreads();
}

__device__ __forceinline__ void sort(const Order& order, int n) {
  int size = 1;
  while (size < n) size *= 2;
  MK_FOR_SLOTS(i, size) {
    order.sorted[i] = i < n ? uint64_t(ordered(order.keys[i])) << 32 | uint32_t(i) : ~uint64_t(0);
  }
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      MK_FOR_SLOTS(i, size) {
        const int other = i ^ step;
        if (other < i) continue;
        const uint64_t a = order.sorted[i], b = order.sorted[other];
        if ((a > b) == ((i & run) == 0)) {
          order.sorted[i] = b;
          order.sorted[other] = a;
        }
      }
    }
  }
  __syncthreads();
  MK_FOR_SLOTS(i, n) order.slots[i] = int32_t(uint32_t(order.sorted[i]));
  __syncthreads();
}

// Fills the order of these usages and the products of all earlier ones. `held`: n elements of shared memory, at most
// kRanked.
__device__ __forceinline__ void fill(const Order& order, const float* usage, int n, uint32_t* held, Shared& shared) {
  MK_FOR_SLOTS(i, n) order.keys[i] = key_of(usage[i]);
  if (n > kRanked) {
    sort(order, n);
  } else {
    rank(order, n, held);
  }
  const int each = (n + kThreads - 1) / kThreads;
  const int begin = min(int(threadIdx.x) * each, n), end = min(begin + each, n);
  float mine = 1.0f;
  for (int k = begin; k < end; ++k) mine *= order.keys[order.slots[k]];
  float product = before_thread(make_float2(mine, 0.0f), shared).x;
  for (int k = begin; k < end; ++k) {
    const int i = order.slots[k];
    // Subnormal products mean nothing.
    order.before[i] = product < FLT_MIN ? 0.0f : product;
    product *= order.keys[i];
  }
  __syncthreads();
}

__device__ __forceinline__ float allocation_at(const Order& order, float usage, int i) {
  return (1.0f - usage) * kKept * order.before[i];
}

// d_usage grows by the gradient of the allocation; the order is that of the same usage.
__device__ __forceinline__ void allocate_backward(const Order& order, const float* usage, const float* grad, int n,
                                                  float* d_usage, Shared& shared) {
  // What later slots make of a factor that a slot puts into their product: from the last slot to the first, so the last
  // ones are those of the first thread. No division anywhere.
  const int each = (n + kThreads - 1) / kThreads;
  const int end = max(n - int(threadIdx.x) * each, 0), begin = max(end - each, 0);
  __syncthreads();
  float2 mine = make_float2(1.0f, 0.0f);
  for (int k = end - 1; k >= begin; --k) {
    const int i = order.slots[k];
    mine = then(mine, make_float2(order.keys[i], grad[i] * kKept * (1.0f - usage[i])));
  }
  float later = before_thread(mine, shared).y;
  for (int k = end - 1; k >= begin; --k) {
    const int i = order.slots[k];
    d_usage[i] += kKept * order.before[i] * (later - grad[i]);
    later = fmaf(order.keys[i], later, grad[i] * kKept * (1.0f - usage[i]));
  }
  __syncthreads();
}

// w^gamma / sum w^gamma; weights below the smallest normal number count as zero. `out` may not be `weights`.
__device__ __forceinline__ void sharpen(const float* weights, float gamma, int n, float* out, Shared& shared) {
  float best = -INFINITY;
  MK_FOR_SLOTS(i, n) {
    const float w = weights[i];
    // Only a NaN is neither.
    const float logarithm = w >= FLT_MIN ? logf(w) : w < FLT_MIN ? -INFINITY : w;
    best = (logarithm > best || logarithm != logarithm) ? logarithm : best;
    out[i] = logarithm;
  }
  const float top = block_max(best, shared.sums);
  if (top == -INFINITY) {
    MK_FOR_SLOTS(i, n) out[i] = 0.0f;
    return;
  }
  float sum = 0.0f;
  MK_FOR_SLOTS(i, n) {
    // The difference first: what gamma multiplies is small where it counts, and so is its rounding.
    const float e = expf((out[i] - top) * gamma);
    out[i] = e;
    sum += e;
  }
  const float scale = 1.0f / block_sum(sum, shared.sums);
  MK_FOR_SLOTS(i, n) out[i] *= scale;
}

// Gradient of the weights in place of that of the sharpened ones; returns that of gamma.
__device__ __forceinline__ float sharpen_backward(float* grad, const float* weights, const float* sharpened,
                                                  float gamma, int n, Shared& shared) {
  const float mean = dot(grad, sharpened, n, shared);
  float d_gamma = 0.0f;
  MK_FOR_SLOTS(i, n) {
    const float w = weights[i];
    const bool counts = w >= FLT_MIN;
    const float d_logit = sharpened[i] * (grad[i] - mean), safe = counts ? w : 1.0f;
    d_gamma = fmaf(d_logit, logf(safe), d_gamma);
    grad[i] = counts ? d_logit * gamma / safe : 0.0f;
  }
  return block_sum(d_gamma, shared.sums);
}

// How much of the precedence stays when weights of this sum are written.
__device__ __forceinline__ float followed(float total) { return total > 1.0f ? 0.0f : 1.0f - total; }

// precedence' = followed(sum w) precedence + w, in place or not.
__device__ __forceinline__ void follow(const float* precedence, const float* write, int n, float* to, Shared& shared) {
  float sum = 0.0f;
  MK_FOR_SLOTS(i, n) sum += write[i];
  const float kept = followed(block_sum(sum, shared.sums));
  MK_FOR_SLOTS(i, n) to[i] = fmaf(kept, precedence[i], write[i]);
}

// d_write grows by the gradient of follow(), and d_precedence (of the new precedence; may be null for zero) goes to
// that of the old in `to`.
__device__ __forceinline__ void follow_backward(const float* precedence, const float* write, int n,
                                                const float* d_precedence, float* to, float* d_write, Shared& shared) {
  if (d_precedence == nullptr) {
    MK_FOR_SLOTS(i, n) to[i] = 0.0f;
    return;
  }
  float sum = 0.0f, along = 0.0f;
  MK_FOR_SLOTS(i, n) {
    sum += write[i];
    along = fmaf(d_precedence[i], precedence[i], along);
  }
  const float total = block_sum(sum, shared.sums), kept = followed(total);
  const float slope = block_sum(along, shared.sums), d_total = total > 1.0f ? 0.0f : -slope;
  MK_FOR_SLOTS(i, n) {
    const float grad = d_precedence[i];
    d_write[i] += grad + d_total;
    to[i] = grad * kept;
  }
}

}  // namespace memkern::cuda::slots
