// Usage, links, directional weights, reading and writing as operators of their own.
#include "cuda/memory/parts.cuh"

namespace memkern::cuda {

namespace slots {

namespace {

struct Usage {
  int n, read_heads, write_heads;
  const float *usage, *write, *read, *free_gates, *grad;
  bool detach;
  float *updated, *d_usage, *d_write, *d_read, *d_free_gates, *retention, *d_retention;
};

__global__ void __launch_bounds__(kThreads, 1) use(const Usage p) {
  const int64_t b = blockIdx.x;
  const int n = p.n;
  MK_FOR_SLOTS(i, n) {
    p.updated[b * n + i] =
        used(p.usage[b * n + i], written_at(p.write + b * p.write_heads * n, p.write_heads, n, i),
             retention_at(p.read + b * p.read_heads * n, p.free_gates + b * p.read_heads, p.read_heads, n, i));
  }
}

__global__ void __launch_bounds__(kThreads, 1) use_backward(const Usage p) {
  __shared__ Shared shared;
  const int64_t b = blockIdx.x;
  const int n = p.n;
  const float *read = p.read + b * p.read_heads * n, *free_gates = p.free_gates + b * p.read_heads;
  const float* write = p.write + b * p.write_heads * n;
  float *d_usage = p.d_usage + b * n, *d_write = p.d_write + b * p.write_heads * n;
  float* d_read = p.d_read + b * p.read_heads * n;
  float *retention = p.retention + b * n, *d_retention = p.d_retention + b * n;
  MK_FOR_SLOTS(i, n) {
    d_usage[i] = p.grad[b * n + i];
    retention[i] = retention_at(read, free_gates, p.read_heads, n, i);
    d_retention[i] = 0.0f;
    for (int h = 0; h < p.write_heads; ++h) d_write[int64_t(h) * n + i] = 0.0f;
    for (int r = 0; r < p.read_heads; ++r) d_read[int64_t(r) * n + i] = 0.0f;
  }
  slots::usage_backward(d_usage, p.usage + b * n, write, p.write_heads, retention, n, d_retention,
                        p.detach ? nullptr : d_write);
  retention_backward(d_retention, read, free_gates, p.read_heads, n, d_read, p.d_free_gates + b * p.read_heads, shared);
}

__global__ void __launch_bounds__(kThreads, 1) follow_rows(const float* precedence, const float* write, int n,
                                                           float* to) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.x * int64_t(n);
  follow(precedence + row, write + row, n, to + row, shared);
}

// What the pass over the links left, and the precedence's own.
__global__ void __launch_bounds__(kThreads, 1) follow_rows_backward(const float* precedence, const float* write, int n,
                                                                const float* grad, const float* row,
                                                                const float* column, int blocks, float* d_precedence,
                                                                float* d_write) {
  __shared__ Shared shared;
  const int64_t plane = blockIdx.x, at = plane * n;
  MK_FOR_SLOTS(i, n) d_write[at + i] = 0.0f;
  follow_backward(precedence + at, write + at, n, of_item(grad, plane, n), d_precedence + at, d_write + at, shared);
  MK_FOR_SLOTS(i, n) {
    float along = 0.0f, before = 0.0f;
    for (int block = 0; block < blocks; ++block) {
      const float* partial = column + (plane * blocks + block) * 2 * n;
      along += partial[i];
      before += partial[n + i];
    }
    d_write[at + i] += row[at + i] + along;
    d_precedence[at + i] += before;
  }
}

// out (planes, R, N) from partials (planes, blocks, R, N).
__global__ void __launch_bounds__(kThreads, 1) sum_blocks(const float* partials, int blocks, int64_t size, float* out) {
  const int64_t plane = blockIdx.x;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    float sum = 0.0f;
    for (int block = 0; block < blocks; ++block) sum += partials[(plane * blocks + block) * size + i];
    out[plane * size + i] = sum;
  }
}

// d_read (B, R, N): over the heads, what came along rows and down columns.
__global__ void __launch_bounds__(kThreads, 1) sum_heads(const float* along, const float* down, int heads, int blocks,
                                                     int64_t size, float* out) {
  const int64_t b = blockIdx.x;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    float sum = 0.0f;
    for (int h = 0; h < heads; ++h) {
      const int64_t plane = b * heads + h;
      sum += along[plane * size + i];
      for (int block = 0; block < blocks; ++block) sum += down[(plane * blocks + block) * size + i];
    }
    out[b * size + i] = sum;
  }
}

