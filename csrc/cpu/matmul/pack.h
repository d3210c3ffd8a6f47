// Factors of a product laid out for its tiles: panels of b, and rows of a whose steps do not lie side by side. A step
// takes the next kPerStep elements along K, where they lie side by side and where they lie rows apart; what a last pair
// lacks is zero. Compiled like product.h. Include after common/vec.h.
#pragma once

#include "cpu/steps.h"

namespace memkern::cpu::MK_NS {
namespace {

constexpr int kLanes = VecF::N;
// A tile of registers: rows x vectors of sums, one broadcast factor and the vectors of b beside them.
constexpr int kRows = MK_VEC == 512 ? 8 : 4, kVecs = 3, kColumns = kVecs * kLanes;

// The step at x, of whose elements `left` are there, `apart` from each other.
MK_INLINE Element32 step_at(const Factor* x, int64_t apart, int64_t left) {
#if defined(MK_DOT_BF16)
  return uint32_t(x[0]) | (left > 1 ? uint32_t(x[apart]) << 16 : 0);
#else
  (void)apart, (void)left;
  return x[0];
#endif
}

// kLanes steps side by side, of rows of elements `apart` from each other.
MK_INLINE void copy_steps(Element32* to, const Factor* from, int64_t apart) {
#if defined(MK_DOT_BF16)
  const auto widened = [](const Factor* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  };
  _mm512_storeu_si512(to, _mm512_or_si512(widened(from), _mm512_slli_epi32(widened(from + apart), 16)));
#else
  (void)apart;
  store(to, load(from));
#endif
}

// kRows steps side by side.
MK_INLINE void copy_rows(Element32* to, const Factor* from, int64_t apart) {
#if defined(MK_DOT_BF16)
  const auto eight = [](const Factor* x) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); };
  const __m128i even = eight(from), odd = eight(from + apart);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(even, odd));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4), _mm_unpackhi_epi16(even, odd));
#else
  (void)apart;
  std::memcpy(to, from, kRows * sizeof(float));
#endif
}

#if MK_X86 && MK_VEC == 512
// to[k][j] = from[j][k] of 16 x 16 steps; rows `from_row` bytes and kColumns steps apart.
void transpose(const char* from, int64_t from_row, Element32* to_steps) {
  float* to = reinterpret_cast<float*>(to_steps);
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * from_row);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(to + (i)*kColumns, _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88));
    _mm512_storeu_ps(to + (8 + i) * kColumns, _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd));
    _mm512_storeu_ps(to + (4 + i) * kColumns, _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88));
    _mm512_storeu_ps(to + (12 + i) * kColumns, _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd));
  }
}
#endif

// panels[q][k][j] = step k0 + k of column first + q kColumns + j, of `depth` steps and of the columns up to `last`; zero
// beyond. Panels are `panel_size` apart.
void pack(const MatMul& p, int64_t k0, int64_t depth, int64_t first, int64_t last, Element32* panels, int64_t panel_size) {
  const Factor* b = static_cast<const Factor*>(p.b) + k0 * kPerStep * p.b_row + first * p.b_col;
  const int64_t left = p.K - k0 * kPerStep, whole = std::min(depth, left / kPerStep), step = kPerStep * p.b_row;
  const int64_t columns = last - first, in_last = columns % kColumns;
  const auto at = [&](int64_t k, int64_t j) { return panels + j / kColumns * panel_size + k * kColumns + j % kColumns; };
  if (in_last > 0) std::memset(at(0, columns - in_last), 0, size_t(depth * kColumns) * sizeof(Element32));
  int64_t packed_columns = 0, packed_depth = 0;
  if (p.b_col == 1) {
    packed_columns = columns / kLanes * kLanes;
    packed_depth = whole;
    for (int64_t j0 = 0; j0 < packed_columns; j0 += kColumns) {
      Element32* panel = at(0, j0);
      const int64_t end = std::min<int64_t>(kColumns, packed_columns - j0);
      for (int64_t k = 0; k < packed_depth; ++k) {
        for (int64_t j = 0; j < end; j += kLanes) copy_steps(panel + k * kColumns + j, b + k * step + j0 + j, p.b_row);
      }
    }
#if MK_X86 && MK_VEC == 512
  } else if (p.b_row == 1) {
    packed_columns = columns / 16 * 16;
    packed_depth = whole / 16 * 16;
    for (int64_t j = 0; j < packed_columns; j += 16) {
      for (int64_t k = 0; k < packed_depth; k += 16) {
        transpose(reinterpret_cast<const char*>(b + k * step + j * p.b_col), p.b_col * int64_t(sizeof(Factor)), at(k, j));
      }
    }
#endif
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = j < packed_columns ? packed_depth : 0; k < depth; ++k) {
      *at(k, j) = step_at(b + k * step + j * p.b_col, p.b_row, left - kPerStep * k);
    }
  }
}

// Whether tiles take the rows of a as they lie.
bool lies_in_steps(const MatMul& p) { return p.a_col == 1 && p.K % kPerStep == 0; }

// to[k][r] = step k0 + k of row first + r, of `depth` x `rows`.
void pack_rows(const MatMul& p, int64_t k0, int64_t depth, int64_t first, int64_t rows, Element32* to) {
  const Factor* a = static_cast<const Factor*>(p.a) + first * p.a_row + k0 * kPerStep * p.a_col;
  const int64_t left = p.K - k0 * kPerStep, step = kPerStep * p.a_col;
  int64_t packed = 0;
  if (p.a_row == 1 && rows == kRows) {
    packed = std::min(depth, left / kPerStep);
    for (int64_t k = 0; k < packed; ++k) copy_rows(to + k * kRows, a + k * step, p.a_col);
  }
  for (int64_t k = packed; k < depth; ++k) {
    for (int64_t r = 0; r < rows; ++r) {
      to[k * kRows + r] = step_at(a + r * p.a_row + k * step, p.a_col, left - kPerStep * k);
    }
  }
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
