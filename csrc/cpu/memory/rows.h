// Products between the rows of a matrix (slots, or links) and a few vectors, each in one pass over the matrix.
//
// Vectors over the slots live in scratch with `padded` elements, zero behind the last slot, so that loops over them need
// no tail. Every slot goes through the same instructions wherever it lies: equal rows give equal bits, and ties stay ties.
#pragma once

#define MK_LAMBDA_INLINE __attribute__((always_inline))

namespace memkern::cpu::MK_NS {

//
// The number of vectors is odd: with an even one, and 256 slots above all, vectors of several heads would fall on the same
// sets of the first cache as the rows of the matrices do, and drive each other out.
template <class T>
MK_INLINE int64_t padded(int64_t n) {
  constexpr int64_t N = Vec<T>::N;
  return ((n + N - 1) / N | 1) * N;
}

// x where the element's place is below n, zero behind.
template <class T>
MK_INLINE Vec<T> within(Vec<T> x, int64_t left) {
  return left >= Vec<T>::N ? x : select(iota<T>() < T(left), x, Vec<T>(T(0)));
}

// Copies n elements and zeros up to the padding.
template <class T>
MK_INLINE void load_slots(const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < padded<T>(n); i += Vec<T>::N) {
    store(to + i, n - i >= Vec<T>::N ? load(from + i) : load_n(from + i, std::max<int64_t>(n - i, 0)));
  }
}

template <class T>
MK_INLINE void store_slots(const T* from, int64_t n, T* to) {
  for_each_vec<T>(n, [&](int64_t i, auto count) { store_part(to + i, load(from + i), count); });
}

template <class T>
MK_INLINE T dot(const T* a, const T* b, int64_t size) {
  Vec<T> sum(T(0));
  for (int64_t i = 0; i < size; i += Vec<T>::N) sum = fma(load(a + i), load(b + i), sum);
  return reduce_sum(sum);
}

template <class T>
MK_INLINE T sum_of(const T* a, int64_t size) {
  Vec<T> sum(T(0));
  for (int64_t i = 0; i < size; i += Vec<T>::N) sum += load(a + i);
  return reduce_sum(sum);
}

template <class T>
MK_INLINE T square_sum(const T* a, int64_t width) {
  Vec<T> sum(T(0));
  for_each_vec<T>(width, [&](int64_t k, auto count) {
    const Vec<T> x = load_part(a + k, count);
    sum = fma(x, x, sum);
  });
  return reduce_sum(sum);
}

