// The parts of a memory step: memkern::content_weights_*_cpp and their like.
#include "bind_cpu/memory.h"

#include "common/binding_memory_parts.h"

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) {
  using namespace memkern::bind;
  m.impl("content_weights_fwd_cpp", TORCH_BOX(&content_weights_fwd<CpuMemory>));
  m.impl("content_weights_bwd_cpp", TORCH_BOX(&content_weights_bwd<CpuMemory>));
  m.impl("sharpen_fwd_cpp", TORCH_BOX(&sharpen_fwd<CpuMemory>));
  m.impl("sharpen_bwd_cpp", TORCH_BOX(&sharpen_bwd<CpuMemory>));
  m.impl("allocation_weights_fwd_cpp", TORCH_BOX(&allocation_weights_fwd<CpuMemory>));
  m.impl("allocation_weights_bwd_cpp", TORCH_BOX(&allocation_weights_bwd<CpuMemory>));
  m.impl("update_usage_fwd_cpp", TORCH_BOX(&update_usage_fwd<CpuMemory>));
  m.impl("update_usage_bwd_cpp", TORCH_BOX(&update_usage_bwd<CpuMemory>));
  m.impl("update_links_fwd_cpp", TORCH_BOX(&update_links_fwd<CpuMemory>));
  m.impl("update_links_bwd_cpp", TORCH_BOX(&update_links_bwd<CpuMemory>));
  m.impl("directional_weights_fwd_cpp", TORCH_BOX(&directional_weights_fwd<CpuMemory>));
  m.impl("directional_weights_bwd_cpp", TORCH_BOX(&directional_weights_bwd<CpuMemory>));
  m.impl("read_memory_fwd_cpp", TORCH_BOX(&read_memory_fwd<CpuMemory>));
  m.impl("read_memory_bwd_cpp", TORCH_BOX(&read_memory_bwd<CpuMemory>));
  m.impl("write_memory_fwd_cpp", TORCH_BOX(&write_memory_fwd<CpuMemory>));
  m.impl("write_memory_bwd_cpp", TORCH_BOX(&write_memory_bwd<CpuMemory>));
}
