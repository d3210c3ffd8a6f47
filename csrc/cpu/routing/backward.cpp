// Backward of route_experts in two passes: rows (logits, then the input's gradient), then the weight's gradient by tiles
// of experts and columns, each of which adds all rows in order.
#include "cpu/isa.h"
#include "common/vec.h"
#include "cpu/routing/pool.h"
#include "cpu/routing/kernels.h"

namespace memkern::cpu::MK_NS {

namespace {

// From here on the gradient is written past the caches: it is larger than they are, and nobody reads it soon.
constexpr int64_t kStreamBytes = 8 << 20;

// The gradient of one row's raw logits; probs and d_raw are K wide. Returns the row's share of the temperature's.
template <class T, class A>
A raw_gradient(const RouteBackward& p, int64_t row, A temperature, A* probs, A* d_raw) {
  const RouteInput& in = p.in;
  const int64_t experts = in.experts;
  const A* raw = static_cast<const A*>(p.raw) + row * experts;
  const A limit = A(in.clamp);
  const bool counted = p.grad_loss != nullptr && (in.row_mask == nullptr || in.row_mask[row]);
  A share = A(0);
  std::fill_n(d_raw, experts, A(0));
  // A zero row's probabilities are constants. Where no gradient comes, none goes: a masked row may hold NaN.
  if (!p.zero_rows[row] && (p.grad_probs != nullptr || p.grad_entropy != nullptr || counted)) {
    const A top = softmax_row(raw, probs, experts, limit, temperature);
    const T* grad_probs = static_cast<const T*>(p.grad_probs) + (p.grad_probs == nullptr ? 0 : row * experts);
    const A grad_entropy = p.grad_entropy == nullptr ? A(0) : static_cast<const A*>(p.grad_entropy)[row];
    const A grad_loss = counted ? *static_cast<const A*>(p.grad_loss) : A(0);
    const A* loss_weights = static_cast<const A*>(p.loss_weights);
    for_each_vec<A>(experts, [&](int64_t k, auto count) {
      Vec<A> g = p.grad_probs == nullptr ? Vec<A>(A(0)) : load_part(grad_probs + k, count);
      if (p.grad_entropy != nullptr) g = fma(entropy_slope(load_part(probs + k, count)), Vec<A>(grad_entropy), g);
      if (counted) g = fma(load_part(loss_weights + k, count), Vec<A>(grad_loss), g);
      store_part(d_raw + k, g, count);
    });
    share = softmax_row_backward(probs, raw, d_raw, experts, limit, temperature, top) / -temperature;
  }
  const A* grad_logits = static_cast<const A*>(p.grad_logits) + (p.grad_logits == nullptr ? 0 : row * experts);
  const bool bounded = limit < std::numeric_limits<A>::infinity();
  for_each_vec<A>(experts, [&](int64_t k, auto count) {
    Vec<A> g = load_part(d_raw + k, count);
    if (p.grad_logits != nullptr) g += load_part(grad_logits + k, count);
    if (bounded) {
      const A passes = p.straight_through ? std::numeric_limits<A>::max() : limit;
      g = select(abs(load_part(raw + k, count)) <= passes, g, Vec<A>(A(0)));
    }
    store_part(d_raw + k, g, count);
  });
  return share;
}

// to = sum over experts of d_raw[k] W[k]
template <class A>
void pool_gradient(const A* d_raw, const A* weight, int64_t experts, int64_t width, A* to) {
  for (int64_t k = 0; k < experts; k += 4) {
    const int64_t n = std::min<int64_t>(4, experts - k);
    Vec<A> g[4];
    const A* w[4];
    for (int64_t j = 0; j < 4; ++j) {
      g[j] = Vec<A>(j < n ? d_raw[k + j] : A(0));
      w[j] = weight + (k + std::min(j, n - 1)) * width;
    }
    for_each_vec<A>(width, [&](int64_t d, auto count) {
      Vec<A> sum = g[0] * load_part(w[0] + d, count);
      for (int64_t j = 1; j < n; ++j) sum = fma(g[j], load_part(w[j] + d, count), sum);
      if (k > 0) sum += load_part(to + d, count);
      store_part(to + d, sum, count);
    });
  }
}

// A row of the gradient that many slots share, put into each of them.
template <class T>
struct SlotWriter {
  SlotWriter(int64_t width_, bool stream_) : width(width_), stream(stream_ && width_ * sizeof(T) % sizeof(VecF) == 0) {}

