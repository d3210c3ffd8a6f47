// One query after the other: which of its pairs take part, and, where they lie anywhere in a bank, what is fetched ahead.
// Include after rows.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

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
    const Present<A>* next = more && p_.bank >= 0 ? &two_[(row + 1) % 2] : nullptr;
    return {two_[row % 2], {static_cast<const T*>(p_.keys), static_cast<const T*>(p_.values), next, p_.width}};
  }

 private:
  void gather(int64_t row) {
    Present<A>::gather(two_[row % 2], p_, row / p_.count / p_.heads, row / p_.count % p_.heads, row % p_.count);
  }

  const RetrievedAttention& p_;
  int64_t end_;
  Present<A> two_[2];
};

// out[i] = x . rows[at[i]]. One row after the other: the processor overlaps their sums by itself, and its prefetcher
// wants rising addresses (four rows in step halve the rate). x is padded.
template <class T>
void dots(const T* rows, const int64_t* at, int64_t n, const acc_t<T>* x, int64_t width, acc_t<T>* out,
          Prefetcher<T>& ahead) {
  for (int64_t first = 0; first < n; first += 4) {
    ahead.advance();
    for (int64_t i = first; i < std::min(first + 4, n); ++i) out[i] = dot(rows + at[i], x, width);
  }
}

// A page of keys, then a page of values, and so on: measured up to twice as fast as all keys before all values.
// Half a page where rows are of floats, which gains a tenth there and loses as much where they are of 16 bits.
template <class T>
constexpr int64_t kPage = sizeof(T) == 2 ? 4096 : 2048;
constexpr int64_t kTurn = 64;

template <class T>
void forward_by_query(const RetrievedAttention& p) {
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

}  // namespace
}  // namespace memkern::cpu::MK_NS
