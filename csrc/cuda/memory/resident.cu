// The scan of up to 512 slots in one launch. A cluster of blocks has a batch item: every block keeps its rows of the
// links and of the memory in shared memory from the first step to the last, and all vectors over the slots.
//
// Three times a step the cluster waits: for the write lookup's scores, for the read lookup's scores and what the links
// say, and for the reads. In between every block does the same on whole vectors, and gets the same bits: what a slot
// needs of another block's rows it reads from that block's shared memory.
#include "cuda/memory/resident.cuh"

#include "cuda/memory/cluster.cuh"
#include "cuda/memory/link_rows.cuh"
#include "cuda/memory/step.cuh"

namespace memkern::cuda::slots {

namespace {

constexpr int kReads = 4, kMostBlocks = 8;
using Tile = LinkTile<kReads, 4>;

struct Resident {
  Shape shape;
  int size, rows;  // blocks of a cluster, slots of a block
  int64_t every;
  MemoryFields<const float*> state;
  MemoryFields<float*> result;
  InterfaceFields<const void*> interface;
  const void* sharpness;
  float* reads;
  MemorySaved<float*> saved;
};

// A block's shared memory.
struct Chip {
  float *links, *memory;                          // (H, rows, N), (rows, W)
  float *usage, *precedence, *read, *write;       // the state's vectors, whole
  float *retention, *seen, *found_write, *found_read, *mixed;
  float *write_scores, *read_scores;              // (H, rows), (R, rows)
  float *ahead, *back, *part;                     // (H, R, rows), (H, R, N), (R, W) of its rows
  Order order;
  uint32_t* held;
  Shared* shared;
  Columns* columns;
  Tile* tile;
};

__host__ __device__ Chip lay_out(const Shape& s, int rows, Pieces& pieces) {
  const int64_t n = s.slots, reads = s.read_heads, writes = s.write_heads;
  Chip c{};
  c.links = pieces.take(s.track_links ? writes * rows * n : 0);
  c.memory = pieces.take(int64_t(rows) * s.width);
  c.usage = pieces.take(n);
  c.precedence = pieces.take(writes * n);
  c.read = pieces.take(reads * n);
  c.write = pieces.take(writes * n);
  c.retention = pieces.take(n);
  c.seen = pieces.take(n);
  c.found_write = pieces.take(writes * n);
  c.found_read = pieces.take(reads * n);
  c.mixed = pieces.take(reads * n);
  c.write_scores = pieces.take(writes * rows);
  c.read_scores = pieces.take(reads * rows);
  c.ahead = pieces.take(writes * reads * rows);
  c.back = pieces.take(writes * reads * n);
  c.part = pieces.take(reads * s.width);
  c.order.keys = pieces.take(n);
  c.order.before = pieces.take(n);
  c.order.slots = reinterpret_cast<int32_t*>(pieces.take(n));
  c.held = reinterpret_cast<uint32_t*>(pieces.take(n));
  c.shared = pieces.place<Shared>();
  c.columns = pieces.place<Columns>();
  c.tile = pieces.place<Tile>();
  return c;
}

__device__ __forceinline__ void copy(const float* from, float* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
}

class Walk {
 public:
  __device__ Walk(const Resident& p, const Chip& chip)
      : p_(p),
        s_(p.shape),
        c_(chip),
        b_(blockIdx.x / p.size),
        rank_(int(blockIdx.x % p.size)),
        n_(p.shape.slots),
        begin_(rank_ * p.rows),
        rows_(min(p.rows, p.shape.slots - rank_ * p.rows)) {}

