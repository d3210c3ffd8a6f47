// Exact top-k search on the CPU. Every pass over the rows only pre-selects, with a margin that covers its rounding; the
// few survivors are scored by one dot product in a fixed order, and those scores decide.
//
// The margins. With u the unit roundoff, a sum of D products by fused steps is off by at most D u |q||x|, in any order;
// an approximate norm and the roundings around it add a few u. `scan_margin` covers that for the scan and for the final
// score together. The scan on bfloat16 adds what rounding the query lost, which is measured, and 2^-8 / 2 for the row.
// Rows and queries whose norm lies near the ends of the exponent range, where squares overflow and subnormal numbers
// lose digits, are special: they skip the scan and are scored exactly at once.
#include "ops/cosine_topk.h"

#include "cpu/isa.h"

#include "common/vec.h"
#include "cpu/cosine_topk/scan.h"
#include "cpu/cosine_topk/score.h"
#include "cpu/cosine_topk/stream.h"
#include "cpu/cosine_topk/survivors.h"
#include "cpu/cosine_topk/columns.h"

namespace memkern::cpu::MK_NS {
namespace {

constexpr int64_t kPanelBytes = 512 << 10;  // packed queries that stay in L2 beside a tile
constexpr int64_t kSample = 32;             // one tile in so many is scanned first
constexpr int64_t kStreamSteps = 16;        // of each stream at a time

// How the work is divided: blocks of queries, and for few of them also parts of the rows.
struct Plan {
  int64_t padded;  // width of a query in memory
  int64_t block;   // queries scanned together
  int64_t blocks;  // of one search
  int64_t parts;   // of the rows
  int64_t capacity;
  const ScanKernels* kernels;  // null: stream
};

template <class T>
Plan make_plan(const CosineSearch& p) {
  using A = acc_t<T>;
  Plan plan;
  plan.padded = (p.width + 63) / 64 * 64;
  plan.kernels = nullptr;
  plan.block = kStreamQueries;
  if (!std::is_same_v<T, double> && p.queries > kStreamQueries) {
    const ScanKernels* pairs = bf16_scan();
    plan.kernels = pairs ? pairs : &kScanKernels;
    const int64_t bytes = 4 * std::max<int64_t>(1, (p.width + plan.kernels->per_step - 1) / plan.kernels->per_step);
    const int64_t panel = plan.kernels->panel;
    plan.block = std::clamp<int64_t>(kPanelBytes / bytes / panel, 1, 32) * panel;
    // Every thread should have a block, as long as blocks fill a panel.
    const int64_t share = (p.queries * p.searches + p.thread_count - 1) / p.thread_count;
    plan.block = std::min(plan.block, std::max((share + panel - 1) / panel, int64_t(1)) * panel);
  }
  plan.block = std::min(plan.block, p.queries);
  plan.blocks = (p.queries + plan.block - 1) / plan.block;
  const int64_t items = plan.blocks * p.searches;
  plan.parts = 1;
  if (items < p.thread_count) {
    plan.parts = std::min({(p.thread_count + items - 1) / items, p.rows / 4096 + 1, int64_t(16)});
  }
  // What a search may allocate: 8 max(64 k, 1024) bytes for each query, and 4 for each row.
  const int64_t entry = 2 * sizeof(A) + sizeof(int64_t);
  const int64_t allowed = 8 * std::max<int64_t>(64 * p.k, 1024) * p.queries + 4 * p.rows;
  const int64_t wanted = std::max<int64_t>(5 * p.k / 2 + 128, 256);
  const int64_t affordable = plan.parts == 1 ? wanted : allowed / (2 * entry * p.queries * plan.parts);
  plan.capacity = std::clamp(affordable, 2 * p.k + 16, wanted);
  return plan;
}

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

// A block of queries against the rows [first, last) of one search.
template <class T>
class Block {
 public:
  using A = acc_t<T>;

