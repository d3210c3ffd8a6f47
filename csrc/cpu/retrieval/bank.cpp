// Attention over the rows of a bank that each query names: rows come from all over it, many of them from cache.
#include "ops/retrieval.h"

#include "cpu/isa.h"

#include "common/vec.h"
#include "cpu/retrieval/kernels.h"
#include "cpu/retrieval/rows.h"
#include "cpu/retrieval/queries.h"

namespace memkern::cpu::MK_NS {

namespace {

// Weights and the slopes of the loss along the scores of one query: weight = exp(score - lse), slope = weight
// (grad . value - sum weight (grad . value)).
template <class T>
void weights_and_slopes(const RetrievedAttention& p, Present<acc_t<T>>& present, const acc_t<T>* query,
                        const acc_t<T>* grad, acc_t<T> lse, Prefetcher<T>& ahead) {
  using A = acc_t<T>;
  const int64_t n = present.size;
  A *weight = present.weight.get(), *slope = present.slope.get();
  dots(static_cast<const T*>(p.keys), present.key.get(), n, query, p.width, weight, ahead);
  exponentials(weight, n, lse);
  dots(static_cast<const T*>(p.values), present.value.get(), n, grad, p.width, slope, ahead);
  slopes(weight, slope, n);
}

// One plane (b, a) at a time: its queries add to the rows of its bank in the order of (t, c), whatever the threads.
template <class T>
void backward_of(const RetrievedAttention& p) {
  using A = acc_t<T>;
  constexpr bool kDirect = std::is_same_v<T, A>;
  parallel(p.threads, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    Queries<T> queries(p, begin * p.count, end * p.count);
    const int64_t wide = padded<A>(p.width), size = p.bank * p.width;
    const bool sums = p.d_keys != nullptr;
    Scratch<A, 512> query(wide), grad(wide), sum(wide);
    Scratch<A> key_sums(sums && !kDirect ? size : 0), value_sums(sums && !kDirect ? size : 0);
    for (int64_t plane = begin; plane < end; ++plane) {
      T *d_keys = static_cast<T*>(p.d_keys) + plane * size, *d_values = static_cast<T*>(p.d_values) + plane * size;
      A *to_keys = key_sums.get(), *to_values = value_sums.get();
      if constexpr (kDirect) {
        to_keys = d_keys;
        to_values = d_values;
      }
      if (sums) {
        std::memset(to_keys, 0, size_t(size) * sizeof(A));
        std::memset(to_values, 0, size_t(size) * sizeof(A));
      }
      for (int64_t t = 0; t < p.count; ++t) {
        const int64_t row = plane * p.count + t;
        auto [present, ahead] = queries.take(row);
        widen_any(p.query_dtype, p.queries, row * p.width, A(p.scale), query.get(), p.width);
        widen_any(p.query_dtype, p.grad, row * p.width, A(1), grad.get(), p.width);
        weights_and_slopes<T>(p, present, query.get(), grad.get(), static_cast<const A*>(p.lse)[row], ahead);
        if (p.d_queries != nullptr) {
          std::fill(sum.get(), sum.get() + wide, A(0));
          mix(static_cast<const T*>(p.keys), present.key.get(), present.slope.get(), present.size, p.width, A(0),
              sum.get());
          narrow_any(p.query_dtype, sum.get(), A(p.scale), p.d_queries, row * p.width, p.width);
        }
        for (int64_t i = 0; sums && i < present.size; ++i) {
          const int64_t to = p.indices[row * p.pairs + present.pair[i]] * p.width;
          scaled<true>(present.slope[i], query.get(), to_keys + to, p.width);
          scaled<true>(present.weight[i], grad.get(), to_values + to, p.width);
        }
      }
      if (sums && !kDirect) {
        for_each_vec<A>(size, [&](int64_t i, auto count) {
          store_part(d_keys + i, load_part(to_keys + i, count), count);
          store_part(d_values + i, load_part(to_values + i, count), count);
        });
      }
    }
  });
}

}  // namespace

void bank_forward(const RetrievedAttention& p) { MK_DISPATCH(p.dtype, T, { forward_by_query<T>(p); }) }
void bank_backward(const RetrievedAttention& p) { MK_DISPATCH(p.dtype, T, { backward_of<T>(p); }) }

}  // namespace memkern::cpu::MK_NS
