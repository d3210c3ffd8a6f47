// What the bindings of the CPU columns share on top of common/binding.h: outputs and torch's threads.
#pragma once

#include "common/binding.h"
#include "common/host.h"

namespace memkern::bind {

inline Tensor empty_cpu(const int64_t* sizes, int64_t dims, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dims, dtype);
}
inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

// The pool of torch, for kernels that take a memkern::ParallelFor.
inline void parallel_for(int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t),
                         const void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace memkern::bind
