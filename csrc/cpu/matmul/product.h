// Blocks of b are packed for the second-level cache and meet all rows of a there, in tiles that stay in registers. While
// one block is multiplied, the next is on its way from memory: b is read once, and reading it costs no time of its own,
// which is what a product with few rows otherwise loses to it.
//
// Every element of out is a sum of blocks of kDepth steps, each in the order of k, whatever the number of rows, columns
// or threads. Compiled for steps of one float and (matmul_dot.cpp) of two bfloat16. Include after common/vec.h.
#pragma once

#include "cpu/matmul/pack.h"

namespace memkern::cpu::MK_NS {
namespace {

constexpr int64_t kDepth = 256;              // steps of a block
constexpr int64_t kPanels = 4, kMorePanels = 16;  // of kColumns in a block: more of them where the depth is less
constexpr int64_t kBetween = 8;              // steps between two prefetches
constexpr int64_t kStreamed = 1 << 18;       // elements of out from which on it passes the caches by

// Lines of the block that is packed next, handed out a few at a time: all of them by the end of this block.
struct Ahead {
  const char* run = nullptr;
  int64_t runs = 0, lines = 0, stride = 0, at_once = 1, line = 0;

  void next() {
    for (int64_t i = 0; i < at_once && runs > 0; ++i) {
      __builtin_prefetch(run + 64 * line, 0, 2);
      if (++line == lines) {
        line = 0;
        run += stride;
        --runs;
      }
    }
  }
};

// Where a tile of sums goes: added to or into `out`, or rounded into `rounded` with what `out` has where `add` says so.
struct To {
  float* out;
  bf16* rounded;
  int64_t out_row, rounded_row;
  bool add, streamed;
};

// A tile (Rows, kColumns) from `depth` steps. Row i, step k of a lies i a_row + k a_col bytes further.
template <int Rows>
void tile(int64_t depth, const char* a, int64_t a_row, int64_t a_col, const Element32* panel, const To& to, Ahead& ahead) {
  VecF sum[Rows][kVecs];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < kVecs; ++v) sum[i][v] = VecF(0.0f);
  }
  const auto step = [&] {
    VecF b[kVecs];
    for (int v = 0; v < kVecs; ++v) b[v] = load(reinterpret_cast<const float*>(panel) + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const VecF x = broadcast_step(reinterpret_cast<const Element32*>(a + i * a_row));
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
      float* out = to.out + i * to.out_row + v * kLanes;
      // A block's sum is rounded by itself, and then added: one chain through all of k would lose digits.
      if (to.add) sum[i][v] += load(out);
      if (to.rounded != nullptr) {
        store_rounded(to.rounded + i * to.rounded_row + v * kLanes, sum[i][v]);
      } else {
        to.streamed ? stream(out, sum[i][v]) : store(out, sum[i][v]);
      }
    }
  }
}

using Tile = void (*)(int64_t, const char*, int64_t, int64_t, const Element32*, const To&, Ahead&);

template <int... Rows>
constexpr std::array<Tile, sizeof...(Rows)> tiles(std::integer_sequence<int, Rows...>) {
  return {tile<Rows + 1>...};
}
constexpr auto kTiles = tiles(std::make_integer_sequence<int, kRows>{});

