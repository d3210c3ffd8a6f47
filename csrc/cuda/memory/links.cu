// The passes over the link matrices.
//
// A warp takes kHeight rows by kWarp packs of columns at a time. Sums along columns stay in registers for all rows of
// the block, and meet at the end of the columns; sums along rows meet in the warp and are kept in shared memory.
#include "cuda/memory/link_rows_back.cuh"

#include <initializer_list>

namespace memkern::cuda::slots {

namespace {

// Where a block is: its batch item and head, and its rows.
struct Place {
  int64_t plane, batch;
  int head, block, begin, rows;

  __device__ __forceinline__ explicit Place(const LinkSizes& s) {
    const int blocks = (s.slots + kLinkRows - 1) / kLinkRows;
    plane = blockIdx.x / blocks;
    block = int(blockIdx.x % blocks);
    batch = plane / s.write_heads;
    head = int(plane % s.write_heads);
    begin = block * kLinkRows;
    rows = min(kLinkRows, s.slots - begin);
  }
};

__device__ __forceinline__ void copy_rows(const float* from, float* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from == nullptr ? 0.0f : from[i];
}

// R read heads from `first` on, of which `count` exist; without UPDATE, `from` is already what is read.
template <int R, int V, bool UPDATE>
__global__ void __launch_bounds__(kThreads, 1) forward(const LinkPass p, int first, int count) {
  __shared__ LinkTile<R, V> shared;
  const Place at(p.sizes);
  const int n = p.sizes.slots, heads = p.sizes.read_heads, blocks = (n + kLinkRows - 1) / kLinkRows;
  const int64_t offset = (at.plane * n + at.begin) * n;
  const float* from = p.from + offset;
  float* to = UPDATE ? p.to + offset : nullptr;
  if (!takes_step(p.sizes.step_mask, p.sizes.mask_stride, at.batch)) {
    if (UPDATE && from != to) copy_rows(from, to, int64_t(at.rows) * n);
    return;
  }
  LinkRows rows{n, at.begin, at.rows, count, from, to};
  if (UPDATE) {
    rows.write = p.write + at.plane * n;
    rows.precedence = p.precedence + at.plane * n;
  }
  if (R > 0) {
    rows.reads = p.reads + (at.batch * heads + first) * n;
    rows.ahead = p.ahead + (at.plane * heads + first) * n + at.begin;
    rows.ahead_stride = n;
    rows.back = p.back + ((at.plane * blocks + at.block) * heads + first) * n;
  }
  link_rows<R, V, UPDATE>(rows, shared);
}

// R read heads as above; FINISH as in link_rows_back().
template <int R, int V, bool FINISH>
__global__ void __launch_bounds__(kThreads, 1) backward(const LinkBackward p, int first, int count) {
  __shared__ LinkBackTile<R, V> shared;
  const Place at(p.sizes);
  const int n = p.sizes.slots, heads = p.sizes.read_heads, writes = p.sizes.write_heads;
  const int blocks = (n + kLinkRows - 1) / kLinkRows;
  const int64_t offset = (at.plane * n + at.begin) * n, block = at.plane * blocks + at.block;
  const float* grad = p.grad == nullptr ? nullptr : p.grad + offset;
  float* d_links = p.d_links + offset;
  if (!takes_step(p.sizes.step_mask, p.sizes.mask_stride, at.batch)) {
    if (grad != d_links) copy_rows(grad, d_links, int64_t(at.rows) * n);
    return;
  }
  LinkRowsBack rows{n, at.begin, at.rows, count, at.head, writes, p.links + offset, grad, d_links};
  rows.write = p.write + at.plane * n;
  rows.precedence = p.precedence + at.plane * n;
  if (R > 0) {
    rows.reads = p.reads + (at.batch * heads + first) * n;
    rows.d_reads = p.d_reads + (at.batch * heads + first) * n;
    rows.modes = p.modes + at.batch * p.mode_stride + int64_t(first) * (1 + 2 * writes);
    rows.ahead = p.ahead + (at.plane * heads + first) * n + at.begin;
    rows.ahead_stride = n;
    rows.back = p.back + (block * heads + first) * n;
  }
  if (FINISH) {
    rows.row = p.row + at.plane * n + at.begin;
    rows.column = p.column + block * 2 * n;
  }
  link_rows_back<R, V, FINISH>(rows, shared);
}

// d_links = sum_r d_ahead_i r_j + r_i d_back_j, over all heads by passes; and the two products with the links.
template <int R, int V>
__global__ void __launch_bounds__(kThreads, 1) directional(const DirectionalBackward p, int first, int count) {
  constexpr int kSpan = kWarp * V;
  __shared__ float columns[kWarps][R][kSpan];
  __shared__ float sums[R][kLinkRows], weights[R][kLinkRows], slopes[R][kLinkRows];
  const Place at(p.sizes);
  const int n = p.sizes.slots, heads = p.sizes.read_heads;
  const int64_t offset = (at.plane * n + at.begin) * n, rows = (at.plane * heads + first) * n;
  const float* links = p.links + offset;
  float* d_links = p.d_links + offset;
  const float* reads = p.reads + (at.batch * heads + first) * n;
  const float* d_ahead = p.d_ahead == nullptr ? nullptr : p.d_ahead + rows;
  const float* d_back = p.d_back == nullptr ? nullptr : p.d_back + rows;
  for (int i = threadIdx.x; i < kLinkRows; i += kThreads) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool there = i < at.rows && r < count;
      const int64_t place = int64_t(r) * n + at.begin + i;
      weights[r][i] = there ? reads[place] : 0.0f;
      slopes[r][i] = there && d_ahead != nullptr ? d_ahead[place] : 0.0f;
      sums[r][i] = 0.0f;
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int start = 0; start < n; start += kSpan) {
    const int j = start + lane * V;
    const bool inside = j < n;
    float rj[R][V], gj[R][V], down[R][V] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      load_at(reads + int64_t(r) * n + j, inside && r < count, rj[r]);
      load_at(d_back + int64_t(r) * n + j, inside && r < count && d_back != nullptr, gj[r]);
    }
    for (int group = warp * kHeight; group < at.rows; group += kWarps * kHeight) {
      float l[kHeight][V], d[kHeight][V], along[kHeight * R] = {};
#pragma unroll
      for (int a = 0; a < kHeight; ++a) {
        const bool there = inside && group + a < at.rows;
        load_at(links + int64_t(group + a) * n + j, there, l[a]);
        load_at(d_links + int64_t(group + a) * n + j, there && first > 0, d[a]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float ri = weights[r][group + a], gi = slopes[r][group + a];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            d[a][v] = fmaf(gi, rj[r][v], d[a][v]);
            d[a][v] = fmaf(ri, gj[r][v], d[a][v]);
            along[a * R + r] = fmaf(l[a][v], gj[r][v], along[a * R + r]);
            down[r][v] = fmaf(l[a][v], gi, down[r][v]);
          }
        }
        if (there) store(d_links + int64_t(group + a) * n + j, d[a]);
      }
      const float sum = sums_of(along);
      constexpr int kShare = kWarp / (kHeight * R);
      if (lane % kShare == 0) sums[lane / kShare % R][group + lane / kShare / R] += sum;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int v = 0; v < V; ++v) columns[warp][r][lane * V + v] = down[r][v];
    }
    __syncthreads();
    const int blocks = (n + kLinkRows - 1) / kLinkRows;
    float* out = p.down + ((at.plane * blocks + at.block) * heads + first) * n + start;
    for (int k = threadIdx.x; k < count * kSpan; k += kThreads) {
      const int r = k / kSpan, c = k % kSpan;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += columns[w][r][c];
      if (start + c < n) out[int64_t(r) * n + c] = sum;
    }
    __syncthreads();
  }
  for (int k = threadIdx.x; k < count * kLinkRows; k += kThreads) {
    const int r = k / kLinkRows, i = k % kLinkRows;
    if (i < at.rows) p.along[rows + int64_t(r) * n + at.begin + i] = sums[r][i];
  }
}

