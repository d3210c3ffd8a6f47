// The order of results. Include before cpu/isa.h: a comparison that may use newer instructions could not be inlined into
// the sorting functions of the standard library, which stay at the baseline.
#pragma once

#include <cstdint>

namespace memkern::cpu {

template <class A>
struct Scored {
  A score;
  int64_t row;
};

struct Better {
  template <class A>
  bool operator()(const Scored<A>& a, const Scored<A>& b) const {
    return a.score > b.score || (a.score == b.score && a.row < b.row);
  }
};

}  // namespace memkern::cpu
