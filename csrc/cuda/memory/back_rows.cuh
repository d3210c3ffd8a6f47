// Backward of a step on some rows of the memory, by one block: what comes before and after the work on whole vectors in
// back_slots.cuh.
#pragma once

#include "cuda/memory/rows.cuh"

namespace memkern::cuda::slots {

// Of a batch item. Rows and slots count from the same one on: the range's indices reach into all of these.
struct BackRows {
  Range range;
  int n, width, reads, writes;  // n: between the heads of vectors over the slots
  int64_t stride;               // the same of what is left below
  bool deallocate;
  const float *memory, *old_memory;  // (., W) after and before the step
  const float *read, *write;         // (R, n), (H, n) after the step
  const float* d_reads;              // (R, W), null for zero
  const float* given_memory;         // (., W) gradient of the memory after the step, null for zero
  float* d_memory;                   // (., W) that of the memory before it; may be `given_memory`
  const float* given_write;          // (H, n), null for zero
  const float* retention;            // (n)
  // From slots_of_reads() and slots_of_write().
  const float *d_content, *read_own;             // (R, n), (n)
  const float *d_lookup, *scaled, *write_own;    // (H, n), (H, n), (n)
  // Left for the whole item: (heads, .), and sums over the range, (R + 2 H, W) and (H, W).
  float *read_dots, *read_norms, *along, *d_write, *write_dots, *write_norms, *d_retention;
  float *columns, *key_columns;

  __device__ __forceinline__ float scale(int i) const { return deallocate ? retention[i] : 1.0f; }
};

// The products of the new memory's rows with the read keys, and with the gradients of the reads.
template <class Said>
__device__ __forceinline__ void rows_of_reads(const BackRows& q, const Said& said) {
  row_dots(q.memory, q.range, q.width, said.read_keys, q.reads, [&](int i, int r, float dot, float square) {
    q.read_dots[r * q.stride + i] = dot;
    q.read_norms[i] = square;
  });
  if (q.d_reads == nullptr) return;
  row_dots(q.memory, q.range, q.width, q.d_reads, q.reads,
           [&](int i, int r, float dot, float) { q.along[r * q.stride + i] = dot; });
}

// From the gradients of the new memory and of the reads to that of the memory after deallocation, but for the write
// lookup's share; and to those of the write weights.
template <class Said>
__device__ __forceinline__ void rows_of_write(const BackRows& q, const Said& said, Columns& sums) {
  const int n = q.n, width = q.width, lane = threadIdx.x % kWarp;
  // What came, what the read lookup and the reads add.
  each_element(q.range, width, [&](int i, int k) {
    const int64_t at = int64_t(i) * width + k;
    float sum = fmaf(-q.read_own[i], q.memory[at], q.given_memory == nullptr ? 0.0f : q.given_memory[at]);
    for (int r = 0; r < q.reads; ++r) {
      sum = fmaf(q.d_content[int64_t(r) * n + i], said.read_keys[int64_t(r) * width + k], sum);
      if (q.d_reads != nullptr) sum = fmaf(q.read[int64_t(r) * n + i], q.d_reads[int64_t(r) * width + k], sum);
    }
    q.d_memory[at] = sum;
  });
  __syncthreads();
  column_sums(
      q.range, width, q.reads, sums,
      [&](int i, int r, int k) { return q.d_content[int64_t(r) * n + i] * q.memory[int64_t(i) * width + k]; },
      [&](int r, int k, float sum) { q.columns[int64_t(r) * width + k] = sum; });
  column_sums(
      q.range, width, q.writes, sums,
      [&](int i, int h, int k) { return q.write[int64_t(h) * n + i] * q.d_memory[int64_t(i) * width + k]; },
      [&](int h, int k, float sum) { q.columns[int64_t(q.reads + h) * width + k] = sum; });
  // What head h erases from.
  auto left = [&](int i, int h, int k) {
    return erased(q.old_memory[int64_t(i) * width + k] * q.scale(i), q.write, said.erase_vectors, q.writes, n, width, i,
                  k, h);
  };
  column_sums(
      q.range, width, q.writes, sums,
      [&](int i, int h, int k) {
        return -q.write[int64_t(h) * n + i] * (q.d_memory[int64_t(i) * width + k] * left(i, h, k));
      },
      [&](int h, int k, float sum) { q.columns[int64_t(q.reads + q.writes + h) * width + k] = sum; });
  for (int i = q.range.begin + int(threadIdx.x) / kWarp; i < q.range.end; i += kWarps) {
    for (int h = 0; h < q.writes; ++h) {
      float sum = 0.0f;
      for (int k = lane; k < width; k += kWarp) {
        const int64_t at = int64_t(h) * width + k;
        const float gained = fmaf(-left(i, h, k), said.erase_vectors[at], said.write_vectors[at]);
        sum = fmaf(q.d_memory[int64_t(i) * width + k], gained, sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        q.d_write[h * q.stride + i] = sum + (q.given_write == nullptr ? 0.0f : q.given_write[int64_t(h) * n + i]);
      }
    }
  }
  __syncthreads();
  each_element(q.range, width, [&](int i, int k) {
    float& cell = q.d_memory[int64_t(i) * width + k];
    cell = erased(cell, q.write, said.erase_vectors, q.writes, n, width, i, k, -1);
  });
  row_dots(q.old_memory, q.range, width, said.write_keys, q.writes, [&](int i, int h, float dot, float square) {
    q.write_dots[h * q.stride + i] = dot * q.scale(i);
    q.write_norms[i] = square * q.scale(i) * q.scale(i);
  });
}

// Adds the write lookup's share to the gradient of the memory, and takes the retention out of it.
template <class Said>
__device__ __forceinline__ void rows_of_lookup(const BackRows& q, const Said& said, Columns& sums) {
  const int n = q.n, width = q.width, lane = threadIdx.x % kWarp;
  for (int i = q.range.begin + int(threadIdx.x) / kWarp; i < q.range.end; i += kWarps) {
    float along = 0.0f;
    for (int k = lane; k < width; k += kWarp) {
      const int64_t at = int64_t(i) * width + k;
      const float m = q.old_memory[at];
      float sum = fmaf(-q.write_own[i], m, q.d_memory[at]);
      for (int h = 0; h < q.writes; ++h) {
        sum = fmaf(q.d_lookup[int64_t(h) * n + i], said.write_keys[int64_t(h) * width + k], sum);
      }
      along = fmaf(sum, m, along);
      q.d_memory[at] = q.deallocate ? sum * q.retention[i] : sum;
    }
    along = warp_sum(along);
    if (lane == 0) q.d_retention[i] = q.deallocate ? along : 0.0f;
  }
  column_sums(
      q.range, width, q.writes, sums,
      [&](int i, int h, int k) { return q.scaled[int64_t(h) * n + i] * q.old_memory[int64_t(i) * width + k]; },
      [&](int h, int k, float sum) { q.key_columns[int64_t(h) * width + k] = sum; });
}

}  // namespace memkern::cuda::slots