struct Reads {
  Cut cut;
  const float *memory, *weights, *grad;
  float *reads, *d_memory, *d_weights, *columns;
  int32_t* tickets;
};

__global__ void __launch_bounds__(kThreads, 1) read(const Reads p) {
  __shared__ Columns sums;
  const Cut& cut = p.cut;
  const int64_t b = cut.item();
  const int n = cut.slots, width = cut.width;
  const float *memory = p.memory + b * n * width, *weights = p.weights + b * cut.heads * n;
  float* columns = p.columns + (b * cut.parts + cut.part()) * cut.heads * width;
  column_sums(
      cut.range(), width, cut.heads, sums,
      [&](int i, int h, int k) { return weights[int64_t(h) * n + i] * memory[int64_t(i) * width + k]; },
      [&](int h, int k, float sum) { columns[int64_t(h) * width + k] = sum; });
  if (!arrive_last(p.tickets + b, cut.parts)) return;
  sum_parts(cut, p.columns + b * cut.parts * cut.heads * width, cut.heads, 0, p.reads + b * cut.heads * width);
}

__global__ void __launch_bounds__(kThreads, 1) read_backward_rows(const Reads p) {
  const Cut& cut = p.cut;
  const int64_t b = cut.item();
  const int n = cut.slots, width = cut.width;
  const float *grad = p.grad + b * cut.heads * width, *weights = p.weights + b * cut.heads * n;
  float *d_memory = p.d_memory + b * n * width, *d_weights = p.d_weights + b * cut.heads * n;
  row_dots(p.memory + b * n * width, cut.range(), width, grad, cut.heads,
           [&](int i, int h, float dot, float) { d_weights[int64_t(h) * n + i] = dot; });
  each_element(cut.range(), width, [&](int i, int k) {
    float sum = 0.0f;
    for (int h = 0; h < cut.heads; ++h) sum = fmaf(weights[int64_t(h) * n + i], grad[int64_t(h) * width + k], sum);
    d_memory[int64_t(i) * width + k] = sum;
  });
}

struct Writes {
  Cut cut;
  const float *memory, *weights, *erase, *vectors, *grad;
  float *written, *d_memory, *d_weights, *d_erase, *d_vectors, *columns;
  int32_t* tickets;
};

__global__ void __launch_bounds__(kThreads, 1) write(const Writes p) {
  const Cut& cut = p.cut;
  const int64_t b = cut.item();
  const int n = cut.slots, width = cut.width;
  const int64_t heads = b * cut.heads;
  const float* memory = p.memory + b * n * width;
  float* to = p.written + b * n * width;
  each_element(cut.range(), width, [&](int i, int k) {
    const int64_t at = int64_t(i) * width + k;
    to[at] = slots::written(memory[at], p.weights + heads * n, p.erase + heads * width, p.vectors + heads * width,
                            cut.heads, n, width, i, k);
  });
}

