// What every binding shares, over torch's stable ABI: dtypes, contiguous inputs, optional tensors, outputs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "common/dtype.h"

namespace memkern::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kF32;
    case ScalarType::BFloat16: return DType::kBF16;
    case ScalarType::Half: return DType::kF16;
    case ScalarType::Double: return DType::kF64;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
  }
}

// The dtype in which the operators compute on t, and return their statistics.
inline ScalarType acc_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// t itself when it is contiguous (a call of the dispatcher costs 0.4 us), otherwise a copy. Keep it while its data is
// in use.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline OptTensor dense(const OptTensor& t) { return t ? OptTensor(dense(*t)) : t; }

// Contiguous and of this dtype.
inline Tensor as(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? dense(t) : dense(torch::stable::to(t, dtype));
}
inline OptTensor as(const OptTensor& t, ScalarType dtype) { return t ? OptTensor(as(*t, dtype)) : t; }

template <class T>
const T* ptr(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
const T* ptr(const OptTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}
template <class T>
T* out_ptr(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// A contiguous uninitialised tensor on a device of the given type (aoti_torch_device_type_*), past the dispatcher.
inline Tensor empty_on(int32_t device_type, int32_t device_index, const int64_t* sizes, int64_t dims,
                       ScalarType dtype) {
  std::array<int64_t, 8> strides{};
  STD_TORCH_CHECK(dims <= 8, "at most 8 dimensions");
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[static_cast<size_t>(d)] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides.data(), static_cast<int32_t>(dtype),
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// The same of a backend's class that has `Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype)`, where a
// column's bindings share a template over it (common/binding_memory.h, common/binding_retrieval.h).
template <class Backend>
Tensor empty(const Backend& backend, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return backend.empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}
template <class Backend>
Tensor like(const Backend& backend, const Tensor& t, ScalarType dtype) {
  const auto sizes = t.sizes();
  return backend.empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}
template <class Backend>
Tensor like(const Backend& backend, const Tensor& t) {
  return like(backend, t, t.scalar_type());
}

}  // namespace memkern::bind
