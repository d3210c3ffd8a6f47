// Launchers of the memory column. The parameters are those of ops/memory.h, and float32: the column's other dtypes
// are converted before. `scratch` has the number of floats that the function beside each launcher says, and is
// 16-byte aligned; `tickets` are one counter per batch item (arrive_last in cuda/common.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/memory.h"

namespace memkern::cuda {

int64_t memory_forward_scratch(const MemorySizes& sizes);
cudaError_t memory_forward(const MemoryForward& p, float* scratch, int32_t* tickets, cudaStream_t stream);
int64_t memory_backward_scratch(const MemorySizes& sizes);
cudaError_t memory_backward(const MemoryBackward& p, float* scratch, int32_t* tickets, cudaStream_t stream);

cudaError_t content_forward(const ContentWeights& p, int32_t* tickets, cudaStream_t stream);
int64_t content_backward_scratch(const ContentWeights& p);
cudaError_t content_backward(const ContentWeights& p, float* scratch, int32_t* tickets, cudaStream_t stream);
cudaError_t sharpen_forward(const Sharpen& p, cudaStream_t stream);
cudaError_t sharpen_backward(const Sharpen& p, cudaStream_t stream);
int64_t allocation_scratch(const Allocation& p);
cudaError_t allocation_forward(const Allocation& p, float* scratch, cudaStream_t stream);
cudaError_t allocation_backward(const Allocation& p, float* scratch, cudaStream_t stream);
cudaError_t usage_forward(const UsageUpdate& p, cudaStream_t stream);
int64_t usage_backward_scratch(const UsageUpdate& p);
cudaError_t usage_backward(const UsageUpdate& p, float* scratch, cudaStream_t stream);
cudaError_t links_forward(const LinksUpdate& p, cudaStream_t stream);
int64_t links_backward_scratch(const LinksUpdate& p);
cudaError_t links_backward(const LinksUpdate& p, float* scratch, cudaStream_t stream);
int64_t directional_scratch(const Directional& p);
cudaError_t directional_forward(const Directional& p, float* scratch, cudaStream_t stream);
cudaError_t directional_backward(const Directional& p, float* scratch, cudaStream_t stream);
int64_t read_scratch(const ReadMemory& p);
cudaError_t read_forward(const ReadMemory& p, float* scratch, int32_t* tickets, cudaStream_t stream);
cudaError_t read_backward(const ReadMemory& p, cudaStream_t stream);
cudaError_t write_forward(const WriteMemory& p, cudaStream_t stream);
int64_t write_backward_scratch(const WriteMemory& p);
cudaError_t write_backward(const WriteMemory& p, float* scratch, int32_t* tickets, cudaStream_t stream);

}  // namespace memkern::cuda
