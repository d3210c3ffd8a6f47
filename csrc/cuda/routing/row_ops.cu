// temperature_softmax, routing_entropy and load_balance_loss on rows of any size: a warp a row, kGroup rows a block.
#include "cuda/routing/rows.cuh"

namespace memkern::cuda {

namespace {

constexpr int kWarps = kThreads / kWarp;

__device__ __forceinline__ float temperature_of(const RowSoftmax& p, DType type) {
  return p.temperature == nullptr ? float(p.temperature_value) : load_param(p.temperature, type, 0);
}

template <class T>
struct SoftmaxRow {
  __device__ SoftmaxRow(const RowSoftmax& p, int64_t row, float temperature_)
      : z(static_cast<const T*>(p.logits) + row * p.size), limit(float(p.clamp)), temperature(temperature_) {
    const int lane = threadIdx.x % kWarp;
    top = -INFINITY;
    for (int64_t k = lane; k < p.size; k += kWarp) {
      const float value = clamp_logit(to_float(z[k]), limit);
      top = value > top || value != value ? value : top;
    }
    top = warp_max(top);
    mass = 0.0f;
    for (int64_t k = lane; k < p.size; k += kWarp) mass += exponential(k);
    mass = warp_sum(mass);
  }
  __device__ float clamped(int64_t k) const { return clamp_logit(to_float(z[k]), limit); }
  __device__ float exponential(int64_t k) const { return expf((clamped(k) - top) / temperature); }
  __device__ float prob(int64_t k) const { return exponential(k) / mass; }

  const T* z;
  float limit, temperature, top, mass;
};

template <class T>
__global__ void __launch_bounds__(kThreads) softmax_rows(const RowSoftmax p, DType type) {
  const float temperature = temperature_of(p, type);
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const SoftmaxRow<T> s(p, row, temperature);
  T* probs = static_cast<T*>(p.probs) + row * p.size;
  for (int64_t k = threadIdx.x % kWarp; k < p.size; k += kWarp) probs[k] = from_float<T>(s.prob(k));
}

// Four blocks on a multiprocessor: with the number unsaid, ptxas aims at more and spills for it.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) softmax_rows_backward(const RowSoftmax p, DType type, float* groups,
                                                                  int32_t* ticket) {
  __shared__ float shares[kWarps];
  const float temperature = temperature_of(p, type);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = int64_t(blockIdx.x) * kGroup;
  const int64_t last = first + kGroup < p.rows ? first + kGroup : p.rows;
  float total = 0.0f;
  for (int64_t row = first + warp; row < last; row += kWarps) {
    const SoftmaxRow<T> s(p, row, temperature);
    const T* grad = static_cast<const T*>(p.grad) + row * p.size;
    T* out = static_cast<T*>(p.d_logits) + row * p.size;
    float mean = 0.0f, share = 0.0f;
    for (int64_t k = lane; k < p.size; k += kWarp) mean = fmaf(s.prob(k), to_float(grad[k]), mean);
    mean = warp_sum(mean);
    for (int64_t k = lane; k < p.size; k += kWarp) {
      float dz = s.prob(k) * (to_float(grad[k]) - mean) / temperature;
      share = fmaf(dz, s.clamped(k) - s.top, share);
      if (s.limit < INFINITY && !(fabsf(to_float(s.z[k])) <= s.limit)) dz = 0.0f;
      out[k] = from_float<T>(dz);
    }
    total += warp_sum(share);
  }
  if (p.d_temperature == nullptr) return;
  if (lane == 0) shares[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int i = 0; i < kWarps; ++i) sum += shares[i];
    groups[blockIdx.x] = sum;
  }
  if (!arrive_last(ticket, gridDim.x)) return;
  if (threadIdx.x == 0) *static_cast<float*>(p.d_temperature) = -sum_column(groups, gridDim.x, 1) / temperature;
}

