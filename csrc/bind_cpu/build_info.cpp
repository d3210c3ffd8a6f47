// Operators without tensors: what this library was built from, and the instruction set its kernels use here.
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_info.h"
#include "cpu/dispatch.h"

namespace {

std::string build_info() { return MK_BUILD_INFO; }

std::string cpu_isa() { return memkern::cpu::isa_name(memkern::cpu::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkern, m) {
  m.def("build_info_cpu() -> str");
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(memkern, CompositeExplicitAutograd, m) {
  m.impl("build_info_cpu", TORCH_BOX(&build_info));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
