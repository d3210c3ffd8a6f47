// Retrieval on the CPU. All of it is bound by memory: a query's keys and values are read once, row after row, and what
// is computed from them stays in cache.
#include "ops/retrieval.h"

#include "cpu/isa.h"

#include "common/vec.h"

namespace memkern::cpu::MK_NS {

namespace {

// ---- rows ----

// n elements of p, times scale, as accumulators; up to the next whole vector the rest is zero.
template <class T>
void widen(const T* p, acc_t<T> scale, acc_t<T>* out, int64_t n) {
  using A = acc_t<T>;
  for_each_vec<A>(n, [&](int64_t i, auto count) { store(out + i, load_part(p + i, count) * scale); });
}

// The dtype of queries may be another than that of the pairs; one row of them is small.
template <class A>
void widen_any(DType dtype, const void* base, int64_t first, A scale, A* out, int64_t n) {
  MK_DISPATCH(dtype, T, {
    if constexpr (std::is_same_v<acc_t<T>, A>) widen(static_cast<const T*>(base) + first, scale, out, n);
  })
}

template <class A>
void narrow_any(DType dtype, const A* in, A scale, void* base, int64_t first, int64_t n) {
  MK_DISPATCH(dtype, T, {
    if constexpr (std::is_same_v<acc_t<T>, A>) {
      T* out = static_cast<T*>(base) + first;
      for_each_vec<A>(n, [&](int64_t i, auto count) { store_part(out + i, load(in + i) * scale, count); });
    }
  })
}

// out = factor x (or out += factor x); x is padded to whole vectors.
template <bool Add, class T>
MK_INLINE void scaled(acc_t<T> factor, const acc_t<T>* x, T* out, int64_t n) {
  using A = acc_t<T>;
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    const Vec<A> product = load(x + i) * factor;
    store_part(out + i, Add ? load_part(out + i, count) + product : product, count);
  });
}

// The pairs of one query that take part: how far their rows lie from the base, and which pair each of them is.
template <class A>
struct Present {
  Scratch<int64_t, 256> key, value, pair;
  Scratch<A, 256> weight, slope;
  int64_t size = 0;

  Present(int64_t pairs) : key(pairs), value(pairs), pair(pairs), weight(pairs + 16), slope(pairs + 16) {}

  static void gather(Present& self, const RetrievedAttention& p, int64_t b, int64_t a, int64_t t) {
    const int64_t row = ((b * p.heads + a) * p.count + t) * p.pairs;
    const PairStrides &k = p.key_strides, &v = p.value_strides;
    const int64_t k0 = b * k.b + a * k.a + t * k.t, v0 = b * v.b + a * v.a + t * v.t;
    int64_t n = 0;
    for (int64_t c = 0; c < p.pairs; ++c) {
      const int64_t at = p.bank >= 0 ? p.indices[row + c] : c;
      const bool inside = p.bank < 0 || (at >= 0 && at < p.bank);
      if (!inside || (p.mask != nullptr && !p.mask[row + c])) continue;
      self.key[n] = k0 + at * k.c;
      self.value[n] = v0 + at * v.c;
      self.pair[n++] = c;
    }
    self.size = n;
  }
};

// Asks for the rows of the next query while those of this one are worked on, once for every four of them, and at four
// places: reading one place after the other, a core does not reach its share of the memory's bandwidth.
template <class T>
struct Prefetcher {
  const T *keys, *values;
  const Present<acc_t<T>>* next;  // null: nothing to ask for
  int64_t width, step = 0;

  __attribute__((always_inline)) inline void advance() {
    if (next == nullptr) return;
    const int64_t half = (next->size + 1) / 2, i = step++;
    if (i >= half) return;
    const int64_t j = i + half < next->size ? i + half : i;
    const T *k0 = keys + next->key[i], *k1 = keys + next->key[j];
    const T *v0 = values + next->value[i], *v1 = values + next->value[j];
    for (int64_t e = 0; e < width; e += 64 / int64_t(sizeof(T))) {
      prefetch(k0 + e);
      prefetch(k1 + e);
      prefetch(v0 + e);
      prefetch(v1 + e);
    }
  }
};

// The queries [begin, end) one after the other, each with a prefetcher for the one behind it.
template <class T>
class Queries {
 public:
  using A = acc_t<T>;
  struct Taken {
    Present<A>& present;
    Prefetcher<T> ahead;
  };

