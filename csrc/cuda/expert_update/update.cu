// The gated update: one launch forward, three backward, on any GPU from sm_80 on.
#include "cuda/expert_update.h"

#include <type_traits>

#include "cuda/expert_update/tile.cuh"

namespace memkern::cuda {

namespace {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

struct TileOf {
  int m, n;  // first row, first column
};

// Tiles in groups of eight rows of tiles, whose left factors stay in the cache.
__device__ __forceinline__ TileOf tile_of(int64_t index, int64_t rows, int64_t columns) {
  constexpr int64_t kGroup = 8;
  const int64_t tiles_m = (rows + kTile - 1) / kTile, tiles_n = (columns + kTile - 1) / kTile;
  const int64_t first = index / (kGroup * tiles_n) * kGroup, inside = index % (kGroup * tiles_n);
  const int64_t height = min(kGroup, tiles_m - first);
  return {int((first + inside % height) * kTile), int(inside / height * kTile)};
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ExpertUpdate p) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int64_t k = blockIdx.y;
  const int R = int(p.B * p.S), D = int(p.D), S = int(p.S);
  const TileOf tile = tile_of(blockIdx.x, R, D);
  T* staged = reinterpret_cast<T*>(memory);
  const auto buffer = [&](int stage, int factor) { return staged + (stage * 3 + factor) * kFactor; };
  const T* states = static_cast<const T*>(p.states);
  const T* hiddens = static_cast<const T*>(p.hiddens);
  const T* gate_weight = static_cast<const T*>(p.gate_weight) + k * D * 2 * D;
  const T* update_weight = static_cast<const T*>(p.update_weight) + k * D * 2 * D;
  const auto state_row = [&](int64_t r) { return ((r / S * p.K + k) * S + r % S) * D; };
  const int half = (D + kDepth - 1) / kDepth;
  Accumulator<T, true, true> gate, update;
  pipeline(
      2 * half,
      [&](int step, int stage) {
        // The state's columns first, then the hidden's, against the two halves of a weight's row.
        const bool of_hiddens = step >= half;
        const int first = (of_hiddens ? step - half : step) * kDepth, offset = of_hiddens ? D : 0;
        stage_factor<T, V, true>(
            buffer(stage, 0),
            [&](int i) -> const T* {
              const int64_t r = tile.m + i;
              if (r >= R) return nullptr;
              return of_hiddens ? hiddens + r * D : states + state_row(r);
            },
            first, D);
        const auto weight_row = [&](const T* weight) {
          return [=](int i) -> const T* {
            return tile.n + i < D ? weight + int64_t(tile.n + i) * 2 * D + offset : nullptr;
          };
        };
        stage_factor<T, V, true>(buffer(stage, 1), weight_row(gate_weight), first, D);
        stage_factor<T, V, true>(buffer(stage, 2), weight_row(update_weight), first, D);
      },
      [&](int stage) {
        gate.add(buffer(stage, 0), buffer(stage, 1));
        update.add(buffer(stage, 0), buffer(stage, 2));
      });
  float* z_gate = reinterpret_cast<float*>(memory);
  float* z_update = z_gate + kTile * kOutRow;
  gate.store(z_gate);
  update.store(z_update);
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int64_t r = tile.m + i / kTile, d = tile.n + i % kTile;
    if (r >= R || d >= D) continue;
    const int64_t b = r / S, at = state_row(r) + d;
    const int inside = i / kTile * kOutRow + i % kTile;
    float x = z_gate[inside], y = z_update[inside];
    if (p.gate_bias) x += p.gate_bias[k * D + d];
    if (p.update_bias) y += p.update_bias[k * D + d];
    const float g = sigmoid(x), u = tanhf(y), prob = p.probs[b * p.K + k], a = prob * g;
    const T state = states[at];
    const bool keep = prob == 0.0f || (p.row_mask && !p.row_mask[b]);
    static_cast<T*>(p.out)[at] = keep ? state : from_float<T>(a * u + (1.0f - a) * to_float(state));
    if (p.gates) {
      const int64_t saved = (r * p.K + k) * D + d;
      static_cast<T*>(p.gates)[saved] = from_float<T>(g);
      static_cast<T*>(p.updates)[saved] = from_float<T>(u);
    }
  }
}

