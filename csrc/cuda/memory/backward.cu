// Backward of memory_step, four launches: back through the reads; through the links; through the write; through the
// write lookup, the retention and the usage. All but the links' cut each batch item's memory into parts; the last part
// of an item to be done goes on with what needs all slots at once.
#include "cuda/memory/backward.cuh"

#include "cuda/memory/back_rows.cuh"
#include "cuda/memory/back_slots.cuh"

namespace memkern::cuda::slots {

namespace {

constexpr Turn kAlone{0, 1};

__device__ __forceinline__ void copy_or_zero(const float* from, float* to, int64_t count) {
  if (from == to) return;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from == nullptr ? 0.0f : from[i];
}

__device__ __forceinline__ BackRows rows_of(const Backward& p, const Part& part) {
  const Shape& s = p.shape;
  const int64_t b = part.batch, n = s.slots, width = s.width, reads = s.read_heads, writes = s.write_heads;
  const int64_t block = b * s.parts + part.index;
  BackRows q{part.range, s.slots, s.width, s.read_heads, s.write_heads, n, s.deallocate};
  q.memory = p.memory + b * n * width;
  q.old_memory = p.old.memory + b * n * width;
  q.read = p.read_weights + b * reads * n;
  q.write = p.write_weights + b * writes * n;
  q.d_reads = p.grad_reads == nullptr ? nullptr : p.grad_reads + s.at(b, reads * width);
  q.given_memory = of_item(p.grads.memory, b, n * width);
  q.d_memory = p.d_state.memory + b * n * width;
  q.given_write = of_item(p.grads.write_weights, b, writes * n);
  q.retention = p.retention + b * n;
  q.d_content = p.d_content + b * reads * n;
  q.read_own = p.read_own + b * n;
  q.d_lookup = p.d_lookup + b * writes * n;
  q.scaled = p.scaled + b * writes * n;
  q.write_own = p.write_own + b * n;
  q.read_dots = p.read_dots + b * reads * n;
  q.read_norms = p.read_norms + b * n;
  q.along = p.d_mixed + b * reads * n;
  q.d_write = p.d_write + b * writes * n;
  q.write_dots = p.write_dots + b * writes * n;
  q.write_norms = p.write_norms + b * n;
  q.d_retention = p.d_retention + b * n;
  q.columns = p.columns + block * (reads + 2 * writes) * width;
  q.key_columns = p.columns + block * writes * width;
  return q;
}

__device__ __forceinline__ BackSlots slots_of(const Backward& p, int64_t b, uint32_t* held) {
  const Shape& s = p.shape;
  const int64_t n = s.slots, reads = s.read_heads, writes = s.write_heads;
  BackSlots q{};
  q.old_read = p.old.read_weights + b * reads * n;
  q.old_write = p.old.write_weights + b * writes * n;
  q.old_precedence = of_item(p.old.precedence, b, writes * n);
  q.old_usage = of_item(p.old.usage, b, n);
  q.usage = of_item(p.usage, b, n);
  q.read = p.read_weights + b * reads * n;
  q.write = p.write_weights + b * writes * n;
  q.write_content = p.write_content + b * writes * n;
  q.allocation = of_item(p.allocation, b, writes * n);
  q.read_content = p.read_content + b * reads * n;
  q.mixed = of_item(p.mixed, b, reads * n);
  q.given_usage = of_item(p.grads.usage, b, n);
  q.given_precedence = of_item(p.grads.precedence, b, writes * n);
  q.given_read = of_item(p.grads.read_weights, b, reads * n);
  q.d_usage = of_item(p.d_state.usage, b, n);
  q.d_precedence = of_item(p.d_state.precedence, b, writes * n);
  q.d_read = p.d_state.read_weights + b * reads * n;
  q.d_write = p.d_state.write_weights + b * writes * n;
  q.read_dots = p.read_dots + b * reads * n;
  q.read_norms = p.read_norms + b * n;
  q.d_mixed = p.d_mixed + b * reads * n;
  q.d_content = p.d_content + b * reads * n;
  q.read_own = p.read_own + b * n;
  q.write_dots = p.write_dots + b * writes * n;
  q.write_norms = p.write_norms + b * n;
  q.new_d_write = p.d_write + b * writes * n;
  q.d_lookup = p.d_lookup + b * writes * n;
  q.scaled = p.scaled + b * writes * n;
  q.write_own = p.write_own + b * n;
  q.seen = p.seen + b * writes * n;
  q.d_seen = p.d_seen + b * n;
  q.d_allocated = p.d_allocated + b * n;
  q.retention = p.retention + b * n;
  q.d_retention = p.d_retention + b * n;
  q.order = order_of(p.order, b, s.slots);
  q.held = held;
  return q;
}

// What the parts and the pass over the links left, each block's sums added in order.
class Left {
 public:
  __device__ __forceinline__ Left(const Backward& p, int64_t b) : p_(p), s_(p.shape), n_(p.shape.slots), b_(b) {}