__global__ void __launch_bounds__(kThreads, 1) write_backward_rows(const Writes p) {
  __shared__ Columns sums;
  const Cut& cut = p.cut;
  const int64_t b = cut.item(), first = b * cut.heads;
  const int n = cut.slots, width = cut.width, heads = cut.heads, lane = threadIdx.x % kWarp;
  const float *memory = p.memory + b * n * width, *grad = p.grad + b * n * width, *weights = p.weights + first * n;
  const float *erase = p.erase + first * width, *vectors = p.vectors + first * width;
  float *d_memory = p.d_memory + b * n * width, *d_weights = p.d_weights + first * n;
  // What head h erases from.
  auto left = [&](int i, int h, int k) {
    return erased(memory[int64_t(i) * width + k], weights, erase, heads, n, width, i, k, h);
  };
  each_element(cut.range(), width, [&](int i, int k) {
    const int64_t at = int64_t(i) * width + k;
    d_memory[at] = erased(grad[at], weights, erase, heads, n, width, i, k, -1);
  });
  const Range range = cut.range();
  for (int i = range.begin + int(threadIdx.x) / kWarp; i < range.end; i += kWarps) {
    for (int h = 0; h < heads; ++h) {
      float sum = 0.0f;
      for (int k = lane; k < width; k += kWarp) {
        const int64_t at = int64_t(h) * width + k;
        sum = fmaf(grad[int64_t(i) * width + k], fmaf(-left(i, h, k), erase[at], vectors[at]), sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) d_weights[int64_t(h) * n + i] = sum;
    }
  }
  float* columns = p.columns + (b * cut.parts + cut.part()) * 2 * heads * width;
  column_sums(
      range, width, heads, sums,
      [&](int i, int h, int k) { return weights[int64_t(h) * n + i] * grad[int64_t(i) * width + k]; },
      [&](int h, int k, float sum) { columns[int64_t(h) * width + k] = sum; });
  column_sums(
      range, width, heads, sums,
      [&](int i, int h, int k) {
        return -weights[int64_t(h) * n + i] * (grad[int64_t(i) * width + k] * left(i, h, k));
      },
      [&](int h, int k, float sum) { columns[int64_t(heads + h) * width + k] = sum; });
  if (!arrive_last(p.tickets + b, cut.parts)) return;
  const float* all = p.columns + b * cut.parts * 2 * heads * width;
  sum_parts(cut, all, 2 * heads, 0, p.d_vectors + first * width);
  sum_parts(cut, all, 2 * heads, heads, p.d_erase + first * width);
}

Usage usage_of(const UsageUpdate& p) {
  Usage u{};
  u.n = int(p.slots);
  u.read_heads = int(p.read_heads);
  u.write_heads = int(p.write_heads);
  u.usage = in(p.usage);
  u.write = in(p.write_weights);
  u.read = in(p.read_weights);
  u.free_gates = in(p.free_gates);
  return u;
}

}  // namespace

}  // namespace slots

using namespace slots;

cudaError_t usage_forward(const UsageUpdate& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  Usage u = usage_of(p);
  u.updated = out(p.updated);
  use<<<grid(p.batch), kThreads, 0, stream>>>(u);
  return cudaGetLastError();
}

int64_t usage_backward_scratch(const UsageUpdate& p) { return 2 * p.batch * p.slots; }

cudaError_t usage_backward(const UsageUpdate& p, float* scratch, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  Usage u = usage_of(p);
  u.grad = in(p.grad);
  u.detach = p.detach_write;
  u.d_usage = out(p.d_usage);
  u.d_write = out(p.d_write_weights);
  u.d_read = out(p.d_read_weights);
  u.d_free_gates = out(p.d_free_gates);
  u.retention = scratch;
  u.d_retention = scratch + p.batch * p.slots;
  use_backward<<<grid(p.batch), kThreads, 0, stream>>>(u);
  return cudaGetLastError();
}

cudaError_t links_forward(const LinksUpdate& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  LinkPass pass{};
  pass.sizes = {p.rows, 1, 0, int(p.slots), nullptr, 0};
  pass.from = in(p.links);
  pass.to = out(p.updated);
  pass.write = in(p.write_weights);
  pass.precedence = in(p.precedence);
  MK_TRY(link_pass(pass, stream));
  follow_rows<<<grid(p.rows), kThreads, 0, stream>>>(pass.precedence, pass.write, int(p.slots), out(p.followed));
  return cudaGetLastError();
}

int64_t links_backward_scratch(const LinksUpdate& p) { return p.rows * p.slots * (1 + 2 * link_blocks(p.slots)); }

cudaError_t links_backward(const LinksUpdate& p, float* scratch, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  LinkBackward pass{};
  pass.sizes = {p.rows, 1, 0, int(p.slots), nullptr, 0};
  pass.links = in(p.links);
  pass.grad = in(p.grad_links);
  pass.d_links = out(p.d_links);
  pass.write = in(p.write_weights);
  pass.precedence = in(p.precedence);
  pass.row = scratch;
  pass.column = scratch + p.rows * p.slots;
  MK_TRY(link_pass_backward(pass, stream));
  follow_rows_backward<<<grid(p.rows), kThreads, 0, stream>>>(
      pass.precedence, pass.write, int(p.slots), in(p.grad_precedence), pass.row, pass.column, link_blocks(p.slots),
      out(p.d_precedence), out(p.d_write_weights));
  return cudaGetLastError();
}

