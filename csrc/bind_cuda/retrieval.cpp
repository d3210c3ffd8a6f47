// memkern::retrieved_attention_*_cuda, fuse_sources_*_cuda and span_loss_*_cuda.
#include "cuda/retrieval.h"

#include <tuple>
#include <vector>

#include "bind_cuda/common.h"

namespace {

using namespace memkern;
using namespace memkern::bind;
using memkern::cuda::FuseSources;
using memkern::cuda::PairStrides;
using memkern::cuda::RetrievedAttention;
using memkern::cuda::SpanLoss;

Tensor like(const Launch& launch, const Tensor& t, ScalarType dtype) {
  const auto sizes = t.sizes();
  return launch.empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}
Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

bool at_pack(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }
int64_t pack_of(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 8; }
// Contiguous, and at an address that a 16-byte load takes.
Tensor packed(const Tensor& t) {
  const Tensor found = dense(t);
  return at_pack(found) ? found : torch::stable::clone(found);
}

// Rows as they come where a warp can load them, a copy otherwise: consecutive elements, and rows of whole packs that
// begin at one.
Tensor with_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1, width = t.size(last), pack = pack_of(t);
  bool fine = width <= 1 || t.stride(last) == 1;
  if (width % pack == 0) {
    fine = fine && at_pack(t);
    for (int64_t d = 0; d < last; ++d) fine = fine && t.stride(d) % pack == 0;
  }
  return fine ? t : packed(torch::stable::contiguous(t));
}

PairStrides strides_of(const Tensor& t, bool own) {
  if (own) return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  return {t.stride(0), t.stride(1), 0, t.stride(2)};
}

struct AttentionCall {
  Launch launch;
  Tensor queries, keys, values;
  OptTensor indices, mask;
  ScalarType dtype;
  RetrievedAttention p{};

