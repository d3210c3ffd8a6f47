// A vector of MK_VEC bits of float or double, and the functions the kernels compute with. Include after cpu/isa.h.
//
// load() converts bfloat16 and float16 to float, store() rounds back to nearest even; load_n()/store_n() touch only the
// first n elements. Operators + - * / < <= > >= == work element-wise; comparisons give a mask for select(), any() and
// all(). The transcendental functions are within 2 ulp, keep NaN, and give the limits at infinity. Everything here is
// in the namespace of the instruction set, so that no function is shared between two of them.
#pragma once

#define MK_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) || defined(_M_X64)
#define MK_X86 1
#else
#define MK_X86 0
#endif

namespace memkern::cpu::MK_NS {

// ---- one element ----

MK_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

MK_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

MK_INLINE float to_acc(float x) { return x; }
MK_INLINE double to_acc(double x) { return x; }
MK_INLINE float to_acc(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
MK_INLINE float to_acc(f16 x) {
#if MK_X86 && MK_VEC >= 256
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Scaling by a power of two also brings the subnormals to their place.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
#endif
}

template <class T>
struct FromAcc;
template <>
struct FromAcc<float> {
  MK_INLINE float run(float x) { return x; }
};
template <>
struct FromAcc<double> {
  MK_INLINE double run(double x) { return x; }
};
template <>
struct FromAcc<bf16> {
  MK_INLINE bf16 run(float x) {
    const uint32_t u = bits_of(x);
    if (x != x) return {uint16_t((u >> 16) | 0x40u)};
    return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
};
template <>
struct FromAcc<f16> {
  MK_INLINE f16 run(float x) {
#if MK_X86 && MK_VEC >= 256
    return {uint16_t(_cvtss_sh(x, 0))};
#else
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {  // subnormal in float16: the addition rounds at its last place
      return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
    }
    return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
#endif
  }
};
// One value rounded to T: from_acc<bf16>(x).
template <class T>
MK_INLINE T from_acc(acc_t<T> x) {
  return FromAcc<T>::run(x);
}

// ---- a vector ----

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

// ---- memory ----

MK_INLINE VecF load(const float* p) {
  VecF::raw x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
MK_INLINE VecD load(const double* p) {
  VecD::raw x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
MK_INLINE VecF load(const bf16* p) {
#if MK_X86 && MK_VEC == 512
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (VecF::raw)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif MK_X86 && MK_VEC == 256
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VecF::raw)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#elif MK_X86
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (VecF::raw)_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), half));
#else
  VecF::raw x;
  for (int i = 0; i < VecF::N; ++i) x[i] = to_acc(p[i]);
  return x;
#endif
}
MK_INLINE VecF load(const f16* p) {
#if MK_X86 && MK_VEC == 512
  return (VecF::raw)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif MK_X86 && MK_VEC == 256
  return (VecF::raw)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecF::raw x;
  for (int i = 0; i < VecF::N; ++i) x[i] = to_acc(p[i]);
  return x;
#endif
}

MK_INLINE void store(float* p, VecF x) { std::memcpy(p, &x.v, sizeof(x.v)); }
MK_INLINE void store(double* p, VecD x) { std::memcpy(p, &x.v, sizeof(x.v)); }
MK_INLINE void store(bf16* p, VecF x) {
#if MK_X86
  const VecF::int_raw bits = (VecF::int_raw)x.v;
  const VecF::int_raw rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
  const VecF::int_raw out = (x.v != x.v) ? quiet : rounded;
#if MK_VEC == 512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)out, 16)));
#elif MK_VEC == 256
  const __m256i high = _mm256_srli_epi32((__m256i)out, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  // An arithmetic shift, because SSE2 packs only with signed saturation.
  const __m128i high = _mm_srai_epi32((__m128i)out, 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(high, high));
#endif
#else
  for (int i = 0; i < VecF::N; ++i) p[i] = from_acc<bf16>(x.v[i]);
#endif
}
MK_INLINE void store(f16* p, VecF x) {
#if MK_X86 && MK_VEC == 512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, 0));
#elif MK_X86 && MK_VEC == 256
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, 0));
#else
  for (int i = 0; i < VecF::N; ++i) p[i] = from_acc<f16>(x.v[i]);
#endif
}

