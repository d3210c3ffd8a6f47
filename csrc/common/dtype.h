// Element types as the kernels know them. Types and constants alone: this header is compiled under several instruction
// sets, and an inline function here would leave one weak copy of itself for all of them.
#pragma once

#include <cstdint>

namespace memkern {

enum class DType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3 };

// Storage alone; arithmetic happens in acc_t after load() of common/vec.h.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};
// What values stored as T are computed in: double for double, float for everything else.
template <class T>
using acc_t = typename Acc<T>::type;

}  // namespace memkern

// Runs the block with T one of float, bf16, f16, double: MK_DISPATCH(p.dtype, T, { forward<T>(p); })
#define MK_DISPATCH(dtype, T, ...)                                                          \
  switch (dtype) {                                                                          \
    case ::memkern::DType::kF32: { using T = float; __VA_ARGS__; } break;                   \
    case ::memkern::DType::kBF16: { using T = ::memkern::bf16; __VA_ARGS__; } break;        \
    case ::memkern::DType::kF16: { using T = ::memkern::f16; __VA_ARGS__; } break;          \
    case ::memkern::DType::kF64: { using T = double; __VA_ARGS__; } break;                  \
  }
