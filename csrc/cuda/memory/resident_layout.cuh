// The shared memory of a block of the scan's backward in one launch (resident_back.cu).
#pragma once

#include "cuda/memory/link_rows_back.cuh"
#include "cuda/memory/step.cuh"

namespace memkern::cuda::slots {

using Tile = LinkTile<0, 4>;
using BackTile = LinkBackTile<kReads, 4>;

// Where things lie in a block's shared memory, in floats. A parameter, so that no thread has to keep fifty pointers.
struct Layout {
  int d_links, d_memory;                       // (H, rows, N), (rows, W)
  int d_usage, d_precedence, d_read, d_write;  // of the state, whole
  int d_content, read_own, retention;          // (R or H, N), (N), (N)
  int precedence;                              // (H, N) while a segment is repeated, in the place of d_content
  int back, column;                            // (H, R, N), (H, 2, N) sums over the block's rows
  // Of its rows, for the others: (heads, rows), and sums over them, (R + 2 H, W) and (H, W).
  int read_dots, read_norms, along, ahead, row, new_d_write, write_dots, write_norms, d_retention;
  int columns, key_columns;
  int shared, sums;
  // One place for what never lives at the same time: the links' tiles, the lookup of the reads, the vectors of the
  // write.
  int tile, back_tile;
  int all_read_dots, all_read_norms;
  int all_write_dots, all_write_norms, d_lookup, scaled, write_own, seen, d_seen, d_allocated, all_d_retention;
  int keys, before, slots, held;
  int64_t count;
};

// The offsets of pieces, each 16-byte aligned.
class Offsets {
 public:
  int take(int64_t count) {
    const int64_t place = count_;
    count_ += (count + 3) / 4 * 4;
    return int(place);
  }
  template <class T>
  int place() {
    return take((sizeof(T) + 3) / 4);
  }
  int64_t count() const { return count_; }

 private:
  int64_t count_ = 0;
};

inline Layout lay_out(const Shape& s, int rows, bool links_on_chip) {
  const int64_t n = s.slots, reads = s.read_heads, writes = s.write_heads, width = s.width;
  Offsets pieces;
  Layout c{};
  c.d_links = pieces.take(s.track_links && links_on_chip ? writes * rows * n : 0);
  c.d_memory = pieces.take(rows * width);
  c.d_usage = pieces.take(n);
  c.d_precedence = pieces.take(s.track_links ? writes * n : 0);
  c.d_read = pieces.take(reads * n);
  c.d_write = pieces.take(writes * n);
  c.d_content = c.precedence = pieces.take((reads > writes ? reads : writes) * n);
  c.read_own = pieces.take(n);
  c.retention = pieces.take(n);
  c.back = pieces.take(s.track_links ? writes * reads * n : 0);
  c.column = pieces.take(s.track_links ? writes * 2 * n : 0);
  c.read_dots = pieces.take(reads * rows);
  c.read_norms = pieces.take(rows);
  c.along = pieces.take(reads * rows);
  c.ahead = pieces.take(writes * reads * rows);
  c.row = pieces.take(writes * rows);
  c.new_d_write = pieces.take(writes * rows);
  c.write_dots = pieces.take(writes * rows);
  c.write_norms = pieces.take(rows);
  c.d_retention = pieces.take(rows);
  c.columns = pieces.take((reads + 2 * writes) * width);
  c.key_columns = pieces.take(writes * width);
  c.shared = pieces.place<Shared>();
  c.sums = pieces.place<Columns>();

  Offsets tile = pieces, back_tile = pieces, of_reads = pieces, of_write = pieces;
  c.tile = tile.place<Tile>();
  c.back_tile = back_tile.place<BackTile>();
  c.all_read_dots = of_reads.take(reads * n);
  c.all_read_norms = of_reads.take(n);
  c.all_write_dots = of_write.take(writes * n);
  c.all_write_norms = of_write.take(n);
  c.d_lookup = of_write.take(writes * n);
  c.scaled = of_write.take(writes * n);
  c.write_own = of_write.take(n);
  c.seen = of_write.take(writes * n);
  c.d_seen = of_write.take(n);
  c.d_allocated = of_write.take(n);
  c.all_d_retention = of_write.take(n);
  c.keys = of_write.take(n);
  c.before = of_write.take(n);
  c.slots = of_write.take(n);
  c.held = of_write.take(n);
  for (const Offsets& other : {tile, back_tile, of_reads, of_write}) {
    if (other.count() > pieces.count()) pieces = other;
  }
  c.count = pieces.count();
  return c;
}

}  // namespace memkern::cuda::slots
