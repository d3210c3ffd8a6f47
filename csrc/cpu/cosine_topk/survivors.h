// The rows of one query that may still be among its k best, and the bound that rises with them. Include after score.h.
//
// A pass over the rows knows each score up to a margin: an interval [lower, upper]. The k-th largest lower end is a
// bound: a row whose upper end lies below it has k better rows. Rows that pass the bound are appended; a full list is
// thinned by its own bound. When that does not help, because the scores of too many rows lie within the margins of each
// other, the list is settled: scored exactly, and only the k best stay.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

template <class A>
struct Entry {
  A upper;
  A lower;
  int64_t row;
};

template <class A>
struct Survivors {
  Entry<A>* entries;
  int64_t count;
  int64_t limit;  // thinned when it has so many
  A bound;
};

// A number of the order of floats: of the same sign, and larger for a larger value.
template <class A>
MK_INLINE typename Element<A>::integer ordered(A x) {
  typename Element<A>::integer i;
  std::memcpy(&i, &x, sizeof(A));
  return i < 0 ? i ^ std::numeric_limits<typename Element<A>::integer>::max() : i;
}
template <class A>
MK_INLINE A value_of(typename Element<A>::integer i) {
  i = i < 0 ? i ^ std::numeric_limits<typename Element<A>::integer>::max() : i;
  A x;
  std::memcpy(&x, &i, sizeof(A));
  return x;
}

