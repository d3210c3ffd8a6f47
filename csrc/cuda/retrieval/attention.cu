// Attention over retrieved pairs: one warp per query. A group of lanes holds one row of keys or values, 16 bytes a lane,
// so that a warp has several pairs in flight; each group keeps its own maximum, mass and mix, merged at the end in a
// fixed order. The matrix units have nothing to do at one operation per byte.
#include "cuda/retrieval.h"

#include <cub/device/device_radix_sort.cuh>

#include "cuda/common.cuh"

namespace memkern::cuda {

namespace {

constexpr int kThreads = 128;

// How a warp holds rows: Lanes lanes each, V packs of P elements a lane.
template <class T_, int P_, int V_, int Lanes_>
struct Shape {
  using T = T_;
  static constexpr int P = P_, V = V_, N = P_ * V_, Lanes = Lanes_, Groups = kWarp / Lanes_;
};

template <class S>
struct Row {
  float x[S::N];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (int i = 0; i < S::N; ++i) x[i] = 0.0f;
  }
  // Elements (v Lanes + lane) P ... of a row; what lies behind the width is zero.
  __device__ __forceinline__ void read(const typename S::T* row, int lane, int width, float scale = 1.0f) {
#pragma unroll
    for (int v = 0; v < S::V; ++v) {
      const int at = (v * S::Lanes + lane) * S::P;
      float part[S::P];
#pragma unroll
      for (int i = 0; i < S::P; ++i) part[i] = 0.0f;
      if (at < width) load(row + at, part);
#pragma unroll
      for (int i = 0; i < S::P; ++i) x[v * S::P + i] = part[i] * scale;
    }
  }
  __device__ __forceinline__ void write(typename S::T* row, int lane, int width, float scale) const {
#pragma unroll
    for (int v = 0; v < S::V; ++v) {
      const int at = (v * S::Lanes + lane) * S::P;
      float part[S::P];
#pragma unroll
      for (int i = 0; i < S::P; ++i) part[i] = x[v * S::P + i] * scale;
      if (at < width) store(row + at, part);
    }
  }
  __device__ __forceinline__ float dot(const Row& other) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < S::N; ++i) sum = fmaf(x[i], other.x[i], sum);
    return sum;
  }
  __device__ __forceinline__ void add(const Row& other, float factor) {
#pragma unroll
    for (int i = 0; i < S::N; ++i) x[i] = fmaf(other.x[i], factor, x[i]);
  }
  __device__ __forceinline__ void scale_by(float factor) {
#pragma unroll
    for (int i = 0; i < S::N; ++i) x[i] *= factor;
  }
  // Sum over the groups of a warp; every group gets it.
  __device__ __forceinline__ void over_groups() {
#pragma unroll
    for (int step = S::Lanes; step < kWarp; step *= 2) {
#pragma unroll
      for (int i = 0; i < S::N; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
    }
  }
};

// Sum over the lanes of a group; every lane of it gets the same bits.
template <class S>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = S::Lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The row of this warp, -1 behind the last. Asked from one lane, so that the compiler knows that a warp stays together:
// otherwise every shuffle becomes a call.
__device__ __forceinline__ int64_t own_row(int64_t rows) {
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarp, 0);
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + warp;
  return row < rows ? row : -1;
}

struct Place {
  int64_t key, value;  // offsets of the query's first row of keys and values
  int64_t plane;       // b A + a
};

__device__ __forceinline__ Place place_of(const RetrievedAttention& p, int64_t row) {
  const int64_t plane = row / p.count, t = row % p.count, b = plane / p.heads, a = plane % p.heads;
  const PairStrides &k = p.key_strides, &v = p.value_strides;
  return {b * k.b + a * k.a + t * k.t, b * v.b + a * v.a + t * v.t, plane};
}

