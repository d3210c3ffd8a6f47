// matmul_rows: a float32 product on the CPU into a given output.
#include "bind_cpu/common.h"
#include "ops/matmul.h"

namespace {

using namespace memkern;
using namespace memkern::bind;

void matmul_rows(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  cpu::MatMul p{};
  p.run = parallel_for;
  p.M = a.size(0);
  p.K = a.size(1);
  p.N = b.size(1);
  STD_TORCH_CHECK(b.size(0) == p.K && out.size(0) == p.M && out.size(1) == p.N && out.stride(1) == 1,
                  "matmul_rows: expected (M, N), (M, K) and (K, N), the output with stride 1 along its rows");
  for (const Tensor& t : {out, a, b}) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "matmul_rows: expected float32 tensors");
  }
  p.a = ptr<float>(a);
  p.a_row = a.stride(0);
  p.a_col = a.stride(1);
  p.b = ptr<float>(b);
  p.b_row = b.stride(0);
  p.b_col = b.stride(1);
  p.out = static_cast<float*>(out.data_ptr());
  p.out_row = out.stride(0);
  p.add = add;
  cpu::matmul_table().matmul(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkern, m) {
  m.def("matmul_rows(Tensor(a!) out, Tensor a, Tensor b, bool add=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) { m.impl("matmul_rows", TORCH_BOX(&matmul_rows)); }
