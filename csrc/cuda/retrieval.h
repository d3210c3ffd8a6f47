// The CUDA kernels of the retrieval column. Every launcher returns the error of its launches and waits for nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace memkern::cuda {

// The widest head that a warp holds in registers, and the widest whose rows are no multiple of 16 bytes.
constexpr int64_t kMaxWidth = 512, kMaxOddWidth = 256;
constexpr int kMaxSources = 16;

struct PairStrides {
  int64_t b, a, t, c;  // in elements; t is 0 for a bank
};

// Where width is a multiple of 16 bytes, so is the address of every row.
struct RetrievedAttention {
  DType dtype;  // of everything that is floating, but for lse and delta: float
  int64_t batch, heads, count, pairs, width;
  int64_t bank;  // rows of the bank, -1 for own pairs
  const void* queries;  // (B, A, T, d)
  const void* keys;
  const void* values;
  PairStrides key_strides, value_strides;
  const int64_t* indices;  // (B, A, T, C) for a bank
  const bool* mask;        // (B, A, T, C) or null
  float scale;
  void* out;   // (B, A, T, d)
  float* lse;  // (B, A, T)
  // Backward alone.
  const void* grad;  // (B, A, T, d)
  void* d_queries;   // or null
  void* d_keys;      // contiguous, or null together with d_values
  void* d_values;
  float* delta;    // (B, A, T) grad . out, for a bank
  int32_t* owner;  // (B, A, T, C) which row of all banks each pair is, behind the last for none
};

cudaError_t attention_fwd(const RetrievedAttention& p, cudaStream_t stream);
// Gradients of queries and own pairs; with a bank, of queries, and delta and owner for attention_bank_bwd.
cudaError_t attention_bwd(const RetrievedAttention& p, cudaStream_t stream);
// Bytes that sort_owners needs for `entries` pairs.
size_t sort_bytes(int64_t entries, int64_t rows);
// Sorts `owner` (values up to `rows`) stably into `sorted`, and its positions into `order`. `iota` is scratch.
cudaError_t sort_owners(const int32_t* owner, int32_t* sorted, int32_t* iota, int32_t* order, int64_t entries,
                        int64_t rows, void* scratch, size_t bytes, cudaStream_t stream);
// Gradients of the bank: every row adds the queries that retrieved it, in the order of (t, c).
cudaError_t attention_bank_bwd(const RetrievedAttention& p, const int32_t* sorted, const int32_t* order,
                               cudaStream_t stream);

struct FuseSources {
  DType dtype;  // of sources, out, and their gradients
  int64_t rows, width;
  int sources, columns;
  const void* source[kMaxSources];  // (rows, width)
  int column[kMaxSources];
  const float* gates;  // (rows, columns)
  void* out;
  const void* grad;
  void* d_source[kMaxSources];
  float* d_gates;
};

cudaError_t fuse_fwd(const FuseSources& p, cudaStream_t stream);
cudaError_t fuse_bwd(const FuseSources& p, cudaStream_t stream);

struct SpanLoss {
  int64_t segments, tokens;
  const float* logits[2];  // (N, T) of starts, of ends
  const bool* positive[2];
  const bool* valid;
  const int64_t* document;
  float* loss;
  float* stats;    // (4, N)
  float* partial;  // (4, N), forward
  float* sums;     // (2, blocks of span_blocks), forward
  int32_t* ticket;
  const float* grad;  // ()
  float* d_logits[2];
};

int64_t span_blocks(int64_t segments);
cudaError_t span_fwd(const SpanLoss& p, cudaStream_t stream);
cudaError_t span_bwd(const SpanLoss& p, cudaStream_t stream);

}  // namespace memkern::cuda
