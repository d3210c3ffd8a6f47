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
struct Survivors {
  A* upper;
  A* lower;
  int64_t* row;
  int64_t count;
  A bound;
};

template <class A>
struct Scored {
  A score;
  int64_t row;
};

template <class A>
struct Better {
  bool operator()(const Scored<A>& a, const Scored<A>& b) const {
    return a.score > b.score || (a.score == b.score && a.row < b.row);
  }
};

template <class A>
struct Greater {
  bool operator()(A a, A b) const { return a > b; }
};

// Drops what lies below the bound of the list itself. `scratch`: room for a float of each entry.
template <class A>
void thin(Survivors<A>& list, int64_t k, A* scratch) {
  if (list.count < k) return;
  std::copy(list.lower, list.lower + list.count, scratch);
  std::nth_element(scratch, scratch + k - 1, scratch + list.count, Greater<A>());
  if (scratch[k - 1] > list.bound) list.bound = scratch[k - 1];
  int64_t kept = 0;
  for (int64_t i = 0; i < list.count; ++i) {
    list.upper[kept] = list.upper[i];
    list.lower[kept] = list.lower[i];
    list.row[kept] = list.row[i];
    kept += list.upper[i] >= list.bound;
  }
  list.count = kept;
}

// One query against the rows of one search, exactly.
template <class T>
class Judge {
 public:
  using A = acc_t<T>;

  Judge(const CosineSearch& p, A* query) : p_(p), query_(query) {}

  void load(int64_t search, int64_t query, int64_t padded) {
    read_query(p_.query_dtype, p_.query, search * p_.query_stride[0] + query * p_.query_stride[1], p_.width, padded,
               query_);
    scale_ = scale_query(query_, p_.width, p_.normalized);
    database_ = static_cast<const T*>(p_.database) + search * p_.database_stride[0];
    inverses_ = p_.inverse_norms ? static_cast<const A*>(p_.inverse_norms) + search * p_.rows : nullptr;
  }

  A score(int64_t row) const {
    const T* x = database_ + row * p_.database_stride[1];
    const A dot = ordered_dot(query_, x, p_.width);
    if (p_.normalized) return dot;
    const A inverse = inverses_ ? inverses_[row] : rounded_inverse<A>(squared_norm(x, p_.width));
    return final_score(dot, inverse, scale_.inverse, false);
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
      if (i + 2 < list.count) prefetch_row(list.row[i + 2]);
      const A s = score(list.row[i]);
      out[kept] = {s, list.row[i]};
      kept += s >= least;
    }
    return kept;
  }

  // Keeps the k best of the list, exactly. `unit` turns a score into what the margins are measured in.
  void settle(Survivors<A>& list, double unit, Scored<A>* scratch) const {
    int64_t count = score_all(list, scratch);
    if (count > p_.k) {
      std::nth_element(scratch, scratch + p_.k - 1, scratch + count, Better<A>());
      count = p_.k;
    }
    A worst = std::numeric_limits<A>::infinity();
    for (int64_t i = 0; i < count; ++i) {
      set(list, i, scratch[i], unit);
      worst = std::min(worst, list.lower[i]);
    }
    list.count = count;
    if (count == p_.k && worst > list.bound) list.bound = worst;
  }

  // Entry i of the list becomes a row whose score is known.
  static void set(Survivors<A>& list, int64_t i, Scored<A> known, double unit) {
    const double s = double(known.score) * unit;
    // Exact for a cosine. An inner product was multiplied by 1 / |q|, which costs a rounding.
    const double rounding = sizeof(A) == 4 ? 0x1p-22 : 0x1p-50;
    const double slack = unit == 1.0 || !(std::abs(s) <= 1e300) ? 0.0 : std::abs(s) * rounding;
    list.upper[i] = A(s + slack);
    list.lower[i] = A(s - slack);
    list.row[i] = known.row;
  }

  void finish(Survivors<A>& list, A* scratch, Scored<A>* scored, A* scores, int64_t* indices) const {
    thin(list, p_.k, scratch);
    const int64_t count = score_all(list, scored), found = std::min(count, p_.k);
    if (count > p_.k) std::nth_element(scored, scored + p_.k - 1, scored + count, Better<A>());
    std::sort(scored, scored + found, Better<A>());
    for (int64_t i = 0; i < found; ++i) {
      scores[i] = scored[i].score;
      indices[i] = scored[i].row;
    }
    for (int64_t i = found; i < p_.k; ++i) {
      scores[i] = -std::numeric_limits<A>::infinity();
      indices[i] = -1;
    }
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
