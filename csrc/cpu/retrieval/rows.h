// Rows of any dtype: sums, products and exponentials over them. Include after common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

// n elements of p, times scale, as accumulators; up to the next whole vector the rest is zero.
template <class T>
void widen(const T* p, acc_t<T> scale, acc_t<T>* out, int64_t n) {
  using A = acc_t<T>;
  for_each_vec<A>(n, [&](int64_t i, auto count) { store(out + i, load_part(p + i, count) * scale); });
}

// The dtype of queries may be another than that of the pairs; one row of them is small.
template <class A>
void widen_any(DType dtype, const void* base, int64_t first, A scale, A* out, int64_t n) {
  MK_DISPATCH(dtype, T, {
    if constexpr (std::is_same_v<acc_t<T>, A>) widen(static_cast<const T*>(base) + first, scale, out, n);
  })
}

template <class A>
void narrow_any(DType dtype, const A* in, A scale, void* base, int64_t first, int64_t n) {
  MK_DISPATCH(dtype, T, {
    if constexpr (std::is_same_v<acc_t<T>, A>) {
      T* out = static_cast<T*>(base) + first;
      for_each_vec<A>(n, [&](int64_t i, auto count) { store_part(out + i, load(in + i) * scale, count); });
    }
  })
}

// out = factor x (or out += factor x); x is padded to whole vectors.
template <bool Add, class T>
MK_INLINE void scaled(acc_t<T> factor, const acc_t<T>* x, T* out, int64_t n) {
  using A = acc_t<T>;
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    const Vec<A> product = load(x + i) * factor;
    store_part(out + i, Add ? load_part(out + i, count) + product : product, count);
  });
}

// sum += factor row; the sum is padded.
template <class T>
MK_INLINE void add_scaled(acc_t<T> factor, const T* row, acc_t<T>* sum, int64_t n) {
  using A = acc_t<T>;
  const Vec<A> factors(factor);
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    store(sum + i, fma(load_part(row + i, count), factors, load(sum + i)));
  });
}

// row . x; x is padded.
template <class T>
MK_INLINE acc_t<T> dot(const T* row, const acc_t<T>* x, int64_t width) {
  using A = acc_t<T>;
  Vec<A> s(A(0));
  for_each_vec<A>(width, [&](int64_t d, auto count) { s = fma(load_part(row + d, count), load(x + d), s); });
  return reduce_sum(s);
}

// out = keep out + sum_i weight[i] rows[at[i]], in order; out is padded to whole vectors.
template <class T>
void mix(const T* rows, const int64_t* at, const acc_t<T>* weight, int64_t n, int64_t width, acc_t<T> keep,
         acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr int64_t N = Vec<A>::N;
  int64_t d = 0;
  for (; d + 4 * N <= width; d += 4 * N) {
    Vec<A> s0 = load(out + d) * keep, s1 = load(out + d + N) * keep;
    Vec<A> s2 = load(out + d + 2 * N) * keep, s3 = load(out + d + 3 * N) * keep;
    for (int64_t i = 0; i < n; ++i) {
      const T* r = rows + at[i] + d;
      const Vec<A> w(weight[i]);
      s0 = fma(load(r), w, s0);
      s1 = fma(load(r + N), w, s1);
      s2 = fma(load(r + 2 * N), w, s2);
      s3 = fma(load(r + 3 * N), w, s3);
    }
    store(out + d, s0);
    store(out + d + N, s1);
    store(out + d + 2 * N, s2);
    store(out + d + 3 * N, s3);
  }
  for_each_vec<A>(width - d, [&](int64_t e, auto count) {
    Vec<A> s = load(out + d + e) * keep;
    for (int64_t i = 0; i < n; ++i) s = fma(load_part(rows + at[i] + d + e, count), Vec<A>(weight[i]), s);
    store(out + d + e, s);
  });
}

// x[i] = exp(x[i] - base); returns their sum.
template <class A>
MK_INLINE A exponentials_inline(A* x, int64_t n, A base) {
  Vec<A> sum(A(0));
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    const Vec<A> e = exp(load_part(x + i, count) - base);
    store_part(x + i, e, count);
    sum += load_part(x + i, count);
  });
  return reduce_sum(sum);
}

template <class A>
A exponentials(A* x, int64_t n, A base) {
  return exponentials_inline(x, n, base);
}

// slope[i] = weight[i] (slope[i] - sum_j weight[j] slope[j]): the gradient of a softmax.
template <class A>
void slopes(const A* weight, A* slope, int64_t n) {
  Vec<A> mean(A(0));
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    mean = fma(load_part(weight + i, count), load_part(slope + i, count), mean);
  });
  const A all = reduce_sum(mean);
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    store_part(slope + i, load_part(weight + i, count) * (load_part(slope + i, count) - all), count);
  });
}

// NaN when one of them is.
template <class A>
MK_INLINE A larger(A a, A b) {
  return b > a || b != b ? b : a;
}

// NaN when there is one, -inf for none. Of the few values of a turn one by one is fastest: a vector of them could not be
// loaded before the last of their stores is through.
template <class A>
A largest(const A* x, int64_t n) {
  A best = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < n; ++i) best = larger(best, x[i]);
  return best;
}

// The same of many.
template <class A>
MK_INLINE A largest_inline(const A* x, int64_t n) {
  constexpr A none = -std::numeric_limits<A>::infinity();
  Vec<A> best(none);
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    best = max_nan(best, fill_part(load_part(x + i, count), none, count));
  });
  return reduce_max(best);
}

template <class A>
int64_t padded(int64_t n) {
  return (n + Vec<A>::N - 1) / Vec<A>::N * Vec<A>::N;
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
