// Blocks of b are packed for the second-level cache and meet all rows of a there, in tiles that stay in registers. While
// one block is multiplied, the next is on its way from memory: b is read once, and reading it costs no time of its own,
// which is what a product with few rows otherwise loses to it.
//
// Every element of out is a sum of blocks of kDepth, each in the order of k, whatever the number of rows, columns or
// threads. Compiled for float steps and (matmul_dot.cpp) for pairs of bfloat16. Include after common/vec.h.
#pragma once

#include "cpu/steps.h"

namespace memkern::cpu::MK_NS {
namespace {

constexpr int kLanes = VecF::N;
// A tile of registers: rows x vectors of sums, one broadcast factor and the vectors of b beside them.
constexpr int kRows = MK_VEC == 512 ? 8 : 4, kVecs = 3, kColumns = kVecs * kLanes;
constexpr int64_t kDepth = 256;              // steps of a block
constexpr int64_t kPanels = 4;               // of kColumns, in a block
constexpr int64_t kBetween = 8;              // steps between two prefetches
constexpr int64_t kStreamed = 1 << 18;       // elements of out from which on it passes the caches by

// Lines of the block that is packed next, handed out one by one.
struct Ahead {
  const char* run = nullptr;
  int64_t runs = 0, lines = 0, stride = 0, line = 0;

  void next() {
    if (runs == 0) return;
    __builtin_prefetch(run + 64 * line, 0, 2);
    if (++line == lines) {
      line = 0;
      run += stride;
      --runs;
    }
  }
};

// tile (Rows, kColumns) of out from `depth` steps. a: row i, step k at a[i a_row + k a_col].
template <int Rows>
void tile(int64_t depth, const Element32* a, int64_t a_row, int64_t a_col, const float* panel, float* out, int64_t out_row,
          bool add, bool streamed, Ahead& ahead) {
  VecF sum[Rows][kVecs];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < kVecs; ++v) sum[i][v] = VecF(0.0f);
  }
  const auto step = [&] {
    VecF b[kVecs];
    for (int v = 0; v < kVecs; ++v) b[v] = load(panel + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const VecF x = broadcast_step(a + i * a_row);
      for (int v = 0; v < kVecs; ++v) sum[i][v] = multiply_add(x, b[v], sum[i][v]);
    }
    a += a_col;
    panel += kColumns;
  };
  int64_t k = 0;
  for (; k + kBetween <= depth; k += kBetween) {
    ahead.next();
    for (int64_t j = 0; j < kBetween; ++j) step();
  }
  for (; k < depth; ++k) step();
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      float* to = out + i * out_row + v * kLanes;
      // A block's sum is rounded by itself, and then added: one chain through all of k would lose digits.
      if (add) sum[i][v] += load(to);
      streamed ? stream(to, sum[i][v]) : store(to, sum[i][v]);
    }
  }
}

using Tile = void (*)(int64_t, const Element32*, int64_t, int64_t, const float*, float*, int64_t, bool, bool, Ahead&);

template <int... Rows>
constexpr std::array<Tile, sizeof...(Rows)> tiles(std::integer_sequence<int, Rows...>) {
  return {tile<Rows + 1>...};
}
constexpr auto kTiles = tiles(std::make_integer_sequence<int, kRows>{});

#if MK_X86 && MK_VEC == 512
// to[k][j] = from[j][k] of 16 x 16, rows `from_row` and kColumns apart.
void transpose(const float* from, int64_t from_row, float* to) {
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

// panel[k][j] = b[k, first + j] of `depth` x `columns`, the rest of a panel's columns zero.
void pack(const MatMul& p, int64_t k0, int64_t depth, int64_t first, int64_t columns, float* panel) {
  // Only moved: whatever a step holds, it is 32 bits.
  const float* b = static_cast<const float*>(p.b) + k0 * p.b_row + first * p.b_col;
  if (columns < kColumns) std::memset(panel, 0, size_t(depth * kColumns) * sizeof(float));
  if (p.b_col == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      if (columns == kColumns) {
        for (int v = 0; v < kVecs; ++v) store(panel + k * kColumns + v * kLanes, load(b + k * p.b_row + v * kLanes));
      } else {
        std::memcpy(panel + k * kColumns, b + k * p.b_row, size_t(columns) * sizeof(float));
      }
    }
    return;
  }
  int64_t packed_columns = 0, packed_depth = 0;
#if MK_X86 && MK_VEC == 512
  if (p.b_row == 1) {
    packed_columns = columns / 16 * 16;
    packed_depth = depth / 16 * 16;
    for (int64_t j = 0; j < packed_columns; j += 16) {
      for (int64_t k = 0; k < packed_depth; k += 16) transpose(b + k + j * p.b_col, p.b_col, panel + k * kColumns + j);
    }
  }
#endif
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = j < packed_columns ? packed_depth : 0; k < depth; ++k) {
      std::memcpy(panel + k * kColumns + j, b + k * p.b_row + j * p.b_col, sizeof(float));
    }
  }
}

