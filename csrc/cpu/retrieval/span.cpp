// The span loss: log masses of the segments of a document, joined in their order.
#include "ops/retrieval.h"

#include "cpu/isa.h"

#include "common/vec.h"
#include "cpu/retrieval/kernels.h"
#include "cpu/retrieval/rows.h"

namespace memkern::cpu::MK_NS {

namespace {

// log sum exp of the n values, -inf for none; the values are overwritten.
template <class A>
A log_mass(A* x, int64_t n) {
  if (n == 0) return -std::numeric_limits<A>::infinity();
  const A best = largest(x, n);
  if (best == -std::numeric_limits<A>::infinity()) return best;
  return best + std::log(exponentials(x, n, best));
}

template <class A>
void span_fwd_of(const SpanLoss& p) {
  const A infinity = std::numeric_limits<A>::infinity();
  const int64_t n = p.segments;
  Scratch<A, 256> partial(4 * n);
  A* stats = static_cast<A*>(p.stats);
  parallel(p.threads, n, 1 + 8192 / (1 + p.tokens), [&](int64_t begin, int64_t end) {
    Scratch<A, 1024> all(p.tokens), right(p.tokens);
    for (int64_t s = begin; s < end; ++s) {
      const bool* valid = p.valid + s * p.tokens;
      for (int side = 0; side < 2; ++side) {
        const A* logits = static_cast<const A*>(p.logits[side]) + s * p.tokens;
        const bool* positive = p.positive[side] + s * p.tokens;
        int64_t valids = 0, rights = 0;
        for (int64_t t = 0; t < p.tokens; ++t) {
          if (!valid[t]) continue;
          all[valids++] = logits[t];
          if (positive[t]) right[rights++] = logits[t];
        }
        partial[2 * side * n + s] = log_mass(all.get(), valids);
        partial[(2 * side + 1) * n + s] = log_mass(right.get(), rights);
      }
    }
  });
  // Segments by document, in their order, without a table of documents that grows with anything but N.
  Scratch<int64_t, 256> first(n + 1), member(n);
  std::fill(first.get(), first.get() + n + 1, int64_t{0});
  for (int64_t s = 0; s < n; ++s) {
    if (p.document[s] >= 0 && p.document[s] < n) ++first[p.document[s] + 1];
  }
  for (int64_t d = 0; d < n; ++d) first[d + 1] += first[d];
  for (int64_t s = 0; s < n; ++s) {
    if (p.document[s] >= 0 && p.document[s] < n) member[first[p.document[s]]++] = s;
  }
  Scratch<A, 256> values(n);
  A total = 0;
  int64_t counted = 0, begin = 0;
  for (int64_t d = 0; d < n; ++d) {
    const int64_t end = first[d];  // filled up: the place behind its last segment
    A mass[4];
    for (int side = 0; side < 4; ++side) {
      for (int64_t i = begin; i < end; ++i) values[i - begin] = partial[side * n + member[i]];
      mass[side] = log_mass(values.get(), end - begin);
    }
    begin = end;
    const bool counts = mass[1] != -infinity && mass[3] != -infinity;
    for (int side = 0; side < 4; ++side) stats[side * n + d] = counts ? mass[side] : infinity;
    if (counts) {
      total += A(0.5) * ((mass[0] - mass[1]) + (mass[2] - mass[3]));
      ++counted;
    }
  }
  *static_cast<A*>(p.loss) = total / A(std::max<int64_t>(counted, 1));
}

template <class A>
void span_bwd_of(const SpanLoss& p) {
  const A infinity = std::numeric_limits<A>::infinity();
  const A* stats = static_cast<const A*>(p.stats);
  int64_t counted = 0;
  for (int64_t d = 0; d < p.segments; ++d) counted += stats[d] != infinity;
  const A factor = A(0.5) * *static_cast<const A*>(p.grad) / A(std::max<int64_t>(counted, 1));
  parallel(p.threads, p.segments, 1 + 8192 / (1 + p.tokens), [&](int64_t begin, int64_t end) {
    Scratch<A, 1024> all(p.tokens), right(p.tokens);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t d = p.document[s];
      const bool counts = d >= 0 && d < p.segments && stats[d] != infinity;
      const bool* valid = p.valid + s * p.tokens;
      for (int side = 0; side < 2; ++side) {
        const A* logits = static_cast<const A*>(p.logits[side]) + s * p.tokens;
        const bool* positive = p.positive[side] + s * p.tokens;
        A* out = static_cast<A*>(p.d_logits[side]) + s * p.tokens;
        if (!counts) {
          std::fill(out, out + p.tokens, A(0));
          continue;
        }
        std::copy(logits, logits + p.tokens, all.get());
        std::copy(logits, logits + p.tokens, right.get());
        exponentials(all.get(), p.tokens, stats[2 * side * p.segments + d]);
        exponentials(right.get(), p.tokens, stats[(2 * side + 1) * p.segments + d]);
        for (int64_t t = 0; t < p.tokens; ++t) {
          out[t] = valid[t] ? factor * (all[t] - (positive[t] ? right[t] : A(0))) : A(0);
        }
      }
    }
  });
}

}  // namespace

void span_forward(const SpanLoss& p) { p.dtype == DType::kF64 ? span_fwd_of<double>(p) : span_fwd_of<float>(p); }
void span_backward(const SpanLoss& p) { p.dtype == DType::kF64 ? span_bwd_of<double>(p) : span_bwd_of<float>(p); }

}  // namespace memkern::cpu::MK_NS
