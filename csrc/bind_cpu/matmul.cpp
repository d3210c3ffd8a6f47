// matmul_rows: a product of float32 or bfloat16 on the CPU into a given output.
#include "bind_cpu/common.h"
#include "ops/matmul.h"

namespace {

using namespace memkern;
using namespace memkern::bind;

void matmul_rows(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const auto type = a.scalar_type();
  const bool pairs = type == ScalarType::BFloat16, rounded = out.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(b.size(0) == a.size(1) && out.size(0) == a.size(0) && out.size(1) == b.size(1) && out.stride(1) == 1,
                  "matmul_rows: expected (M, N), (M, K) and (K, N), the output with stride 1 along its rows");
  STD_TORCH_CHECK((pairs || type == ScalarType::Float) && b.scalar_type() == type,
                  "matmul_rows: expected both factors in float32 or both in bfloat16");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float || (pairs && rounded && !add),
                  "matmul_rows: expected an output of float32; of bfloat16 it takes what is not added");
  const auto product = pairs ? cpu::matmul_table().pairs() : cpu::matmul_table().floats;
  STD_TORCH_CHECK(product != nullptr, "matmul_rows: this processor does not multiply pairs of bfloat16");
  cpu::MatMul p{};
  p.run = parallel_for;
  p.M = a.size(0);
  p.N = b.size(1);
  p.K = a.size(1);
  p.a = a.const_data_ptr();
  p.a_row = a.stride(0);
  p.a_col = a.stride(1);
  p.b = b.const_data_ptr();
  p.b_row = b.stride(0);
  p.b_col = b.stride(1);
  p.out = rounded ? nullptr : static_cast<float*>(out.data_ptr());
  p.rounded = rounded ? static_cast<bf16*>(out.data_ptr()) : nullptr;
  p.out_row = out.stride(0);
  p.add = add;
  product(p);
}

bool matmul_takes_bf16() { return cpu::matmul_table().pairs() != nullptr; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkern, m) {
  m.def("matmul_rows(Tensor(a!) out, Tensor a, Tensor b, bool add=False) -> ()");
  m.def("matmul_takes_bf16() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) { m.impl("matmul_rows", TORCH_BOX(&matmul_rows)); }

STABLE_TORCH_LIBRARY_IMPL(memkern, CompositeExplicitAutograd, m) {
  m.impl("matmul_takes_bf16", TORCH_BOX(&matmul_takes_bf16));
}
