// Loads and stores of whole vectors and of tails, and stores past the caches. Part of common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {

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
// Into the second-level cache alone. For what will be read once: the first level can wait for few lines at a time, and a
// stream that is fetched into it ahead of its loads takes those places from them.
MK_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace memkern::cpu::MK_NS
