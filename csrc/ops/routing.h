// The routing column's kernels as plain functions over pointers and sizes; memkern/ops/routing has the contract.
//
// f below is float, or double where dtype is double. Parameters (weight, bias, query, temperature) arrive as f, masks as
// one byte per element; everything is contiguous except hiddens, whose last stride alone has to be 1. Pointers to what a
// call does not have are null.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host.h"

namespace memkern {

enum class Pooling : int { kMean = 0, kMax = 1, kAttention = 2 };

struct RouteInput {
  DType dtype;  // of hiddens and of the probabilities
  int64_t rows, slots, width, experts;
  const void* hiddens;
  int64_t row_stride, slot_stride;  // in elements
  const void* weight;               // f (K, D)
  const void* temperature;          // f ()
  double temperature_value;         // where temperature is null
  Pooling pooling;
  const void* query;         // f (D)
  const uint8_t* slot_mask;  // (B, S)
  const uint8_t* row_mask;   // (B)
  double clamp;              // infinity for none
};

struct RouteForward {
  RouteInput in;
  const void* bias;  // f (K)
  void* probs;       // dtype (B, K)
  void* logits;      // f (B, K)
  void* entropy;     // f (B)
  void* loss;        // f ()
  // What backward reads; null when no gradient is needed.
  void* raw;           // f (B, K)
  void* saved_pool;    // f (B, D), int32 (B, D) for max; null also for one slot
  void* slot_weights;  // f (B, S), attention alone
  void* loss_weights;  // f (K)
  uint8_t* zero_rows;  // (B)
};

struct RouteBackward {
  RouteInput in;
  const void* grad_probs;    // dtype (B, K)
  const void* grad_logits;   // f (B, K)
  const void* grad_entropy;  // f (B)
  const void* grad_loss;     // f ()
  const void* raw;
  const void* saved_pool;
  const void* slot_weights;
  const void* loss_weights;
  const uint8_t* zero_rows;
  bool straight_through;
  void* d_hiddens;      // dtype (B, S, D), contiguous
  void* d_weight;       // f (K, D)
  void* d_bias;         // f (K)
  void* d_temperature;  // f ()
  void* d_query;        // f (D)
};

struct RowSoftmax {
  DType dtype;
  int64_t rows, size;
  const void* logits;       // dtype (rows, size)
  const void* temperature;  // f ()
  double temperature_value;
  double clamp;
  void* probs;          // dtype (rows, size): forward alone
  const void* grad;     // dtype (rows, size): backward, like what follows
  void* d_logits;       // dtype (rows, size)
  void* d_temperature;  // f (), may be null
};

struct RowEntropy {
  DType dtype;
  int64_t rows, size;
  const void* probs;  // dtype (rows, size)
  void* entropy;      // f (rows): forward alone
  const void* grad;   // f (rows): backward
  void* d_probs;      // dtype (rows, size)
};

struct BalanceLoss {
  DType dtype;
  int64_t rows, size;
  const void* probs;        // dtype (rows, size)
  const uint8_t* row_mask;  // (rows)
  void* loss;               // f ()
  void* loss_weights;       // f (size): written forward, read backward
  const void* grad;         // f (): backward
  void* d_probs;            // dtype (rows, size)
};

namespace cpu {

struct RoutingTable {
  void (*route_forward)(const RouteForward&, ParallelFor);
  void (*route_backward)(const RouteBackward&, ParallelFor);
  void (*softmax_forward)(const RowSoftmax&, ParallelFor);
  void (*softmax_backward)(const RowSoftmax&, ParallelFor);
  void (*entropy_forward)(const RowEntropy&, ParallelFor);
  void (*entropy_backward)(const RowEntropy&, ParallelFor);
  void (*balance_forward)(const BalanceLoss&, ParallelFor);
  void (*balance_backward)(const BalanceLoss&, ParallelFor);
};

}  // namespace cpu

}  // namespace memkern
