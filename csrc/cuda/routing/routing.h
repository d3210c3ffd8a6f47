// Launchers of the routing column on CUDA. They take the structures of ops/routing.h with two differences: parameters
// keep the dtypes that ParamTypes names (no launch is spent on conversions), and scratch memory comes from the caller.
#pragma once

#include <cuda_runtime.h>

#include "ops/routing.h"

namespace memkern::cuda {

struct ParamTypes {
  DType weight;  // that of hiddens, or float32
  DType bias, query, temperature;
};

constexpr int64_t kGroup = 64;  // rows whose terms one block adds; see finish_loss
constexpr int64_t group_count(int64_t rows) { return (rows + kGroup - 1) / kGroup; }

struct RouteWorkspace {
  int64_t splits, split_width;  // of D: route_splits
  float* partial;               // (splits, B, K)
  int32_t* large;               // (splits, B)
  float* terms;                 // forward (B, K + 1); backward (B, K + 1)
  float* groups;                // forward (groups, 2 K + 1); backward (groups, K + 1)
  float* pooled;                // (B, D): attention without saving; backward the pool's gradient
  float* scores;                // (B, S): attention without saving; backward the scores' gradient
  float* query_parts;           // (B, D): backward of attention
  int32_t* tickets;             // 1 + groups + B
};

struct WeightWorkspace {
  int64_t splits, split_rows;  // of B: weight_splits
  float* partial;              // (splits, K, D)
  float* query_partial;        // (splits, D)
  int32_t* tickets;            // tiles
};

// How few rows are spread over the device.
void route_splits(const RouteInput& in, RouteWorkspace& w);
// The same for the weight's gradient; returns the number of its tiles.
int64_t weight_splits(const RouteInput& in, WeightWorkspace& w);

cudaError_t route_forward(const RouteForward& p, const ParamTypes& types, const RouteWorkspace& w, cudaStream_t stream);
// d_raw: (B, K), wanted by route_backward_weight.
cudaError_t route_backward_rows(const RouteBackward& p, const ParamTypes& types, const RouteWorkspace& w, float* d_raw,
                                cudaStream_t stream);
// Writes d_weight in the weight's dtype, and d_query from the parts.
cudaError_t route_backward_weight(const RouteBackward& p, const ParamTypes& types, const WeightWorkspace& w,
                                  const float* d_raw, const float* query_parts, cudaStream_t stream);

// groups: (groups, 1) floats, or (groups, 2 K + 1) for the loss; ticket: one counter.
cudaError_t softmax_forward(const RowSoftmax& p, DType temperature, cudaStream_t stream);
cudaError_t softmax_backward(const RowSoftmax& p, DType temperature, float* groups, int32_t* ticket, cudaStream_t stream);
cudaError_t entropy_forward(const RowEntropy& p, cudaStream_t stream);
cudaError_t entropy_backward(const RowEntropy& p, cudaStream_t stream);
cudaError_t balance_forward(const BalanceLoss& p, float* groups, int32_t* ticket, cudaStream_t stream);
cudaError_t balance_backward(const BalanceLoss& p, cudaStream_t stream);

}  // namespace memkern::cuda
