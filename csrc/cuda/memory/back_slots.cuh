// Backward of a step on whole vectors over the slots of a batch item, by one block or by several that all do the same.
#pragma once

#include "cuda/memory/step.cuh"

namespace memkern::cuda::slots {

// Which block this is of those that do the same. What lies in memory that they share, one of them writes.
struct Turn {
  int rank, count;

  __device__ __forceinline__ bool leads() const { return rank == 0 && threadIdx.x == 0; }
  __device__ __forceinline__ bool takes(int item) const { return item % count == rank; }
};

// Of a batch item.
struct BackSlots {
  // Before and after the step, and what the step found.
  const float *old_read, *old_write, *old_precedence, *old_usage, *usage;
  const float *read, *write, *write_content, *allocation, *read_content, *mixed;
  // Gradients of the state after the step; null for zero.
  const float *given_usage, *given_precedence, *given_read;
  // Those of the state before it; each may be the one given, and d_write may be new_d_write.
  float *d_usage, *d_precedence, *d_read, *d_write;
  // Of the reads: (R, n), but `read_norms` and `read_own` (n). d_mixed may be `given_read` and `d_read`.
  float *read_dots, *read_norms, *d_mixed, *d_content, *read_own;
  // Of the write: (H, n), but `write_norms` and `write_own` (n).
  float *write_dots, *write_norms, *new_d_write, *d_lookup, *scaled, *write_own;
  float *seen;  // (H, n) usage as each head saw it
  float *d_seen, *d_allocated, *retention, *d_retention;  // (n)
  Order order;
  uint32_t* held;
};

__device__ __forceinline__ void zero(float* x, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) x[i] = 0.0f;
}

// From the gradients of reads and read weights to those of the mixed weights and of the lookup. along(r, i): what the
// reads say of the weights.
template <class Along>
__device__ __forceinline__ void slots_of_reads(const Shape& s, const BackSlots& q, const Said<const float*>& said,
                                               const Said<float*>& d, Turn turn, const Along& along, Shared& shared) {
  const int n = s.slots, width = s.width, reads = s.read_heads, writes = s.write_heads, modes = 1 + 2 * writes;
  MK_FOR_SLOTS(i, n) q.read_own[i] = 0.0f;
  for (int r = 0; r < reads; ++r) {
    const int64_t row = int64_t(r) * n;
    float *slope = q.d_mixed + row, *d_found = q.d_content + row;
    const float* found = q.read_content + row;
    MK_FOR_SLOTS(i, n) slope[i] = along(r, i) + (q.given_read == nullptr ? 0.0f : q.given_read[row + i]);
    if (said.sharpness != nullptr) {
      const float d_gamma = sharpen_backward(slope, q.mixed + row, q.read + row, said.sharpness[r], n, shared);
      if (turn.leads()) d.sharpness[r] = d_gamma;
    }
    const float share = said.read_modes[int64_t(r) * modes + writes];
    const float factor = s.track_links ? share : share == 0.0f ? 0.0f : 1.0f;
    const float of_lookup = dot(slope, found, n, shared);
    if (turn.takes(0)) {
      for (int m = threadIdx.x; m < modes; m += kThreads) {
        // Those of the links come with the links.
        if (!s.track_links) {
          d.read_modes[int64_t(r) * modes + m] = 0.0f;
        } else if (m == writes) {
          d.read_modes[int64_t(r) * modes + m] = of_lookup;
        }
      }
    }
    MK_FOR_SLOTS(i, n) d_found[i] = slope[i] * factor;
    const float key_square = square_sum(said.read_keys + int64_t(r) * width, width, shared);
    const float d_strength = content_backward(d_found, found, q.read_dots + row, q.read_norms, n, key_square,
                                              said.read_strengths[r], q.read_own, shared);
    if (turn.leads()) d.read_strengths[r] = d_strength;
  }
}

