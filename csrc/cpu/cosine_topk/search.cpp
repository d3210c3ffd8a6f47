// Exact top-k search on the CPU. Every pass over the rows only pre-selects, with a margin that covers its rounding; the
// few survivors are scored by one dot product in a fixed order, and those scores decide.
//
// The margins. With u the unit roundoff, a sum of D products by fused steps is off by at most D u |q||x|, in any order;
// an approximate norm and the roundings around it add a few u. `scan_margin` covers that for the scan and for the final
// score together. The scan on bfloat16 adds what rounding the query lost, which is measured, and for the row either that
// too, or 2^-8, which is the most it can be.
//
// Rows and queries whose norm lies near the ends of the exponent range, where squares overflow and subnormal numbers
// lose digits, are special: they skip the scan and are scored exactly at once.
#include "ops/cosine_topk.h"

#include "cpu/cosine_topk/order.h"
#include "cpu/isa.h"

#include "common/vec.h"
#include "cpu/cosine_topk/scan.h"
#include "cpu/cosine_topk/scan_library.h"
#include "cpu/cosine_topk/score.h"
#include "cpu/cosine_topk/stream.h"
#include "cpu/cosine_topk/survivors.h"
#include "cpu/cosine_topk/finish.h"
#include "cpu/cosine_topk/plan.h"
#include "cpu/cosine_topk/filter.h"
#include "cpu/cosine_topk/weigh.h"
#include "cpu/cosine_topk/block.h"
#include "cpu/cosine_topk/columns.h"

namespace memkern::cpu::MK_NS {
namespace {

// Lists of `count` queries, one after the other.
template <class A>
class Lists {
 public:
  Lists(int64_t count, int64_t capacity) : entries_(count * capacity), lists_(count) {
    for (int64_t i = 0; i < count; ++i) lists_[i] = {entries_.get() + i * capacity, 0, capacity, A(0)};
  }
  Survivors<A>* get() { return lists_.get(); }

 private:
  Scratch<Entry<A>> entries_;
  Scratch<Survivors<A>> lists_;
};

// All rows for each block: lists live as long as a block.
template <class T>
void search_blocks(const CosineSearch& p, const Plan& plan) {
  parallel(p.threads, p.searches * plan.blocks, 1, [&](int64_t begin, int64_t end) {
    Block<T> block(p, plan);
    Lists<acc_t<T>> lists(plan.block, plan.capacity);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t search = item / plan.blocks, first = item % plan.blocks * plan.block;
      const int64_t count = std::min(plan.block, p.queries - first);
      block.scan(search, first, count, 0, p.rows, lists.get());
      block.finish(search, first, count, lists.get());
    }
  });
}

// Few blocks for many threads: the rows are divided too, and the lists of the parts are joined.
template <class T>
void search_parts(const CosineSearch& p, const Plan& plan) {
  using A = acc_t<T>;
  const int64_t items = p.searches * plan.blocks * plan.parts, all = p.searches * p.queries;
  // Lists are ordered by (search, block, part, query).
  Lists<A> lists(p.searches * plan.blocks * plan.block * plan.parts, plan.capacity);
  const int64_t share = (p.rows + plan.parts - 1) / plan.parts;
  parallel(p.threads, items, 1, [&](int64_t begin, int64_t end) {
    Block<T> block(p, plan);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % plan.parts, of = item / plan.parts;
      const int64_t search = of / plan.blocks, first = of % plan.blocks * plan.block;
      block.scan(search, first, std::min(plan.block, p.queries - first), std::min(p.rows, part * share),
                 std::min(p.rows, (part + 1) * share), lists.get() + item * plan.block);
    }
  });
  Plan joined = plan;
  joined.capacity = plan.capacity * plan.parts;
  parallel(p.threads, all, 1, [&](int64_t begin, int64_t end) {
    Block<T> block(p, joined);
    Lists<A> whole(1, joined.capacity);
    Survivors<A>& list = *whole.get();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t search = i / p.queries, query = i % p.queries;
      list.count = 0;
      list.bound = -std::numeric_limits<A>::infinity();
      for (int64_t part = 0; part < plan.parts; ++part) {
        const int64_t item = (search * plan.blocks + query / plan.block) * plan.parts + part;
        const Survivors<A>& own = lists.get()[item * plan.block + query % plan.block];
        std::copy(own.entries, own.entries + own.count, list.entries + list.count);
        list.count += own.count;
      }
      block.finish(search, query, 1, &list);
    }
  });
}

void search(const CosineSearch& p) {
  if (p.searches == 0 || p.queries == 0) return;
  MK_DISPATCH(p.dtype, T, {
    const Plan plan = make_plan<T>(p);
    plan.parts == 1 ? search_blocks<T>(p, plan) : search_parts<T>(p, plan);
  });
}

}  // namespace

extern const CosineTopkTable cosine_topk = {search, cosine_backward, inverse_norms, inverse_norms_backward};

}  // namespace memkern::cpu::MK_NS
