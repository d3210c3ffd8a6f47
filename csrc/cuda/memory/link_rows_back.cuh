// Backward over some rows of a link matrix by one block, wherever the matrix lies: link_rows() and its walk, backwards.
#pragma once

#include "cuda/memory/link_rows.cuh"

namespace memkern::cuda::slots {

// Shared memory of link_rows_back(), which the next call may use at once.
template <int R, int V>
struct LinkBackTile {
  float columns[kWarps][R + 2][kWarp * V];
  float sums[R + 1][kLinkRows], weights[R > 0 ? R : 1][kLinkRows], slopes[R > 0 ? R : 1][kLinkRows];
  float written[kLinkRows], forward_share[R > 0 ? R : 1], backward_share[R > 0 ? R : 1];
};

struct LinkRowsBack {
  int n, begin, rows;       // at most kLinkRows rows from `begin` on
  int count;                // read heads, at most R
  int head, write_heads;    // whose links these are
  const float* links;       // (rows, n) before the step
  const float* grad;        // (rows, n), or null for zero
  float* d_links;           // may be `grad`
  const float* write;       // (n)
  const float* precedence;  // (n) before the step
  const float* reads;       // (count, n)
  const float* d_reads;     // (count, n)
  const float* modes;       // (count, 1 + 2 write_heads)
  float* ahead;             // (count, rows) with this stride
  int64_t ahead_stride;
  float* back;    // (count, n)
  float* row;     // (rows), with FINISH
  float* column;  // (2, n), with FINISH
};

// The products of LinkBackward for these rows. FINISH goes back through the update, otherwise d_links keeps the
// gradient of the links after the step.
template <int R, int V, bool FINISH>
__device__ __forceinline__ void link_rows_back(const LinkRowsBack& p, LinkBackTile<R, V>& shared) {
  constexpr int kSpan = kWarp * V, kColumns = R + (FINISH ? 2 : 0);
  const int n = p.n;
  __syncthreads();
  for (int i = threadIdx.x; i < kLinkRows; i += kThreads) {
    const bool inside = i < p.rows;
    shared.written[i] = inside ? p.write[p.begin + i] : 0.0f;
    shared.sums[R][i] = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool there = inside && r < p.count;
      shared.weights[r][i] = there ? p.reads[int64_t(r) * n + p.begin + i] : 0.0f;
      shared.slopes[r][i] = there ? p.d_reads[int64_t(r) * n + p.begin + i] : 0.0f;
      shared.sums[r][i] = 0.0f;
    }
  }
  if (R > 0 && threadIdx.x < R) {
    const bool there = int(threadIdx.x) < p.count;
    const float* share = p.modes + int64_t(threadIdx.x) * (1 + 2 * p.write_heads);
    shared.backward_share[threadIdx.x] = there ? share[p.head] : 0.0f;
    shared.forward_share[threadIdx.x] = there ? share[p.write_heads + 1 + p.head] : 0.0f;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int start = 0; start < n; start += kSpan) {
    const int j = start + lane * V;
    const bool inside = j < n;
    float wj[V], pj[V], rj[R > 0 ? R : 1][V], gj[R > 0 ? R : 1][V], down[kColumns][V] = {};
    load_at(p.write + j, inside, wj);
    load_at(p.precedence + j, inside, pj);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      load_at(p.reads + int64_t(r) * n + j, inside && r < p.count, rj[r]);
      load_at(p.d_reads + int64_t(r) * n + j, inside && r < p.count, gj[r]);
    }
    for (int group = warp * kHeight; group < p.rows; group += kWarps * kHeight) {
      float old[kHeight][V], d[kHeight][V], row[kHeight] = {};
#pragma unroll
      for (int a = 0; a < kHeight; ++a) {
        const bool there = inside && group + a < p.rows;
        load_at(p.links + int64_t(group + a) * n + j, there, old[a]);
        load_at(p.grad + int64_t(group + a) * n + j, there && p.grad != nullptr, d[a]);
      }
      if constexpr (R > 0) {
        float along[kHeight * R] = {};
#pragma unroll
        for (int a = 0; a < kHeight; ++a) {
          const float wi = shared.written[group + a];
          const int i = p.begin + group + a;
          float l[V];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            l[v] = i == j + v ? 0.0f : fmaf(at_least_zero((1.0f - wi) - wj[v]), old[a][v], wi * pj[v]);
          }
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float ri = shared.weights[r][group + a], gi = shared.slopes[r][group + a];
            const float grad_ahead = gi * shared.forward_share[r], share = shared.backward_share[r];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              d[a][v] = fmaf(rj[r][v], grad_ahead, d[a][v]);
              d[a][v] = fmaf(gj[r][v] * share, ri, d[a][v]);
              along[a * R + r] = fmaf(l[v], gj[r][v], along[a * R + r]);
              down[r][v] = fmaf(l[v], gi, down[r][v]);
            }
          }
        }
        const float sum = sums_of(along);
        constexpr int kShare = kWarp / (kHeight * R);
        if (lane % kShare == 0) shared.sums[lane / kShare % R][group + lane / kShare / R] += sum;
      }
      if constexpr (FINISH) {
#pragma unroll
        for (int a = 0; a < kHeight; ++a) {
          const float wi = shared.written[group + a];
          const int i = p.begin + group + a;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float kept = (1.0f - wi) - wj[v], slope = i == j + v ? 0.0f : d[a][v];
            // The clamp of the factor at zero passes the gradient where it does not bind.
            const float passed = kept >= 0.0f ? old[a][v] : 0.0f;
            row[a] = fmaf(slope, pj[v] - passed, row[a]);
            down[R][v] = fmaf(-slope, passed, down[R][v]);
            down[R + 1][v] = fmaf(slope, wi, down[R + 1][v]);
            d[a][v] = slope * at_least_zero(kept);
          }
        }
        const float sum = sums_of(row);
        constexpr int kShare = kWarp / kHeight;
        if (lane % kShare == 0) shared.sums[R][group + lane / kShare] += sum;
      }
#pragma unroll
      for (int a = 0; a < kHeight; ++a) {
        if (inside && group + a < p.rows) store(p.d_links + int64_t(group + a) * n + j, d[a]);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int v = 0; v < V; ++v) shared.columns[warp][c][lane * V + v] = down[c][v];
    }
    __syncthreads();
    for (int k = threadIdx.x; k < kColumns * kSpan; k += kThreads) {
      const int r = k / kSpan, c = k % kSpan;
      if (start + c >= n || (r < R && r >= p.count)) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared.columns[w][r][c];
      float* out = r < R ? p.back + int64_t(r) * n : p.column + int64_t(r - R) * n;
      out[start + c] = sum;
    }
    __syncthreads();
  }
  for (int k = threadIdx.x; k < (R + (FINISH ? 1 : 0)) * kLinkRows; k += kThreads) {
    const int r = k / kLinkRows, i = k % kLinkRows;
    if (i >= p.rows || (r < R && r >= p.count)) continue;
    float* out = r < R ? p.ahead + int64_t(r) * p.ahead_stride : p.row;
    out[i] = shared.sums[r][i];
  }
}

}  // namespace memkern::cuda::slots
