// Scores a block of queries against a tile of rows and reports the pairs that pass the queries' bounds.
//
// Lanes are queries: a step loads one element of each query of a panel, and broadcasts one element of each row. So rows
// are read as they lie, no sum is ever taken across lanes, and a score is compared where it was computed. The queries
// are packed once, step by step, and stay in L2; a tile of rows is brought to the scan's own type on the way in.
//
// search.cpp has the meaning; this file is compiled in two forms, for float elements, and (scan_dot.cpp) for pairs of
// bfloat16 on processors that multiply those. Include after common/vec.h.
#pragma once

#include "cpu/cosine_topk/scan_types.h"
#include "cpu/steps.h"

namespace memkern::cpu::MK_NS {
namespace {

constexpr int kLanes = VecF::N;
// Accumulators: at least twelve, to cover the latency of two units, and at most what the registers hold.
constexpr int kWidestPanel = MK_VEC == 512 ? 3 : 2;
template <int Vectors>
constexpr int kRowsAtOnce = MK_VEC == 512   ? (Vectors == 3 ? 8 : 12)
                            : MK_VEC == 256 ? (Vectors == 2 ? 6 : 12)
                                            : (Vectors == 2 ? 4 : 8);
static_assert(kTileRows % 24 == 0, "a tile is a whole number of row groups");

int64_t padded_width(int64_t width) { return (width + kPerStep - 1) / kPerStep * kPerStep; }

int64_t padded_lanes(int64_t queries) { return (queries + kLanes - 1) / kLanes * kLanes; }

int64_t panel_vectors(int64_t left) { return std::min<int64_t>(kWidestPanel, left); }

// Step s of a query. `lost` grows by the square of what rounding to the scan's type took away.
MK_INLINE Element32 packed_step(const float* query, int64_t s, [[maybe_unused]] int64_t width, double& lost) {
#if defined(MK_DOT_BF16)
  Element32 element = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t d = 2 * s + i;
    const float x = d < width ? query[d] : 0.0f;
    const bf16 rounded = from_acc<bf16>(x);
    const double difference = double(x) - double(to_acc(rounded));
    lost += difference * difference;
    element |= uint32_t(rounded.bits) << (16 * i);
  }
  return element;
#else
  lost += 0;
  return query[s];
#endif
}

// Queries (count, stride) of unit length, padded with zeros to whole vectors of lanes: step s of lane i goes to
// out[i lane_stride + s step_stride]. `loss`: for each, the length of what rounding to the scan's type took away.
void pack_queries(const float* queries, int64_t count, int64_t stride, int64_t width, Element32* out, int64_t lane_stride,
                  int64_t step_stride, double* loss) {
  const int64_t steps = padded_width(width) / kPerStep;
  for (int64_t lane = 0; lane < padded_lanes(count); ++lane) {
    double lost = 0;
    for (int64_t s = 0; s < steps; ++s) {
      Element32& to = out[lane * lane_stride + s * step_stride];
      to = lane < count ? packed_step(queries + lane * stride, s, width, lost) : Element32(0);
    }
    if (lane < count) loss[lane] = std::sqrt(lost);
  }
}

// One panel: up to kWidestPanel vectors of queries, side by side at every step.
void pack(const float* queries, int64_t count, int64_t stride, int64_t width, void* panel, double* loss) {
  pack_queries(queries, count, stride, width, static_cast<Element32*>(panel), 1, padded_lanes(count), loss);
}

// One row in the scan's type, padded with zeros; returns the sum of its squares.
template <class T>
MK_INLINE float bring(const T* from, int64_t width, Element32* to) {
  VecF sums[4] = {VecF(0.0f), VecF(0.0f), VecF(0.0f), VecF(0.0f)};
  int64_t i = 0;
#if defined(MK_DOT_BF16)
  if constexpr (std::is_same_v<T, bf16>) {
    for (; i + 64 <= width; i += 64) {
      for (int s = 0; s < 2; ++s) {
        const __m512i x = _mm512_loadu_si512(from + i + 32 * s);
        _mm512_storeu_si512(to + (i + 32 * s) / 2, x);
        sums[s] = (VecF::raw)_mm512_dpbf16_ps(sums[s].v, (__m512bh)x, (__m512bh)x);
      }
    }
  } else {
    for (; i + 64 <= width; i += 64) {
      for (int s = 0; s < 2; ++s) {
        const VecF a = load(from + i + 32 * s), b = load(from + i + 32 * s + 16);
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
        _mm512_storeu_si512(to + (i + 32 * s) / 2, rounded);
        sums[2 * s] = fma(a, a, sums[2 * s]);
        sums[2 * s + 1] = fma(b, b, sums[2 * s + 1]);
      }
    }
  }
  auto* halves = reinterpret_cast<bf16*>(to);
  for (; i < width; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, width - i);
    const VecF a = load_n(from + i, n);
    sums[0] = fma(a, a, sums[0]);
    store_n(halves + i, a, n);
  }
  if (width % 2) halves[width] = {0};
#else
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    for (int s = 0; s < 4; ++s) {
      const VecF a = load(from + i + s * kLanes);
      store(to + i + s * kLanes, a);
      sums[s] = fma(a, a, sums[s]);
    }
  }
  for (; i < width; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, width - i);
    const VecF a = load_n(from + i, n);
    sums[0] = fma(a, a, sums[0]);
    store_n(to + i, a, n);
  }
