// The score of one query and one row: a dot product in an order of its own, and the two norms. Include after
// common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

// Asks for the bytes of another row that lie where [i, i + count) lie in this one, null for none. Spread over the work on
// a row: a burst of its lines would wait for places to be free.
template <class T, bool Fetch>
MK_INLINE void fetch_beside(const T* ahead, int64_t i, int64_t count) {
  if constexpr (Fetch) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < count * int64_t(sizeof(T)); byte += 64) {
      prefetch_far(reinterpret_cast<const char*>(ahead + i) + byte);
    }
  }
}

// Scores are float(dot * row_inverse * query_inverse): four vectors of partial sums, added pairwise. The order depends
// on the width alone, so that a pair has the same score wherever it is met.
// Fetch: `ahead` is a row that is wanted soon.
template <class T, bool Fetch = false>
__attribute__((noinline)) acc_t<T> ordered_dot(const acc_t<T>* query, const T* row, int64_t width,
                                               const T* ahead = nullptr) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
  Vec<A> sums[4] = {Vec<A>(A(0)), Vec<A>(A(0)), Vec<A>(A(0)), Vec<A>(A(0))};
  int64_t i = 0;
  for (; i + 4 * N <= width; i += 4 * N) {
    fetch_beside<T, Fetch>(ahead, i, 4 * N);
    for (int s = 0; s < 4; ++s) sums[s] = fma(load(query + i + s * N), load(row + i + s * N), sums[s]);
  }
  for (int s = 0; i < width; i += N, ++s) {
    const int64_t n = std::min<int64_t>(N, width - i);
    sums[s] = fma(load_n(query + i, n), load_n(row + i, n), sums[s]);
  }
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The two halves of a vector of floats as doubles.
MK_INLINE VecD widen_low(VecF x) {
#if MK_X86 && MK_VEC == 512
  return (VecD::raw)_mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
#elif MK_X86 && MK_VEC == 256
  return (VecD::raw)_mm256_cvtps_pd(_mm256_castps256_ps128(x.v));
#else
  VecD::raw y;
  for (int i = 0; i < VecD::N; ++i) y[i] = double(x.v[i]);
  return y;
#endif
}
MK_INLINE VecD widen_high(VecF x) {
#if MK_X86 && MK_VEC == 512
  return (VecD::raw)_mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
#elif MK_X86 && MK_VEC == 256
  return (VecD::raw)_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1));
#else
  VecD::raw y;
  for (int i = 0; i < VecD::N; ++i) y[i] = double(x.v[i + VecD::N]);
  return y;
#endif
}
MK_INLINE void add_squares(VecD x, VecD (&sums)[2]) { sums[0] = fma(x, x, sums[0]); }
MK_INLINE void add_squares(VecF x, VecD (&sums)[2]) {
  const VecD low = widen_low(x), high = widen_high(x);
  sums[0] = fma(low, low, sums[0]);
  sums[1] = fma(high, high, sums[1]);
}

// In double: the square of any float is a normal number there.
template <class T>
__attribute__((noinline)) double squared_norm(const T* row, int64_t width) {
  VecD even[2] = {VecD(0.0), VecD(0.0)}, odd[2] = {VecD(0.0), VecD(0.0)};
  constexpr int N = Vec<acc_t<T>>::N;
  int64_t i = 0;
  for (; i + 2 * N <= width; i += 2 * N) {
    add_squares(load(row + i), even);
    add_squares(load(row + i + N), odd);
  }
  for (; i < width; i += N) add_squares(load_n(row + i, std::min<int64_t>(N, width - i)), even);
  return reduce_sum((even[0] + even[1]) + (odd[0] + odd[1]));
}

// Both at once: the row is read once, and the processor overlaps them. The bits are those of the two functions above.
template <class T, bool Fetch = false>
__attribute__((noinline)) acc_t<T> ordered_dot_and_norm(const acc_t<T>* query, const T* row, int64_t width,
                                                        double& squared, const T* ahead = nullptr) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
  Vec<A> sums[4] = {Vec<A>(A(0)), Vec<A>(A(0)), Vec<A>(A(0)), Vec<A>(A(0))};
  VecD even[2] = {VecD(0.0), VecD(0.0)}, odd[2] = {VecD(0.0), VecD(0.0)};
  int64_t i = 0;
  for (; i + 4 * N <= width; i += 4 * N) {
    fetch_beside<T, Fetch>(ahead, i, 4 * N);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const Vec<A> x = load(row + i + s * N);
      sums[s] = fma(load(query + i + s * N), x, sums[s]);
      add_squares(x, s % 2 == 0 ? even : odd);
    }
  }
  for (int s = 0; i < width; i += N, ++s) {
    const int64_t n = std::min<int64_t>(N, width - i);
    const Vec<A> x = load_n(row + i, n);
    sums[s] = fma(load_n(query + i, n), x, sums[s]);
    // squared_norm takes whole vectors by twos, and what is left alone.
    add_squares(x, s == 1 && n == N ? odd : even);
  }
  squared = reduce_sum((even[0] + even[1]) + (odd[0] + odd[1]));
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

MK_INLINE double inverse_root(double squared) { return squared == 0 ? 0.0 : 1.0 / std::sqrt(squared); }

// 1 / |x| as the search uses it; the inverse of a subnormal norm would overflow, and infinity times zero is NaN.
template <class A>
MK_INLINE A rounded_inverse(double squared) {
  const double inverse = inverse_root(squared), largest = double(std::numeric_limits<A>::max());
  return A(inverse > largest ? largest : inverse);
}

// A query as scores are computed from it: times a power of two, which changes no digit of a product but keeps it away
// from overflow.
template <class A>
struct QueryScale {
  double factor;   // the power of two
  double inverse;  // 1 / |factor * query|, or 1 for the plain inner product
};

template <class A>
QueryScale<A> scale_query(A* query, int64_t width, bool normalized) {
  if (normalized) return {1.0, 1.0};
  A largest = 0;
  for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::abs(query[i]));
  double factor = 1.0;
  if (largest > 0 && largest <= std::numeric_limits<A>::max()) {
    int exponent;
    std::frexp(double(largest), &exponent);
    // Beyond 2^1000 the factor itself would not be a number.
    factor = std::ldexp(1.0, std::min(-exponent, 1000));
    for (int64_t i = 0; i < width; ++i) query[i] = A(double(query[i]) * factor);
  }
  return {factor, inverse_root(squared_norm(query, width))};
}

template <class A>
MK_INLINE A final_score(A dot, A row_inverse, double query_inverse, bool normalized) {
  if (normalized) return dot;
  // Adding zero turns -0 into 0.
  return A(double(dot) * double(row_inverse) * query_inverse) + A(0);
}

// A query in f, the width padded with zeros to `padded`.
template <class A>
void read_query(DType dtype, const void* base, int64_t offset, int64_t width, int64_t padded, A* out) {
  MK_DISPATCH(dtype, S, {
    const S* from = static_cast<const S*>(base) + offset;
    for (int64_t i = 0; i < width; ++i) out[i] = A(to_acc(from[i]));
  });
  for (int64_t i = width; i < padded; ++i) out[i] = 0;
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
