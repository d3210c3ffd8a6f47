// What CPU kernels need from their host and may not take from torch: threads and scratch memory.
//
// csrc/cpu/isa.h includes this before it switches the instruction set, so that everything here stays at the baseline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

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

// Memory for the time of a call, 64-byte aligned, uninitialised. Small requests come from the object itself.
template <class T, size_t Inline = 0>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(inline_) {
    if (static_cast<size_t>(count) > Inline) {
      data_ = static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}));
    }
  }
  ~Scratch() {
    if (data_ != inline_) ::operator delete(data_, std::align_val_t{64});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
  alignas(64) T inline_[Inline == 0 ? 1 : Inline];
};

}  // namespace memkern
