// Sum, maximum and minimum over the elements of a vector, in an order that depends on the width alone. Part of common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {

template <class A>
MK_INLINE A reduce_sum(Vec<A> x) {
  A part[Vec<A>::N];
  store(part, x);
  for (int step = Vec<A>::N / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  }
  return part[0];
}
#if MK_X86
template <>
inline __attribute__((always_inline)) float reduce_sum<float>(VecF x) {
#if MK_VEC == 512
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif MK_VEC == 256
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
#else
  const __m128 four = x.v;
#endif
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#endif
// out[i] = the sum of x[i]; four together take less than half of the instructions.
template <class A>
MK_INLINE void reduce_four(const Vec<A> (&x)[4], A* out) {
  for (int i = 0; i < 4; ++i) out[i] = reduce_sum(x[i]);
}
#if MK_X86 && MK_VEC == 512
template <>
inline __attribute__((always_inline)) void reduce_four<float>(const VecF (&x)[4], float* out) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  // Every 128 bits hold a part of each sum.
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}
#endif

// Largest element; NaN when there is one. By halves: the elements one after the other would each wait for the last.
template <class A>
MK_INLINE A reduce_max(Vec<A> x) {
  using I = typename Vec<A>::int_raw;
#pragma GCC unroll 4
  for (int step = Vec<A>::N / 2; step > 0; step /= 2) {
    I partner{};
#pragma GCC unroll 16
    for (int i = 0; i < Vec<A>::N; ++i) partner[i] = i ^ step;
    const typename Vec<A>::raw other = __builtin_shuffle(x.v, partner);
    x = max_nan(x, Vec<A>(other));
  }
  return x.v[0];
}
template <class A>
MK_INLINE A reduce_min(Vec<A> x) { return -reduce_max(-x); }

}  // namespace memkern::cpu::MK_NS
