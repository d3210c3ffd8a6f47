// What happens on vectors over the slots of one row of the batch: content softmax, usage, allocation, sharpening.
#pragma once

#include "cpu/memory/rows.h"

namespace memkern::cpu::MK_NS {

template <class T>
struct Eps {
  static constexpr T kNorm = T(1e-12), kUsage = T(1e-6), kKept = T(1.0 - 1e-6);
};

template <class T>
MK_INLINE T inverse_norm(T square) {
  return T(1) / std::sqrt(square + Eps<T>::kNorm);
}
template <class T>
MK_INLINE Vec<T> inverse_norm(Vec<T> square) {
  return Vec<T>(T(1)) / sqrt(square + Eps<T>::kNorm);
}

// exp(x - max) / sum over the slots with a true mask (all without one), in place; nothing at all gives zeros.
template <class T>
MK_INLINE void softmax_slots(T* x, int64_t n, const uint8_t* mask) {
  constexpr int N = Vec<T>::N;
  const T kLow = -std::numeric_limits<T>::infinity();
  const int64_t size = padded<T>(n);
  for (int64_t i = n; i < size; ++i) x[i] = kLow;
  if (mask != nullptr) {
    bool present = false;
    for (int64_t i = 0; i < n; ++i) {
      present = present || mask[i];
      if (!mask[i]) x[i] = kLow;
    }
    if (!present) {
      std::memset(x, 0, static_cast<size_t>(size) * sizeof(T));
      return;
    }
  }
  Vec<T> best(kLow);
  for (int64_t i = 0; i < size; i += N) best = max_nan(load(x + i), best);
  const T top = reduce_max(best);
  Vec<T> sum(T(0));
  for (int64_t i = 0; i < size; i += N) {
    const Vec<T> e = exp(load(x + i) - top);
    store(x + i, e);
    sum += e;
  }
  const T scale = T(1) / reduce_sum(sum);
  for (int64_t i = 0; i < size; i += N) store(x + i, load(x + i) * scale);
  for (int64_t i = n; i < size; ++i) x[i] = T(0);
}

// Turns dots <key, row> into content weights in place. `scales` are factors of the rows (deallocation), or null.
template <class T>
MK_INLINE void content_softmax(T* dots, const T* norms, const T* scales, int64_t n, T key_square, T strength,
                               const uint8_t* mask) {
  const T factor = strength * inverse_norm(key_square);
  for (int64_t i = 0; i < padded<T>(n); i += Vec<T>::N) {
    Vec<T> value = load(dots + i), square = load(norms + i);
    if (scales != nullptr) {
      const Vec<T> scale = load(scales + i);
      value = value * scale;
      square = square * scale * scale;
    }
    store(dots + i, value * inverse_norm(square) * factor);
  }
  softmax_slots(dots, n, mask);
}

// Backward of content_softmax. On entry `grad` is the gradient of the weights and `dots` the raw dots of the rows as the
// lookup saw them; on exit `grad` holds what multiplies the key in each row's gradient, and `own` has grown by what
// multiplies the row itself (with a minus sign). Returns the gradient of the strength. The key's gradient is
// project_key() of sum_i grad_i row_i.
template <class T>
MK_INLINE T content_backward(T* grad, const T* weights, const T* dots, const T* norms, int64_t n, T key_square,
                             T strength, T* own) {
  constexpr int N = Vec<T>::N;
  const int64_t size = padded<T>(n);
  const T key_inverse = inverse_norm(key_square);
  const T mean = dot(grad, weights, size);
  // Gradients of scores sum to zero: measured from the mean cosine they cancel less.
  Vec<T> weighted(T(0));
  for (int64_t i = 0; i < size; i += N) {
    weighted = fma(load(weights + i), load(dots + i) * inverse_norm(load(norms + i)), weighted);
  }
  const T middle = reduce_sum(weighted) * key_inverse;
  Vec<T> d_strength(T(0));
  for (int64_t i = 0; i < size; i += N) {
    const Vec<T> inverse = inverse_norm(load(norms + i));
    const Vec<T> cosine = load(dots + i) * inverse * key_inverse;
    const Vec<T> d_score = load(weights + i) * (load(grad + i) - mean);
    d_strength = fma(d_score, cosine - middle, d_strength);
    const Vec<T> d_cosine = d_score * strength;
    store(own + i, fma(d_cosine * cosine, inverse * inverse, load(own + i)));
    store(grad + i, d_cosine * inverse * key_inverse);
  }
  return reduce_sum(d_strength);
}

// Takes out of a key's gradient the part along the key, which its norm cancels. The part is measured on the sum itself, so
// that what cancels exactly in theory does so here up to the sum's own rounding.
template <class T>
MK_INLINE void project_key(T* d_key, const T* key, int64_t width, T key_square) {
  Vec<T> sum(T(0));
  for_each_vec<T>(width, [&](int64_t k, auto part) {
    sum = fma(load_part(d_key + k, part), load_part(key + k, part), sum);
  });
  const T inverse = inverse_norm(key_square);
  const T share = -reduce_sum(sum) * inverse * inverse;
  for_each_vec<T>(width, [&](int64_t k, auto part) {
    store_part(d_key + k, fma(load_part(key + k, part), Vec<T>(share), load_part(d_key + k, part)), part);
  });
}

// 1 - prod_h (1 - w_h), and prod_r (1 - f_r w_r).
template <class T>
MK_INLINE Vec<T> written_at(const T* write, int64_t heads, int64_t stride, int64_t i) {
  Vec<T> total = load(write + i);
  for (int64_t h = 1; h < heads; ++h) total = fma(load(write + h * stride + i), T(1) - total, total);
  return total;
}
template <class T>
MK_INLINE Vec<T> retention_at(const T* read, const T* free_gates, int64_t heads, int64_t stride, int64_t i) {
  Vec<T> total = T(1) - load(read + i) * free_gates[0];
  for (int64_t r = 1; r < heads; ++r) total = total * (T(1) - load(read + r * stride + i) * free_gates[r]);
  return total;
}

template <class T>
MK_INLINE Vec<T> clamp_unit(Vec<T> x) {
  return min_nan(max_nan(x, Vec<T>(T(0))), Vec<T>(T(1)));
}

// Gradient of usage = clamp((u + w - u w) psi, 0, 1): d_usage becomes that of u (in place), d_psi grows, and d_write gets
// each head's share unless it is null.
template <class T>
MK_INLINE void usage_backward_slots(T* d_usage, const T* usage, const T* write, int64_t write_heads, const T* retention,
                                    int64_t n, T* d_retention, T* d_write) {
  constexpr int N = Vec<T>::N;
  const int64_t size = padded<T>(n);
  for (int64_t i = 0; i < size; i += N) {
    const Vec<T> u = load(usage + i), w = written_at(write, write_heads, size, i), psi = load(retention + i);
    const Vec<T> used = fma(w, T(1) - u, u), raw = used * psi;
    const Vec<T> grad = select((raw >= T(0)) & (raw <= T(1)), load(d_usage + i), Vec<T>(T(0)));
    store(d_retention + i, within(fma(grad, used, load(d_retention + i)), n - i));
    const Vec<T> d_used = grad * psi;
    store(d_usage + i, d_used * (T(1) - w));
    if (d_write == nullptr) continue;
    const Vec<T> d_written = within(d_used * (T(1) - u), n - i);
    for (int64_t h = 0; h < write_heads; ++h) {
      Vec<T> others = d_written;
      for (int64_t g = 0; g < write_heads; ++g) {
        if (g != h) others = others * (T(1) - load(write + g * size + i));
      }
      store(d_write + h * size + i, load(d_write + h * size + i) + others);
    }
  }
}

// Gradient of prod_r (1 - f_r w_r): d_read grows; d_free[r] is set.
template <class T>
MK_INLINE void retention_backward(const T* d_retention, const T* read, const T* free_gates, int64_t heads, int64_t n,
                                  T* d_read, T* d_free) {
  constexpr int N = Vec<T>::N;
  const int64_t size = padded<T>(n);
  for (int64_t r = 0; r < heads; ++r) {
    Vec<T> sum(T(0));
    for (int64_t i = 0; i < size; i += N) {
      Vec<T> grad = load(d_retention + i);
      for (int64_t q = 0; q < heads; ++q) {
        if (q != r) grad = grad * (T(1) - load(read + q * size + i) * free_gates[q]);
      }
      sum = fma(grad, load(read + r * size + i), sum);
      store(d_read + r * size + i, load(d_read + r * size + i) - grad * free_gates[r]);
    }
    d_free[r] = -reduce_sum(sum);
  }
}

// counts += a > b, element-wise.
template <class T>
MK_INLINE void count_greater(typename Vec<T>::int_raw& counts, Vec<T> a, Vec<T> b) {
#if MK_X86 && MK_VEC == 512
  // The compiler would expand the comparison's mask to a vector first.
  const __m512i one = sizeof(T) == 4 ? _mm512_set1_epi32(1) : _mm512_set1_epi64(1);
  if constexpr (sizeof(T) == 4) {
    counts = (typename Vec<T>::int_raw)_mm512_mask_add_epi32(
        (__m512i)counts, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), (__m512i)counts, one);
  } else {
    counts = (typename Vec<T>::int_raw)_mm512_mask_add_epi64(
        (__m512i)counts, _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ), (__m512i)counts, one);
  }
