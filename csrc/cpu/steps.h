// A step of a product: one float of each factor or, where MK_DOT_BF16 is defined (files of their own, compiled for
// processors that have the instruction), a pair of bfloat16 in 32 bits, which runs at twice the rate. Include after
// common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

#if defined(MK_DOT_BF16)
using Element32 = uint32_t;
using Factor = uint16_t;  // of which a step holds kPerStep
constexpr int kPerStep = 2;
MK_INLINE VecF broadcast_step(const Element32* x) {
  return (VecF::raw)_mm512_castsi512_ps(_mm512_set1_epi32(int(*x)));
}
MK_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) {
  return (VecF::raw)_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v);
}
// One instruction instead of store()'s ten. Like the products themselves it takes a subnormal number for zero.
MK_INLINE void store_rounded(bf16* p, VecF x) {
  const __m256bh low = _mm512_cvtneps_pbh((__m512)x.v);
  std::memcpy(p, &low, sizeof(low));
}
#else
using Element32 = float;
using Factor = float;
constexpr int kPerStep = 1;
MK_INLINE VecF broadcast_step(const Element32* x) { return VecF(*x); }
MK_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) { return fma(a, b, sum); }
MK_INLINE void store_rounded(bf16* p, VecF x) { store(p, x); }
#endif

}  // namespace
}  // namespace memkern::cpu::MK_NS
