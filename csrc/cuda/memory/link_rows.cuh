// Forward over some rows of a link matrix by one block, wherever the matrix lies.
//
// A warp takes kHeight rows by kWarp packs of columns at a time. Sums along columns stay in registers for all rows of
// the block, and meet at the end of the columns; sums along rows meet in the warp and are kept in shared memory.
#pragma once

#include "cuda/memory/links.cuh"

namespace memkern::cuda::slots {

constexpr int kHeight = 4, kReads = 4;  // read heads in one pass; more take further passes

template <int V>
__device__ __forceinline__ void load_at(const float* p, bool inside, float (&x)[V]) {
  if (inside) {
    load(p, x);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = 0.0f;
  }
}

// Adds each of K values over the warp. Lanes l of a group of kWarp / K return value l / (kWarp / K).
template <int K, int Step = kWarp / 2>
__device__ __forceinline__ float sums_of(const float (&x)[K]) {
  if constexpr (K > 1) {
    const bool upper = (threadIdx.x & Step) != 0;
    float half[K / 2];
#pragma unroll
    for (int i = 0; i < K / 2; ++i) {
      const float mine = upper ? x[i + K / 2] : x[i], theirs = upper ? x[i] : x[i + K / 2];
      half[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, Step);
    }
    return sums_of<K / 2, Step / 2>(half);
  } else {
    float sum = x[0];
#pragma unroll
    for (int step = Step; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }
}

// The factor of a link that is kept, at least 0; a NaN stays.
__device__ __forceinline__ float at_least_zero(float kept) { return kept < 0.0f ? 0.0f : kept; }

// Shared memory of link_rows(), which the next call may use at once.
template <int R, int V>
struct LinkTile {
  float columns[kWarps][R > 0 ? R : 1][kWarp * V];
  float sums[R > 0 ? R : 1][kLinkRows], weights[R > 0 ? R : 1][kLinkRows], written[kLinkRows];
};

struct LinkRows {
  int n, begin, rows;       // at most kLinkRows rows from `begin` on
  int count;                // read heads, at most R
  const float* from;        // (rows, n)
  float* to;                // with UPDATE; may be `from`
  const float* write;       // (n), with UPDATE
  const float* precedence;  // (n), with UPDATE
  const float* reads;       // (count, n)
  float* ahead;             // (count, rows) with this stride
  int64_t ahead_stride;
  float* back;  // (count, n)
};

// Updates the rows (without UPDATE, `from` is already what is read) and multiplies them by the reads from both sides.
template <int R, int V, bool UPDATE>
__device__ __forceinline__ void link_rows(const LinkRows& p, LinkTile<R, V>& shared) {
  constexpr int kSpan = kWarp * V;
  const int n = p.n;
  __syncthreads();
  for (int i = threadIdx.x; i < kLinkRows; i += kThreads) {
    const bool inside = i < p.rows;
    shared.written[i] = UPDATE && inside ? p.write[p.begin + i] : 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      shared.weights[r][i] = inside && r < p.count ? p.reads[int64_t(r) * n + p.begin + i] : 0.0f;
      shared.sums[r][i] = 0.0f;
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int start = 0; start < n; start += kSpan) {
    const int j = start + lane * V;
    const bool inside = j < n;
    float wj[V], pj[V], rj[R > 0 ? R : 1][V], down[R > 0 ? R : 1][V] = {};
    load_at(p.write + j, UPDATE && inside, wj);
    load_at(p.precedence + j, UPDATE && inside, pj);
#pragma unroll
    for (int r = 0; r < R; ++r) load_at(p.reads + int64_t(r) * n + j, inside && r < p.count, rj[r]);
    for (int group = warp * kHeight; group < p.rows; group += kWarps * kHeight) {
      float l[kHeight][V];
#pragma unroll
      for (int a = 0; a < kHeight; ++a) {
        load_at(p.from + int64_t(group + a) * n + j, inside && group + a < p.rows, l[a]);
      }
      if constexpr (UPDATE) {
#pragma unroll
        for (int a = 0; a < kHeight; ++a) {
          const float wi = shared.written[group + a];
          const int i = p.begin + group + a;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            l[a][v] = i == j + v ? 0.0f : fmaf(at_least_zero((1.0f - wi) - wj[v]), l[a][v], wi * pj[v]);
          }
          if (inside && group + a < p.rows) store(p.to + int64_t(group + a) * n + j, l[a]);
        }
      }
      if constexpr (R > 0) {
        float along[kHeight * R] = {};
#pragma unroll
        for (int a = 0; a < kHeight; ++a) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float ri = shared.weights[r][group + a];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              along[a * R + r] = fmaf(l[a][v], rj[r][v], along[a * R + r]);
              down[r][v] = fmaf(l[a][v], ri, down[r][v]);
            }
          }
        }
        const float sum = sums_of(along);
        constexpr int kShare = kWarp / (kHeight * R);
        if (lane % kShare == 0) shared.sums[lane / kShare % R][group + lane / kShare / R] += sum;
      }
    }
    if constexpr (R > 0) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int v = 0; v < V; ++v) shared.columns[warp][r][lane * V + v] = down[r][v];
      }
      __syncthreads();
      float* back = p.back + start;
      for (int k = threadIdx.x; k < p.count * kSpan; k += kThreads) {
        const int r = k / kSpan, c = k % kSpan;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += shared.columns[w][r][c];
        if (start + c < n) back[int64_t(r) * n + c] = sum;
      }
      __syncthreads();
    }
  }
  if constexpr (R > 0) {
    for (int k = threadIdx.x; k < p.count * kLinkRows; k += kThreads) {
      const int r = k / kLinkRows, i = k % kLinkRows;
      if (i < p.rows) p.ahead[int64_t(r) * p.ahead_stride + i] = shared.sums[r][i];
    }
  }
}

}  // namespace memkern::cuda::slots
