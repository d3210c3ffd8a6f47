// Everything of the expert updates on the CPU except their matrix products: gates, mixes, slots of a sequence.
//
// r = b S + s is a row, R = B S of them. T is the dtype of the states, A what it is computed in (float or double), Z that
// of the products and G that of the gates kept for backward: T itself, or A. The last axis of everything has stride 1;
// other strides are in elements.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host.h"
#include "cpu/dispatch.h"

namespace memkern::cpu {

// Pre-activations of E experts from `expert0` on, in the rows of N whole batch items from `batch0` on.
struct MixForward {
  ParallelFor run;
  DType dtype, product_dtype, gates_dtype;
  int64_t batch0, N, S, expert0, E, K, D;
  // (N S, E, D) Z each: what the hiddens contribute, or everything when the second pair is null.
  const void *gate, *update;
  int64_t product_row, product_expert;
  const void *more_gate, *more_update;  // (N S, E, D) Z: what the states contribute
  int64_t more_row, more_expert;
  const void* states;  // (B, K, S, D) T
  int64_t states_batch, states_expert, states_slot;
  const void *probs, *gate_bias, *update_bias;  // (B, K), (K, D), (K, D) A; a bias may be null
  const bool* row_mask;                         // (B,) or null
  void* out;                                    // (B, K, S, D) T
  void *gates, *updates;                        // (B, S, K, D) G or null; may be gate and update themselves
};

// Of E experts from `expert0` on.
struct MixBackward {
  ParallelFor run;
  DType dtype, product_dtype, gates_dtype;
  int64_t expert0, E, B, K, S, D;
  const void* grad;    // (B, K, S, D) T
  const void* states;  // (B, K, S, D) T
  int64_t grad_batch, grad_expert, grad_slot;
  int64_t states_batch, states_expert, states_slot;
  const void* probs;              // (B, K) A
  const void *gates, *updates;    // (B, S, K, D) G
  const bool* row_mask;           // (B,) or null
  void* d_products;               // (R, E, 2, D) Z: gradients of the pre-activations, of the gate and of the update
  int64_t product_row, product_expert, product_half;
  void *d_probs;                  // (B, K) A or null
  void *d_gate_bias, *d_update_bias;  // (K, D) A or null
};

// d_states of one expert: its own share of the gradient, and what comes back through the products.
struct MixStates {
  ParallelFor run;
  DType dtype, product_dtype, gates_dtype;
  int64_t expert, B, K, S, D;
  const void* grad;  // (B, K, S, D) T
  int64_t grad_batch, grad_expert, grad_slot;
  const void* probs;      // (B, K) A
  const void* gates;      // (B, S, K, D) G
  const void* through;    // (R, D) Z
  const bool* row_mask;   // (B,) or null
  void* d_states;         // (B, K, S, D) T
};

struct Aggregate {
  ParallelFor run;
  DType dtype;
  int64_t B, K, S, D;
  const void* states;  // (B, K, S, D) T
  int64_t states_batch, states_expert, states_slot;
  const void* probs;  // (B, K) A
  const void* grad;   // (B, S, D) T, backward
  int64_t grad_batch, grad_slot;
  void* out;       // (B, S, D) T, forward
  void* d_states;  // (B, K, S, D) T or null
  void* d_probs;   // (B, K) A or null
};

struct Slots {
  ParallelFor run;
  DType dtype;
  int64_t B, N, S, D;          // N tokens
  const int64_t* input_ids;    // (B, N)
  const int64_t* slot_ids;     // (S,)
  const void* sequence;        // (B, N, D) T: hiddens, the sequence, or the gradient of a spliced one
  int64_t sequence_batch, sequence_token;
  const void* slots;           // (B, S, D) T: values to splice in, or the gradient of the means
  int64_t slots_batch, slots_slot;
  void* out_sequence;          // (B, N, D) T or null
  void* out_slots;             // (B, S, D): T for the means, A for the gradient of the values; or null
};

struct ExpertUpdateTable {
  void (*mix_forward)(const MixForward&);
  void (*mix_backward)(const MixBackward&);
  void (*mix_states)(const MixStates&);
  void (*aggregate_forward)(const Aggregate&);
  void (*aggregate_backward)(const Aggregate&);
  void (*gather_forward)(const Slots&);
  void (*gather_backward)(const Slots&);
  void (*scatter_forward)(const Slots&);
  void (*scatter_backward)(const Slots&);
};

}  // namespace memkern::cpu

MK_CPU_TABLE(ExpertUpdateTable, expert_update)
