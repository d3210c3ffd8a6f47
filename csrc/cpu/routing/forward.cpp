// Forward of route_experts: pool, project, clamp, softmax, entropy and loss, one pass over the input.
#include "cpu/isa.h"
#include "common/vec.h"
#include "cpu/routing/pool.h"
#include "cpu/routing/kernels.h"

namespace memkern::cpu::MK_NS {

namespace {

constexpr int64_t kBlock = 16;  // rows whose pools wait together for the projection

// Where the pooled vector of each of a block's rows lies: in the input itself, in what backward saves, or in scratch.
template <class T, class A>
struct Pools {
  explicit Pools(const RouteForward& p)
      : scratch(needs_scratch(p) ? kBlock * p.in.width : 0), slots(p.in.slots), weights(p.in.slots) {}

  static bool in_place(const RouteInput& in) {
    return std::is_same_v<T, A> && in.slots == 1 && in.slot_mask == nullptr;
  }
  static bool needs_scratch(const RouteForward& p) {
    return !in_place(p.in) && (p.saved_pool == nullptr || p.in.pooling == Pooling::kMax);
  }

  void fill(const RouteForward& p, int64_t first, int64_t rows) {
    const RouteInput& in = p.in;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first + r;
      if (in_place(in)) {
        at[r] = static_cast<const A*>(in.hiddens) + row * in.row_stride;
        continue;
      }
      A* to = needs_scratch(p) ? scratch.get() + r * in.width : static_cast<A*>(p.saved_pool) + row * in.width;
      at[r] = to;
      slots.collect(in, row);
      if (in.pooling == Pooling::kMean) {
        pool_mean(slots, in.width, to);
      } else if (in.pooling == Pooling::kMax) {
        int32_t* positions = static_cast<int32_t*>(p.saved_pool);
        pool_max(slots, in.width, to, positions == nullptr ? nullptr : positions + row * in.width);
      } else {
        A* saved = static_cast<A*>(p.slot_weights);
        pool_attention(slots, in.slots, in.width, static_cast<const A*>(in.query), to,
                       saved == nullptr ? weights.get() : saved + row * in.slots);
      }
    }
  }

  const A* at[kBlock];
  Scratch<A> scratch;
  Slots<T> slots;
  Scratch<A, 64> weights;
};

template <class T, class A>
void finish_row(const RouteForward& p, int64_t row, bool zero, A* raw, A* probs, A temperature,
                const LoadTerms<A>& terms) {
  const RouteInput& in = p.in;
  const int64_t experts = in.experts;
  const A* bias = static_cast<const A*>(p.bias);
  const A limit = A(in.clamp);
  A* logits = static_cast<A*>(p.logits) + row * experts;
  for_each_vec<A>(experts, [&](int64_t k, auto count) {
    Vec<A> z = load_part(raw + k, count);
    if (bias != nullptr) z += load_part(bias + k, count);
    store_part(raw + k, z, count);
    store_part(logits + k, clamp(z, limit), count);
  });
  if (p.raw != nullptr) {
    store_row(static_cast<A*>(p.raw) + row * experts, raw, experts);
    p.zero_rows[row] = zero;
  }
  if (zero) {
    std::fill_n(probs, experts, A(1) / A(experts));
  } else {
    softmax_row(raw, probs, experts, limit, temperature);
  }
  store_row(static_cast<T*>(p.probs) + row * experts, probs, experts);
  static_cast<A*>(p.entropy)[row] = entropy_row(probs, experts);
  if (in.row_mask == nullptr || in.row_mask[row]) terms.add(probs, experts);
}

template <class T>
void run(const RouteForward& p, ParallelFor threads) {
  using A = acc_t<T>;
  const RouteInput& in = p.in;
  const int64_t experts = in.experts, chunk = chunk_rows(in.rows), chunks = chunk_count(in.rows);
  const int64_t terms_size = 2 * experts + 1;
  const A temperature = temperature_of<A>(in.temperature, in.temperature_value);
  Scratch<A, 1024> terms(std::max<int64_t>(1, chunks) * terms_size);
  const int64_t elements = chunk * in.width * (in.slots + in.experts);
  parallel(threads, chunks, grain_of(elements), [&](int64_t begin, int64_t end) {
    Pools<T, A> pools(p);
    Scratch<A, 1024> raw(kBlock * experts), probs(experts);
    for (int64_t c = begin; c < end; ++c) {
      A* own = terms.get() + c * terms_size;
      const LoadTerms<A> sums(own, own + experts, own + 2 * experts, experts);
      const int64_t last = std::min(in.rows, (c + 1) * chunk);
      for (int64_t first = c * chunk; first < last; first += kBlock) {
        const int64_t rows = std::min(kBlock, last - first);
        pools.fill(p, first, rows);
        project(pools.at, rows, static_cast<const A*>(in.weight), experts, in.width, raw.get());
        for (int64_t r = 0; r < rows; ++r) {
          const bool zero = is_zero_row(pools.at[r], in.width);
          finish_row<T>(p, first + r, zero, raw.get() + r * experts, probs.get(), temperature, sums);
        }
      }
    }
  });
  finish_loss(terms.get(), chunks, experts, static_cast<A*>(p.loss), static_cast<A*>(p.loss_weights));
}

}  // namespace

void route_forward(const RouteForward& p, ParallelFor threads) { MK_DISPATCH(p.in.dtype, T, run<T>(p, threads)) }

}  // namespace memkern::cpu::MK_NS
