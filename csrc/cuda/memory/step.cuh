// The parameters of one step's kernels, forward and backward, and what the two share.
#pragma once

#include "cuda/memory/links.cuh"
#include "cuda/memory/memory.h"
#include "cuda/memory/rows.cuh"

namespace memkern::cuda::slots {

#define MK_TRY(...)                          \
  do {                                       \
    const cudaError_t error = (__VA_ARGS__); \
    if (error != cudaSuccess) return error;  \
  } while (false)

// Nothing to do where both are the same.
inline cudaError_t copy_on(const float* from, float* to, int64_t count, cudaStream_t stream) {
  if (from == to || count == 0) return cudaSuccess;
  return cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(float), cudaMemcpyDeviceToDevice, stream);
}

// Sizes as the kernels count: rows in int, offsets in int64.
struct Shape {
  int64_t batch, steps, step;  // `step` is the one that runs
  int slots, width, read_heads, write_heads, rows, parts, link_blocks;
  bool track_usage, track_links, deallocate, detach_usage;
  const uint8_t* step_mask;  // (B, T)

  Shape() = default;
  Shape(const MemorySizes& s, const uint8_t* mask)
      : batch(s.batch),
        steps(s.steps),
        step(0),
        slots(int(s.slots)),
        width(int(s.width)),
        read_heads(int(s.read_heads)),
        write_heads(int(s.write_heads)),
        rows(rows_per_part(s.width)),
        parts(parts_of(s.slots, s.width)),
        link_blocks(slots::link_blocks(s.slots)),
        track_usage(s.track_usage),
        track_links(s.track_links),
        deallocate(s.deallocate),
        detach_usage(s.detach_usage),
        step_mask(mask) {}

  LinkSizes links() const {
    return {batch, write_heads, read_heads, slots, step_mask == nullptr ? nullptr : step_mask + step, steps};
  }
  unsigned int blocks() const { return static_cast<unsigned int>(batch * parts); }

  __device__ __forceinline__ bool runs(int64_t b) const {
    return takes_step(step_mask == nullptr ? nullptr : step_mask + step, steps, b);
  }
  // Row of a tensor (B, T, count) or (B, T, R, W) of this step.
  __device__ __forceinline__ int64_t at(int64_t b, int64_t count) const { return (b * steps + step) * count; }
};

// The block's batch item, and its rows of the memory.
struct Part {
  int64_t batch;
  int index;
  Range range;

  __device__ __forceinline__ explicit Part(const Shape& s)
      : batch(blockIdx.x / s.parts), index(int(blockIdx.x % s.parts)) {
    range.begin = index * s.rows;
    range.end = min(range.begin + s.rows, s.slots);
  }
};

// What stands at batch item b in a tensor (B, count, N), null for null.
template <class P>
__device__ __forceinline__ P of_item(P base, int64_t b, int64_t size) {
  return base == nullptr ? base : base + b * size;
}

// The interface of a batch item at this step.
template <class P>  // const float* or float*
struct Said {
  P read_keys, read_strengths, read_modes, write_keys, write_strengths, write_vectors, erase_vectors, free_gates,
      allocation_gates, write_gates, sharpness;

  template <class V>
  __device__ __forceinline__ Said(const Shape& s, const InterfaceFields<V>& f, V sharpness_, int64_t b) {
    const int64_t at = b * s.steps + s.step, reads = s.read_heads, writes = s.write_heads;
    auto field = [&](V base, int64_t count) { return static_cast<P>(base) + at * count; };
    read_keys = field(f.read_keys, reads * s.width);
    read_strengths = field(f.read_strengths, reads);
    read_modes = field(f.read_modes, reads * (1 + 2 * writes));
    write_keys = field(f.write_keys, writes * s.width);
    write_strengths = field(f.write_strengths, writes);
    write_vectors = field(f.write_vectors, writes * s.width);
    erase_vectors = field(f.erase_vectors, writes * s.width);
    free_gates = field(f.free_gates, reads);
    allocation_gates = field(f.allocation_gates, writes);
    write_gates = field(f.write_gates, writes);
    sharpness = sharpness_ == nullptr ? nullptr : field(sharpness_, reads);
  }
};

// Hands out pieces of one allocation, each 16-byte aligned; from null, it counts.
class Pieces {
 public:
  __host__ __device__ explicit Pieces(float* at) : at_(at) {}
  __host__ __device__ float* take(int64_t count) {
    const int64_t place = count_;
    count_ += (count + 3) / 4 * 4;
    return at_ == nullptr ? nullptr : at_ + place;
  }
  Order order(int64_t batch, int64_t slots) {
    Order found{};
    found.keys = take(batch * slots);
    found.slots = reinterpret_cast<int32_t*>(take(batch * slots));
    found.before = take(batch * slots);
    found.sorted = reinterpret_cast<uint64_t*>(take(2 * batch * sort_size(slots)));
    return found;
  }
  template <class T>
  __host__ __device__ T* place() {
    return reinterpret_cast<T*>(take((sizeof(T) + 3) / 4));
  }
  __host__ __device__ int64_t count() const { return count_; }

 private:
  float* at_;
  int64_t count_ = 0;
};

__device__ __forceinline__ Order order_of(const Order& all, int64_t b, int n) {
  int64_t size = 1;
  while (size < n) size *= 2;
  return {all.keys + b * n, all.slots + b * n, all.before + b * n, n > kRanked ? all.sorted + b * size : all.sorted};
}

}  // namespace memkern::cuda::slots
