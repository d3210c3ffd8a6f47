// The counters of tickets_of(): allocated once per stream, outside torch's allocator, and kept as long as the process.
#include <map>
#include <mutex>
#include <utility>

#include "bind_cuda/common.h"

namespace memkern::bind {

namespace {

constexpr int64_t kForCaptures = 65536;

struct Counters {
  int32_t* data = nullptr;
  int64_t count = 0;
};

// Zeroed. The one synchronisation of a stream, at its first launch; never called while that stream is captured, and in
// relaxed mode, so that a capture on another thread stays valid.
int32_t* allocate(int64_t count, cudaStream_t stream) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  void* data = nullptr;
  cudaError_t error = cudaMalloc(&data, static_cast<size_t>(count) * sizeof(int32_t));
  if (error == cudaSuccess) error = cudaMemsetAsync(data, 0, static_cast<size_t>(count) * sizeof(int32_t), stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  STD_CUDA_CHECK(error);
  return static_cast<int32_t*>(data);
}

}  // namespace

int32_t* tickets_of(int32_t device, cudaStream_t stream, int64_t count) {
  static std::mutex mutex;
  static std::map<std::pair<int32_t, cudaStream_t>, Counters> of_stream;
  static std::map<int32_t, Counters> of_captures;  // count: what is left

  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  const std::lock_guard<std::mutex> lock(mutex);
  Counters& captures = of_captures[device];
  if (status != cudaStreamCaptureStatusNone) {
    if (captures.count < count) return nullptr;
    captures.count -= count;
    return captures.data + captures.count;
  }
  if (captures.data == nullptr) captures = {allocate(kForCaptures, stream), kForCaptures};
  Counters& found = of_stream[{device, stream}];
  if (found.count < count) {
    // The outgrown ones are kept: a launch in flight may still count on them.
    const int64_t size = count > 1024 ? 2 * count : 1024;
    found = {allocate(size, stream), size};
  }
  return found.data;
}

}  // namespace memkern::bind
