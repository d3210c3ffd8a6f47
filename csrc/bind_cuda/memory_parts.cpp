// The parts of a memory step: memkern::content_weights_*_cuda and their like.
#include "bind_cuda/memory.h"

#include "common/binding_memory_parts.h"

STABLE_TORCH_LIBRARY_IMPL(memkern, CUDA, m) {
  using namespace memkern::bind;
  m.impl("content_weights_fwd_cuda", TORCH_BOX(&content_weights_fwd<CudaMemory>));
  m.impl("content_weights_bwd_cuda", TORCH_BOX(&content_weights_bwd<CudaMemory>));
  m.impl("sharpen_fwd_cuda", TORCH_BOX(&sharpen_fwd<CudaMemory>));
  m.impl("sharpen_bwd_cuda", TORCH_BOX(&sharpen_bwd<CudaMemory>));
  m.impl("allocation_weights_fwd_cuda", TORCH_BOX(&allocation_weights_fwd<CudaMemory>));
  m.impl("allocation_weights_bwd_cuda", TORCH_BOX(&allocation_weights_bwd<CudaMemory>));
  m.impl("update_usage_fwd_cuda", TORCH_BOX(&update_usage_fwd<CudaMemory>));
  m.impl("update_usage_bwd_cuda", TORCH_BOX(&update_usage_bwd<CudaMemory>));
  m.impl("update_links_fwd_cuda", TORCH_BOX(&update_links_fwd<CudaMemory>));
  m.impl("update_links_bwd_cuda", TORCH_BOX(&update_links_bwd<CudaMemory>));
  m.impl("directional_weights_fwd_cuda", TORCH_BOX(&directional_weights_fwd<CudaMemory>));
  m.impl("directional_weights_bwd_cuda", TORCH_BOX(&directional_weights_bwd<CudaMemory>));
  m.impl("read_memory_fwd_cuda", TORCH_BOX(&read_memory_fwd<CudaMemory>));
  m.impl("read_memory_bwd_cuda", TORCH_BOX(&read_memory_bwd<CudaMemory>));
  m.impl("write_memory_fwd_cuda", TORCH_BOX(&write_memory_fwd<CudaMemory>));
  m.impl("write_memory_bwd_cuda", TORCH_BOX(&write_memory_bwd<CudaMemory>));
}