  Block(const CosineSearch& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        kernels_(plan.kernels),
        padded_queries_((plan.block + 63) / 64 * 64),
        query_(plan.padded),
        judge_(p, query_.get()),
        units_(plan.padded * (kernels_ ? kernels_->panel : kStreamQueries)),
        bounds_(padded_queries_),
        factors_(plan.block),
        special_(plan.block),
        panels_(kernels_ ? panel_floats(plan) : 1),
        tile_stride_(stride_of_tile(plan.kernels, p.width)),
        tile_(kernels_ ? (kTileRows + 1) * tile_stride_ : 1),
        scratch_(plan.capacity),
        scored_(plan.capacity) {}

  // Appends the rows that may be among the k best to `lists`, one for each query of the block.
  void scan(int64_t search, int64_t first_query, int64_t count, int64_t first, int64_t last, Survivors<A>* lists) {
    search_ = search;
    first_query_ = first_query;
    count_ = count;
    lists_ = lists;
    database_ = static_cast<const T*>(p_.database) + search * p_.database_stride[0];
    inverses_ = p_.inverse_norms ? static_cast<const A*>(p_.inverse_norms) + search * p_.rows : nullptr;
    kernels_ = plan_.kernels;
    settled_ = 0;
    for (int64_t q = 0; q < count; ++q) lists[q].count = 0;
    prepare(true);
    const int64_t tile = kernels_ ? kTileRows : kStreamSteps;
    const int64_t extent = kernels_ ? last - first : quarter_of(first, last);
    const int64_t tiles = (extent + tile - 1) / tile;
    // A sample spread over all rows first: the bound is then nearly final for the rest, whatever their order.
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t t = 0; t < tiles; ++t) {
        if ((t % kSample == 0) != (pass == 0)) continue;
        if (kernels_) {
          const int64_t next = t + (pass == 0 ? kSample : (t + 1) % kSample == 0 ? 2 : 1);
          const int64_t begin = first + t * tile;
          scan_rows(begin, std::min(last, begin + tile), next < tiles ? first + next * tile : -1);
        } else {
          stream(first, last, t * tile, (t + 1) * tile);
        }
      }
    }
    for (int64_t q = 0; q < count; ++q) {
      if (special_[q]) score_every_row(q, first, last);
    }
  }

  void finish(int64_t search, int64_t query, Survivors<A>& list) {
    judge_.load(search, query, plan_.padded);
    const int64_t at = (search * p_.queries + query) * p_.k;
    judge_.finish(list, scratch_.get(), scored_.get(), static_cast<A*>(p_.scores) + at, p_.indices + at);
  }

 private:
  static int64_t panel_floats(const Plan& plan) {
    // Room for the scan in float too, should the coarser one not tell the rows apart.
    const int64_t lanes = (plan.block + 15) / 16 * 16;
    return lanes * std::max<int64_t>(plan.padded, 64);
  }

  static int64_t stride_of_tile(const ScanKernels* kernels, int64_t width) {
    if (!kernels) return 1;
    // An odd number of cache lines, so that the rows of a group fall into different sets.
    return ((width + 15) / 16 | 1) * 16;
  }

  static int64_t quarter_of(int64_t first, int64_t last) { return (last - first + kStreamRows - 1) / kStreamRows; }

  int64_t steps() const { return (p_.width + kernels_->per_step - 1) / kernels_->per_step; }

  // Queries of unit length in the scan's own form, their bounds, and the margin.
  void prepare(bool fresh) {
    double loss = 0;
    char* panel = reinterpret_cast<char*>(panels_.get());
    const int64_t together = kernels_ ? kernels_->panel : kStreamQueries;
    for (int64_t begin = 0; begin < count_; begin += together) {
      const int64_t end = std::min(count_, begin + together);
      for (int64_t q = begin; q < end; ++q) prepare_query(q, units_.get() + (q - begin) * plan_.padded, fresh);
      if constexpr (!std::is_same_v<T, double>) {
        if (kernels_) {
          double losses[64];
          kernels_->pack(units_.get(), end - begin, plan_.padded, p_.width, panel, losses);
          for (int64_t q = begin; q < end; ++q) loss = special_[q] ? loss : std::max(loss, losses[q - begin]);
          panel += 4 * steps() * ((end - begin + kernels_->lanes - 1) / kernels_->lanes * kernels_->lanes);
        }
      }
    }
    for (int64_t q = count_; q < padded_queries_; ++q) bounds_[q] = std::numeric_limits<A>::infinity();
    double margin = scan_margin<A>(p_.width) + loss;
    const bool rounded = kernels_ && kernels_->per_step == 2 && !std::is_same_v<T, bf16>;
    if (rounded) margin += 0x1p-9 * (1 + loss);
    margin_ = A(margin * 1.001);
    coarse_ = kernels_ && kernels_->per_step == 2 && margin > 4 * scan_margin<A>(p_.width);
  }