// The first n elements (0 <= n <= N), the others zero; nothing behind them is read.
template <class T>
MK_INLINE Vec<acc_t<T>> load_n(const T* p, int64_t n) {
#if MK_X86 && MK_VEC == 512
  if constexpr (std::is_same_v<T, float>) {
    return (VecF::raw)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p);
  } else if constexpr (std::is_same_v<T, double>) {
    return (VecD::raw)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1u), p);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), p);
    if constexpr (std::is_same_v<T, f16>) {
      return (VecF::raw)_mm512_cvtph_ps(half);
    } else {
      return (VecF::raw)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  }
#else
  T copy[Vec<acc_t<T>>::N];
  std::memset(copy, 0, sizeof(copy));
  std::memcpy(copy, p, size_t(n) * sizeof(T));
  return load(copy);
#endif
}
// Writes the first n elements alone.
template <class T>
MK_INLINE void store_n(T* p, Vec<acc_t<T>> x, int64_t n) {
#if MK_X86 && MK_VEC == 512
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), x.v);
    return;
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1u), x.v);
    return;
  }
#endif
  T copy[Vec<acc_t<T>>::N];
  store(copy, x);
  std::memcpy(p, copy, size_t(n) * sizeof(T));
}

// A store that does not fetch the line: for output larger than the caches. p is aligned to the vector; end a run of
// such stores with stream_fence().
MK_INLINE void stream(float* p, VecF x) {
#if MK_X86 && MK_VEC == 512
  _mm512_stream_ps(p, x.v);
#elif MK_X86 && MK_VEC == 256
  _mm256_stream_ps(p, x.v);
#elif MK_X86
  _mm_stream_ps(p, x.v);
#else
  store(p, x);
#endif
}
MK_INLINE void stream_fence() {
#if MK_X86
  _mm_sfence();
#endif
}
MK_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// ---- reductions, in an order that depends on the width alone ----

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
// Largest element; NaN when there is one.
template <class A>
MK_INLINE A reduce_max(Vec<A> x) {
  A part[Vec<A>::N];
  store(part, x);
  A best = part[0];
  for (int i = 1; i < Vec<A>::N; ++i) best = (part[i] > best || part[i] != part[i]) ? part[i] : best;
  return best;
}
template <class A>
MK_INLINE A reduce_min(Vec<A> x) { return -reduce_max(-x); }

// ---- exp, log, tanh, sigmoid ----

// x * 2^n for integral n.
template <class A>
MK_INLINE Vec<A> scale_by_power(Vec<A> x, Vec<A> n) {
#if MK_X86 && MK_VEC == 512
  if constexpr (sizeof(A) == 4) {
    return (VecF::raw)_mm512_scalef_ps(x.v, n.v);
  } else {
    return (VecD::raw)_mm512_scalef_pd(x.v, n.v);
  }
#else
  // In two steps, so that subnormal results and 2^(largest exponent) come out right.
  using V = typename Vec<A>::int_raw;
  using R = typename Vec<A>::raw;
  constexpr int kShift = sizeof(A) == 4 ? 23 : 52, kBias = sizeof(A) == 4 ? 127 : 1023;
  const V whole = __builtin_convertvector(n.v, V), half = whole >> 1;
  const R first = (R)((half + kBias) << kShift), second = (R)((whole - half + kBias) << kShift);
  return x.v * first * second;
#endif
}

// Nearest integer, ties to even, for |x| < 2^21 (float) or 2^50 (double).
template <class A>
MK_INLINE Vec<A> round_small(Vec<A> x) {
  const A magic = sizeof(A) == 4 ? A(12582912.0) : A(6755399441055744.0);
  return (x.v + magic) - magic;
}

