// The scan for a few queries: lanes run along the rows, so that a row is read once, straight from memory, and nothing
// else limits the speed. Include after score.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

constexpr int kStreamRows = 4;
constexpr int64_t kStreamAhead = 1024;  // bytes between what is read and what is fetched meanwhile

template <class A>
struct StreamScan {
  const A* queries;  // of unit length, `query_stride` apart
  int64_t query_stride;
  int64_t width;
  A* dots;           // out: rows of each query, `dots_stride` apart
  int64_t dots_stride;
  A* squares;        // out: (kStreamRows)
};

// Four rows at once, each from a quarter of the database of its own: enough chains to cover the latency, and four long
// streams, which the processor fetches at nearly twice the rate of four neighbouring rows. The fetch goes to the
// second-level cache: into the first it would take the places of loads.
template <class T, int Queries>
__attribute__((noinline)) void stream_rows(const StreamScan<acc_t<T>>& s, const T* const (&rows)[kStreamRows]) {
  using A = acc_t<T>;
  Vec<A> dots[kStreamRows][Queries], squares[kStreamRows];
#pragma GCC unroll 4
  for (int r = 0; r < kStreamRows; ++r) {
    squares[r] = Vec<A>(A(0));
#pragma GCC unroll 4
    for (int q = 0; q < Queries; ++q) dots[r][q] = Vec<A>(A(0));
  }
  constexpr int N = Vec<A>::N;
  // Fetches of whole cache lines: one vector in so many.
  constexpr int kVectorsPerLine = std::max(1, 64 / (N * int(sizeof(T))));
  int64_t i = 0;
  for (; i + kVectorsPerLine * N <= s.width; i += kVectorsPerLine * N) {
#pragma GCC unroll 4
    for (int r = 0; r < kStreamRows; ++r) prefetch_far(reinterpret_cast<const char*>(rows[r] + i) + kStreamAhead);
#pragma GCC unroll 4
    for (int part = 0; part < kVectorsPerLine; ++part) {
      const int64_t at = i + part * N;
      Vec<A> x[kStreamRows];
#pragma GCC unroll 4
      for (int r = 0; r < kStreamRows; ++r) {
        x[r] = load(rows[r] + at);
        squares[r] = fma(x[r], x[r], squares[r]);
      }
#pragma GCC unroll 4
      for (int q = 0; q < Queries; ++q) {
        const Vec<A> element = load(s.queries + q * s.query_stride + at);
#pragma GCC unroll 4
        for (int r = 0; r < kStreamRows; ++r) dots[r][q] = fma(x[r], element, dots[r][q]);
      }
    }
  }
  for (; i < s.width; i += N) {
    const int64_t n = std::min<int64_t>(N, s.width - i);
#pragma GCC unroll 4
    for (int r = 0; r < kStreamRows; ++r) {
      const Vec<A> x = load_n(rows[r] + i, n);
      squares[r] = fma(x, x, squares[r]);
#pragma GCC unroll 4
      for (int q = 0; q < Queries; ++q) {
        dots[r][q] = fma(x, load_n(s.queries + q * s.query_stride + i, n), dots[r][q]);
      }
    }
  }
  static_assert(kStreamRows == 4, "reduced by fours");
  reduce_four(squares, s.squares);
  Vec<A> sums[kStreamRows];
#pragma GCC unroll 4
  for (int q = 0; q < Queries; ++q) {
#pragma GCC unroll 4
    for (int r = 0; r < kStreamRows; ++r) sums[r] = dots[r][q];
    reduce_four(sums, s.dots + q * s.dots_stride);
  }
}

template <class T>
void stream_any(int64_t queries, const StreamScan<acc_t<T>>& s, const T* const (&rows)[kStreamRows]) {
  switch (queries) {
    case 1: return stream_rows<T, 1>(s, rows);
    case 2: return stream_rows<T, 2>(s, rows);
    case 3: return stream_rows<T, 3>(s, rows);
    default: return stream_rows<T, 4>(s, rows);
  }
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