#else
  counts -= (a > b).m;
#endif
}

// The order in which allocation fills the slots, without sorting: a slot's rank is the number of slots before it, by
// usage and then by index. Past kRanked slots, where n^2 comparisons lose, a stable sort.
template <class T>
class Order {
 public:
  static constexpr int64_t kRanked = 1024;

  explicit Order(int64_t n) : n_(n), keys_(padded<T>(n)), order_(padded<T>(n)) {}

  // Fills the order of these usages and, in that order, the products of all earlier ones.
  void fill(const T* usage, T* before) {
    constexpr int N = Vec<T>::N;
    bool bad = false;
    for (int64_t i = 0; i < padded<T>(n_); i += N) {
      Vec<T> key = load(usage + i) * Eps<T>::kKept;
      // Two roundings, as everywhere: fused, near ties would fall differently.
      asm("" : "+x"(key.v));
      key = key + Eps<T>::kUsage;
      bad = bad || any(is_nan(within(key, n_ - i)));
      store(keys_.get() + i, key);
    }
    for (int64_t i = n_; i < padded<T>(n_); ++i) keys_[i] = std::numeric_limits<T>::infinity();
    if (bad || n_ > kRanked) {
      sort();
    } else {
      rank();
    }
    T product = T(1);
    for (int64_t k = 0; k < n_; ++k) {
      const int32_t i = order_[k];
      before[i] = product;
      product *= keys_[i];
      // Subnormal products are slow and mean nothing.
      if (product < std::numeric_limits<T>::min()) product = T(0);
    }
  }