  void prepare_query(int64_t q, A* unit, bool fresh) {
    judge_.load(search_, first_query_ + q, plan_.padded);
    double inverse = judge_.query_inverse();
    factors_[q] = 1.0;
    if (p_.normalized) {
      const double squared = squared_norm(judge_.query(), p_.width);
      inverse = inverse_root(squared);
      factors_[q] = inverse;
      special_[q] = !(squared >= double(kLeastSquare<A>) && squared <= double(kMostSquare<A>));
    } else {
      special_[q] = !(inverse > 0 && inverse <= 1e300);
    }
    const A* query = judge_.query();
    for (int64_t i = 0; i < plan_.padded; ++i) unit[i] = special_[q] ? A(0) : A(double(query[i]) * inverse);
    if (fresh) {
      const double least = p_.min_score * (special_[q] ? 1.0 : factors_[q]);
      lists_[q].bound = std::abs(least) <= 1e300 ? A(least - std::abs(least) * 0x1p-20) : A(least);
    }
    bounds_[q] = special_[q] ? std::numeric_limits<A>::infinity() : lists_[q].bound;
  }

  // The rows of [begin, end) that any query may find.
  int64_t list_rows(int64_t begin, int64_t end, int64_t* rows) const {
    int64_t count = 0;
    const bool* valid = p_.valid && !p_.valid_per_query ? p_.valid + search_ * p_.valid_stride[0] : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      rows[count] = row;
      count += !valid || valid[row * p_.valid_stride[2]];
    }
    return count;
  }

  bool allowed(int64_t q, int64_t row) const {
    const int64_t query = first_query_ + q;
    if (p_.valid_per_query) {
      const bool* valid = p_.valid + search_ * p_.valid_stride[0] + query * p_.valid_stride[1];
      if (!valid[row * p_.valid_stride[2]]) return false;
    }
    return !p_.query_group ||
           p_.query_group[search_ * p_.queries + query] == p_.row_group[search_ * p_.rows + row];
  }

  // For each row of a tile what the scan multiplies its products by, and the margin of the result. Both are NaN for a
  // special row, which then passes no bound; such rows are listed, and their number returned.
  int64_t weigh(const A* squares, const int64_t* rows, int64_t count, A* inverse, A* margin, int64_t* special) const {
    const A nan = std::numeric_limits<A>::quiet_NaN();
    constexpr int N = Vec<A>::N;
    Mask<A> odd = Vec<A>(A(0)) < A(0);
    if (inverses_) {
      for (int64_t r = 0; r < count; ++r) inverse[r] = inverses_[rows[r]];
    }
    for (int64_t r = 0; r < count; r += N) {
      const Vec<A> squared = load(squares + r), length = sqrt(squared);
      Mask<A> plain = (squared >= kLeastSquare<A>) & (squared <= kMostSquare<A>);
      Vec<A> factor(A(1)), size = length;
      if (inverses_) {
        factor = load(inverse + r);
        size = length * abs(factor);
        plain = plain & (abs(factor) <= kMostInverse<A>) & ((size >= kLeastLength<A>) | (factor == A(0)));
      } else if (!p_.normalized) {
        factor = A(1) / length;
        size = Vec<A>(A(1));
      }
      store(inverse + r, select(plain, factor, Vec<A>(nan)));
      store(margin + r, select(plain, size * margin_, Vec<A>(nan)));
      odd = odd | !plain;
    }
    int64_t specials = 0;
    if (any(odd)) {
      for (int64_t r = 0; r < count; ++r) {
        if (margin[r] != margin[r]) special[specials++] = rows[r];
      }
    }
    return specials;
  }