  AttentionCall(const Tensor& queries_in, const Tensor& keys_in, const Tensor& values_in, const OptTensor& indices_in,
                const OptTensor& mask_in, double scale)
      : launch(queries_in),
        queries(queries_in),
        keys(keys_in),
        values(values_in),
        indices(dense(indices_in)),
        mask(dense(mask_in)),
        dtype(queries_in.scalar_type()) {
    // Mixed dtypes are rare enough to be converted.
    if (keys.scalar_type() != dtype || values.scalar_type() != dtype) dtype = ScalarType::Float;
    queries = packed(cast(queries, dtype));
    keys = with_rows(cast(keys, dtype));
    values = with_rows(cast(values, dtype));
    const bool own = !indices;
    p.dtype = dtype_of(queries);
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
    p.scale = static_cast<float>(scale);
  }
};

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& queries, const Tensor& keys, const Tensor& values,
                                         const OptTensor& indices, const OptTensor& mask, double scale) {
  AttentionCall call(queries, keys, values, indices, mask, scale);
  Tensor out = like(call.launch, queries, call.dtype);
  Tensor lse = call.launch.empty({call.p.batch, call.p.heads, call.p.count}, ScalarType::Float);
  call.p.out = out.data_ptr();
  call.p.lse = out_ptr<float>(lse);
  call.launch.check(memkern::cuda::attention_fwd(call.p, call.launch.stream()));
  return {cast(out, queries.scalar_type()), lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& grad, const Tensor& queries, const Tensor& keys,
                                                 const Tensor& values, const OptTensor& indices, const OptTensor& mask,
                                                 const Tensor& out, const Tensor& lse, double scale, bool need_queries,
                                                 bool need_pairs) {
  AttentionCall call(queries, keys, values, indices, mask, scale);
  Launch& launch = call.launch;
  RetrievedAttention& p = call.p;
  const int64_t rows = p.batch * p.heads * p.count, bank_rows = p.batch * p.heads * p.bank, entries = rows * p.pairs;
  const Tensor g = packed(cast(grad, call.dtype)), o = packed(cast(out, call.dtype)), kept = dense(lse);
  const Tensor none = launch.empty({0}, call.dtype);
  Tensor d_queries = need_queries ? like(launch, queries, call.dtype) : none;
  Tensor d_keys = need_pairs ? like(launch, keys, call.dtype) : none;
  Tensor d_values = need_pairs ? like(launch, values, call.dtype) : none;
  p.grad = g.data_ptr();
  p.out = o.data_ptr();
  p.lse = out_ptr<float>(kept);
  p.d_queries = need_queries ? d_queries.data_ptr() : nullptr;
  p.d_keys = need_pairs ? d_keys.data_ptr() : nullptr;
  p.d_values = need_pairs ? d_values.data_ptr() : nullptr;
  const bool by_row = p.bank > 0 && need_pairs;
  if (by_row) {
    // Owners are sorted as 32-bit numbers.
    STD_TORCH_CHECK(bank_rows < INT32_MAX && entries < INT32_MAX, "expected fewer than 2^31 pairs and bank rows, got ",
                    entries, " and ", bank_rows, "; split the batch");
    const auto n = entries > 0 ? entries : 1;
    Tensor delta = launch.empty({rows > 0 ? rows : 1}, ScalarType::Float);
    Tensor owner = launch.empty({4, n}, ScalarType::Int);  // owners, sorted owners, positions, sorted positions
    const auto bytes = memkern::cuda::sort_bytes(n, bank_rows);
    Tensor scratch = launch.empty({static_cast<int64_t>(bytes) + 1}, ScalarType::Byte);
    auto* lists = out_ptr<int32_t>(owner);
    p.delta = out_ptr<float>(delta);
    p.owner = lists;
    launch.check(memkern::cuda::attention_bwd(p, launch.stream()));
    launch.check(memkern::cuda::sort_owners(lists, lists + n, lists + 2 * n, lists + 3 * n, entries, bank_rows,
                                            scratch.data_ptr(), bytes, launch.stream()));
    launch.check(memkern::cuda::attention_bank_bwd(p, lists + n, lists + 3 * n, launch.stream()));
  } else {
    launch.check(memkern::cuda::attention_bwd(p, launch.stream()));
  }
  return {cast(d_queries, queries.scalar_type()), cast(d_keys, keys.scalar_type()),
          cast(d_values, values.scalar_type())};
}

struct FuseCall {
  Launch launch;
  std::vector<Tensor> sources;
  Tensor gates;
  ScalarType dtype;
  FuseSources p{};

  FuseCall(const std::vector<Tensor>& given, const Tensor& gate_logits, const std::vector<int64_t>& columns)
      : launch(given[0]), gates(as(gate_logits, ScalarType::Float)), dtype(given[0].scalar_type()) {
    STD_TORCH_CHECK(given.size() <= memkern::cuda::kMaxSources, "at most 16 sources");
    for (const Tensor& source : given) {
      if (source.scalar_type() != dtype) dtype = ScalarType::Float;
    }
    p.sources = static_cast<int>(given.size());
    for (size_t i = 0; i < given.size(); ++i) {
      sources.push_back(packed(cast(given[i], dtype)));
      p.source[i] = sources.back().data_ptr();
      p.column[i] = static_cast<int>(columns[i]);
    }
    p.dtype = dtype_of(sources[0]);
    p.rows = given[0].size(0) * given[0].size(1);
    p.width = given[0].size(2);
    p.columns = static_cast<int>(gates.size(2));
    p.gates = ptr<float>(gates);
  }
};

Tensor fuse_fwd(std::vector<Tensor> sources, const Tensor& gate_logits, std::vector<int64_t> columns) {
  FuseCall call(sources, gate_logits, columns);
  Tensor out = like(call.launch, sources[0], call.dtype);
  call.p.out = out.data_ptr();
  call.launch.check(memkern::cuda::fuse_fwd(call.p, call.launch.stream()));
  return cast(out, sources[0].scalar_type());
}

std::tuple<std::vector<Tensor>, Tensor> fuse_bwd(const Tensor& grad, std::vector<Tensor> sources,
                                                 const Tensor& gate_logits, std::vector<int64_t> columns) {
  FuseCall call(sources, gate_logits, columns);
  const Tensor g = packed(cast(grad, call.dtype));
  std::vector<Tensor> d_sources;
  for (size_t i = 0; i < sources.size(); ++i) {
    d_sources.push_back(like(call.launch, sources[i], call.dtype));
    call.p.d_source[i] = d_sources.back().data_ptr();
  }
  Tensor d_gates = like(call.launch, gate_logits, ScalarType::Float);
  call.p.grad = g.data_ptr();
  call.p.d_gates = out_ptr<float>(d_gates);
  call.launch.check(memkern::cuda::fuse_bwd(call.p, call.launch.stream()));
  for (size_t i = 0; i < sources.size(); ++i) d_sources[i] = cast(d_sources[i], sources[i].scalar_type());
  return {d_sources, cast(d_gates, gate_logits.scalar_type())};
}

struct SpanCall {
  Launch launch;
  Tensor start, end, start_positive, end_positive, valid, document;
  SpanLoss p{};

  SpanCall(const Tensor& start_logits, const Tensor& end_logits, const Tensor& start_right, const Tensor& end_right,
           const Tensor& valid_in, const Tensor& document_in)
      : launch(start_logits),
        start(as(start_logits, ScalarType::Float)),
        end(as(end_logits, ScalarType::Float)),
        start_positive(dense(start_right)),
        end_positive(dense(end_right)),
        valid(dense(valid_in)),
        document(dense(document_in)) {
    p.segments = start.size(0);
    p.tokens = start.size(1);
    p.logits[0] = ptr<float>(start);
    p.logits[1] = ptr<float>(end);
    p.positive[0] = ptr<bool>(start_positive);
    p.positive[1] = ptr<bool>(end_positive);
    p.valid = ptr<bool>(valid);
    p.document = ptr<int64_t>(document);
  }
};

std::tuple<Tensor, Tensor> span_fwd(const Tensor& start_logits, const Tensor& end_logits, const Tensor& start_positive,
                                    const Tensor& end_positive, const Tensor& valid, const Tensor& document) {
  SpanCall call(start_logits, end_logits, start_positive, end_positive, valid, document);
  Launch& launch = call.launch;
  const int64_t n = call.p.segments;
  Tensor loss = launch.empty({}, ScalarType::Float), stats = launch.empty({4, n}, ScalarType::Float);
  Tensor partial = launch.empty({4, n}, ScalarType::Float);
  Tensor sums = launch.empty({2 * memkern::cuda::span_blocks(n)}, ScalarType::Float);
  call.p.loss = out_ptr<float>(loss);
  call.p.stats = out_ptr<float>(stats);
  call.p.partial = out_ptr<float>(partial);
  call.p.sums = out_ptr<float>(sums);
  call.p.ticket = launch.tickets(1);
  launch.check(memkern::cuda::span_fwd(call.p, launch.stream()));
  return {loss, stats};
}

std::tuple<Tensor, Tensor> span_bwd(const Tensor& grad, const Tensor& start_logits, const Tensor& end_logits,
                                    const Tensor& start_positive, const Tensor& end_positive, const Tensor& valid,
                                    const Tensor& document, const Tensor& stats) {
  SpanCall call(start_logits, end_logits, start_positive, end_positive, valid, document);
  const Tensor g = as(grad, ScalarType::Float), kept = dense(stats);
  Tensor d_start = like(call.launch, start_logits, ScalarType::Float);
  Tensor d_end = like(call.launch, end_logits, ScalarType::Float);
  call.p.grad = ptr<float>(g);
  call.p.stats = out_ptr<float>(kept);
  call.p.d_logits[0] = out_ptr<float>(d_start);
  call.p.d_logits[1] = out_ptr<float>(d_end);
  call.launch.check(memkern::cuda::span_bwd(call.p, call.launch.stream()));
  return {cast(d_start, start_logits.scalar_type()), cast(d_end, end_logits.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memkern, CUDA, m) {
  m.impl("retrieved_attention_fwd_cuda", TORCH_BOX(&attention_fwd));
  m.impl("retrieved_attention_bwd_cuda", TORCH_BOX(&attention_bwd));
  m.impl("fuse_sources_fwd_cuda", TORCH_BOX(&fuse_fwd));
  m.impl("fuse_sources_bwd_cuda", TORCH_BOX(&fuse_bwd));
  m.impl("span_loss_fwd_cuda", TORCH_BOX(&span_fwd));
  m.impl("span_loss_bwd_cuda", TORCH_BOX(&span_bwd));
}
