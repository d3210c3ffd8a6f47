// memkern::memory_step_*_cuda and memory_scan_*_cuda.
#include "bind_cuda/memory.h"

STABLE_TORCH_LIBRARY_IMPL(memkern, CUDA, m) {
  using namespace memkern::bind;
  m.impl("memory_step_fwd_cuda", TORCH_BOX(&memory_step_fwd<CudaMemory>));
  m.impl("memory_step_bwd_cuda", TORCH_BOX(&memory_step_bwd<CudaMemory>));
  m.impl("memory_scan_fwd_cuda", TORCH_BOX(&memory_scan_fwd<CudaMemory>));
  m.impl("memory_scan_bwd_cuda", TORCH_BOX(&memory_scan_bwd<CudaMemory>));
}