  __device__ void run() {
    const int reads = s_.read_heads, writes = s_.write_heads, width = s_.width;
    if (s_.track_links) {
      for (int h = 0; h < writes; ++h) {
        copy(p_.state.links + ((b_ * writes + h) * n_ + begin_) * n_, links(h), int64_t(rows_) * n_);
      }
      copy(p_.state.precedence + b_ * writes * n_, c_.precedence, int64_t(writes) * n_);
    }
    copy(p_.state.memory + (b_ * n_ + begin_) * width, c_.memory, int64_t(rows_) * width);
    if (s_.track_usage) copy(p_.state.usage + b_ * n_, c_.usage, n_);
    copy(p_.state.read_weights + b_ * reads * n_, c_.read, int64_t(reads) * n_);
    copy(p_.state.write_weights + b_ * writes * n_, c_.write, int64_t(writes) * n_);
    __syncthreads();
    for (s_.step = 0; s_.step < s_.steps; ++s_.step) {
      if (p_.saved.memory != nullptr && s_.step > 0 && s_.step % p_.every == 0) {
        store_matrices(p_.saved.memory, p_.saved.links, p_.saved.precedence, s_.step / p_.every - 1);
      }
      if (s_.runs(b_)) {
        step();
      } else {
        float* out = p_.reads + s_.at(b_, int64_t(reads) * width);
        for (int i = rank_ * kThreads + int(threadIdx.x); i < reads * width; i += p_.size * kThreads) out[i] = 0.0f;
      }
      __syncthreads();
      keep(c_.usage, s_.track_usage ? p_.saved.usage : nullptr, 1);
      keep(c_.read, p_.saved.read_weights, reads);
      keep(c_.write, p_.saved.write_weights, writes);
      __syncthreads();
    }
    store_matrices(p_.result.memory, s_.track_links ? p_.result.links : nullptr, p_.result.precedence, 0);
    s_.step = 0;
    keep(c_.usage, s_.track_usage ? p_.result.usage : nullptr, 1);
    keep(c_.read, p_.result.read_weights, reads);
    keep(c_.write, p_.result.write_weights, writes);
    // No block may leave while another still reads its shared memory.
    cluster_sync();
  }

 private:
  __device__ float* links(int h) const { return c_.links + int64_t(h) * p_.rows * n_; }

  // This block's slots of vectors (count, N), to this step's row of a history (T, B, count, N).
  __device__ void keep(const float* from, float* history, int count) const {
    if (history == nullptr) return;
    float* to = history + (s_.step * s_.batch + b_) * count * n_ + begin_;
    for (int c = 0; c < count; ++c) {
      for (int i = threadIdx.x; i < rows_; i += kThreads) to[int64_t(c) * n_ + i] = from[int64_t(c) * n_ + begin_ + i];
    }
  }

  // This block's rows, to the snapshot of this index, or to the result with index 0.
  __device__ void store_matrices(float* memory, float* to_links, float* precedence, int64_t index) const {
    const int64_t item = index * s_.batch + b_;
    copy(c_.memory, memory + (item * n_ + begin_) * s_.width, int64_t(rows_) * s_.width);
    if (!s_.track_links) return;
    for (int h = 0; h < s_.write_heads; ++h) {
      const int64_t plane = item * s_.write_heads + h;
      copy(links(h), to_links + (plane * n_ + begin_) * n_, int64_t(rows_) * n_);
      copy(c_.precedence + int64_t(h) * n_ + begin_, precedence + plane * n_ + begin_, rows_);
    }
  }

  // Value of slot i in row c of what each block has of its own slots.
  __device__ float of_slot(const float* own, int c, int i) const {
    return of_peer(own, i / p_.rows)[int64_t(c) * p_.rows + i % p_.rows];
  }

  __device__ void step() {
    const Said<const float*> said(s_, p_.interface, p_.sharpness, b_);
    write_weights(said);
    matrices(said);
    cluster_sync();
    read_weights(said);
    const int reads = s_.read_heads, width = s_.width;
    column_sums(
        Range{0, rows_}, width, reads, *c_.columns,
        [&](int i, int r, int k) {
          return c_.read[int64_t(r) * n_ + begin_ + i] * c_.memory[int64_t(i) * width + k];
        },
        [&](int r, int k, float sum) { c_.part[int64_t(r) * width + k] = sum; });
    cluster_sync();
    float* out = p_.reads + s_.at(b_, int64_t(reads) * width);
    for (int i = rank_ * kThreads + int(threadIdx.x); i < reads * width; i += p_.size * kThreads) {
      float sum = 0.0f;
      for (int block = 0; block < p_.size; ++block) sum += of_peer(c_.part, block)[i];
      out[i] = sum;
    }
  }

