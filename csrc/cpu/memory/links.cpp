// The passes over the link matrix.
//
// A tile is kLinkRows rows by one vector of columns. Sums along the rows (forward reads, gradients by row) stay in
// registers, sums along the columns (backward reads, gradients by column) in arrays in the first cache.
#include "cpu/isa.h"
#include "common/vec.h"
#include "cpu/memory/links.h"

namespace memkern::cpu::MK_NS {

namespace {

constexpr int kReads = 4;                         // read heads in one pass; more take further passes
constexpr int kLinkRows = MK_VEC == 512 ? 4 : 2;  // divides every vector's length: a tile meets one diagonal vector

constexpr int kAhead = 8;                        // rows between a tile and what it prefetches

// How many of the remaining heads the next pass takes: 4, 2 or 1.
int64_t pass_heads(int64_t left) { return left >= kReads ? kReads : left >= 2 ? 2 : left; }

// Past the caches where `streamed`: the rows are then aligned and whole vectors.
template <class T, class Part>
MK_INLINE void put(T* to, Vec<T> x, Part part, bool streamed) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Part, std::integral_constant<int, Vec<T>::N>>) {
    if (streamed) {
      stream(to, x);
      return;
    }
  }
  store_part(to, x, part);
}

// Sets out[r][i + a] to the sum over the lanes of acc[a][r].
template <class T, int ROWS, int R>
MK_INLINE void store_row_sums(Vec<T> (&acc)[ROWS][R], T* out, int64_t stride, int64_t i) {
  if constexpr (ROWS * R == Vec<T>::N) {
    Vec<T> all[Vec<T>::N];
    for (int a = 0; a < ROWS; ++a) {
      for (int r = 0; r < R; ++r) all[r * ROWS + a] = acc[a][r];
    }
    T sums[Vec<T>::N];
    store(sums, transposed_sum<T>(all));
    for (int r = 0; r < R; ++r) std::memcpy(out + r * stride + i, sums + r * ROWS, sizeof(T) * ROWS);
  } else {
    for (int a = 0; a < ROWS; ++a) {
      for (int r = 0; r < R; ++r) out[r * stride + i + a] = reduce_sum(acc[a][r]);
    }
  }
}

template <class T, int ROWS, int R, bool UPDATE>
MK_INLINE void link_rows(const LinkPass<T>& p, int64_t i) {
  constexpr int N = Vec<T>::N;
  const int64_t n = p.n, stride = padded<T>(n);
  Vec<T> acc[ROWS][R > 0 ? R : 1];
  for (int a = 0; a < ROWS; ++a) {
    for (int r = 0; r < R; ++r) acc[a][r] = Vec<T>(T(0));
  }
  auto columns = [&](int64_t j, auto part, auto diagonal) MK_LAMBDA_INLINE {
    const Vec<T> wj = UPDATE ? load(p.write + j) : Vec<T>(T(0)), pj = UPDATE ? load(p.precedence + j) : Vec<T>(T(0));
    Vec<T> l[ROWS];
#pragma GCC unroll 4
    for (int a = 0; a < ROWS; ++a) {
      l[a] = load_part(p.from + (i + a) * n + j, part);
      // The next rows lie on another page, where no hardware prefetcher follows.
      prefetch(p.from + (i + kAhead + a) * n + j);
      if constexpr (UPDATE) {
        const T wi = p.write[i + a];
        l[a] = fma(max(Vec<T>(T(0)), (T(1) - wi) - wj), l[a], wi * pj);
        if constexpr (decltype(diagonal)::value) {
          l[a] = select(iota<T>() == T(i + a - j), Vec<T>(T(0)), l[a]);
        }
        put(p.to + (i + a) * n + j, l[a], part, p.stream);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> rj = load(p.reads + r * stride + j);
      Vec<T> bj = load(p.back + r * stride + j);
#pragma GCC unroll 4
      for (int a = 0; a < ROWS; ++a) {
        acc[a][r] = fma(l[a], rj, acc[a][r]);
        bj = fma(l[a], Vec<T>(p.reads[r * stride + i + a]), bj);
      }
      store(p.back + r * stride + j, bj);
    }
  };
  using Full = std::integral_constant<int, N>;
  const int64_t crossing = i / N * N;
  int64_t j = 0;
  for (; j < crossing; j += N) columns(j, Full{}, std::false_type{});
  if (j + N <= n) {
    columns(j, Full{}, std::true_type{});
    for (j += N; j + N <= n; j += N) columns(j, Full{}, std::false_type{});
    if (j < n) columns(j, static_cast<int>(n - j), std::false_type{});
  } else {
    columns(j, static_cast<int>(n - j), std::true_type{});
  }
  if constexpr (R > 0) store_row_sums<T, ROWS, R>(acc, p.ahead, stride, i);
}

template <class T, int R, bool UPDATE>
void link_pass(const LinkPass<T>& p) {
  int64_t i = 0;
  for (; i + kLinkRows <= p.n; i += kLinkRows) link_rows<T, kLinkRows, R, UPDATE>(p, i);
  for (; i < p.n; ++i) link_rows<T, 1, R, UPDATE>(p, i);
}

}  // namespace

