// memkern::retrieved_attention_*_cpp, fuse_sources_*_cpp and span_loss_*_cpp.
#include "ops/retrieval.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "bind_cpu/common.h"

namespace {

using namespace memkern;
using namespace memkern::bind;
using memkern::cpu::FuseSources;
using memkern::cpu::PairStrides;
using memkern::cpu::retrieval_table;
using memkern::cpu::RetrievedAttention;
using memkern::cpu::SpanLoss;

Tensor like(const Tensor& t, ScalarType dtype) {
  const auto sizes = t.sizes();
  return empty_cpu(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}
Tensor like(const Tensor& t) { return like(t, t.scalar_type()); }
// `t` in this dtype, itself where it has it.
Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Rows as they come, whatever their order; only the elements of one row have to be consecutive.
Tensor with_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

PairStrides strides_of(const Tensor& t, bool own) {
  if (own) return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  return {t.stride(0), t.stride(1), 0, t.stride(2)};
}

// The tensors that a call of the attention keeps alive, and what it tells the kernel.
struct AttentionCall {
  Tensor queries, keys, values;
  OptTensor indices, mask;
  RetrievedAttention p{};

  AttentionCall(const Tensor& queries_in, const Tensor& keys_in, const Tensor& values_in, const OptTensor& indices_in,
                const OptTensor& mask_in, double scale)
      : queries(dense(queries_in)), keys(keys_in), values(values_in), indices(dense(indices_in)), mask(dense(mask_in)) {
    // Keys and values of two dtypes are rare enough to be converted.
    if (keys.scalar_type() != values.scalar_type()) {
      keys = cast(keys, ScalarType::Float);
      values = cast(values, ScalarType::Float);
    }
    keys = with_rows(keys);
    values = with_rows(values);
    const bool own = !indices;
    p.dtype = dtype_of(keys);
    p.query_dtype = dtype_of(queries);
    p.batch = queries.size(0);
    p.heads = queries.size(1);
    p.count = queries.size(2);
    p.width = queries.size(3);
    p.pairs = own ? keys.size(3) : indices->size(3);
    p.bank = own ? -1 : keys.size(2);
    p.queries = queries.data_ptr();
    p.keys = keys.data_ptr();
    p.values = values.data_ptr();
    p.key_strides = strides_of(keys, own);
    p.value_strides = strides_of(values, own);
    p.indices = ptr<int64_t>(indices);
    p.mask = ptr<bool>(mask);
    p.scale = scale;
    p.threads = parallel_for;
  }
};

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& queries, const Tensor& keys, const Tensor& values,
                                         const OptTensor& indices, const OptTensor& mask, double scale) {
  AttentionCall call(queries, keys, values, indices, mask, scale);
  Tensor out = like(queries);
  Tensor lse = empty_cpu({call.p.batch, call.p.heads, call.p.count}, acc_type(queries));
  call.p.out = out.data_ptr();
  call.p.lse = lse.data_ptr();
  retrieval_table().attention_fwd(call.p);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& grad, const Tensor& queries, const Tensor& keys,
                                                 const Tensor& values, const OptTensor& indices, const OptTensor& mask,
                                                 const Tensor&, const Tensor& lse, double scale, bool need_queries,
                                                 bool need_pairs) {
  AttentionCall call(queries, keys, values, indices, mask, scale);
  const Tensor g = as(grad, queries.scalar_type()), kept = dense(lse);
  const Tensor none = empty_cpu({0}, queries.scalar_type());
  Tensor d_queries = need_queries ? like(queries) : none;
  const ScalarType pair_type = call.keys.scalar_type();
  Tensor d_keys = need_pairs ? like(keys, pair_type) : none;
  Tensor d_values = need_pairs ? like(values, pair_type) : none;
  call.p.grad = g.data_ptr();
  call.p.lse = kept.data_ptr();
  call.p.d_queries = need_queries ? d_queries.data_ptr() : nullptr;
  call.p.d_keys = need_pairs ? d_keys.data_ptr() : nullptr;
  call.p.d_values = need_pairs ? d_values.data_ptr() : nullptr;
  retrieval_table().attention_bwd(call.p);
  return {d_queries, cast(d_keys, keys.scalar_type()), cast(d_values, values.scalar_type())};
}

// The sources in one dtype, their own where they share it, and contiguous.
struct FuseCall {
  std::vector<Tensor> sources;
  Tensor gates;
  ScalarType dtype;
  FuseSources p{};