bool packs(int n, std::initializer_list<const void*> pointers) {
  bool aligned = n % 4 == 0;
  for (const void* p : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return aligned;
}

unsigned int grid_of(const LinkSizes& s) {
  return static_cast<unsigned int>(s.batch * s.write_heads * link_blocks(s.slots));
}

}  // namespace

cudaError_t link_pass(LinkPass p, cudaStream_t stream) {
  const unsigned int grid = grid_of(p.sizes);
  const bool wide = packs(p.sizes.slots, {p.from, p.to, p.write, p.precedence, p.reads});
  if (p.reads == nullptr) {
    if (wide) {
      forward<0, 4, true><<<grid, kThreads, 0, stream>>>(p, 0, 0);
    } else {
      forward<0, 1, true><<<grid, kThreads, 0, stream>>>(p, 0, 0);
    }
    return cudaGetLastError();
  }
  bool update = p.to != nullptr;
  for (int first = 0; first < p.sizes.read_heads; first += kReads) {
    const int count = p.sizes.read_heads - first < kReads ? p.sizes.read_heads - first : kReads;
#define MK_PASS(V)                                                             \
  if (update) {                                                                \
    forward<kReads, V, true><<<grid, kThreads, 0, stream>>>(p, first, count);  \
  } else {                                                                     \
    forward<kReads, V, false><<<grid, kThreads, 0, stream>>>(p, first, count); \
  }
    if (wide) {
      MK_PASS(4)
    } else {
      MK_PASS(1)
    }
#undef MK_PASS
    if (update) {
      p.from = p.to;
      update = false;
    }
  }
  return cudaGetLastError();
}

