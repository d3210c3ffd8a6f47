// The kernels of the column's table, each in a file of its own.
#pragma once

#include "ops/memory.h"

// Runs the block with T float or double, the only dtypes of this column.
#define MK_MEMORY_DISPATCH(dtype, T, ...)   \
  if ((dtype) == ::memkern::DType::kF64) {  \
    using T = double;                       \
    __VA_ARGS__;                            \
  } else {                                  \
    using T = float;                        \
    __VA_ARGS__;                            \
  }

namespace memkern::cpu::MK_NS {

void memory_forward(const MemoryForward& p, ParallelFor threads);
void memory_backward(const MemoryBackward& p, ParallelFor threads);
void content_forward(const ContentWeights& p, ParallelFor threads);
void content_backward(const ContentWeights& p, ParallelFor threads);
void sharpen_forward(const Sharpen& p, ParallelFor threads);
void sharpen_backward(const Sharpen& p, ParallelFor threads);
void allocation_forward(const Allocation& p, ParallelFor threads);
void allocation_backward(const Allocation& p, ParallelFor threads);
void usage_forward(const UsageUpdate& p, ParallelFor threads);
void usage_backward(const UsageUpdate& p, ParallelFor threads);
void links_forward(const LinksUpdate& p, ParallelFor threads);
void links_backward(const LinksUpdate& p, ParallelFor threads);
void directional_forward(const Directional& p, ParallelFor threads);
void directional_backward(const Directional& p, ParallelFor threads);
void read_forward(const ReadMemory& p, ParallelFor threads);
void read_backward(const ReadMemory& p, ParallelFor threads);
void write_forward(const WriteMemory& p, ParallelFor threads);
void write_backward(const WriteMemory& p, ParallelFor threads);

}  // namespace memkern::cpu::MK_NS