#endif
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void bring_rows(const void* from, int64_t stride, int64_t width, const int64_t* rows, int64_t count, void* to,
                int64_t tile_stride, float* squares) {
  const auto* database = static_cast<const T*>(from);
  auto* tile = static_cast<Element32*>(to);
  for (int64_t r = 0; r < count; ++r) {
    squares[r] = bring(database + rows[r] * stride, width, tile + r * tile_stride);
  }
}

// Lanes where x >= bound; NaN is not.
MK_INLINE uint32_t at_least(VecF x, VecF bound) {
#if MK_X86 && MK_VEC == 512
  return _mm512_cmp_ps_mask(x.v, bound.v, _CMP_GE_OQ);
#elif MK_X86 && MK_VEC == 256
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.v, bound.v, _CMP_GE_OQ)));
#elif MK_X86
  return uint32_t(_mm_movemask_ps(_mm_cmpge_ps(x.v, bound.v)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(x.v[i] >= bound.v[i]) << i;
  return bits;
#endif
}

// Whether a finite score could pass one of the bounds of a panel.
MK_INLINE bool any_open(const float* bounds, int64_t vectors) {
  uint32_t open = 0;
  for (int64_t v = 0; v < vectors; ++v) {
    open |= at_least(VecF(std::numeric_limits<float>::max()), load(bounds + v * kLanes));
  }
  return open != 0;
}

// places[0 .. count) = base + the lanes where x >= bound; there is room for a whole vector. Without a branch, which nobody
// could foresee.
MK_INLINE int64_t list_lanes(VecF x, VecF bound, uint32_t base, uint32_t* places) {
  const uint32_t hits = at_least(x, bound);
#if MK_X86 && MK_VEC == 512
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i found = _mm512_maskz_compress_epi32(__mmask16(hits), lanes);
  _mm512_storeu_si512(places, _mm512_add_epi32(found, _mm512_set1_epi32(int(base))));
  return __builtin_popcount(hits);
#else
  int64_t count = 0;
  for (uint32_t left = hits; left != 0; left &= left - 1) places[count++] = base + uint32_t(__builtin_ctz(left));
  return count;
#endif
}

// `uppers` (kRowsAtOnce, Vectors of kLanes): of a group of rows that has at least one hit.
template <int Vectors>
__attribute__((noinline)) void report(const TileScan& t, const float* uppers, int64_t first_query, int64_t row) {
  constexpr uint32_t kWidth = Vectors * kLanes;
  uint32_t places[kRowsAtOnce<Vectors> * kWidth + kLanes];
  int64_t count = 0;
  for (uint32_t r = 0; r < kRowsAtOnce<Vectors>; ++r) {
    for (uint32_t v = 0; v < kWidth; v += kLanes) {
      const uint32_t at = r * kWidth + v;
      count += list_lanes(load(uppers + at), load(t.bounds + first_query + v), at, places + count);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t of = row + places[i] / kWidth, query = first_query + places[i] % kWidth;
    const float upper = uppers[places[i]];
    // A hit before may have raised the bound.
    if (upper >= t.bounds[query]) t.hit(t.context, query, of, upper, upper - 2 * t.margin[of]);
  }
}

// Spreads the fetching of the next tile's rows over the steps of this one.
struct Ahead {
  const void* const* rows;
  int64_t left, bytes, at_once, at;

  // Every 16 steps.
  void next() {
    for (int64_t more = at_once; more > 0 && left > 0;) {
      const char* row = static_cast<const char*>(*rows) + at;
      const int64_t lines = std::min(more, (bytes - at + 63) / 64);
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(row + 64 * i, 0, 2);
      more -= lines;
      at += 64 * lines;
      if (at < bytes) continue;
      at = 0;
      ++rows;
      --left;
    }
  }
};

template <int Vectors>
__attribute__((noinline)) void scan_panel(const TileScan& t, const Element32* panel, int64_t first_query, Ahead& ahead) {
  constexpr int R = kRowsAtOnce<Vectors>;
  const int64_t stride = t.tile_stride, steps = t.steps;
  for (int64_t row = 0; row < t.count; row += R) {
    VecF sums[R][Vectors];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sums[r][v] = VecF(0.0f);
    }
    const Element32* q = panel;
    const Element32* x = static_cast<const Element32*>(t.tile) + row * stride;
    for (int64_t s = 0; s < steps;) {
      ahead.next();
      const int64_t end = std::min(s + 16, steps);
      for (; s < end; ++s) {
        VecF query[Vectors];
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) query[v] = load(reinterpret_cast<const float*>(q + v * kLanes));
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const VecF element = broadcast_step(x + r * stride);
#pragma GCC unroll 3
          for (int v = 0; v < Vectors; ++v) sums[r][v] = multiply_add(query[v], element, sums[r][v]);
        }
        q += Vectors * kLanes;
        ++x;
      }
    }
    uint32_t hits = 0;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const VecF inverse(t.inverse[row + r]), margin(t.margin[row + r]);
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) {
        sums[r][v] = fma(sums[r][v], inverse, margin);
        hits |= at_least(sums[r][v], load(t.bounds + first_query + v * kLanes));
      }
    }
    if (hits != 0) {
      alignas(64) float uppers[R * Vectors * kLanes];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) store(uppers + (r * Vectors + v) * kLanes, sums[r][v]);
      }
      report<Vectors>(t, uppers, first_query, row);
    }
  }
}

