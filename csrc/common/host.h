// What CPU kernels need from their host and may not take from torch: threads and scratch memory.
//
// csrc/cpu/isa.h includes this before it switches the instruction set, so that everything here stays at the baseline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace memkern {

// Splits [0, count) over the threads of torch's pool and calls body(context, begin, end) for each part. The parts depend
// on the number of threads: a sum over them would too, so let every index own its result, or a fixed chunk of work.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t),
                             const void* context);

// body(begin, end) over parts of [0, count), at least `grain` indices each; runs here when one part is enough.
template <class Body>
void parallel(ParallelFor run, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  run(
      count, grain,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); }, &body);
}

// Large blocks that a thread has done with wait for its next call: from the system they would come as pages that fault and
// are cleared one by one, which costs a search of 256 queries a hundredth of its time.
class KeptMemory {
 public:
  static constexpr size_t kLeast = size_t{128} << 10, kMost = size_t{8} << 20;  // bytes of a block

  ~KeptMemory() {
    for (const Block& block : blocks_) free(block);
  }

  // At least `bytes`, which becomes what there is.
  void* take(size_t& bytes) {
    for (Block& block : blocks_) {
      if (block.bytes < bytes || block.bytes > 2 * bytes) continue;
      void* data = block.data;
      bytes = block.bytes;
      block = {};
      return data;
    }
    return ::operator new(bytes, kAlignment);
  }

  void give(void* data, size_t bytes) {
    Block* smallest = blocks_;
    for (Block& block : blocks_) smallest = block.bytes < smallest->bytes ? &block : smallest;
    Block given{data, bytes};
    if (bytes >= kLeast && bytes <= kMost && bytes > smallest->bytes) std::swap(given, *smallest);
    free(given);
  }

  static KeptMemory& mine() {
    static thread_local KeptMemory memory;
    return memory;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static void free(const Block& block) {
    if (block.data != nullptr) ::operator delete(block.data, kAlignment);
  }

  Block blocks_[4];
};

// Memory for the time of a call, 64-byte aligned, uninitialised. Small requests come from the object itself.
template <class T, size_t Inline = 0>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(inline_) {
    if (static_cast<size_t>(count) <= Inline) return;
    bytes_ = static_cast<size_t>(count) * sizeof(T);
    data_ = static_cast<T*>(KeptMemory::mine().take(bytes_));
  }
  ~Scratch() {
    if (data_ != inline_) KeptMemory::mine().give(data_, bytes_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
  size_t bytes_ = 0;
  alignas(64) T inline_[Inline == 0 ? 1 : Inline];
};

}  // namespace memkern