  FuseCall(const std::vector<Tensor>& given, const Tensor& gate_logits, const std::vector<int64_t>& columns)
      : gates(as(gate_logits, acc_type(given[0]))), dtype(given[0].scalar_type()) {
    for (const Tensor& source : given) {
      if (source.scalar_type() != dtype) dtype = acc_type(given[0]);
    }
    p.sources = static_cast<int64_t>(given.size());
    STD_TORCH_CHECK(p.sources <= memkern::cpu::kMaxSources, "at most 16 sources");
    for (int64_t i = 0; i < p.sources; ++i) {
      sources.push_back(as(given[static_cast<size_t>(i)], dtype));
      p.source[i] = sources.back().data_ptr();
      p.column[i] = columns[static_cast<size_t>(i)];
    }
    p.dtype = dtype_of(sources[0]);
    p.rows = given[0].size(0) * given[0].size(1);
    p.width = given[0].size(2);
    p.columns = gates.size(2);
    p.gates = gates.data_ptr();
    p.threads = parallel_for;
  }
};

Tensor fuse_fwd(std::vector<Tensor> sources, const Tensor& gate_logits, std::vector<int64_t> columns) {
  FuseCall call(sources, gate_logits, columns);
  Tensor out = like(sources[0], call.dtype);
  call.p.out = out.data_ptr();
  retrieval_table().fuse_fwd(call.p);
  return cast(out, sources[0].scalar_type());
}

std::tuple<std::vector<Tensor>, Tensor> fuse_bwd(const Tensor& grad, std::vector<Tensor> sources,
                                                 const Tensor& gate_logits, std::vector<int64_t> columns) {
  FuseCall call(sources, gate_logits, columns);
  const Tensor g = as(grad, call.dtype);
  std::vector<Tensor> d_sources;
  for (size_t i = 0; i < sources.size(); ++i) {
    d_sources.push_back(like(sources[i], call.dtype));
    call.p.d_source[i] = d_sources.back().data_ptr();
  }
  Tensor d_gates = like(gate_logits, call.gates.scalar_type());
  call.p.grad = g.data_ptr();
  call.p.d_gates = d_gates.data_ptr();
  retrieval_table().fuse_bwd(call.p);
  for (size_t i = 0; i < sources.size(); ++i) d_sources[i] = cast(d_sources[i], sources[i].scalar_type());
  return {d_sources, cast(d_gates, gate_logits.scalar_type())};
}

struct SpanCall {
  Tensor start, end, start_positive, end_positive, valid, document;
  SpanLoss p{};

  SpanCall(const Tensor& start_logits, const Tensor& end_logits, const Tensor& start_right, const Tensor& end_right,
           const Tensor& valid_in, const Tensor& document_in)
      : start(as(start_logits, acc_type(start_logits))),
        end(as(end_logits, acc_type(start_logits))),
        start_positive(dense(start_right)),
        end_positive(dense(end_right)),
        valid(dense(valid_in)),
        document(dense(document_in)) {
    p.dtype = dtype_of(start);
    p.segments = start.size(0);
    p.tokens = start.size(1);
    p.logits[0] = start.data_ptr();
    p.logits[1] = end.data_ptr();
    p.positive[0] = ptr<bool>(start_positive);
    p.positive[1] = ptr<bool>(end_positive);
    p.valid = ptr<bool>(valid);
    p.document = ptr<int64_t>(document);
    p.threads = parallel_for;
  }
};

std::tuple<Tensor, Tensor> span_fwd(const Tensor& start_logits, const Tensor& end_logits, const Tensor& start_positive,
                                    const Tensor& end_positive, const Tensor& valid, const Tensor& document) {
  SpanCall call(start_logits, end_logits, start_positive, end_positive, valid, document);
  const ScalarType dtype = call.start.scalar_type();
  Tensor loss = empty_cpu({}, dtype), stats = empty_cpu({4, call.p.segments}, dtype);
  call.p.loss = loss.data_ptr();
  call.p.stats = stats.data_ptr();
  retrieval_table().span_fwd(call.p);
  return {loss, stats};
}

std::tuple<Tensor, Tensor> span_bwd(const Tensor& grad, const Tensor& start_logits, const Tensor& end_logits,
                                    const Tensor& start_positive, const Tensor& end_positive, const Tensor& valid,
                                    const Tensor& document, const Tensor& stats) {
  SpanCall call(start_logits, end_logits, start_positive, end_positive, valid, document);
  const ScalarType dtype = call.start.scalar_type();
  const Tensor g = as(grad, dtype), kept = dense(stats);
  Tensor d_start = like(start_logits, dtype), d_end = like(end_logits, dtype);
  call.p.grad = g.data_ptr();
  call.p.stats = kept.data_ptr();
  call.p.d_logits[0] = d_start.data_ptr();
  call.p.d_logits[1] = d_end.data_ptr();
  retrieval_table().span_bwd(call.p);
  return {cast(d_start, start_logits.scalar_type()), cast(d_end, end_logits.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) {
  m.impl("retrieved_attention_fwd_cpp", TORCH_BOX(&attention_fwd));
  m.impl("retrieved_attention_bwd_cpp", TORCH_BOX(&attention_bwd));
  m.impl("fuse_sources_fwd_cpp", TORCH_BOX(&fuse_fwd));
  m.impl("fuse_sources_bwd_cpp", TORCH_BOX(&fuse_bwd));
  m.impl("span_loss_fwd_cpp", TORCH_BOX(&span_fwd));
  m.impl("span_loss_bwd_cpp", TORCH_BOX(&span_bwd));
}