// One vector whose element i is the sum of v[i]: log2(N) rounds of pairwise shuffles instead of N reductions.
template <class T>
MK_INLINE Vec<T> transposed_sum(Vec<T> (&v)[Vec<T>::N]) {
  constexpr int N = Vec<T>::N;
  using V = typename Vec<T>::int_raw;
  int count = N;
#pragma GCC unroll 5
  for (int half = N / 2; half >= 1; half /= 2) {
    // Blocks of 2 half elements hold partial sums of one source; after this round, blocks of half elements do.
    V low{}, high{};
    for (int i = 0; i < N; ++i) {
      const int block = i / half, within = i % half;
      const int from = (block / 2) * 2 * half + within + (block % 2) * N;
      low[i] = from;
      high[i] = from + half;
    }
    count /= 2;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const auto a = v[i].v, b = v[i + count].v;
      v[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
  }
  return v[0];
}

// out[c][i] = <row i, x_c> for c < count, and norms[i] = <row i, row i> where norms is given; out has stride `padded`.
// Rows are width apart; x holds count rows of width.
template <class T>
MK_INLINE void row_dots(const T* rows, int64_t n, int64_t width, const T* x, int64_t count, T* out, T* norms) {
  constexpr int N = Vec<T>::N;
  const int64_t stride = padded<T>(n);
  for (int64_t i = 0; i < n; i += N) {
    const T* at[N];
    for (int a = 0; a < N; ++a) at[a] = rows + std::min(i + a, n - 1) * width;
    // Each pass below jumps from row to row, which no hardware prefetcher follows into the next block.
    const char* next = reinterpret_cast<const char*>(rows + (i + N) * width);
    for (int64_t line = 0; line < std::min<int64_t>(N, n - i - N) * width * int64_t(sizeof(T)); line += 64) {
      prefetch(next + line);
    }
    for (int64_t c = norms == nullptr ? 0 : -1; c < count; ++c) {
      Vec<T> sums[N];
      for (int a = 0; a < N; ++a) sums[a] = Vec<T>(T(0));
      if (c < 0) {
        for_each_vec<T>(width, [&](int64_t k, auto part) {
#pragma GCC unroll 16
          for (int a = 0; a < N; ++a) {
            const Vec<T> row = load_part(at[a] + k, part);
            sums[a] = fma(row, row, sums[a]);
          }
        });
        store(norms + i, within(transposed_sum<T>(sums), n - i));
      } else {
        const T* vector = x + c * width;
        for_each_vec<T>(width, [&](int64_t k, auto part) {
          const Vec<T> y = load_part(vector + k, part);
#pragma GCC unroll 16
          for (int a = 0; a < N; ++a) sums[a] = fma(load_part(at[a] + k, part), y, sums[a]);
        });
        store(out + c * stride + i, within(transposed_sum<T>(sums), n - i));
      }
    }
  }
}

// out[c][k] = sum_i weights[c][i] rows[i][k]; weights have stride `padded`.
template <class T, int C>
MK_INLINE void weighted_rows_block(const T* weights, int64_t stride, const T* rows, int64_t n, int64_t width, T* out) {
  constexpr int N = Vec<T>::N;
  constexpr int K = MK_VEC == 512 ? 4 : 2;
  int64_t k = 0;
  for (; k + K * N <= width; k += K * N) {
    Vec<T> sums[C][K];
    for (int c = 0; c < C; ++c) {
      for (int v = 0; v < K; ++v) sums[c][v] = Vec<T>(T(0));
    }
    for (int64_t i = 0; i < n; ++i) {
      const T* row = rows + i * width + k;
      for (int v = 0; v < K; ++v) {
        const Vec<T> x = load(row + v * N);
        for (int c = 0; c < C; ++c) sums[c][v] = fma(x, Vec<T>(weights[c * stride + i]), sums[c][v]);
      }
    }
    for (int c = 0; c < C; ++c) {
      for (int v = 0; v < K; ++v) store(out + c * width + k + v * N, sums[c][v]);
    }
  }
  for (; k < width; k += N) {
    const int64_t left = std::min<int64_t>(N, width - k);
    Vec<T> sums[C];
    for (int c = 0; c < C; ++c) sums[c] = Vec<T>(T(0));
    for (int64_t i = 0; i < n; ++i) {
      const Vec<T> x = load_n(rows + i * width + k, left);
      for (int c = 0; c < C; ++c) sums[c] = fma(x, Vec<T>(weights[c * stride + i]), sums[c]);
    }
    for (int c = 0; c < C; ++c) store_n(out + c * width + k, sums[c], left);
  }
}

template <class T>
MK_INLINE void weighted_rows(const T* weights, int64_t count, const T* rows, int64_t n, int64_t width, T* out) {
  const int64_t stride = padded<T>(n);
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    weighted_rows_block<T, 4>(weights + c * stride, stride, rows, n, width, out + c * width);
  }
  for (; c < count; ++c) {
    weighted_rows_block<T, 1>(weights + c * stride, stride, rows, n, width, out + c * width);
  }
}

// rows[i] += sum_c weights[c][i] x_c - own[i] other[i]: a rank-count update, and a multiple of another matrix's rows
// (own may be null).
template <class T>
MK_INLINE void add_outer(T* rows, int64_t n, int64_t width, const T* weights, const T* x, int64_t count, const T* own,
                         const T* other) {
  constexpr int A = 4;
  const int64_t stride = padded<T>(n);
  auto block = [&](int64_t i, auto height) {
    constexpr int kRows = decltype(height)::value;
    for_each_vec<T>(width, [&](int64_t k, auto part) {
      Vec<T> sums[kRows];
      for (int a = 0; a < kRows; ++a) {
        sums[a] = load_part(rows + (i + a) * width + k, part);
        if (own != nullptr) {
          sums[a] = fma(Vec<T>(-own[i + a]), load_part(other + (i + a) * width + k, part), sums[a]);
        }
      }
      for (int64_t c = 0; c < count; ++c) {
        const Vec<T> y = load_part(x + c * width + k, part);
        for (int a = 0; a < kRows; ++a) sums[a] = fma(y, Vec<T>(weights[c * stride + i + a]), sums[a]);
      }
      for (int a = 0; a < kRows; ++a) store_part(rows + (i + a) * width + k, sums[a], part);
    });
  };
  int64_t i = 0;
  for (; i + A <= n; i += A) block(i, std::integral_constant<int, A>{});
  for (; i < n; ++i) block(i, std::integral_constant<int, 1>{});
}

}  // namespace memkern::cpu::MK_NS
