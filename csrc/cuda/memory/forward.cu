// Forward of memory_step, three launches: the write weights; the links; the memory, the lookup in it and the reads. A
// scan is a loop of them.
//
// The first and the last cut each batch item's memory into parts. The last part of an item to be done goes on with
// what needs all slots at once.
#include "cuda/memory/resident.cuh"
#include "cuda/memory/step.cuh"

namespace memkern::cuda {

namespace slots {

namespace {

struct Forward {
  Shape shape;
  MemoryFields<const float*> from;
  MemoryFields<float*> to;  // each may be what it comes from
  InterfaceFields<const void*> interface;
  const void* sharpness;
  float* reads;
  float *write_content, *allocation, *read_content, *mixed;  // (B, ..., N); mixed is null when it is the read weights
  float *ahead, *back;
  float* seen;  // (B, N) usage as a write head sees it
  Order order;
  int32_t* tickets;
};

__device__ __forceinline__ void copy(const float* from, float* to, int count) {
  if (from == to) return;
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
}

// Usage, write lookup, allocation and the write weights.
__global__ void __launch_bounds__(kThreads, 1) write_weights(const Forward p) {
  __shared__ Shared shared;
  __shared__ uint32_t held[kRanked];
  const Shape& s = p.shape;
  const Part part(s);
  const int64_t b = part.batch;
  const int n = s.slots, reads = s.read_heads, writes = s.write_heads;
  const float* old_write = p.from.write_weights + b * writes * n;
  float* new_write = p.to.write_weights + b * writes * n;
  const float* old_usage = p.from.usage + b * n;
  float* new_usage = s.track_usage ? p.to.usage + b * n : nullptr;
  if (!s.runs(b)) {
    if (part.index == 0) {
      if (s.track_usage) copy(old_usage, new_usage, n);
      copy(old_write, new_write, writes * n);
    }
    return;
  }
  const Said<const float*> said(s, p.interface, p.sharpness, b);
  const float* read = p.from.read_weights + b * reads * n;
  float* content = p.write_content + b * writes * n;
  row_dots(p.from.memory + b * n * s.width, part.range, s.width, said.write_keys, writes,
           [&](int i, int h, float dot, float square) {
             const float scale = s.deallocate ? retention_at(read, said.free_gates, reads, n, i) : 1.0f;
             content[int64_t(h) * n + i] = dot * scale * inverse_norm(square * scale * scale);
           });
  if (!arrive_last(p.tickets + b, s.parts)) return;

  float* seen = p.seen + b * n;
  if (s.track_usage) {
    MK_FOR_SLOTS(i, n) {
      const float u = used(old_usage[i], written_at(old_write, writes, n, i),
                           retention_at(read, said.free_gates, reads, n, i));
      new_usage[i] = u;
      seen[i] = u;
    }
  }
  const Order order = order_of(p.order, b, n);
  for (int h = 0; h < writes; ++h) {
    const float* key = said.write_keys + int64_t(h) * s.width;
    const float factor = said.write_strengths[h] * inverse_norm(square_sum(key, s.width, shared));
    float* found = content + int64_t(h) * n;
    softmax(found, n, factor, nullptr, shared);
    if (s.track_usage) fill(order, seen, n, held, shared);
    const float gate = said.write_gates[h], towards = said.allocation_gates[h];
    MK_FOR_SLOTS(i, n) {
      float a = 1.0f / float(n);
      if (s.track_usage) {
        const float u = seen[i];
        a = allocation_at(order, u, i);
        p.allocation[(b * writes + h) * n + i] = a;
        seen[i] = fmaf(1.0f - u, a * (gate * towards), u);
      }
      new_write[int64_t(h) * n + i] = (a * towards + found[i] * (1.0f - towards)) * gate;
    }
  }
}

// The memory, the read lookup, the mix with what the links say, and the reads.
__global__ void __launch_bounds__(kThreads, 1) read_memory(const Forward p) {
  __shared__ Shared shared;
  __shared__ Columns columns;
  const Shape& s = p.shape;
  const Part part(s);
  const int64_t b = part.batch;
  const int n = s.slots, width = s.width, reads = s.read_heads, writes = s.write_heads, modes = 1 + 2 * writes;
  const float* old_memory = p.from.memory + b * n * width;
  float* memory = p.to.memory + b * n * width;
  const float* old_read = p.from.read_weights + b * reads * n;
  float* read = p.to.read_weights + b * reads * n;
  float* result = p.reads + s.at(b, int64_t(reads) * width);
  const float* old_precedence = p.from.precedence + b * writes * n;
  float* precedence = s.track_links ? p.to.precedence + b * writes * n : nullptr;
  if (!s.runs(b)) {
    if (old_memory != memory) {
      each_element(part.range, width, [&](int i, int k) {
        const int64_t at = int64_t(i) * width + k;
        memory[at] = old_memory[at];
      });
    }
    if (part.index == 0) {
      copy(old_read, read, reads * n);
      if (s.track_links) copy(old_precedence, precedence, writes * n);
      for (int i = threadIdx.x; i < reads * width; i += kThreads) result[i] = 0.0f;
    }
    return;
  }
  const Said<const float*> said(s, p.interface, p.sharpness, b);
  const float* write = p.to.write_weights + b * writes * n;
  each_element(part.range, width, [&](int i, int k) {
    const int64_t at = int64_t(i) * width + k;
    const float scale = s.deallocate ? retention_at(old_read, said.free_gates, reads, n, i) : 1.0f;
    memory[at] = written(old_memory[at] * scale, write, said.erase_vectors, said.write_vectors, writes, n, width, i, k);
  });
  __syncthreads();
  float* content = p.read_content + b * reads * n;
  row_dots(memory, part.range, width, said.read_keys, reads, [&](int i, int r, float dot, float square) {
    content[int64_t(r) * n + i] = dot * inverse_norm(square);
  });
  if (!arrive_last(p.tickets + b, s.parts)) return;

  if (s.track_links) {
    for (int h = 0; h < writes; ++h) {
      const int64_t at = int64_t(h) * n;
      follow(old_precedence + at, write + at, n, precedence + at, shared);
    }
  }
  for (int r = 0; r < reads; ++r) {
    const float* key = said.read_keys + int64_t(r) * width;
    const float factor = said.read_strengths[r] * inverse_norm(square_sum(key, width, shared));
    float* found = content + int64_t(r) * n;
    softmax(found, n, factor, nullptr, shared);
    const float* share = said.read_modes + int64_t(r) * modes;
    float* mixed = p.mixed == nullptr ? read + int64_t(r) * n : p.mixed + (b * reads + r) * n;
    MK_FOR_SLOTS(i, n) {
      if (!s.track_links) {
        mixed[i] = share[writes] == 0.0f ? 0.0f : found[i];
        continue;
      }
      float w = found[i] * share[writes];
      for (int h = 0; h < writes; ++h) {
        const int64_t plane = b * writes + h;
        float back = 0.0f;
        for (int block = 0; block < s.link_blocks; ++block) {
          back += p.back[((plane * s.link_blocks + block) * reads + r) * n + i];
        }
        w = fmaf(back, share[h], w);
        w = fmaf(p.ahead[(plane * reads + r) * n + i], share[writes + 1 + h], w);
      }
      mixed[i] = w;
    }
    if (said.sharpness != nullptr) sharpen(mixed, said.sharpness[r], n, read + int64_t(r) * n, shared);
  }
  __syncthreads();
  column_sums(
      Range{0, n}, width, reads, columns,
      [&](int i, int r, int k) { return read[int64_t(r) * n + i] * memory[int64_t(i) * width + k]; },
      [&](int r, int k, float sum) { result[int64_t(r) * width + k] = sum; });
}

Forward carve(const MemorySizes& sizes, bool kept_write, bool kept_allocation, bool kept_read, bool kept_mixed,
              Pieces& pieces) {
  const int64_t b = sizes.batch, n = sizes.slots, reads = sizes.read_heads, writes = sizes.write_heads;
  Forward f{};
  if (!kept_write) f.write_content = pieces.take(b * writes * n);
  if (!kept_allocation) f.allocation = pieces.take(b * writes * n);
  if (!kept_read) f.read_content = pieces.take(b * reads * n);
  if (!kept_mixed) f.mixed = pieces.take(b * reads * n);
  if (sizes.track_links) {
    f.ahead = pieces.take(b * writes * reads * n);
    f.back = pieces.take(b * writes * link_blocks(n) * reads * n);
  }
  f.seen = pieces.take(b * n);
  f.order = pieces.order(b, n);
  return f;
}

cudaError_t run_step(const Forward& f, cudaStream_t stream) {
  const unsigned int blocks = f.shape.blocks();
  write_weights<<<blocks, kThreads, 0, stream>>>(f);
  if (f.shape.track_links) {
    LinkPass pass{};
    pass.sizes = f.shape.links();
    pass.from = f.from.links;
    pass.to = f.to.links;
    pass.write = f.to.write_weights;
    pass.precedence = f.from.precedence;
    pass.reads = f.from.read_weights;
    pass.ahead = f.ahead;
    pass.back = f.back;
    MK_TRY(link_pass(pass, stream));
  }
  read_memory<<<blocks, kThreads, 0, stream>>>(f);
  return cudaGetLastError();
}

}  // namespace

}  // namespace slots

int64_t memory_forward_scratch(const MemorySizes& sizes) {
  slots::Pieces pieces(nullptr);
  slots::carve(sizes, false, false, false, false, pieces);
  return pieces.count();
}

cudaError_t memory_forward(const MemoryForward& p, float* scratch, int32_t* tickets, cudaStream_t stream) {
  using namespace slots;
  const MemorySizes& s = p.sizes;
  if (s.batch == 0 || s.steps == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  if (resident_forward(p, stream, error)) return error;
  const int64_t b = s.batch, n = s.slots, reads = s.read_heads, writes = s.write_heads;
  Pieces pieces(scratch);
  Forward f = carve(s, p.saved.write_content != nullptr, p.saved.allocation != nullptr, p.saved.read_content != nullptr,
                    p.saved.mixed != nullptr || p.sharpness == nullptr, pieces);
  f.shape = Shape(s, p.step_mask);
  f.interface = p.interface;
  f.sharpness = p.sharpness;
  f.reads = static_cast<float*>(p.reads);
  f.tickets = tickets;
  auto in = [](const void* x) { return static_cast<const float*>(x); };
  auto out = [](void* x) { return static_cast<float*>(x); };
  // The state goes from the first one into the result, and stays there; what a history keeps, from step to step of it.
  auto place = [&](void* history, void* result, int64_t t, int64_t count) {
    return history == nullptr ? out(result) : out(history) + t * b * count * n;
  };
  f.from = {in(p.state.memory),     in(p.state.usage),        in(p.state.links),
            in(p.state.precedence), in(p.state.read_weights), in(p.state.write_weights)};
  f.to.memory = out(p.result.memory);
  f.to.links = s.track_links ? out(p.result.links) : nullptr;
  f.to.precedence = s.track_links ? out(p.result.precedence) : nullptr;
  const Forward first = f;
  for (int64_t t = 0; t < s.steps; ++t) {
    if (p.saved.memory != nullptr && t > 0 && t % s.every == 0) {
      const int64_t index = t / s.every - 1;
      MK_TRY(copy_on(f.from.memory, out(p.saved.memory) + index * b * n * s.width, b * n * s.width, stream));
      if (s.track_links) {
        MK_TRY(copy_on(f.from.links, out(p.saved.links) + index * b * writes * n * n, b * writes * n * n, stream));
        MK_TRY(copy_on(f.from.precedence, out(p.saved.precedence) + index * b * writes * n, b * writes * n, stream));
      }
    }
    f.shape.step = t;
    f.to.usage = s.track_usage ? place(p.saved.usage, p.result.usage, t, 1) : nullptr;
    f.to.read_weights = place(p.saved.read_weights, p.result.read_weights, t, reads);
    f.to.write_weights = place(p.saved.write_weights, p.result.write_weights, t, writes);
    auto row = [&](void* saved, float* otherwise, int64_t count) {
      return saved == nullptr ? otherwise : out(saved) + t * b * count * n;
    };
    f.write_content = row(p.saved.write_content, first.write_content, writes);
    f.allocation = row(p.saved.allocation, first.allocation, writes);
    f.read_content = row(p.saved.read_content, first.read_content, reads);
    f.mixed = row(p.saved.mixed, first.mixed, reads);
    MK_TRY(run_step(f, stream));
    f.from.memory = f.to.memory;
    if (s.track_usage) f.from.usage = f.to.usage;
    if (s.track_links) {
      f.from.links = f.to.links;
      f.from.precedence = f.to.precedence;
    }
    f.from.read_weights = f.to.read_weights;
    f.from.write_weights = f.to.write_weights;
  }
  if (s.track_usage) MK_TRY(copy_on(f.from.usage, out(p.result.usage), b * n, stream));
  MK_TRY(copy_on(f.from.read_weights, out(p.result.read_weights), b * reads * n, stream));
  MK_TRY(copy_on(f.from.write_weights, out(p.result.write_weights), b * writes * n, stream));
  return cudaGetLastError();
}

}  // namespace memkern::cuda
