// Backward of memory_step, four launches: back through the reads; through the links; through the write; through the
// write lookup, the retention and the usage.
#include "cuda/memory/backward.cuh"

namespace memkern::cuda::slots {

namespace {

__device__ __forceinline__ void copy_or_zero(const float* from, float* to, int64_t count) {
  if (from == to) return;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from == nullptr ? 0.0f : from[i];
}

__device__ __forceinline__ void zero(float* x, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) x[i] = 0.0f;
}

// Sums of the parts' columns, in order: out[c][k] for c < count, from row `first` of each part's `rows`.
__device__ __forceinline__ void sum_parts(const float* columns, int parts, int rows, int first, int count, int width,
                                          float* out) {
  for (int c = 0; c < count; ++c) {
    for (int k = threadIdx.x; k < width; k += kThreads) {
      float sum = 0.0f;
      for (int part = 0; part < parts; ++part) sum += columns[(int64_t(part) * rows + first + c) * width + k];
      out[int64_t(c) * width + k] = sum;
    }
  }
}

// From the gradients of reads and read weights to those of the mixed weights and of the lookup.
__global__ void __launch_bounds__(kThreads, 1) back_through_reads(const Backward p) {
  __shared__ Shared shared;
  const Shape& s = p.shape;
  const Part part(s);
  const int64_t b = part.batch;
  const int n = s.slots, width = s.width, reads = s.read_heads, writes = s.write_heads, modes = 1 + 2 * writes;
  const Said<float*> d(s, p.d_interface, p.d_sharpness, b);
  if (!s.runs(b)) {
    if (part.index == 0) {
      zero(d.read_keys, reads * width);
      zero(d.read_strengths, reads);
      zero(d.read_modes, reads * modes);
      if (d.sharpness != nullptr) zero(d.sharpness, reads);
    }
    return;
  }
  const Said<const float*> said(s, p.interface, p.sharpness, b);
  const float* memory = p.memory + b * n * width;
  float *dots = p.read_dots + b * reads * n, *norms = p.read_norms + b * n, *d_mixed = p.d_mixed + b * reads * n;
  row_dots(memory, part.range, width, said.read_keys, reads, [&](int i, int r, float dot, float square) {
    dots[int64_t(r) * n + i] = dot;
    norms[i] = square;
  });
  if (p.grad_reads != nullptr) {
    row_dots(memory, part.range, width, p.grad_reads + s.at(b, int64_t(reads) * width), reads,
             [&](int i, int r, float dot, float) { d_mixed[int64_t(r) * n + i] = dot; });
  }
  if (!arrive_last(p.tickets + b, s.parts)) return;

  const float* given = of_item(p.grads.read_weights, b, int64_t(reads) * n);
  float* own = p.read_own + b * n;
  MK_FOR_SLOTS(i, n) own[i] = 0.0f;
  for (int r = 0; r < reads; ++r) {
    const int64_t row = int64_t(r) * n;
    float *slope = d_mixed + row, *d_found = p.d_content + b * reads * n + row;
    const float* found = p.read_content + b * reads * n + row;
    MK_FOR_SLOTS(i, n) {
      slope[i] = (p.grad_reads == nullptr ? 0.0f : slope[i]) + (given == nullptr ? 0.0f : given[row + i]);
    }
    if (said.sharpness != nullptr) {
      const float d_gamma = sharpen_backward(slope, p.mixed + b * reads * n + row, p.read_weights + b * reads * n + row,
                                             said.sharpness[r], n, shared);
      if (threadIdx.x == 0) d.sharpness[r] = d_gamma;
    }
    const float share = said.read_modes[int64_t(r) * modes + writes];
    const float factor = s.track_links ? share : share == 0.0f ? 0.0f : 1.0f;
    const float along = dot(slope, found, n, shared);
    for (int m = threadIdx.x; m < modes; m += kThreads) {
      // Those of the links come with the links.
      if (!s.track_links) {
        d.read_modes[int64_t(r) * modes + m] = 0.0f;
      } else if (m == writes) {
        d.read_modes[int64_t(r) * modes + m] = along;
      }
    }
    MK_FOR_SLOTS(i, n) d_found[i] = slope[i] * factor;
    const float key_square = square_sum(said.read_keys + int64_t(r) * width, width, shared);
    const float d_strength = content_backward(d_found, found, dots + row, norms, n, key_square, said.read_strengths[r],
                                              own, shared);
    if (threadIdx.x == 0) d.read_strengths[r] = d_strength;
  }
}

// From the gradients of one head's write weights to those of its gates, lookup and allocation.
__device__ __forceinline__ void back_through_head(const Backward& p, const Said<const float*>& said,
                                                  const Said<float*>& d, int64_t b, int h, uint32_t* held,
                                                  Shared& shared) {
  const Shape& s = p.shape;
  const int n = s.slots, writes = s.write_heads;
  const int64_t row = (b * writes + h) * n;
  const float gate = said.write_gates[h], towards = said.allocation_gates[h];
  const bool simulates = s.track_usage && h + 1 < writes;
  const float *grad = p.d_write + row, *found = p.write_content + row, *seen = p.seen + row;
  // Of the next head's usage, then of this one's.
  float *d_seen = p.d_seen + b * n, *d_allocated = p.d_allocated + b * n;
  float d_gate = 0.0f, d_towards = 0.0f, d_product = 0.0f;
  MK_FOR_SLOTS(i, n) {
    const float a = s.track_usage ? p.allocation[row + i] : 1.0f / float(n), c = found[i], g = grad[i];
    d_gate = fmaf(g, a * towards + c * (1.0f - towards), d_gate);
    d_towards = fmaf(g, a - c, d_towards);
    p.d_lookup[row + i] = g * (gate * (1.0f - towards));
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
  if (threadIdx.x == 0) {
    d.write_gates[h] = sum + product * towards;
    d.allocation_gates[h] = (change + product) * gate;
  }
  if (s.track_usage) {
    const Order order = order_of(p.order, b, n);
    fill(order, seen, n, held, shared);
    allocate_backward(order, seen, d_allocated, n, d_seen, shared);
  }
}

// From the gradients of the new memory, links, precedence and write weights to those of the erased memory, of the
// usage and of the write lookup.
__global__ void __launch_bounds__(kThreads, 1) back_through_write(const Backward p) {
  __shared__ Shared shared;
  __shared__ uint32_t held[kRanked];
  __shared__ Columns sums;
  const Shape& s = p.shape;
  const Part part(s);
  const int64_t b = part.batch;
  const int n = s.slots, width = s.width, reads = s.read_heads, writes = s.write_heads, modes = 1 + 2 * writes;
  const int rows = reads + 2 * writes, lane = threadIdx.x % kWarp;
  const int64_t cells = int64_t(n) * width;
  const Said<float*> d(s, p.d_interface, p.d_sharpness, b);
  const float* given = of_item(p.grads.memory, b, cells);
  float* d_memory = p.d_state.memory + b * cells;
  float* d_write = p.d_write + b * writes * n;
  if (!s.runs(b)) {
    if (given != d_memory) {
      each_element(part.range, width, [&](int i, int k) {
        const int64_t at = int64_t(i) * width + k;
        d_memory[at] = given == nullptr ? 0.0f : given[at];
      });
    }
    if (part.index == 0) {
      for (float* x : {d.write_strengths, d.allocation_gates, d.write_gates}) zero(x, writes);
      for (float* x : {d.write_keys, d.write_vectors, d.erase_vectors}) zero(x, writes * width);
      if (s.track_links) {
        copy_or_zero(of_item(p.grads.precedence, b, int64_t(writes) * n), p.d_state.precedence + b * writes * n,
                     int64_t(writes) * n);
      }
    }
    return;
  }
  const Said<const float*> said(s, p.interface, p.sharpness, b);
  const float *memory = p.memory + b * cells, *old_memory = p.old.memory + b * cells;
  const float *old_read = p.old.read_weights + b * reads * n, *read = p.read_weights + b * reads * n;
  const float* write = p.write_weights + b * writes * n;
  const float *d_content = p.d_content + b * reads * n, *read_own = p.read_own + b * n;
  const float* d_reads = p.grad_reads == nullptr ? nullptr : p.grad_reads + s.at(b, int64_t(reads) * width);
  float* retention = p.retention + b * n;
  auto scale = [&](int i) { return s.deallocate ? retention[i] : 1.0f; };
  for (int i = part.range.begin + int(threadIdx.x); i < part.range.end; i += kThreads) {
    retention[i] = retention_at(old_read, said.free_gates, reads, n, i);
  }
  // Of the new memory: what came, what the read lookup and the reads add.
  each_element(part.range, width, [&](int i, int k) {
    const int64_t at = int64_t(i) * width + k;
    float sum = fmaf(-read_own[i], memory[at], given == nullptr ? 0.0f : given[at]);
    for (int r = 0; r < reads; ++r) {
      sum = fmaf(d_content[int64_t(r) * n + i], said.read_keys[int64_t(r) * width + k], sum);
      if (d_reads != nullptr) sum = fmaf(read[int64_t(r) * n + i], d_reads[int64_t(r) * width + k], sum);
    }
    d_memory[at] = sum;
  });
  __syncthreads();
  float* columns = p.columns + (b * s.parts + part.index) * rows * width;
  column_sums(
      part.range, width, reads, sums,
      [&](int i, int r, int k) { return d_content[int64_t(r) * n + i] * memory[int64_t(i) * width + k]; },
      [&](int r, int k, float sum) { columns[int64_t(r) * width + k] = sum; });
  column_sums(
      part.range, width, writes, sums,
      [&](int i, int h, int k) { return write[int64_t(h) * n + i] * d_memory[int64_t(i) * width + k]; },
      [&](int h, int k, float sum) { columns[int64_t(reads + h) * width + k] = sum; });
  // What head h erases from.
  auto left = [&](int i, int h, int k) {
    return erased(old_memory[int64_t(i) * width + k] * scale(i), write, said.erase_vectors, writes, n, width, i, k, h);
  };
  column_sums(
      part.range, width, writes, sums,
      [&](int i, int h, int k) {
        return -write[int64_t(h) * n + i] * (d_memory[int64_t(i) * width + k] * left(i, h, k));
      },
      [&](int h, int k, float sum) { columns[int64_t(reads + writes + h) * width + k] = sum; });
  const float* given_write = of_item(p.grads.write_weights, b, int64_t(writes) * n);
  for (int i = part.range.begin + int(threadIdx.x) / kWarp; i < part.range.end; i += kWarps) {
    for (int h = 0; h < writes; ++h) {
      float sum = 0.0f;
      for (int k = lane; k < width; k += kWarp) {
        const int64_t at = int64_t(h) * width + k;
        const float gained = fmaf(-left(i, h, k), said.erase_vectors[at], said.write_vectors[at]);
        sum = fmaf(d_memory[int64_t(i) * width + k], gained, sum);
      }
      sum = warp_sum(sum);
      const int64_t at = int64_t(h) * n + i;
      if (lane == 0) d_write[at] = sum + (given_write == nullptr ? 0.0f : given_write[at]);
    }
  }
  __syncthreads();
  each_element(part.range, width, [&](int i, int k) {
    float& cell = d_memory[int64_t(i) * width + k];
    cell = erased(cell, write, said.erase_vectors, writes, n, width, i, k, -1);
  });
  float *dots = p.write_dots + b * writes * n, *norms = p.write_norms + b * n;
  row_dots(old_memory, part.range, width, said.write_keys, writes, [&](int i, int h, float dot, float square) {
    dots[int64_t(h) * n + i] = dot * scale(i);
    norms[i] = square * scale(i) * scale(i);
  });
  if (!arrive_last(p.tickets + b, s.parts)) return;

  const float* all = p.columns + b * s.parts * rows * width;
  sum_parts(all, s.parts, rows, 0, reads, width, d.read_keys);
  sum_parts(all, s.parts, rows, reads, writes, width, d.write_vectors);
  sum_parts(all, s.parts, rows, reads + writes, writes, width, d.erase_vectors);
  for (int r = 0; r < reads; ++r) {
    project_key(d.read_keys + int64_t(r) * width, said.read_keys + int64_t(r) * width, width, shared);
  }
  float* d_old_read = p.d_old_read + b * reads * n;
  for (int r = 0; r < reads; ++r) {
    MK_FOR_SLOTS(i, n) d_old_read[int64_t(r) * n + i] = 0.0f;
  }
  if (s.track_links) {
    const float* d_precedence = of_item(p.grads.precedence, b, int64_t(writes) * n);
    for (int h = 0; h < writes; ++h) {
      const int64_t plane = b * writes + h, row = int64_t(h) * n;
      float* to = p.d_state.precedence + plane * n;
      follow_backward(p.old.precedence + plane * n, write + row, n,
                      d_precedence == nullptr ? nullptr : d_precedence + row, to, d_write + row, shared);
      MK_FOR_SLOTS(i, n) {
        float along = 0.0f, before = 0.0f;
        for (int block = 0; block < s.link_blocks; ++block) {
          const float* column = p.column + (plane * s.link_blocks + block) * 2 * n;
          along += column[i];
          before += column[n + i];
        }
        d_write[row + i] += p.row[plane * n + i] + along;
        to[i] += before;
      }
      for (int r = 0; r < reads; ++r) {
        float *share = d.read_modes + int64_t(r) * modes, *slope = d_old_read + int64_t(r) * n;
        const float* mode = said.read_modes + int64_t(r) * modes;
        const float *ahead = p.ahead + (plane * reads + r) * n, *weights = old_read + int64_t(r) * n;
        float through_ahead = 0.0f, through_back = 0.0f;
        MK_FOR_SLOTS(i, n) {
          float back = 0.0f;
          for (int block = 0; block < s.link_blocks; ++block) {
            back += p.back[((plane * s.link_blocks + block) * reads + r) * n + i];
          }
          through_ahead = fmaf(weights[i], ahead[i], through_ahead);
          through_back = fmaf(weights[i], back, through_back);
          slope[i] = fmaf(ahead[i], mode[h], fmaf(back, mode[writes + 1 + h], slope[i]));
        }
        const float d_backward = block_sum(through_ahead, shared.sums);
        const float d_forward = block_sum(through_back, shared.sums);
        if (threadIdx.x == 0) {
          share[h] = d_backward;
          share[writes + 1 + h] = d_forward;
        }
      }
    }
  }
  if (s.track_usage) {
    float* seen = p.seen + b * writes * n;
    MK_FOR_SLOTS(i, n) {
      float u = p.usage[b * n + i];
      seen[i] = u;
      for (int h = 0; h + 1 < writes; ++h) {
        const float product = said.write_gates[h] * said.allocation_gates[h];
        u = fmaf(1.0f - u, p.allocation[(b * writes + h) * n + i] * product, u);
        seen[int64_t(h + 1) * n + i] = u;
      }
    }
  }
  MK_FOR_SLOTS(i, n) p.d_seen[b * n + i] = 0.0f;
  for (int h = writes - 1; h >= 0; --h) back_through_head(p, said, d, b, h, held, shared);
  if (s.track_usage) {
    const float* d_usage = of_item(p.grads.usage, b, n);
    MK_FOR_SLOTS(i, n) p.d_usage[b * n + i] = (d_usage == nullptr ? 0.0f : d_usage[i]) + p.d_seen[b * n + i];
  }
  float *own = p.write_own + b * n, *d_lookup = p.d_lookup + b * writes * n, *scaled = p.scaled + b * writes * n;
  MK_FOR_SLOTS(i, n) own[i] = 0.0f;
  for (int h = 0; h < writes; ++h) {
    const int64_t row = int64_t(h) * n;
    const float key_square = square_sum(said.write_keys + int64_t(h) * width, width, shared);
    const float d_strength = content_backward(d_lookup + row, p.write_content + (b * writes + h) * n, dots + row, norms,
                                              n, key_square, said.write_strengths[h], own, shared);
    if (threadIdx.x == 0) d.write_strengths[h] = d_strength;
    // The lookup saw rows times their scale: so does the key's gradient, and the part of the rows' own along
    // themselves.
    MK_FOR_SLOTS(i, n) scaled[row + i] = d_lookup[row + i] * scale(i);
  }
  MK_FOR_SLOTS(i, n) own[i] *= scale(i);
}

// Adds the write lookup's share to the gradient of the memory, and takes the retention out of it; then the state's
// other vectors.
__global__ void __launch_bounds__(kThreads, 1) back_through_lookup(const Backward p) {
  __shared__ Shared shared;
  __shared__ Columns sums;
  const Shape& s = p.shape;
  const Part part(s);
  const int64_t b = part.batch;
  const int n = s.slots, width = s.width, reads = s.read_heads, writes = s.write_heads, lane = threadIdx.x % kWarp;
  const int64_t cells = int64_t(n) * width;
  const Said<float*> d(s, p.d_interface, p.d_sharpness, b);
  const float* given_read = of_item(p.grads.read_weights, b, int64_t(reads) * n);
  const float* given_write = of_item(p.grads.write_weights, b, int64_t(writes) * n);
  float *d_read = p.d_state.read_weights + b * reads * n, *d_write = p.d_state.write_weights + b * writes * n;
  float* d_usage = s.track_usage ? p.d_state.usage + b * n : nullptr;
  if (!s.runs(b)) {
    if (part.index == 0) {
      zero(d.free_gates, reads);
      if (s.track_usage) copy_or_zero(of_item(p.grads.usage, b, n), d_usage, n);
      copy_or_zero(given_read, d_read, int64_t(reads) * n);
      copy_or_zero(given_write, d_write, int64_t(writes) * n);
    }
    return;
  }
  const Said<const float*> said(s, p.interface, p.sharpness, b);
  const float* memory = p.old.memory + b * cells;
  float* d_memory = p.d_state.memory + b * cells;
  const float *d_lookup = p.d_lookup + b * writes * n, *scaled = p.scaled + b * writes * n, *own = p.write_own + b * n;
  const float* retention = p.retention + b * n;
  float* d_retention = p.d_retention + b * n;
  for (int i = part.range.begin + int(threadIdx.x) / kWarp; i < part.range.end; i += kWarps) {
    float along = 0.0f;
    for (int k = lane; k < width; k += kWarp) {
      const int64_t at = int64_t(i) * width + k;
      const float m = memory[at];
      float sum = fmaf(-own[i], m, d_memory[at]);
      for (int h = 0; h < writes; ++h) {
        sum = fmaf(d_lookup[int64_t(h) * n + i], said.write_keys[int64_t(h) * width + k], sum);
      }
      along = fmaf(sum, m, along);
      d_memory[at] = s.deallocate ? sum * retention[i] : sum;
    }
    along = warp_sum(along);
    if (lane == 0) d_retention[i] = s.deallocate ? along : 0.0f;
  }
  float* columns = p.columns + (b * s.parts + part.index) * writes * width;
  column_sums(
      part.range, width, writes, sums,
      [&](int i, int h, int k) { return scaled[int64_t(h) * n + i] * memory[int64_t(i) * width + k]; },
      [&](int h, int k, float sum) { columns[int64_t(h) * width + k] = sum; });
  if (!arrive_last(p.tickets + b, s.parts)) return;

  sum_parts(p.columns + b * s.parts * writes * width, s.parts, writes, 0, writes, width, d.write_keys);
  for (int h = 0; h < writes; ++h) {
    project_key(d.write_keys + int64_t(h) * width, said.write_keys + int64_t(h) * width, width, shared);
  }
  const float *old_read = p.old.read_weights + b * reads * n, *old_write = p.old.write_weights + b * writes * n;
  const float* d_old_read = p.d_old_read + b * reads * n;
  for (int r = 0; r < reads; ++r) {
    MK_FOR_SLOTS(i, n) d_read[int64_t(r) * n + i] = d_old_read[int64_t(r) * n + i];
  }
  for (int h = 0; h < writes; ++h) {
    MK_FOR_SLOTS(i, n) d_write[int64_t(h) * n + i] = 0.0f;
  }
  if (s.track_usage) {
    MK_FOR_SLOTS(i, n) d_usage[i] = p.d_usage[b * n + i];
    usage_backward(d_usage, p.old.usage + b * n, old_write, writes, retention, n, d_retention,
                   s.detach_usage ? nullptr : d_write);
  }
  retention_backward(d_retention, old_read, said.free_gates, reads, n, d_read, d.free_gates, shared);
}

}  // namespace

cudaError_t back_through_step(const Backward& f, cudaStream_t stream) {
  const unsigned int blocks = f.shape.blocks();
  back_through_reads<<<blocks, kThreads, 0, stream>>>(f);
  if (f.shape.track_links) {
    const int64_t modes = int64_t(f.shape.read_heads) * (1 + 2 * f.shape.write_heads);
    LinkBackward pass{};
    pass.sizes = f.shape.links();
    pass.links = f.old.links;
    pass.grad = f.grads.links;
    pass.d_links = f.d_state.links;
    pass.write = f.write_weights;
    pass.precedence = f.old.precedence;
    pass.reads = f.old.read_weights;
    pass.d_reads = f.d_mixed;
    pass.modes = static_cast<const float*>(f.interface.read_modes) + f.shape.step * modes;
    pass.mode_stride = f.shape.steps * modes;
    pass.ahead = f.ahead;
    pass.back = f.back;
    pass.row = f.row;
    pass.column = f.column;
    MK_TRY(link_pass_backward(pass, stream));
  }
  back_through_write<<<blocks, kThreads, 0, stream>>>(f);
  back_through_lookup<<<blocks, kThreads, 0, stream>>>(f);
  return cudaGetLastError();
}

}  // namespace memkern::cuda::slots
