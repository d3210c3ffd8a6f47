// Backward of the scan of up to 512 slots in one launch. A cluster of blocks has a batch item and walks it from the
// last step to the first; every block keeps its rows of the gradients of the links and of the memory in shared memory
// all the way, and the gradients of all vectors over the slots whole. Where links of many write heads do not fit, their
// gradients alone lie in global memory.
//
// Segments are taken from the last to the first. A segment's memories, links and precedences are written again from the
// snapshot before it: every block its rows, from the write weights of the steps, so that no block waits for another
// until the segment stands. They lie in global memory, each read once or twice and soon after it was written, and the
// next segment takes the same place: one segment of every batch item at a time is what the second cache has to hold.
//
// Three times a step the cluster waits: for what the rows of the new memory say of the reads, for the gradients of the
// write weights and what the links say, and for the gradient of the retention. In between every block does the same on
// whole vectors, and gets the same bits, as in the forward scan (resident.cu). What a block leaves for the others after
// one wait it overwrites no sooner than after the next but one; so no wait is needed to protect it.
#include "cuda/memory/resident.cuh"

#include "cuda/memory/back_rows.cuh"
#include "cuda/memory/back_slots.cuh"
#include "cuda/memory/cluster.cuh"
#include "cuda/memory/past.cuh"
#include "cuda/memory/resident_layout.cuh"