// All rows of out, columns [first, last).
void columns_of(const MatMul& p, int64_t first, int64_t last, bool streamed) {
  const int64_t steps = (p.K + kPerStep - 1) / kPerStep, panels = (last - first + kColumns - 1) / kColumns;
  const int64_t panel_size = std::min(kDepth, steps) * kColumns;
  Scratch<Element32> packed(panels * panel_size);
  Scratch<Element32> factors(kRows * kDepth);
  alignas(64) float partial[kRows * kColumns];
  // Sums of blocks before what is rounded.
  const bool kept = p.rounded != nullptr && steps > kDepth;
  Scratch<float> before(kept ? p.M * (last - first) : 0);
  for (int64_t k0 = 0; k0 < steps; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, steps - k0);
    const bool add = p.add || k0 > 0, down = k0 + kDepth < steps;
    pack(p, k0, depth, first, last, packed.get(), panel_size);
    // The block behind this one: further down, or at the top of the next columns.
    const int64_t next_k = down ? k0 + kDepth : 0, next_j = down ? first : last;
    Ahead ahead;
    if (next_j < p.N) {
      const int64_t next_depth = std::min(kDepth, steps - next_k), next_columns = std::min(last - first, p.N - next_j);
      const Factor* from = static_cast<const Factor*>(p.b) + next_k * kPerStep * p.b_row + next_j * p.b_col;
      const auto lines = [](int64_t elements) { return (elements * int64_t(sizeof(Factor)) + 63) / 64; };
      ahead.run = reinterpret_cast<const char*>(from);
      if (p.b_col == 1) {
        ahead.runs = std::min(kPerStep * next_depth, p.K - kPerStep * next_k), ahead.lines = lines(next_columns);
        ahead.stride = p.b_row * int64_t(sizeof(Factor));
      } else if (p.b_row == 1) {
        ahead.runs = next_columns, ahead.lines = lines(kPerStep * next_depth);
        ahead.stride = p.b_col * int64_t(sizeof(Factor));
      }
      const int64_t calls = std::max<int64_t>(1, (p.M + kRows - 1) / kRows * panels * (depth / kBetween));
      ahead.at_once = (ahead.runs * ahead.lines + calls - 1) / calls;
    }
    for (int64_t i = 0; i < p.M; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, p.M - i);
      const char* a = reinterpret_cast<const char*>(static_cast<const Factor*>(p.a) + i * p.a_row + k0 * kPerStep);
      int64_t a_row = p.a_row * int64_t(sizeof(Factor)), a_col = sizeof(Element32);
      if (!lies_in_steps(p)) {
        pack_rows(p, k0, depth, i, rows, factors.get());
        a = reinterpret_cast<const char*>(factors.get()), a_row = sizeof(Element32), a_col = kRows * sizeof(Element32);
      }
      for (int64_t q = 0; q < panels; ++q) {
        const int64_t j = first + q * kColumns, columns = std::min<int64_t>(kColumns, last - j);
        const Element32* panel = packed.get() + q * panel_size;
        To to{nullptr, nullptr, p.out_row, p.out_row, add, streamed};
        if (p.rounded == nullptr) {
          to.out = p.out + i * p.out_row + j;
        } else {
          if (kept) to.out = before.get() + i * (last - first) + j - first, to.out_row = last - first;
          if (!down) to.rounded = p.rounded + i * p.out_row + j;
        }
        if (columns == kColumns) {
          kTiles[size_t(rows - 1)](depth, a, a_row, a_col, panel, to, ahead);
          continue;
        }
        for (int64_t r = 0; add && r < rows; ++r) {
          std::memcpy(partial + r * kColumns, to.out + r * to.out_row, size_t(columns) * sizeof(float));
        }
        kTiles[size_t(rows - 1)](depth, a, a_row, a_col, panel, {partial, nullptr, kColumns, 0, add, false}, ahead);
        for (int64_t r = 0; r < rows; ++r) {
          const float* sums = partial + r * kColumns;
          if (to.rounded == nullptr) {
            std::memcpy(to.out + r * to.out_row, sums, size_t(columns) * sizeof(float));
          } else {
            for (int64_t c = 0; c < columns; ++c) to.rounded[r * to.rounded_row + c] = from_acc<bf16>(sums[c]);
          }
        }
      }
    }
  }
  if (streamed) stream_fence();
}

void product(const MatMul& p) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.out) % 64 == 0 && p.out_row % 16 == 0;
  const bool streamed = p.out != nullptr && aligned && !p.add && p.K <= kPerStep * kDepth && p.M * p.N >= kStreamed;
  if (p.K == 0 && !p.add) {
    char* out = p.out != nullptr ? reinterpret_cast<char*>(p.out) : reinterpret_cast<char*>(p.rounded);
    const int64_t size = p.out != nullptr ? sizeof(float) : sizeof(bf16);
    for (int64_t i = 0; i < p.M; ++i) std::memset(out + i * p.out_row * size, 0, size_t(p.N * size));
  }
  const int64_t panels = std::clamp(kPanels * kDepth * kPerStep / std::max<int64_t>(p.K, 1), kPanels, kMorePanels);
  const int64_t block = panels * kColumns;
  parallel(p.run, (p.N + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) columns_of(p, c * block, std::min(p.N, (c + 1) * block), streamed);
  });
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
