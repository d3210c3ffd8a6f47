// What one thread of this processor can do at best: the limits that benchmarks hold the operators against.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dispatch.h"

namespace memkern::cpu {

struct LimitsTable {
  // Reads `size` bytes once and returns a value that depends on all of them.
  std::uint64_t (*read)(const void* data, std::size_t size);
  // Runs `rounds` rounds of independent float fused multiply-adds; returns how many operations that were, and through
  // `out` a value that depends on all of them.
  std::int64_t (*fma)(std::int64_t rounds, float* out);
};

}  // namespace memkern::cpu

MK_CPU_TABLE(LimitsTable, limits)