  int32_t operator[](int64_t k) const { return order_[k]; }
  T key(int64_t i) const { return keys_[i]; }

 private:
  void rank() {
    constexpr int N = Vec<T>::N;
    using V = typename Vec<T>::int_raw;
    const T* keys = keys_.get();
    for (int64_t i = 0; i < n_; i += N) {
      const Vec<T> own = load(keys + i);
      // Two sums each, so that one addition need not wait for the other. Before the own block ties count: nothing is
      // greater than what is not greater.
      V not_before[2]{}, after[2]{}, near{};
      for (int64_t j = 0; j < i; j += 2) {
        count_greater<T>(not_before[0], Vec<T>(keys[j]), own);
        count_greater<T>(not_before[1], Vec<T>(keys[j + 1]), own);
      }
      for (int64_t j = i; j < std::min(i + N, n_); ++j) {
        const Vec<T> other(keys[j]);
        near -= ((own > other) | ((own == other) & (iota<T>() > T(j - i)))).m;
      }
      for (int64_t j = i + N; j < padded<T>(n_); j += 2) {
        count_greater<T>(after[0], own, Vec<T>(keys[j]));
        count_greater<T>(after[1], own, Vec<T>(keys[j + 1]));
      }
      const V ranks = typename Element<T>::integer(i) - not_before[0] - not_before[1] + near + after[0] + after[1];
      for (int64_t a = 0; a < std::min<int64_t>(N, n_ - i); ++a) order_[ranks[a]] = static_cast<int32_t>(i + a);
    }
  }

  void sort() {
    for (int64_t i = 0; i < n_; ++i) order_[i] = static_cast<int32_t>(i);
    const T* keys = keys_.get();
    // NaN stands behind everything.
    std::stable_sort(order_.get(), order_.get() + n_, [keys](int32_t a, int32_t b) {
      return keys[a] < keys[b] || (keys[a] == keys[a] && keys[b] != keys[b]);
    });
  }

