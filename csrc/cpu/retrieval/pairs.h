// The pairs that a query brings along, as rows of its keys and values. Include after dense.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

// Rows of one query: row i lies at base + at[i].
template <class T>
struct Rows {
  const T* base;
  const int64_t* at;
  int64_t count;
  int64_t ahead;  // to the row that is fetched, in elements
};

// How many rows ahead of the one that is read another is fetched.
template <class T>
int64_t ahead_of(int64_t width) {
  return std::max<int64_t>(1, kAheadBytes / std::max<int64_t>(1, width * int64_t(sizeof(T))));
}

// The pairs of a query that take part, as distances from its first row; the same for all queries without a mask.
class Pairs {
 public:
  explicit Pairs(const RetrievedAttention& p) : p_(p), key_(2 * p.pairs), value_(2 * p.pairs), place_(2 * p.pairs) {
    for (int i = 0; p.mask == nullptr && i < 2; ++i) fill(i, nullptr);
  }

  void gather(int64_t row) {
    if (p_.mask != nullptr) fill(row % 2, p_.mask + row * p_.pairs);
  }
  // Of one of the last two rows that were gathered.
  const int64_t* key(int64_t row) const { return key_.get() + row % 2 * p_.pairs; }
  const int64_t* value(int64_t row) const { return value_.get() + row % 2 * p_.pairs; }
  // Which pairs they are.
  const int64_t* place(int64_t row) const { return place_.get() + row % 2 * p_.pairs; }
  int64_t size(int64_t row) const { return size_[row % 2]; }

  // Rows of keys or values of a query, `at` being what key() or value() says.
  template <class T>
  Rows<T> rows(const T* base, const PairStrides& s, const int64_t* at, int64_t row, int64_t ahead) const {
    const int64_t t = row % p_.count, a = row / p_.count % p_.heads, b = row / p_.count / p_.heads;
    return {base + b * s.b + a * s.a + t * s.t, at, size(row), ahead * s.c};
  }

 private:
  void fill(int64_t which, const bool* mask) {
    int64_t n = 0;
    for (int64_t c = 0; c < p_.pairs; ++c) {
      if (mask != nullptr && !mask[c]) continue;
      key_[which * p_.pairs + n] = c * p_.key_strides.c;
      value_[which * p_.pairs + n] = c * p_.value_strides.c;
      place_[which * p_.pairs + n++] = c;
    }
    size_[which] = n;
  }

  const RetrievedAttention& p_;
  Scratch<int64_t, 128> key_, value_, place_;
  int64_t size_[2] = {0, 0};
};

}  // namespace
}  // namespace memkern::cpu::MK_NS