// From the gradients of one head's write weights to those of its gates, lookup and allocation.
__device__ __forceinline__ void slots_of_head(const Shape& s, const BackSlots& q, const Said<const float*>& said,
                                              const Said<float*>& d, Turn turn, int h, Shared& shared) {
  const int n = s.slots, writes = s.write_heads;
  const int64_t row = int64_t(h) * n;
  const float gate = said.write_gates[h], towards = said.allocation_gates[h];
  const bool simulates = s.track_usage && h + 1 < writes;
  const float *grad = q.new_d_write + row, *found = q.write_content + row, *seen = q.seen + row;
  // Of the next head's usage, then of this one's.
  float *d_seen = q.d_seen, *d_allocated = q.d_allocated;
  float d_gate = 0.0f, d_towards = 0.0f, d_product = 0.0f;
  MK_FOR_SLOTS(i, n) {
    const float a = s.track_usage ? q.allocation[row + i] : 1.0f / float(n), c = found[i], g = grad[i];
    d_gate = fmaf(g, a * towards + c * (1.0f - towards), d_gate);
    d_towards = fmaf(g, a - c, d_towards);
    q.d_lookup[row + i] = g * (gate * (1.0f - towards));
    float slope = g * (gate * towards);
    if (simulates) {
      const float next = d_seen[i], u = seen[i];
      d_product = fmaf(next * (1.0f - u), a, d_product);
      slope = fmaf(next * (1.0f - u), gate * towards, slope);
      d_seen[i] = next * (1.0f - a * (gate * towards));
    }
    d_allocated[i] = slope;
  }
  const float product = block_sum(d_product, shared.sums), sum = block_sum(d_gate, shared.sums);
  const float change = block_sum(d_towards, shared.sums);
  if (turn.leads()) {
    d.write_gates[h] = sum + product * towards;
    d.allocation_gates[h] = (change + product) * gate;
  }
  if (s.track_usage) {
    fill(q.order, seen, n, q.held, shared);
    allocate_backward(q.order, seen, d_allocated, n, d_seen, shared);
  }
}

// The links' part of slots_of_write().
template <class Left>
__device__ __forceinline__ void slots_of_links(const Shape& s, const BackSlots& q, const Said<const float*>& said,
                                               const Said<float*>& d, Turn turn, const Left& left, Shared& shared) {
  const int n = s.slots, reads = s.read_heads, writes = s.write_heads, modes = 1 + 2 * writes;
  for (int h = 0; h < writes; ++h) {
    const int64_t row = int64_t(h) * n;
    float *d_write = q.new_d_write + row, *to = q.d_precedence + row;
    follow_backward(q.old_precedence + row, q.write + row, n,
                    q.given_precedence == nullptr ? nullptr : q.given_precedence + row, to, d_write, shared);
    MK_FOR_SLOTS(i, n) {
      d_write[i] += left.row(h, i) + left.column(h, 0, i);
      to[i] += left.column(h, 1, i);
    }
    for (int r = 0; r < reads; ++r) {
      float *share = d.read_modes + int64_t(r) * modes, *slope = q.d_read + int64_t(r) * n;
      const float* mode = said.read_modes + int64_t(r) * modes;
      const float* weights = q.old_read + int64_t(r) * n;
      float through_ahead = 0.0f, through_back = 0.0f;
      MK_FOR_SLOTS(i, n) {
        const float ahead = left.ahead(h, r, i), back = left.back(h, r, i);
        through_ahead = fmaf(weights[i], ahead, through_ahead);
        through_back = fmaf(weights[i], back, through_back);
        slope[i] = fmaf(ahead, mode[h], fmaf(back, mode[writes + 1 + h], slope[i]));
      }
      const float d_backward = block_sum(through_ahead, shared.sums);
      const float d_forward = block_sum(through_back, shared.sums);
      if (turn.leads()) {
        share[h] = d_backward;
        share[writes + 1 + h] = d_forward;
      }
    }
  }
}

