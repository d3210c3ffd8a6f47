// The order of a few hundred scores by counting, for each, how many are higher: no comparison is a branch that the
// processor would have to guess, which makes it several times faster than sorting. Include after common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

constexpr int64_t kMostRanked = 2048;  // from here on the square of their number tells

// sum + 1 where x > y.
template <class A>
MK_INLINE typename Vec<A>::int_raw count_above(Vec<A> x, Vec<A> y, typename Vec<A>::int_raw sum) {
#if MK_X86 && MK_VEC == 512
  if constexpr (std::is_same_v<A, float>) {
    const __m512i count = (__m512i)sum;
    return (typename Vec<A>::int_raw)_mm512_mask_sub_epi32(count, _mm512_cmp_ps_mask(x.v, y.v, _CMP_GT_OQ), count,
                                                           _mm512_set1_epi32(-1));
  }
#endif
  return sum - (x.v > y.v);
}

template <class A>
MK_INLINE int64_t total(typename Vec<A>::int_raw sum) {
#if MK_X86 && MK_VEC == 512
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_add_epi32((__m512i)sum);
#endif
  int64_t all = 0;
  for (int lane = 0; lane < Vec<A>::N; ++lane) all += sum[lane];
  return all;
}

// order[r] = the place in `keys` of the r-th highest, for r < found. False where two of these are equal, and the order is
// then not filled. `keys`: count of them, none NaN, with room for a vector more.
template <class A>
bool rank(A* keys, int64_t count, int64_t found, int32_t* order) {
  using Ints = typename Vec<A>::int_raw;
  constexpr int N = Vec<A>::N, kTogether = 4;
  std::fill_n(keys + count, N, -std::numeric_limits<A>::infinity());
  std::fill_n(order, found, -1);
  for (int64_t first = 0; first < count; first += kTogether) {
    Vec<A> own[kTogether];
    Ints higher[kTogether]{};
#pragma GCC unroll 4
    for (int t = 0; t < kTogether; ++t) own[t] = Vec<A>(keys[first + t]);
    for (int64_t i = 0; i < count; i += N) {
      const Vec<A> x = load(keys + i);
#pragma GCC unroll 4
      for (int t = 0; t < kTogether; ++t) higher[t] = count_above(x, own[t], higher[t]);
    }
    for (int t = 0; t < kTogether && first + t < count; ++t) {
      const int64_t place = total<A>(higher[t]);
      if (place >= found) continue;
      if (order[place] >= 0) return false;
      order[place] = int32_t(first + t);
    }
  }
  return true;
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
