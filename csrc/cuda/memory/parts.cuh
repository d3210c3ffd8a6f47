// What the operators that are a part of a step share.
#pragma once

#include "cuda/memory/memory.h"
#include "cuda/memory/step.cuh"

namespace memkern::cuda::slots {

// How a memory is cut into the blocks of one launch.
struct Cut {
  int64_t batch;
  int slots, width, heads, rows, parts;

  Cut(int64_t batch_, int64_t slots_, int64_t width_, int64_t heads_)
      : batch(batch_),
        slots(int(slots_)),
        width(int(width_)),
        heads(int(heads_)),
        rows(rows_per_part(width_)),
        parts(parts_of(slots_, width_)) {}

  unsigned int blocks() const { return static_cast<unsigned int>(batch * parts); }
  int64_t columns() const { return batch * parts * heads * width; }
  __device__ __forceinline__ int64_t item() const { return blockIdx.x / parts; }
  __device__ __forceinline__ int part() const { return int(blockIdx.x % parts); }
  __device__ __forceinline__ Range range() const { return {part() * rows, min((part() + 1) * rows, slots)}; }
};

// Sums of the parts' columns, in order: out (heads, width) from row `first` of each part's `rows`.
__device__ __forceinline__ void sum_parts(const Cut& cut, const float* columns, int rows, int first, float* out) {
  for (int i = threadIdx.x; i < cut.heads * cut.width; i += kThreads) {
    float sum = 0.0f;
    for (int part = 0; part < cut.parts; ++part) {
      sum += columns[(int64_t(part) * rows + first) * cut.width + i];
    }
    out[i] = sum;
  }
}

inline const float* in(const void* x) { return static_cast<const float*>(x); }
inline float* out(void* x) { return static_cast<float*>(x); }

inline unsigned int grid(int64_t blocks) { return static_cast<unsigned int>(blocks); }

}  // namespace memkern::cuda::slots
