// One row's slots to one vector of D: mean, maximum or attention, each reading every slot once. Include after rows.h.
#pragma once

#include "cpu/routing/rows.h"

namespace memkern::cpu::MK_NS {

constexpr double kZeroRow = 1e-10;

// The slots of a row that take part, as pointers; reused from row to row.
template <class T>
struct Slots {
  explicit Slots(int64_t slots) : at(slots), index(slots) {}

  void collect(const RouteInput& in, int64_t row) {
    const T* first = static_cast<const T*>(in.hiddens) + row * in.row_stride;
    const uint8_t* mask = in.slot_mask == nullptr ? nullptr : in.slot_mask + row * in.slots;
    count = 0;
    all = in.slots;
    step = in.slot_stride;
    for (int64_t s = 0; s < in.slots; ++s) {
      if (mask != nullptr && !mask[s]) continue;
      at[count] = first + s * in.slot_stride;
      index[count++] = s;
    }
  }

  // Whether they lie one after another without a gap.
  bool dense(int64_t width) const { return count == all && step == width; }

  Scratch<const T*, 64> at;
  Scratch<int64_t, 64> index;
  int64_t count = 0, all = 0, step = 0;
};

// The sum of N slots as a tree; recursion, because gcc leaves a loop over an array of vectors on the stack.
template <int N, class T, class C>
MK_INLINE Vec<acc_t<T>> slot_sum(const T* const* at, int64_t d, C count) {
  if constexpr (N == 1) {
    return load_part(at[0] + d, count);
  } else {
    return slot_sum<N / 2>(at, d, count) + slot_sum<N - N / 2>(at + N / 2, d, count);
  }
}

constexpr int kTogether = 16;  // slots that are read side by side

// to = (add ? to : 0) + the sum of N slots, times scale. Where there are many, the slots `ahead` elements further on are
// fetched meanwhile, into the second-level cache: into the first, they would take the places of loads.
template <int N, bool add, class T, class A>
MK_INLINE void sum_slots(const T* const* slots, int64_t width, int64_t ahead, A scale, A* to) {
  const T* at[N];
  std::copy_n(slots, N, at);
  constexpr int kPerLine = 64 / int(sizeof(T));
  for_each_vec<A>(width, [&](int64_t d, auto count) {
    if constexpr (N == kTogether) {
      if (d % kPerLine == 0) {
        for (int i = 0; i < N; ++i) prefetch_far(at[i] + d + ahead);
      }
    }
    Vec<A> sum = slot_sum<N>(at, d, count);
    if constexpr (add) sum += load_part(to + d, count);
    store_part(to + d, sum * Vec<A>(scale), count);
  });
}

template <bool add, class T, class A>
void sum_up_to(const T* const* at, int64_t n, int64_t width, int64_t ahead, A scale, A* to) {
  switch (n) {
    case 1: return sum_slots<1, add>(at, width, ahead, scale, to);
    case 2: return sum_slots<2, add>(at, width, ahead, scale, to);
    case 3: return sum_slots<3, add>(at, width, ahead, scale, to);
    case 4: return sum_slots<4, add>(at, width, ahead, scale, to);
    case 5: return sum_slots<5, add>(at, width, ahead, scale, to);
    case 6: return sum_slots<6, add>(at, width, ahead, scale, to);
    case 7: return sum_slots<7, add>(at, width, ahead, scale, to);
    case 8: return sum_slots<8, add>(at, width, ahead, scale, to);
    default: return sum_slots<kTogether, add>(at, width, ahead, scale, to);
  }
}

// Many slots are read as four long streams, which the processor fetches at nearly the whole rate of its memory; at fewer,
// the streams would be too short (Zen 4, shares of that rate: 128 slots of 1024 floats 0.89 against 0.80 side by side,
// 32 of 768 about equal, 16 of 768 0.67 against 0.73).
constexpr int kStreams = 4;
constexpr int64_t kLeastStreamed = 32;      // slots
constexpr int64_t kStreamAhead = 1536;      // bytes between what is read and what is fetched meanwhile

// to = (add ? to : 0) + the sum of one slot of each stream, times scale; `fetch` is brought to the second-level cache.
template <bool add, class T, class A>
MK_INLINE void sum_streams(const T* const (&slots)[kStreams], const T* const (&fetch)[kStreams], int64_t width, A scale,
                           A* to) {
  constexpr int N = Vec<A>::N, kVectors = 4, kBytes = kVectors * N * int(sizeof(T));
  const auto sum_at = [&](int64_t d, auto count) {
    Vec<A> sum = slot_sum<kStreams>(slots, d, count);
    if constexpr (add) sum += load_part(to + d, count);
    store_part(to + d, sum * Vec<A>(scale), count);
  };
  int64_t d = 0;
  for (; d + kVectors * N <= width; d += kVectors * N) {
    for (int s = 0; s < kStreams; ++s) {
      for (int byte = 0; byte < kBytes; byte += 64) prefetch_far(reinterpret_cast<const char*>(fetch[s] + d) + byte);
    }
    for (int v = 0; v < kVectors; ++v) sum_at(d + v * N, std::integral_constant<int, N>{});
  }
  for (; d < width; d += N) sum_at(d, int(std::min<int64_t>(N, width - d)));
}

// The sum of all but the last few slots, and how many those are that it covers; none where there are few slots.
template <class T, class A>
int64_t sum_long(const Slots<T>& slots, int64_t width, A scale, A* to) {
  if (slots.count < kLeastStreamed) return 0;
  const int64_t share = slots.count / kStreams;
  for (int64_t i = 0; i < share; ++i) {
    const T *at[kStreams], *fetch[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      const T* const* stream = &slots.at[s * share];
      at[s] = stream[i];
      fetch[s] = slots.dense(width) ? at[s] + kStreamAhead / int64_t(sizeof(T)) : stream[std::min(i + 1, share - 1)];
    }
    const A factor = (i + 1) * kStreams == slots.count ? scale : A(1);
    i == 0 ? sum_streams<false>(at, fetch, width, factor, to) : sum_streams<true>(at, fetch, width, factor, to);
  }
  return share * kStreams;
}

template <class T, class A>
void pool_mean(const Slots<T>& slots, int64_t width, A* to) {
  const A scale = A(1) / A(std::max<int64_t>(1, slots.count));
  if (slots.count == 0) std::fill_n(to, width, A(0));
  // Sixteen slots side by side where there are as many: the processor's prefetcher stops at the end of a page, mostly that
  // of a slot, so that it takes many slots to keep the memory busy (16: 0.87 of a thread's bandwidth, 8: 0.79, 4: 0.67).
  const int64_t ahead = kTogether * slots.step;
  int64_t n = 0;
  for (int64_t s = sum_long(slots, width, scale, to); s < slots.count; s += n) {
    const int64_t left = slots.count - s;
    n = left >= kTogether ? kTogether : std::min<int64_t>(8, left);
    const A factor = n == left ? scale : A(1);
    if (s == 0) {
      sum_up_to<false>(&slots.at[s], n, width, ahead, factor, to);
    } else {
      sum_up_to<true>(&slots.at[s], n, width, ahead, factor, to);
    }
  }
}

// Ties to the lowest slot, a NaN before everything. `positions` (may be null) gets the winners' slots, -1 without slots.
template <class T, class A>
void pool_max(const Slots<T>& slots, int64_t width, A* to, int32_t* positions) {
  if (slots.count == 0) {
    std::fill_n(to, width, A(0));
    if (positions != nullptr) std::fill_n(positions, width, -1);
    return;
  }
  load_row(slots.at[0], to, width);
  if (positions == nullptr) {
    for (int64_t s = 1; s < slots.count; ++s) {
      const T* x = slots.at[s];
      for_each_vec<A>(width, [&](int64_t d, auto count) {
        store_part(to + d, max_nan(load_part(to + d, count), load_part(x + d, count)), count);
      });
    }
    return;
  }
  std::fill_n(positions, width, int32_t(slots.index[0]));
  for (int64_t s = 1; s < slots.count; ++s) {
    const T* x = slots.at[s];
    const int32_t slot = int32_t(slots.index[s]);
    for_each_vec<A>(width, [&](int64_t d, auto count) {
      const Vec<A> best = load_part(to + d, count), value = load_part(x + d, count);
      const Mask<A> better = (value > best) | (is_nan(value) & !is_nan(best));
      if (!any(better)) return;
      store_part(to + d, select(better, value, best), count);
      for (int i = 0; i < int(count); ++i) positions[d + i] = better.m[i] ? slot : positions[d + i];
    });
  }
}

template <class T, class A>
MK_INLINE A dot(const T* x, const A* y, int64_t width) {
  Vec<A> sums[2] = {Vec<A>(A(0)), Vec<A>(A(0))};
  constexpr int N = Vec<A>::N;
  int64_t d = 0;
  for (; d + 2 * N <= width; d += 2 * N) {
    sums[0] = fma(load(x + d), load(y + d), sums[0]);
    sums[1] = fma(load(x + d + N), load(y + d + N), sums[1]);
  }
  for (; d < width; d += N) {
    const int64_t n = std::min<int64_t>(N, width - d);
    sums[0] = fma(load_n(x + d, n), load_n(y + d, n), sums[0]);
  }
  return reduce_sum(sums[0] + sums[1]);
}

// softmax over the slots of query . x / sqrt(D), and the weighted sum, in one pass with a running maximum: a slot comes
// from memory for its score and is still near when it is added. `weights` (S) gets the softmax, zero for masked slots.
template <class T, class A>
void pool_attention(const Slots<T>& slots, int64_t all_slots, int64_t width, const A* query, A* to, A* weights) {
  std::fill_n(to, width, A(0));
  std::fill_n(weights, all_slots, A(0));
  if (slots.count == 0) return;
  const A root = A(1) / std::sqrt(A(width));
  A top = -std::numeric_limits<A>::infinity(), total = A(0);
  constexpr int64_t kBlock = 4;
  for (int64_t s = 0; s < slots.count; s += kBlock) {
    const int64_t n = std::min(kBlock, slots.count - s);
    const T* x[kBlock];
    A score[kBlock];
    A most = top;
    for (int64_t j = 0; j < kBlock; ++j) x[j] = slots.at[s + std::min(j, n - 1)];
    for (int64_t j = 0; j < n; ++j) {
      score[j] = dot(x[j], query, width) * root;
      most = (score[j] > most || score[j] != score[j]) ? score[j] : most;
    }
    // Scores wait here for the final maximum.
    for (int64_t j = 0; j < n; ++j) weights[slots.index[s + j]] = score[j];
    Vec<A> e(A(0));
    for (int64_t j = 0; j < n; ++j) e.v[j % Vec<A>::N] = score[j] - most;
    A share[kBlock];
    if constexpr (Vec<A>::N >= kBlock) {
      e = exp(e);
      for (int64_t j = 0; j < kBlock; ++j) share[j] = j < n ? e[int(j)] : A(0);
    } else {
      for (int64_t j = 0; j < kBlock; ++j) share[j] = j < n ? exp(Vec<A>(score[j] - most))[0] : A(0);
    }
    const A fade = exp(Vec<A>(top - most))[0];
    A sum = A(0);
    for (int64_t j = 0; j < n; ++j) sum += share[j];
    total = s == 0 ? sum : total * fade + sum;
    for_each_vec<A>(width, [&](int64_t d, auto count) {
      Vec<A> acc = s == 0 ? Vec<A>(A(0)) : load_part(to + d, count) * Vec<A>(fade);
      for (int64_t j = 0; j < n; ++j) acc = fma(Vec<A>(share[j]), load_part(x[j] + d, count), acc);
      store_part(to + d, acc, count);
    });
    top = most;
  }
  const Vec<A> scale(A(1) / total);
  for_each_vec<A>(width, [&](int64_t d, auto count) { store_part(to + d, load_part(to + d, count) * scale, count); });
  for (int64_t s = 0; s < slots.count; ++s) {
    A& weight = weights[slots.index[s]];
    weight = exp(Vec<A>(weight - top))[0] * scale[0];
  }
}

// Every |x| below the threshold; NaN is not.
template <class A>
bool is_zero_row(const A* x, int64_t width) {
  bool zero = true;
  for_each_vec<A>(width, [&](int64_t d, auto count) {
    if (zero && !all(abs(load_part(x + d, count)) < A(kZeroRow))) zero = false;  // a tail is filled with zeros
  });
  return zero;
}

// out[r][e] = x[r] . w[e] for R rows and E experts, each sum in the same order whatever R and E are.
template <int R, int E, class A>
MK_INLINE void dot_tile(const A* const* x, const A* w, int64_t width, A* out, int64_t out_stride) {
  Vec<A> sums[R][E];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) sums[r][e] = Vec<A>(A(0));
  }
  for_each_vec<A>(width, [&](int64_t d, auto count) {
    Vec<A> row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = load_part(x[r] + d, count);
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
      const Vec<A> column = load_part(w + e * width + d, count);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][e] = fma(row[r], column, sums[r][e]);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) out[r * out_stride + e] = reduce_sum(sums[r][e]);
  }
}

template <int R, class A>
void dot_rows(const A* const* x, const A* w, int64_t experts, int64_t width, A* out) {
  int64_t k = 0;
  for (; k + 4 <= experts; k += 4) dot_tile<R, 4>(x, w + k * width, width, out + k, experts);
  if (experts - k == 3) dot_tile<R, 3>(x, w + k * width, width, out + k, experts);
  if (experts - k == 2) dot_tile<R, 2>(x, w + k * width, width, out + k, experts);
  if (experts - k == 1) dot_tile<R, 1>(x, w + k * width, width, out + k, experts);
}

// out (rows, experts) = x W^T
template <class A>
void project(const A* const* x, int64_t rows, const A* w, int64_t experts, int64_t width, A* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<4>(x + r, w, experts, width, out + r * experts);
  for (; r < rows; ++r) dot_rows<1>(x + r, w, experts, width, out + r * experts);
}

}  // namespace memkern::cpu::MK_NS
