// What the bindings of the CUDA columns share on top of common/binding.h: device, stream, outputs, errors, tickets.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/binding.h"

namespace memkern::bind {

// At least `count` int32 counters that are zero before the launch that takes them, and that it leaves at zero (see
// arrive_last in cuda/common.cuh). Nothing clears them in between:
// - launches on one stream run one after the other, so a stream has one set for all of them;
// - a captured launch may be replayed beside anything, so it gets counters that are never handed out again, from 65536
//   that the device's first eager launch puts aside. Past those, or in a capture without an eager launch before it,
//   the result is nullptr and the caller takes a fill of its own; Launch::tickets() does.
int32_t* tickets_of(int32_t device, cudaStream_t stream, int64_t count);

// The device of a tensor as the current one, and its current stream, for as long as the object lives:
//
//     Launch launch(hiddens);
//     Tensor y = launch.empty({rows, width}, ScalarType::Float);
//     launch.check(memkern::cuda::scale(..., launch.tickets(1), launch.stream()));
class Launch {
 public:
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()), device_(t.get_device_index()), like_(t) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype) const {
    return empty_on(aoti_torch_device_type_cuda(), device_, sizes, dims, dtype);
  }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
  }

  int32_t* tickets(int64_t count) {
    int32_t* found = tickets_of(device_, stream_, count);
    if (found == nullptr) {
      // Freed with this object; the allocator reuses it in stream order alone.
      own_tickets_ = torch::stable::new_zeros(like_, {count}, ScalarType::Int);
      found = out_ptr<int32_t>(*own_tickets_);
    }
    return found;
  }

  // A launcher's result: the error of the launch, not of what runs.
  void check(cudaError_t error) const { STD_CUDA_CHECK(error); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
  Tensor like_;
  cudaStream_t stream_ = nullptr;
  OptTensor own_tickets_;
};

}  // namespace memkern::bind
