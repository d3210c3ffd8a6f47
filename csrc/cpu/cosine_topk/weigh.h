// What the scan needs of each row beside its elements: the factor of its products and their margin. Include after
// scan_types.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

// Norms within these scan safely: squares neither overflow nor lose digits.
template <class A>
constexpr A kLeastSquare = sizeof(A) == 4 ? A(1e-30) : A(1e-250);
template <class A>
constexpr A kMostSquare = sizeof(A) == 4 ? A(1e30) : A(1e250);
template <class A>
constexpr A kLeastLength = sizeof(A) == 4 ? A(1e-15) : A(1e-125);
template <class A>
constexpr A kMostInverse = sizeof(A) == 4 ? A(1e15) : A(1e100);

template <class A>
double scan_margin(int64_t width) {
  const double u = sizeof(A) == 4 ? 0x1p-24 : 0x1p-53;
  return 1.01 * u * (2.0 * double(width) + 24.0);
}

// For `count` rows what the scan multiplies its products by, and the margin of the result. Both are NaN for a special row,
// which then passes no bound; such rows are listed in `special`, and their number returned. A row of -1 is none.
// `inverses`: the given 1 / |row| of all rows, or null. `unit`: the margin of a row of unit length. Inline: for the few rows
// of a stream the call would cost more than the work.
template <class A>
MK_INLINE int64_t weigh(const A* squares, const int64_t* rows, int64_t count, const A* inverses, bool normalized, A unit,
                        A* inverse, A* margin, int64_t* special) {
  const A nan = std::numeric_limits<A>::quiet_NaN();
  constexpr int N = Vec<A>::N;
  Mask<A> odd = Vec<A>(A(0)) < A(0);
  if (inverses) {
    for (int64_t r = 0; r < count; ++r) inverse[r] = rows[r] < 0 ? A(0) : inverses[rows[r]];
  }
  for (int64_t r = 0; r < count; r += N) {
    const Vec<A> squared = load(squares + r), length = sqrt(squared);
    Mask<A> plain = (squared >= kLeastSquare<A>) & (squared <= kMostSquare<A>);
    Vec<A> factor(A(1)), size = length;
    if (inverses) {
      factor = load(inverse + r);
      size = length * abs(factor);
      plain = plain & (abs(factor) <= kMostInverse<A>) & ((size >= kLeastLength<A>) | (factor == A(0)));
    } else if (!normalized) {
      factor = A(1) / length;
      size = Vec<A>(A(1));
    }
    store(inverse + r, select(plain, factor, Vec<A>(nan)));
    store(margin + r, select(plain, size * unit, Vec<A>(nan)));
    odd = odd | !plain;
  }
  int64_t specials = 0;
  if (any(odd)) {
    for (int64_t r = 0; r < count; ++r) {
      if (margin[r] != margin[r] && rows[r] >= 0) special[specials++] = rows[r];
    }
  }
  return specials;
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
