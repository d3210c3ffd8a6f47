// Attention over the pairs that each query brings along.
#include "ops/retrieval.h"

#include "cpu/isa.h"

#include "common/vec.h"
#include "cpu/retrieval/kernels.h"
#include "cpu/retrieval/rows.h"
#include "cpu/retrieval/dense.h"
#include "cpu/retrieval/pairs.h"
#include "cpu/retrieval/queries.h"

namespace memkern::cpu::MK_NS {

namespace {

// A query whose keys and values have been multiplied, and whose gradients are still to be written.
template <class T>
struct Scored {
  using A = acc_t<T>;
  const RetrievedAttention& p;
  Scratch<A, 128> query, grad;
  Scratch<A, 64> weight, slope;
  int64_t row = 0;

  explicit Scored(const RetrievedAttention& params)
      : p(params), query(padded<A>(p.width)), grad(padded<A>(p.width)), weight(p.pairs), slope(p.pairs) {}

  void take(int64_t of) {
    row = of;
    widen_any(p.query_dtype, p.queries, row * p.width, A(p.scale), query.get(), p.width);
    widen_any(p.query_dtype, p.grad, row * p.width, A(1), grad.get(), p.width);
  }

  // `weight` has the scores, `slope` the gradients of the weights: they become weights and the slopes of the loss along
  // the scores, weight (slope - sum weight slope).
  void finish(int64_t count) {
    exponentials(weight.get(), count, static_cast<const A*>(p.lse)[row]);
    slopes(weight.get(), slope.get(), count);
  }
};

template <class T>
void backward_of(const RetrievedAttention& p) {
  using A = acc_t<T>;
  const int64_t rows = p.batch * p.heads * p.count, wide = padded<A>(p.width), step = ahead_of<T>(p.width);
  parallel(p.threads, rows, 1 + 16384 / (1 + p.pairs * p.width), [&](int64_t begin, int64_t end) {
    Pairs pairs(p);
    Scored<T> two[2] = {Scored<T>(p), Scored<T>(p)};
    Scratch<A, 128> sum(wide);
    // As forward does: the gradients of a query are written while the keys and values of the next are read.
    for (int64_t row = begin; row <= end; ++row) {
      Scored<T> &in = two[row % 2], &out = two[1 - row % 2];
      Rows<T> keys{}, values{}, old_keys{};
      T *d_keys = nullptr, *d_values = nullptr;
      const int64_t* place = nullptr;
      if (row < end) {
        pairs.gather(row);
        in.take(row);
        keys = pairs.rows(static_cast<const T*>(p.keys), p.key_strides, pairs.key(row), row, step);
        values = pairs.rows(static_cast<const T*>(p.values), p.value_strides, pairs.value(row), row, step);
      }
      if (row > begin) {
        old_keys = pairs.rows(static_cast<const T*>(p.keys), p.key_strides, pairs.key(row - 1), row - 1, step);
        place = pairs.place(row - 1);
        if (p.d_keys != nullptr) {
          d_keys = static_cast<T*>(p.d_keys) + (row - 1) * p.pairs * p.width;
          d_values = static_cast<T*>(p.d_values) + (row - 1) * p.pairs * p.width;
          if (old_keys.count < p.pairs) {
            std::memset(d_keys, 0, size_t(p.pairs * p.width) * sizeof(T));
            std::memset(d_values, 0, size_t(p.pairs * p.width) * sizeof(T));
          }
        }
      }
      std::fill(sum.get(), sum.get() + wide, A(0));
      for (int64_t i = 0, most = std::max(keys.count, old_keys.count); i < most; ++i) {
        if (i < keys.count) {
          const T *key = keys.base + keys.at[i], *value = values.base + values.at[i];
          fetch_row(key + keys.ahead, p.width);
          fetch_row(value + values.ahead, p.width);
          in.weight[i] = dot(key, in.query.get(), p.width);
          in.slope[i] = dot(value, in.grad.get(), p.width);
        }
        if (i >= old_keys.count) continue;
        if (p.d_queries != nullptr) add_scaled(out.slope[i], old_keys.base + old_keys.at[i], sum.get(), p.width);
        if (d_keys == nullptr) continue;
        scaled<false>(out.slope[i], out.query.get(), d_keys + place[i] * p.width, p.width);
        scaled<false>(out.weight[i], out.grad.get(), d_values + place[i] * p.width, p.width);
      }
      if (row > begin && p.d_queries != nullptr) {
        narrow_any(p.query_dtype, sum.get(), A(p.scale), p.d_queries, (row - 1) * p.width, p.width);
      }
      if (row < end) in.finish(keys.count);
    }
  });
}

}  // namespace

void own_forward(const RetrievedAttention& p) {
  MK_DISPATCH(p.dtype, T, {
    if (!dense_forward<T>(p)) forward_by_query<T>(p);
  })
}

void own_backward(const RetrievedAttention& p) { MK_DISPATCH(p.dtype, T, { backward_of<T>(p); }) }

}  // namespace memkern::cpu::MK_NS
