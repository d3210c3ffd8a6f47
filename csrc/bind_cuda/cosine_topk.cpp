// memkern::cosine_topk_*_cuda and inverse_norms_*_cuda.
#include "cuda/cosine_topk.h"

#include <tuple>

#include "bind_cuda/common.h"
#include "cuda/retrieval.h"

namespace {

using namespace memkern;
using namespace memkern::bind;
using memkern::cuda::CosineBackward;
using memkern::cuda::CosineSearch;

// The last axis dense; the others as they are.
Tensor rows_dense(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t); }

std::tuple<Tensor, Tensor> search(const Tensor& queries, const Tensor& database, int64_t k, const OptTensor& valid,
                                  const OptTensor& query_group, const OptTensor& row_group,
                                  const OptTensor& inverse_norms, bool normalized, double min_score) {
  Launch launch(queries);
  const Tensor q = rows_dense(queries), x = rows_dense(database);
  const OptTensor query_groups = dense(query_group), row_groups = dense(row_group);
  const OptTensor norms = as(inverse_norms, ScalarType::Float);
  CosineSearch p{};
  p.query_dtype = dtype_of(q);
  p.dtype = dtype_of(x);
  p.searches = q.size(0);
  p.queries = q.size(1);
  p.rows = x.size(1);
  p.width = q.size(2);
  p.k = static_cast<int>(k);
  p.query = q.data_ptr();
  p.database = x.data_ptr();
  for (int i = 0; i < 2; ++i) {
    p.query_stride[i] = q.stride(i);
    p.database_stride[i] = x.stride(i);
  }
  if (valid) {
    p.valid = ptr<bool>(valid);
    p.valid_stride[0] = valid->stride(0);
    p.valid_stride[1] = valid->dim() == 3 ? valid->stride(1) : 0;
    p.valid_stride[2] = valid->stride(-1);
  }
  p.query_group = ptr<int64_t>(query_groups);
  p.row_group = ptr<int64_t>(row_groups);
  p.inverse_norms = ptr<float>(norms);
  p.normalized = normalized;
  p.min_score = static_cast<float>(min_score);
  Tensor scores = launch.empty({p.searches, p.queries, k}, ScalarType::Float);
  Tensor indices = launch.empty({p.searches, p.queries, k}, ScalarType::Long);
  p.scores = out_ptr<float>(scores);
  p.indices = out_ptr<int64_t>(indices);
  const int64_t total = p.searches * p.queries;
  p.capacity = cuda::cosine_capacity(p.k);
  Tensor unit = launch.empty({total, p.width}, x.scalar_type());
  Tensor buffer = launch.empty({total, p.capacity}, ScalarType::Long);
  Tensor inverse = launch.empty({total}, ScalarType::Double);
  Tensor floats = launch.empty({3, total}, ScalarType::Float);
  Tensor counts = launch.empty({2, total}, ScalarType::Int);
  OptTensor weight;
  if (!cuda::cosine_inline_norms(p.queries, normalized, norms.has_value())) {
    weight = launch.empty({p.searches, p.rows}, ScalarType::Float);
    p.weight = out_ptr<float>(*weight);
  }
  p.unit = unit.data_ptr();
  p.buffer = out_ptr<int64_t>(buffer);
  p.inverse = out_ptr<double>(inverse);
  p.factor = out_ptr<float>(floats);
  p.margin = p.factor + total;
  p.bound = p.margin + total;
  p.appended = out_ptr<int32_t>(counts);
  p.flagged = p.appended + total;
  launch.check(cuda::cosine_topk_fwd(p, launch.stream()));
  return {scores, indices};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& queries, const Tensor& database,
                                    const Tensor& indices, const OptTensor& inverse_norms, bool normalized,
                                    bool need_queries, bool need_database) {
  Launch launch(queries);
  const Tensor q = dense(queries), x = dense(database), at = dense(indices), g = as(grad, ScalarType::Float);
  const OptTensor norms = as(inverse_norms, ScalarType::Float);
  CosineBackward p{};
  p.query_dtype = dtype_of(q);
  p.dtype = dtype_of(x);
  p.searches = q.size(0);
  p.queries = q.size(1);
  p.rows = x.size(1);
  p.width = q.size(2);
  p.k = at.size(2);
  p.grad = ptr<float>(g);
  p.query = q.data_ptr();
  p.database = x.data_ptr();
  p.indices = ptr<int64_t>(at);
  p.inverse_norms = ptr<float>(norms);
  p.normalized = normalized;
  const int64_t places = p.searches * p.queries * p.k, rows = p.searches * p.rows;
  const int64_t some = places > 0 ? places : 1;
  Tensor d_queries = need_queries ? launch.empty({p.searches, p.queries, p.width}, q.scalar_type())
                                  : launch.empty({0}, q.scalar_type());
  Tensor d_database = need_database ? torch::stable::new_zeros(x, {p.searches, p.rows, p.width}, x.scalar_type())
                                    : launch.empty({0}, x.scalar_type());
  Tensor coefficients = launch.empty({4, some}, ScalarType::Float);
  p.coefficients = out_ptr<float>(coefficients);
  p.d_query = need_queries ? d_queries.data_ptr() : nullptr;
  if (!need_database || places == 0) {
    launch.check(cuda::cosine_topk_bwd(p, launch.stream()));
    return {d_queries, d_database};
  }
  STD_TORCH_CHECK(rows < INT32_MAX && places < INT32_MAX, "expected fewer than 2^31 results and rows, got ", places,
                  " and ", rows, "; split the batch");
  p.d_database = d_database.data_ptr();
  Tensor lists = launch.empty({4, some}, ScalarType::Int);  // owners, sorted owners, places, sorted places
  const auto bytes = cuda::sort_bytes(places, rows);
  Tensor scratch = launch.empty({static_cast<int64_t>(bytes) + 1}, ScalarType::Byte);
  auto* list = out_ptr<int32_t>(lists);
  p.owner = list;
  p.sorted = list + some;
  p.order = list + 3 * some;
  launch.check(cuda::cosine_topk_bwd(p, launch.stream()));
  launch.check(cuda::sort_owners(list, list + some, list + 2 * some, list + 3 * some, places, rows, scratch.data_ptr(),
                                 bytes, launch.stream()));
  launch.check(cuda::cosine_topk_bwd_rows(p, launch.stream()));
  return {d_queries, d_database};
}

Tensor inverse_norms(const Tensor& database) {
  Launch launch(database);
  const Tensor x = dense(database);
  Tensor out = launch.empty({x.size(0), x.size(1)}, ScalarType::Float);
  launch.check(cuda::inverse_norms_fwd(dtype_of(x), x.data_ptr(), x.size(0) * x.size(1), x.size(2),
                                       out_ptr<float>(out), launch.stream()));
  return out;
}

Tensor inverse_norms_backward(const Tensor& grad, const Tensor& database) {
  Launch launch(database);
  const Tensor x = dense(database), g = as(grad, ScalarType::Float);
  Tensor out = launch.empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  launch.check(cuda::inverse_norms_bwd(dtype_of(x), ptr<float>(g), x.data_ptr(), x.size(0) * x.size(1), x.size(2),
                                       out.data_ptr(), launch.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memkern, CUDA, m) {
  m.impl("cosine_topk_fwd_cuda", TORCH_BOX(&search));
  m.impl("cosine_topk_bwd_cuda", TORCH_BOX(&backward));
  m.impl("inverse_norms_fwd_cuda", TORCH_BOX(&inverse_norms));
  m.impl("inverse_norms_bwd_cuda", TORCH_BOX(&inverse_norms_backward));
}