cudaError_t link_pass_backward(LinkBackward p, cudaStream_t stream) {
  const unsigned int grid = grid_of(p.sizes);
  const bool wide = packs(p.sizes.slots, {p.links, p.grad, p.d_links, p.write, p.precedence, p.reads, p.d_reads});
  if (p.reads == nullptr) {
    if (wide) {
      backward<0, 4, true><<<grid, kThreads, 0, stream>>>(p, 0, 0);
    } else {
      backward<0, 1, true><<<grid, kThreads, 0, stream>>>(p, 0, 0);
    }
    return cudaGetLastError();
  }
  for (int first = 0; first < p.sizes.read_heads; first += kReads) {
    const int left = p.sizes.read_heads - first, count = left < kReads ? left : kReads;
    const bool finish = left <= kReads;
#define MK_PASS(V)                                                              \
  if (finish) {                                                                 \
    backward<kReads, V, true><<<grid, kThreads, 0, stream>>>(p, first, count);  \
  } else {                                                                      \
    backward<kReads, V, false><<<grid, kThreads, 0, stream>>>(p, first, count); \
  }
    if (wide) {
      MK_PASS(4)
    } else {
      MK_PASS(1)
    }
#undef MK_PASS
    p.grad = p.d_links;
  }
  return cudaGetLastError();
}

cudaError_t directional_pass_backward(const DirectionalBackward& p, cudaStream_t stream) {
  const unsigned int grid = grid_of(p.sizes);
  const bool wide = packs(p.sizes.slots, {p.links, p.d_links, p.reads, p.d_ahead, p.d_back});
  for (int first = 0; first < p.sizes.read_heads; first += kReads) {
    const int count = p.sizes.read_heads - first < kReads ? p.sizes.read_heads - first : kReads;
    if (wide) {
      directional<kReads, 4><<<grid, kThreads, 0, stream>>>(p, first, count);
    } else {
      directional<kReads, 1><<<grid, kThreads, 0, stream>>>(p, first, count);
    }
  }
  return cudaGetLastError();
}

}  // namespace memkern::cuda::slots
