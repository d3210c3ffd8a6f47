// Scores all queries against a tile of rows on tensor cores, and appends the pairs that pass the queries' bounds.
//
// bfloat16 and float16 are multiplied as they are, float as TF32. Either way one instruction takes 32 bytes of each row
// and query, so that one kernel serves all: fragments are 8 x 16-byte matrices, whatever their elements are.
#include "cuda/cosine_topk/score.cuh"

namespace memkern::cuda {
namespace {

constexpr int kTileRows = 128, kThreads = 256, kStages = 3;
constexpr int kStepBytes = 128;            // of each row and query in a stage
constexpr int kPitch = kStepBytes + 16;    // rows of a tile start in different banks
constexpr int kFewQueries = 16;

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                        const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply<float>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
// 16 bytes, or zeros; `there` false reads nothing.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int Left>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left));
}

// 16 bytes of a row, from column `at` on. `Aligned`: every row starts at 16 bytes and is a multiple of them.
template <class T, bool Aligned>
__device__ __forceinline__ void bring(char* to, const T* row, int64_t at, int64_t width, bool there) {
  constexpr int kElements = kPack<T>;
  if constexpr (Aligned) {
    there = there && at < width;
    copy_async(shared_address(to), row + (there ? at : 0), there);
  } else {
    T* out = reinterpret_cast<T*>(to);
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] = there && at + i < width ? row[at + i] : from_float<T>(0.0f);
  }
}

// Warps stand in a grid of (8 / WarpsN) x WarpsN over the tile of 128 rows x Queries.
template <class T, int Queries, int WarpsN, bool Aligned, bool Inline>
__global__ void __launch_bounds__(kThreads) scan(const __grid_constant__ CosineSearch p, int64_t tiles, int64_t first,
                                                 int64_t step) {
  constexpr int kWarpsM = kThreads / kWarp / WarpsN;
  constexpr int kWarpRows = kTileRows / kWarpsM, kWarpQueries = Queries / WarpsN;
  constexpr int kM = kWarpRows / 16, kN = kWarpQueries / 8;
  static_assert(kN % 2 == 0, "matrices of the queries are loaded for 16 at a time");
  constexpr int kColumns = kStepBytes / int(sizeof(T));
  constexpr int kStageBytes = (kTileRows + Queries) * kPitch;
  extern __shared__ __align__(128) char shared[];
  __shared__ float weights[kTileRows], givens[kTileRows], bounds[Queries], margins[Queries];

  const int64_t search = blockIdx.z;
  const int64_t first_row = (first + blockIdx.y) * step % tiles * kTileRows;
  const int64_t first_query = static_cast<int64_t>(blockIdx.x) * Queries;
  const T* database = static_cast<const T*>(p.database) + search * p.database_stride[0];
  const T* unit = static_cast<const T*>(p.unit) + search * p.queries * p.width;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp / WarpsN * kWarpRows, warp_query = warp % WarpsN * kWarpQueries;
  const int64_t steps = (p.width + kColumns - 1) / kColumns;

  const auto fetch = [&](int64_t s) {
    char* stage = shared + s % kStages * kStageBytes;
    const int64_t at = s * kColumns;
    for (int i = threadIdx.x; i < (kTileRows + Queries) * (kStepBytes / 16); i += kThreads) {
      const int line = i / (kStepBytes / 16), chunk = i % (kStepBytes / 16);
      char* to = stage + line * kPitch + chunk * 16;
      const int64_t column = at + chunk * kPack<T>;
      if (line < kTileRows) {
        const int64_t row = first_row + line;
        const bool there = row < p.rows;
        bring<T, Aligned>(to, database + (there ? row : 0) * p.database_stride[1], column, p.width, there);
      } else {
        const int64_t query = first_query + line - kTileRows;
        const bool there = query < p.queries;
        bring<T, Aligned>(to, unit + (there ? query : 0) * p.width, column, p.width, there);
      }
    }
  };

  float sums[kM][kN][4] = {};
  float squares = 0;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch(s);
    commit();
  }
  for (int64_t s = 0; s < steps; ++s) {
    wait<kStages - 2>();
    __syncthreads();
    if (s + kStages - 1 < steps) fetch(s + kStages - 1);
    commit();
    const char* stage = shared + s % kStages * kStageBytes;
    if constexpr (Inline) {
      // Two threads for each row.
      const T* x = reinterpret_cast<const T*>(stage + threadIdx.x / 2 * kPitch + threadIdx.x % 2 * (kStepBytes / 2));
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) squares = fmaf(to_float(x[i]), to_float(x[i]), squares);
    }
