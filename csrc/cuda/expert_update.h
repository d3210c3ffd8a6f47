// The CUDA kernels of the expert_update column. Every launcher returns the error of its launches and waits for nothing.
//
// All tensors are contiguous, of one dtype T (float, bfloat16 or float16) unless said otherwise, and begin at a multiple
// of 16 bytes. r = b S + s is a row, R = B S of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace memkern::cuda {

struct ExpertUpdate {
  DType dtype;
  int64_t B, K, S, D;
  const void* states;         // (B, K, S, D)
  const void* hiddens;        // (B, S, D)
  const float* probs;         // (B, K)
  const void* gate_weight;    // (K, D, 2D)
  const void* update_weight;  // (K, D, 2D)
  const float* gate_bias;     // (K, D) or null
  const float* update_bias;   // (K, D) or null
  const bool* row_mask;       // (B,) or null
  void* out;                  // (B, K, S, D)
  void *gates, *updates;      // (B, S, K, D) or null
  // Backward alone.
  const void* grad;                       // (B, K, S, D)
  void* d_products;                       // (R, K, 2, D): gradients of the gate's and the update's pre-activations
  void *d_states, *d_hiddens;             // or null
  float* d_probs;                         // (B, K) or null
  void *d_gate_weight, *d_update_weight;  // or null, together with the biases'
  float *d_gate_bias, *d_update_bias;     // (K, D)
};

// One launch: wgmma fed by bulk tensor copies on Hopper where the shape allows, mma.sync or FMA elsewhere.
cudaError_t update_experts_forward(const ExpertUpdate& p, cudaStream_t stream);
// At most three launches.
cudaError_t update_experts_backward(const ExpertUpdate& p, cudaStream_t stream);

// Of expert_update/hopper.cu: whether this call and this device can take it, and the launch.
bool hopper_takes(const ExpertUpdate& p);
cudaError_t hopper_forward(const ExpertUpdate& p, cudaStream_t stream);

struct ExpertAggregate {
  DType dtype;
  int64_t B, K, S, D;
  const void* states;  // (B, K, S, D)
  const float* probs;  // (B, K)
  const void* grad;    // (B, S, D), backward
  void* out;           // (B, S, D), forward
  void* d_states;      // (B, K, S, D) or null
  float* d_probs;      // (B, K) or null
};
cudaError_t aggregate_experts_forward(const ExpertAggregate& p, cudaStream_t stream);
cudaError_t aggregate_experts_backward(const ExpertAggregate& p, cudaStream_t stream);

struct ExpertSlots {
  DType dtype;
  int64_t B, N, S, D;        // N tokens
  const int64_t* input_ids;  // (B, N)
  const int64_t* slot_ids;   // (S,)
  const void* sequence;      // (B, N, D): hiddens, the sequence, or the gradient of a spliced one
  const void* slots;         // (B, S, D): values to splice in, or the gradient of the means
  void* out_sequence;        // (B, N, D) or null
  void* out_slots;           // (B, S, D): T for the means, float for the gradient of the values; or null
};
cudaError_t gather_slots_forward(const ExpertSlots& p, cudaStream_t stream);
cudaError_t gather_slots_backward(const ExpertSlots& p, cudaStream_t stream);
cudaError_t scatter_slots_forward(const ExpertSlots& p, cudaStream_t stream);
cudaError_t scatter_slots_backward(const ExpertSlots& p, cudaStream_t stream);

}  // namespace memkern::cuda