// One block per (b, k): gradients of the pre-activations, and d_probs.
template <class T>
__global__ void __launch_bounds__(256) mix_kernel(const ExpertUpdate p) {
  __shared__ float scratch[kWarp];
  const int64_t pair = blockIdx.x, b = pair / p.K, k = pair % p.K;
  const T* grad = static_cast<const T*>(p.grad) + pair * p.S * p.D;
  const T* states = static_cast<const T*>(p.states) + pair * p.S * p.D;
  const T* gates = static_cast<const T*>(p.gates);
  const T* updates = static_cast<const T*>(p.updates);
  T* d_products = static_cast<T*>(p.d_products);
  const bool masked = p.row_mask && !p.row_mask[b];
  const float prob = masked ? 0.0f : p.probs[pair];
  float total = 0.0f;
  for (int64_t s = 0; s < p.S; ++s) {
    const int64_t saved = ((b * p.S + s) * p.K + k) * p.D;
    float row = 0.0f;
    for (int64_t d = threadIdx.x; d < p.D; d += blockDim.x) {
      float d_gate = 0.0f, d_update = 0.0f;
      if (!masked) {
        const float dm = to_float(grad[s * p.D + d]), m = to_float(states[s * p.D + d]);
        const float g = to_float(gates[saved + d]), u = to_float(updates[saved + d]), da = dm * (u - m);
        row += da * g;
        d_gate = prob * da * (g * (1.0f - g));
        d_update = prob * (dm * g) * (1.0f - u * u);
      }
      d_products[2 * saved + d] = from_float<T>(d_gate);
      d_products[2 * saved + p.D + d] = from_float<T>(d_update);
    }
    total += row;
  }
  total = block_sum(total, scratch);
  if (p.d_probs && threadIdx.x == 0) p.d_probs[pair] = total;
}

// blockIdx.y: the experts of d_states, and, first, one more for d_hiddens, whose sum runs over all experts.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) inputs_kernel(const ExpertUpdate p) {
  extern __shared__ __align__(128) unsigned char memory[];
  const bool of_hiddens = p.d_hiddens && blockIdx.y == 0;
  const int64_t expert = int64_t(blockIdx.y) - (p.d_hiddens ? 1 : 0);
  const int R = int(p.B * p.S), D = int(p.D), S = int(p.S);
  const TileOf tile = tile_of(blockIdx.x, R, D);
  T* staged = reinterpret_cast<T*>(memory);
  const auto buffer = [&](int stage, int factor) { return staged + (stage * 2 + factor) * kFactor; };
  const T* d_products = static_cast<const T*>(p.d_products);
  const int half = (D + kDepth - 1) / kDepth, experts = of_hiddens ? int(p.K) : 1, first_column = of_hiddens ? D : 0;
  Accumulator<T, true, false> sum;
  pipeline(
      experts * 2 * half,
      [&](int step, int stage) {
        const int64_t k = of_hiddens ? step / (2 * half) : expert;
        const int which = step / half % 2, first = step % half * kDepth;
        const T* weight = static_cast<const T*>(which ? p.update_weight : p.gate_weight) + k * D * 2 * D;
        stage_factor<T, V, true>(
            buffer(stage, 0),
            [&](int i) -> const T* {
              const int64_t r = tile.m + i;
              return r < R ? d_products + ((r * p.K + k) * 2 + which) * D : nullptr;
            },
            first, D);
        stage_factor<T, V, false>(
            buffer(stage, 1),
            [&](int i) -> const T* {
              return first + i < D ? weight + int64_t(first + i) * 2 * D + first_column : nullptr;
            },
            tile.n, D);
      },
      [&](int stage) { sum.add(buffer(stage, 0), buffer(stage, 1)); });
  float* through = reinterpret_cast<float*>(memory);
  sum.store(through);
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int64_t r = tile.m + i / kTile, d = tile.n + i % kTile;
    if (r >= R || d >= D) continue;
    const float x = through[i / kTile * kOutRow + i % kTile];
    if (of_hiddens) {
      static_cast<T*>(p.d_hiddens)[r * D + d] = from_float<T>(x);
      continue;
    }
    const int64_t b = r / S, at = ((b * p.K + expert) * S + r % S) * D + d;
    const T grad = static_cast<const T*>(p.grad)[at];
    const float g = to_float(static_cast<const T*>(p.gates)[(r * p.K + expert) * D + d]);
    const bool masked = p.row_mask && !p.row_mask[b];
    const float own = to_float(grad) * (1.0f - p.probs[b * p.K + expert] * g);
    static_cast<T*>(p.d_states)[at] = masked ? grad : from_float<T>(own + x);
  }
}

