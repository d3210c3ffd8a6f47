// cpu_read and cpu_fma: the loops whose rates are the limits in a benchmark of the CPU operators.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "ops/limits.h"

namespace {

int64_t cpu_read(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "x: expected a contiguous tensor");
  const auto size = static_cast<std::size_t>(x.numel()) * x.element_size();
  return static_cast<int64_t>(memkern::cpu::limits_table().read(x.const_data_ptr(), size));
}

int64_t cpu_fma(int64_t rounds) {
  float out = 0.0f;
  const int64_t operations = memkern::cpu::limits_table().fma(rounds, &out);
  STD_TORCH_CHECK(out == out, "the sum of the chains is not a number");
  return operations;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkern, m) {
  m.def("cpu_read(Tensor x) -> int");
  m.def("cpu_fma(int rounds) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) { m.impl("cpu_read", TORCH_BOX(&cpu_read)); }

STABLE_TORCH_LIBRARY_IMPL(memkern, CompositeExplicitAutograd, m) { m.impl("cpu_fma", TORCH_BOX(&cpu_fma)); }
