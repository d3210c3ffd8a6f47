// The scan for a few queries: lanes run along the rows, so that a row is read once, straight from memory, and nothing
// else limits the speed. Include after score.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

constexpr int kStreamQueries = 4;
constexpr int kStreamRows = 4;

template <class A>
struct StreamScan {
  const A* queries;  // of unit length, `query_stride` apart
  int64_t query_stride;
  int64_t width;
  A* dots;     // out: (kStreamRows, queries)
  A* squares;  // out: (kStreamRows)
};

// Four rows at once: enough chains to cover the latency, and four streams that the processor fetches at a time. `ahead`:
// bytes between a row and what is fetched meanwhile.
template <class T, int Queries>
void stream_rows(const StreamScan<acc_t<T>>& s, const T* const (&rows)[kStreamRows], int64_t ahead) {
  using A = acc_t<T>;
  Vec<A> dots[kStreamRows][Queries], squares[kStreamRows];
#pragma GCC unroll 4
  for (int r = 0; r < kStreamRows; ++r) {
    squares[r] = Vec<A>(A(0));
#pragma GCC unroll 4
    for (int q = 0; q < Queries; ++q) dots[r][q] = Vec<A>(A(0));
  }
  const A* query = s.queries;
  for_each_vec<A>(s.width, [&](int64_t i, auto count) {
    Vec<A> x[kStreamRows];
#pragma GCC unroll 4
    for (int r = 0; r < kStreamRows; ++r) {
      prefetch(reinterpret_cast<const char*>(rows[r] + i) + ahead);
      x[r] = load_part(rows[r] + i, count);
      squares[r] = fma(x[r], x[r], squares[r]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Queries; ++q) {
      const Vec<A> element = load(query + q * s.query_stride + i);
#pragma GCC unroll 4
      for (int r = 0; r < kStreamRows; ++r) dots[r][q] = fma(x[r], element, dots[r][q]);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kStreamRows; ++r) {
    s.squares[r] = reduce_sum(squares[r]);
#pragma GCC unroll 4
    for (int q = 0; q < Queries; ++q) s.dots[r * Queries + q] = reduce_sum(dots[r][q]);
  }
}

template <class T>
void stream_any(int64_t queries, const StreamScan<acc_t<T>>& s, const T* const (&rows)[kStreamRows], int64_t ahead) {
  switch (queries) {
    case 1: return stream_rows<T, 1>(s, rows, ahead);
    case 2: return stream_rows<T, 2>(s, rows, ahead);
    case 3: return stream_rows<T, 3>(s, rows, ahead);
    default: return stream_rows<T, 4>(s, rows, ahead);
  }
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
