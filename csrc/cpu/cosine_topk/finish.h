// The end of a search: the survivors of a block of queries are scored exactly, and the k best of each written out.
// Include after survivors.h.
#pragma once

#include "cpu/cosine_topk/rank.h"

namespace memkern::cpu::MK_NS {
namespace {

// Row after row, not query after query: rows then come from memory in rising order, each once, and its norm is computed
// once. Query after query the same rows took four times as long.
template <class T>
class Finish {
 public:
  using A = acc_t<T>;

  // `queries`: room for `padded` elements of each of the `most` queries.
  Finish(const CosineSearch& p, int64_t padded, int64_t most, int64_t capacity, A* queries)
      : p_(p),
        padded_(padded),
        queries_(queries),
        inverses_(most),
        together_(std::max({capacity, most * capacity / 4, 2 * most * p.k})),
        pairs_(together_),
        sorted_(together_),
        scored_(capacity),
        keys_(capacity + Vec<A>::N),
        order_(p.k) {}

  void operator()(int64_t search, int64_t first, int64_t count, Survivors<A>* lists) {
    Judge<T> judge(p_, queries_);
    for (int64_t q = 0; q < count; ++q) {
      judge.load(search, first + q, padded_, queries_ + q * padded_);
      inverses_[q] = judge.query_inverse();
    }
    for (int64_t begin = 0; begin < count;) {
      int64_t end = begin, size = 0;
      for (; end < count && size + lists[end].count <= together_; ++end) size = list_pairs(end, lists[end], size);
      score(judge, sort(size), size, lists);
      for (; begin < end; ++begin) write(search, first + begin, lists[begin]);
    }
  }

  // The k best among entries whose upper ends are their scores.
  void write(int64_t search, int64_t query, const Survivors<A>& list) {
    const A least = A(p_.min_score);
    Scored<A>* scored = scored_.get();
    int64_t count = 0;
    for (int64_t i = 0; i < list.count; ++i) {
      const Entry<A>& entry = list.entries[i];
      scored[count] = {entry.upper, entry.row};
      keys_[count] = entry.upper;
      // Neither NaN.
      count += entry.upper >= least;
    }
    const int64_t found = std::min(count, p_.k), at = (search * p_.queries + query) * p_.k;
    A* scores = static_cast<A*>(p_.scores) + at;
    int64_t* indices = p_.indices + at;
    if (count <= kMostRanked && rank(keys_.get(), count, found, order_.get())) {
      for (int64_t i = 0; i < found; ++i) {
        scores[i] = scored[order_[i]].score;
        indices[i] = scored[order_[i]].row;
      }
    } else {
      if (count > p_.k) std::nth_element(scored, scored + p_.k - 1, scored + count, Better());
      std::sort(scored, scored + found, Better());
      for (int64_t i = 0; i < found; ++i) {
        scores[i] = scored[i].score;
        indices[i] = scored[i].row;
      }
    }
    for (int64_t i = found; i < p_.k; ++i) {
      scores[i] = -std::numeric_limits<A>::infinity();
      indices[i] = -1;
    }
  }

 private:
  struct Pair {
    int64_t row;
    int32_t query, entry;
  };

  int64_t list_pairs(int64_t query, const Survivors<A>& list, int64_t size) {
    for (int64_t i = 0; i < list.count; ++i) pairs_[size + i] = {list.entries[i].row, int32_t(query), int32_t(i)};
    return size + list.count;
  }

  // By row, eleven bits at a time.
  const Pair* sort(int64_t size) {
    constexpr int kBits = 11;
    Pair *from = pairs_.get(), *to = sorted_.get();
    for (int shift = 0; shift < 63 && (p_.rows - 1) >> shift > 0; shift += kBits) {
      int64_t starts[1 << kBits] = {};
      for (int64_t i = 0; i < size; ++i) ++starts[(from[i].row >> shift) & ((1 << kBits) - 1)];
      int64_t sum = 0;
      for (int64_t& start : starts) {
        const int64_t here = start;
        start = sum;
        sum += here;
      }
      for (int64_t i = 0; i < size; ++i) to[starts[(from[i].row >> shift) & ((1 << kBits) - 1)]++] = from[i];
      std::swap(from, to);
    }
    return from;
  }

  void score(const Judge<T>& judge, const Pair* pairs, int64_t size, Survivors<A>* lists) {
    constexpr int64_t kAhead = 8;
    int64_t row = -1;
    A inverse = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Pair& pair = pairs[i];
      if (pair.row != row) {
        row = pair.row;
        inverse = std::numeric_limits<A>::quiet_NaN();
      }
      const A* query = queries_ + pair.query * padded_;
      const double query_inverse = inverses_[pair.query];
      A& score = lists[pair.query].entries[pair.entry].upper;
      if (i + kAhead < size && pairs[i + kAhead].row != pairs[i + kAhead - 1].row) {
        score = judge.template score<true>(query, query_inverse, row, inverse, pairs[i + kAhead].row);
      } else {
        score = judge.score(query, query_inverse, row, inverse);
      }
    }
  }

  const CosineSearch& p_;
  int64_t padded_;
  A* queries_;
  Scratch<double> inverses_;
  int64_t together_;
  Scratch<Pair> pairs_, sorted_;
  Scratch<Scored<A>> scored_;
  Scratch<A> keys_;
  Scratch<int32_t> order_;
};

}  // namespace
}  // namespace memkern::cpu::MK_NS