  Queries(const RetrievedAttention& p, int64_t begin, int64_t end) : p_(p), end_(end), two_{p.pairs, p.pairs} {
    if (begin < end) gather(begin);
  }

  Taken take(int64_t row) {
    const bool more = row + 1 < end_;
    if (more) gather(row + 1);
    return {two_[row % 2],
            {static_cast<const T*>(p_.keys), static_cast<const T*>(p_.values), more && p_.bank >= 0 ? &two_[(row + 1) % 2] : nullptr,
             p_.width}};
  }

 private:
  void gather(int64_t row) {
    Present<A>::gather(two_[row % 2], p_, row / p_.count / p_.heads, row / p_.count % p_.heads, row % p_.count);
  }

  const RetrievedAttention& p_;
  int64_t end_;
  Present<A> two_[2];
};

// dots[i] = x . rows[at[i]]. One row after the other: the processor overlaps their sums by itself, and its prefetcher
// wants rising addresses (four rows in step halve the rate). x is padded.
template <class T>
void dots(const T* rows, const int64_t* at, int64_t n, const acc_t<T>* x, int64_t width, acc_t<T>* out,
          Prefetcher<T>& ahead) {
  using A = acc_t<T>;
  for (int64_t first = 0; first < n; first += 4) {
    ahead.advance();
    for (int64_t i = first; i < std::min(first + 4, n); ++i) {
      const T* r = rows + at[i];
      Vec<A> s(A(0));
      for_each_vec<A>(width, [&](int64_t d, auto count) { s = fma(load_part(r + d, count), load(x + d), s); });
      out[i] = reduce_sum(s);
    }
  }
}

// out = keep out + sum_i weight[i] rows[at[i]], in order; out is padded to whole vectors.
template <class T>
void mix(const T* rows, const int64_t* at, const acc_t<T>* weight, int64_t n, int64_t width, acc_t<T> keep,
         acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr int64_t N = Vec<A>::N;
  int64_t d = 0;
  for (; d + 4 * N <= width; d += 4 * N) {
    Vec<A> s0 = load(out + d) * keep, s1 = load(out + d + N) * keep;
    Vec<A> s2 = load(out + d + 2 * N) * keep, s3 = load(out + d + 3 * N) * keep;
    for (int64_t i = 0; i < n; ++i) {
      const T* r = rows + at[i] + d;
      const Vec<A> w(weight[i]);
      s0 = fma(load(r), w, s0);
      s1 = fma(load(r + N), w, s1);
      s2 = fma(load(r + 2 * N), w, s2);
      s3 = fma(load(r + 3 * N), w, s3);
    }
    store(out + d, s0);
    store(out + d + N, s1);
    store(out + d + 2 * N, s2);
    store(out + d + 3 * N, s3);
  }
  for_each_vec<A>(width - d, [&](int64_t e, auto count) {
    Vec<A> s = load(out + d + e) * keep;
    for (int64_t i = 0; i < n; ++i) s = fma(load_part(rows + at[i] + d + e, count), Vec<A>(weight[i]), s);
    store(out + d + e, s);
  });
}

// x[i] = exp(x[i] - base); returns their sum.
template <class A>
A exponentials(A* x, int64_t n, A base) {
  Vec<A> sum(A(0));
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    const Vec<A> e = exp(load_part(x + i, count) - base);
    store_part(x + i, e, count);
    sum += load_part(x + i, count);
  });
  return reduce_sum(sum);
}

template <class A>
A larger(A a, A b) {
  return b > a || b != b ? b : a;
}

// NaN when there is one, -inf for none.
template <class A>
A largest(const A* x, int64_t n) {
  A best = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < n; ++i) best = larger(best, x[i]);
  return best;
}

template <class A>
int64_t padded(int64_t n) {
  return (n + Vec<A>::N - 1) / Vec<A>::N * Vec<A>::N;
}

// ---- attention ----

// A page of keys, then a page of values, and so on: measured up to twice as fast as all keys before all values.
// Half a page where rows are of floats, which gains a tenth there and loses as much where they are of 16 bits.
template <class T>
constexpr int64_t kPage = sizeof(T) == 2 ? 4096 : 2048;
constexpr int64_t kTurn = 64;

