// memkern::retrieved_attention_*_cpp, fuse_sources_*_cpp and span_loss_*_cpp.
#include "ops/retrieval.h"

#include "bind_cpu/common.h"
#include "common/binding_retrieval.h"

namespace memkern::bind {

namespace {

// Rows as they come, whatever their order; only the elements of one row have to be consecutive.
Tensor with_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

struct CpuRetrieval {
  using Attention = cpu::RetrievedAttention;
  using Fuse = cpu::FuseSources;
  using Span = cpu::SpanLoss;
  static constexpr size_t kMaxSources = cpu::kMaxSources;

  explicit CpuRetrieval(const Tensor&) {}

  ScalarType acc(const Tensor& t) const { return acc_type(t); }
  Tensor take(const Tensor& t, ScalarType dtype) const { return as(t, dtype); }
  Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype) const { return empty_cpu(sizes, dims, dtype); }

  Attention attention(Tensor& queries, Tensor& keys, Tensor& values) const {
    // Keys and values of two dtypes are rare enough to be converted.
    if (keys.scalar_type() != values.scalar_type()) {
      keys = cast(keys, ScalarType::Float);
      values = cast(values, ScalarType::Float);
    }
    queries = dense(queries);
    keys = with_rows(keys);
    values = with_rows(values);
    Attention p{};
    p.dtype = dtype_of(keys);
    p.query_dtype = dtype_of(queries);
    p.threads = parallel_for;
    return p;
  }
  Fuse fuse() const {
    Fuse p{};
    p.threads = parallel_for;
    return p;
  }
  Span span(const Tensor& logits) const {
    Span p{};
    p.dtype = dtype_of(logits);
    p.threads = parallel_for;
    return p;
  }

  void attention_fwd(const Attention& p) { table().attention_fwd(p); }
  void attention_bwd(const Attention& p, const Tensor&, ScalarType, bool) { table().attention_bwd(p); }
  void fuse_fwd(const Fuse& p) { table().fuse_fwd(p); }
  void fuse_bwd(const Fuse& p) { table().fuse_bwd(p); }
  void span_fwd(const Span& p) { table().span_fwd(p); }
  void span_bwd(const Span& p) { table().span_bwd(p); }

 private:
  static const cpu::RetrievalTable& table() { return cpu::retrieval_table(); }
};

}  // namespace

}  // namespace memkern::bind

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) {
  using namespace memkern::bind;
  m.impl("retrieved_attention_fwd_cpp", TORCH_BOX(&attention_fwd<CpuRetrieval>));
  m.impl("retrieved_attention_bwd_cpp", TORCH_BOX(&attention_bwd<CpuRetrieval>));
  m.impl("fuse_sources_fwd_cpp", TORCH_BOX(&fuse_fwd<CpuRetrieval>));
  m.impl("fuse_sources_bwd_cpp", TORCH_BOX(&fuse_bwd<CpuRetrieval>));
  m.impl("span_loss_fwd_cpp", TORCH_BOX(&span_fwd<CpuRetrieval>));
  m.impl("span_loss_bwd_cpp", TORCH_BOX(&span_bwd<CpuRetrieval>));
}
