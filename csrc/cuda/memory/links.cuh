// The one pass over the link matrices: update, forward and backward reads together; and its backward, also one pass.
//
// A block takes the rows of a range, all columns. Sums along rows are whole when it is done; of sums along columns
// every block leaves a partial, and whoever reads them adds the blocks' in order.
#pragma once

#include "cuda/memory/slots.cuh"

namespace memkern::cuda::slots {

constexpr int kLinkRows = 64;  // rows of a block

inline int link_blocks(int64_t n) { return int((n + kLinkRows - 1) / kLinkRows); }

struct LinkSizes {
  int64_t batch;
  int write_heads, read_heads, slots;
  const uint8_t* step_mask;  // batch item b takes the step where step_mask[b * mask_stride]; null: all do
  int64_t mask_stride;
};

__device__ __forceinline__ bool takes_step(const uint8_t* step_mask, int64_t mask_stride, int64_t b) {
  return step_mask == nullptr || step_mask[b * mask_stride] != 0;
}

struct LinkPass {
  LinkSizes sizes;
  const float* from;        // (B, H, N, N)
  float* to;                // may be `from`; null to read without an update
  const float* write;       // (B, H, N) with an update
  const float* precedence;  // (B, H, N) before the step
  const float* reads;       // (B, R, N); null to update alone
  float* ahead;             // (B, H, R, N) L w
  float* back;              // (B, H, blocks, R, N) partials of L^T w
};

// What it leaves of a batch item that takes no step: its links, copied.
cudaError_t link_pass(LinkPass p, cudaStream_t stream);

struct LinkBackward {
  LinkSizes sizes;
  const float* links;       // (B, H, N, N) before the step
  const float* grad;        // (B, H, N, N) of the links after the step, or null for zero
  float* d_links;           // may be `grad`
  const float* write;       // (B, H, N)
  const float* precedence;  // (B, H, N) before the step
  const float* reads;       // (B, R, N) read weights r; null: nothing was read
  const float* d_reads;     // (B, R, N) gradient g of the mixed read weights
  const float* modes;       // read modes of item b at b * mode_stride: (R, 1 + 2 H)
  int64_t mode_stride;
  float* ahead;      // (B, H, R, N) L g, the gradient through backward reads up to their share
  float* back;       // (B, H, blocks, R, N) partials of L^T g, the same through forward reads
  float* row;        // (B, H, N) sum_j dL_ij (p_j - kept'_ij L_ij)
  float* column;     // (B, H, blocks, 2, N) partials of -sum_i dL_ij kept'_ij L_ij, and of sum_i dL_ij w_i
};

// Of a batch item that takes no step: its gradient, copied.
cudaError_t link_pass_backward(LinkBackward p, cudaStream_t stream);

// Backward of the reads alone: ahead = L r and back = L^T r.
struct DirectionalBackward {
  LinkSizes sizes;
  const float* links;   // (B, H, N, N)
  const float* reads;   // (B, R, N)
  const float* d_ahead;  // (B, H, R, N) or null for zero
  const float* d_back;
  float* d_links;  // (B, H, N, N)
  float* along;    // (B, H, R, N) L d_back
  float* down;     // (B, H, blocks, R, N) partials of L^T d_ahead
};

cudaError_t directional_pass_backward(const DirectionalBackward& p, cudaStream_t stream);

}  // namespace memkern::cuda::slots
