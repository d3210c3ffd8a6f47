// Content lookup, sharpening and allocation as operators of their own.
#include "cuda/memory/parts.cuh"

namespace memkern::cuda {

namespace slots {

namespace {

struct Content {
  Cut cut;
  const float *memory, *keys, *strengths, *grad, *weights_in;
  const uint8_t* slot_mask;
  float *weights, *d_memory, *d_keys, *d_strengths;
  float *dots, *norms, *factors, *own, *columns;  // scratch of backward
  int32_t* tickets;
};

__global__ void __launch_bounds__(kThreads, 1) content(const Content p) {
  __shared__ Shared shared;
  const Cut& cut = p.cut;
  const int64_t b = cut.item();
  const int n = cut.slots;
  const uint8_t* mask = of_item(p.slot_mask, b, n);
  const float* keys = p.keys + b * cut.heads * cut.width;
  float* weights = p.weights + b * cut.heads * n;
  row_dots(p.memory + b * n * cut.width, cut.range(), cut.width, keys, cut.heads,
           [&](int i, int h, float dot, float square) { weights[int64_t(h) * n + i] = dot * inverse_norm(square); });
  if (!arrive_last(p.tickets + b, cut.parts)) return;
  for (int h = 0; h < cut.heads; ++h) {
    const float square = square_sum(keys + int64_t(h) * cut.width, cut.width, shared);
    softmax(weights + int64_t(h) * n, n, p.strengths[b * cut.heads + h] * inverse_norm(square), mask, shared);
  }
}

// The factors of content_backward(); what masked rows hold, NaN included, enters nothing.
__global__ void __launch_bounds__(kThreads, 1) content_factors(const Content p) {
  __shared__ Shared shared;
  const Cut& cut = p.cut;
  const int64_t b = cut.item(), row = b * cut.heads * cut.slots;
  const int n = cut.slots;
  const uint8_t* mask = of_item(p.slot_mask, b, n);
  const float* keys = p.keys + b * cut.heads * cut.width;
  float *dots = p.dots + row, *norms = p.norms + b * n, *factors = p.factors + row, *own = p.own + b * n;
  row_dots(p.memory + b * n * cut.width, cut.range(), cut.width, keys, cut.heads,
           [&](int i, int h, float dot, float square) {
             const bool visible = mask == nullptr || mask[i];
             dots[int64_t(h) * n + i] = visible ? dot : 0.0f;
             norms[i] = visible ? square : 0.0f;
           });
  if (!arrive_last(p.tickets + b, cut.parts)) return;
  MK_FOR_SLOTS(i, n) own[i] = 0.0f;
  for (int h = 0; h < cut.heads; ++h) {
    const int64_t at = int64_t(h) * n;
    MK_FOR_SLOTS(i, n) factors[at + i] = p.grad[row + at + i];
    const float square = square_sum(keys + int64_t(h) * cut.width, cut.width, shared);
    const float d_strength = slots::content_backward(factors + at, p.weights_in + row + at, dots + at, norms, n, square,
                                                     p.strengths[b * cut.heads + h], own, shared);
    if (threadIdx.x == 0) p.d_strengths[b * cut.heads + h] = d_strength;
  }
}

__global__ void __launch_bounds__(kThreads, 1) content_gradients(const Content p) {
  __shared__ Shared shared;
  __shared__ Columns sums;
  const Cut& cut = p.cut;
  const int64_t b = cut.item();
  const int n = cut.slots, width = cut.width;
  const uint8_t* mask = of_item(p.slot_mask, b, n);
  const float *keys = p.keys + b * cut.heads * width, *memory = p.memory + b * n * width;
  const float *factors = p.factors + b * cut.heads * n, *own = p.own + b * n;
  float *d_memory = p.d_memory + b * n * width, *d_keys = p.d_keys + b * cut.heads * width;
  auto cell = [&](int i, int k) { return mask == nullptr || mask[i] ? memory[int64_t(i) * width + k] : 0.0f; };
  each_element(cut.range(), width, [&](int i, int k) {
    float sum = -own[i] * cell(i, k);
    for (int h = 0; h < cut.heads; ++h) sum = fmaf(factors[int64_t(h) * n + i], keys[int64_t(h) * width + k], sum);
    d_memory[int64_t(i) * width + k] = sum;
  });
  float* columns = p.columns + (b * cut.parts + cut.part()) * cut.heads * width;
  column_sums(
      cut.range(), width, cut.heads, sums,
      [&](int i, int h, int k) { return factors[int64_t(h) * n + i] * cell(i, k); },
      [&](int h, int k, float sum) { columns[int64_t(h) * width + k] = sum; });
  if (!arrive_last(p.tickets + b, cut.parts)) return;
  sum_parts(cut, p.columns + b * cut.parts * cut.heads * width, cut.heads, 0, d_keys);
  __syncthreads();
  for (int h = 0; h < cut.heads; ++h) {
    project_key(d_keys + int64_t(h) * width, keys + int64_t(h) * width, width, shared);
  }
}

__global__ void __launch_bounds__(kThreads, 1) sharpen_rows(const float* weights, const float* gamma, int n,
                                                            float* out) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.x;
  sharpen(weights + row * n, gamma[row], n, out + row * n, shared);
}

__global__ void __launch_bounds__(kThreads, 1) sharpen_rows_backward(const float* grad, const float* weights,
                                                                 const float* gamma, const float* sharpened, int n,
                                                                 float* d_weights, float* d_gamma) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.x;
  MK_FOR_SLOTS(i, n) d_weights[row * n + i] = grad[row * n + i];
  const float slope =
      sharpen_backward(d_weights + row * n, weights + row * n, sharpened + row * n, gamma[row], n, shared);
  if (threadIdx.x == 0) d_gamma[row] = slope;
}

__global__ void __launch_bounds__(kThreads, 1) allocate(const float* usage, int n, Order orders, float* weights) {
  __shared__ Shared shared;
  __shared__ uint32_t held[kRanked];
  const int64_t b = blockIdx.x;
  const Order order = order_of(orders, b, n);
  fill(order, usage + b * n, n, held, shared);
  MK_FOR_SLOTS(i, n) weights[b * n + i] = allocation_at(order, usage[b * n + i], i);
}

__global__ void __launch_bounds__(kThreads, 1) allocate_rows_backward(const float* grad, const float* usage, int n,
                                                                  Order orders, float* d_usage) {
  __shared__ Shared shared;
  __shared__ uint32_t held[kRanked];
  const int64_t b = blockIdx.x;
  const Order order = order_of(orders, b, n);
  MK_FOR_SLOTS(i, n) d_usage[b * n + i] = 0.0f;
  fill(order, usage + b * n, n, held, shared);
  slots::allocate_backward(order, usage + b * n, grad + b * n, n, d_usage + b * n, shared);
}

Content content_of(const ContentWeights& p, int32_t* tickets) {
  Content c{Cut(p.batch, p.slots, p.width, p.heads)};
  c.memory = in(p.memory);
  c.keys = in(p.keys);
  c.strengths = in(p.strengths);
  c.slot_mask = p.slot_mask;
  c.tickets = tickets;
  return c;
}

void carve(Content& c, Pieces& pieces) {
  const int64_t slots = c.cut.batch * c.cut.slots;
  c.dots = pieces.take(slots * c.cut.heads);
  c.factors = pieces.take(slots * c.cut.heads);
  c.norms = pieces.take(slots);
  c.own = pieces.take(slots);
  c.columns = pieces.take(c.cut.columns());
}

}  // namespace

}  // namespace slots

