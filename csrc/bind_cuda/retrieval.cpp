// memkern::retrieved_attention_*_cuda, fuse_sources_*_cuda and span_loss_*_cuda.
#include "cuda/retrieval.h"

#include "bind_cuda/common.h"
#include "common/binding_retrieval.h"

namespace memkern::bind {

namespace {

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

class CudaRetrieval {
 public:
  using Attention = cuda::RetrievedAttention;
  using Fuse = cuda::FuseSources;
  using Span = cuda::SpanLoss;
  static constexpr size_t kMaxSources = cuda::kMaxSources;

  explicit CudaRetrieval(const Tensor& t) : launch_(t) {}

  ScalarType acc(const Tensor&) const { return ScalarType::Float; }
  Tensor take(const Tensor& t, ScalarType dtype) const { return packed(cast(t, dtype)); }
  Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype) const { return launch_.empty(sizes, dims, dtype); }

  Attention attention(Tensor& queries, Tensor& keys, Tensor& values) const {
    // Mixed dtypes are rare enough to be converted.
    ScalarType dtype = queries.scalar_type();
    if (keys.scalar_type() != dtype || values.scalar_type() != dtype) dtype = ScalarType::Float;
    queries = packed(cast(queries, dtype));
    keys = with_rows(cast(keys, dtype));
    values = with_rows(cast(values, dtype));
    Attention p{};
    p.dtype = dtype_of(queries);
    return p;
  }
  Fuse fuse() const { return {}; }
  Span span(const Tensor&) const { return {}; }

  void attention_fwd(const Attention& p) { launch_.check(cuda::attention_fwd(p, launch_.stream())); }
  void attention_bwd(Attention& p, const Tensor& out_given, ScalarType dtype, bool need_pairs);
  void fuse_fwd(const Fuse& p) { launch_.check(cuda::fuse_fwd(p, launch_.stream())); }
  void fuse_bwd(const Fuse& p) { launch_.check(cuda::fuse_bwd(p, launch_.stream())); }
  void span_fwd(Span& p) {
    const Tensor partial = launch_.empty({4, p.segments}, ScalarType::Float);
    const Tensor sums = launch_.empty({2 * cuda::span_blocks(p.segments)}, ScalarType::Float);
    p.partial = out_ptr<float>(partial);
    p.sums = out_ptr<float>(sums);
    p.ticket = launch_.tickets(1);
    launch_.check(cuda::span_fwd(p, launch_.stream()));
  }
  void span_bwd(const Span& p) { launch_.check(cuda::span_bwd(p, launch_.stream())); }

 private:
  Launch launch_;
};

void CudaRetrieval::attention_bwd(Attention& p, const Tensor& out_given, ScalarType dtype, bool need_pairs) {
  const int64_t rows = p.batch * p.heads * p.count, bank_rows = p.batch * p.heads * p.bank, entries = rows * p.pairs;
  const Tensor out = take(out_given, dtype);
  p.out = out.data_ptr();
  if (p.bank <= 0 || !need_pairs) {
    launch_.check(cuda::attention_bwd(p, launch_.stream()));
    return;
  }
  // Owners are sorted as 32-bit numbers.
  STD_TORCH_CHECK(bank_rows < INT32_MAX && entries < INT32_MAX, "expected fewer than 2^31 pairs and bank rows, got ",
                  entries, " and ", bank_rows, "; split the batch");
  const auto n = entries > 0 ? entries : 1;
  const Tensor delta = launch_.empty({rows > 0 ? rows : 1}, ScalarType::Float);
  const Tensor owner = launch_.empty({4, n}, ScalarType::Int);  // owners, sorted owners, positions, sorted positions
  const auto bytes = cuda::sort_bytes(n, bank_rows);
  const Tensor scratch = launch_.empty({static_cast<int64_t>(bytes) + 1}, ScalarType::Byte);
  auto* lists = out_ptr<int32_t>(owner);
  p.delta = out_ptr<float>(delta);
  p.owner = lists;
  launch_.check(cuda::attention_bwd(p, launch_.stream()));
  launch_.check(cuda::sort_owners(lists, lists + n, lists + 2 * n, lists + 3 * n, entries, bank_rows,
                                  scratch.data_ptr(), bytes, launch_.stream()));
  launch_.check(cuda::attention_bank_bwd(p, lists + n, lists + 3 * n, launch_.stream()));
}

}  // namespace

}  // namespace memkern::bind

STABLE_TORCH_LIBRARY_IMPL(memkern, CUDA, m) {
  using namespace memkern::bind;
  m.impl("retrieved_attention_fwd_cuda", TORCH_BOX(&attention_fwd<CudaRetrieval>));
  m.impl("retrieved_attention_bwd_cuda", TORCH_BOX(&attention_bwd<CudaRetrieval>));
  m.impl("fuse_sources_fwd_cuda", TORCH_BOX(&fuse_fwd<CudaRetrieval>));
  m.impl("fuse_sources_bwd_cuda", TORCH_BOX(&fuse_bwd<CudaRetrieval>));
  m.impl("span_loss_fwd_cuda", TORCH_BOX(&span_fwd<CudaRetrieval>));
  m.impl("span_loss_bwd_cuda", TORCH_BOX(&span_bwd<CudaRetrieval>));
}
