// Backward of memory_step and memory_scan: the walk from the last step to the first, by launches for each step where it
// is not one launch (resident_back.cu).
//
// Segments are taken from the last to the first: from the snapshot before a segment its memories, links and precedences
// are written again (the write weights are known, so no lookup is repeated), then its steps are taken backwards. Only
// one segment's matrices exist at a time.
#include "cuda/memory/backward.cuh"
#include "cuda/memory/past.cuh"
#include "cuda/memory/resident.cuh"

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
  const int n = s.slots, writes = s.write_heads;
  const bool runs = s.runs(b);
  const Said<const float*> said(s, p.interface, static_cast<const void*>(nullptr), b);
  const float* write = p.write_weights + b * writes * n;
  if (p.to_memory != nullptr) {
    const float *from = p.memory + b * n * s.width, *read = p.read_weights + b * s.read_heads * n;
    float* to = p.to_memory + b * n * s.width;
    rewrite_rows(s, runs, part.range, said, from, read, write, to);
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
  f.retention = pieces.take(b * n);
  f.d_retention = pieces.take(b * n);
  f.columns = pieces.take(b * parts_of(n, sizes.width) * (reads + 2 * writes) * sizes.width);
  f.order = pieces.order(b, n);
  return f;
}

// One call's walk from the last step to the first.
class WalkBack {
 public:
  WalkBack(const MemoryBackward& p, const Backward& f, const Segment& segment, cudaStream_t stream)
      : p_(p), s_(p.sizes), f_(f), past_(p, segment), stream_(stream) {}

  cudaError_t run() {
    const int64_t every = past_.every;
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
  cudaError_t replay(int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t k = t - begin;
      const bool links = s_.track_links && t + 1 < end;
      Shape shape = f_.shape;
      shape.step = t;
      if (links) {
        LinkPass pass{};
        pass.sizes = shape.links();
        pass.from = past_.links_before(begin, k);
        pass.to = past_.links_again(k);
        pass.write = past_.write_after(t);
        pass.precedence = past_.precedence_before(begin, k);
        MK_TRY(link_pass(pass, stream_));
      }
      const bool known = p_.final_memory != nullptr && t + 1 == s_.steps;
      if (known && !links) continue;
      Rewrite again{};
      again.shape = shape;
      again.memory = past_.memory_before(begin, k);
      again.read_weights = past_.read_after(t - 1);
      again.write_weights = past_.write_after(t);
      again.precedence = links ? past_.precedence_before(begin, k) : nullptr;
      again.interface = p_.interface;
      again.to_memory = known ? nullptr : past_.memory_again(k);
      again.to_precedence = links ? past_.precedence_again(k) : nullptr;
      MK_TRY(rewrite(again, stream_));
    }
    return cudaSuccess;
  }

  cudaError_t step(int64_t t, int64_t begin) {
    const int64_t k = t - begin;
    const bool known = p_.final_memory != nullptr && t + 1 == s_.steps;
    f_.shape.step = t;
    f_.old.memory = past_.memory_before(begin, k);
    f_.memory = known ? in(p_.final_memory) : past_.memory_again(k);
    if (s_.track_links) {
      f_.old.links = past_.links_before(begin, k);
      f_.old.precedence = past_.precedence_before(begin, k);
    }
    f_.old.read_weights = past_.read_after(t - 1);
    f_.old.write_weights = past_.write_after(t - 1);
    f_.read_weights = past_.read_after(t);
    f_.write_weights = past_.write_after(t);
    f_.read_content = past_.saved.read_content + t * past_.read;
    f_.write_content = past_.saved.write_content + t * past_.write;
    if (p_.sharpness != nullptr) f_.mixed = past_.saved.mixed + t * past_.read;
    if (s_.track_usage) {
      f_.old.usage = past_.usage_after(t - 1);
      f_.usage = past_.usage_after(t);
      f_.allocation = past_.saved.allocation + t * past_.write;
    }
    MK_TRY(back_through_step(f_, stream_));
    const MemoryFields<float*>& d = f_.d_state;
    f_.grads = {d.memory, d.usage, d.links, d.precedence, d.read_weights, d.write_weights};
    return cudaSuccess;
  }

  const MemoryBackward& p_;
  const MemorySizes& s_;
  Backward f_;
  const Past past_;
  cudaStream_t stream_;
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
  cudaError_t error = cudaSuccess;
  if (resident_backward(p, scratch, stream, error)) return error;
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
