// What both bindings of the memory column share: inputs as the kernels take them, float32 outputs.
#pragma once

#include "bind_cuda/common.h"
#include "cuda/memory/memory.h"

namespace memkern::bind {

// Contiguous, float32, and at an address that a 16-byte load takes.
inline Tensor as_floats(const Tensor& t) {
  const Tensor found = as(t, ScalarType::Float);
  return reinterpret_cast<uintptr_t>(found.data_ptr()) % 16 == 0 ? found : torch::stable::clone(found);
}
inline OptTensor as_floats(const OptTensor& t) { return t ? OptTensor(as_floats(*t)) : t; }

inline Tensor floats_of(const Launch& launch, std::initializer_list<int64_t> sizes) {
  return launch.empty(sizes, ScalarType::Float);
}
inline Tensor like(const Launch& launch, const Tensor& t) {
  const auto sizes = t.sizes();
  return launch.empty(sizes.data(), static_cast<int64_t>(sizes.size()), ScalarType::Float);
}

}  // namespace memkern::bind
