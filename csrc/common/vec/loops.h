// Loops over arrays at full width, with the tail compiled apart. Part of common/vec.h.
#pragma once

namespace memkern::cpu::MK_NS {

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
