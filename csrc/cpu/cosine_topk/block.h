// A block of queries against the rows of one search: what search.cpp explains. Include after plan.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

constexpr int64_t kStreamSteps = 16;  // of each stream at a time
constexpr int64_t kManyQueries = 32;  // from here on their hits outweigh rows that are met one by one

// A block of queries against the rows [first, last) of one search.
template <class T>
class Block {
 public:
  using A = acc_t<T>;

  Block(const CosineSearch& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        filter_{p},
        kernels_(plan.kernels),
        padded_queries_((plan.block + 63) / 64 * 64),
        query_(plan.padded),
        judge_(p, query_.get()),
        units_(plan.padded * (kernels_ ? kernels_->panel : kStreamQueries)),
        bounds_(padded_queries_),
        factors_(plan.block),
        states_(plan.block),
        queries_(plan.exact ? plan.block * plan.padded : 0),
        query_inverses_(plan.block),
        panels_(panel_floats(plan)),
        tile_stride_(stride_of_tile(plan.kernels, p.width)),
        tile_(kernels_ ? (kernels_->tile_rows + 1) * tile_stride_ : 1),
        guesses_(plan.block),
        keys_(plan.capacity + Vec<A>::N),
        scored_(plan.capacity),
        // The packed queries are done with by then.
        finish_(p, plan.padded, plan.block, plan.capacity, panels_.get()) {}

  // Appends the rows that may be among the k best to `lists`, one for each query of the block.
  void scan(int64_t search, int64_t first_query, int64_t count, int64_t first, int64_t last, Survivors<A>* lists) {
    search_ = filter_.search = search;
    first_query_ = first_query;
    count_ = count;
    lists_ = lists;
    database_ = static_cast<const T*>(p_.database) + search * p_.database_stride[0];
    inverses_ = p_.inverse_norms ? static_cast<const A*>(p_.inverse_norms) + search * p_.rows : nullptr;
    for (int64_t q = 0; q < count; ++q) {
      lists[q].count = 0;
      states_[q] = State::kOpen;
    }
    if (kernels_ == nullptr) {
      stream_all(first, last);
    } else {
      scan_all(first, last, plan_.rank);
      if (close_answered()) scan_all(first, last, p_.k);
    }
    for (int64_t q = 0; q < count; ++q) {
      if (states_[q] == State::kSpecial) score_every_row(q, first, last);
    }
  }

  // Scores what scan() found, and writes the k best of each query.
  void finish(int64_t search, int64_t first_query, int64_t count, Survivors<A>* lists) {
    for (int64_t q = 0; q < count; ++q) thin(lists[q], p_.k, 0, keys_.get());
    if (!plan_.exact) return finish_(search, first_query, count, lists);
    for (int64_t q = 0; q < count; ++q) finish_.write(search, first_query + q, lists[q]);
  }

 private:
  // A special query is scored against every row; a closed one has been answered.
  enum class State : char { kOpen, kSpecial, kClosed };

  // A sample spread over all rows first: with the bound that it leaves few of the rest are appended, whatever their
  // order. `rank`: whose place in the sample makes the bound. With rank < k that is a guess, which close_answered()
  // verifies. Where a hit costs most, a larger sample makes a better guess for the rest.
  void scan_all(int64_t first, int64_t last, int64_t rank) {
    kernels_ = plan_.kernels;
    settled_ = 0;
    rank_ = rank;
    // Of the first sample little is kept.
    scoring_ = false;
    prepare(true);
    uint32_t left = kAllPlaces & ~kFirstPlaces;
    scan_places(first, last, kFirstPlaces);
    guess(rank);
    if (plan_.exact) {
      score_lists();
      guess(rank);
    }
    if (plan_.exact && rank < p_.k && count_ >= kManyQueries) {
      left &= ~kSecondPlaces;
      rank_ = sample_rank(p_.k, kFirstPlaces | kSecondPlaces);
      scan_places(first, last, kSecondPlaces);
      guess(rank_);
    }
    rank_ = p_.k;
    scan_places(first, last, left);
  }

  // The rows of [first, last) at these places of each kSample.
  void scan_places(int64_t first, int64_t last, uint32_t places) {
    Tile tiles[2], *tile = &tiles[0], *next = &tiles[1];
    for (int64_t begin = first; begin < last; begin += kSample) {
      for (uint32_t left = places; left != 0; left &= left - 1) {
        const int64_t row = begin + __builtin_ctz(left);
        if (row >= last) break;
        next->rows[next->count] = row;
        next->count += filter_.may_be_found(row);
        if (next->count < kernels_->tile_rows) continue;
        scan_rows(*tile, *next);
        std::swap(tile, next);
        next->count = 0;
      }
    }
    scan_rows(*tile, *next);
    scan_rows(*next, {});
  }

  // From now on lists hold scores.
  void score_lists() {
    scoring_ = true;
    for (int64_t q = 0; q < count_; ++q) {
      Survivors<A>& list = lists_[q];
      list.bound = least_bound(q);
      if (states_[q] == State::kClosed) continue;
      judge_.load(search_, first_query_ + q, plan_.padded);
      const int64_t found = judge_.score_all(list, scored_.get());
      for (int64_t i = 0; i < found; ++i) list.entries[i] = {scored_[i].score, scored_[i].score, scored_[i].row};
      list.count = found;
    }
  }

  // Bounds from the places that the best of a sample have.
  void guess(int64_t rank) {
    for (int64_t q = 0; q < count_; ++q) {
      guesses_[q] = -std::numeric_limits<A>::infinity();
      if (states_[q] != State::kOpen) continue;
      Survivors<A>& list = lists_[q];
      thin(list, rank, 0, keys_.get());
      list.limit = plan_.capacity;
      bounds_[q] = scan_bound(q);
      if (rank < p_.k && list.bound > least_bound(q)) guesses_[q] = list.bound;
    }
  }

  // Closes the queries of which k rows surely reach the bound that was guessed; whether others are left.
  bool close_answered() {
    bool left = false;
    for (int64_t q = 0; q < count_; ++q) {
      if (states_[q] != State::kOpen) continue;
      Survivors<A>& list = lists_[q];
      int64_t reached = 0;
      for (int64_t i = 0; i < list.count; ++i) reached += list.entries[i].lower >= guesses_[q];
      const bool unsure = guesses_[q] > -std::numeric_limits<A>::infinity() && reached < p_.k;
      if (!unsure) states_[q] = State::kClosed;
      if (unsure) list.count = 0;
      left = left || unsure;
    }
    return left;
  }

  void stream_all(int64_t first, int64_t last) {
    settled_ = 0;
    rank_ = p_.k;
    prepare(true);
    const int64_t extent = quarter_of(first, last), tiles = (extent + kStreamSteps - 1) / kStreamSteps;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t t = 0; t < tiles; ++t) {
        if ((t % kSample == 0) == (pass == 0)) stream(first, last, t * kStreamSteps, (t + 1) * kStreamSteps);
      }
    }
  }

  static int64_t panel_floats(const Plan& plan) {
    // Room for the scan in float too, should the coarser one not tell the rows apart, and for the queries themselves.
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
          for (int64_t q = begin; q < end; ++q) loss = states_[q] == State::kOpen ? std::max(loss, losses[q - begin]) : loss;
          panel += 4 * steps() * ((end - begin + kernels_->lanes - 1) / kernels_->lanes * kernels_->lanes);
        }
      }
    }
    for (int64_t q = count_; q < padded_queries_; ++q) bounds_[q] = std::numeric_limits<A>::infinity();
    double margin = scan_margin<A>(p_.width) + loss + (kernels_ ? kernels_->rounding * (1 + loss) : 0.0);
    const bool rounded = kernels_ && kernels_->per_step == 2 && !std::is_same_v<T, bf16>;
    coarse_ = kernels_ && kernels_->per_step == 2 && (rounded || margin > 4 * scan_margin<A>(p_.width));
    if (rounded) margin += 0x1p-8 * (1 + loss);
    margin_ = A(margin * 1.001);
  }

  void prepare_query(int64_t q, A* unit, bool fresh) {
    judge_.load(search_, first_query_ + q, plan_.padded);
    double inverse = judge_.query_inverse();
    factors_[q] = 1.0;
    bool special;
    if (p_.normalized) {
      const double squared = squared_norm(judge_.query(), p_.width);
      inverse = inverse_root(squared);
      factors_[q] = inverse;
      special = !(squared >= double(kLeastSquare<A>) && squared <= double(kMostSquare<A>));
    } else {
      special = !(inverse > 0 && inverse <= 1e300);
    }
    if (special) states_[q] = State::kSpecial;
    const A* query = judge_.query();
    if (plan_.exact) {
      query_inverses_[q] = judge_.query_inverse();
      std::copy_n(query, plan_.padded, queries_.get() + q * plan_.padded);
    }
    for (int64_t i = 0; i < plan_.padded; ++i) unit[i] = special ? A(0) : A(double(query[i]) * inverse);
    if (fresh && states_[q] != State::kClosed) {
      lists_[q].bound = least_bound(q);
      lists_[q].limit = std::min(plan_.capacity, std::max(4 * rank_ + 64, int64_t(128)));
    }
    bounds_[q] = states_[q] == State::kOpen ? scan_bound(q) : std::numeric_limits<A>::infinity();
  }

  // The bound of a list, in what the margins are measured in.
  A scan_bound(int64_t q) const {
    const A bound = lists_[q].bound;
    return scoring_ ? Judge<T>::known_entry({bound, 0}, factors_[q]).lower : bound;
  }

  // What `min_score` demands, in what a list is measured in.
  A least_bound(int64_t q) const {
    if (scoring_) return A(p_.min_score);
    const double least = p_.min_score * (states_[q] == State::kSpecial ? 1.0 : factors_[q]);
    return std::abs(least) <= 1e300 ? A(least - std::abs(least) * 0x1p-20) : A(least);
  }

  struct Tile {
    int64_t rows[kMostTileRows];
    int64_t count = 0;
  };

  // `next`: the rows that come after these.
  void scan_rows(const Tile& tile, const Tile& next) {
    // The kernels may change in between.
    for (int64_t begin = 0; begin < tile.count;) {
      const int64_t count = std::min(kernels_->tile_rows, tile.count - begin);
      scan_tile_of(tile.rows + begin, count, next, begin + count < tile.count ? 0 : next.count);
      begin += count;
    }
  }

  void scan_tile_of(const int64_t* rows, int64_t count, const Tile& next, int64_t ahead_rows) {
    if constexpr (!std::is_same_v<T, double>) {
      constexpr int64_t kRoom = kMostTileRows;
      float inverse[kRoom], margin[kRoom], squares[kRoom];
      // Up to whole vectors and whole groups of rows.
      std::fill(squares + count, squares + std::min(kRoom, count + kTileRows), 0.0f);
      kernels_->bring[int(p_.dtype)](database_, p_.database_stride[1], p_.width, rows, count, tile_.get(), tile_stride_,
                                     squares);
      int64_t special[kRoom];
      const int64_t specials = weigh(squares, rows, count, inverses_, p_.normalized, margin_, inverse, margin,
                                     special);
      for (int64_t r = count; r < std::min(kRoom, count + kTileRows); ++r) {
        inverse[r] = margin[r] = std::numeric_limits<float>::quiet_NaN();
      }
      rows_ = rows;
      std::fill_n(row_inverses_, count, std::numeric_limits<A>::quiet_NaN());
      TileScan t{};
      t.tile = tile_.get();
      t.tile_stride = tile_stride_;
      t.count = count;
      t.steps = steps();
      t.inverse = inverse;
      t.margin = margin;
      t.panels = panels_.get();
      t.queries = count_;
      t.bounds = bounds_.get();
      const void* ahead[kRoom];
      for (int64_t r = 0; r < ahead_rows; ++r) ahead[r] = database_ + next.rows[r] * p_.database_stride[1];
      t.ahead = ahead;
      t.ahead_rows = ahead_rows;
      t.multiply = p_.multiply;
      t.ahead_bytes = p_.width * int64_t(sizeof(T));
      t.hit = [](void* self, int64_t q, int64_t at, float upper, float lower) {
        Block& block = *static_cast<Block*>(self);
        block.scoring_ ? block.append_scored(q, at) : block.append(q, block.rows_[at], upper, lower);
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
    const int64_t quarter = quarter_of(first, last);
    int64_t of_quarter[kStreamRows][kStreamSteps], counts[kStreamRows], most = 0;
    for (int r = 0; r < kStreamRows; ++r) {
      const int64_t start = first + r * quarter, stop = std::min(last, start + std::min(end, quarter));
      counts[r] = filter_.list_rows(std::min(stop, start + begin), stop, of_quarter[r]);
      most = std::max(most, counts[r]);
    }
    for (int64_t i = 0; i < most; ++i) {
      int64_t rows[kStreamRows], any_row = -1;
      for (int r = 0; r < kStreamRows; ++r) {
        rows[r] = i < counts[r] ? of_quarter[r][i] : -1;
        any_row = std::max(any_row, rows[r]);
      }
      stream_step(rows, any_row);
    }
  }

  // One row of each quarter, or -1 where it has no more; that one reads `any_row` and is passed over. Each step is judged
  // by itself: that is little enough to be done while the next rows are on their way.
  void stream_step(const int64_t (&rows)[kStreamRows], int64_t any_row) {
    constexpr int kLanes = std::max<int>(Vec<A>::N, kStreamRows);
    const T* at[kStreamRows];
    for (int r = 0; r < kStreamRows; ++r) {
      at[r] = database_ + (rows[r] < 0 ? any_row : rows[r]) * p_.database_stride[1];
    }
    alignas(64) A dots[kStreamQueries * kLanes], squares[kLanes], inverse[kLanes], margin[kLanes];
    std::fill_n(squares, kLanes, A(1));
    std::fill_n(inverse, kLanes, A(0));
    stream_any<T>(count_, {units_.get(), plan_.padded, p_.width, dots, kLanes, squares}, at);
    int64_t special[kStreamRows];
    const int64_t specials =
        weigh(squares, rows, kStreamRows, inverses_, p_.normalized, margin_, inverse, margin, special);
    constexpr int N = Vec<A>::N;
    for (int64_t q = 0; q < count_; ++q) {
      for (int r = 0; r < kStreamRows; r += N) {
        const Vec<A> upper = load(dots + q * kLanes + r) * load(inverse + r) + load(margin + r);
        if (__builtin_expect(!any(upper >= bounds_[q]), 1)) continue;
        for (int i = r; i < std::min(r + N, kStreamRows); ++i) {
          const A score = dots[q * kLanes + i] * inverse[i];
          if (rows[i] >= 0 && score + margin[i] >= bounds_[q]) append(q, rows[i], score + margin[i], score - margin[i]);
        }
      }
    }
    if (__builtin_expect(specials > 0, 0)) score_special_rows(special, specials);
  }

  void append(int64_t q, int64_t row, A upper, A lower) {
    if (filter_.allowed(first_query_ + q, row)) add(q, {upper, lower, row});
  }

  // The row at a place of the tile, scored while it is in the cache.
  void append_scored(int64_t q, int64_t at) {
    const int64_t row = rows_[at];
    if (!filter_.allowed(first_query_ + q, row)) return;
    const A score = judge_.score(queries_.get() + q * plan_.padded, query_inverses_[q], row, row_inverses_[at]);
    if (score >= lists_[q].bound) {
      add(q, {score, score, row});
    } else if (++refused_ == plan_.capacity) {
      refused_ = 0;
      ++settled_;
    }
  }

  void add(int64_t q, const Entry<A>& entry) {
    Survivors<A>& list = lists_[q];
    list.entries[list.count] = entry;
    if (__builtin_expect(++list.count >= list.limit, 0)) relieve(q);
  }

  __attribute__((noinline)) void relieve(int64_t q) {
    Survivors<A>& list = lists_[q];
    thin(list, rank_, rank_ / 8, keys_.get());
    if (list.count > plan_.capacity - plan_.capacity / 8) {
      // Of equal scores the k first, also in a sample: that k others reach the guess would not show what was dropped.
      if (scoring_) {
        keep_best(list, p_.k);
      } else {
        judge_.load(search_, first_query_ + q, plan_.padded);
        judge_.settle(list, p_.k, factors_[q], scored_.get());
      }
      ++settled_;
    }
    list.limit = std::clamp(2 * list.count, list.limit, plan_.capacity);
    if (states_[q] == State::kOpen) bounds_[q] = scan_bound(q);
  }

  // `known` is the score of a row that needs no scan.
  void append_known(int64_t q, A known, int64_t row) {
    if (!(known >= A(p_.min_score))) return;
    if (scoring_) {
      if (known >= lists_[q].bound) append(q, row, known, known);
      return;
    }
    const Entry<A> entry = Judge<T>::known_entry({known, row}, factors_[q]);
    if (entry.upper >= lists_[q].bound) append(q, row, entry.upper, entry.lower);
  }

  void score_special_rows(const int64_t* rows, int64_t count) {
    if (count == 0) return;
    bool zero[kMostTileRows];
    bool all_zero = true;
    for (int64_t i = 0; i < count; ++i) {
      // A zero row scores 0 with every query, if its given inverse is a number.
      zero[i] = squared_norm(database_ + rows[i] * p_.database_stride[1], p_.width) == 0 &&
                (!inverses_ || std::abs(inverses_[rows[i]]) <= std::numeric_limits<A>::max());
      all_zero = all_zero && zero[i];
    }
    for (int64_t q = 0; q < count_; ++q) {
      if (states_[q] != State::kOpen) continue;
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
  RowFilter filter_;
  const ScanKernels* kernels_;
  int64_t padded_queries_;
  Scratch<A> query_;
  Judge<T> judge_;
  Scratch<A> units_;
  Scratch<A> bounds_;
  Scratch<double> factors_;  // a score times this is what margins are measured in
  Scratch<State> states_;
  // Where hits are scored at once: the queries as scores are computed from them.
  Scratch<A> queries_;
  Scratch<double> query_inverses_;
  Scratch<A> panels_;
  int64_t tile_stride_;
  Scratch<float> tile_;
  Scratch<A> guesses_;  // bounds that were guessed, or minus infinity
  Scratch<typename Element<A>::integer> keys_;
  Scratch<Scored<A>> scored_;
  Finish<T> finish_;

  int64_t search_ = 0, first_query_ = 0, count_ = 0, settled_ = 0, refused_ = 0;
  Survivors<A>* lists_ = nullptr;
  const T* database_ = nullptr;
  const A* inverses_ = nullptr;
  int64_t rank_ = 0;
  A margin_ = 0;
  bool coarse_ = false, scoring_ = false;  // scoring: lists hold scores, not intervals
  const int64_t* rows_ = nullptr;  // of the tile, and what is known of 1 / |row|
  A row_inverses_[kMostTileRows];
};

}  // namespace
}  // namespace memkern::cpu::MK_NS