void scan_tile(const TileScan& t) {
  const int64_t vectors = (t.queries + kLanes - 1) / kLanes;
  // Rounds of 16 steps in this tile: a panel goes over the rows in groups.
  int64_t rounds = 0;
  for (int64_t v = 0; v < vectors;) {
    const int64_t panel = panel_vectors(vectors - v);
    const int64_t at_once = panel == 3 ? kRowsAtOnce<3> : panel == 2 ? kRowsAtOnce<2> : kRowsAtOnce<1>;
    rounds += (t.count + at_once - 1) / at_once * ((t.steps + 15) / 16);
    v += panel;
  }
  const int64_t lines = t.ahead_rows * ((t.ahead_bytes + 63) / 64);
  Ahead ahead{t.ahead, t.ahead_rows, t.ahead_bytes, rounds ? (lines + rounds - 1) / rounds : 0, 0};
  const auto* panel = static_cast<const Element32*>(t.panels);
  for (int64_t v = 0; v < vectors;) {
    const int64_t wide = panel_vectors(vectors - v);
    if (!any_open(t.bounds + v * kLanes, wide)) {
      // Its queries have found what they look for.
    } else if (wide == 3) {
      if constexpr (kWidestPanel == 3) scan_panel<3>(t, panel, v * kLanes, ahead);
    } else if (wide == 2) {
      scan_panel<2>(t, panel, v * kLanes, ahead);
    } else {
      scan_panel<1>(t, panel, v * kLanes, ahead);
    }
    panel += t.steps * wide * kLanes;
    v += wide;
  }
}

constexpr ScanKernels kScanKernels = {
    kPerStep, kLanes, kWidestPanel * kLanes, kTileRows, 0.0, pack, scan_tile,
    {bring_rows<float>, bring_rows<bf16>, bring_rows<f16>},
};

}  // namespace
}  // namespace memkern::cpu::MK_NS
