// Backward of erase and add.
#pragma once

#include "cpu/memory/rows.h"

namespace memkern::cpu::MK_NS {

// One head's share: d_write[i] grows by sum_k dM_ik (v_k - e_k M_ik others_ik), d_erase grows by the sum over rows of
// -w_i dM_ik M_ik others_ik, with others the erasures of the other heads. With a single head dM becomes the gradient of
// the old memory on the way.
template <class T, bool SINGLE>
MK_INLINE void write_head_backward(T* d_memory, const T* memory, int64_t n, int64_t width, const T* scales,
                                   const T* write, const T* erase, const T* vectors, int64_t heads, int64_t head,
                                   T* d_write, T* d_erase) {
  const int64_t stride = padded<T>(n);
  auto block = [&](int64_t i, auto height) MK_LAMBDA_INLINE {
    constexpr int A = decltype(height)::value;
    Vec<T> sums[A];
    for (int a = 0; a < A; ++a) sums[a] = Vec<T>(T(0));
    for_each_vec<T>(width, [&](int64_t k, auto part) MK_LAMBDA_INLINE {
      const Vec<T> e = load_part(erase + head * width + k, part), v = load_part(vectors + head * width + k, part);
      Vec<T> d_e = load_part(d_erase + k, part);
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) {
        const int64_t at = (i + a) * width + k;
        const Vec<T> grad = load_part(d_memory + at, part);
        Vec<T> m = load_part(memory + at, part);
        if (scales != nullptr) m = m * scales[i + a];
        if constexpr (!SINGLE) {
          for (int64_t g = 0; g < heads; ++g) {
            if (g != head) m = m * (T(1) - load_part(erase + g * width + k, part) * write[g * stride + i + a]);
          }
        }
        const T w = write[head * stride + i + a];
        const Vec<T> product = grad * m;
        sums[a] = fma(grad, v, sums[a]) - product * e;
        d_e = fma(product, Vec<T>(-w), d_e);
        if constexpr (SINGLE) store_part(d_memory + at, grad * (T(1) - e * w), part);
      }
      store_part(d_erase + k, d_e, part);
    });
    for (int a = 0; a < A; ++a) d_write[i + a] += reduce_sum(sums[a]);
  };
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) block(i, std::integral_constant<int, 4>{});
  for (; i < n; ++i) block(i, std::integral_constant<int, 1>{});
}

// d_memory (of the written memory) becomes that of the memory before, as write_rows() saw it (after its scales); d_write
// grows; d_erase and d_vectors are set.
template <class T>
MK_INLINE void write_rows_backward(T* d_memory, const T* memory, int64_t n, int64_t width, const T* scales,
                                   const T* write, const T* erase, const T* vectors, int64_t heads, T* d_write,
                                   T* d_erase, T* d_vectors) {
  const int64_t stride = padded<T>(n);
  weighted_rows(write, heads, d_memory, n, width, d_vectors);
  std::memset(d_erase, 0, static_cast<size_t>(heads * width) * sizeof(T));
  if (heads == 1) {
    write_head_backward<T, true>(d_memory, memory, n, width, scales, write, erase, vectors, heads, 0, d_write, d_erase);
    return;
  }
  for (int64_t h = 0; h < heads; ++h) {
    write_head_backward<T, false>(d_memory, memory, n, width, scales, write, erase, vectors, heads, h,
                                  d_write + h * stride, d_erase + h * width);
  }
  for (int64_t i = 0; i < n; ++i) {
    for_each_vec<T>(width, [&](int64_t k, auto part) {
      Vec<T> grad = load_part(d_memory + i * width + k, part);
      for (int64_t h = 0; h < heads; ++h) {
        grad = grad * (T(1) - load_part(erase + h * width + k, part) * write[h * stride + i]);
      }
      store_part(d_memory + i * width + k, grad, part);
    });
  }
}

}  // namespace memkern::cpu::MK_NS