template <class T>
void attention_fwd_of(const RetrievedAttention& p) {
  using A = acc_t<T>;
  const T *keys = static_cast<const T*>(p.keys), *values = static_cast<const T*>(p.values);
  const int64_t rows = p.batch * p.heads * p.count;
  parallel(p.threads, rows, 1 + 16384 / (1 + p.pairs * p.width), [&](int64_t begin, int64_t end) {
    Queries<T> queries(p, begin, end);
    const int64_t row_bytes = std::max<int64_t>(p.width, 1) * int64_t(sizeof(T));
    const int64_t longest = std::max<int64_t>(1, std::min(kTurn, kPage<T> / row_bytes));
    Scratch<A, 512> query(padded<A>(p.width)), sum(padded<A>(p.width));
    for (int64_t row = begin; row < end; ++row) {
      auto [present, ahead] = queries.take(row);
      const int64_t n = present.size;
      widen_any(p.query_dtype, p.queries, row * p.width, A(p.scale), query.get(), p.width);
      std::fill(sum.get(), sum.get() + padded<A>(p.width), A(0));
      A best = -std::numeric_limits<A>::infinity(), mass = 0;
      for (int64_t first = 0; first < n; first += longest) {
        const int64_t turn = std::min(longest, n - first);
        A weight[kTurn];
        dots(keys, present.key.get() + first, turn, query.get(), p.width, weight, ahead);
        const A higher = larger(best, largest(weight, turn));
        const A keep = first == 0 ? A(0) : std::exp(best - higher);
        mass = mass * keep + exponentials(weight, turn, higher);
        mix(values, present.value.get() + first, weight, turn, p.width, keep, sum.get());
        best = higher;
      }
      narrow_any(p.query_dtype, sum.get(), n == 0 ? A(0) : 1 / mass, p.out, row * p.width, p.width);
      static_cast<A*>(p.lse)[row] = n == 0 ? -std::numeric_limits<A>::infinity() : best + std::log(mass);
    }
  });
}

// Weights and the slopes of the loss along the scores of one query: weight = exp(score - lse), slope = weight
// (grad . value - sum weight (grad . value)).
template <class T>
void weights_and_slopes(const RetrievedAttention& p, Present<acc_t<T>>& present, const acc_t<T>* query,
                        const acc_t<T>* grad, acc_t<T> lse, Prefetcher<T>& ahead) {
  using A = acc_t<T>;
  const int64_t n = present.size;
  A *weight = present.weight.get(), *slope = present.slope.get();
  dots(static_cast<const T*>(p.keys), present.key.get(), n, query, p.width, weight, ahead);
  exponentials(weight, n, lse);
  dots(static_cast<const T*>(p.values), present.value.get(), n, grad, p.width, slope, ahead);
  Vec<A> mean(A(0));
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    mean = fma(load_part(weight + i, count), load_part(slope + i, count), mean);
  });
  const A all = reduce_sum(mean);
  for_each_vec<A>(n, [&](int64_t i, auto count) {
    store_part(slope + i, load_part(weight + i, count) * (load_part(slope + i, count) - all), count);
  });
}

template <class T>
void own_bwd(const RetrievedAttention& p) {
  using A = acc_t<T>;
  const int64_t rows = p.batch * p.heads * p.count;
  parallel(p.threads, rows, 1 + 16384 / (1 + p.pairs * p.width), [&](int64_t begin, int64_t end) {
    Queries<T> queries(p, begin, end);
    const int64_t wide = padded<A>(p.width);
    Scratch<A, 512> query(wide), grad(wide), sum(wide);
    for (int64_t row = begin; row < end; ++row) {
      auto [present, ahead] = queries.take(row);
      widen_any(p.query_dtype, p.queries, row * p.width, A(p.scale), query.get(), p.width);
      widen_any(p.query_dtype, p.grad, row * p.width, A(1), grad.get(), p.width);
      weights_and_slopes<T>(p, present, query.get(), grad.get(), static_cast<const A*>(p.lse)[row], ahead);
      if (p.d_queries != nullptr) {
        std::fill(sum.get(), sum.get() + wide, A(0));
        mix(static_cast<const T*>(p.keys), present.key.get(), present.slope.get(), present.size, p.width, A(0),
            sum.get());
        narrow_any(p.query_dtype, sum.get(), A(p.scale), p.d_queries, row * p.width, p.width);
      }
      if (p.d_keys == nullptr) continue;
      T* d_keys = static_cast<T*>(p.d_keys) + row * p.pairs * p.width;
      T* d_values = static_cast<T*>(p.d_values) + row * p.pairs * p.width;
      int64_t i = 0;
      for (int64_t c = 0; c < p.pairs; ++c) {
        if (i < present.size && present.pair[i] == c) {
          scaled<false>(present.slope[i], query.get(), d_keys + c * p.width, p.width);
          scaled<false>(present.weight[i], grad.get(), d_values + c * p.width, p.width);
          ++i;
        } else {
          std::memset(d_keys + c * p.width, 0, size_t(p.width) * sizeof(T));
          std::memset(d_values + c * p.width, 0, size_t(p.width) * sizeof(T));
        }
      }
    }
  });
}

