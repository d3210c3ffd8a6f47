// Gradients of the search: coefficients of each pair, then sums over the ranks of a query and over the finders of a row,
// both in their order. And inverse norms with theirs.
#include "cuda/cosine_topk/score.cuh"

namespace memkern::cuda {
namespace {

constexpr int kThreads = 256;

enum Coefficient { kRowInQuery, kQueryInQuery, kQueryInRow, kRowInRow };

__device__ __forceinline__ float* coefficient(const CosineBackward& p, Coefficient which) {
  return p.coefficients + which * p.searches * p.queries * p.k;
}

// One warp for each place. d score / d query = a b x - s b^2 q, d score / d row = a b q - s a^2 x, a and b the inverse
// norms of row and query; a given inverse norm counts for the query alone.
template <class S, class T>
__global__ void coefficients(const __grid_constant__ CosineBackward p) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (place >= p.searches * p.queries * p.k) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t index = place / p.k, search = index / p.queries, row = p.indices[place];
  const double g = row < 0 ? 0.0 : p.grad[place];
  double to_row = g, of_query = g, to_query = 0, of_row = 0;
  if (!p.normalized && row >= 0) {
    const S* q = static_cast<const S*>(p.query) + index * p.width;
    const T* x = static_cast<const T*>(p.database) + (search * p.rows + row) * p.width;
    double dot = 0, q_squares = 0, x_squares = 0;
    for (int64_t i = lane; i < p.width; i += kWarp) {
      const double a = to_float(q[i]), b = to_float(x[i]);
      dot = fma(a, b, dot);
      q_squares = fma(a, a, q_squares);
      x_squares = fma(b, b, x_squares);
    }
    const double b = inverse_root(warp_sum(q_squares)), own = rounded_inverse(warp_sum(x_squares));
    const double used = p.inverse_norms ? p.inverse_norms[search * p.rows + row] : own;
    const double cosine = warp_sum(dot) * b;
    to_row = g * used * b;
    to_query = -g * cosine * used * b * b;
    of_query = g * own * b;
    of_row = -g * cosine * own * own * own;
  }
  if (lane != 0) return;
  coefficient(p, kRowInQuery)[place] = static_cast<float>(to_row);
  coefficient(p, kQueryInQuery)[place] = static_cast<float>(to_query);
  coefficient(p, kQueryInRow)[place] = static_cast<float>(of_query);
  coefficient(p, kRowInRow)[place] = static_cast<float>(of_row);
  if (p.owner) p.owner[place] = static_cast<int32_t>(row < 0 ? p.searches * p.rows : search * p.rows + row);
}

template <class S, class T>
__global__ void query_gradient(const __grid_constant__ CosineBackward p) {
  const int64_t index = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= p.width) return;
  const T* database = static_cast<const T*>(p.database) + index / p.queries * p.rows * p.width + column;
  float sum = 0, along = 0;
  for (int64_t place = index * p.k; place < (index + 1) * p.k; ++place) {
    const int64_t row = p.indices[place];
    if (row < 0) continue;
    sum = fmaf(coefficient(p, kRowInQuery)[place], to_float(database[row * p.width]), sum);
    along += coefficient(p, kQueryInQuery)[place];
  }
  // A query that is not finite found nothing, and gets no gradient.
  if (along != 0) sum = fmaf(along, to_float(static_cast<const S*>(p.query)[index * p.width + column]), sum);
  static_cast<S*>(p.d_query)[index * p.width + column] = from_float<S>(sum);
}

// The first place that found a row adds up all of them.
template <class S, class T>
__global__ void row_gradient(const __grid_constant__ CosineBackward p) {
  const int64_t places = p.searches * p.queries * p.k, begin = blockIdx.x;
  const int32_t owner = p.sorted[begin];
  if (owner >= p.searches * p.rows || (begin > 0 && p.sorted[begin - 1] == owner)) return;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= p.width) return;
  float sum = 0, along = 0;
  for (int64_t at = begin; at < places && p.sorted[at] == owner; ++at) {
    const int64_t place = p.order[at];
    const float q = to_float(static_cast<const S*>(p.query)[place / p.k * p.width + column]);
    sum = fmaf(coefficient(p, kQueryInRow)[place], q, sum);
    along += coefficient(p, kRowInRow)[place];
  }
  const int64_t to = owner * p.width + column;
  sum = fmaf(along, to_float(static_cast<const T*>(p.database)[to]), sum);
  static_cast<T*>(p.d_database)[to] = from_float<T>(sum);
}

template <class T>
__global__ void norms(const T* database, int64_t rows, int64_t width, float* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const double squared = squared_norm(database + row * width, width);
  if (threadIdx.x % kWarp == 0) out[row] = rounded_inverse(squared);
}

// d (1 / |x|) / dx = -x / |x|^3.
template <class T>
__global__ void norms_backward(const float* grad, const T* database, int64_t rows, int64_t width, T* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const double a = inverse_root(squared_norm(database + row * width, width));
  const double factor = -static_cast<double>(grad[row]) * a * a * a;
  for (int64_t i = row * width + threadIdx.x % kWarp; i < (row + 1) * width; i += kWarp) {
    out[i] = from_float<T>(a == 0 ? 0.0f : static_cast<float>(factor * static_cast<double>(to_float(database[i]))));
  }
}

unsigned warps_for(int64_t count) { return static_cast<unsigned>((count * kWarp + kThreads - 1) / kThreads); }

dim3 columns_for(int64_t count, int64_t width) {
  return dim3(static_cast<unsigned>(count), static_cast<unsigned>((width + kThreads - 1) / kThreads));
}

}  // namespace

cudaError_t cosine_topk_bwd(const CosineBackward& p, cudaStream_t stream) {
  const int64_t total = p.searches * p.queries;
  if (total == 0 || p.width == 0) return cudaSuccess;
  MK_DISPATCH_PAIR(p, S, T, {
    coefficients<S, T><<<warps_for(total * p.k), kThreads, 0, stream>>>(p);
    if (p.d_query) query_gradient<S, T><<<columns_for(total, p.width), kThreads, 0, stream>>>(p);
  });
  return cudaGetLastError();
}

cudaError_t cosine_topk_bwd_rows(const CosineBackward& p, cudaStream_t stream) {
  const int64_t places = p.searches * p.queries * p.k;
  if (places == 0 || p.width == 0) return cudaSuccess;
  MK_DISPATCH_PAIR(p, S, T, {
    row_gradient<S, T><<<columns_for(places, p.width), kThreads, 0, stream>>>(p);
  });
  return cudaGetLastError();
}

cudaError_t inverse_norms_fwd(DType dtype, const void* database, int64_t rows, int64_t width, float* out,
                              cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  MK_DISPATCH_CUDA(dtype, T, {
    norms<T><<<warps_for(rows), kThreads, 0, stream>>>(static_cast<const T*>(database), rows, width, out);
  });
  return cudaGetLastError();
}

cudaError_t inverse_norms_bwd(DType dtype, const float* grad, const void* database, int64_t rows, int64_t width,
                              void* out, cudaStream_t stream) {
  if (rows == 0 || width == 0) return cudaSuccess;
  MK_DISPATCH_CUDA(dtype, T, {
    norms_backward<T><<<warps_for(rows), kThreads, 0, stream>>>(grad, static_cast<const T*>(database), rows, width,
                                                               static_cast<T*>(out));
  });
  return cudaGetLastError();
}

}  // namespace memkern::cuda
