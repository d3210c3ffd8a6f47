// The gated update forward on Hopper: wgmma on tiles that bulk tensor copies bring, [M;h] never made.
//
// A block owns 128 rows x 64 columns of one expert, twice: for the gate and for the update. One thread asks for tiles of
// 64 along the sum, the state's first and then the hidden's, in a ring of four stages; two warp groups multiply 64 rows
// each, and mix in registers at the end. A descriptor says how a tile lies in shared memory: rows of 128 bytes, swizzled
// over eight of them.
#include <cuda.h>

#include <type_traits>

#include "cuda/common.cuh"
#include "cuda/expert_update.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MK_HOPPER 1
#else
#define MK_HOPPER 0
#endif

namespace memkern::cuda {

namespace {

constexpr int kRows = 128, kColumns = 64, kSum = 64, kRing = 4, kGroup = 128, kConsumers = 2;
constexpr int kRowsBytes = kRows * kSum * 2, kColumnsBytes = kColumns * kSum * 2;
constexpr int kStageBytes = kRowsBytes + 2 * kColumnsBytes;
// Swizzled tiles begin at multiples of 1 KiB.
constexpr int kMemory = kRing * kStageBytes + 1024;

struct Maps {
  CUtensorMap states;   // (D, S, K, B)
  CUtensorMap hiddens;  // (D, R)
  CUtensorMap gate;     // (2D, D, K)
  CUtensorMap update;
};

#if MK_HOPPER
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z,
                                          int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// Of a tile whose rows are 128 bytes, swizzled by 128 bytes: address, 1 KiB between groups of eight rows, swizzle.
__device__ __forceinline__ uint64_t descriptor(const unsigned char* tile) {
  const uint64_t address = (shared_address(tile) & 0x3ffffu) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define MK_SUM8(i)                                                                                              \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]),       \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define MK_WGMMA(type)                                                                                          \
  asm volatile(                                                                                                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"                             \
      : MK_SUM8(0), MK_SUM8(8), MK_SUM8(16), MK_SUM8(24)                                                        \
      : "l"(a), "l"(b))

// sum (64 x 64 over the warp group) += a (64 x 16) b^T (64 x 16).
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[32], uint64_t a, uint64_t b) {
  if constexpr (std::is_same<T, __half>::value) {
    MK_WGMMA("f16");
  } else {
    MK_WGMMA("bf16");
  }
}
#undef MK_WGMMA
#undef MK_SUM8

// The accumulators may not be touched between a fence and the wait behind it.
__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

template <class T>
__device__ __forceinline__ void mix(const ExpertUpdate& p, int64_t r, int64_t k, int64_t d, const float (&z_gate)[2],
                                    const float (&z_update)[2]) {
  const int64_t b = r / p.S, at = ((b * p.K + k) * p.S + r % p.S) * p.D + d;
  const auto state = *reinterpret_cast<const Pack<T, 2>*>(static_cast<const T*>(p.states) + at);
  const float prob = p.probs[b * p.K + k];
  const bool keep = prob == 0.0f || (p.row_mask && !p.row_mask[b]);
  float g[2], u[2];
  Pack<T, 2> out;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float x = z_gate[i] + (p.gate_bias ? p.gate_bias[k * p.D + d + i] : 0.0f);
    const float y = z_update[i] + (p.update_bias ? p.update_bias[k * p.D + d + i] : 0.0f);
    g[i] = 1.0f / (1.0f + __expf(-x));
    u[i] = tanhf(y);
    const float a = prob * g[i];
    out.v[i] = keep ? state.v[i] : from_float<T>(a * u[i] + (1.0f - a) * to_float(state.v[i]));
  }
  *reinterpret_cast<Pack<T, 2>*>(static_cast<T*>(p.out) + at) = out;
  if (p.gates) {
    const int64_t saved = (r * p.K + k) * p.D + d;
    store(static_cast<T*>(p.gates) + saved, g);
    store(static_cast<T*>(p.updates) + saved, u);
  }
}
#endif