// Index of pair c along the keys, -1 when it takes no part.
__device__ __forceinline__ int64_t pair_at(const RetrievedAttention& p, int64_t row, int64_t c) {
  if (c >= p.pairs) return -1;
  const int64_t at = row * p.pairs + c;
  if (p.mask != nullptr && !p.mask[at]) return -1;
  if (p.bank < 0) return c;
  const int64_t index = p.indices[at];
  return index >= 0 && index < p.bank ? index : -1;
}

template <class S>
__global__ void __launch_bounds__(kThreads) forward(const RetrievedAttention p) {
  using T = typename S::T;
  const int64_t rows = p.batch * p.heads * p.count;
  const int64_t row = own_row(rows);
  if (row < 0) return;
  const int width = int(p.width), lane = threadIdx.x % S::Lanes, group = threadIdx.x % kWarp / S::Lanes;
  constexpr int groups = S::Groups;
  const Place place = place_of(p, row);
  const T *keys = static_cast<const T*>(p.keys), *values = static_cast<const T*>(p.values);
  Row<S> query, mix;
  query.read(static_cast<const T*>(p.queries) + row * width, lane, width, p.scale);
  mix.zero();
  float best = -INFINITY, mass = 0.0f;
  // All lanes stay in the loop as long as one group has a pair: the sums are over whole warps.
  for (int64_t first = 0; first < p.pairs; first += groups) {
    const int64_t at = pair_at(p, row, first + group);
    Row<S> key, value;
    key.zero();
    value.zero();
    if (at >= 0) {
      key.read(keys + place.key + at * p.key_strides.c, lane, width);
      value.read(values + place.value + at * p.value_strides.c, lane, width);
    }
    __syncwarp();
    const float score = group_sum<S>(query.dot(key));
    if (at >= 0) {
      // A NaN must stay one: fmaxf would drop it, but exp(score - higher) keeps it.
      const float higher = fmaxf(best, score), base = higher == -INFINITY ? 0.0f : higher;
      const float keep = expf(best - base), weight = expf(score - base);
      mass = mass * keep + weight;
      mix.scale_by(keep);
      mix.add(value, weight);
      best = higher;
    }
  }
  __syncwarp();
  float highest = best;
#pragma unroll
  for (int step = S::Lanes; step < kWarp; step *= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
  }
  const float base = highest == -INFINITY ? 0.0f : highest, keep = expf(best - base);
  mass *= keep;
  mix.scale_by(keep);
#pragma unroll
  for (int step = S::Lanes; step < kWarp; step *= 2) mass += __shfl_xor_sync(0xffffffffu, mass, step);
  mix.over_groups();
  if (group == 0) {
    const bool none = mass == 0.0f;
    mix.write(static_cast<T*>(p.out) + row * width, lane, width, none ? 0.0f : 1.0f / mass);
    if (lane == 0) p.lse[row] = none ? -INFINITY : base + logf(mass);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) backward(const RetrievedAttention p) {
  using T = typename S::T;
  const int64_t rows = p.batch * p.heads * p.count;
  const int64_t row = own_row(rows);
  if (row < 0) return;
  const int width = int(p.width), lane = threadIdx.x % S::Lanes, group = threadIdx.x % kWarp / S::Lanes;
  constexpr int groups = S::Groups;
  const Place place = place_of(p, row);
  const T *keys = static_cast<const T*>(p.keys), *values = static_cast<const T*>(p.values);
  Row<S> query, grad, sum;
  grad.read(static_cast<const T*>(p.grad) + row * width, lane, width);
  query.read(static_cast<const T*>(p.out) + row * width, lane, width);
  const float delta = group_sum<S>(grad.dot(query)), lse = p.lse[row];
  query.read(static_cast<const T*>(p.queries) + row * width, lane, width, p.scale);
  sum.zero();
  for (int64_t first = 0; first < p.pairs; first += groups) {
    const int64_t c = first + group, at = pair_at(p, row, c);
    Row<S> key, value;
    key.zero();
    value.zero();
    if (at >= 0) {
      key.read(keys + place.key + at * p.key_strides.c, lane, width);
      value.read(values + place.value + at * p.value_strides.c, lane, width);
    }
    __syncwarp();
    const float score = group_sum<S>(query.dot(key)), slope = group_sum<S>(grad.dot(value));
    const float weight = at >= 0 ? expf(score - lse) : 0.0f;
    const float d_score = at >= 0 ? weight * (slope - delta) : 0.0f;
    if (at >= 0) sum.add(key, d_score);
    if (c >= p.pairs) continue;  // no shuffle follows in this turn
    const int64_t slot = row * p.pairs + c;
    if (p.bank < 0 && p.d_keys != nullptr) {
      // Where a pair takes no part, zero even if the query is not finite.
      key.zero();
      value.zero();
      if (at >= 0) {
        key.add(query, d_score);
        value.add(grad, weight);
      }
      key.write(static_cast<T*>(p.d_keys) + slot * width, lane, width, 1.0f);
      value.write(static_cast<T*>(p.d_values) + slot * width, lane, width, 1.0f);
    }
    if (p.owner != nullptr && lane == 0) {
      p.owner[slot] = int32_t(at >= 0 ? place.plane * p.bank + at : p.batch * p.heads * p.bank);
    }
  }
  __syncwarp();
  if (p.d_queries != nullptr) {
    sum.over_groups();
    if (group == 0) sum.write(static_cast<T*>(p.d_queries) + row * width, lane, width, p.scale);
  }
  if (p.delta != nullptr && group == 0 && lane == 0) p.delta[row] = delta;
}

// Position of the first of the sorted owners that is not below `wanted`.
__device__ __forceinline__ int64_t first_at_least(const int32_t* owner, int64_t entries, int32_t wanted) {
  int64_t low = 0, high = entries;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (owner[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    bank_backward(const RetrievedAttention p, const int32_t* sorted, const int32_t* order) {
  using T = typename S::T;
  const int64_t rows = p.batch * p.heads * p.bank;
  const int64_t row = own_row(rows);
  if (row < 0) return;
  const int width = int(p.width), lane = threadIdx.x % S::Lanes, group = threadIdx.x % kWarp / S::Lanes;
  constexpr int groups = S::Groups;
  const int64_t plane = row / p.bank, m = row % p.bank, b = plane / p.heads, a = plane % p.heads;
  const int64_t entries = p.batch * p.heads * p.count * p.pairs;
  const int64_t begin = first_at_least(sorted, entries, int32_t(row));
  const int64_t end = first_at_least(sorted, entries, int32_t(row) + 1);
  const PairStrides &ks = p.key_strides, &vs = p.value_strides;
  Row<S> key, value, d_key, d_value;
  key.read(static_cast<const T*>(p.keys) + b * ks.b + a * ks.a + m * ks.c, lane, width);
  value.read(static_cast<const T*>(p.values) + b * vs.b + a * vs.a + m * vs.c, lane, width);
  d_key.zero();
  d_value.zero();
  for (int64_t first = begin; first < end; first += groups) {
    const bool there = first + group < end;
    const int64_t query_row = there ? order[first + group] / p.pairs : 0;
    Row<S> query, grad;
    query.zero();
    grad.zero();
    if (there) {
      query.read(static_cast<const T*>(p.queries) + query_row * width, lane, width, p.scale);
      grad.read(static_cast<const T*>(p.grad) + query_row * width, lane, width);
    }
    __syncwarp();
    const float score = group_sum<S>(query.dot(key)), slope = group_sum<S>(grad.dot(value));
    if (there) {
      const float weight = expf(score - p.lse[query_row]);
      d_key.add(query, weight * (slope - p.delta[query_row]));
      d_value.add(grad, weight);
    }
  }
  __syncwarp();
  d_key.over_groups();
  d_value.over_groups();
  if (group == 0) {
    d_key.write(static_cast<T*>(p.d_keys) + row * width, lane, width, 1.0f);
    d_value.write(static_cast<T*>(p.d_values) + row * width, lane, width, 1.0f);
  }
}

__global__ void count_up(int32_t* out, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = int32_t(i);
}

// run(Shape) with as few lanes for a row as hold it in one pack each, so that a warp has several pairs in flight.
template <class T, class Run>
cudaError_t with_shape(const RetrievedAttention& p, const Run& run) {
  constexpr int P = kPack<T>;
  if (p.width % P != 0) {
    if (p.width <= 64) return run(Shape<T, 1, 2, 32>{});
    return p.width <= kMaxOddWidth ? run(Shape<T, 1, 8, 32>{}) : cudaErrorInvalidValue;
  }
  const int64_t packs = p.width / P;
  if (packs <= 4) return run(Shape<T, P, 1, 4>{});
  if (packs <= 8) return run(Shape<T, P, 1, 8>{});
  if (packs <= 16) return run(Shape<T, P, 1, 16>{});
  if (packs <= 32) return run(Shape<T, P, 1, 32>{});
  if (packs <= 64) return run(Shape<T, P, 2, 32>{});
  if constexpr (P == 4) {
    if (packs <= 128) return run(Shape<T, P, 4, 32>{});
  }
  return cudaErrorInvalidValue;
}

unsigned int warp_blocks(int64_t rows) {
  return static_cast<unsigned int>((rows + kThreads / kWarp - 1) / (kThreads / kWarp));
}

int bits_of(int64_t rows) {
  int bits = 1;
  while ((int64_t{1} << bits) <= rows) ++bits;
  return bits;
}

}  // namespace

cudaError_t attention_fwd(const RetrievedAttention& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.heads * p.count;
  if (rows == 0) return cudaSuccess;
  MK_DISPATCH_CUDA(p.dtype, T, {
    return with_shape<T>(p, [&](auto shape) {
      forward<decltype(shape)><<<warp_blocks(rows), kThreads, 0, stream>>>(p);
      return cudaGetLastError();
    });
  })
  return cudaSuccess;
}

cudaError_t attention_bwd(const RetrievedAttention& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.heads * p.count;
  if (rows == 0) return cudaSuccess;
  MK_DISPATCH_CUDA(p.dtype, T, {
    return with_shape<T>(p, [&](auto shape) {
      backward<decltype(shape)><<<warp_blocks(rows), kThreads, 0, stream>>>(p);
      return cudaGetLastError();
    });
  })
  return cudaSuccess;
}

size_t sort_bytes(int64_t entries, int64_t rows) {
  size_t bytes = 0;
  const int32_t* keys = nullptr;
  int32_t* out = nullptr;
  cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, out, keys, out, entries, 0, bits_of(rows));
  return bytes;
}

cudaError_t sort_owners(const int32_t* owner, int32_t* sorted, int32_t* iota, int32_t* order, int64_t entries,
                        int64_t rows, void* scratch, size_t bytes, cudaStream_t stream) {
  if (entries == 0) return cudaSuccess;
  count_up<<<static_cast<unsigned int>((entries + 255) / 256), 256, 0, stream>>>(iota, entries);
  const int32_t* positions = iota;
  return cub::DeviceRadixSort::SortPairs(scratch, bytes, owner, sorted, positions, order, entries, 0, bits_of(rows),
                                         stream);
}

cudaError_t attention_bank_bwd(const RetrievedAttention& p, const int32_t* sorted, const int32_t* order,
                               cudaStream_t stream) {
  const int64_t rows = p.batch * p.heads * p.bank;
  if (rows == 0) return cudaSuccess;
  MK_DISPATCH_CUDA(p.dtype, T, {
    return with_shape<T>(p, [&](auto shape) {
      bank_backward<decltype(shape)><<<warp_blocks(rows), kThreads, 0, stream>>>(p, sorted, order);
      return cudaGetLastError();
    });
  })
  return cudaSuccess;
}

}  // namespace memkern::cuda