template <class T>
void links_forward_reads(LinkPass<T> p, int64_t heads) {
  const int64_t stride = padded<T>(p.n);
  auto run = [&](int64_t count, auto update) {
    constexpr bool kUpdate = decltype(update)::value;
    switch (count) {
      case 1: return link_pass<T, 1, kUpdate>(p);
      case 2: return link_pass<T, 2, kUpdate>(p);
      default: return link_pass<T, kReads, kUpdate>(p);
    }
  };
  for (int64_t left = heads; left > 0;) {
    const int64_t count = pass_heads(left);
    if (p.to != nullptr) {
      run(count, std::true_type{});
      p.from = p.to;
      p.to = nullptr;
    } else {
      run(count, std::false_type{});
    }
    p.reads += count * stride;
    p.ahead += count * stride;
    p.back += count * stride;
    left -= count;
  }
  if (p.stream) stream_fence();
}

template <class T>
void links_update(const T* from, T* to, const T* write, const T* precedence, int64_t n) {
  LinkPass<T> p{};
  p.n = n;
  p.from = from;
  p.to = to;
  p.write = write;
  p.precedence = precedence;
  link_pass<T, 0, true>(p);
}

namespace {

// R read heads; FINISH goes back through the update, otherwise d_links keeps the gradient of the links after the step.
template <class T, int ROWS, int R, bool FINISH>
MK_INLINE void link_rows_backward(const LinkBackward<T>& p, int64_t i) {
  constexpr int N = Vec<T>::N;
  const int64_t n = p.n, stride = padded<T>(n);
  Vec<T> acc[ROWS][R], row[ROWS];
  for (int a = 0; a < ROWS; ++a) {
    row[a] = Vec<T>(T(0));
    for (int r = 0; r < R; ++r) acc[a][r] = Vec<T>(T(0));
  }
  auto columns = [&](int64_t j, auto part, auto diagonal) MK_LAMBDA_INLINE {
    const Vec<T> wj = load(p.write + j), pj = load(p.precedence + j);
    Vec<T> old[ROWS], l[ROWS], d[ROWS], kept[ROWS];
#pragma GCC unroll 4
    for (int a = 0; a < ROWS; ++a) {
      old[a] = load_part(p.links + (i + a) * n + j, part);
      prefetch(p.links + (i + kAhead + a) * n + j);
      if (p.grad != nullptr) prefetch(p.grad + (i + kAhead + a) * n + j);
      const T wi = p.write[i + a];
      kept[a] = (T(1) - wi) - wj;
      l[a] = fma(max(Vec<T>(T(0)), kept[a]), old[a], wi * pj);
      if constexpr (decltype(diagonal)::value) {
        l[a] = select(iota<T>() == T(i + a - j), Vec<T>(T(0)), l[a]);
      }
      d[a] = p.grad != nullptr ? load_part(p.grad + (i + a) * n + j, part) : Vec<T>(T(0));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> rj = load(p.reads + r * stride + j), gj = load(p.d_reads + r * stride + j);
      const Vec<T> bj = load(p.grad_back + r * stride + j);
      Vec<T> sum = load(p.back + r * stride + j);
#pragma GCC unroll 4
      for (int a = 0; a < ROWS; ++a) {
        d[a] = fma(rj, Vec<T>(p.grad_ahead[r * stride + i + a]), d[a]);
        d[a] = fma(bj, Vec<T>(p.reads[r * stride + i + a]), d[a]);
        acc[a][r] = fma(l[a], gj, acc[a][r]);
        sum = fma(l[a], Vec<T>(p.d_reads[r * stride + i + a]), sum);
      }
      store(p.back + r * stride + j, sum);
    }
    if constexpr (FINISH) {
      Vec<T> column = load(p.column + j), d_precedence = load(p.d_precedence + j);
#pragma GCC unroll 4
      for (int a = 0; a < ROWS; ++a) {
        if constexpr (decltype(diagonal)::value) {
          d[a] = select(iota<T>() == T(i + a - j), Vec<T>(T(0)), d[a]);
        }
        // The clamp of the factor at zero passes the gradient where it does not bind.
        const Vec<T> passed = select(kept[a] >= T(0), old[a], Vec<T>(T(0)));
        row[a] = fma(d[a], pj - passed, row[a]);
        column = fma(-d[a], passed, column);
        d_precedence = fma(d[a], Vec<T>(p.write[i + a]), d_precedence);
        d[a] = d[a] * max(Vec<T>(T(0)), kept[a]);
      }
      store(p.column + j, column);
      store(p.d_precedence + j, d_precedence);
    }
#pragma GCC unroll 4
    for (int a = 0; a < ROWS; ++a) put(p.d_links + (i + a) * n + j, d[a], part, FINISH && p.stream);
  };
  using Full = std::integral_constant<int, N>;
  const int64_t crossing = i / N * N;
  int64_t j = 0;
  for (; j < crossing; j += N) columns(j, Full{}, std::false_type{});
  if (j + N <= n) {
    columns(j, Full{}, std::true_type{});
    for (j += N; j + N <= n; j += N) columns(j, Full{}, std::false_type{});
    if (j < n) columns(j, static_cast<int>(n - j), std::false_type{});
  } else {
    columns(j, static_cast<int>(n - j), std::true_type{});
  }
  store_row_sums<T, ROWS, R>(acc, p.ahead, stride, i);
  if constexpr (FINISH) {
    for (int a = 0; a < ROWS; ++a) p.row[i + a] = reduce_sum(row[a]);
  }
}

template <class T, int R, bool FINISH>
void link_pass_backward(const LinkBackward<T>& p) {
  int64_t i = 0;
  for (; i + kLinkRows <= p.n; i += kLinkRows) link_rows_backward<T, kLinkRows, R, FINISH>(p, i);
  for (; i < p.n; ++i) link_rows_backward<T, 1, R, FINISH>(p, i);
}

}  // namespace

