// The CPU kernels of the retrieval column: attention over retrieved pairs, fusion of gated sources, the span loss.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host.h"
#include "cpu/dispatch.h"

namespace memkern::cpu {

// A sequence of rows with consecutive elements: (b, a, t, c) of own pairs, (b, a, -, c) of a bank, in elements.
struct PairStrides {
  int64_t b, a, t, c;
};

struct RetrievedAttention {
  DType dtype;        // of keys and values, and of their gradients
  DType query_dtype;  // of queries, out, and the gradients of both
  int64_t batch, heads, count, pairs, width;
  int64_t bank;            // rows of the bank, -1 for own pairs
  const void* queries;     // (B, A, T, d)
  const void* keys;
  const void* values;
  PairStrides key_strides, value_strides;
  const int64_t* indices;  // (B, A, T, C) for a bank
  const bool* mask;        // (B, A, T, C) or null
  double scale;
  void* out;  // (B, A, T, d)
  void* lse;  // (B, A, T) accumulator
  // Backward alone; out is not read.
  const void* grad;  // (B, A, T, d)
  void* d_queries;   // or null
  void* d_keys;      // contiguous, or null together with d_values
  void* d_values;
  ParallelFor threads;
};

constexpr int kMaxSources = 16;

struct FuseSources {
  DType dtype;  // of the sources, of out, and of their gradients
  int64_t rows, width, sources, columns;
  const void* source[kMaxSources];  // (rows, width)
  int64_t column[kMaxSources];      // of each source among the gates
  const void* gates;                // (rows, columns) accumulator
  void* out;                        // (rows, width)
  const void* grad;                 // (rows, width)
  void* d_source[kMaxSources];
  void* d_gates;  // (rows, columns) accumulator
  ParallelFor threads;
};

struct SpanLoss {
  DType dtype;  // of the logits and everything else that is floating: the accumulator
  int64_t segments, tokens;
  const void* logits[2];  // (N, T) of starts, of ends
  const bool* positive[2];
  const bool* valid;
  const int64_t* document;
  void* loss;
  void* stats;       // (4, N)
  const void* grad;  // ()
  void* d_logits[2];
  ParallelFor threads;
};

struct RetrievalTable {
  void (*attention_fwd)(const RetrievedAttention&);
  void (*attention_bwd)(const RetrievedAttention&);
  void (*fuse_fwd)(const FuseSources&);
  void (*fuse_bwd)(const FuseSources&);
  void (*span_fwd)(const SpanLoss&);
  void (*span_bwd)(const SpanLoss&);
};

}  // namespace memkern::cpu

MK_CPU_TABLE(RetrievalTable, retrieval)