namespace memkern::cuda::slots {

namespace {

constexpr int kMostBlocks = 8;

struct ResidentBack {
  Shape shape;
  int size, rows;      // blocks of a cluster, slots of a block
  bool links_on_chip;  // otherwise the gradients of the links lie where they go in the end
  Layout chip;
  Past past;
  InterfaceFields<const void*> interface;
  InterfaceFields<void*> d_interface;
  const void* sharpness;
  void* d_sharpness;
  const float* grad_reads;
  MemoryFields<const float*> grads;
  MemoryFields<float*> d_state;
};

__device__ __forceinline__ void copy(const float* from, float* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from == nullptr ? 0.0f : from[i];
}

// The same number, but the compiler does not know that.
__device__ __forceinline__ int afresh(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

class WalkBack {
 public:
  __device__ WalkBack(const ResidentBack& p, float* chip)
      : p_(p),
        s_(p.shape),
        chip_(chip),
        b_(int(blockIdx.x) / p.size),
        rank_(int(blockIdx.x) % p.size),
        n_(p.shape.slots),
        reads_(p.shape.read_heads),
        writes_(p.shape.write_heads),
        begin_(min(rank_ * p.rows, n_)),
        rows_(min(p.rows, n_ - begin_)) {}

  __device__ void run() {
    load();
    const int steps = int(s_.steps), every = int(p_.past.every);
    for (int begin = (steps - 1) / every * every; begin >= 0; begin -= every) {
      const int end = min(begin + every, steps);
      repeat(begin, end);
      cluster_sync();
      for (int t = end - 1; t >= begin; --t) {
        s_.step = t;
        if (s_.runs(b_)) {
          step(t, begin);
        } else if (rank_ == 0) {
          clear();
        }
      }
    }
    __syncthreads();
    store();
    // No block may leave while another still reads its shared memory.
    cluster_sync();
  }

  // What the blocks of the cluster left, added in their order.
  __device__ float columns(int c, int k) const { return of_all(p_.chip.columns, c, s_.width, k); }
  __device__ float key_columns(int h, int k) const { return of_all(p_.chip.key_columns, h, s_.width, k); }
  __device__ float row(int h, int i) const { return of_slot(p_.chip.row, h, i); }
  __device__ float column(int h, int c, int i) const { return of_all(p_.chip.column, h * 2 + c, n_, i); }
  __device__ float ahead(int h, int r, int i) const { return of_slot(p_.chip.ahead, h * reads_ + r, i); }
  __device__ float back(int h, int r, int i) const { return of_all(p_.chip.back, h * reads_ + r, n_, i); }

 private:
  template <class T = float>
  __device__ T* at(int offset) const {
    return reinterpret_cast<T*>(chip_ + offset);
  }
  // Value of slot i in row c of what each block has of its own slots.
  __device__ float of_slot(int offset, int c, int i) const {
    return of_peer(at(offset), i / p_.rows)[int64_t(c) * p_.rows + i % p_.rows];
  }
  // Sum over the blocks of element i in row c of what each has whole.
  __device__ float of_all(int offset, int c, int size, int i) const {
    float sum = 0.0f;
    for (int block = 0; block < p_.size; ++block) sum += of_peer(at(offset), block)[int64_t(c) * size + i];
    return sum;
  }
  __device__ void gather(int offset, int count, float* to) const {
    for (int c = 0; c < count; ++c) {
      MK_FOR_SLOTS(i, n_) to[int64_t(c) * n_ + i] = of_slot(offset, c, i);
    }
  }

  __device__ int64_t matrix(int h) const { return ((int64_t(b_) * writes_ + h) * n_ + begin_) * n_; }
  __device__ float* d_links(int h) const {
    return p_.links_on_chip ? at(p_.chip.d_links) + int64_t(h) * p_.rows * n_ : p_.d_state.links + matrix(h);
  }
  // This block's rows of memories (B, N, W).
  template <class P>
  __device__ P own_rows(P memories) const {
    return of_item(memories, int64_t(b_) * n_ + begin_, s_.width);
  }

  __device__ void load() {
    if (s_.track_links) {
      for (int h = 0; h < writes_; ++h) {
        copy(p_.grads.links == nullptr ? nullptr : p_.grads.links + matrix(h), d_links(h), int64_t(rows_) * n_);
      }
      copy(of_item(p_.grads.precedence, b_, writes_ * n_), at(p_.chip.d_precedence), int64_t(writes_) * n_);
    }
    copy(own_rows(p_.grads.memory), at(p_.chip.d_memory), int64_t(rows_) * s_.width);
    if (s_.track_usage) copy(of_item(p_.grads.usage, b_, n_), at(p_.chip.d_usage), n_);
    copy(of_item(p_.grads.read_weights, b_, reads_ * n_), at(p_.chip.d_read), int64_t(reads_) * n_);
    copy(of_item(p_.grads.write_weights, b_, writes_ * n_), at(p_.chip.d_write), int64_t(writes_) * n_);
  }

  __device__ void store() const {
    auto keep = [&](const float* from, float* to, int count) {
      for (int c = 0; c < count; ++c) {
        copy(from + int64_t(c) * n_ + begin_, to + (int64_t(b_) * count + c) * n_ + begin_, rows_);
      }
    };
    if (s_.track_links) {
      for (int h = 0; h < writes_ && p_.links_on_chip; ++h) {
        copy(d_links(h), p_.d_state.links + matrix(h), int64_t(rows_) * n_);
      }
      keep(at(p_.chip.d_precedence), p_.d_state.precedence, writes_);
    }
    copy(at(p_.chip.d_memory), own_rows(p_.d_state.memory), int64_t(rows_) * s_.width);
    if (s_.track_usage) keep(at(p_.chip.d_usage), p_.d_state.usage, 1);
    keep(at(p_.chip.d_read), p_.d_state.read_weights, reads_);
    keep(at(p_.chip.d_write), p_.d_state.write_weights, writes_);
  }

  // Writes this block's rows of the segment's matrices again.
  __device__ void repeat(int begin, int end) {
    const Past& past = p_.past;
    const bool links = s_.track_links && end - begin > 1;
    float* precedences = at(p_.chip.precedence);
    if (links) copy(of_item(past.precedence_before(begin, 0), b_, writes_ * n_), precedences, int64_t(writes_) * n_);
    for (int t = begin; t < end; ++t) {
      const int k = t - begin;
      s_.step = t;
      const bool runs = s_.runs(b_);
      const Said<const float*> f = said();
      const float* write = of_item(past.write_after(t), b_, writes_ * n_);
      rewrite_rows(s_, runs, Range{0, rows_}, f, own_rows(past.memory_before(begin, k)),
                   of_item(past.read_after(t - 1), b_, reads_ * n_) + begin_, write + begin_,
                   own_rows(past.memory_again(k)));
      for (int h = 0; links && t + 1 < end && h < writes_; ++h) {
        const float* from = past.links_before(begin, k) + matrix(h);
        float *to = past.links_again(k) + matrix(h), *precedence = precedences + int64_t(h) * n_;
        const float* weights = write + int64_t(h) * n_;
        if (runs) {
          LinkRows own{n_, begin_, rows_, 0, from, to};
          own.write = weights;
          own.precedence = precedence;
          link_rows<0, 4, true>(own, *at<Tile>(p_.chip.tile));
          follow(precedence, weights, n_, precedence, *at<Shared>(p_.chip.shared));
        } else {
          __syncthreads();
          copy(from, to, int64_t(rows_) * n_);
        }
        float* kept = past.precedence_again(k) + (int64_t(b_) * writes_ + h) * n_;
        MK_FOR_SLOTS(i, n_) {
          if (i >= begin_ && i < begin_ + rows_) kept[i] = precedence[i];
        }
      }
    }
  }

  __device__ void clear() const {
    const Said<float*> d = gradients();
    zero(d.read_keys, reads_ * s_.width);
    zero(d.read_strengths, reads_);
    zero(d.read_modes, reads_ * (1 + 2 * writes_));
    zero(d.free_gates, reads_);
    if (d.sharpness != nullptr) zero(d.sharpness, reads_);
    zero(d.write_keys, writes_ * s_.width);
    zero(d.write_vectors, writes_ * s_.width);
    zero(d.erase_vectors, writes_ * s_.width);
    zero(d.write_strengths, writes_);
    zero(d.allocation_gates, writes_);
    zero(d.write_gates, writes_);
  }

  __device__ BackSlots whole(int t, int begin) const {
    const Past& past = p_.past;
    const int64_t read = int64_t(reads_) * n_, write = int64_t(writes_) * n_;
    BackSlots q{};
    q.old_read = of_item(past.read_after(t - 1), b_, read);
    q.old_write = of_item(past.write_after(t - 1), b_, write);
    if (s_.track_links) q.old_precedence = of_item(past.precedence_before(begin, t - begin), b_, write);
    q.read = of_item(past.read_after(t), b_, read);
    q.write = of_item(past.write_after(t), b_, write);
    q.write_content = past.saved.write_content + t * past.write + b_ * write;
    q.read_content = past.saved.read_content + t * past.read + b_ * read;
    if (p_.sharpness != nullptr) q.mixed = past.saved.mixed + t * past.read + b_ * read;
    if (s_.track_usage) {
      q.old_usage = of_item(past.usage_after(t - 1), b_, n_);
      q.usage = of_item(past.usage_after(t), b_, n_);
      q.allocation = past.saved.allocation + t * past.write + b_ * write;
    }
    q.given_usage = q.d_usage = at(p_.chip.d_usage);
    q.given_precedence = q.d_precedence = at(p_.chip.d_precedence);
    q.given_read = q.d_mixed = q.d_read = at(p_.chip.d_read);
    q.new_d_write = q.d_write = at(p_.chip.d_write);
    q.read_dots = at(p_.chip.all_read_dots);
    q.read_norms = at(p_.chip.all_read_norms);
    q.d_content = at(p_.chip.d_content);
    q.read_own = at(p_.chip.read_own);
    q.write_dots = at(p_.chip.all_write_dots);
    q.write_norms = at(p_.chip.all_write_norms);
    q.d_lookup = at(p_.chip.d_lookup);
    q.scaled = at(p_.chip.scaled);
    q.write_own = at(p_.chip.write_own);
    q.seen = at(p_.chip.seen);
    q.d_seen = at(p_.chip.d_seen);
    q.d_allocated = at(p_.chip.d_allocated);
    q.retention = at(p_.chip.retention);
    q.d_retention = at(p_.chip.all_d_retention);
    q.order = Order{at(p_.chip.keys), at<int32_t>(p_.chip.slots), at(p_.chip.before), nullptr};
    q.held = at<uint32_t>(p_.chip.held);
    return q;
  }

  __device__ BackRows own(const BackSlots& whole, int t, int begin) const {
    BackRows q{Range{0, rows_}, n_, s_.width, reads_, writes_, p_.rows, s_.deallocate};
    q.memory = own_rows<const float*>(p_.past.memory_again(t - begin));
    q.old_memory = own_rows(p_.past.memory_before(begin, t - begin));
    q.read = whole.read + begin_;
    q.write = whole.write + begin_;
    if (p_.grad_reads != nullptr) q.d_reads = p_.grad_reads + s_.at(b_, int64_t(reads_) * s_.width);
    q.given_memory = q.d_memory = at(p_.chip.d_memory);
    q.given_write = whole.d_write + begin_;
    q.retention = whole.retention + begin_;
    q.d_content = whole.d_content + begin_;
    q.read_own = whole.read_own + begin_;
    q.d_lookup = whole.d_lookup + begin_;
    q.scaled = whole.scaled + begin_;
    q.write_own = whole.write_own + begin_;
    q.read_dots = at(p_.chip.read_dots);
    q.read_norms = at(p_.chip.read_norms);
    q.along = at(p_.chip.along);
    q.d_write = at(p_.chip.new_d_write);
    q.write_dots = at(p_.chip.write_dots);
    q.write_norms = at(p_.chip.write_norms);
    q.d_retention = at(p_.chip.d_retention);
    q.columns = at(p_.chip.columns);
    q.key_columns = at(p_.chip.key_columns);
    return q;
  }

  // Each phase makes its own pointers: those of a whole step would not fit the registers.
  __device__ void step(int t, int begin) {
    rows_before_reads(afresh(t), begin);
    cluster_sync();
    reads(afresh(t), begin);
    __syncthreads();
    if (s_.track_links) links(afresh(t), begin);
    rows_before_write(afresh(t), begin);
    cluster_sync();
    write(afresh(t), begin);
    __syncthreads();
    rows_before_lookup(afresh(t), begin);
    cluster_sync();
    lookup(afresh(t), begin);
  }

  __device__ Said<const float*> said() const { return {s_, p_.interface, p_.sharpness, b_}; }
  __device__ Said<float*> gradients() const { return {s_, p_.d_interface, p_.d_sharpness, b_}; }
  __device__ Turn turn() const { return {rank_, p_.size}; }

  __device__ void rows_before_reads(int t, int begin) const {
    const BackSlots q = whole(t, begin);
    const Said<const float*> f = said();
    MK_FOR_SLOTS(i, n_) q.retention[i] = retention_at(q.old_read, f.free_gates, reads_, n_, i);
    rows_of_reads(own(q, t, begin), f);
  }

  __device__ void reads(int t, int begin) const {
    const BackSlots q = whole(t, begin);
    gather(p_.chip.read_dots, reads_, q.read_dots);
    gather(p_.chip.read_norms, 1, q.read_norms);
    auto along = [&](int r, int i) { return p_.grad_reads == nullptr ? 0.0f : of_slot(p_.chip.along, r, i); };
    slots_of_reads(s_, q, said(), gradients(), turn(), along, *at<Shared>(p_.chip.shared));
  }

  __device__ void links(int t, int begin) const {
    const BackSlots q = whole(t, begin);
    const float *links = p_.past.links_before(begin, t - begin), *modes = said().read_modes;
    for (int h = 0; h < writes_; ++h) {
      LinkRowsBack own{n_, begin_, rows_, 0, h, writes_, links + matrix(h), d_links(h), d_links(h)};
      own.write = q.write + int64_t(h) * n_;
      own.precedence = q.old_precedence + int64_t(h) * n_;
      own.ahead_stride = p_.rows;
      own.row = at(p_.chip.row) + int64_t(h) * p_.rows;
      own.column = at(p_.chip.column) + int64_t(h) * 2 * n_;
      for (int first = 0; first < reads_; first += kReads) {
        const int left = reads_ - first;
        own.count = min(kReads, left);
        own.reads = q.old_read + int64_t(first) * n_;
        own.d_reads = q.d_mixed + int64_t(first) * n_;
        own.modes = modes + int64_t(first) * (1 + 2 * writes_);
        own.ahead = at(p_.chip.ahead) + (int64_t(h) * reads_ + first) * p_.rows;
        own.back = at(p_.chip.back) + (int64_t(h) * reads_ + first) * n_;
        if (left <= kReads) {
          link_rows_back<kReads, 4, true>(own, *at<BackTile>(p_.chip.back_tile));
        } else {
          link_rows_back<kReads, 4, false>(own, *at<BackTile>(p_.chip.back_tile));
        }
      }
    }
  }

  __device__ void rows_before_write(int t, int begin) const {
    rows_of_write(own(whole(t, begin), t, begin), said(), *at<Columns>(p_.chip.sums));
  }

  __device__ void write(int t, int begin) const {
    const BackSlots q = whole(t, begin);
    gather(p_.chip.new_d_write, writes_, q.new_d_write);
    gather(p_.chip.write_dots, writes_, q.write_dots);
    gather(p_.chip.write_norms, 1, q.write_norms);
    slots_of_write(s_, q, said(), gradients(), turn(), *this, *at<Shared>(p_.chip.shared));
  }

  __device__ void rows_before_lookup(int t, int begin) const {
    rows_of_lookup(own(whole(t, begin), t, begin), said(), *at<Columns>(p_.chip.sums));
  }

  __device__ void lookup(int t, int begin) const {
    const BackSlots q = whole(t, begin);
    gather(p_.chip.d_retention, 1, q.d_retention);
    auto columns = [&](int h, int k) { return key_columns(h, k); };
    slots_of_lookup(s_, q, said(), gradients(), turn(), columns, *at<Shared>(p_.chip.shared));
  }

  const ResidentBack& p_;
  Shape s_;
  float* const chip_;
  const int b_, rank_, n_, reads_, writes_, begin_, rows_;
};

__global__ void __launch_bounds__(kThreads, 1) resident_scan_backward(const ResidentBack p) {
  extern __shared__ __align__(16) float chip[];
  if constexpr (kHasClusters) WalkBack(p, chip).run();
}

}  // namespace

bool resident_backward(const MemoryBackward& p, float* scratch, cudaStream_t stream, cudaError_t& error) {
  const MemorySizes& s = p.sizes;
  if (s.slots % 4 != 0 || s.slots > kMostBlocks * kLinkRows || p.final_memory != nullptr) return false;
  if (s.steps < 2 || s.steps > INT32_MAX || s.batch > INT32_MAX / kMostBlocks) return false;
  ResidentBack r{};
  r.shape = Shape(s, p.step_mask);
  Clusters clusters{s.batch, 1, kThreads, 0, stream};
  auto fits = [&](int size, bool links_on_chip) {
    r.size = clusters.blocks = size;
    r.rows = int((s.slots + size - 1) / size);
    r.links_on_chip = links_on_chip;
    r.chip = lay_out(r.shape, r.rows, links_on_chip);
    clusters.shared = static_cast<size_t>(r.chip.count) * sizeof(float);
    return clusters.fit(resident_scan_backward);
  };
  int least = 1;
  while (least * kLinkRows < s.slots) least *= 2;
  bool found = false;
  for (int size = least; size <= kMostBlocks && !found; size *= 2) found = fits(size, true);
  for (int size = least; size <= kMostBlocks && !found; size *= 2) found = fits(size, false);
  if (!found) return false;
  Pieces pieces(scratch);
  r.past = Past(p, Segment(s, pieces));
  r.interface = p.interface;
  r.d_interface = p.d_interface;
  r.sharpness = p.sharpness;
  r.d_sharpness = p.d_sharpness;
  r.grad_reads = in(p.grad_reads);
  r.grads = {in(p.grads.memory),     in(p.grads.usage),        in(p.grads.links),
             in(p.grads.precedence), in(p.grads.read_weights), in(p.grads.write_weights)};
  r.d_state = {out(p.d_state.memory),     out(p.d_state.usage),        out(p.d_state.links),
               out(p.d_state.precedence), out(p.d_state.read_weights), out(p.d_state.write_weights)};
  error = clusters.launch(resident_scan_backward, r);
  return true;
}

}  // namespace memkern::cuda::slots
