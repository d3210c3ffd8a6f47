// The scan with products by a library, which the host hands in: for processors whose matrix units it knows and scan.h does
// not. Queries and rows lie row by row, and a tile of rows is large enough that its call does not tell.
//
// Products of bfloat16 come back in bfloat16: their rounding is part of the margin. Compiled in the two forms of scan.h.
// Include after scan.h.
#pragma once

namespace memkern::cpu::MK_NS {
namespace {

#if defined(MK_DOT_BF16)
using Product = bf16;
#else
using Product = float;
#endif

void pack_rows(const float* queries, int64_t count, int64_t stride, int64_t width, void* rows, double* loss) {
  const int64_t steps = padded_width(width) / kPerStep;
  pack_queries(queries, count, stride, width, static_cast<Element32*>(rows), steps, 1, loss);
}

void scan_by_library(const TileScan& t) {
  const int64_t lanes = padded_lanes(t.queries);
  Scratch<Product> products(t.count * lanes);
  Scratch<uint32_t> places(lanes + kLanes);
  Scratch<float> uppers(lanes);
  t.multiply({t.tile, t.panels, products.get(), t.count, lanes, t.steps * kPerStep, t.tile_stride * kPerStep,
              kPerStep == 2 ? DType::kBF16 : DType::kF32});
  for (const void* const* row = t.ahead; row != t.ahead + t.ahead_rows; ++row) {
    for (int64_t i = 0; i < t.ahead_bytes; i += 64) __builtin_prefetch(static_cast<const char*>(*row) + i, 0, 2);
  }
  for (int64_t r = 0; r < t.count; ++r) {
    const VecF inverse(t.inverse[r]), margin(t.margin[r]);
    int64_t count = 0;
    for (int64_t q = 0; q < lanes; q += kLanes) {
      const VecF upper = fma(load(products.get() + r * lanes + q), inverse, margin);
      store(uppers.get() + q, upper);
      count += list_lanes(upper, load(t.bounds + q), uint32_t(q), places.get() + count);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = places[i];
      if (uppers[query] >= t.bounds[query]) t.hit(t.context, query, r, uppers[query], uppers[query] - 2 * t.margin[r]);
    }
  }
}

constexpr ScanKernels kLibraryKernels = {
    kPerStep, kLanes, kWidestPanel * kLanes, kMostTileRows, kPerStep == 2 ? 0x1p-8 : 0.0, pack_rows, scan_by_library,
    {bring_rows<float>, bring_rows<bf16>, bring_rows<f16>},
};

}  // namespace
}  // namespace memkern::cpu::MK_NS