// A value that at least `rank` lower ends reach, and at most `slack` more than that, unless they are equal. Counting
// the whole list a dozen times is faster than partitioning it, which no processor predicts. `keys`: room for a number
// of each entry, and a vector more.
template <class A>
__attribute__((noinline)) A value_at_rank(const Survivors<A>& list, int64_t rank, int64_t slack,
                                          typename Element<A>::integer* keys) {
  using I = typename Element<A>::integer;
  using Ints = typename Vec<A>::int_raw;
  constexpr int N = Vec<A>::N;
  const int64_t count = list.count;
  I low = std::numeric_limits<I>::max(), high = std::numeric_limits<I>::min();
  for (int64_t i = 0; i < count; ++i) {
    keys[i] = ordered(list.entries[i].lower);
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  for (int64_t i = count; i % N != 0; ++i) keys[i] = std::numeric_limits<I>::min();
  // At least `rank` keys reach low; fewer reach high + 1.
  while (low < high) {
    // Rounds up, without overflow.
    const I middle = (low >> 1) + (high >> 1) + ((low | high) & 1);
    Ints reached{};
    for (int64_t i = 0; i < count; i += N) {
      Ints x;
      std::memcpy(&x, keys + i, sizeof(x));
      reached -= x >= middle;
    }
    int64_t total = 0;
    for (int i = 0; i < N; ++i) total += reached[i];
    if (total >= rank) {
      low = middle;
      if (total <= rank + slack) break;
    } else {
      high = middle - 1;
    }
  }
  return value_of<A>(low);
}

// Raises the bound to what `rank` entries reach, and drops those that lie below it.
template <class A>
void thin(Survivors<A>& list, int64_t rank, int64_t slack, typename Element<A>::integer* keys) {
  if (list.count < rank) return;
  const A reached = value_at_rank(list, rank, slack, keys);
  if (reached > list.bound) list.bound = reached;
  int64_t kept = 0;
  for (int64_t i = 0; i < list.count; ++i) {
    const Entry<A> entry = list.entries[i];
    list.entries[kept] = entry;
    kept += entry.upper >= list.bound;
  }
  list.count = kept;
}

// The same where the entries are scores, of which many may be equal: the `rank` best stay, in no order.
template <class A>
void keep_best(Survivors<A>& list, int64_t rank) {
  if (list.count < rank) return;
  const auto better = [](const Entry<A>& a, const Entry<A>& b) {
    return Better()(Scored<A>{a.upper, a.row}, Scored<A>{b.upper, b.row});
  };
  std::nth_element(list.entries, list.entries + rank - 1, list.entries + list.count, better);
  list.bound = std::max(list.bound, list.entries[rank - 1].upper);
  list.count = rank;
}

// One query against the rows of one search, exactly.
template <class T>
class Judge {
 public:
  using A = acc_t<T>;

  // `query`: room for the one that load() reads.
  Judge(const CosineSearch& p, A* query) : p_(p), query_(query) {}

  void load(int64_t search, int64_t query, int64_t padded) { load(search, query, padded, query_); }

  void load(int64_t search, int64_t query, int64_t padded, A* to) {
    query_ = to;
    read_query(p_.query_dtype, p_.query, search * p_.query_stride[0] + query * p_.query_stride[1], p_.width, padded,
               query_);
    scale_ = scale_query(query_, p_.width, p_.normalized);
    database_ = static_cast<const T*>(p_.database) + search * p_.database_stride[0];
    inverses_ = p_.inverse_norms ? static_cast<const A*>(p_.inverse_norms) + search * p_.rows : nullptr;
  }

  A score(int64_t row) const {
    A unknown = std::numeric_limits<A>::quiet_NaN();
    return score(query_, scale_.inverse, row, unknown);
  }

  // Of a query that was loaded to another place. `inverse`: 1 / |row|, or NaN until it is known. Fetch: meanwhile the row
  // `ahead` is asked for.
  template <bool Fetch = false>
  A score(const A* query, double query_inverse, int64_t row, A& inverse, int64_t ahead = 0) const {
    const T* x = database_ + row * p_.database_stride[1];
    const T* y = database_ + ahead * p_.database_stride[1];
    if (p_.normalized) return ordered_dot<T, Fetch>(query, x, p_.width, y);
    if (inverses_) return final_score(ordered_dot<T, Fetch>(query, x, p_.width, y), inverses_[row], query_inverse, false);
    if (inverse == inverse) {
      return final_score(ordered_dot<T, Fetch>(query, x, p_.width, y), inverse, query_inverse, false);
    }
    double squared;
    const A dot = ordered_dot_and_norm<T, Fetch>(query, x, p_.width, squared, y);
    inverse = rounded_inverse<A>(squared);
    return final_score(dot, inverse, query_inverse, false);
  }

  void prefetch_row(int64_t row) const {
    const char* x = reinterpret_cast<const char*>(database_ + row * p_.database_stride[1]);
    const int64_t bytes = std::min<int64_t>(p_.width * int64_t(sizeof(T)), 4096);
    for (int64_t i = 0; i < bytes; i += 64) prefetch(x + i);
  }

  // Scores every row of the list; those that cannot win (NaN, below min_score) are left out.
  int64_t score_all(const Survivors<A>& list, Scored<A>* out) const {
    const A least = A(p_.min_score);
    int64_t kept = 0;
    for (int64_t i = 0; i < list.count; ++i) {
      if (i + 2 < list.count) prefetch_row(list.entries[i + 2].row);
      const int64_t row = list.entries[i].row;
      const A s = score(row);
      out[kept] = {s, row};
      kept += s >= least;
    }
    return kept;
  }

  // Keeps the `rank` best of the list, exactly. `unit` turns a score into what the margins are measured in.
  void settle(Survivors<A>& list, int64_t rank, double unit, Scored<A>* scratch) const {
    int64_t count = score_all(list, scratch);
    if (count > rank) {
      std::nth_element(scratch, scratch + rank - 1, scratch + count, Better());
      count = rank;
    }
    A worst = std::numeric_limits<A>::infinity();
    for (int64_t i = 0; i < count; ++i) {
      list.entries[i] = known_entry(scratch[i], unit);
      worst = std::min(worst, list.entries[i].lower);
    }
    list.count = count;
    if (count == rank && worst > list.bound) list.bound = worst;
  }

  // The entry of a row whose score is known.
  static Entry<A> known_entry(Scored<A> known, double unit) {
    const double s = double(known.score) * unit;
    // Exact for a cosine. An inner product was multiplied by 1 / |q|, which costs a rounding.
    const double rounding = sizeof(A) == 4 ? 0x1p-22 : 0x1p-50;
    const double slack = unit == 1.0 || !(std::abs(s) <= 1e300) ? 0.0 : std::abs(s) * rounding;
    return {A(s + slack), A(s - slack), known.row};
  }

  double query_inverse() const { return scale_.inverse; }
  const A* query() const { return query_; }

 private:
  const CosineSearch& p_;
  A* query_;
  QueryScale<A> scale_{};
  const T* database_ = nullptr;
  const A* inverses_ = nullptr;
};

}  // namespace
}  // namespace memkern::cpu::MK_NS