  void scan_rows(int64_t begin, int64_t end, int64_t ahead) {
    if constexpr (!std::is_same_v<T, double>) {
      int64_t rows[kTileRows];
      const int64_t count = list_rows(begin, end, rows);
      if (count == 0) return;
      float inverse[kTileRows], margin[kTileRows], squares[kTileRows] = {};
      kernels_->bring[int(p_.dtype)](database_, p_.database_stride[1], p_.width, rows, count, tile_.get(), tile_stride_,
                                     squares);
      int64_t special[kTileRows];
      const int64_t specials = weigh(squares, rows, count, inverse, margin, special);
      for (int64_t r = count; r < kTileRows; ++r) {
        inverse[r] = margin[r] = std::numeric_limits<float>::quiet_NaN();
        rows[r] = 0;
      }
      TileScan t{};
      t.tile = tile_.get();
      t.tile_stride = tile_stride_;
      t.count = count;
      t.steps = steps();
      t.rows = rows;
      t.inverse = inverse;
      t.margin = margin;
      t.panels = panels_.get();
      t.queries = count_;
      t.bounds = bounds_.get();
      if (ahead >= 0 && p_.database_stride[1] == p_.width) {
        t.ahead = database_ + ahead * p_.width;
        t.ahead_bytes = std::min(kTileRows, p_.rows - ahead) * p_.width * int64_t(sizeof(T));
      }
      t.hit = [](void* self, int64_t q, int64_t row, float upper, float lower) {
        static_cast<Block*>(self)->append(q, row, upper, lower);
      };
      t.context = this;
      kernels_->scan(t);
      score_special_rows(special, specials);
      if (coarse_ && settled_ > 2 * count_) {
        // Too many rows lie within the coarse margin: go on in float, whose margin is hundreds of times smaller.
        kernels_ = &kScanKernels;
        prepare(false);
      }
    }
  }

  // Steps [begin, end) of each quarter of [first, last).
  void stream(int64_t first, int64_t last, int64_t begin, int64_t end) {
    constexpr int64_t kRows = kStreamRows * kStreamSteps;
    const int64_t quarter = quarter_of(first, last);
    int64_t of_quarter[kStreamRows][kStreamSteps], counts[kStreamRows], most = 0;
    for (int r = 0; r < kStreamRows; ++r) {
      const int64_t start = first + r * quarter, stop = std::min(last, start + std::min(end, quarter));
      counts[r] = list_rows(std::min(stop, start + begin), stop, of_quarter[r]);
      most = std::max(most, counts[r]);
    }
    if (most == 0) return;
    int64_t rows[kRows], special[kRows];
    alignas(64) A dots[kStreamQueries * kRows], squares[kRows] = {}, inverse[kRows], margin[kRows];
    bool here[kRows];
    const T* at[kStreamRows] = {};
    for (int64_t i = 0; i < most; ++i) {
      const int64_t to = i * kStreamRows;
      for (int r = 0; r < kStreamRows; ++r) {
        here[to + r] = i < counts[r];
        // A quarter that has no more rows repeats one of another.
        rows[to + r] = here[to + r] ? of_quarter[r][i] : -1;
      }
      const int64_t any_row = *std::max_element(rows + to, rows + to + kStreamRows);
      for (int r = 0; r < kStreamRows; ++r) {
        if (!here[to + r]) rows[to + r] = any_row;
        at[r] = database_ + rows[to + r] * p_.database_stride[1];
      }
      stream_any<T>(count_, {units_.get(), plan_.padded, p_.width, dots + to, kRows, squares + to}, at);
    }
    const int64_t count = most * kStreamRows;
    int64_t specials = weigh(squares, rows, count, inverse, margin, special);
    for (int64_t r = 0; r < count; ++r) {
      if (!here[r]) margin[r] = std::numeric_limits<A>::quiet_NaN();
    }
    if (specials > 0) {
      std::sort(special, special + specials);
      specials = std::unique(special, special + specials) - special;
    }
    constexpr int N = Vec<A>::N;
    for (int64_t q = 0; q < count_; ++q) {
      for (int64_t r = 0; r < count; r += N) {
        const Vec<A> middle = load(dots + q * kRows + r) * load(inverse + r), upper = middle + load(margin + r);
        if (__builtin_expect(!any(upper >= bounds_[q]), 1)) continue;
        for (int64_t i = r; i < std::min(r + N, count); ++i) {
          const A score = dots[q * kRows + i] * inverse[i];
          if (score + margin[i] >= bounds_[q]) append(q, rows[i], score + margin[i], score - margin[i]);
        }
      }
    }
    score_special_rows(special, specials);
  }

