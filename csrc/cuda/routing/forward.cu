// Forward of route_experts in one launch. A block pools the columns of one split of one row into shared memory, its
// warps multiply them with the experts' rows; the last split of a row finishes it, the last row of a group adds the
// group's share of the loss, the last group writes the loss.
#include "cuda/routing/rows.cuh"

namespace memkern::cuda {

namespace {

constexpr int kChunk = 2048;  // columns that wait in shared memory

struct Args {
  RouteForward p;
  ParamTypes types;
  RouteWorkspace w;
};

// Key with the order of the floats: -0 as 0, NaN above everything, and nothing below everything.
constexpr int kNoSlot = INT_MIN;
__device__ __forceinline__ int order_key(float x) {
  if (x != x) return 0x7fc00000;
  const int bits = __float_as_int(x == 0.0f ? 0.0f : x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
__device__ __forceinline__ float from_order_key(int key) { return __int_as_float(key < 0 ? key ^ 0x7fffffff : key); }

// Scores, then weights, of one row's slots into `weights` (S); every thread of the block.
template <class T, int N>
__device__ void attend(const Args& a, int64_t row, float* weights, float* scratch) {
  const RouteInput& in = a.p.in;
  const T* x = static_cast<const T*>(in.hiddens) + row * in.row_stride;
  const uint8_t* mask = in.slot_mask == nullptr ? nullptr : in.slot_mask + row * in.slots;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float root = rsqrtf(float(in.width > 0 ? in.width : 1));
  for (int64_t s = warp; s < in.slots; s += kThreads / kWarp) {
    float score = -INFINITY;
    if (mask == nullptr || mask[s]) {
      float sum = 0.0f;
      for (int64_t d = lane * N; d < in.width; d += kWarp * N) {
        float v[N];
        load<T, N>(x + s * in.slot_stride + d, v);
#pragma unroll
        for (int i = 0; i < N; ++i) sum = fmaf(v[i], load_param(in.query, a.types.query, d + i), sum);
      }
      score = warp_sum(sum) * root;
    }
    if (lane == 0) weights[s] = score;
  }
  __syncthreads();
  float top = -INFINITY;
  for (int64_t s = threadIdx.x; s < in.slots; s += kThreads) {
    if (mask == nullptr || mask[s]) top = (weights[s] > top || weights[s] != weights[s]) ? weights[s] : top;
  }
  top = block_max(top, scratch);
  float mass = 0.0f;
  for (int64_t s = threadIdx.x; s < in.slots; s += kThreads) {
    if (mask == nullptr || mask[s]) mass += expf(weights[s] - top);
  }
  mass = block_sum(mass, scratch);
  for (int64_t s = threadIdx.x; s < in.slots; s += kThreads) {
    weights[s] = mask == nullptr || mask[s] ? expf(weights[s] - top) / mass : 0.0f;
  }
  __syncthreads();
}

// Columns [first, first + count) of a row into `chunk`; threads are (slot groups, packs of N columns).
template <class T, int N>
__device__ void pool_chunk(const Args& a, int64_t row, int64_t first, int count, float* chunk, int* keys,
                           const float* weights) {
  const RouteInput& in = a.p.in;
  const T* x = static_cast<const T*>(in.hiddens) + row * in.row_stride + first;
  const uint8_t* mask = in.slot_mask == nullptr ? nullptr : in.slot_mask + row * in.slots;
  const bool max = in.pooling == Pooling::kMax;
  int64_t taken = in.slots;
  if (mask != nullptr && in.pooling == Pooling::kMean) {
    taken = 0;
    for (int64_t s = 0; s < in.slots; ++s) taken += mask[s] != 0;
  }
  const float scale = in.pooling == Pooling::kMean ? 1.0f / float(taken > 0 ? taken : 1) : 1.0f;
  for (int d = threadIdx.x * N; d < count; d += kThreads * N) {
    float sum[N];
    int best[N], where[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] = 0.0f;
      best[i] = kNoSlot;
      where[i] = -1;
    }
#pragma unroll 4
    for (int64_t s = 0; s < in.slots; ++s) {
      if (mask != nullptr && !mask[s]) continue;
      float v[N];
      load<T, N>(x + s * in.slot_stride + d, v);
      if (max) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int key = order_key(v[i]);
          if (key > best[i]) {
            best[i] = key;
            where[i] = int(s);
          }
        }
      } else {
        const float weight = weights == nullptr ? 1.0f : weights[s];
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = fmaf(weight, v[i], sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (max) {
        chunk[d + i] = best[i] == kNoSlot ? 0.0f : from_order_key(best[i]);
        if (keys != nullptr) keys[d + i] = where[i];
      } else {
        chunk[d + i] = sum[i] * scale;
      }
    }
  }
}

// Everything that is K wide for one row; thread k holds the projection on expert k.
template <class T>
__device__ void finish_row(const Args& a, int64_t row, float z, bool zero, float* scratch) {
  const RouteForward& p = a.p;
  const int64_t experts = p.in.experts, at = row * experts + threadIdx.x;
  const int k = threadIdx.x;
  const bool inside = k < experts;
  const float limit = float(p.in.clamp);
  if (inside && p.bias != nullptr) z += load_param(p.bias, a.types.bias, k);
  const float clamped = clamp_logit(z, limit);
  const float temperature = p.in.temperature == nullptr ? float(p.in.temperature_value)
                                                        : load_param(p.in.temperature, a.types.temperature, 0);
  const float top = block_max(inside ? clamped : -INFINITY, scratch);
  const float e = inside ? expf((clamped - top) / temperature) : 0.0f;
  const float mass = block_sum(e, scratch);
  float prob = e / mass;
  if (zero) prob = inside ? 1.0f / float(experts) : 0.0f;
  const float entropy = block_sum(inside ? -prob * logf(prob + kEntropyEps) : 0.0f, scratch);
  if (inside) {
    static_cast<T*>(p.probs)[at] = from_float<T>(prob);
    static_cast<float*>(p.logits)[at] = clamped;
    if (p.raw != nullptr) static_cast<float*>(p.raw)[at] = z;
  }
  if (k == 0) {
    static_cast<float*>(p.entropy)[row] = entropy;
    if (p.zero_rows != nullptr) p.zero_rows[row] = zero;
  }
  // The row's terms: its probabilities, and the winner, -1 for a row that does not count.
  const bool counted = p.in.row_mask == nullptr || p.in.row_mask[row];
  __shared__ float best_value[kThreads / kWarp];
  __shared__ int best_index[kThreads / kWarp];
  const int warp = k / kWarp, lane = k % kWarp;
  const float own = inside ? prob : -1.0f;
  const int winner = warp_argmax(own, k);
  const float value = __shfl_sync(0xffffffffu, own, winner % kWarp);
  if (lane == 0) {
    best_value[warp] = value;
    best_index[warp] = winner;
  }
  __syncthreads();
  float* terms = a.w.terms + row * (experts + 1);
  if (inside) terms[k] = prob;
  if (k == 0) {
    int best = 0;
    for (int i = 1; i < kThreads / kWarp; ++i) {
      if (best_value[i] > best_value[best]) best = i;
    }
    // NaN wins nothing: its row counts for the first expert.
    const int index = best_value[0] == best_value[0] ? best_index[best] : 0;
    terms[experts] = counted ? float(index) : -1.0f;
  }
  __syncthreads();
  const int64_t group = row / kGroup, first = group * kGroup, groups = group_count(p.in.rows);
  const int members = int(p.in.rows - first < kGroup ? p.in.rows - first : kGroup);
  if (!arrive_last(a.w.tickets + 1 + group, members)) return;
  float count = 0.0f, total = 0.0f, rows = 0.0f;
  for (int i = 0; i < members; ++i) {
    const float* theirs = a.w.terms + (first + i) * (experts + 1);
    const float winner_of = __ldcg(theirs + experts);
    if (winner_of < 0.0f) continue;
    rows += 1.0f;
    if (inside) {
      count += winner_of == float(k) ? 1.0f : 0.0f;
      total += __ldcg(theirs + k);
    }
  }
  float* loss = static_cast<float*>(p.loss);
  float* loss_weights = static_cast<float*>(p.loss_weights);
  if (groups == 1) {
    write_loss(count, total, rows, experts, loss, loss_weights, scratch);
    return;
  }
  const int64_t stride = 2 * experts + 1;
  float* sums = a.w.groups + group * stride;
  if (inside) {
    sums[k] = count;
    sums[experts + k] = total;
  }
  if (k == 0) sums[2 * experts] = rows;
  if (!arrive_last(a.w.tickets, int(groups))) return;
  count = inside ? sum_column(a.w.groups + k, groups, stride) : 0.0f;
  total = inside ? sum_column(a.w.groups + experts + k, groups, stride) : 0.0f;
  rows = sum_column(a.w.groups + 2 * experts, groups, stride);
  write_loss(count, total, rows, experts, loss, loss_weights, scratch);
}

// Blocks on a multiprocessor: with the number unsaid, ptxas aims at one more and spills a register for it.
template <int N>
constexpr int kResident = N == 8 ? 3 : 4;

template <class T, class W, int N>
__global__ void __launch_bounds__(kThreads, kResident<N>) forward(const Args a) {
  __shared__ float chunk[kChunk];
  __shared__ float logits[kThreads];
  __shared__ float scratch[kWarp];
  __shared__ int any_large;
  const RouteInput& in = a.p.in;
  const int64_t row = blockIdx.x, split = blockIdx.y, experts = in.experts;
  const int k = threadIdx.x, warp = k / kWarp, lane = k % kWarp;
  const int64_t begin = split * a.w.split_width;
  const int64_t end = begin + a.w.split_width < in.width ? begin + a.w.split_width : in.width;
  const W* weight = static_cast<const W*>(in.weight);
  float* weights = nullptr;
  if (in.pooling == Pooling::kAttention) {
    weights = (a.p.slot_weights == nullptr ? a.w.scores : static_cast<float*>(a.p.slot_weights)) + row * in.slots;
    attend<T, N>(a, row, weights, scratch);
  }
  logits[k] = 0.0f;
  if (k == 0) any_large = 0;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int count = int(end - first < kChunk ? end - first : kChunk);
    int* keys = nullptr;
    if (a.p.saved_pool != nullptr && in.pooling == Pooling::kMax) {
      keys = static_cast<int*>(a.p.saved_pool) + row * in.width + first;
    }
    __syncthreads();
    pool_chunk<T, N>(a, row, first, count, chunk, keys, weights);
    __syncthreads();
    int large = 0;
    for (int d = k; d < count; d += kThreads) {
      large |= !(fabsf(chunk[d]) < kZeroRow);
      if (a.p.saved_pool != nullptr && keys == nullptr) {
        static_cast<float*>(a.p.saved_pool)[row * in.width + first + d] = chunk[d];
      }
    }
    if (large) any_large = 1;
    // A warp owns its experts, so that nobody else adds to their logits.
    for (int64_t e = warp; e < experts; e += kThreads / kWarp) {
      const W* w = weight + e * in.width + first;
      float sum = 0.0f;
      for (int d = lane; d < count; d += kWarp) sum = fmaf(chunk[d], to_float(w[d]), sum);
      sum = warp_sum(sum);
      if (lane == 0) logits[e] += sum;
    }
  }
  __syncthreads();
  float z = logits[k];
  bool zero = any_large == 0;
  if (a.w.splits > 1) {
    const int64_t at = split * in.rows + row;
    if (k < experts) a.w.partial[at * experts + k] = z;
    if (k == 0) a.w.large[at] = !zero;
    if (!arrive_last(a.w.tickets + 1 + group_count(in.rows) + row, int(a.w.splits))) return;
    z = 0.0f;
    int large = 0;
    for (int64_t s = 0; s < a.w.splits; ++s) {
      if (k < experts) z += __ldcg(a.w.partial + (s * in.rows + row) * experts + k);
      large |= __ldcg(a.w.large + s * in.rows + row);
    }
    zero = large == 0;
  }
  finish_row<T>(a, row, z, zero, scratch);
}

template <class T, class W>
cudaError_t launch(const Args& a, cudaStream_t stream) {
  const RouteInput& in = a.p.in;
  constexpr int N = kPack<T>;
  const bool aligned = reinterpret_cast<uintptr_t>(in.hiddens) % 16 == 0 && in.row_stride % N == 0 &&
                       in.slot_stride % N == 0 && in.width % N == 0 && a.w.split_width % N == 0;
  const dim3 grid(unsigned(in.rows), unsigned(a.w.splits));
  if (aligned) {
    forward<T, W, N><<<grid, kThreads, 0, stream>>>(a);
  } else {
    forward<T, W, 1><<<grid, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace

void route_splits(const RouteInput& in, RouteWorkspace& w) {
  const int64_t chunks = in.width > 0 ? (in.width + 255) / 256 : 1;
  int64_t splits = in.pooling == Pooling::kAttention || in.rows == 0 ? 1 : 2 * sm_count() / in.rows;
  splits = splits < 1 ? 1 : splits > chunks ? chunks : splits;
  w.split_width = (chunks + splits - 1) / splits * 256;
  w.splits = in.width > 0 ? (in.width + w.split_width - 1) / w.split_width : 1;
}

cudaError_t route_forward(const RouteForward& p, const ParamTypes& types, const RouteWorkspace& w,
                          cudaStream_t stream) {
  const Args a{p, types, w};
  MK_DISPATCH_CUDA(p.in.dtype, T, {
    if (types.weight == DType::kF32) return launch<T, float>(a, stream);
    return launch<T, T>(a, stream);
  })
  return cudaErrorInvalidValue;
}

}  // namespace memkern::cuda
