// Backward of route_experts in two launches: rows, then the weight's gradient.
#include "cuda/routing/rows.cuh"

namespace memkern::cuda {

namespace {

struct Args {
  RouteBackward p;
  ParamTypes types;
  RouteWorkspace w;
  float* d_raw;
};

// Thread k's gradient of the raw logit of expert k; the row's share of the temperature's gradient goes to `share`.
template <class T>
__device__ float raw_gradient(const Args& a, int64_t row, float* scratch, float* share) {
  const RouteBackward& p = a.p;
  const int64_t experts = p.in.experts, at = row * experts + threadIdx.x;
  const int k = threadIdx.x;
  const bool inside = k < experts;
  const float limit = float(p.in.clamp);
  const bool counted = p.grad_loss != nullptr && (p.in.row_mask == nullptr || p.in.row_mask[row]);
  const float raw = inside ? static_cast<const float*>(p.raw)[at] : 0.0f;
  float dz = 0.0f;
  *share = 0.0f;
  // A zero row's probabilities are constants. Where no gradient comes, none goes: a masked row may hold NaN.
  if (!p.zero_rows[row] && (p.grad_probs != nullptr || p.grad_entropy != nullptr || counted)) {
    const float temperature = p.in.temperature == nullptr ? float(p.in.temperature_value)
                                                          : load_param(p.in.temperature, a.types.temperature, 0);
    const float clamped = clamp_logit(raw, limit);
    const float top = block_max(inside ? clamped : -INFINITY, scratch);
    const float e = inside ? expf((clamped - top) / temperature) : 0.0f;
    const float prob = e / block_sum(e, scratch);
    float g = 0.0f;
    if (inside) {
      if (p.grad_probs != nullptr) g += to_float(static_cast<const T*>(p.grad_probs)[at]);
      if (p.grad_entropy != nullptr) g += entropy_slope(prob) * static_cast<const float*>(p.grad_entropy)[row];
      if (counted) g += static_cast<const float*>(p.loss_weights)[k] * *static_cast<const float*>(p.grad_loss);
    }
    const float mean = block_sum(inside ? prob * g : 0.0f, scratch);
    dz = inside ? prob * (g - mean) / temperature : 0.0f;
    *share = -block_sum(inside ? dz * (clamped - top) : 0.0f, scratch) / temperature;
  }
  if (inside && p.grad_logits != nullptr) dz += static_cast<const float*>(p.grad_logits)[at];
  if (limit < INFINITY) {
    const bool passes = p.straight_through ? fabsf(raw) < INFINITY : fabsf(raw) <= limit;
    dz = passes ? dz : 0.0f;
  }
  return inside ? dz : 0.0f;
}

template <class T, class W, int N>
__device__ void pooled_gradient(const Args& a, const float* dz, int64_t d, float (&dp)[N]) {
  const W* weight = static_cast<const W*>(a.p.in.weight) + d;
#pragma unroll
  for (int i = 0; i < N; ++i) dp[i] = 0.0f;
  for (int64_t k = 0; k < a.p.in.experts; ++k) {
#pragma unroll
    for (int i = 0; i < N; ++i) dp[i] = fmaf(dz[k], to_float(weight[k * a.p.in.width + i]), dp[i]);
  }
}

// Attention: dx_s = w_s dp + c_s q / sqrt(D) with c_s = w_s (x_s - pooled) . dp; c_s x_s / sqrt(D) goes to the query.
template <class T, class W, int N>
__device__ void attention_row(const Args& a, int64_t row, const float* dz) {
  const RouteInput& in = a.p.in;
  const T* x = static_cast<const T*>(in.hiddens) + row * in.row_stride;
  const uint8_t* mask = in.slot_mask == nullptr ? nullptr : in.slot_mask + row * in.slots;
  const float* weights = static_cast<const float*>(a.p.slot_weights) + row * in.slots;
  const float* pooled = static_cast<const float*>(a.p.saved_pool) + row * in.width;
  float* dp = a.w.pooled + row * in.width;
  float* c = a.w.scores + row * in.slots;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float root = rsqrtf(float(in.width > 0 ? in.width : 1));
  for (int64_t d = threadIdx.x * N; d < in.width; d += kThreads * N) {
    float g[N];
    pooled_gradient<T, W, N>(a, dz, d, g);
#pragma unroll
    for (int i = 0; i < N; ++i) dp[d + i] = g[i];
  }
  __syncthreads();
  for (int64_t s = warp; s < in.slots; s += kThreads / kWarp) {
    float sum = 0.0f;
    if (mask == nullptr || mask[s]) {
      for (int64_t d = lane * N; d < in.width; d += kWarp * N) {
        float v[N];
        load<T, N>(x + s * in.slot_stride + d, v);
#pragma unroll
        for (int i = 0; i < N; ++i) sum = fmaf(v[i] - pooled[d + i], dp[d + i], sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) c[s] = sum == 0.0f ? 0.0f : weights[s] * sum * root;
  }
  __syncthreads();
  T* out = a.p.d_hiddens == nullptr ? nullptr : static_cast<T*>(a.p.d_hiddens) + row * in.slots * in.width;
  for (int64_t d = threadIdx.x * N; d < in.width; d += kThreads * N) {
    float g[N], q[N], d_query[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      g[i] = dp[d + i];
      q[i] = load_param(in.query, a.types.query, d + i);
      d_query[i] = 0.0f;
    }
    for (int64_t s = 0; s < in.slots; ++s) {
      const bool taken = mask == nullptr || mask[s];
      float dx[N];
#pragma unroll
      for (int i = 0; i < N; ++i) dx[i] = taken ? fmaf(c[s], q[i], weights[s] * g[i]) : 0.0f;
      if (out != nullptr) store<T, N>(out + s * in.width + d, dx);
      if (taken && a.w.query_parts != nullptr) {
        float v[N];
        load<T, N>(x + s * in.slot_stride + d, v);
#pragma unroll
        for (int i = 0; i < N; ++i) d_query[i] = fmaf(c[s], v[i], d_query[i]);
      }
    }
    if (a.w.query_parts != nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) a.w.query_parts[row * in.width + d + i] = d_query[i];
    }
  }
}

// Mean and maximum: columns [begin, end) of a row's gradient, into every slot.
template <class T, class W, int N>
__device__ void spread_row(const Args& a, int64_t row, const float* dz, int64_t begin, int64_t end) {
  const RouteInput& in = a.p.in;
  const uint8_t* mask = in.slot_mask == nullptr ? nullptr : in.slot_mask + row * in.slots;
  const int32_t* positions = static_cast<const int32_t*>(a.p.saved_pool) + row * in.width;
  const bool max = in.pooling == Pooling::kMax;
  T* out = static_cast<T*>(a.p.d_hiddens) + row * in.slots * in.width;
  int64_t taken = in.slots;
  if (mask != nullptr && !max) {
    taken = 0;
    for (int64_t s = 0; s < in.slots; ++s) taken += mask[s] != 0;
  }
  const float scale = max ? 1.0f : 1.0f / float(taken > 0 ? taken : 1);
  for (int64_t d = begin + threadIdx.x * N; d < end; d += kThreads * N) {
    float dp[N];
    int32_t winner[N];
    pooled_gradient<T, W, N>(a, dz, d, dp);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dp[i] *= scale;
      winner[i] = max ? positions[d + i] : -1;
    }
    for (int64_t s = 0; s < in.slots; ++s) {
      const bool whole = max ? false : mask == nullptr || mask[s];
      float dx[N];
#pragma unroll
      for (int i = 0; i < N; ++i) dx[i] = whole || winner[i] == s ? dp[i] : 0.0f;
      store<T, N>(out + s * in.width + d, dx);
    }
  }
}

template <class T, class W, int N>
__global__ void __launch_bounds__(kThreads) backward_rows(const Args a) {
  __shared__ float dz[kThreads];
  __shared__ float scratch[kWarp];
  const RouteBackward& p = a.p;
  const RouteInput& in = p.in;
  const int64_t row = blockIdx.x, split = blockIdx.y, experts = in.experts;
  const int k = threadIdx.x;
  float share;
  dz[k] = raw_gradient<T>(a, row, scratch, &share);
  __syncthreads();
  const int64_t begin = split * a.w.split_width;
  const int64_t end = begin + a.w.split_width < in.width ? begin + a.w.split_width : in.width;
  if (in.pooling == Pooling::kAttention) {
    if (p.d_hiddens != nullptr || a.w.query_parts != nullptr) attention_row<T, W, N>(a, row, dz);
  } else if (p.d_hiddens != nullptr) {
    spread_row<T, W, N>(a, row, dz, begin, end);
  }
  if (split != 0) return;
  if (a.d_raw != nullptr && k < experts) a.d_raw[row * experts + k] = dz[k];
  if (p.d_bias == nullptr && p.d_temperature == nullptr) return;
  const int64_t stride = experts + 1, group = row / kGroup, first = group * kGroup, groups = group_count(in.rows);
  const int members = int(in.rows - first < kGroup ? in.rows - first : kGroup);
  float* terms = a.w.terms + row * stride;
  if (k < experts) terms[k] = dz[k];
  if (k == 0) terms[experts] = share;
  if (!arrive_last(a.w.tickets + 1 + group, members)) return;
  // Threads 0 to K add the K + 1 columns; with 256 experts thread 0 adds the last one after its own.
  const bool last_group = groups == 1;
  float* bias = last_group ? static_cast<float*>(p.d_bias) : a.w.groups + group * stride;
  float* temperature = last_group ? static_cast<float*>(p.d_temperature) : a.w.groups + group * stride + experts;
  if (bias != nullptr && k < experts) bias[k] = sum_column(a.w.terms + first * stride + k, members, stride);
  if (temperature != nullptr && k == 0) *temperature = sum_column(a.w.terms + first * stride + experts, members, stride);
  if (last_group || !arrive_last(a.w.tickets, int(groups))) return;
  if (p.d_bias != nullptr && k < experts) {
    static_cast<float*>(p.d_bias)[k] = sum_column(a.w.groups + k, groups, stride);
  }
  if (p.d_temperature != nullptr && k == 0) {
    *static_cast<float*>(p.d_temperature) = sum_column(a.w.groups + experts, groups, stride);
  }
}

template <class T, class W>
cudaError_t launch(const Args& a, cudaStream_t stream) {
  const RouteInput& in = a.p.in;
  constexpr int N = kPack<T>;
  const bool aligned = reinterpret_cast<uintptr_t>(in.hiddens) % 16 == 0 && in.row_stride % N == 0 &&
                       in.slot_stride % N == 0 && in.width % N == 0 && a.w.split_width % N == 0 &&
                       reinterpret_cast<uintptr_t>(a.p.d_hiddens) % 16 == 0;
  const dim3 grid(unsigned(in.rows), unsigned(a.w.splits));
  if (aligned) {
    backward_rows<T, W, N><<<grid, kThreads, 0, stream>>>(a);
  } else {
    backward_rows<T, W, 1><<<grid, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

constexpr int kExperts = 8;  // of a weight tile, by kThreads columns

struct WeightArgs {
  RouteBackward p;
  WeightWorkspace w;
  const float* d_raw;
  const float* query_parts;
};

// Column d of a row's pooled vector.
template <class T>
__device__ __forceinline__ float pooled_at(const RouteBackward& p, int64_t row, int64_t d) {
  const RouteInput& in = p.in;
  const T* x = static_cast<const T*>(in.hiddens) + row * in.row_stride + d;
  if (in.slots == 1) return in.slot_mask == nullptr || in.slot_mask[row] ? to_float(*x) : 0.0f;
  if (in.pooling != Pooling::kMax) return static_cast<const float*>(p.saved_pool)[row * in.width + d];
  const int32_t slot = static_cast<const int32_t*>(p.saved_pool)[row * in.width + d];
  return slot < 0 ? 0.0f : to_float(x[slot * in.slot_stride]);
}

template <class T, class W>
__global__ void __launch_bounds__(kThreads) backward_weight(const WeightArgs a) {
  const RouteInput& in = a.p.in;
  const int64_t experts = in.experts, width = in.width, split = blockIdx.z;
  const int64_t d = int64_t(blockIdx.x) * kThreads + threadIdx.x, first = int64_t(blockIdx.y) * kExperts;
  const int64_t begin = split * a.w.split_rows;
  const int64_t end = begin + a.w.split_rows < in.rows ? begin + a.w.split_rows : in.rows;
  const bool query = a.query_parts != nullptr && first == 0;
  float total[kExperts] = {}, query_total = 0.0f;
  if (d < width) {
    for (int64_t row = begin; row < end; ++row) {
      const float x = pooled_at<T>(a.p, row, d);
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        const float g = first + e < experts ? a.d_raw[row * experts + first + e] : 0.0f;
        total[e] = fmaf(g, x, total[e]);
      }
      if (query) query_total += a.query_parts[row * width + d];
    }
  }
  if (a.w.splits > 1) {
    if (d < width) {
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        if (first + e < experts) a.w.partial[(split * experts + first + e) * width + d] = total[e];
      }
      if (query) a.w.query_partial[split * width + d] = query_total;
    }
    if (!arrive_last(a.w.tickets + blockIdx.y * gridDim.x + blockIdx.x, int(a.w.splits))) return;
    if (d >= width) return;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      if (first + e < experts) {
        total[e] = sum_column(a.w.partial + (first + e) * width + d, a.w.splits, experts * width);
      }
    }
    if (query) query_total = sum_column(a.w.query_partial + d, a.w.splits, width);
  }
  if (d >= width) return;
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
    if (first + e < experts) static_cast<W*>(a.p.d_weight)[(first + e) * width + d] = from_float<W>(total[e]);
  }
  if (query) static_cast<float*>(a.p.d_query)[d] = query_total;
}