  void copy(T* to, const T* from) const {
    if (!stream || reinterpret_cast<uintptr_t>(to) % sizeof(VecF) != 0) {
      std::memcpy(to, from, size_t(width) * sizeof(T));
      return;
    }
    // As floats whatever T is: the bits alone move.
    const float* source = reinterpret_cast<const float*>(from);
    float* target = reinterpret_cast<float*>(to);
    const int64_t floats = width * int64_t(sizeof(T)) / 4;
    for (int64_t i = 0; i < floats; i += VecF::N) MK_NS::stream(target + i, load(source + i));
  }
  void zero(T* to) const { std::memset(static_cast<void*>(to), 0, size_t(width) * sizeof(T)); }

  int64_t width;
  bool stream;
};

template <class T, class A>
void hiddens_gradient(const RouteBackward& p, int64_t row, const A* d_pool, T* rounded, const SlotWriter<T>& writer) {
  const RouteInput& in = p.in;
  const int64_t width = in.width;
  T* out = static_cast<T*>(p.d_hiddens) + row * in.slots * width;
  const uint8_t* mask = in.slot_mask == nullptr ? nullptr : in.slot_mask + row * in.slots;
  if (in.pooling == Pooling::kMax) {
    const int32_t* positions = static_cast<const int32_t*>(p.saved_pool) + row * width;
    store_row(rounded, d_pool, width);
    for (int64_t s = 0; s < in.slots; ++s) {
      T* to = out + s * width;
      const int32_t slot = int32_t(s);
      for (int64_t d = 0; d < width; ++d) to[d] = positions[d] == slot ? rounded[d] : T{};
    }
    return;
  }
  int64_t active = in.slots;
  if (mask != nullptr) active = std::count_if(mask, mask + in.slots, [](uint8_t m) { return m != 0; });
  const A scale = A(1) / A(std::max<int64_t>(1, active));
  for_each_vec<A>(width, [&](int64_t d, auto count) {
    store_part(rounded + d, load_part(d_pool + d, count) * Vec<A>(scale), count);
  });
  for (int64_t s = 0; s < in.slots; ++s) {
    if (mask == nullptr || mask[s]) {
      writer.copy(out + s * width, rounded);
    } else {
      writer.zero(out + s * width);
    }
  }
}

// (x - y) . z, which keeps the digits that x . z - y . z would lose.
template <class T, class A>
MK_INLINE A dot_of_difference(const T* x, const A* y, const A* z, int64_t width) {
  Vec<A> sum(A(0));
  for_each_vec<A>(width, [&](int64_t d, auto count) {
    sum = fma(load_part(x + d, count) - load_part(y + d, count), load_part(z + d, count), sum);
  });
  return reduce_sum(sum);
}

// Attention: dx_s = w_s dp + c_s q / sqrt(D) with c_s = w_s (x_s - pooled) . dp; d_query gathers c_s x_s / sqrt(D).
template <class T, class A>
void attention_gradient(const RouteBackward& p, int64_t row, const A* d_pool, A* d_query) {
  const RouteInput& in = p.in;
  const int64_t width = in.width;
  const A* query = static_cast<const A*>(in.query);
  const A* pooled = static_cast<const A*>(p.saved_pool) + row * width;
  const A* weights = static_cast<const A*>(p.slot_weights) + row * in.slots;
  const uint8_t* mask = in.slot_mask == nullptr ? nullptr : in.slot_mask + row * in.slots;
  const T* first = static_cast<const T*>(in.hiddens) + row * in.row_stride;
  T* out = p.d_hiddens == nullptr ? nullptr : static_cast<T*>(p.d_hiddens) + row * in.slots * width;
  const A root = A(1) / std::sqrt(A(width));
  for (int64_t s = 0; s < in.slots; ++s) {
    if (mask != nullptr && !mask[s]) {
      if (out != nullptr) std::memset(static_cast<void*>(out + s * width), 0, size_t(width) * sizeof(T));
      continue;
    }
    const T* x = first + s * in.slot_stride;
    const Vec<A> share(weights[s] * dot_of_difference(x, pooled, d_pool, width) * root), weight(weights[s]);
    for_each_vec<A>(width, [&](int64_t d, auto count) {
      if (out != nullptr) {
        store_part(out + s * width + d, fma(share, load_part(query + d, count), weight * load_part(d_pool + d, count)),
                   count);
      }
      if (d_query != nullptr) {
        store_part(d_query + d, fma(share, load_part(x + d, count), load_part(d_query + d, count)), count);
      }
    });
  }
}

// The pooled vectors of all rows: saved, or the input itself for one slot, or gathered at the maxima.
template <class T, class A>
struct SavedPools {
  explicit SavedPools(const RouteBackward& p_) : p(p_), gathered(needs_gather() ? p_.in.rows * p_.in.width : 0) {}

