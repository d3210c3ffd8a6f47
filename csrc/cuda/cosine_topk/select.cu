// Around the scan: queries and rows made ready, bounds that rise between the rounds, exact scores and their order.
//
// The first round takes as many rows as a query's buffer holds, spread over the database; their k-th best lower end is a
// bound that the next round, several times larger, appends against, and so on until all rows were seen once. Sizes alone
// decide what is launched. A query whose buffer overflowed is searched again, exactly, on the device.
#include "cuda/cosine_topk/score.cuh"

namespace memkern::cuda {
namespace {

constexpr int kSelectThreads = 256, kSelectWarps = kSelectThreads / kWarp;
constexpr int kRowsPerWarp = 4;  // in rescue, between two looks at the buffer

// One warp for each query: see the fields of CosineSearch. `relative`: the margin of a product of unit vectors without
// what rounding the query lost.
template <class S, class T>
__global__ void prepare_queries(const __grid_constant__ CosineSearch p, float relative, float rounding) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (index >= p.searches * p.queries) return;
  const int lane = threadIdx.x % kWarp;
  const S* query = static_cast<const S*>(p.query) + index / p.queries * p.query_stride[0] +
                   index % p.queries * p.query_stride[1];
  T* unit = static_cast<T*>(p.unit) + index * p.width;
  float largest = 0;
  for (int64_t i = lane; i < p.width; i += kWarp) largest = fmaxf(largest, fabsf(to_float(query[i])));
  largest = warp_max(largest);
  float factor = 1.0f;
  if (!p.normalized) {
    // 2^-exponent; a subnormal or infinite maximum stays unscaled.
    const int exponent = __float_as_int(largest) >> 23;
    if (exponent > 0 && exponent < 253) factor = __int_as_float((253 - exponent) << 23);
  }
  double squares = 0;
  for (int64_t i = lane; i < p.width; i += kWarp) {
    const double q = to_float(query[i]) * factor;
    squares = fma(q, q, squares);
  }
  squares = warp_sum(squares);
  const double inverse = inverse_root(squares);
  double lost = 0;
  for (int64_t i = lane; i < p.width; i += kWarp) {
    const double exact = static_cast<double>(to_float(query[i]) * factor) * inverse;
    unit[i] = from_float<T>(static_cast<float>(exact));
    const double difference = exact - static_cast<double>(to_float(unit[i]));
    lost = fma(difference, difference, lost);
  }
  lost = sqrt(warp_sum(lost));
  if (lane != 0) return;
  const double length = sqrt(squares);
  // A query at the ends of the exponent range is searched exactly.
  const bool outside = p.normalized && squares > 0 && (length < kLeastLength || length > kMostLength);
  const float scale = p.normalized && !outside ? static_cast<float>(inverse) : 1.0f;
  const float least = p.min_score * scale;
  p.factor[index] = factor;
  p.inverse[index] = p.normalized ? 1.0 : inverse;
  p.margin[index] = 1.001f * (relative + static_cast<float>(lost) + rounding);
  p.bound[index] = outside ? INFINITY : least > -1e37f ? least - fabsf(least) * 1e-6f : least;
  p.appended[index] = 0;
  p.flagged[index] = outside;
}

// One warp for each row: 1 / |x|, or |x| where scores are not cosines; -1 for a row whose products may lose digits.
template <class T>
__global__ void prepare_rows(const __grid_constant__ CosineSearch p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (at >= p.searches * p.rows) return;
  const T* row = static_cast<const T*>(p.database) + at / p.rows * p.database_stride[0] +
                 at % p.rows * p.database_stride[1];
  const double squared = squared_norm(row, p.width), length = sqrt(squared);
  const bool odd = squared > 0 && (length < kLeastLength || (length > kMostLength && length < 1e300));
  const float weight = p.normalized || p.inverse_norms ? static_cast<float>(length) : rounded_inverse(squared);
  if (threadIdx.x % kWarp == 0) p.weight[at] = odd ? -1.0f : weight;
}

// Moves the keys that `keep` wants to the front, in their order; returns how many there are. By a whole block.
template <class Keep>
__device__ int compact(int64_t* keys, int count, const Keep& keep) {
  __shared__ int of_warp[kSelectWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int kept = 0;
  for (int begin = 0; begin < count; begin += kSelectThreads) {
    const int place = begin + threadIdx.x;
    const int64_t key = place < count ? keys[place] : kLowestKey;
    const bool wanted = place < count && keep(key);
    const unsigned votes = __ballot_sync(0xffffffffu, wanted);
    if (lane == 0) of_warp[warp] = __popc(votes);
    __syncthreads();  // every key of this part is read, too: what is written lies at or before it
    int before = kept, all = 0;
    for (int w = 0; w < kSelectWarps; ++w) {
      before += w < warp ? of_warp[w] : 0;
      all += of_warp[w];
    }
    if (wanted) keys[before + __popc(votes & ((1u << lane) - 1))] = key;
    kept += all;
    __syncthreads();
  }
  return kept;
}

// How many of `count` values, as `value(i)` gives them, reach `least`. By a whole block.
template <class Value>
__device__ int count_reaching(int count, int64_t least, const Value& value) {
  int reached = 0;
  for (int begin = 0; begin < count; begin += kSelectThreads) {
    const int place = begin + threadIdx.x;
    reached += __syncthreads_count(place < count && value(place) >= least);
  }
  return reached;
}

// The largest number, built from `bits` bits on top of `lowest`, that at least k values reach. Once exactly k do, the
// lower bits do not matter.
template <class Value>
__device__ int64_t kth_value(int count, int k, int64_t lowest, int bits, const Value& value) {
  uint64_t found = static_cast<uint64_t>(lowest);
  for (int bit = bits - 1; bit >= 0; --bit) {
    const uint64_t candidate = found + (uint64_t{1} << bit);
    const int reached = count_reaching(count, static_cast<int64_t>(candidate), value);
    if (reached >= k) found = candidate;
    if (reached == k) break;
  }
  return static_cast<int64_t>(found);
}

// A query's bound becomes the k-th largest lower end in its buffer; what lies below is dropped. An overflow has lost
// rows: the query is flagged.
__global__ void __launch_bounds__(kSelectThreads) tighten(const __grid_constant__ CosineSearch p, int k) {
  const int64_t index = blockIdx.x;
  const int count = p.appended[index];
  if (count > p.capacity) {
    __syncthreads();
    if (threadIdx.x == 0) {
      p.flagged[index] = 1;
      p.bound[index] = INFINITY;  // nothing more is appended
      p.appended[index] = 0;
    }
    return;
  }
  if (count < k) return;
  int64_t* keys = p.buffer + index * p.capacity;
  const int64_t search = index / p.queries;
  const float margin = p.margin[index];
  const auto lower = [&](int place) -> int64_t {
    const int64_t key = keys[place];
    const float upper = key_value(key);
    float half = margin;
    if (p.normalized || p.inverse_norms) {
      const int64_t row = search * p.rows + key_row(key);
      half *= p.weight[row];
      if (p.inverse_norms) half *= fabsf(p.inverse_norms[row]);
    }
    const float low = upper - 2 * half;
    // Infinity marks a special row, about which nothing is known; rounding may not lift the end either.
    return ordered(upper == INFINITY ? -INFINITY : low - fabsf(low) * 1e-6f);
  };
  const int64_t value = kth_value(count, k, INT32_MIN, 32, lower);
  const float least = fmaxf(p.bound[index], unordered(static_cast<int32_t>(value)));
  const int kept = compact(keys, count, [&](int64_t key) { return key_value(key) >= least; });
  if (threadIdx.x == 0) {
    p.bound[index] = least;
    p.appended[index] = kept;
  }
}

template <class S, class T>
struct Pair {
  const S* query;
  float factor;
  double inverse;
  const T* database;
  const float* given;

  __device__ Pair(const CosineSearch& p, int64_t index) {
    const int64_t search = index / p.queries;
    query = static_cast<const S*>(p.query) + search * p.query_stride[0] + index % p.queries * p.query_stride[1];
    factor = p.factor[index];
    inverse = p.inverse[index];
    database = static_cast<const T*>(p.database) + search * p.database_stride[0];
    given = p.inverse_norms ? p.inverse_norms + search * p.rows : nullptr;
  }
  __device__ float score(const CosineSearch& p, int64_t row) const {
    return score_row(query, factor, inverse, database + row * p.database_stride[1], p.width, p.normalized,
                     given ? given + row : nullptr);
  }
};

// One warp for each survivor: its key becomes that of its score, or the lowest.
template <class S, class T>
__global__ void rescore(const __grid_constant__ CosineSearch p) {
  const int64_t index = blockIdx.x;
  if (p.flagged[index]) return;
  const int count = min(p.appended[index], p.capacity);
  const Pair<S, T> pair(p, index);
  const int warps = gridDim.y * (blockDim.x / kWarp);
  for (int place = blockIdx.y * (blockDim.x / kWarp) + threadIdx.x / kWarp; place < count; place += warps) {
    int64_t& key = p.buffer[index * p.capacity + place];
    const int64_t row = key_row(key);
    const float score = pair.score(p, row);
    if (threadIdx.x % kWarp == 0) key = score >= p.min_score ? pack(score, row) : kLowestKey;
  }
}

// Keeps the k best exact keys.
__device__ int keep_best(int64_t* keys, int count, int k) {
  int64_t value = kLowestKey + 1;
  if (count > k) value = max(value, kth_value(count, k, kLowestKey, 64, [&](int place) { return keys[place]; }));
  return compact(keys, count, [&](int64_t key) { return key >= value; });
}

// A flagged query against every row, exactly: for scores that no margin tells apart, and for zero queries.
template <class S, class T>
__global__ void __launch_bounds__(kSelectThreads) rescue(const __grid_constant__ CosineSearch p) {
  const int64_t index = blockIdx.x;
  if (!p.flagged[index]) return;
  constexpr int kStep = kSelectWarps * kRowsPerWarp;
  __shared__ int64_t found[kStep];
  __shared__ int kept;
  int64_t* keys = p.buffer + index * p.capacity;
  const Pair<S, T> pair(p, index);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int count = 0;
  // Every score of a zero query is 0, so that the first rows win.
  for (int64_t first = 0; first < p.rows && (pair.inverse != 0 || count < p.k); first += kStep) {
    for (int i = 0; i < kRowsPerWarp; ++i) {
      const int at = warp * kRowsPerWarp + i;
      const int64_t row = first + at;
      int64_t key = kLowestKey;
      if (row < p.rows && may_find(p, index / p.queries, index % p.queries, row)) {
        const float score = pair.score(p, row);
        if (score >= p.min_score) key = pack(score, row);
      }
      if (lane == 0) found[at] = key;
    }
    if (count + kStep > p.capacity) count = keep_best(keys, count, p.k);
    __syncthreads();
    if (threadIdx.x == 0) {
      int to = count;
      for (int i = 0; i < kStep; ++i) {
        if (found[i] != kLowestKey) keys[to++] = found[i];
      }
      kept = to;
    }
    __syncthreads();
    count = kept;
  }
  if (threadIdx.x == 0) p.appended[index] = count;
}

// The k best keys of a query in order, padded with (-inf, -1). `size`: a power of two, at least k.
__global__ void __launch_bounds__(kSelectThreads) finish(const __grid_constant__ CosineSearch p, int size) {
  extern __shared__ int64_t sorted[];
  const int64_t index = blockIdx.x;
  int64_t* keys = p.buffer + index * p.capacity;
  const int count = keep_best(keys, min(p.appended[index], p.capacity), p.k);
  for (int i = threadIdx.x; i < size; i += kSelectThreads) sorted[i] = i < count ? keys[i] : kLowestKey;
  __syncthreads();
  for (int span = 2; span <= size; span *= 2) {
    for (int distance = span / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < size; i += kSelectThreads) {
        const int other = i ^ distance;
        if (other > i) {
          const bool descending = (i & span) == 0;
          const int64_t a = sorted[i], b = sorted[other];
          if ((a < b) == descending) {
            sorted[i] = b;
            sorted[other] = a;
          }
        }
      }
      __syncthreads();
    }
  }
  for (int i = threadIdx.x; i < p.k; i += kSelectThreads) {
    p.scores[index * p.k + i] = i < count ? key_value(sorted[i]) : -INFINITY;
    p.indices[index * p.k + i] = i < count ? key_row(sorted[i]) : -1;
  }
}

int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

template <class S, class T>
cudaError_t search(const CosineSearch& p, cudaStream_t stream) {
  const int64_t total = p.searches * p.queries;
  const auto blocks = static_cast<unsigned>(total);
  constexpr int kWarpsEach = 4;
  const bool single = p.dtype == DType::kF32;
  const float relative = 1.01f * 0x1p-24f * (4.0f * static_cast<float>(p.width) + 32.0f);
  // TF32 cuts the row and the query to ten bits.
  const float rounding = single ? 0x1p-9f * 1.01f : 0.0f;
  const auto groups = static_cast<unsigned>((total + kWarpsEach - 1) / kWarpsEach);
  prepare_queries<S, T><<<groups, kWarpsEach * kWarp, 0, stream>>>(p, relative, rounding);
  if (p.weight) {
    const int64_t rows = p.searches * p.rows;
    prepare_rows<T><<<static_cast<unsigned>((rows + 7) / 8), 8 * kWarp, 0, stream>>>(p);
  }
  const int64_t tile = cosine_tile_rows(), tiles = (p.rows + tile - 1) / tile;
  // Near the golden section, and without a common factor: every run of tiles is spread evenly over the rows.
  int64_t step = static_cast<int64_t>(static_cast<double>(tiles) * 0.6180339887);
  step = step < 1 ? 1 : step;
  while (common_divisor(step, tiles) != 1) ++step;
  const int least = p.k > 8 ? p.k : 8;
  const int64_t growth = p.capacity / (4 * least) > 2 ? p.capacity / (4 * least) : 2;
  int64_t done = 0, size = p.capacity / tile;
  while (done < tiles) {
    size = size < tiles - done ? size : tiles - done;
    // A small rest joins its round.
    if (done > 0 && tiles - done - size <= size / 4) size = tiles - done;
    const cudaError_t error = cosine_scan(p, tiles, done, size, step, stream);
    if (error != cudaSuccess) return error;
    if (p.rows > p.capacity) tighten<<<blocks, kSelectThreads, 0, stream>>>(p, least);
    done += size;
    size = done * growth;
  }
  const int64_t survivors = p.rows < p.capacity ? p.rows : p.capacity;
  const dim3 grid(blocks, static_cast<unsigned>(survivors > 64 ? 8 : 1));
  rescore<S, T><<<grid, 8 * kWarp, 0, stream>>>(p);
  rescue<S, T><<<blocks, kSelectThreads, 0, stream>>>(p);
  int sorted = 2;
  while (sorted < p.k) sorted *= 2;
  finish<<<blocks, kSelectThreads, static_cast<size_t>(sorted) * sizeof(int64_t), stream>>>(p, sorted);
  return cudaGetLastError();
}

}  // namespace

int cosine_capacity(int k) { return 32 * k > 512 ? 32 * k : 512; }

cudaError_t cosine_topk_fwd(const CosineSearch& p, cudaStream_t stream) {
  if (p.searches * p.queries == 0) return cudaSuccess;
  MK_DISPATCH_PAIR(p, S, T, { return search<S, T>(p, stream); });
  return cudaErrorInvalidValue;
}

}  // namespace memkern::cuda
