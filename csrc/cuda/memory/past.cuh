// What the walk back over a scan looks back at: the rows that its steps left, and the matrices before the steps of one
// segment, which are written again from the snapshot before it.
#pragma once

#include "cuda/memory/step.cuh"

namespace memkern::cuda::slots {

inline const float* in(const void* x) { return static_cast<const float*>(x); }
inline float* out(void* x) { return static_cast<float*>(x); }

// The matrices of one segment: after each of its steps, but for links and precedence after the last.
struct Segment {
  float *memory, *links, *precedence;

  Segment() = default;
  Segment(const MemorySizes& s, Pieces& pieces) : memory(nullptr), links(nullptr), precedence(nullptr) {
    const int64_t every = s.every < s.steps ? s.every : s.steps, planes = s.batch * s.write_heads;
    memory = pieces.take(every * s.batch * s.slots * s.width);
    if (!s.track_links || every < 2) return;
    links = pieces.take((every - 1) * planes * s.slots * s.slots);
    precedence = pieces.take((every - 1) * planes * s.slots);
  }
};

struct Past {
  int64_t every;                              // steps of a segment, at most all
  int64_t read, write, vector, memory, links;  // elements of a state's fields, all batch items together; vector: (B, N)
  MemoryFields<const float*> state;
  MemorySaved<const float*> saved;
  Segment segment;

  Past() = default;
  Past(const MemoryBackward& p, const Segment& segment_) : segment(segment_) {
    const MemorySizes& s = p.sizes;
    every = s.every < s.steps ? s.every : s.steps;
    vector = s.batch * s.slots;
    read = vector * s.read_heads;
    write = vector * s.write_heads;
    memory = vector * s.width;
    links = write * s.slots;
    state = {in(p.state.memory),     in(p.state.usage),        in(p.state.links),
             in(p.state.precedence), in(p.state.read_weights), in(p.state.write_weights)};
    saved = {in(p.saved.write_content), in(p.saved.allocation),   in(p.saved.read_content),  in(p.saved.mixed),
             in(p.saved.usage),         in(p.saved.read_weights), in(p.saved.write_weights), in(p.saved.memory),
             in(p.saved.links),         in(p.saved.precedence)};
  }

  // The state's vectors after step t; of t = -1, those that the scan began with.
  __host__ __device__ const float* usage_after(int64_t t) const {
    return t < 0 ? state.usage : saved.usage + t * vector;
  }
  __host__ __device__ const float* read_after(int64_t t) const {
    return t < 0 ? state.read_weights : saved.read_weights + t * read;
  }
  __host__ __device__ const float* write_after(int64_t t) const {
    return t < 0 ? state.write_weights : saved.write_weights + t * write;
  }
  // The matrices before step begin + k of the segment that begins there.
  __host__ __device__ const float* memory_before(int64_t begin, int64_t k) const {
    return before(state.memory, saved.memory, segment.memory, memory, begin, k);
  }
  __host__ __device__ const float* links_before(int64_t begin, int64_t k) const {
    return before(state.links, saved.links, segment.links, links, begin, k);
  }
  __host__ __device__ const float* precedence_before(int64_t begin, int64_t k) const {
    return before(state.precedence, saved.precedence, segment.precedence, write, begin, k);
  }
  // Where those after it are written again.
  __host__ __device__ float* memory_again(int64_t k) const { return segment.memory + k * memory; }
  __host__ __device__ float* links_again(int64_t k) const { return segment.links + k * links; }
  __host__ __device__ float* precedence_again(int64_t k) const { return segment.precedence + k * write; }

 private:
  __host__ __device__ const float* before(const float* first, const float* snapshots, const float* own, int64_t size,
                                          int64_t begin, int64_t k) const {
    if (k > 0) return own + (k - 1) * size;
    return begin == 0 ? first : snapshots + (begin / every - 1) * size;
  }
};

// Repeats a step's write of some rows of the memory from the write weights that it found; `read_weights` are those
// before the step. Rows and slots count from the same one on.
__device__ __forceinline__ void rewrite_rows(const Shape& s, bool runs, Range range, const Said<const float*>& said,
                                             const float* from, const float* read_weights, const float* write_weights,
                                             float* to) {
  each_element(range, s.width, [&](int i, int k) {
    const int64_t at = int64_t(i) * s.width + k;
    if (!runs) {
      to[at] = from[at];
      return;
    }
    const float scale = s.deallocate ? retention_at(read_weights, said.free_gates, s.read_heads, s.slots, i) : 1.0f;
    to[at] = written(from[at] * scale, write_weights, said.erase_vectors, said.write_vectors, s.write_heads, s.slots,
                     s.width, i, k);
  });
}

}  // namespace memkern::cuda::slots