  __device__ void write_weights(const Said<const float*>& said) {
    const int reads = s_.read_heads, writes = s_.write_heads, width = s_.width;
    MK_FOR_SLOTS(i, n_) {
      const float psi = retention_at(c_.read, said.free_gates, reads, n_, i);
      c_.retention[i] = psi;
      if (s_.track_usage) {
        const float u = used(c_.usage[i], written_at(c_.write, writes, n_, i), psi);
        c_.usage[i] = u;
        c_.seen[i] = u;
      }
    }
    __syncthreads();
    row_dots(c_.memory, Range{0, rows_}, width, said.write_keys, writes, [&](int i, int h, float dot, float square) {
      const float scale = s_.deallocate ? c_.retention[begin_ + i] : 1.0f;
      c_.write_scores[int64_t(h) * p_.rows + i] = dot * scale * inverse_norm(square * scale * scale);
    });
    cluster_sync();
    for (int h = 0; h < writes; ++h) {
      float *found = c_.found_write + int64_t(h) * n_, *to = c_.write + int64_t(h) * n_;
      MK_FOR_SLOTS(i, n_) found[i] = of_slot(c_.write_scores, h, i);
      const float square = square_sum(said.write_keys + int64_t(h) * width, width, *c_.shared);
      softmax(found, n_, said.write_strengths[h] * inverse_norm(square), nullptr, *c_.shared);
      if (s_.track_usage) fill(c_.order, c_.seen, n_, c_.held, *c_.shared);
      const float gate = said.write_gates[h], towards = said.allocation_gates[h];
      float* allocation = p_.saved.allocation;
      if (allocation != nullptr) allocation += ((s_.step * s_.batch + b_) * writes + h) * n_;
      MK_FOR_SLOTS(i, n_) {
        float a = 1.0f / float(n_);
        if (s_.track_usage) {
          const float u = c_.seen[i];
          a = allocation_at(c_.order, u, i);
          if (allocation != nullptr && i >= begin_ && i < begin_ + rows_) allocation[i] = a;
          c_.seen[i] = fmaf(1.0f - u, a * (gate * towards), u);
        }
        to[i] = (a * towards + found[i] * (1.0f - towards)) * gate;
      }
    }
    __syncthreads();
    keep(c_.found_write, p_.saved.write_content, writes);
  }

  // Writes the memory, looks the read keys up in it, updates the links and reads them.
  __device__ void matrices(const Said<const float*>& said) {
    const int reads = s_.read_heads, writes = s_.write_heads, width = s_.width;
    each_element(Range{0, rows_}, width, [&](int i, int k) {
      float& cell = c_.memory[int64_t(i) * width + k];
      const float m = s_.deallocate ? cell * c_.retention[begin_ + i] : cell;
      cell = written(m, c_.write, said.erase_vectors, said.write_vectors, writes, n_, width, begin_ + i, k);
    });
    if (s_.track_links) {
      for (int h = 0; h < writes; ++h) {
        const float* write = c_.write + int64_t(h) * n_;
        float* precedence = c_.precedence + int64_t(h) * n_;
        for (int first = 0; first < reads; first += kReads) {
          const int64_t row = int64_t(h) * reads + first;
          const LinkRows rows{n_,         begin_,  rows_,      min(kReads, reads - first),
                              links(h),   links(h), write,     precedence,
                              c_.read + int64_t(first) * n_,   c_.ahead + row * p_.rows,
                              p_.rows,    c_.back + row * n_};
          if (first == 0) {
            link_rows<kReads, 4, true>(rows, *c_.tile);
          } else {
            link_rows<kReads, 4, false>(rows, *c_.tile);
          }
        }
        follow(precedence, write, n_, precedence, *c_.shared);
      }
    }
    __syncthreads();
    row_dots(c_.memory, Range{0, rows_}, width, said.read_keys, reads, [&](int i, int r, float dot, float square) {
      c_.read_scores[int64_t(r) * p_.rows + i] = dot * inverse_norm(square);
    });
  }

