// The scan of up to 512 slots in one launch, and its backward in one: what a step changes stays in shared memory for
// all steps.
#pragma once

#include "cuda/memory/memory.h"

namespace memkern::cuda::slots {

// True, with the launch's error in `error`, where the shapes and the device allow it. The results are those of the
// steps, up to the order of sums.
bool resident_forward(const MemoryForward& p, cudaStream_t stream, cudaError_t& error);

// The same of backward. `scratch` takes a Segment (past.cuh).
bool resident_backward(const MemoryBackward& p, float* scratch, cudaStream_t stream, cudaError_t& error);

}  // namespace memkern::cuda::slots
