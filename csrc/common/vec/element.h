// One element: bfloat16 and float16 to float and back, rounded to nearest even. Part of common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {

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

}  // namespace memkern::cpu::MK_NS
