// Gated sources: the softmax of a row's gates weighs its sources, which are read once.
#include "ops/retrieval.h"

#include "cpu/isa.h"

#include "common/vec.h"
#include "cpu/retrieval/kernels.h"
#include "cpu/retrieval/rows.h"

namespace memkern::cpu::MK_NS {

namespace {

// gate[i] for source i of one row: softmax over the present ones.
template <class A>
void gates_of(const FuseSources& p, int64_t row, A* gate) {
  const A* logits = static_cast<const A*>(p.gates) + row * p.columns;
  for (int64_t i = 0; i < p.sources; ++i) gate[i] = logits[p.column[i]];
  const A mass = exponentials(gate, p.sources, largest(gate, p.sources));
  for (int64_t i = 0; i < p.sources; ++i) gate[i] /= mass;
}

template <class T>
void fuse_fwd_of(const FuseSources& p) {
  using A = acc_t<T>;
  parallel(p.threads, p.rows, 1 + 16384 / (1 + p.width), [&](int64_t begin, int64_t end) {
    A gate[kMaxSources];
    for (int64_t row = begin; row < end; ++row) {
      gates_of(p, row, gate);
      T* out = static_cast<T*>(p.out) + row * p.width;
      for_each_vec<A>(p.width, [&](int64_t d, auto count) {
        Vec<A> sum = load_part(static_cast<const T*>(p.source[0]) + row * p.width + d, count) * gate[0];
        for (int64_t i = 1; i < p.sources; ++i) {
          sum = fma(load_part(static_cast<const T*>(p.source[i]) + row * p.width + d, count), Vec<A>(gate[i]), sum);
        }
        store_part(out + d, sum, count);
      });
    }
  });
}

template <class T>
void fuse_bwd_of(const FuseSources& p) {
  using A = acc_t<T>;
  parallel(p.threads, p.rows, 1 + 16384 / (1 + p.width), [&](int64_t begin, int64_t end) {
    A gate[kMaxSources], slope[kMaxSources];
    for (int64_t row = begin; row < end; ++row) {
      gates_of(p, row, gate);
      const T* grad = static_cast<const T*>(p.grad) + row * p.width;
      A mean = 0;
      for (int64_t i = 0; i < p.sources; ++i) {
        const T* source = static_cast<const T*>(p.source[i]) + row * p.width;
        T* d_source = static_cast<T*>(p.d_source[i]) + row * p.width;
        Vec<A> sum(A(0));
        for_each_vec<A>(p.width, [&](int64_t d, auto count) {
          const Vec<A> g = load_part(grad + d, count);
          sum = fma(load_part(source + d, count), g, sum);
          store_part(d_source + d, g * gate[i], count);
        });
        slope[i] = reduce_sum(sum);
        mean += gate[i] * slope[i];
      }
      A* d_gates = static_cast<A*>(p.d_gates) + row * p.columns;
      std::fill(d_gates, d_gates + p.columns, A(0));
      for (int64_t i = 0; i < p.sources; ++i) d_gates[p.column[i]] = gate[i] * (slope[i] - mean);
    }
  });
}

}  // namespace

void fuse_forward(const FuseSources& p) { MK_DISPATCH(p.dtype, T, { fuse_fwd_of<T>(p); }) }
void fuse_backward(const FuseSources& p) { MK_DISPATCH(p.dtype, T, { fuse_bwd_of<T>(p); }) }

}  // namespace memkern::cpu::MK_NS