template <class T>
__global__ void __launch_bounds__(kGroup * (kConsumers + 1)) hopper_kernel(const ExpertUpdate p,
                                                                           const __grid_constant__ Maps maps) {
#if MK_HOPPER
  extern __shared__ unsigned char raw[];
  __shared__ uint64_t full[kRing], empty[kRing];
  unsigned char* memory = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const int64_t tiles_n = (p.D + kColumns - 1) / kColumns;
  const int row0 = int(blockIdx.x / tiles_n * kRows), column0 = int(blockIdx.x % tiles_n * kColumns);
  const int k = blockIdx.y, D = int(p.D), S = int(p.S), R = int(p.B * p.S);
  const int half = (D + kSum - 1) / kSum, group = threadIdx.x / kGroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kRing; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kConsumers * kGroup);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (group == 0) {
    if (threadIdx.x != 0) return;
    for (int step = 0; step < 2 * half; ++step) {
      const int stage = step % kRing;
      barrier_wait(empty + stage, step / kRing % 2 ^ 1);
      barrier_expect(full + stage, kStageBytes);
      unsigned char* tile = memory + stage * kStageBytes;
      const bool of_hiddens = step >= half;
      // Past the state's columns its tile is zero, whatever the weight's holds there.
      const int c = (of_hiddens ? step - half : step) * kSum, offset = of_hiddens ? D : 0;
      if (of_hiddens) {
        copy_tile(tile, &maps.hiddens, full + stage, c, row0);
      } else {
        copy_tile(tile, &maps.states, full + stage, c, row0 % S, k, row0 / S);
      }
      copy_tile(tile + kRowsBytes, &maps.gate, full + stage, offset + c, column0, k);
      copy_tile(tile + kRowsBytes + kColumnsBytes, &maps.update, full + stage, offset + c, column0, k);
    }
    return;
  }
  float gate[32], update[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) gate[i] = update[i] = 0.0f;
  for (int step = 0; step < 2 * half; ++step) {
    const int stage = step % kRing;
    barrier_wait(full + stage, step / kRing % 2);
    const unsigned char* tile = memory + stage * kStageBytes;
    const uint64_t a = descriptor(tile + (group - 1) * (kRowsBytes / kConsumers));
    const uint64_t b = descriptor(tile + kRowsBytes), c = descriptor(tile + kRowsBytes + kColumnsBytes);
    multiply_fence();
#pragma unroll
    for (int i = 0; i < kSum / 16; ++i) {
      // 16 elements further on in a swizzled row are 32 bytes: 2 in a descriptor.
      multiply<T>(gate, a + 2 * i, b + 2 * i);
      multiply<T>(update, a + 2 * i, c + 2 * i);
    }
    multiply_commit();
    // One stage stays in flight; the one before it is done and may be filled again.
    multiply_wait<1>();
    if (step > 0) barrier_arrive(empty + (step - 1) % kRing);
  }
  multiply_wait<0>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kGroup / kWarp;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int d = column0 + 8 * j + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row0 + (group - 1) * 64 + warp * 16 + lane / 4 + 8 * h;
      const float x[2] = {gate[4 * j + 2 * h], gate[4 * j + 2 * h + 1]};
      const float y[2] = {update[4 * j + 2 * h], update[4 * j + 2 * h + 1]};
      if (r < R && d < D) mix<T>(p, r, k, d, x, y);
    }
  }
#endif
}

// Whether the kernel of this device was compiled for sm_90a: elsewhere its body, barriers included, is empty.
bool compiled_for_this_device() {
  static int known[64] = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) return false;
  if (known[device] == 0) {
    int major = 0;
    cudaFuncAttributes attributes{};
    const bool hopper = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                        major == 9 && cudaFuncGetAttributes(&attributes, hopper_kernel<__half>) == cudaSuccess &&
                        attributes.sharedSizeBytes > 0;
    known[device] = hopper ? 1 : 2;
  }
  return known[device] == 1;
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver at run time, so that the library needs none to load.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// A contiguous tensor, innermost size first, in boxes of this shape.
template <int N>
bool encode(CUtensorMap* map, DType dtype, const void* data, const int64_t (&sizes)[N], const int (&box)[N]) {
  cuuint64_t extents[N], strides[N];
  cuuint32_t boxes[N], steps[N];
  cuuint64_t bytes = 2;
  for (int i = 0; i < N; ++i) {
    extents[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    bytes *= extents[i];
    strides[i] = bytes;  // of the next axis; the first one's is the element
  }
  const auto type = dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encoder()(map, type, N, const_cast<void*>(data), extents, strides, boxes, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class T>
cudaError_t launch(const ExpertUpdate& p, cudaStream_t stream) {
  const int slots = p.S < kRows ? int(p.S) : kRows;
  Maps maps;
  if (!encode<4>(&maps.states, p.dtype, p.states, {p.D, p.S, p.K, p.B}, {kSum, slots, 1, kRows / slots}) ||
      !encode<2>(&maps.hiddens, p.dtype, p.hiddens, {p.D, p.B * p.S}, {kSum, kRows}) ||
      !encode<3>(&maps.gate, p.dtype, p.gate_weight, {2 * p.D, p.D, p.K}, {kSum, kColumns, 1}) ||
      !encode<3>(&maps.update, p.dtype, p.update_weight, {2 * p.D, p.D, p.K}, {kSum, kColumns, 1})) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t error =
      cudaFuncSetAttribute(hopper_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMemory);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (p.B * p.S + kRows - 1) / kRows * ((p.D + kColumns - 1) / kColumns);
  hopper_kernel<T><<<dim3(unsigned(tiles), unsigned(p.K)), kGroup * (kConsumers + 1), kMemory, stream>>>(p, maps);
  return cudaGetLastError();
}

}  // namespace

bool hopper_takes(const ExpertUpdate& p) {
  // Strides of whole 16 bytes, and tiles of rows that are whole boxes of (batches, slots).
  return (p.dtype == DType::kBF16 || p.dtype == DType::kF16) && p.D % 8 == 0 && p.B * p.S >= 64 &&
         (p.S % kRows == 0 || kRows % p.S == 0) && compiled_for_this_device() && encoder() != nullptr;
}

cudaError_t hopper_forward(const ExpertUpdate& p, cudaStream_t stream) {
  return p.dtype == DType::kF16 ? launch<__half>(p, stream) : launch<__nv_bfloat16>(p, stream);
}

}  // namespace memkern::cuda
