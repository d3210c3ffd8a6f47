// Vec and Mask, their operators, and what compares, selects and rounds element by element. Part of common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {

template <class A>
struct Element;
template <>
struct Element<float> {
  using integer = int32_t;
  typedef float raw __attribute__((vector_size(MK_VEC / 8)));
  typedef int32_t int_raw __attribute__((vector_size(MK_VEC / 8)));
};
template <>
struct Element<double> {
  using integer = int64_t;
  typedef double raw __attribute__((vector_size(MK_VEC / 8)));
  typedef int64_t int_raw __attribute__((vector_size(MK_VEC / 8)));
};

template <class A>  // float or double
struct Vec {
  using raw = typename Element<A>::raw;
  using int_raw = typename Element<A>::int_raw;
  static constexpr int N = MK_VEC / 8 / int(sizeof(A));

  raw v;

  Vec() = default;
  __attribute__((always_inline)) inline Vec(raw x) : v(x) {}
  __attribute__((always_inline)) inline Vec(A x) : v(x - raw{}) {}
  __attribute__((always_inline)) inline A operator[](int i) const { return v[i]; }
};

using VecF = Vec<float>;
using VecD = Vec<double>;

// Result of a comparison: all bits set where it holds.
template <class A>
struct Mask {
  typename Vec<A>::int_raw m;
};

#define MK_ARITHMETIC(op)                                                                              \
  template <class A>                                                                                   \
  MK_INLINE Vec<A> operator op(Vec<A> a, Vec<A> b) { return a.v op b.v; }                              \
  template <class A>                                                                                   \
  MK_INLINE Vec<A> operator op(Vec<A> a, A b) { return a.v op b; }                                     \
  template <class A>                                                                                   \
  MK_INLINE Vec<A> operator op(A a, Vec<A> b) { return a op b.v; }                                     \
  template <class A>                                                                                   \
  MK_INLINE Vec<A>& operator op##=(Vec<A>& a, Vec<A> b) { a.v = a.v op b.v; return a; }
MK_ARITHMETIC(+)
MK_ARITHMETIC(-)
MK_ARITHMETIC(*)
MK_ARITHMETIC(/)
#undef MK_ARITHMETIC

#define MK_COMPARISON(op)                                                                              \
  template <class A>                                                                                   \
  MK_INLINE Mask<A> operator op(Vec<A> a, Vec<A> b) { return {a.v op b.v}; }                           \
  template <class A>                                                                                   \
  MK_INLINE Mask<A> operator op(Vec<A> a, A b) { return {a.v op Vec<A>(b).v}; }
MK_COMPARISON(<)
MK_COMPARISON(<=)
MK_COMPARISON(>)
MK_COMPARISON(>=)
MK_COMPARISON(==)
MK_COMPARISON(!=)
#undef MK_COMPARISON

template <class A>
MK_INLINE Vec<A> operator-(Vec<A> a) { return -a.v; }
template <class A>
MK_INLINE Mask<A> operator&(Mask<A> a, Mask<A> b) { return {a.m & b.m}; }
template <class A>
MK_INLINE Mask<A> operator|(Mask<A> a, Mask<A> b) { return {a.m | b.m}; }
template <class A>
MK_INLINE Mask<A> operator!(Mask<A> a) { return {~a.m}; }

template <class A>
MK_INLINE Vec<A> select(Mask<A> mask, Vec<A> yes, Vec<A> no) { return mask.m ? yes.v : no.v; }
template <class A>
MK_INLINE Mask<A> is_nan(Vec<A> a) { return {a.v != a.v}; }

// Element i holds i: `iota<float>() < float(n)` is the mask of the first n.
template <class A>
MK_INLINE Vec<A> iota() {
  typename Vec<A>::raw x{};
  for (int i = 0; i < Vec<A>::N; ++i) x[i] = A(i);
  return x;
}

template <class A>
MK_INLINE bool any(Mask<A> mask) {
#if MK_X86 && MK_VEC == 512
  return _mm512_test_epi32_mask((__m512i)mask.m, (__m512i)mask.m) != 0;
#elif MK_X86 && MK_VEC == 256
  return !_mm256_testz_si256((__m256i)mask.m, (__m256i)mask.m);
#elif MK_X86
  return _mm_movemask_epi8((__m128i)mask.m) != 0;
#else
  for (int i = 0; i < Vec<A>::N; ++i) {
    if (mask.m[i]) return true;
  }
  return false;
#endif
}
template <class A>
MK_INLINE bool all(Mask<A> mask) { return !any(!mask); }