template <class T>
void links_backward_reads(LinkBackward<T> p, int64_t heads) {
  const int64_t stride = padded<T>(p.n);
  for (int64_t left = heads; left > 0;) {
    const int64_t count = pass_heads(left);
    left -= count;
    auto run = [&](auto finish) {
      constexpr bool kFinish = decltype(finish)::value;
      switch (count) {
        case 1: return link_pass_backward<T, 1, kFinish>(p);
        case 2: return link_pass_backward<T, 2, kFinish>(p);
        default: return link_pass_backward<T, kReads, kFinish>(p);
      }
    };
    left == 0 ? run(std::true_type{}) : run(std::false_type{});
    p.grad = p.d_links;
    p.reads += count * stride;
    p.d_reads += count * stride;
    p.grad_ahead += count * stride;
    p.grad_back += count * stride;
    p.ahead += count * stride;
    p.back += count * stride;
  }
  if (p.stream) stream_fence();
}

template void links_forward_reads<float>(LinkPass<float>, int64_t);
template void links_forward_reads<double>(LinkPass<double>, int64_t);
template void links_update<float>(const float*, float*, const float*, const float*, int64_t);
template void links_update<double>(const double*, double*, const double*, const double*, int64_t);
template void links_backward_reads<float>(LinkBackward<float>, int64_t);
template void links_backward_reads<double>(LinkBackward<double>, int64_t);

}  // namespace memkern::cpu::MK_NS