using namespace slots;

cudaError_t content_forward(const ContentWeights& p, int32_t* tickets, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  Content c = content_of(p, tickets);
  c.weights = out(p.weights);
  content<<<c.cut.blocks(), kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

int64_t content_backward_scratch(const ContentWeights& p) {
  Content c = content_of(p, nullptr);
  Pieces pieces(nullptr);
  carve(c, pieces);
  return pieces.count();
}

cudaError_t content_backward(const ContentWeights& p, float* scratch, int32_t* tickets, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  Content c = content_of(p, tickets);
  Pieces pieces(scratch);
  carve(c, pieces);
  c.weights_in = in(p.weights);
  c.grad = in(p.grad);
  c.d_memory = out(p.d_memory);
  c.d_keys = out(p.d_keys);
  c.d_strengths = out(p.d_strengths);
  content_factors<<<c.cut.blocks(), kThreads, 0, stream>>>(c);
  content_gradients<<<c.cut.blocks(), kThreads, 0, stream>>>(c);
  return cudaGetLastError();
}

cudaError_t sharpen_forward(const Sharpen& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  sharpen_rows<<<grid(p.rows), kThreads, 0, stream>>>(in(p.weights), in(p.gamma), int(p.size), out(p.sharpened));
  return cudaGetLastError();
}

cudaError_t sharpen_backward(const Sharpen& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  sharpen_rows_backward<<<grid(p.rows), kThreads, 0, stream>>>(in(p.grad), in(p.weights), in(p.gamma), in(p.sharpened),
                                                              int(p.size), out(p.d_weights), out(p.d_gamma));
  return cudaGetLastError();
}

int64_t allocation_scratch(const Allocation& p) {
  Pieces pieces(nullptr);
  pieces.order(p.batch, p.slots);
  return pieces.count();
}

cudaError_t allocation_forward(const Allocation& p, float* scratch, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  const Order order = Pieces(scratch).order(p.batch, p.slots);
  allocate<<<grid(p.batch), kThreads, 0, stream>>>(in(p.usage), int(p.slots), order, out(p.weights));
  return cudaGetLastError();
}

cudaError_t allocation_backward(const Allocation& p, float* scratch, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  const Order order = Pieces(scratch).order(p.batch, p.slots);
  allocate_rows_backward<<<grid(p.batch), kThreads, 0, stream>>>(in(p.grad), in(p.usage), int(p.slots), order,
                                                                out(p.d_usage));
  return cudaGetLastError();
}

}  // namespace memkern::cuda