MK_INLINE VecF exp(VecF x) {
  // Cody-Waite reduction by ln 2 in two parts, then the minimax polynomial of Cephes' expf.
  const VecF bounded = min(VecF(89.0f), max(VecF(-104.0f), x));
  const VecF n = round_small(bounded * 1.44269504088896341f);
  VecF r = fma(n, VecF(-0.693359375f), bounded);
  r = fma(n, VecF(2.12194440e-4f), r);
  VecF p = fma(VecF(1.9875691500e-4f), r, VecF(1.3981999507e-3f));
  p = fma(p, r, VecF(8.3334519073e-3f));
  p = fma(p, r, VecF(4.1665795894e-2f));
  p = fma(p, r, VecF(1.6666665459e-1f));
  p = fma(p, r, VecF(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  // NaN went to a bound above: give it back.
  return select(is_nan(x), x, scale_by_power(p, n));
}

MK_INLINE VecD exp(VecD x) {
  const VecD bounded = min(VecD(710.0), max(VecD(-746.0), x));
  const VecD n = round_small(bounded * 1.4426950408889634074);
  VecD r = fma(n, VecD(-6.93145751953125e-1), bounded);
  r = fma(n, VecD(-1.42860682030941723212e-6), r);
  // Taylor's series: |r| <= ln(2)/2, so the 14th term lies below the last place.
  constexpr double kTerms[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                               1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                               1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5};
  VecD p(kTerms[0]);
  for (int i = 1; i < 12; ++i) p = fma(p, r, VecD(kTerms[i]));
  p = fma(p, r * r, r) + 1.0;
  return select(is_nan(x), x, scale_by_power(p, n));
}

// log of fdlibm: x = 2^k (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), and log(1 + f) by a series in f / (2 + f).
template <class A>
MK_INLINE Vec<A> log(Vec<A> x) {
  using V = typename Vec<A>::int_raw;
  using R = typename Vec<A>::raw;
  using I = typename Element<A>::integer;
  constexpr bool kFloat = sizeof(A) == 4;
  constexpr int kShift = kFloat ? 23 : 52;
  const I kHalfRoot = kFloat ? I(0x3f3504f3) : I(0x3fe6a09e667f3bcdLL);  // sqrt(1/2)
  const A kSmallest = std::numeric_limits<A>::min();
  const A kUp = kFloat ? A(0x1p23) : A(0x1p52);
  const Mask<A> subnormal = x < kSmallest;
  const Vec<A> normal = select(subnormal, x * kUp, x);
  const V bits = (V)normal.v;
  const V shifted = (bits - kHalfRoot) >> kShift;
  const Vec<A> m = (R)(bits - (shifted << kShift));
  const Vec<A> k = Vec<A>(__builtin_convertvector(shifted, R)) - select(subnormal, Vec<A>(A(kShift)), Vec<A>(A(0)));
  const Vec<A> f = m - A(1);
  const Vec<A> s = f / (f + A(2)), z = s * s, half_square = A(0.5) * f * f;
  Vec<A> series;
  if constexpr (kFloat) {
    series = fma(Vec<A>(A(0.24279078841)), z, Vec<A>(A(0.28498786688)));
    series = fma(series, z, Vec<A>(A(0.40000972152)));
    series = fma(series, z, Vec<A>(A(0.66666662693))) * z;
  } else {
    constexpr double kTerms[] = {1.479819860511658591e-1, 1.531383769920937332e-1, 1.818357216161805012e-1,
                                 2.222219843214978396e-1, 2.857142874366239149e-1, 3.999999999940941908e-1,
                                 6.666666666666735130e-1};
    series = Vec<A>(A(kTerms[0]));
    for (int i = 1; i < 7; ++i) series = fma(series, z, Vec<A>(A(kTerms[i])));
    series = series * z;
  }
  const A kLn2High = kFloat ? A(6.9313812256e-01) : A(6.93147180369123816490e-01);
  const A kLn2Low = kFloat ? A(9.0580006145e-06) : A(1.90821492927058770002e-10);
  const Vec<A> low = fma(s, half_square + series, k * kLn2Low);
  Vec<A> result = fma(k, Vec<A>(kLn2High), f - (half_square - low));
  const A kInfinity = std::numeric_limits<A>::infinity();
  result = select(x == kInfinity, x, result);
  result = select(x == A(0), Vec<A>(-kInfinity), result);
  result = select(x < A(0), Vec<A>(std::numeric_limits<A>::quiet_NaN()), result);
  return select(is_nan(x), x, result);
}

// log(1 + x), exact where x is small.
template <class A>
MK_INLINE Vec<A> log1p(Vec<A> x) {
  const Vec<A> u = x + A(1);
  const Vec<A> result = log(u) - ((u - A(1)) - x) / u;
  return select((x == std::numeric_limits<A>::infinity()) | (u == A(0)), log(u), result);
}

MK_INLINE VecF tanh(VecF x) {
  const VecF a = abs(x), z = x * x;
  VecF p = fma(VecF(-5.70498872745e-3f), z, VecF(2.06390887954e-2f));
  p = fma(p, z, VecF(-5.37397155531e-2f));
  p = fma(p, z, VecF(1.33314422036e-1f));
  p = fma(p, z, VecF(-3.33332819422e-1f));
  const VecF near = fma(p * z, x, x);
  const VecF far = copysign(1.0f - 2.0f / (exp(a + a) + 1.0f), x);
  return select(a < 0.625f, near, far);
}

MK_INLINE VecD tanh(VecD x) {
  const VecD a = abs(x), z = x * x;
  VecD p = fma(VecD(-9.64399179425052238628e-1), z, VecD(-9.92877231001918586564e1));
  p = fma(p, z, VecD(-1.61468768441708447952e3));
  VecD q = z + 1.12811678491632931402e2;
  q = fma(q, z, VecD(2.23548839060100448583e3));
  q = fma(q, z, VecD(4.84406305325125486048e3));
  const VecD near = fma(p / q * z, x, x);
  const VecD far = copysign(1.0 - 2.0 / (exp(a + a) + 1.0), x);
  return select(a < 0.625, near, far);
}

template <class A>
MK_INLINE Vec<A> sigmoid(Vec<A> x) {
  const Vec<A> e = exp(-abs(x));  // never overflows, and keeps the small tail
  return select(x < A(0), e, Vec<A>(A(1))) / (e + A(1));
}

// log(1 + exp(x)) without overflow.
template <class A>
MK_INLINE Vec<A> softplus(Vec<A> x) { return max_nan(x, Vec<A>(A(0))) + log1p(exp(-abs(x))); }

// ---- loops ----

// f(index, count) for vectors of [0, n): count is the constant N except perhaps in the last call, where it is the rest.
// load_part() and store_part() take it: the loop then runs at full width, and its tail is compiled apart.
//
//     for_each_vec<float>(n, [&](int64_t i, auto count) { store_part(y + i, exp(load_part(x + i, count)), count); });
template <class A, class F>
MK_INLINE void for_each_vec(int64_t n, const F& f) {
  constexpr int N = Vec<A>::N;
  int64_t i = 0;
  for (; i + N <= n; i += N) f(i, std::integral_constant<int, N>{});
  if (i < n) f(i, int(n - i));
}

template <class T>
MK_INLINE Vec<acc_t<T>> load_part(const T* p, std::integral_constant<int, Vec<acc_t<T>>::N>) { return load(p); }
template <class T>
MK_INLINE Vec<acc_t<T>> load_part(const T* p, int n) { return load_n(p, n); }
// Puts `fill` into the elements past a tail.
template <class A>
MK_INLINE Vec<A> fill_part(Vec<A> x, A, std::integral_constant<int, Vec<A>::N>) { return x; }
template <class A>
MK_INLINE Vec<A> fill_part(Vec<A> x, A fill, int n) { return select(iota<A>() < A(n), x, Vec<A>(fill)); }
template <class T>
MK_INLINE void store_part(T* p, Vec<acc_t<T>> x, std::integral_constant<int, Vec<acc_t<T>>::N>) { store(p, x); }
template <class T>
MK_INLINE void store_part(T* p, Vec<acc_t<T>> x, int n) { store_n(p, x, n); }

}  // namespace memkern::cpu::MK_NS