// blockIdx.y: an expert's gate or update. blockIdx.x: a tile of the state's half of the weight, or of the hidden's.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) weights_kernel(const ExpertUpdate p) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int64_t k = blockIdx.y / 2;
  const int which = blockIdx.y % 2;
  const int R = int(p.B * p.S), D = int(p.D), S = int(p.S);
  const int64_t tiles = int64_t((D + kTile - 1) / kTile) * ((D + kTile - 1) / kTile);
  const bool of_hiddens = blockIdx.x >= tiles;
  const TileOf tile = tile_of(blockIdx.x % tiles, D, D);
  T* staged = reinterpret_cast<T*>(memory);
  const auto buffer = [&](int stage, int factor) { return staged + (stage * 2 + factor) * kFactor; };
  const T* d_products = static_cast<const T*>(p.d_products);
  const T* states = static_cast<const T*>(p.states);
  const T* hiddens = static_cast<const T*>(p.hiddens);
  const bool sums_bias = !of_hiddens && tile.n == 0;
  const int steps = (R + kDepth - 1) / kDepth;
  float bias = 0.0f;
  Accumulator<T, false, false> sum;
  pipeline(
      steps,
      [&](int step, int stage) {
        const int first = step * kDepth;
        stage_factor<T, V, false>(
            buffer(stage, 0),
            [&](int i) -> const T* {
              const int64_t r = first + i;
              return r < R ? d_products + ((r * p.K + k) * 2 + which) * D : nullptr;
            },
            tile.m, D);
        stage_factor<T, V, false>(
            buffer(stage, 1),
            [&](int i) -> const T* {
              const int64_t r = first + i;
              // What a masked row holds, NaN perhaps, must not meet its zero.
              if (r >= R || (p.row_mask && !p.row_mask[r / S])) return nullptr;
              return of_hiddens ? hiddens + r * D : states + ((r / S * p.K + k) * S + r % S) * D;
            },
            tile.n, D);
      },
      [&](int stage) {
        sum.add(buffer(stage, 0), buffer(stage, 1));
        if (sums_bias && threadIdx.x < kTile) {
          float part = 0.0f;
          for (int i = 0; i < kDepth; ++i) part += to_float(buffer(stage, 0)[i * kFlatRow + threadIdx.x]);
          bias += part;
        }
      });
  if (sums_bias && threadIdx.x < kTile && tile.m + threadIdx.x < D) {
    (which ? p.d_update_bias : p.d_gate_bias)[k * D + tile.m + threadIdx.x] = bias;
  }
  float* made = reinterpret_cast<float*>(memory);
  sum.store(made);
  __syncthreads();
  T* d_weight = static_cast<T*>(which ? p.d_update_weight : p.d_gate_weight) + k * D * 2 * D + (of_hiddens ? D : 0);
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int64_t m = tile.m + i / kTile, n = tile.n + i % kTile;
    if (m < D && n < D) d_weight[m * 2 * D + n] = from_float<T>(made[i / kTile * kOutRow + i % kTile]);
  }
}

int64_t tiles_of(int64_t rows, int64_t columns) {
  return (rows + kTile - 1) / kTile * ((columns + kTile - 1) / kTile);
}

// Rows of whole 16-byte packs are copied as such, others element by element.
template <class T>
bool packs(const ExpertUpdate& p) {
  return p.D % kPack<T> == 0;
}

}  // namespace

cudaError_t update_experts_forward(const ExpertUpdate& p, cudaStream_t stream) {
  if (hopper_takes(p)) return hopper_forward(p, stream);
  const dim3 grid(unsigned(tiles_of(p.B * p.S, p.D)), unsigned(p.K));
  MK_DISPATCH_CUDA(p.dtype, T, {
    const auto kernel = packs<T>(p) ? forward_kernel<T, kPack<T>> : forward_kernel<T, 1>;
    return launch_tiles(kernel, grid, tile_memory<T>(3, 2), stream, p);
  })
  return cudaSuccess;
}

cudaError_t update_experts_backward(const ExpertUpdate& p, cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, {
    mix_kernel<T><<<unsigned(p.B * p.K), 256, 0, stream>>>(p);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const unsigned planes = unsigned((p.d_hiddens ? 1 : 0) + (p.d_states ? p.K : 0));
    if (planes) {
      const auto kernel = packs<T>(p) ? inputs_kernel<T, kPack<T>> : inputs_kernel<T, 1>;
      error = launch_tiles(kernel, dim3(unsigned(tiles_of(p.B * p.S, p.D)), planes), tile_memory<T>(2, 1), stream, p);
      if (error != cudaSuccess) return error;
    }
    if (p.d_gate_weight) {
      const auto kernel = packs<T>(p) ? weights_kernel<T, kPack<T>> : weights_kernel<T, 1>;
      const dim3 grid(unsigned(2 * tiles_of(p.D, p.D)), unsigned(2 * p.K));
      return launch_tiles(kernel, grid, tile_memory<T>(2, 1), stream, p);
    }
  })
  return cudaSuccess;
}

}  // namespace memkern::cuda