  int64_t n_;
  Scratch<T> keys_;
  Scratch<int32_t> order_;
};

// Allocation weights from usage; `before` keeps the products of the less used slots for backward.
template <class T>
MK_INLINE void allocate_slots(Order<T>& order, const T* usage, int64_t n, T* before, T* weights) {
  order.fill(usage, before);
  for (int64_t i = 0; i < padded<T>(n); i += Vec<T>::N) {
    store(weights + i, within((T(1) - load(usage + i)) * Eps<T>::kKept * load(before + i), n - i));
  }
}

// d_usage grows by the gradient of the allocation; order and before are those of the forward.
template <class T>
MK_INLINE void allocate_backward(const Order<T>& order, const T* usage, const T* before, const T* grad, int64_t n,
                                 T* d_usage) {
  // What later slots make of a factor this slot puts into their product; no division anywhere.
  T later = T(0);
  for (int64_t k = n - 1; k >= 0; --k) {
    const int32_t i = order[k];
    d_usage[i] += Eps<T>::kKept * before[i] * (later - grad[i]);
    later = grad[i] * Eps<T>::kKept * (T(1) - usage[i]) + order.key(i) * later;
  }
}

// w^gamma / sum w^gamma; weights below the smallest normal number count as zero.
template <class T>
MK_INLINE void sharpen_slots(const T* weights, T gamma, int64_t n, T* out) {
  constexpr int N = Vec<T>::N;
  const T kTiny = std::numeric_limits<T>::min(), kLow = -std::numeric_limits<T>::infinity();
  const int64_t size = padded<T>(n);
  Vec<T> best(kLow);
  Mask<T> bad = is_nan(Vec<T>(T(0)));
  for (int64_t i = 0; i < size; i += N) {
    const Vec<T> w = load(weights + i);
    const Vec<T> logarithm = select(w >= kTiny, log(w), Vec<T>(kLow));
    bad = bad | is_nan(w);
    best = max_nan(logarithm, best);
    store(out + i, logarithm);
  }
  const T top = any(bad) ? std::numeric_limits<T>::quiet_NaN() : reduce_max(best);
  if (top == kLow) {
    std::memset(out, 0, static_cast<size_t>(size) * sizeof(T));
    return;
  }
  Vec<T> sum(T(0));
  for (int64_t i = 0; i < size; i += N) {
    // The difference first: what gamma multiplies is small where it counts, and so is its rounding.
    const Vec<T> e = within(exp((load(out + i) - top) * gamma), n - i);
    store(out + i, e);
    sum += e;
  }
  const T scale = T(1) / reduce_sum(sum);
  for (int64_t i = 0; i < size; i += N) store(out + i, load(out + i) * scale);
}

// Gradient of the weights in place of that of the sharpened ones; returns that of gamma.
template <class T>
MK_INLINE T sharpen_backward_slots(T* grad, const T* weights, const T* sharpened, T gamma, int64_t n) {
  constexpr int N = Vec<T>::N;
  const T kTiny = std::numeric_limits<T>::min();
  const int64_t size = padded<T>(n);
  const T mean = dot(grad, sharpened, size);
  // Gradients of the logits sum to zero: measured from the mean logarithm they cancel less.
  Vec<T> weighted(T(0));
  for (int64_t i = 0; i < size; i += N) {
    const Vec<T> w = load(weights + i);
    weighted = fma(load(sharpened + i), log(select(w >= kTiny, w, Vec<T>(T(1)))), weighted);
  }
  const T middle = reduce_sum(weighted);
  Vec<T> d_gamma(T(0));
  for (int64_t i = 0; i < size; i += N) {
    const Vec<T> w = load(weights + i);
    const Mask<T> counts = w >= kTiny;
    const Vec<T> d_logit = load(sharpened + i) * (load(grad + i) - mean);
    const Vec<T> safe = select(counts, w, Vec<T>(T(1)));
    d_gamma = fma(d_logit, log(safe) - middle, d_gamma);
    store(grad + i, select(counts, d_logit * gamma / safe, Vec<T>(T(0))));
  }
  return reduce_sum(d_gamma);
}

}  // namespace memkern::cpu::MK_NS