// a * b + c; one rounding where the instruction set has it.
MK_INLINE VecF fma(VecF a, VecF b, VecF c) {
#if MK_X86 && MK_VEC == 512
  return (VecF::raw)_mm512_fmadd_ps(a.v, b.v, c.v);
#elif MK_X86 && MK_VEC == 256
  return (VecF::raw)_mm256_fmadd_ps(a.v, b.v, c.v);
#else
  return a.v * b.v + c.v;
#endif
}
MK_INLINE VecD fma(VecD a, VecD b, VecD c) {
#if MK_X86 && MK_VEC == 512
  return (VecD::raw)_mm512_fmadd_pd(a.v, b.v, c.v);
#elif MK_X86 && MK_VEC == 256
  return (VecD::raw)_mm256_fmadd_pd(a.v, b.v, c.v);
#else
  return a.v * b.v + c.v;
#endif
}

// max/min give the second operand where one is NaN; max_nan/min_nan give NaN.
MK_INLINE VecF max(VecF a, VecF b) {
#if MK_X86 && MK_VEC == 512
  return (VecF::raw)_mm512_max_ps(a.v, b.v);
#elif MK_X86 && MK_VEC == 256
  return (VecF::raw)_mm256_max_ps(a.v, b.v);
#else
  return a.v > b.v ? a.v : b.v;
#endif
}
MK_INLINE VecD max(VecD a, VecD b) {
#if MK_X86 && MK_VEC == 512
  return (VecD::raw)_mm512_max_pd(a.v, b.v);
#elif MK_X86 && MK_VEC == 256
  return (VecD::raw)_mm256_max_pd(a.v, b.v);
#else
  return a.v > b.v ? a.v : b.v;
#endif
}
MK_INLINE VecF min(VecF a, VecF b) {
#if MK_X86 && MK_VEC == 512
  return (VecF::raw)_mm512_min_ps(a.v, b.v);
#elif MK_X86 && MK_VEC == 256
  return (VecF::raw)_mm256_min_ps(a.v, b.v);
#else
  return a.v < b.v ? a.v : b.v;
#endif
}
MK_INLINE VecD min(VecD a, VecD b) {
#if MK_X86 && MK_VEC == 512
  return (VecD::raw)_mm512_min_pd(a.v, b.v);
#elif MK_X86 && MK_VEC == 256
  return (VecD::raw)_mm256_min_pd(a.v, b.v);
#else
  return a.v < b.v ? a.v : b.v;
#endif
}
template <class A>
MK_INLINE Vec<A> max_nan(Vec<A> a, Vec<A> b) { return select(is_nan(a), a, max(a, b)); }
template <class A>
MK_INLINE Vec<A> min_nan(Vec<A> a, Vec<A> b) { return select(is_nan(a), a, min(a, b)); }

template <class A>
MK_INLINE Vec<A> abs(Vec<A> a) {
  using I = typename Element<A>::integer;
  return (typename Vec<A>::raw)((typename Vec<A>::int_raw)a.v & std::numeric_limits<I>::max());
}
// Magnitude of a with the sign of b.
template <class A>
MK_INLINE Vec<A> copysign(Vec<A> a, Vec<A> b) {
  using I = typename Element<A>::integer;
  using V = typename Vec<A>::int_raw;
  const I magnitude = std::numeric_limits<I>::max();
  return (typename Vec<A>::raw)(((V)a.v & magnitude) | ((V)b.v & ~magnitude));
}
MK_INLINE VecF sqrt(VecF a) {
#if MK_X86 && MK_VEC == 512
  return (VecF::raw)_mm512_sqrt_ps(a.v);
#elif MK_X86 && MK_VEC == 256
  return (VecF::raw)_mm256_sqrt_ps(a.v);
#elif MK_X86
  return (VecF::raw)_mm_sqrt_ps(a.v);
#else
  for (int i = 0; i < VecF::N; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
#endif
}
MK_INLINE VecD sqrt(VecD a) {
#if MK_X86 && MK_VEC == 512
  return (VecD::raw)_mm512_sqrt_pd(a.v);
#elif MK_X86 && MK_VEC == 256
  return (VecD::raw)_mm256_sqrt_pd(a.v);
#elif MK_X86
  return (VecD::raw)_mm_sqrt_pd(a.v);
#else
  for (int i = 0; i < VecD::N; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
#endif
}

}  // namespace memkern::cpu::MK_NS
