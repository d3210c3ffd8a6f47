// matmul_rows: a product of float32 or bfloat16 on the CPU into a given output of float32.
#include "bind_cpu/common.h"
#include "ops/matmul.h"

namespace {

using namespace memkern;
using namespace memkern::bind;

// Where bfloat16 pairs lie side by side: strides in pairs, of what was measured in elements.
int64_t halved(int64_t stride) {
  STD_TORCH_CHECK(stride % 2 == 0, "matmul_rows: expected bfloat16 with even strides and depth, and stride 1 along it");
  return stride / 2;
}

void matmul_rows(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const bool pairs = a.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(b.size(0) == a.size(1) && out.size(0) == a.size(0) && out.size(1) == b.size(1) && out.stride(1) == 1,
                  "matmul_rows: expected (M, N), (M, K) and (K, N), the output with stride 1 along its rows");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && a.scalar_type() == b.scalar_type() &&
                      (pairs || a.scalar_type() == ScalarType::Float),
                  "matmul_rows: expected float32 or bfloat16 factors and a float32 output");
  const auto product = pairs ? cpu::matmul_table().pairs() : cpu::matmul_table().floats;
  STD_TORCH_CHECK(product != nullptr, "matmul_rows: this processor does not multiply pairs of bfloat16");
  cpu::MatMul p{};
  p.run = parallel_for;
  p.M = a.size(0);
  p.N = b.size(1);
  if (pairs) {
    STD_TORCH_CHECK(a.stride(1) == 1 && b.stride(0) == 1, "matmul_rows: expected bfloat16 with stride 1 along the depth");
    p.K = halved(a.size(1));
    p.a_row = halved(a.stride(0));
    p.b_col = halved(b.stride(1));
    p.a_col = p.b_row = 1;
  } else {
    p.K = a.size(1);
    p.a_row = a.stride(0);
    p.a_col = a.stride(1);
    p.b_row = b.stride(0);
    p.b_col = b.stride(1);
  }
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.out = static_cast<float*>(out.data_ptr());
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