  bool needs_gather() const {
    const RouteInput& in = p.in;
    if (p.d_weight == nullptr) return false;
    if (in.slots == 1) return !std::is_same_v<T, A> || in.slot_mask != nullptr;
    return in.pooling == Pooling::kMax;
  }
  // Called once per row, before any at().
  void gather(int64_t row) {
    if (!needs_gather()) return;
    const RouteInput& in = p.in;
    const T* first = static_cast<const T*>(in.hiddens) + row * in.row_stride;
    A* to = gathered.get() + row * in.width;
    if (in.slots == 1) {
      if (in.slot_mask != nullptr && !in.slot_mask[row]) {
        std::fill_n(to, in.width, A(0));
      } else {
        load_row(first, to, in.width);
      }
      return;
    }
    const int32_t* positions = static_cast<const int32_t*>(p.saved_pool) + row * in.width;
    for (int64_t d = 0; d < in.width; ++d) {
      to[d] = positions[d] < 0 ? A(0) : A(to_acc(first[positions[d] * in.slot_stride + d]));
    }
  }
  const A* at(int64_t row) const {
    if (needs_gather()) return gathered.get() + row * p.in.width;
    if (p.in.slots == 1) return static_cast<const A*>(p.in.hiddens) + row * p.in.row_stride;
    return static_cast<const A*>(p.saved_pool) + row * p.in.width;
  }

  const RouteBackward& p;
  Scratch<A> gathered;
};

// E experts by 4 vectors of columns: the sum over rows, 256 of them at a time so that the error does not grow with B.
template <int E, class T, class A>
void weight_tile(const SavedPools<T, A>& pools, const A* d_raw, int64_t rows, int64_t experts, int64_t k, int64_t column,
                 int64_t columns, A* to, int64_t width) {
  constexpr int N = Vec<A>::N, kVecs = 4;
  constexpr int64_t kBlock = 256;
  Vec<A> total[E][kVecs];
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) total[e][v] = Vec<A>(A(0));
  }
  for (int64_t block = 0; block < rows; block += kBlock) {
    Vec<A> sum[E][kVecs];
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[e][v] = Vec<A>(A(0));
    }
    const int64_t end = std::min(rows, block + kBlock);
    for (int64_t row = block; row < end; ++row) {
      const A* x = pools.at(row) + column;
      const A* g = d_raw + row * experts + k;
      Vec<A> part[kVecs];
      if (columns == kVecs * N) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) part[v] = load(x + v * N);
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const int64_t left = std::min<int64_t>(N, std::max<int64_t>(0, columns - v * N));
          part[v] = load_n(x + (left > 0 ? v * N : 0), left);
        }
      }
#pragma GCC unroll 8
      for (int e = 0; e < E; ++e) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sum[e][v] = fma(Vec<A>(g[e]), part[v], sum[e][v]);
      }
    }
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) total[e][v] += sum[e][v];
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) {
    for (int v = 0; v < kVecs && v * N < columns; ++v) {
      store_n(to + (k + e) * width + column + v * N, total[e][v], std::min<int64_t>(N, columns - v * N));
    }
  }
}

