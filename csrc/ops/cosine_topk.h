// Exact top-k cosine search: what the CPU kernels take, and their table.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host.h"
#include "cpu/dispatch.h"

namespace memkern::cpu {

// A product of a library: out (M, N) = a b^T, all dense but a, whose rows are a_row elements apart. Of float into float, of
// bfloat16 into bfloat16.
struct LibraryOperands {
  const void* a;  // (M, K)
  const void* b;  // (N, K)
  void* out;
  int64_t M, N, K, a_row;
  DType dtype;
};
using LibraryProduct = void (*)(const LibraryOperands&);

// f is float, double for float64. The last axis of queries and database is dense, other strides are in elements.
struct CosineSearch {
  DType query_dtype, dtype;
  int64_t searches, queries, rows, width, k;
  const void* query;
  int64_t query_stride[2];  // search, query
  const void* database;
  int64_t database_stride[2];  // search, row
  const bool* valid;           // or null
  bool valid_per_query;
  int64_t valid_stride[3];     // search, query (0 unless per query), row
  const int64_t* query_group;  // (searches, queries), or null
  const int64_t* row_group;    // (searches, rows), or null
  const void* inverse_norms;   // (searches, rows) f, or null
  bool normalized;
  double min_score;
  void* scores;      // (searches, queries, k) f
  int64_t* indices;  // (searches, queries, k)
  int64_t thread_count;
  ParallelFor threads;
  LibraryProduct multiply;  // or null: our own kernels
};

// All dense. A gradient that is null is not wanted.
struct CosineBackward {
  DType query_dtype, dtype;
  int64_t searches, queries, rows, width, k;
  const void* grad;  // (searches, queries, k) f
  const void* query;
  const void* database;
  const int64_t* indices;
  const void* inverse_norms;  // (searches, rows) f, or null
  bool normalized;
  void* d_query;
  void* d_database;
  ParallelFor threads;
};

struct InverseNorms {
  DType dtype;
  int64_t rows, width;
  const void* database;
  const void* grad;  // backward alone: (rows) f
  void* out;         // forward (rows) f, backward (rows, width)
  ParallelFor threads;
};

struct CosineTopkTable {
  void (*search)(const CosineSearch&);
  void (*backward)(const CosineBackward&);
  void (*inverse_norms)(const InverseNorms&);
  void (*inverse_norms_backward)(const InverseNorms&);
};

}  // namespace memkern::cpu
