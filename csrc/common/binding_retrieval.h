// What both bindings of the retrieval column share: everything but the dtypes and layouts that the kernels of a backend
// take, and how it runs them. memkern/ops/retrieval.py describes the raw operators.
//
// A Backend (in the binding of its name) is made for one call, from a tensor on its device, and has
//     Attention, Fuse, Span, kMaxSources                            the structures of its kernels
//     ScalarType acc(const Tensor&)                                 what it computes in, and returns statistics in
//     Tensor take(const Tensor&, ScalarType)                        an input in the layout of its kernels
//     Tensor empty(const int64_t* sizes, int64_t dims, ScalarType)
//     Attention attention(Tensor& queries, Tensor& keys, Tensor& values)
//         brings the three to dtypes and layouts that its kernels take, and says which
//     Fuse fuse(), Span span(const Tensor& logits)                  without tensors and sizes
//     attention_fwd(p), fuse_fwd(p), fuse_bwd(p), span_fwd(p), span_bwd(p)
//     attention_bwd(p, out, dtype of the queries, need_pairs)
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/binding.h"

namespace memkern::bind {

// `t` in this dtype, itself where it has it.
inline Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Points a field of a structure, of whatever element type, to the data of a tensor.
template <class T>
void point(T*& field, const Tensor& t) {
  field = static_cast<T*>(t.data_ptr());
}

// The strides of rows: own pairs have one sequence for each query, a bank has one for all queries of a head.
template <class Strides>
void set_strides(Strides& strides, const Tensor& t, bool own) {
  if (own) {
    strides = {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  } else {
    strides = {t.stride(0), t.stride(1), 0, t.stride(2)};
  }
}

// The tensors that a call of the attention keeps alive, and what it tells the kernel.
template <class Backend>
struct AttentionCall {
  AttentionCall(const Tensor& queries_in, const Tensor& keys_in, const Tensor& values_in, const OptTensor& indices_in,
                const OptTensor& mask_in, double scale)
      : backend(queries_in),
        queries(queries_in),
        keys(keys_in),
        values(values_in),
        indices(dense(indices_in)),
        mask(dense(mask_in)),
        p(backend.attention(queries, keys, values)) {
    const bool own = !indices;
    p.batch = queries.size(0);
    p.heads = queries.size(1);
    p.count = queries.size(2);
    p.width = queries.size(3);
    p.pairs = own ? keys.size(3) : indices->size(3);
    p.bank = own ? -1 : keys.size(2);
    p.queries = queries.data_ptr();
    p.keys = keys.data_ptr();
    p.values = values.data_ptr();
    set_strides(p.key_strides, keys, own);
    set_strides(p.value_strides, values, own);
    p.indices = ptr<int64_t>(indices);
    p.mask = ptr<bool>(mask);
    p.scale = static_cast<decltype(p.scale)>(scale);
  }

  Backend backend;
  Tensor queries, keys, values;
  OptTensor indices, mask;
  typename Backend::Attention p;
};

template <class Backend>
std::tuple<Tensor, Tensor> attention_fwd(const Tensor& queries, const Tensor& keys, const Tensor& values,
                                         const OptTensor& indices, const OptTensor& mask, double scale) {
  AttentionCall<Backend> call(queries, keys, values, indices, mask, scale);
  auto& p = call.p;
  Tensor out = like(call.backend, queries, call.queries.scalar_type());
  Tensor lse = empty(call.backend, {p.batch, p.heads, p.count}, call.backend.acc(queries));
  point(p.out, out);
  point(p.lse, lse);
  call.backend.attention_fwd(p);
  return {cast(out, queries.scalar_type()), lse};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& grad, const Tensor& queries, const Tensor& keys,
                                                 const Tensor& values, const OptTensor& indices, const OptTensor& mask,
                                                 const Tensor& out, const Tensor& lse, double scale, bool need_queries,
                                                 bool need_pairs) {
  AttentionCall<Backend> call(queries, keys, values, indices, mask, scale);
  auto& p = call.p;
  const ScalarType query_type = call.queries.scalar_type(), pair_type = call.keys.scalar_type();
  const Tensor g = call.backend.take(grad, query_type), kept = dense(lse);
  const Tensor none = empty(call.backend, {0}, query_type);
  Tensor d_queries = need_queries ? like(call.backend, queries, query_type) : none;
  Tensor d_keys = need_pairs ? like(call.backend, keys, pair_type) : none;
  Tensor d_values = need_pairs ? like(call.backend, values, pair_type) : none;
  point(p.grad, g);
  point(p.lse, kept);
  p.d_queries = need_queries ? d_queries.data_ptr() : nullptr;
  p.d_keys = need_pairs ? d_keys.data_ptr() : nullptr;
  p.d_values = need_pairs ? d_values.data_ptr() : nullptr;
  call.backend.attention_bwd(p, out, query_type, need_pairs);
  return {cast(d_queries, queries.scalar_type()), cast(d_keys, keys.scalar_type()),
          cast(d_values, values.scalar_type())};
}

// The sources in one dtype: their own where they share it.
template <class Backend>
struct FuseCall {
  FuseCall(const std::vector<Tensor>& given, const Tensor& gate_logits, const std::vector<int64_t>& columns)
      : backend(given[0]),
        gates(as(gate_logits, backend.acc(given[0]))),
        dtype(given[0].scalar_type()),
        p(backend.fuse()) {
    STD_TORCH_CHECK(given.size() <= Backend::kMaxSources, "at most 16 sources");
    for (const Tensor& source : given) {
      if (source.scalar_type() != dtype) dtype = backend.acc(given[0]);
    }
    p.sources = static_cast<decltype(p.sources)>(given.size());
    for (size_t i = 0; i < given.size(); ++i) {
      sources.push_back(backend.take(given[i], dtype));
      p.source[i] = sources.back().data_ptr();
      p.column[i] = static_cast<decltype(p.columns)>(columns[i]);
    }
    p.dtype = dtype_of(sources[0]);
    p.rows = given[0].size(0) * given[0].size(1);
    p.width = given[0].size(2);
    p.columns = static_cast<decltype(p.columns)>(gates.size(2));
    point(p.gates, gates);
  }

  Backend backend;
  std::vector<Tensor> sources;
  Tensor gates;
  ScalarType dtype;
  typename Backend::Fuse p;
};

template <class Backend>
Tensor fuse_fwd(std::vector<Tensor> sources, const Tensor& gate_logits, std::vector<int64_t> columns) {
  FuseCall<Backend> call(sources, gate_logits, columns);
  Tensor out = like(call.backend, sources[0], call.dtype);
  point(call.p.out, out);
  call.backend.fuse_fwd(call.p);
  return cast(out, sources[0].scalar_type());
}

template <class Backend>
std::tuple<std::vector<Tensor>, Tensor> fuse_bwd(const Tensor& grad, std::vector<Tensor> sources,
                                                 const Tensor& gate_logits, std::vector<int64_t> columns) {
  FuseCall<Backend> call(sources, gate_logits, columns);
  const Tensor g = call.backend.take(grad, call.dtype);
  std::vector<Tensor> d_sources;
  for (size_t i = 0; i < sources.size(); ++i) {
    d_sources.push_back(like(call.backend, sources[i], call.dtype));
    call.p.d_source[i] = d_sources.back().data_ptr();
  }
  Tensor d_gates = like(call.backend, gate_logits, call.gates.scalar_type());
  point(call.p.grad, g);
  point(call.p.d_gates, d_gates);
  call.backend.fuse_bwd(call.p);
  for (size_t i = 0; i < sources.size(); ++i) d_sources[i] = cast(d_sources[i], sources[i].scalar_type());
  return {d_sources, cast(d_gates, gate_logits.scalar_type())};
}

template <class Backend>
struct SpanCall {
  SpanCall(const Tensor& start_logits, const Tensor& end_logits, const Tensor& start_right, const Tensor& end_right,
           const Tensor& valid_in, const Tensor& document_in)
      : backend(start_logits),
        dtype(backend.acc(start_logits)),
        start(as(start_logits, dtype)),
        end(as(end_logits, dtype)),
        start_positive(dense(start_right)),
        end_positive(dense(end_right)),
        valid(dense(valid_in)),
        document(dense(document_in)),
        p(backend.span(start)) {
    p.segments = start.size(0);
    p.tokens = start.size(1);
    point(p.logits[0], start);
    point(p.logits[1], end);
    p.positive[0] = ptr<bool>(start_positive);
    p.positive[1] = ptr<bool>(end_positive);
    p.valid = ptr<bool>(valid);
    p.document = ptr<int64_t>(document);
  }

  Backend backend;
  ScalarType dtype;
  Tensor start, end, start_positive, end_positive, valid, document;
  typename Backend::Span p;
};

template <class Backend>
std::tuple<Tensor, Tensor> span_fwd(const Tensor& start_logits, const Tensor& end_logits, const Tensor& start_positive,
                                    const Tensor& end_positive, const Tensor& valid, const Tensor& document) {
  SpanCall<Backend> call(start_logits, end_logits, start_positive, end_positive, valid, document);
  Tensor loss = empty(call.backend, {}, call.dtype), stats = empty(call.backend, {4, call.p.segments}, call.dtype);
  point(call.p.loss, loss);
  point(call.p.stats, stats);
  call.backend.span_fwd(call.p);
  return {loss, stats};
}

template <class Backend>
std::tuple<Tensor, Tensor> span_bwd(const Tensor& grad, const Tensor& start_logits, const Tensor& end_logits,
                                    const Tensor& start_positive, const Tensor& end_positive, const Tensor& valid,
                                    const Tensor& document, const Tensor& stats) {
  SpanCall<Backend> call(start_logits, end_logits, start_positive, end_positive, valid, document);
  const Tensor g = as(grad, call.dtype), kept = dense(stats);
  Tensor d_start = like(call.backend, start_logits, call.dtype), d_end = like(call.backend, end_logits, call.dtype);
  point(call.p.grad, g);
  point(call.p.stats, kept);
  point(call.p.d_logits[0], d_start);
  point(call.p.d_logits[1], d_end);
  call.backend.span_bwd(call.p);
  return {cast(d_start, start_logits.scalar_type()), cast(d_end, end_logits.scalar_type())};
}

}  // namespace memkern::bind