  __device__ void read_weights(const Said<const float*>& said) {
    const int reads = s_.read_heads, writes = s_.write_heads, modes = 1 + 2 * writes;
    for (int r = 0; r < reads; ++r) {
      float *found = c_.found_read + int64_t(r) * n_, *mixed = c_.mixed + int64_t(r) * n_;
      float* to = c_.read + int64_t(r) * n_;
      MK_FOR_SLOTS(i, n_) found[i] = of_slot(c_.read_scores, r, i);
      const float square = square_sum(said.read_keys + int64_t(r) * s_.width, s_.width, *c_.shared);
      softmax(found, n_, said.read_strengths[r] * inverse_norm(square), nullptr, *c_.shared);
      const float* share = said.read_modes + int64_t(r) * modes;
      MK_FOR_SLOTS(i, n_) {
        if (!s_.track_links) {
          mixed[i] = share[writes] == 0.0f ? 0.0f : found[i];
          continue;
        }
        float w = found[i] * share[writes];
        for (int h = 0; h < writes; ++h) {
          float back = 0.0f;
          for (int block = 0; block < p_.size; ++block) {
            back += of_peer(c_.back, block)[(int64_t(h) * reads + r) * n_ + i];
          }
          w = fmaf(back, share[h], w);
          w = fmaf(of_slot(c_.ahead, h * reads + r, i), share[writes + 1 + h], w);
        }
        mixed[i] = w;
      }
      if (said.sharpness != nullptr) {
        sharpen(mixed, said.sharpness[r], n_, to, *c_.shared);
      } else {
        MK_FOR_SLOTS(i, n_) to[i] = mixed[i];
      }
    }
    __syncthreads();
    keep(c_.found_read, p_.saved.read_content, reads);
    keep(c_.mixed, p_.saved.mixed, reads);
  }

  const Resident& p_;
  Shape s_;
  const Chip& c_;
  const int64_t b_;
  const int rank_, n_, begin_, rows_;
};

__global__ void __launch_bounds__(kThreads, 1) resident_scan(const Resident p) {
  extern __shared__ __align__(16) float chip[];
  Pieces pieces(chip);
  const Chip laid_out = lay_out(p.shape, p.rows, pieces);
  Walk(p, laid_out).run();
}

}  // namespace

bool resident_forward(const MemoryForward& p, cudaStream_t stream, cudaError_t& error) {
  const MemorySizes& s = p.sizes;
  if (s.steps < 2 || s.slots % 4 != 0 || s.slots > kMostBlocks * kLinkRows) return false;
  Resident r{};
  r.size = 1;
  while (r.size * kLinkRows < s.slots) r.size *= 2;
  r.rows = int((s.slots + r.size - 1) / r.size);
  r.shape = Shape(s, p.step_mask);
  r.every = s.every;
  Pieces pieces(nullptr);
  lay_out(r.shape, r.rows, pieces);
  const Clusters clusters{s.batch, r.size, kThreads, static_cast<size_t>(pieces.count()) * sizeof(float), stream};
  if (!clusters.fit(resident_scan)) return false;
  auto in = [](const void* x) { return static_cast<const float*>(x); };
  auto out = [](void* x) { return static_cast<float*>(x); };
  r.state = {in(p.state.memory),     in(p.state.usage),        in(p.state.links),
             in(p.state.precedence), in(p.state.read_weights), in(p.state.write_weights)};
  r.result = {out(p.result.memory),     out(p.result.usage),        out(p.result.links),
              out(p.result.precedence), out(p.result.read_weights), out(p.result.write_weights)};
  r.interface = p.interface;
  r.sharpness = p.sharpness;
  r.reads = out(p.reads);
  r.saved = {out(p.saved.write_content), out(p.saved.allocation),   out(p.saved.read_content),  out(p.saved.mixed),
             out(p.saved.usage),         out(p.saved.read_weights), out(p.saved.write_weights), out(p.saved.memory),
             out(p.saved.links),         out(p.saved.precedence)};
  error = clusters.launch(resident_scan, r);
  return true;
}

}  // namespace memkern::cuda::slots
