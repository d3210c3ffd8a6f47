// How the search drives a scan: one tile of rows, a block of queries, and the kernels of one element type. Include
// after cpu/isa.h.
#pragma once

namespace memkern::cpu::MK_NS {

constexpr int64_t kTileRows = 48, kMostTileRows = 480;

struct TileScan {
  const void* tile;  // rows in the scan's type, tile_stride 32-bit elements apart
  int64_t tile_stride;
  int64_t count;  // of rows; the tile has room for whole groups of them
  int64_t steps;
  const float* inverse;  // a score is the product times this
  const float* margin;   // at most this far from the truth, as the scan measures it
  const void* panels;
  LibraryProduct multiply;  // where the kernels want one
  int64_t queries;
  const float* bounds;  // one for each lane, infinite for those that are not scanned
  const void* const* ahead;  // rows that the next tile will read, of so many bytes
  int64_t ahead_rows, ahead_bytes;
  void (*hit)(void* context, int64_t query, int64_t at, float upper, float lower);  // `at`: the row's place in the tile
  void* context;
};

struct ScanKernels {
  int per_step;      // elements of a row in 32 bits
  int lanes;         // queries are padded to a multiple of it
  int panel;         // queries that are packed together
  int64_t tile_rows;
  double rounding;   // of a product, relative to the norms
  void (*pack)(const float* queries, int64_t count, int64_t stride, int64_t width, void* panel, double* loss);
  void (*scan)(const TileScan&);
  // By the dtype of the database: float, bfloat16, float16. `squares`: the squared norms of the rows.
  void (*bring[3])(const void* database, int64_t stride, int64_t width, const int64_t* rows, int64_t count, void* tile,
                   int64_t tile_stride, float* squares);
};

// Pairs of bfloat16, by our own kernel or by a library; null where the processor or the instruction set of this namespace
// has no such products.
const ScanKernels* bf16_scan(bool library);

}  // namespace memkern::cpu::MK_NS