template <class T, class W>
cudaError_t launch_weight(const WeightArgs& a, cudaStream_t stream) {
  const RouteInput& in = a.p.in;
  const dim3 grid(unsigned((in.width + kThreads - 1) / kThreads), unsigned((in.experts + kExperts - 1) / kExperts),
                  unsigned(a.w.splits));
  backward_weight<T, W><<<grid, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

int64_t weight_splits(const RouteInput& in, WeightWorkspace& w) {
  const int64_t tiles = ((in.width + kThreads - 1) / kThreads) * ((in.experts + kExperts - 1) / kExperts);
  const int64_t most = (in.rows + 63) / 64;
  int64_t splits = tiles > 0 ? 4 * sm_count() / tiles : 1;
  splits = splits < 1 ? 1 : splits > most ? most : splits;
  splits = splits < 1 ? 1 : splits;
  w.split_rows = (in.rows + splits - 1) / splits;
  w.splits = w.split_rows > 0 ? (in.rows + w.split_rows - 1) / w.split_rows : 1;
  return tiles;
}

cudaError_t route_backward_rows(const RouteBackward& p, const ParamTypes& types, const RouteWorkspace& w, float* d_raw,
                                cudaStream_t stream) {
  const Args a{p, types, w, d_raw};
  MK_DISPATCH_CUDA(p.in.dtype, T, {
    if (types.weight == DType::kF32) return launch<T, float>(a, stream);
    return launch<T, T>(a, stream);
  })
  return cudaErrorInvalidValue;
}

cudaError_t route_backward_weight(const RouteBackward& p, const ParamTypes& types, const WeightWorkspace& w,
                                  const float* d_raw, const float* query_parts, cudaStream_t stream) {
  const WeightArgs a{p, w, d_raw, query_parts};
  MK_DISPATCH_CUDA(p.in.dtype, T, {
    if (types.weight == DType::kF32) return launch_weight<T, float>(a, stream);
    return launch_weight<T, T>(a, stream);
  })
  return cudaErrorInvalidValue;
}

}  // namespace memkern::cuda
