// What this library was built from, as an operator without tensors.
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_info.h"

namespace {

std::string build_info() { return MK_BUILD_INFO; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkern, m) { m.def("build_info_cuda() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(memkern, CompositeExplicitAutograd, m) { m.impl("build_info_cuda", TORCH_BOX(&build_info)); }
