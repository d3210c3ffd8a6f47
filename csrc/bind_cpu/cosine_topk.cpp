// Binds the CPU kernels of the search.
#include <array>
#include <atomic>
#include <limits>
#include <vector>

#include "bind_cpu/common.h"
#include "ops/cosine_topk.h"

MK_CPU_TABLE(CosineTopkTable, cosine_topk)

namespace {

using namespace memkern;
using namespace memkern::bind;

// The last axis dense; the others as they are.
Tensor rows_dense(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t); }

// From how many queries on a library multiplies, which memkern/configs/cpu_gemm.json knows for a CPU model.
std::atomic<int64_t> library_from{std::numeric_limits<int64_t>::max()};

int64_t search_library_from(int64_t queries) { return library_from.exchange(queries); }

void multiply(const cpu::LibraryOperands& p) {
  const ScalarType dtype = p.dtype == DType::kBF16 ? ScalarType::BFloat16 : ScalarType::Float;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const auto view = [&](const void* data, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, cpu, dtype);
  };
  Tensor out = view(p.out, {p.M, p.N}, {p.N, 1});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(view(p.a, {p.M, p.K}, {p.a_row, 1})),
                                    torch::stable::detail::from(view(p.b, {p.K, p.N}, {1, p.K})),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> search(const Tensor& queries, const Tensor& database, int64_t k, const OptTensor& valid,
                                  const OptTensor& query_group, const OptTensor& row_group,
                                  const OptTensor& inverse_norms, bool normalized, double min_score) {
  const Tensor q = rows_dense(queries), x = rows_dense(database);
  const OptTensor query_groups = dense(query_group), row_groups = dense(row_group);
  const ScalarType acc = acc_type(q);
  const OptTensor norms = as(inverse_norms, acc);
  cpu::CosineSearch p{};
  p.query_dtype = dtype_of(q);
  p.dtype = dtype_of(x);
  p.searches = q.size(0);
  p.queries = q.size(1);
  p.rows = x.size(1);
  p.width = q.size(2);
  p.k = k;
  p.query = q.data_ptr();
  p.database = x.data_ptr();
  for (int i = 0; i < 2; ++i) {
    p.query_stride[i] = q.stride(i);
    p.database_stride[i] = x.stride(i);
  }
  if (valid) {
    p.valid = ptr<bool>(valid);
    p.valid_per_query = valid->dim() == 3;
    p.valid_stride[0] = valid->stride(0);
    p.valid_stride[1] = p.valid_per_query ? valid->stride(1) : 0;
    p.valid_stride[2] = valid->stride(-1);
  }
  p.query_group = ptr<int64_t>(query_groups);
  p.row_group = ptr<int64_t>(row_groups);
  p.inverse_norms = norms ? norms->data_ptr() : nullptr;
  p.normalized = normalized;
  p.min_score = min_score;
  Tensor scores = empty_cpu({p.searches, p.queries, k}, acc);
  Tensor indices = empty_cpu({p.searches, p.queries, k}, ScalarType::Long);
  p.scores = scores.data_ptr();
  p.indices = out_ptr<int64_t>(indices);
  p.thread_count = static_cast<int64_t>(torch::stable::get_num_threads());
  p.threads = parallel_for;
  p.multiply = p.queries >= library_from.load() ? multiply : nullptr;
  cpu::cosine_topk_table().search(p);
  return {scores, indices};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& queries, const Tensor& database,
                                    const Tensor& indices, const OptTensor& inverse_norms, bool normalized,
                                    bool need_queries, bool need_database) {
  const Tensor q = dense(queries), x = dense(database), at = dense(indices);
  const ScalarType acc = acc_type(q);
  const Tensor g = as(grad, acc);
  const OptTensor norms = as(inverse_norms, acc);
  cpu::CosineBackward p{};
  p.query_dtype = dtype_of(q);
  p.dtype = dtype_of(x);
  p.searches = q.size(0);
  p.queries = q.size(1);
  p.rows = x.size(1);
  p.width = q.size(2);
  p.k = at.size(2);
  p.grad = g.data_ptr();
  p.query = q.data_ptr();
  p.database = x.data_ptr();
  p.indices = ptr<int64_t>(at);
  p.inverse_norms = norms ? norms->data_ptr() : nullptr;
  p.normalized = normalized;
  p.threads = parallel_for;
  Tensor d_queries = need_queries ? empty_cpu({p.searches, p.queries, p.width}, q.scalar_type())
                                  : empty_cpu({0}, q.scalar_type());
  Tensor d_database = need_database ? empty_cpu({p.searches, p.rows, p.width}, x.scalar_type())
                                    : empty_cpu({0}, x.scalar_type());
  p.d_query = need_queries ? d_queries.data_ptr() : nullptr;
  p.d_database = need_database ? d_database.data_ptr() : nullptr;
  cpu::cosine_topk_table().backward(p);
  return {d_queries, d_database};
}

cpu::InverseNorms norms_of(const Tensor& x) {
  cpu::InverseNorms p{};
  p.dtype = dtype_of(x);
  p.rows = x.size(0) * x.size(1);
  p.width = x.size(2);
  p.database = x.data_ptr();
  p.threads = parallel_for;
  return p;
}

Tensor inverse_norms(const Tensor& database) {
  const Tensor x = dense(database);
  cpu::InverseNorms p = norms_of(x);
  Tensor out = empty_cpu({x.size(0), x.size(1)}, acc_type(x));
  p.out = out.data_ptr();
  cpu::cosine_topk_table().inverse_norms(p);
  return out;
}

Tensor inverse_norms_backward(const Tensor& grad, const Tensor& database) {
  const Tensor x = dense(database), g = as(grad, acc_type(x));
  cpu::InverseNorms p = norms_of(x);
  Tensor out = empty_cpu({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  p.grad = g.data_ptr();
  p.out = out.data_ptr();
  cpu::cosine_topk_table().inverse_norms_backward(p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkern, m) { m.def("search_library_from(int queries) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(memkern, CompositeExplicitAutograd, m) {
  m.impl("search_library_from", TORCH_BOX(&search_library_from));
}

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) {
  m.impl("cosine_topk_fwd_cpp", TORCH_BOX(&search));
  m.impl("cosine_topk_bwd_cpp", TORCH_BOX(&backward));
  m.impl("inverse_norms_fwd_cpp", TORCH_BOX(&inverse_norms));
  m.impl("inverse_norms_bwd_cpp", TORCH_BOX(&inverse_norms_backward));
}