  void append(int64_t q, int64_t row, A upper, A lower) {
    if (!allowed(q, row)) return;
    Survivors<A>& list = lists_[q];
    list.upper[list.count] = upper;
    list.lower[list.count] = lower;
    list.row[list.count] = row;
    if (++list.count < plan_.capacity) return;
    thin(list, p_.k, scratch_.get());
    if (list.count > plan_.capacity - plan_.capacity / 8) {
      judge_.load(search_, first_query_ + q, plan_.padded);
      judge_.settle(list, factors_[q], scored_.get());
      ++settled_;
    }
    if (!special_[q]) bounds_[q] = list.bound;
  }

  // `known` is the score of a row that needs no scan.
  void append_known(int64_t q, A known, int64_t row) {
    if (!(known >= A(p_.min_score))) return;
    A upper, lower;
    int64_t at;
    Survivors<A> one{&upper, &lower, &at, 1, A(0)};
    Judge<T>::set(one, 0, {known, row}, factors_[q]);
    if (upper >= lists_[q].bound) append(q, row, upper, lower);
  }

  void score_special_rows(const int64_t* rows, int64_t count) {
    if (count == 0) return;
    bool zero[std::max<int64_t>(kTileRows, kStreamRows * kStreamSteps)];
    bool all_zero = true;
    for (int64_t i = 0; i < count; ++i) {
      // A zero row scores 0 with every query, if its given inverse is a number.
      zero[i] = squared_norm(database_ + rows[i] * p_.database_stride[1], p_.width) == 0 &&
                (!inverses_ || std::abs(inverses_[rows[i]]) <= std::numeric_limits<A>::max());
      all_zero = all_zero && zero[i];
    }
    for (int64_t q = 0; q < count_; ++q) {
      if (special_[q]) continue;
      if (!all_zero) judge_.load(search_, first_query_ + q, plan_.padded);
      for (int64_t i = 0; i < count; ++i) {
        // A list that is settled loads its own query, which is this one.
        append_known(q, zero[i] ? A(0) : judge_.score(rows[i]), rows[i]);
      }
    }
  }

  void score_every_row(int64_t q, int64_t first, int64_t last) {
    judge_.load(search_, first_query_ + q, plan_.padded);
    const bool* valid = p_.valid && !p_.valid_per_query ? p_.valid + search_ * p_.valid_stride[0] : nullptr;
    for (int64_t row = first; row < last; ++row) {
      if (!valid || valid[row * p_.valid_stride[2]]) append_known(q, judge_.score(row), row);
    }
  }

  const CosineSearch& p_;
  const Plan& plan_;
  const ScanKernels* kernels_;
  int64_t padded_queries_;
  Scratch<A> query_;
  Judge<T> judge_;
  Scratch<A> units_;
  Scratch<A> bounds_;
  Scratch<double> factors_;  // a score times this is what margins are measured in
  Scratch<bool> special_;
  Scratch<A> panels_;
  int64_t tile_stride_;
  Scratch<float> tile_;
  Scratch<A> scratch_;
  Scratch<Scored<A>> scored_;

  int64_t search_ = 0, first_query_ = 0, count_ = 0, settled_ = 0;
  Survivors<A>* lists_ = nullptr;
  const T* database_ = nullptr;
  const A* inverses_ = nullptr;
  A margin_ = 0;
  bool coarse_ = false;
};

// Lists of `count` queries, one after the other.
template <class A>
class Lists {
 public:
  Lists(int64_t count, int64_t capacity)
      : values_(2 * count * capacity), rows_(count * capacity), lists_(count) {
    for (int64_t i = 0; i < count; ++i) {
      A* values = values_.get() + 2 * i * capacity;
      lists_[i] = {values, values + capacity, rows_.get() + i * capacity, 0, A(0)};
    }
  }
  Survivors<A>* get() { return lists_.get(); }

 private:
  Scratch<A> values_;
  Scratch<int64_t> rows_;
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
      for (int64_t q = 0; q < count; ++q) block.finish(search, first + q, lists.get()[q]);
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
        std::copy(own.upper, own.upper + own.count, list.upper + list.count);
        std::copy(own.lower, own.lower + own.count, list.lower + list.count);
        std::copy(own.row, own.row + own.count, list.row + list.count);
        list.count += own.count;
      }
      block.finish(search, query, list);
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