#pragma unroll
    for (int k = 0; k < kStepBytes; k += 32) {
      uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        // Matrices: rows 0-7 and 8-15 of the first 16 bytes, then of the second.
        const int row = warp_row + m * 16 + lane % 16;
        load_matrices(a[m], shared_address(stage + row * kPitch + k + lane / 16 * 16));
      }
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) {
        // Matrices: queries 0-7 of both halves, then queries 8-15.
        const int query = warp_query + n * 16 + lane / 16 * 8 + lane % 8;
        load_matrices(b[n], shared_address(stage + (kTileRows + query) * kPitch + k + lane / 8 % 2 * 16));
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          multiply<T>(sums[m][n], a[m], pair);
        }
      }
    }
  }

  // What the tile's rows and queries bring to their intervals.
  if constexpr (Inline) {
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    const float length = sqrtf(squares);
    // Squares that underflow to zero may belong to a row that is none; -1 marks a row about which nothing is known.
    const bool odd = squares == 0 || length < kLeastLength || length > kMostLength;
    if (threadIdx.x % 2 == 0) weights[threadIdx.x / 2] = odd ? -1.0f : 1.0f / length;
  } else if (threadIdx.x < kTileRows) {
    const int64_t row = first_row + threadIdx.x;
    weights[threadIdx.x] = row < p.rows ? p.weight[search * p.rows + row] : 0.0f;
    if (p.inverse_norms) givens[threadIdx.x] = row < p.rows ? p.inverse_norms[search * p.rows + row] : 0.0f;
  }
  if (threadIdx.x < Queries) {
    const int64_t query = first_query + threadIdx.x;
    const bool there = query < p.queries;
    bounds[threadIdx.x] = there ? p.bound[search * p.queries + query] : INFINITY;
    margins[threadIdx.x] = there ? p.margin[search * p.queries + query] : 0.0f;
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int line = warp_row + m * 16 + lane / 4 + i / 2 * 8, at = warp_query + n * 8 + lane % 4 * 2 + i % 2;
        const float product = sums[m][n][i], weight = weights[line];
        float middle, half;
        if (p.normalized) {
          middle = product;
          half = margins[at] * weight;
        } else if (p.inverse_norms) {
          middle = product * givens[line];
          half = margins[at] * weight * fabsf(givens[line]);
        } else {
          middle = product * weight;
          half = margins[at] + weight * 0.0f;
        }
        const float upper = weight == -1.0f ? INFINITY : middle + half;
        // A query that is not finite has no scores: its products are NaN.
        if (!(upper >= bounds[at]) || product != product) continue;
        const int64_t row = first_row + line, query = first_query + at;
        if (row >= p.rows || query >= p.queries || !may_find(p, search, query, row)) continue;
        const int64_t index = search * p.queries + query;
        const int place = atomicAdd(p.appended + index, 1);
        if (place < p.capacity) p.buffer[index * p.capacity + place] = pack(upper, row);
      }
    }
  }
}

template <class T, int Queries, int WarpsN, bool Aligned, bool Inline>
cudaError_t launch(const CosineSearch& p, int64_t tiles, int64_t first, int64_t count, int64_t step,
                   cudaStream_t stream) {
  constexpr int kBytes = kStages * (kTileRows + Queries) * kPitch;
  const auto kernel = scan<T, Queries, WarpsN, Aligned, Inline>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t columns = (p.queries + Queries - 1) / Queries;
  // The y axis of a grid ends at 65535.
  for (int64_t done = 0; done < count; done += 65535) {
    const int64_t some = count - done < 65535 ? count - done : 65535;
    const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(some), static_cast<unsigned>(p.searches));
    kernel<<<grid, kThreads, kBytes, stream>>>(p, tiles, first + done, step);
  }
  return cudaGetLastError();
}

template <class T, bool Aligned>
cudaError_t choose(const CosineSearch& p, int64_t tiles, int64_t first, int64_t count, int64_t step,
                   cudaStream_t stream) {
  if (p.weight == nullptr) return launch<T, kFewQueries, 1, Aligned, true>(p, tiles, first, count, step, stream);
  if (p.queries <= kFewQueries) return launch<T, kFewQueries, 1, Aligned, false>(p, tiles, first, count, step, stream);
  return launch<T, 64, 2, Aligned, false>(p, tiles, first, count, step, stream);
}

template <class T>
bool aligned(const CosineSearch& p) {
  const auto whole = [](int64_t elements) { return elements * int64_t(sizeof(T)) % 16 == 0; };
  return whole(p.width) && whole(p.database_stride[0]) && whole(p.database_stride[1]) &&
         reinterpret_cast<uintptr_t>(p.database) % 16 == 0 && reinterpret_cast<uintptr_t>(p.unit) % 16 == 0;
}

}  // namespace

int64_t cosine_tile_rows() { return kTileRows; }

bool cosine_inline_norms(int64_t queries, bool normalized, bool given) {
  return queries <= kFewQueries && !normalized && !given;
}

cudaError_t cosine_scan(const CosineSearch& p, int64_t tiles, int64_t first, int64_t count, int64_t step,
                        cudaStream_t stream) {
  MK_DISPATCH_CUDA(p.dtype, T, {
    return aligned<T>(p) ? choose<T, true>(p, tiles, first, count, step, stream)
                         : choose<T, false>(p, tiles, first, count, step, stream);
  });
  return cudaErrorInvalidValue;
}

}  // namespace memkern::cuda
