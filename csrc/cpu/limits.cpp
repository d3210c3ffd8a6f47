#include "ops/limits.h"

#include "cpu/isa.h"

namespace memkern::cpu::MK_NS {

namespace {

constexpr int kBytes = MK_VEC / 8;
using Words = std::uint64_t __attribute__((vector_size(kBytes), aligned(8), may_alias));
using Floats = float __attribute__((vector_size(kBytes)));

std::uint64_t read(const void* data, std::size_t size) {
  // Four streams keep more cache lines in flight than one does. Fetched into the second-level cache: into the first, a
  // fetch would take the places of loads. Tried on a Zen 4: 1 KiB ahead into the first 0.88 of this.
  constexpr int kStreams = 4;
  const auto* bytes = static_cast<const char*>(data);
  const std::size_t share = size / kStreams / (4 * kBytes) * (4 * kBytes);
  Words sums[kStreams] = {};
  for (std::size_t i = 0; i < share; i += 4 * kBytes) {
    for (int s = 0; s < kStreams; ++s) {
      const char* at = bytes + s * share + i;
      for (int line = 0; line < 4 * kBytes; line += 64) __builtin_prefetch(at + line + 2048, 0, 2);
      for (int v = 0; v < 4; ++v) sums[s] ^= *reinterpret_cast<const Words*>(at + v * kBytes);
    }
  }
  const Words all = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  std::uint64_t result = 0;
  for (int lane = 0; lane < kBytes / 8; ++lane) result ^= all[lane];
  for (std::size_t i = kStreams * share; i < size; ++i) result ^= static_cast<unsigned char>(bytes[i]);
  return result;
}

std::int64_t fma(std::int64_t rounds, float* out) {
  // Ten chains cover the latency of two units: 4 cycles each, or 5.
  constexpr int kChains = 10, kLanes = kBytes / 4;
  Floats sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = Floats{} + 1e-3f * static_cast<float>(c + 1);
  Floats factor = Floats{} + 0.999f;
  Floats addend = Floats{} + 1e-4f;
  for (std::int64_t i = 0; i < rounds; ++i) {
    // The compiler must neither hoist nor fold a round.
    asm volatile("" : "+x"(factor), "+x"(addend));
#pragma GCC unroll 10
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * factor + addend;
  }
  Floats total = sums[0];
  for (int c = 1; c < kChains; ++c) total += sums[c];
  *out = total[0];
  return rounds * kChains * kLanes * 2;
}

}  // namespace

extern const LimitsTable limits = {read, fma};

}  // namespace memkern::cpu::MK_NS
