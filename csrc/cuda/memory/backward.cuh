// The parameters of the kernels of one step's backward.
#pragma once

#include "cuda/memory/step.cuh"

namespace memkern::cuda::slots {

struct Backward {
  Shape shape;
  InterfaceFields<const void*> interface;
  InterfaceFields<void*> d_interface;
  const void* sharpness;
  void* d_sharpness;
  const float* grad_reads;             // (B, T, R, W) or null
  MemoryFields<const float*> grads;    // of the state after the step; null for zero
  MemoryFields<float*> d_state;        // of the state before it; each may be what is in `grads`
  MemoryFields<const float*> old;      // the state before the step
  const float *memory, *usage, *read_weights, *write_weights;  // after the step
  const float *write_content, *allocation, *read_content, *mixed;
  // Of the reads: <key, row> and |row|^2 of the new memory, gradients of the mixed weights and of the content weights
  // (then the factors of content_backward).
  float *read_dots, *read_norms, *d_mixed, *d_content, *read_own;
  float *ahead, *back, *row, *column;
  // Of the write: <key, row> and |row|^2 of the old memory, gradients of write weights and of the lookup.
  float *write_dots, *write_norms, *d_write, *d_lookup, *scaled, *write_own;
  float *seen;       // (B, H, N) usage as each head saw it
  float *d_seen, *d_allocated, *retention, *d_retention;
  float *columns;    // (B, parts, R + 2 H, W)
  Order order;
  int32_t* tickets;
};

// Four launches.
cudaError_t back_through_step(const Backward& p, cudaStream_t stream);

}  // namespace memkern::cuda::slots
