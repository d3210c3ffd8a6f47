// Attention over own pairs that lie one behind the other, in rows of whole vectors. Include after rows.h.
//
// Every key and every value is read once, so that nothing counts but how many lines of memory are on their way at any
// time. A core that reads one place after the other reaches half of its bandwidth, and waits through every softmax. So
// two queries from far apart are worked on together, and the values of each are mixed while the keys of the query behind
// it are multiplied: four rising streams that never pause, each fetched a little ahead into the second-level cache.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

constexpr int kLanes = 2;
constexpr int64_t kDensePairs = 256;   // at most so many of a query
constexpr int64_t kGroupBytes = 1024;  // of one stream before the next has its turn
constexpr int64_t kAheadBytes = 1024;  // between the row that is read and the one that is fetched meanwhile
constexpr int64_t kPauseBytes = 512;   // of each stream, fetched in addition while a softmax is taken

template <class T>
MK_INLINE void fetch_row(const T* row, int64_t width) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < width * int64_t(sizeof(T)); i += 64) prefetch_far(reinterpret_cast<const char*>(row) + i);
}

// What lies ahead of a row. The loops over rows stay loops: the processor's own prefetcher follows each load instruction
// by itself, and sees one long stream of each of these; unrolled, the same rows take a tenth longer.
template <class T, int V>
MK_INLINE void fetch_ahead(const T* row) {
  fetch_row(row + kAheadBytes / int64_t(sizeof(T)), V * Vec<acc_t<T>>::N);
}

template <class T, int V>
MK_INLINE void score_group(const T* row, int count, const Vec<acc_t<T>> (&query)[V], acc_t<T>* score) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
#pragma GCC unroll 1
  for (int r = 0; r < count; ++r, row += V * N) {
    fetch_ahead<T, V>(row);
    Vec<A> s = load(row) * query[0];
#pragma GCC unroll 8
    for (int v = 1; v < V; ++v) s = fma(load(row + v * N), query[v], s);
    score[r] = reduce_sum(s);
  }
}

template <class T, int V>
MK_INLINE void mix_group(const T* row, int count, const acc_t<T>* weight, Vec<acc_t<T>> (&sum)[V]) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
#pragma GCC unroll 1
  for (int r = 0; r < count; ++r, row += V * N) {
    fetch_ahead<T, V>(row);
    const Vec<A> w(weight[r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] = fma(load(row + v * N), w, sum[v]);
  }
}

// The queries [begin, end), two at least.
template <class T, int V>
__attribute__((noinline)) void dense_forward_of(const RetrievedAttention& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N, kWidth = V * N;
  constexpr int kGroup = int(std::max<int64_t>(2, kGroupBytes / (kWidth * int64_t(sizeof(T)))));
  const int64_t pairs = p.pairs, size = pairs * kWidth;
  const int64_t first[kLanes] = {begin, begin + (end - begin + 1) / 2};
  const int64_t count[kLanes] = {first[1] - begin, end - first[1]};
  alignas(64) A weights[2][kLanes][kDensePairs];
  A best[kLanes] = {}, mass[kLanes] = {};
  std::memset(weights, 0, sizeof(weights));
  for (int64_t s = 0; s <= count[0]; ++s) {
    Vec<A> query[kLanes][V], sum[kLanes][V];
    const T *keys[kLanes], *values[kLanes];
    int64_t done[kLanes];
    A(&weight)[kLanes][kDensePairs] = weights[s % 2];
    A(&old)[kLanes][kDensePairs] = weights[1 - s % 2];
#pragma GCC unroll 2
    for (int l = 0; l < kLanes; ++l) {
      // A lane at its end repeats a query.
      const int64_t row = first[l] + std::min(s, count[l] - 1);
      done[l] = first[l] + std::max<int64_t>(s - 1, 0);
      keys[l] = static_cast<const T*>(p.keys) + row * size;
      values[l] = static_cast<const T*>(p.values) + std::min(done[l], end - 1) * size;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        query[l][v] = load(static_cast<const T*>(p.queries) + row * kWidth + v * N) * A(p.scale);
        sum[l][v] = Vec<A>(A(0));
      }
    }
    for (int64_t i = 0; i < pairs; i += kGroup) {
      const int rows = int(std::min<int64_t>(kGroup, pairs - i));
#pragma GCC unroll 2
      for (int l = 0; l < kLanes; ++l) score_group<T, V>(keys[l] + i * kWidth, rows, query[l], weight[l] + i);
#pragma GCC unroll 2
      for (int l = 0; l < kLanes; ++l) mix_group<T, V>(values[l] + i * kWidth, rows, old[l] + i, sum[l]);
    }
    for (int l = 0; l < kLanes; ++l) {
      for (int64_t byte = kAheadBytes; byte < kAheadBytes + kPauseBytes; byte += 64) {
        prefetch_far(reinterpret_cast<const char*>(keys[l] + size) + byte);
        prefetch_far(reinterpret_cast<const char*>(values[l] + size) + byte);
      }
    }
#pragma GCC unroll 2
    for (int l = 0; l < kLanes; ++l) {
      if (s > 0 && s <= count[l]) {
        const A inverse = 1 / mass[l];
        T* out = static_cast<T*>(p.out) + done[l] * kWidth;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(out + v * N, sum[l][v] * inverse);
        static_cast<A*>(p.lse)[done[l]] = best[l] + log(Vec<A>(mass[l]))[0];
      }
      best[l] = largest_inline(weight[l], pairs);
      mass[l] = exponentials_inline(weight[l], pairs, best[l]);
    }
  }
}

bool consecutive(const RetrievedAttention& p, const PairStrides& s) {
  const int64_t query = p.pairs * p.width, head = p.count * query, batch = p.heads * head;
  return s.c == p.width && (s.t == query || p.count == 1) && (s.a == head || p.heads == 1) &&
         (s.b == batch || p.batch == 1);
}

// False where the pairs are not of this form, and nothing was done.
template <class T>
bool dense_forward(const RetrievedAttention& p) {
  constexpr int N = Vec<acc_t<T>>::N;
  void (*of)(const RetrievedAttention&, int64_t, int64_t) = p.width == 2 * N   ? dense_forward_of<T, 2>
                                                            : p.width == 4 * N ? dense_forward_of<T, 4>
                                                            : p.width == 6 * N ? dense_forward_of<T, 6>
                                                            : p.width == 8 * N ? dense_forward_of<T, 8>
                                                                               : nullptr;
  const int64_t rows = p.batch * p.heads * p.count;
  if (of == nullptr || p.mask != nullptr || p.query_dtype != p.dtype || p.pairs == 0 || p.pairs > kDensePairs ||
      rows < kLanes || !consecutive(p, p.key_strides) || !consecutive(p, p.value_strides)) {
    return false;
  }
  // By twos, so that no thread is left with a single query; the last may take three.
  parallel(p.threads, rows / kLanes, 1 + 8192 / (1 + p.pairs * p.width), [&](int64_t begin, int64_t end) {
    of(p, kLanes * begin, end == rows / kLanes ? rows : kLanes * end);
  });
  return true;
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