int64_t directional_scratch(const Directional& p) {
  // Backward's products along rows, and the partials of either.
  return p.batch * p.write_heads * (1 + link_blocks(p.slots)) * p.read_heads * p.slots;
}

cudaError_t directional_forward(const Directional& p, float* scratch, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  LinkPass pass{};
  pass.sizes = {p.batch, int(p.write_heads), int(p.read_heads), int(p.slots), nullptr, 0};
  pass.from = in(p.links);
  pass.reads = in(p.read_weights);
  pass.ahead = out(p.ahead);
  pass.back = scratch;
  MK_TRY(link_pass(pass, stream));
  sum_blocks<<<grid(p.batch * p.write_heads), kThreads, 0, stream>>>(scratch, link_blocks(p.slots),
                                                                     p.read_heads * p.slots, out(p.back));
  return cudaGetLastError();
}

cudaError_t directional_backward(const Directional& p, float* scratch, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  const int64_t size = p.read_heads * p.slots;
  DirectionalBackward pass{};
  pass.sizes = {p.batch, int(p.write_heads), int(p.read_heads), int(p.slots), nullptr, 0};
  pass.links = in(p.links);
  pass.reads = in(p.read_weights);
  pass.d_ahead = in(p.grad_ahead);
  pass.d_back = in(p.grad_back);
  pass.d_links = out(p.d_links);
  pass.along = scratch;
  pass.down = scratch + p.batch * p.write_heads * size;
  MK_TRY(directional_pass_backward(pass, stream));
  sum_heads<<<grid(p.batch), kThreads, 0, stream>>>(pass.along, pass.down, int(p.write_heads), link_blocks(p.slots),
                                                    size, out(p.d_read_weights));
  return cudaGetLastError();
}

int64_t read_scratch(const ReadMemory& p) { return Cut(p.batch, p.slots, p.width, p.heads).columns(); }

cudaError_t read_forward(const ReadMemory& p, float* scratch, int32_t* tickets, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  Reads r{Cut(p.batch, p.slots, p.width, p.heads)};
  r.memory = in(p.memory);
  r.weights = in(p.weights);
  r.reads = out(p.reads);
  r.columns = scratch;
  r.tickets = tickets;
  read<<<r.cut.blocks(), kThreads, 0, stream>>>(r);
  return cudaGetLastError();
}

cudaError_t read_backward(const ReadMemory& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  Reads r{Cut(p.batch, p.slots, p.width, p.heads)};
  r.memory = in(p.memory);
  r.weights = in(p.weights);
  r.grad = in(p.grad);
  r.d_memory = out(p.d_memory);
  r.d_weights = out(p.d_weights);
  read_backward_rows<<<r.cut.blocks(), kThreads, 0, stream>>>(r);
  return cudaGetLastError();
}

cudaError_t write_forward(const WriteMemory& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  Writes w{Cut(p.batch, p.slots, p.width, p.heads)};
  w.memory = in(p.memory);
  w.weights = in(p.weights);
  w.erase = in(p.erase_vectors);
  w.vectors = in(p.write_vectors);
  w.written = out(p.written);
  write<<<w.cut.blocks(), kThreads, 0, stream>>>(w);
  return cudaGetLastError();
}

int64_t write_backward_scratch(const WriteMemory& p) {
  return 2 * Cut(p.batch, p.slots, p.width, p.heads).columns();
}

cudaError_t write_backward(const WriteMemory& p, float* scratch, int32_t* tickets, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  Writes w{Cut(p.batch, p.slots, p.width, p.heads)};
  w.memory = in(p.memory);
  w.weights = in(p.weights);
  w.erase = in(p.erase_vectors);
  w.vectors = in(p.write_vectors);
  w.grad = in(p.grad);
  w.d_memory = out(p.d_memory);
  w.d_weights = out(p.d_weights);
  w.d_erase = out(p.d_erase_vectors);
  w.d_vectors = out(p.d_write_vectors);
  w.columns = scratch;
  w.tickets = tickets;
  write_backward_rows<<<w.cut.blocks(), kThreads, 0, stream>>>(w);
  return cudaGetLastError();
}

}  // namespace memkern::cuda
