// The CUDA kernels of the search. Every launcher returns the error of its launches and waits for nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace memkern::cuda {

// The dtypes of queries and database may differ. The last axes are dense, other strides are in elements.
struct CosineSearch {
  DType query_dtype, dtype;
  int64_t searches, queries, rows, width;  // rows < 2^32
  int k;
  const void* query;
  int64_t query_stride[2];  // search, query
  const void* database;
  int64_t database_stride[2];  // search, row
  const bool* valid;           // or null
  int64_t valid_stride[3];     // search, query (0 for all), row
  const int64_t* query_group;  // (searches, queries), or null
  const int64_t* row_group;    // (searches, rows), or null
  const float* inverse_norms;  // (searches, rows), or null
  bool normalized;
  float min_score;
  float* scores;     // (searches, queries, k)
  int64_t* indices;  // (searches, queries, k)
  // Workspace, one entry for each query unless said otherwise.
  int capacity;      // keys in a buffer
  void* unit;        // (width) in dtype
  float* weight;     // (searches, rows), or null where norms are taken on the way
  float* factor;
  double* inverse;
  float* margin;
  float* bound;
  int32_t* appended;
  int32_t* flagged;
  int64_t* buffer;  // (capacity)
};

// Whether the scan takes the norms of the rows on its way, and needs no `weight`.
bool cosine_inline_norms(int64_t queries, bool normalized, bool given);
int cosine_capacity(int k);
cudaError_t cosine_topk_fwd(const CosineSearch& p, cudaStream_t stream);

// All dense, dtypes may differ. A gradient that is null is not wanted.
struct CosineBackward {
  DType query_dtype, dtype;
  int64_t searches, queries, rows, width;
  int64_t k;
  const float* grad;
  const void* query;
  const void* database;
  const int64_t* indices;
  const float* inverse_norms;  // or null
  bool normalized;
  void* d_query;
  void* d_database;
  float* coefficients;  // (4, searches, queries, k)
  // For the database: which row each place found, sorted stably, and the places in that order.
  int32_t* owner;
  const int32_t* sorted;
  const int32_t* order;
};

// Coefficients, the gradient of the queries, and the owners.
cudaError_t cosine_topk_bwd(const CosineBackward& p, cudaStream_t stream);
// The gradient of the database, after the owners were sorted.
cudaError_t cosine_topk_bwd_rows(const CosineBackward& p, cudaStream_t stream);

cudaError_t inverse_norms_fwd(DType dtype, const void* database, int64_t rows, int64_t width, float* out,
                              cudaStream_t stream);
cudaError_t inverse_norms_bwd(DType dtype, const float* grad, const void* database, int64_t rows, int64_t width,
                              void* out, cudaStream_t stream);

}  // namespace memkern::cuda
