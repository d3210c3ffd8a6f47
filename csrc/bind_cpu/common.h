// What the bindings of the CPU columns share on top of common/binding.h: outputs and torch's threads.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/binding.h"
#include "common/host.h"

namespace memkern::bind {

// Asks for huge pages behind a large output, which the allocator has mostly just mapped: a first write to it at 4 KiB a
// page fault runs at a quarter of the speed. Only whole huge pages inside the range are meant, and the caller writes all
// of it, so that no memory is taken beyond its own. Where the system grants none (`never`), nothing happens.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Bytes of an element.
inline int64_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: return 1;
  }
}

inline Tensor empty_cpu(const int64_t* sizes, int64_t dims, ScalarType dtype) {
  constexpr int64_t kLarge = int64_t{8} << 20;
  Tensor made = empty_on(aoti_torch_device_type_cpu(), 0, sizes, dims, dtype);
  int64_t bytes = size_of(dtype);
  for (int64_t d = 0; d < dims; ++d) bytes *= sizes[d];
  if (bytes >= kLarge) prefer_huge_pages(made.data_ptr(), bytes);
  return made;
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
