// Backward of memory_step and memory_scan: the walk from the last step to the first.
//
// Segments are taken from the last to the first: from the snapshot before a segment its memories, links and precedences
// are written again (the write weights are known, so no lookup is repeated), then its steps are taken backwards. Only
// one segment's matrices exist at a time.
#include "cuda/memory/backward.cuh"

namespace memkern::cuda {

namespace slots {

namespace {

// The step's write of the memory and of the precedence alone, from the write weights it found: what a segment of the
// scan is repeated with. `read_weights` are those before the step.
struct Rewrite {
  Shape shape;
  const float *memory, *read_weights, *write_weights, *precedence;
  InterfaceFields<const void*> interface;
  float *to_memory, *to_precedence;  // null for not this one
};

__global__ void __launch_bounds__(kThreads, 1) repeat_write(const Rewrite p) {
  __shared__ Shared shared;
  const Shape& s = p.shape;
  const Part part(s);
  const int64_t b = part.batch;
  const int n = s.slots, width = s.width, writes = s.write_heads;
  const bool runs = s.runs(b);
  const Said<const float*> said(s, p.interface, static_cast<const void*>(nullptr), b);
  const float* write = p.write_weights + b * writes * n;
  if (p.to_memory != nullptr) {
    const float *from = p.memory + b * n * width, *read = p.read_weights + b * s.read_heads * n;
    float* to = p.to_memory + b * n * width;
    each_element(part.range, width, [&](int i, int k) {
      const int64_t at = int64_t(i) * width + k;
      if (!runs) {
        to[at] = from[at];
        return;
      }
      const float scale = s.deallocate ? retention_at(read, said.free_gates, s.read_heads, n, i) : 1.0f;
      to[at] = written(from[at] * scale, write, said.erase_vectors, said.write_vectors, writes, n, width, i, k);
    });
  }
  if (p.to_precedence != nullptr && part.index == 0) {
    const float* from = p.precedence + b * writes * n;
    float* to = p.to_precedence + b * writes * n;
    for (int h = 0; h < writes; ++h) {
      const int64_t at = int64_t(h) * n;
      if (runs) {
        follow(from + at, write + at, n, to + at, shared);
      } else {
        MK_FOR_SLOTS(i, n) to[at + i] = from[at + i];
      }
    }
  }
}

cudaError_t rewrite(const Rewrite& p, cudaStream_t stream) {
  repeat_write<<<p.shape.blocks(), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

Backward carve(const MemorySizes& sizes, Pieces& pieces) {
  const int64_t b = sizes.batch, n = sizes.slots, reads = sizes.read_heads, writes = sizes.write_heads;
  Backward f{};
  f.read_dots = pieces.take(b * reads * n);
  f.read_norms = pieces.take(b * n);
  f.d_mixed = pieces.take(b * reads * n);
  f.d_content = pieces.take(b * reads * n);
  f.read_own = pieces.take(b * n);
  if (sizes.track_links) {
    f.ahead = pieces.take(b * writes * reads * n);
    f.back = pieces.take(b * writes * link_blocks(n) * reads * n);
    f.row = pieces.take(b * writes * n);
    f.column = pieces.take(b * writes * link_blocks(n) * 2 * n);
  }
  f.write_dots = pieces.take(b * writes * n);
  f.write_norms = pieces.take(b * n);
  f.d_write = pieces.take(b * writes * n);
  f.d_lookup = pieces.take(b * writes * n);
  f.scaled = pieces.take(b * writes * n);
  f.write_own = pieces.take(b * n);
  f.seen = pieces.take(b * writes * n);
  f.d_seen = pieces.take(b * n);
  f.d_allocated = pieces.take(b * n);
  f.d_usage = pieces.take(b * n);
  f.d_old_read = pieces.take(b * reads * n);
  f.retention = pieces.take(b * n);
  f.d_retention = pieces.take(b * n);
  f.columns = pieces.take(b * parts_of(n, sizes.width) * (reads + 2 * writes) * sizes.width);
  f.order = pieces.order(b, n);
  return f;
}

// The matrices of one segment: after each of its steps, but for links after the last.
struct Segment {
  float *memory, *links, *precedence;

  Segment(const MemorySizes& s, Pieces& pieces) : memory(nullptr), links(nullptr), precedence(nullptr) {
    const int64_t every = s.every < s.steps ? s.every : s.steps, planes = s.batch * s.write_heads;
    memory = pieces.take(every * s.batch * s.slots * s.width);
    if (!s.track_links || every < 2) return;
    links = pieces.take((every - 1) * planes * s.slots * s.slots);
    precedence = pieces.take((every - 1) * planes * s.slots);
  }
};

const float* in(const void* x) { return static_cast<const float*>(x); }
float* out(void* x) { return static_cast<float*>(x); }

// One call's walk from the last step to the first.
class WalkBack {
 public:
  WalkBack(const MemoryBackward& p, const Backward& f, const Segment& segment, cudaStream_t stream)
      : p_(p), s_(p.sizes), f_(f), segment_(segment), stream_(stream) {
    planes_ = s_.batch * s_.write_heads;
    memory_ = s_.batch * s_.slots * s_.width;
    links_ = planes_ * s_.slots * s_.slots;
  }

  cudaError_t run() {
    const int64_t every = s_.every < s_.steps ? s_.every : s_.steps;
    f_.grads = {in(p_.grads.memory),     in(p_.grads.usage),        in(p_.grads.links),
                in(p_.grads.precedence), in(p_.grads.read_weights), in(p_.grads.write_weights)};
    for (int64_t begin = (s_.steps - 1) / every * every; begin >= 0; begin -= every) {
      const int64_t end = begin + every < s_.steps ? begin + every : s_.steps;
      MK_TRY(replay(begin, end));
      for (int64_t t = end - 1; t >= begin; --t) MK_TRY(step(t, begin));
    }
    return cudaSuccess;
  }

 private:
  // Rows of a history after step t, or of the first state for t = -1.
  const float* row(const void* history, const void* first, int64_t t, int64_t count) const {
    return t < 0 ? in(first) : in(history) + t * s_.batch * count * s_.slots;
  }
  // The state before step begin + k of a segment, in its matrices.
  const float* before(const void* state, const void* saved, const float* own, int64_t size, int64_t begin,
                      int64_t k) const {
    if (k > 0) return own + (k - 1) * size;
    const int64_t segment = begin / s_.every;
    return segment == 0 ? in(state) : in(saved) + (segment - 1) * size;
  }
  const float* memory_before(int64_t begin, int64_t k) const {
    return before(p_.state.memory, p_.saved.memory, segment_.memory, memory_, begin, k);
  }
  const float* links_before(int64_t begin, int64_t k) const {
    return before(p_.state.links, p_.saved.links, segment_.links, links_, begin, k);
  }
  const float* precedence_before(int64_t begin, int64_t k) const {
    return before(p_.state.precedence, p_.saved.precedence, segment_.precedence, planes_ * s_.slots, begin, k);
  }

  cudaError_t replay(int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t k = t - begin;
      const bool links = s_.track_links && t + 1 < end;
      const float* write = row(p_.saved.write_weights, nullptr, t, s_.write_heads);
      if (links) {
        LinkPass pass{};
        Shape shape = f_.shape;
        shape.step = t;
        pass.sizes = shape.links();
        pass.from = links_before(begin, k);
        pass.to = segment_.links + k * links_;
        pass.write = write;
        pass.precedence = precedence_before(begin, k);
        MK_TRY(link_pass(pass, stream_));
      }
      const bool known = p_.final_memory != nullptr && t + 1 == s_.steps;
      if (known && !links) continue;
      Rewrite again{};
      again.shape = f_.shape;
      again.shape.step = t;
      again.memory = memory_before(begin, k);
      again.read_weights = row(p_.saved.read_weights, p_.state.read_weights, t - 1, s_.read_heads);
      again.write_weights = write;
      again.precedence = links ? precedence_before(begin, k) : nullptr;
      again.interface = p_.interface;
      again.to_memory = known ? nullptr : segment_.memory + k * memory_;
      again.to_precedence = links ? segment_.precedence + k * planes_ * s_.slots : nullptr;
      MK_TRY(rewrite(again, stream_));
    }
    return cudaSuccess;
  }

  cudaError_t step(int64_t t, int64_t begin) {
    const int64_t k = t - begin, reads = s_.read_heads, writes = s_.write_heads;
    const bool known = p_.final_memory != nullptr && t + 1 == s_.steps;
    f_.shape.step = t;
    f_.old.memory = memory_before(begin, k);
    f_.memory = known ? in(p_.final_memory) : segment_.memory + k * memory_;
    if (s_.track_links) {
      f_.old.links = links_before(begin, k);
      f_.old.precedence = precedence_before(begin, k);
    }
    f_.old.read_weights = row(p_.saved.read_weights, p_.state.read_weights, t - 1, reads);
    f_.old.write_weights = row(p_.saved.write_weights, p_.state.write_weights, t - 1, writes);
    f_.read_weights = row(p_.saved.read_weights, nullptr, t, reads);
    f_.write_weights = row(p_.saved.write_weights, nullptr, t, writes);
    f_.read_content = row(p_.saved.read_content, nullptr, t, reads);
    f_.write_content = row(p_.saved.write_content, nullptr, t, writes);
    if (p_.sharpness != nullptr) f_.mixed = row(p_.saved.mixed, nullptr, t, reads);
    if (s_.track_usage) {
      f_.old.usage = row(p_.saved.usage, p_.state.usage, t - 1, 1);
      f_.usage = row(p_.saved.usage, nullptr, t, 1);
      f_.allocation = row(p_.saved.allocation, nullptr, t, writes);
    }
    MK_TRY(back_through_step(f_, stream_));
    const MemoryFields<float*>& d = f_.d_state;
    f_.grads = {d.memory, d.usage, d.links, d.precedence, d.read_weights, d.write_weights};
    return cudaSuccess;
  }

  const MemoryBackward& p_;
  const MemorySizes& s_;
  Backward f_;
  const Segment segment_;
  cudaStream_t stream_;
  int64_t planes_, memory_, links_;
};

}  // namespace

}  // namespace slots

int64_t memory_backward_scratch(const MemorySizes& sizes) {
  slots::Pieces pieces(nullptr);
  slots::carve(sizes, pieces);
  slots::Segment(sizes, pieces);
  return pieces.count();
}

cudaError_t memory_backward(const MemoryBackward& p, float* scratch, int32_t* tickets, cudaStream_t stream) {
  using namespace slots;
  const MemorySizes& s = p.sizes;
  if (s.batch == 0 || s.steps == 0) return cudaSuccess;
  Pieces pieces(scratch);
  Backward f = carve(s, pieces);
  const Segment segment(s, pieces);
  f.shape = Shape(s, p.step_mask);
  f.interface = p.interface;
  f.d_interface = p.d_interface;
  f.sharpness = p.sharpness;
  f.d_sharpness = p.d_sharpness;
  f.grad_reads = in(p.grad_reads);
  f.tickets = tickets;
  f.d_state.memory = out(p.d_state.memory);
  f.d_state.usage = s.track_usage ? out(p.d_state.usage) : nullptr;
  f.d_state.links = s.track_links ? out(p.d_state.links) : nullptr;
  f.d_state.precedence = s.track_links ? out(p.d_state.precedence) : nullptr;
  f.d_state.read_weights = out(p.d_state.read_weights);
  f.d_state.write_weights = out(p.d_state.write_weights);
  return WalkBack(p, f, segment, stream).run();
}

}  // namespace memkern::cuda
