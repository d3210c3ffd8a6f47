// empty_recycled: memory for the large gradients that every training step makes and drops again.
//
// The allocator returns blocks beyond 32 MiB to the system as soon as they are freed, so that the next step would touch
// fresh pages: a fault and a cleared page for every 4 KiB, as dear as a quarter of the product that fills them. Freed
// blocks are kept here for the next tensor of their size. The system is told that it may have their pages when memory
// is short.
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "bind_cpu/common.h"

#include <torch/csrc/stable/ops.h>

namespace {

using namespace memkern;
using namespace memkern::bind;

constexpr size_t kAlignment = size_t{2} << 20;  // of a huge page
constexpr size_t kKept = 16;                    // blocks

struct Block {
  void* data;
  size_t bytes;
};

class Pool {
 public:
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = free_.size(); i-- > 0;) {
        if (free_[i].bytes != bytes) continue;
        void* data = free_[i].data;
        free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
        return data;
      }
    }
    void* data = ::operator new(bytes, std::align_val_t{kAlignment});
    prefer_huge_pages(data, static_cast<int64_t>(bytes));
    return data;
  }

  void give(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_FREE)
    madvise(data, bytes / kAlignment * kAlignment, MADV_FREE);
#endif
    void* oldest = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back({data, bytes});
      if (free_.size() > kKept) {
        oldest = free_.front().data;
        free_.erase(free_.begin());
      }
    }
    if (oldest != nullptr) ::operator delete(oldest, std::align_val_t{kAlignment});
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;
};

// Never destroyed: a tensor may outlive every static object.
Pool& pool() {
  static Pool* const made = new Pool;
  return *made;
}

Tensor empty_recycled(std::vector<int64_t> sizes) {
  int64_t count = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t d = sizes.size(); d-- > 0;) {
    STD_TORCH_CHECK(sizes[d] > 0, "empty_recycled: expected sizes of at least 1, got ", sizes[d]);
    strides[d] = count;
    count *= sizes[d];
  }
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  void* data = pool().take(bytes);
  return torch::stable::from_blob(
      data, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float,
      [bytes](void* freed) { pool().give(freed, bytes); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkern, m) { m.def("empty_recycled(int[] sizes) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(memkern, CompositeExplicitAutograd, m) {
  m.impl("empty_recycled", TORCH_BOX(&empty_recycled));
}
