// How the work of a search is divided, and how many rows a query is expected to keep. Include after scan_types.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

constexpr int64_t kPanelBytes = 512 << 10;  // packed queries that stay in L2 beside a tile
// Rows are met by their place in each so many, a prime, so that rows which repeat with a period are met evenly: one place
// first, where many rows pass also four more, then the rest. Bit i: place i.
constexpr int64_t kSample = 31;
constexpr uint32_t kFirstPlaces = 1, kSecondPlaces = 1 << 6 | 1 << 12 | 1 << 18 | 1 << 25;
constexpr uint32_t kAllPlaces = (uint32_t(1) << kSample) - 1;
constexpr int kStreamQueries = 4;
constexpr int64_t kLibraryQueries = 64;  // fewer pay neither a library's calls nor its larger tiles
// From this k on a row is scored exactly as soon as it passes the bound: it lies in the cache then, while those of the
// final list would come from memory again, and they are more than half of all that pass.
constexpr int64_t kScoredRank = 64;

// Blocks of queries, and for few of them also parts of the rows.
struct Plan {
  int64_t padded;  // width of a query in memory
  int64_t block;   // queries scanned together
  int64_t blocks;  // of one search
  int64_t parts;   // of the rows
  int64_t rank;    // the place in the sample whose score is taken for the bound
  int64_t capacity;
  bool exact;      // rows are scored as they pass the bound
  const ScanKernels* kernels;  // null: stream
};

// The k best rows leave about k places / kSample in a sample. With four and a half standard deviations more, the row at
// this place in the sample lies below the k-th best of all but for one query in some hundred thousand, and such a query
// is found out and scanned again with the rank k, which needs no luck. More certainty would cost every query more
// survivors.
inline int64_t sample_rank(int64_t k, uint32_t places) {
  const double share = double(__builtin_popcount(places)) / double(kSample), mean = double(k) * share;
  return std::min(k, int64_t(mean + 4.5 * std::sqrt(mean * (1 - share))) + 3);
}

template <class T>
Plan make_plan(const CosineSearch& p) {
  using A = acc_t<T>;
  Plan plan;
  plan.padded = (p.width + 63) / 64 * 64;
  plan.kernels = nullptr;
  plan.block = kStreamQueries;
  if (!std::is_same_v<T, double> && p.queries > kStreamQueries) {
    const bool library = p.multiply != nullptr && p.queries >= kLibraryQueries;
    const ScanKernels* pairs = bf16_scan(library);
    plan.kernels = pairs ? pairs : library ? &kLibraryKernels : &kScanKernels;
    const int64_t bytes = 4 * std::max<int64_t>(1, (p.width + plan.kernels->per_step - 1) / plan.kernels->per_step);
    const int64_t panel = plan.kernels->panel;
    plan.block = std::clamp<int64_t>(kPanelBytes / bytes / panel, 1, 32) * panel;
    // Every thread should have a block, as long as blocks fill a panel.
    const int64_t share = (p.queries * p.searches + p.thread_count - 1) / p.thread_count;
    plan.block = std::min(plan.block, std::max((share + panel - 1) / panel, int64_t(1)) * panel);
  }
  plan.exact = plan.kernels != nullptr && p.k >= kScoredRank;
  plan.block = std::min(plan.block, p.queries);
  plan.blocks = (p.queries + plan.block - 1) / plan.block;
  const int64_t items = plan.blocks * p.searches;
  plan.parts = 1;
  if (items < p.thread_count) {
    plan.parts = std::min({(p.thread_count + items - 1) / items, p.rows / 4096 + 1, int64_t(16)});
  }
  plan.rank = plan.kernels ? sample_rank(p.k, kFirstPlaces) : p.k;
  // What a search may allocate: 8 max(64 k, 1024) bytes for each query, and 4 for each row.
  const int64_t entry = sizeof(Entry<A>);
  const int64_t allowed = 8 * std::max<int64_t>(64 * p.k, 1024) * p.queries + 4 * p.rows;
  const int64_t expected = plan.rank < p.k ? plan.rank * kSample : 0;
  const int64_t wanted = std::max({expected * 5 / 4, 5 * p.k / 2 + 128, int64_t(256)});
  const int64_t affordable = plan.parts == 1 ? wanted : allowed / (2 * entry * p.queries * plan.parts);
  plan.capacity = std::clamp(affordable, 2 * p.k + 16, wanted);
  return plan;
}

}  // namespace
}  // namespace memkern::cpu::MK_NS
