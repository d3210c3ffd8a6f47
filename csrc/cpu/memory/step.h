// The parts of a step that forward and the recomputation in backward share: pointers into a row of the batch, the write.
#pragma once

#include "cpu/memory/links.h"
#include "cpu/memory/slots.h"
#include "ops/memory.h"

namespace memkern::cpu::MK_NS {

// Hands out pieces of one allocation; each starts on a cache line.
template <class T>
class Pieces {
 public:
  explicit Pieces(T* at) : at_(at) {}
  static int64_t size(int64_t count) { return (count + 15) / 16 * 16; }
  T* take(int64_t count) {
    T* piece = at_;
    at_ += size(count);
    return piece;
  }
  // The same, zero.
  T* zeros(int64_t count) {
    T* piece = take(count);
    std::memset(piece, 0, static_cast<size_t>(count) * sizeof(T));
    return piece;
  }

 private:
  T* at_;
};

// The interface of one row of the batch at one step.
template <class T>
struct Said {
  Said(const MemorySizes& s, const InterfaceFields<const void*>& f, const void* sharpness_, int64_t batch,
       int64_t step) {
    const int64_t at = batch * s.steps + step, reads = s.read_heads, writes = s.write_heads;
    auto field = [&](const void* base, int64_t count) { return static_cast<const T*>(base) + at * count; };
    read_keys = field(f.read_keys, reads * s.width);
    read_strengths = field(f.read_strengths, reads);
    read_modes = field(f.read_modes, reads * (1 + 2 * writes));
    write_keys = field(f.write_keys, writes * s.width);
    write_strengths = field(f.write_strengths, writes);
    write_vectors = field(f.write_vectors, writes * s.width);
    erase_vectors = field(f.erase_vectors, writes * s.width);
    free_gates = field(f.free_gates, reads);
    allocation_gates = field(f.allocation_gates, writes);
    write_gates = field(f.write_gates, writes);
    sharpness = sharpness_ == nullptr ? nullptr : field(sharpness_, reads);
  }

  const T *read_keys, *read_strengths, *read_modes, *write_keys, *write_strengths, *write_vectors, *erase_vectors,
      *free_gates, *allocation_gates, *write_gates, *sharpness;
};

// to = from (scaled by rows) prod_h (1 - w_h e_h) + sum_h w_h v_h; to may be from.
template <class T>
MK_INLINE void write_rows(const T* from, T* to, int64_t n, int64_t width, const T* scales, const T* write,
                          const T* erase, const T* vectors, int64_t heads) {
  const int64_t stride = padded<T>(n);
  for (int64_t i = 0; i < n; ++i) {
    const T scale = scales == nullptr ? T(1) : scales[i];
    for_each_vec<T>(width, [&](int64_t k, auto part) {
      Vec<T> m = load_part(from + i * width + k, part) * scale, added(T(0));
      for (int64_t h = 0; h < heads; ++h) {
        const Vec<T> w(write[h * stride + i]);
        m = m * (T(1) - w * load_part(erase + h * width + k, part));
        added = fma(w, load_part(vectors + h * width + k, part), added);
      }
      store_part(to + i * width + k, m + added, part);
    });
  }
}

}  // namespace memkern::cpu::MK_NS
