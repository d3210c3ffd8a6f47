// Which rows a query may find, whatever their scores. Include after ops/cosine_topk.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

struct RowFilter {
  const CosineSearch& p;
  int64_t search = 0;

  // By any query.
  bool may_be_found(int64_t row) const {
    return !p.valid || p.valid_per_query || p.valid[search * p.valid_stride[0] + row * p.valid_stride[2]];
  }

  // The rows of [begin, end) that any query may find.
  int64_t list_rows(int64_t begin, int64_t end, int64_t* rows) const {
    int64_t count = 0;
    for (int64_t row = begin; row < end; ++row) {
      rows[count] = row;
      count += may_be_found(row);
    }
    return count;
  }

  bool allowed(int64_t query, int64_t row) const {
    if (p.valid_per_query) {
      const bool* valid = p.valid + search * p.valid_stride[0] + query * p.valid_stride[1];
      if (!valid[row * p.valid_stride[2]]) return false;
    }
    return !p.query_group ||
           p.query_group[search * p.queries + query] == p.row_group[search * p.rows + row];
  }
};

}  // namespace
}  // namespace memkern::cpu::MK_NS