template <class T, class A>
void weight_gradient(const RouteBackward& p, const SavedPools<T, A>& pools, const A* d_raw, ParallelFor threads) {
  const RouteInput& in = p.in;
  const int64_t experts = in.experts, width = in.width, tile = 4 * Vec<A>::N, tiles = (width + tile - 1) / tile;
  A* to = static_cast<A*>(p.d_weight);
  parallel(threads, tiles, grain_of(in.rows * experts * tile / 4), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t column = t * tile, columns = std::min(tile, width - column);
      int64_t k = 0;
      for (; k + 4 <= experts; k += 4) weight_tile<4>(pools, d_raw, in.rows, experts, k, column, columns, to, width);
      for (; k < experts; ++k) weight_tile<1>(pools, d_raw, in.rows, experts, k, column, columns, to, width);
    }
  });
}

template <class T>
void run(const RouteBackward& p, ParallelFor threads) {
  using A = acc_t<T>;
  const RouteInput& in = p.in;
  const int64_t experts = in.experts, width = in.width, chunk = chunk_rows(in.rows), chunks = chunk_count(in.rows);
  const A temperature = temperature_of<A>(in.temperature, in.temperature_value);
  const bool attention = in.pooling == Pooling::kAttention && in.slots != 1;
  const bool params = p.d_weight != nullptr;
  const int64_t query_width = attention && params ? width : 0, terms_size = experts + 1 + query_width;
  const bool stream = in.rows * in.slots * width * int64_t(sizeof(T)) >= kStreamBytes;
  Scratch<A, 1024> d_raw(in.rows * experts);
  // Per chunk: the bias's gradient, the temperature's, the query's.
  Scratch<A, 1024> terms(std::max<int64_t>(1, chunks) * terms_size);
  SavedPools<T, A> pools(p);
  const int64_t elements = chunk * width * (in.slots + in.experts);
  parallel(threads, chunks, grain_of(elements), [&](int64_t begin, int64_t end) {
    Scratch<A, 256> probs(experts);
    Scratch<A, 1024> d_pool(width);
    Scratch<T, 1024> rounded(width);
    const SlotWriter<T> writer(width, stream);
    for (int64_t c = begin; c < end; ++c) {
      A* own = terms.get() + c * terms_size;
      std::fill_n(own, terms_size, A(0));
      const int64_t last = std::min(in.rows, (c + 1) * chunk);
      for (int64_t row = c * chunk; row < last; ++row) {
        A* g = d_raw.get() + row * experts;
        own[experts] += raw_gradient<T>(p, row, temperature, probs.get(), g);
        for_each_vec<A>(experts, [&](int64_t k, auto count) {
          store_part(own + k, load_part(own + k, count) + load_part(g + k, count), count);
        });
        pools.gather(row);
        if (p.d_hiddens == nullptr && query_width == 0) continue;
        pool_gradient(g, static_cast<const A*>(in.weight), experts, width, d_pool.get());
        if (attention) {
          attention_gradient<T>(p, row, d_pool.get(), query_width == 0 ? nullptr : own + experts + 1);
        } else {
          hiddens_gradient(p, row, d_pool.get(), rounded.get(), writer);
        }
      }
    }
    if (stream) stream_fence();
  });
  A* total = terms.get();
  if (chunks == 0) std::fill_n(total, terms_size, A(0));
  for (int64_t c = 1; c < chunks; ++c) {
    for (int64_t i = 0; i < terms_size; ++i) total[i] += total[c * terms_size + i];
  }
  if (p.d_temperature != nullptr) *static_cast<A*>(p.d_temperature) = total[experts];
  if (!params) return;
  std::copy_n(total, experts, static_cast<A*>(p.d_bias));
  if (p.d_query != nullptr) {
    if (attention) {
      std::copy_n(total + experts + 1, width, static_cast<A*>(p.d_query));
    } else {
      std::fill_n(static_cast<A*>(p.d_query), width, A(0));
    }
  }
  weight_gradient<T, A>(p, pools, d_raw.get(), threads);
}

}  // namespace

void route_backward(const RouteBackward& p, ParallelFor threads) { MK_DISPATCH(p.in.dtype, T, run<T>(p, threads)) }

}  // namespace memkern::cpu::MK_NS