// From the gradients of the write weights, of the links' reads and of the precedence to those of the usage and of the
// write lookup. `left` has what the rows left: columns(c, k), the sums of rows_of_write() over all rows; and of the
// links row(h, i), column(h, c, i), ahead(h, r, i) and back(h, r, i), see LinkBackward.
template <class Left>
__device__ __forceinline__ void slots_of_write(const Shape& s, const BackSlots& q, const Said<const float*>& said,
                                               const Said<float*>& d, Turn turn, const Left& left, Shared& shared) {
  const int n = s.slots, width = s.width, reads = s.read_heads, writes = s.write_heads;
  auto sum = [&](int first, int c, float* out) {
    for (int k = threadIdx.x; k < width; k += kThreads) out[int64_t(c) * width + k] = left.columns(first + c, k);
  };
  for (int h = 0; h < writes; ++h) {
    if (!turn.takes(h)) continue;
    sum(reads, h, d.write_vectors);
    sum(reads + writes, h, d.erase_vectors);
  }
  for (int r = 0; r < reads; ++r) {
    if (!turn.takes(r)) continue;
    sum(0, r, d.read_keys);
    project_key(d.read_keys + int64_t(r) * width, said.read_keys + int64_t(r) * width, width, shared);
  }
  for (int r = 0; r < reads; ++r) {
    MK_FOR_SLOTS(i, n) q.d_read[int64_t(r) * n + i] = 0.0f;
  }
  if (s.track_links) slots_of_links(s, q, said, d, turn, left, shared);
  if (s.track_usage) {
    MK_FOR_SLOTS(i, n) {
      float u = q.usage[i];
      q.seen[i] = u;
      for (int h = 0; h + 1 < writes; ++h) {
        const float product = said.write_gates[h] * said.allocation_gates[h];
        u = fmaf(1.0f - u, q.allocation[int64_t(h) * n + i] * product, u);
        q.seen[int64_t(h + 1) * n + i] = u;
      }
    }
  }
  MK_FOR_SLOTS(i, n) q.d_seen[i] = 0.0f;
  for (int h = writes - 1; h >= 0; --h) slots_of_head(s, q, said, d, turn, h, shared);
  MK_FOR_SLOTS(i, n) q.write_own[i] = 0.0f;
  auto scale = [&](int i) { return s.deallocate ? q.retention[i] : 1.0f; };
  for (int h = 0; h < writes; ++h) {
    const int64_t row = int64_t(h) * n;
    const float key_square = square_sum(said.write_keys + int64_t(h) * width, width, shared);
    const float d_strength = content_backward(q.d_lookup + row, q.write_content + row, q.write_dots + row,
                                              q.write_norms, n, key_square, said.write_strengths[h], q.write_own,
                                              shared);
    if (turn.leads()) d.write_strengths[h] = d_strength;
    // The lookup saw rows times their scale: so does the key's gradient, and the part of the rows' own along
    // themselves.
    MK_FOR_SLOTS(i, n) q.scaled[row + i] = q.d_lookup[row + i] * scale(i);
  }
  MK_FOR_SLOTS(i, n) q.write_own[i] *= scale(i);
}

// From the gradient of the retention to those of the state's vectors. key_columns(h, k): the sums of rows_of_lookup()
// over all rows.
template <class KeyColumns>
__device__ __forceinline__ void slots_of_lookup(const Shape& s, const BackSlots& q, const Said<const float*>& said,
                                                const Said<float*>& d, Turn turn, const KeyColumns& key_columns,
                                                Shared& shared) {
  const int n = s.slots, width = s.width, reads = s.read_heads, writes = s.write_heads;
  for (int h = 0; h < writes; ++h) {
    if (!turn.takes(h)) continue;
    float* to = d.write_keys + int64_t(h) * width;
    for (int k = threadIdx.x; k < width; k += kThreads) to[k] = key_columns(h, k);
    project_key(to, said.write_keys + int64_t(h) * width, width, shared);
  }
  for (int h = 0; h < writes; ++h) {
    MK_FOR_SLOTS(i, n) q.d_write[int64_t(h) * n + i] = 0.0f;
  }
  if (s.track_usage) {
    MK_FOR_SLOTS(i, n) q.d_usage[i] = (q.given_usage == nullptr ? 0.0f : q.given_usage[i]) + q.d_seen[i];
    usage_backward(q.d_usage, q.old_usage, q.old_write, writes, q.retention, n, q.d_retention,
                   s.detach_usage ? nullptr : q.d_write);
  }
  retention_backward(q.d_retention, q.old_read, said.free_gates, reads, n, q.d_read,
                     turn.takes(0) ? d.free_gates : nullptr, shared);
}

}  // namespace memkern::cuda::slots