template <class T>
__global__ void __launch_bounds__(kThreads) entropy_rows(const RowEntropy p) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= p.rows) return;
  const T* probs = static_cast<const T*>(p.probs) + row * p.size;
  float sum = 0.0f;
  for (int64_t k = lane; k < p.size; k += kWarp) {
    const float x = to_float(probs[k]);
    sum = fmaf(x, logf(x + kEntropyEps), sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) static_cast<float*>(p.entropy)[row] = -sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) entropy_rows_backward(const RowEntropy p) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const float grad = static_cast<const float*>(p.grad)[row];
  for (int64_t k = threadIdx.x % kWarp; k < p.size; k += kWarp) {
    const int64_t at = row * p.size + k;
    const float slope = entropy_slope(to_float(static_cast<const T*>(p.probs)[at]));
    static_cast<T*>(p.d_probs)[at] = from_float<T>(slope * grad);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) balance_rows(const BalanceLoss p, float* groups, int32_t* ticket) {
  __shared__ int winners[kGroup];  // -1: the row does not count
  __shared__ float scratch[kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = int64_t(blockIdx.x) * kGroup;
  const int members = int(p.rows - first < kGroup ? p.rows - first : kGroup);
  const T* probs = static_cast<const T*>(p.probs) + first * p.size;
  for (int i = warp; i < members; i += kWarps) {
    float best = -INFINITY;
    int index = INT_MAX;
    bool nan = false;
    for (int64_t k = lane; k < p.size; k += kWarp) {
      const float value = to_float(probs[i * p.size + k]);
      nan |= value != value;
      if (value > best) {
        best = value;
        index = int(k);
      }
    }
    index = warp_argmax(best, index);
    if (__any_sync(0xffffffffu, nan) || index == INT_MAX) index = 0;
    if (lane == 0) winners[i] = p.row_mask == nullptr || p.row_mask[first + i] ? index : -1;
  }
  __syncthreads();
  const int64_t stride = 2 * p.size + 1;
  float* own = groups + blockIdx.x * stride;
  for (int64_t k = threadIdx.x; k < p.size; k += kThreads) {
    float count = 0.0f, mass = 0.0f;
    for (int i = 0; i < members; ++i) {
      if (winners[i] < 0) continue;
      count += winners[i] == k ? 1.0f : 0.0f;
      mass += to_float(probs[i * p.size + k]);
    }
    own[k] = count;
    own[p.size + k] = mass;
  }
  if (threadIdx.x == 0) {
    float rows = 0.0f;
    for (int i = 0; i < members; ++i) rows += winners[i] >= 0 ? 1.0f : 0.0f;
    own[2 * p.size] = rows;
  }
  if (!arrive_last(ticket, gridDim.x)) return;
  const float rows = fmaxf(sum_column(groups + 2 * p.size, gridDim.x, stride), 1.0f);
  float total = 0.0f;
  for (int64_t k = threadIdx.x; k < p.size; k += kThreads) {
    const float share = sum_column(groups + k, gridDim.x, stride) / rows;
    total = fmaf(share, sum_column(groups + p.size + k, gridDim.x, stride) / rows, total);
    static_cast<float*>(p.loss_weights)[k] = float(p.size) * share / rows;
  }
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) *static_cast<float*>(p.loss) = float(p.size) * total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) balance_rows_backward(const BalanceLoss p) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const bool counted = p.row_mask == nullptr || p.row_mask[row];
  const float grad = *static_cast<const float*>(p.grad);
  for (int64_t k = threadIdx.x % kWarp; k < p.size; k += kWarp) {
    const float value = counted ? static_cast<const float*>(p.loss_weights)[k] * grad : 0.0f;
    static_cast<T*>(p.d_probs)[row * p.size + k] = from_float<T>(value);
  }
}

unsigned row_blocks(int64_t rows) { return unsigned((rows + kWarps - 1) / kWarps); }
unsigned group_blocks(int64_t rows) { return unsigned(group_count(rows)); }

}  // namespace

cudaError_t softmax_forward(const RowSoftmax& p, DType type, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, (softmax_rows<T><<<row_blocks(p.rows), kThreads, 0, stream>>>(p, type)))
  return cudaGetLastError();
}
cudaError_t softmax_backward(const RowSoftmax& p, DType type, float* groups, int32_t* ticket, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T,
                   (softmax_rows_backward<T><<<group_blocks(p.rows), kThreads, 0, stream>>>(p, type, groups, ticket)))
  return cudaGetLastError();
}
cudaError_t entropy_forward(const RowEntropy& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, (entropy_rows<T><<<row_blocks(p.rows), kThreads, 0, stream>>>(p)))
  return cudaGetLastError();
}
cudaError_t entropy_backward(const RowEntropy& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, (entropy_rows_backward<T><<<row_blocks(p.rows), kThreads, 0, stream>>>(p)))
  return cudaGetLastError();
}
cudaError_t balance_forward(const BalanceLoss& p, float* groups, int32_t* ticket, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T,
                   (balance_rows<T><<<group_blocks(p.rows), kThreads, 0, stream>>>(p, groups, ticket)))
  return cudaGetLastError();
}
cudaError_t balance_backward(const BalanceLoss& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, (balance_rows_backward<T><<<row_blocks(p.rows), kThreads, 0, stream>>>(p)))
  return cudaGetLastError();
}

}  // namespace memkern::cuda