  __device__ __forceinline__ float columns(int c, int k) const {
    return parts(s_.read_heads + 2 * s_.write_heads, c, k);
  }
  __device__ __forceinline__ float key_columns(int h, int k) const { return parts(s_.write_heads, h, k); }
  __device__ __forceinline__ float row(int h, int i) const { return p_.row[plane(h) * n_ + i]; }
  __device__ __forceinline__ float column(int h, int c, int i) const {
    float sum = 0.0f;
    for (int block = 0; block < s_.link_blocks; ++block) {
      sum += p_.column[((plane(h) * s_.link_blocks + block) * 2 + c) * n_ + i];
    }
    return sum;
  }
  __device__ __forceinline__ float ahead(int h, int r, int i) const {
    return p_.ahead[(plane(h) * s_.read_heads + r) * n_ + i];
  }
  __device__ __forceinline__ float back(int h, int r, int i) const {
    float sum = 0.0f;
    for (int block = 0; block < s_.link_blocks; ++block) {
      sum += p_.back[((plane(h) * s_.link_blocks + block) * s_.read_heads + r) * n_ + i];
    }
    return sum;
  }

 private:
  __device__ __forceinline__ int64_t plane(int h) const { return b_ * s_.write_heads + h; }
  __device__ __forceinline__ float parts(int rows, int c, int k) const {
    float sum = 0.0f;
    for (int part = 0; part < s_.parts; ++part) {
      sum += p_.columns[((b_ * s_.parts + part) * rows + c) * s_.width + k];
    }
    return sum;
  }

  const Backward& p_;
  const Shape& s_;
  const int64_t n_, b_;
};

__global__ void __launch_bounds__(kThreads, 1) back_through_reads(const Backward p) {
  __shared__ Shared shared;
  const Shape& s = p.shape;
  const Part part(s);
  const int64_t b = part.batch;
  const int n = s.slots, reads = s.read_heads;
  const Said<float*> d(s, p.d_interface, p.d_sharpness, b);
  if (!s.runs(b)) {
    if (part.index == 0) {
      zero(d.read_keys, reads * s.width);
      zero(d.read_strengths, reads);
      zero(d.read_modes, reads * (1 + 2 * s.write_heads));
      if (d.sharpness != nullptr) zero(d.sharpness, reads);
    }
    return;
  }
  const Said<const float*> said(s, p.interface, p.sharpness, b);
  rows_of_reads(rows_of(p, part), said);
  if (!arrive_last(p.tickets + b, s.parts)) return;

  const BackSlots q = slots_of(p, b, nullptr);
  auto along = [&](int r, int i) { return p.grad_reads == nullptr ? 0.0f : q.d_mixed[int64_t(r) * n + i]; };
  slots_of_reads(s, q, said, d, kAlone, along, shared);
}

__global__ void __launch_bounds__(kThreads, 1) back_through_write(const Backward p) {
  __shared__ Shared shared;
  __shared__ uint32_t held[kRanked];
  __shared__ Columns sums;
  const Shape& s = p.shape;
  const Part part(s);
  const int64_t b = part.batch;
  const int n = s.slots, width = s.width, writes = s.write_heads;
  const Said<float*> d(s, p.d_interface, p.d_sharpness, b);
  const BackRows rows = rows_of(p, part);
  if (!s.runs(b)) {
    if (rows.given_memory != rows.d_memory) {
      each_element(part.range, width, [&](int i, int k) {
        const int64_t at = int64_t(i) * width + k;
        rows.d_memory[at] = rows.given_memory == nullptr ? 0.0f : rows.given_memory[at];
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
  const float* old_read = p.old.read_weights + b * s.read_heads * n;
  for (int i = part.range.begin + int(threadIdx.x); i < part.range.end; i += kThreads) {
    p.retention[b * n + i] = retention_at(old_read, said.free_gates, s.read_heads, n, i);
  }
  rows_of_write(rows, said, sums);
  if (!arrive_last(p.tickets + b, s.parts)) return;

  slots_of_write(s, slots_of(p, b, held), said, d, kAlone, Left(p, b), shared);
}

__global__ void __launch_bounds__(kThreads, 1) back_through_lookup(const Backward p) {
  __shared__ Shared shared;
  __shared__ Columns sums;
  const Shape& s = p.shape;
  const Part part(s);
  const int64_t b = part.batch;
  const int64_t n = s.slots, reads = s.read_heads, writes = s.write_heads;
  const Said<float*> d(s, p.d_interface, p.d_sharpness, b);
  if (!s.runs(b)) {
    if (part.index == 0) {
      zero(d.free_gates, s.read_heads);
      if (s.track_usage) copy_or_zero(of_item(p.grads.usage, b, n), p.d_state.usage + b * n, n);
      copy_or_zero(of_item(p.grads.read_weights, b, reads * n), p.d_state.read_weights + b * reads * n, reads * n);
      copy_or_zero(of_item(p.grads.write_weights, b, writes * n), p.d_state.write_weights + b * writes * n,
                   writes * n);
    }
    return;
  }
  const Said<const float*> said(s, p.interface, p.sharpness, b);
  rows_of_lookup(rows_of(p, part), said, sums);
  if (!arrive_last(p.tickets + b, s.parts)) return;

  const Left left(p, b);
  auto key_columns = [&](int h, int k) { return left.key_columns(h, k); };
  slots_of_lookup(s, slots_of(p, b, nullptr), said, d, kAlone, key_columns, shared);
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
