// memkern::memory_step_*_cpp and memory_scan_*_cpp.
#include "bind_cpu/memory.h"

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) {
  using namespace memkern::bind;
  m.impl("memory_step_fwd_cpp", TORCH_BOX(&memory_step_fwd<CpuMemory>));
  m.impl("memory_step_bwd_cpp", TORCH_BOX(&memory_step_bwd<CpuMemory>));
  m.impl("memory_scan_fwd_cpp", TORCH_BOX(&memory_scan_fwd<CpuMemory>));
  m.impl("memory_scan_bwd_cpp", TORCH_BOX(&memory_scan_bwd<CpuMemory>));
}
