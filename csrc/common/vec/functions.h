// exp, log, log1p, tanh, sigmoid and softplus. Part of common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {

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

}  // namespace memkern::cpu::MK_NS