// One plane (b, a) at a time: its queries add to the rows of its bank in the order of (t, c), whatever the threads.
template <class T>
void bank_bwd(const RetrievedAttention& p) {
  using A = acc_t<T>;
  constexpr bool kDirect = std::is_same_v<T, A>;
  parallel(p.threads, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    Queries<T> queries(p, begin * p.count, end * p.count);
    const int64_t wide = padded<A>(p.width), size = p.bank * p.width;
    const bool sums = p.d_keys != nullptr;
    Scratch<A, 512> query(wide), grad(wide), sum(wide);
    Scratch<A> key_sums(sums && !kDirect ? size : 0), value_sums(sums && !kDirect ? size : 0);
    for (int64_t plane = begin; plane < end; ++plane) {
      T *d_keys = static_cast<T*>(p.d_keys) + plane * size, *d_values = static_cast<T*>(p.d_values) + plane * size;
      A *to_keys = key_sums.get(), *to_values = value_sums.get();
      if constexpr (kDirect) {
        to_keys = d_keys;
        to_values = d_values;
      }
      if (sums) {
        std::memset(to_keys, 0, size_t(size) * sizeof(A));
        std::memset(to_values, 0, size_t(size) * sizeof(A));
      }
      for (int64_t t = 0; t < p.count; ++t) {
        const int64_t row = plane * p.count + t;
        auto [present, ahead] = queries.take(row);
        widen_any(p.query_dtype, p.queries, row * p.width, A(p.scale), query.get(), p.width);
        widen_any(p.query_dtype, p.grad, row * p.width, A(1), grad.get(), p.width);
        weights_and_slopes<T>(p, present, query.get(), grad.get(), static_cast<const A*>(p.lse)[row], ahead);
        if (p.d_queries != nullptr) {
          std::fill(sum.get(), sum.get() + wide, A(0));
          mix(static_cast<const T*>(p.keys), present.key.get(), present.slope.get(), present.size, p.width, A(0),
              sum.get());
          narrow_any(p.query_dtype, sum.get(), A(p.scale), p.d_queries, row * p.width, p.width);
        }
        for (int64_t i = 0; sums && i < present.size; ++i) {
          const int64_t to = p.indices[row * p.pairs + present.pair[i]] * p.width;
          scaled<true>(present.slope[i], query.get(), to_keys + to, p.width);
          scaled<true>(present.weight[i], grad.get(), to_values + to, p.width);
        }
      }
      if (sums && !kDirect) {
        for_each_vec<A>(size, [&](int64_t i, auto count) {
          store_part(d_keys + i, load_part(to_keys + i, count), count);
          store_part(d_values + i, load_part(to_values + i, count), count);
        });
      }
    }
  });
}

void attention_fwd(const RetrievedAttention& p) { MK_DISPATCH(p.dtype, T, { attention_fwd_of<T>(p); }) }

void attention_bwd(const RetrievedAttention& p) {
  MK_DISPATCH(p.dtype, T, { p.bank < 0 ? own_bwd<T>(p) : bank_bwd<T>(p); })
}

// ---- fusion ----

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

void fuse_fwd(const FuseSources& p) { MK_DISPATCH(p.dtype, T, { fuse_fwd_of<T>(p); }) }
void fuse_bwd(const FuseSources& p) { MK_DISPATCH(p.dtype, T, { fuse_bwd_of<T>(p); }) }

// ---- span loss ----

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

void span_fwd(const SpanLoss& p) { p.dtype == DType::kF64 ? span_fwd_of<double>(p) : span_fwd_of<float>(p); }
void span_bwd(const SpanLoss& p) { p.dtype == DType::kF64 ? span_bwd_of<double>(p) : span_bwd_of<float>(p); }

}  // namespace

extern const RetrievalTable retrieval = {attention_fwd, attention_bwd, fuse_fwd, fuse_bwd, span_fwd, span_bwd};

}  // namespace memkern::cpu::MK_NS