// All rows of out, columns [first, last).
void columns_of(const MatMul& p, int64_t first, int64_t last, bool streamed) {
  const int64_t panels = (last - first + kColumns - 1) / kColumns;
  Scratch<float> packed(panels * kDepth * kColumns);
  Scratch<Element32> factors(kRows * kDepth);
  alignas(64) float partial[kRows * kColumns];
  for (int64_t k0 = 0; k0 < p.K; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, p.K - k0);
    const bool add = p.add || k0 > 0;
    for (int64_t q = 0; q < panels; ++q) {
      const int64_t j = first + q * kColumns;
      pack(p, k0, depth, j, std::min<int64_t>(kColumns, last - j), packed.get() + q * kDepth * kColumns);
    }
    Ahead ahead;
    // The block behind this one: further down, or at the top of the next columns.
    const bool down = k0 + kDepth < p.K;
    const int64_t next_k = down ? k0 + kDepth : 0, next_j = down ? first : last;
    if (next_j < p.N) {
      const int64_t next_depth = std::min(kDepth, p.K - next_k), next_columns = std::min(last - first, p.N - next_j);
      const float* from = static_cast<const float*>(p.b) + next_k * p.b_row + next_j * p.b_col;
      ahead.run = reinterpret_cast<const char*>(from);
      if (p.b_col == 1) {
        ahead.runs = next_depth, ahead.lines = (next_columns + 15) / 16, ahead.stride = 4 * p.b_row;
      } else if (p.b_row == 1) {
        ahead.runs = next_columns, ahead.lines = (next_depth + 15) / 16, ahead.stride = 4 * p.b_col;
      }
    }
    for (int64_t i = 0; i < p.M; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, p.M - i);
      const Element32* a = static_cast<const Element32*>(p.a) + i * p.a_row + k0 * p.a_col;
      int64_t a_row = p.a_row, a_col = p.a_col;
      if (a_col != 1) {
        for (int64_t k = 0; k < depth; ++k) {
          for (int64_t r = 0; r < rows; ++r) factors[k * kRows + r] = a[r * p.a_row + k * p.a_col];
        }
        a = factors.get(), a_row = 1, a_col = kRows;
      }
      for (int64_t q = 0; q < panels; ++q) {
        const int64_t j = first + q * kColumns, columns = std::min<int64_t>(kColumns, last - j);
        const float* panel = packed.get() + q * kDepth * kColumns;
        float* out = p.out + i * p.out_row + j;
        if (columns == kColumns) {
          kTiles[size_t(rows - 1)](depth, a, a_row, a_col, panel, out, p.out_row, add, streamed, ahead);
          continue;
        }
        for (int64_t r = 0; add && r < rows; ++r) {
          std::memcpy(partial + r * kColumns, out + r * p.out_row, size_t(columns) * sizeof(float));
        }
        kTiles[size_t(rows - 1)](depth, a, a_row, a_col, panel, partial, kColumns, add, false, ahead);
        for (int64_t r = 0; r < rows; ++r) {
          std::memcpy(out + r * p.out_row, partial + r * kColumns, size_t(columns) * sizeof(float));
        }
      }
    }
  }
  if (streamed) stream_fence();
}

void product(const MatMul& p) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.out) % 64 == 0 && p.out_row % 16 == 0;
  const bool streamed = aligned && !p.add && p.K <= kDepth && p.M * p.N >= kStreamed;
  if (p.K == 0 && !p.add) {
    for (int64_t i = 0; i < p.M; ++i) std::memset(p.out + i * p.out_row, 0, size_t(p.N) * sizeof(float));
  }
  constexpr int64_t kBlock = kPanels * kColumns;
  parallel(p.run, (p.N + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) columns_of(p, c * kBlock, std::min(p.N, (c + 1) * kBlock), streamed);
  });
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
