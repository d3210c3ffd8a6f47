// Softmax, entropy and load-balance terms of one row of K values, in f = float or double. Include after common/vec.h.
#pragma once

#include "ops/routing.h"

namespace memkern::cpu::MK_NS {

constexpr double kEntropyEps = 1e-10;
// Rows whose sums are added in order before anything else happens to them: a function of the row count alone, so that
// no result depends on the number of threads.
constexpr int64_t kChunks = 64;
inline int64_t chunk_rows(int64_t rows) { return std::max<int64_t>(1, (rows + kChunks - 1) / kChunks); }
inline int64_t chunk_count(int64_t rows) { return (rows + chunk_rows(rows) - 1) / chunk_rows(rows); }
// How many chunks a thread should take at least, when each costs this many elements.
inline int64_t grain_of(int64_t elements) { return 1 + 32768 / std::max<int64_t>(1, elements); }

template <class A>
MK_INLINE A temperature_of(const void* pointer, double value) {
  return pointer == nullptr ? A(value) : *static_cast<const A*>(pointer);
}

template <class A>
MK_INLINE Vec<A> clamp(Vec<A> x, A limit) {
  return min(Vec<A>(limit), max(Vec<A>(-limit), x));  // in this order NaN stays
}

// p = softmax(clamp(z) / temperature), the maximum subtracted before the division; returns that maximum.
template <class A>
A softmax_row(const A* z, A* p, int64_t size, A limit, A temperature) {
  const A lowest = -std::numeric_limits<A>::infinity();
  Vec<A> most(lowest);
  for_each_vec<A>(size, [&](int64_t k, auto count) {
    most = max_nan(most, fill_part(clamp(load_part(z + k, count), limit), lowest, count));
  });
  const A top = reduce_max(most);
  Vec<A> sums(A(0));
  for_each_vec<A>(size, [&](int64_t k, auto count) {
    const Vec<A> e = exp((clamp(load_part(z + k, count), limit) - top) / Vec<A>(temperature));
    store_part(p + k, e, count);
    sums += fill_part(e, A(0), count);
  });
  const Vec<A> scale(A(1) / reduce_sum(sums));
  for_each_vec<A>(size,
                  [&](int64_t k, auto count) { store_part(p + k, load_part(p + k, count) * scale, count); });
  return top;
}

// -sum p log(p + eps)
template <class A>
A entropy_row(const A* p, int64_t size) {
  Vec<A> sums(A(0));
  for_each_vec<A>(size, [&](int64_t k, auto count) {
    const Vec<A> x = load_part(p + k, count);  // p = 0 adds nothing, in the tail too
    sums += x * log(x + A(kEntropyEps));
  });
  return -reduce_sum(sums);
}

// d entropy / d p
template <class A>
MK_INLINE Vec<A> entropy_slope(Vec<A> p) {
  const Vec<A> shifted = p + A(kEntropyEps);
  return -(log(shifted) + p / shifted);
}

// The gradient of softmax(clamp(z) / T): g becomes dz = p (g - sum p g) / T, before the clamp. Returns sum dz (z - top);
// -1 / T of it is the row's share of the temperature's gradient.
template <class A>
A softmax_row_backward(const A* p, const A* z, A* g, int64_t size, A limit, A temperature, A top) {
  Vec<A> sums(A(0));
  for_each_vec<A>(size, [&](int64_t k, auto count) { sums = fma(load_part(p + k, count), load_part(g + k, count), sums); });
  const A mean = reduce_sum(sums);
  Vec<A> shares(A(0));
  for_each_vec<A>(size, [&](int64_t k, auto count) {
    // In the tail p is zero, and with it dz.
    const Vec<A> dz = load_part(p + k, count) * (load_part(g + k, count) - mean) / Vec<A>(temperature);
    store_part(g + k, dz, count);
    shares = fma(dz, clamp(load_part(z + k, count), limit) - top, shares);
  });
  return reduce_sum(shares);
}

// Index of the largest value, ties to the lowest; of the first NaN where there is one.
template <class A>
int64_t argmax_row(const A* p, int64_t size) {
  int64_t best = 0;
  for (int64_t k = 0; k < size; ++k) {
    if (p[k] != p[k]) return k;
    if (p[k] > p[best]) best = k;
  }
  return best;
}

// What the load-balance loss sums over rows: how often each expert is the argmax, its probability, and the rows.
template <class A>
struct LoadTerms {
  LoadTerms(A* counts_, A* mass_, A* rows_, int64_t size) : counts(counts_), mass(mass_), rows(rows_) {
    std::fill_n(counts, size, A(0));
    std::fill_n(mass, size, A(0));
    *rows = A(0);
  }
  void add(const A* p, int64_t size) const {
    counts[argmax_row(p, size)] += A(1);
    *rows += A(1);
    for_each_vec<A>(size, [&](int64_t k, auto count) {
      store_part(mass + k, load_part(mass + k, count) + load_part(p + k, count), count);
    });
  }
  A* counts;
  A* mass;
  A* rows;
};

// The loss from the terms of all chunks, laid out as chunks x (counts K, mass K, rows); adds them in order.
template <class A>
void finish_loss(A* terms, int64_t chunks, int64_t size, A* loss, A* loss_weights) {
  const int64_t stride = 2 * size + 1;
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < stride; ++i) terms[i] += terms[chunk * stride + i];
  }
  if (chunks == 0) std::fill_n(terms, stride, A(0));
  const A rows = std::max(A(1), terms[2 * size]);
  A total = A(0);
  for (int64_t k = 0; k < size; ++k) {
    const A share = terms[k] / rows;
    total += share * (terms[size + k] / rows);
    if (loss_weights != nullptr) loss_weights[k] = A(size) * share / rows;
  }
  *loss = A(size) * total;
}

template <class T, class A>
MK_INLINE void load_row(const T* from, A* to, int64_t size) {
  for_each_vec<A>(size, [&](int64_t k, auto count) { store_part(to + k, load_part(from + k, count), count); });
}
template <class T, class A>
MK_INLINE void store_row(T* to, const A* from, int64_t size) {
  for_each_vec<A>(size, [&](int64_t k, auto count) { store_part(to + k, load_part(from + k, count), count); });
}

}  // namespace memkern::cpu::MK_NS
