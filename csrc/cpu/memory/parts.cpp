// The parts of a step as operators of their own, on the same loops, and the column's table.
#include "cpu/isa.h"
#include "common/vec.h"
#include "cpu/memory/step.h"
#include "cpu/memory/write_backward.h"
#include "cpu/memory/kernels.h"

namespace memkern::cpu::MK_NS {

namespace {

template <class T>
const T* in(const void* x) {
  return static_cast<const T*>(x);
}
template <class T>
T* out(void* x) {
  return static_cast<T*>(x);
}

// Several padded vectors over the slots; all zero at first.
template <class T>
class Vectors {
 public:
  Vectors(int64_t count, int64_t n) : n_(n), stride_(padded<T>(n)), data_(count * stride_) {
    std::memset(data_.get(), 0, static_cast<size_t>(count * stride_) * sizeof(T));
  }
  T* operator[](int64_t i) const { return data_.get() + i * stride_; }
  void load(int64_t at, const T* from, int64_t count) const {
    for (int64_t c = 0; c < count; ++c) load_slots(from + c * n_, n_, (*this)[at + c]);
  }
  void store(int64_t at, T* to, int64_t count) const {
    for (int64_t c = 0; c < count; ++c) store_slots((*this)[at + c], n_, to + c * n_);
  }
  void clear(int64_t at, int64_t count) const {
    std::memset((*this)[at], 0, static_cast<size_t>(count * stride_) * sizeof(T));
  }

 private:
  int64_t n_, stride_;
  Scratch<T> data_;
};

// body(begin, end) over rows of the batch, cut so that a part is worth a thread.
template <class Body>
void over_batch(ParallelFor threads, int64_t count, int64_t cost, const Body& body) {
  parallel(threads, count, std::max<int64_t>(1, 16384 / std::max<int64_t>(cost, 1)), body);
}

// Rows of memory with the masked slots as zeros: what they hold, NaN included, must not enter a product.
template <class T>
const T* visible(const T* memory, const uint8_t* mask, int64_t n, int64_t width, T* copy) {
  if (mask == nullptr) return memory;
  for (int64_t i = 0; i < n; ++i) {
    if (mask[i]) {
      std::memcpy(copy + i * width, memory + i * width, static_cast<size_t>(width) * sizeof(T));
    } else {
      std::memset(copy + i * width, 0, static_cast<size_t>(width) * sizeof(T));
    }
  }
  return copy;
}

template <class T>
void content_forward_rows(const ContentWeights& p, ParallelFor threads) {
  const int64_t n = p.slots, width = p.width, heads = p.heads;
  over_batch(threads, p.batch, n * width * (heads + 1), [&](int64_t begin, int64_t end) {
    Vectors<T> v(heads + 1, n);
    Scratch<T> copy(p.slot_mask == nullptr ? 0 : n * width);
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* mask = p.slot_mask == nullptr ? nullptr : p.slot_mask + b * n;
      const T* rows = visible(in<T>(p.memory) + b * n * width, mask, n, width, copy.get());
      const T* keys = in<T>(p.keys) + b * heads * width;
      row_dots(rows, n, width, keys, heads, v[0], v[heads]);
      for (int64_t h = 0; h < heads; ++h) {
        content_softmax(v[h], v[heads], static_cast<const T*>(nullptr), n, square_sum(keys + h * width, width),
                        in<T>(p.strengths)[b * heads + h], mask);
      }
      v.store(0, out<T>(p.weights) + b * heads * n, heads);
    }
  });
}

template <class T>
void content_backward_rows(const ContentWeights& p, ParallelFor threads) {
  const int64_t n = p.slots, width = p.width, heads = p.heads;
  over_batch(threads, p.batch, n * width * (2 * heads + 1), [&](int64_t begin, int64_t end) {
    Vectors<T> v(3 * heads + 2, n);
    T *dots = v[0], *weights = v[heads], *grad = v[2 * heads], *norms = v[3 * heads], *own = v[3 * heads + 1];
    const int64_t stride = padded<T>(n);
    Scratch<T> copy(p.slot_mask == nullptr ? 0 : n * width);
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* mask = p.slot_mask == nullptr ? nullptr : p.slot_mask + b * n;
      const T* rows = visible(in<T>(p.memory) + b * n * width, mask, n, width, copy.get());
      const T* keys = in<T>(p.keys) + b * heads * width;
      T *d_rows = out<T>(p.d_memory) + b * n * width, *d_keys = out<T>(p.d_keys) + b * heads * width;
      v.load(heads, in<T>(p.weights) + b * heads * n, heads);
      v.load(2 * heads, in<T>(p.grad) + b * heads * n, heads);
      v.clear(3 * heads + 1, 1);
      row_dots(rows, n, width, keys, heads, dots, norms);
      for (int64_t h = 0; h < heads; ++h) {
          out<T>(p.d_strengths)[b * heads + h] =
            content_backward(grad + h * stride, weights + h * stride, dots + h * stride, norms, n,
                             square_sum(keys + h * width, width), in<T>(p.strengths)[b * heads + h], own);
      }
      weighted_rows(grad, heads, rows, n, width, d_keys);
      for (int64_t h = 0; h < heads; ++h) {
        project_key(d_keys + h * width, keys + h * width, width, square_sum(keys + h * width, width));
      }
      std::memset(d_rows, 0, static_cast<size_t>(n * width) * sizeof(T));
      add_outer(d_rows, n, width, grad, keys, heads, own, rows);
    }
  });
}

template <class T>
void sharpen_forward_rows(const Sharpen& p, ParallelFor threads) {
  over_batch(threads, p.rows, 16 * p.size, [&](int64_t begin, int64_t end) {
    Vectors<T> v(2, p.size);
    for (int64_t i = begin; i < end; ++i) {
      v.load(0, in<T>(p.weights) + i * p.size, 1);
      sharpen_slots(v[0], in<T>(p.gamma)[i], p.size, v[1]);
      v.store(1, out<T>(p.sharpened) + i * p.size, 1);
    }
  });
}

template <class T>
void sharpen_backward_rows(const Sharpen& p, ParallelFor threads) {
  over_batch(threads, p.rows, 16 * p.size, [&](int64_t begin, int64_t end) {
    Vectors<T> v(3, p.size);
    for (int64_t i = begin; i < end; ++i) {
      v.load(0, in<T>(p.weights) + i * p.size, 1);
      v.load(1, in<T>(p.sharpened) + i * p.size, 1);
      v.load(2, in<T>(p.grad) + i * p.size, 1);
      out<T>(p.d_gamma)[i] = sharpen_backward_slots(v[2], v[0], v[1], in<T>(p.gamma)[i], p.size);
      v.store(2, out<T>(p.d_weights) + i * p.size, 1);
    }
  });
}

template <class T>
void allocation_forward_rows(const Allocation& p, ParallelFor threads) {
  over_batch(threads, p.batch, p.slots * p.slots / 8, [&](int64_t begin, int64_t end) {
    Vectors<T> v(3, p.slots);
    Order<T> order(p.slots);
    for (int64_t b = begin; b < end; ++b) {
      v.load(0, in<T>(p.usage) + b * p.slots, 1);
      allocate_slots(order, v[0], p.slots, v[1], v[2]);
      v.store(2, out<T>(p.weights) + b * p.slots, 1);
    }
  });
}

template <class T>
void allocation_backward_rows(const Allocation& p, ParallelFor threads) {
  over_batch(threads, p.batch, p.slots * p.slots / 8, [&](int64_t begin, int64_t end) {
    Vectors<T> v(4, p.slots);
    Order<T> order(p.slots);
    for (int64_t b = begin; b < end; ++b) {
      v.load(0, in<T>(p.usage) + b * p.slots, 1);
      v.load(2, in<T>(p.grad) + b * p.slots, 1);
      v.clear(3, 1);
      order.fill(v[0], v[1]);
      allocate_backward(order, v[0], v[1], v[2], p.slots, v[3]);
      v.store(3, out<T>(p.d_usage) + b * p.slots, 1);
    }
  });
}

template <class T>
void usage_forward_rows(const UsageUpdate& p, ParallelFor threads) {
  const int64_t n = p.slots, reads = p.read_heads, writes = p.write_heads, stride = padded<T>(n);
  over_batch(threads, p.batch, n * (reads + writes), [&](int64_t begin, int64_t end) {
    Vectors<T> v(1 + reads + writes, n);
    for (int64_t b = begin; b < end; ++b) {
      v.load(0, in<T>(p.usage) + b * n, 1);
      v.load(1, in<T>(p.read_weights) + b * reads * n, reads);
      v.load(1 + reads, in<T>(p.write_weights) + b * writes * n, writes);
      for (int64_t i = 0; i < stride; i += Vec<T>::N) {
        const Vec<T> u = load(v[0] + i), w = written_at(v[1 + reads], writes, stride, i);
        const Vec<T> psi = retention_at(v[1], in<T>(p.free_gates) + b * reads, reads, stride, i);
        store(v[0] + i, clamp_unit(fma(w, T(1) - u, u) * psi));
      }
      v.store(0, out<T>(p.updated) + b * n, 1);
    }
  });
}

template <class T>
void usage_backward_rows(const UsageUpdate& p, ParallelFor threads) {
  const int64_t n = p.slots, reads = p.read_heads, writes = p.write_heads, stride = padded<T>(n);
  over_batch(threads, p.batch, 2 * n * (reads + writes), [&](int64_t begin, int64_t end) {
    Vectors<T> v(4 + 2 * (reads + writes), n);
    T *usage = v[0], *grad = v[1], *psi = v[2], *d_psi = v[3], *read = v[4], *write = v[4 + reads];
    const int64_t at = 4 + reads + writes;
    for (int64_t b = begin; b < end; ++b) {
      const T* gates = in<T>(p.free_gates) + b * reads;
      v.load(0, in<T>(p.usage) + b * n, 1);
      v.load(1, in<T>(p.grad) + b * n, 1);
      v.load(4, in<T>(p.read_weights) + b * reads * n, reads);
      v.load(4 + reads, in<T>(p.write_weights) + b * writes * n, writes);
      v.clear(3, 1);
      v.clear(at, reads + writes);
      for (int64_t i = 0; i < stride; i += Vec<T>::N) store(psi + i, retention_at(read, gates, reads, stride, i));
      usage_backward_slots(grad, usage, write, writes, psi, n, d_psi, p.detach_write ? nullptr : v[at + reads]);
      retention_backward(d_psi, read, gates, reads, n, v[at], out<T>(p.d_free_gates) + b * reads);
      v.store(1, out<T>(p.d_usage) + b * n, 1);
      v.store(at, out<T>(p.d_read_weights) + b * reads * n, reads);
      v.store(at + reads, out<T>(p.d_write_weights) + b * writes * n, writes);
    }
  });
}

template <class T>
void links_forward_rows(const LinksUpdate& p, ParallelFor threads) {
  const int64_t n = p.slots;
  over_batch(threads, p.rows, n * n, [&](int64_t begin, int64_t end) {
    Vectors<T> v(3, n);
    for (int64_t b = begin; b < end; ++b) {
      v.load(0, in<T>(p.precedence) + b * n, 1);
      v.load(1, in<T>(p.write_weights) + b * n, 1);
      links_update(in<T>(p.links) + b * n * n, out<T>(p.updated) + b * n * n, v[1], v[0], n);
      follow(v[0], v[1], n, v[2]);
      v.store(2, out<T>(p.followed) + b * n, 1);
    }
  });
}

template <class T>
void links_backward_rows(const LinksUpdate& p, ParallelFor threads) {
  const int64_t n = p.slots;
  over_batch(threads, p.rows, n * n, [&](int64_t begin, int64_t end) {
    // A read head of zeros takes the place of the reads.
    Vectors<T> v(9, n);
    T *precedence = v[0], *write = v[1], *d_precedence = v[2], *d_write = v[3], *row = v[4], *column = v[5];
    for (int64_t b = begin; b < end; ++b) {
      v.load(0, in<T>(p.precedence) + b * n, 1);
      v.load(1, in<T>(p.write_weights) + b * n, 1);
      v.clear(2, 7);
      if (p.grad_precedence != nullptr) v.load(2, in<T>(p.grad_precedence) + b * n, 1);
      follow_backward(precedence, write, n, d_precedence, d_write);
      LinkBackward<T> pass{};
      pass.n = n;
      pass.links = in<T>(p.links) + b * n * n;
      pass.grad = p.grad_links == nullptr ? nullptr : in<T>(p.grad_links) + b * n * n;
      pass.d_links = out<T>(p.d_links) + b * n * n;
      pass.write = write;
      pass.precedence = precedence;
      pass.reads = pass.d_reads = pass.grad_ahead = pass.grad_back = v[6];
      pass.ahead = v[7];
      pass.back = v[8];
      pass.row = row;
      pass.column = column;
      pass.d_precedence = d_precedence;
      links_backward_reads(pass, 1);
      for (int64_t i = 0; i < padded<T>(n); i += Vec<T>::N) {
        store(d_write + i, load(d_write + i) + load(row + i) + load(column + i));
      }
      v.store(2, out<T>(p.d_precedence) + b * n, 1);
      v.store(3, out<T>(p.d_write_weights) + b * n, 1);
    }
  });
}

template <class T>
void directional_forward_rows(const Directional& p, ParallelFor threads) {
  const int64_t n = p.slots, reads = p.read_heads, writes = p.write_heads;
  over_batch(threads, p.batch, writes * n * n * reads, [&](int64_t begin, int64_t end) {
    Vectors<T> v(3 * reads, n);
    for (int64_t b = begin; b < end; ++b) {
      v.load(0, in<T>(p.read_weights) + b * reads * n, reads);
      for (int64_t h = 0; h < writes; ++h) {
        const int64_t at = (b * writes + h) * reads * n;
        v.clear(reads, 2 * reads);
        LinkPass<T> pass{};
        pass.n = n;
        pass.from = in<T>(p.links) + (b * writes + h) * n * n;
        pass.reads = v[0];
        pass.ahead = v[reads];
        pass.back = v[2 * reads];
        links_forward_reads(pass, reads);
        v.store(reads, out<T>(p.ahead) + at, reads);
        v.store(2 * reads, out<T>(p.back) + at, reads);
      }
    }
  });
}

template <class T>
void directional_backward_rows(const Directional& p, ParallelFor threads) {
  const int64_t n = p.slots, reads = p.read_heads, writes = p.write_heads, stride = padded<T>(n);
  over_batch(threads, p.batch, 2 * writes * n * n * reads, [&](int64_t begin, int64_t end) {
    Vectors<T> v(6 * reads, n);
    T *read = v[0], *d_read = v[reads], *ahead = v[2 * reads], *back = v[3 * reads];
    T *through = v[4 * reads], *against = v[5 * reads];
    for (int64_t b = begin; b < end; ++b) {
      v.load(0, in<T>(p.read_weights) + b * reads * n, reads);
      v.clear(reads, reads);
      for (int64_t h = 0; h < writes; ++h) {
        const int64_t at = (b * writes + h) * reads * n;
        const T* links = in<T>(p.links) + (b * writes + h) * n * n;
        T* d_links = out<T>(p.d_links) + (b * writes + h) * n * n;
        v.clear(2 * reads, 4 * reads);
        if (p.grad_ahead != nullptr) v.load(2 * reads, in<T>(p.grad_ahead) + at, reads);
        if (p.grad_back != nullptr) v.load(3 * reads, in<T>(p.grad_back) + at, reads);
        // d_read = L^T grad_ahead + L grad_back
        LinkPass<T> pass{};
        pass.n = n;
        pass.from = links;
        pass.reads = ahead;
        pass.ahead = through;
        pass.back = d_read;
        links_forward_reads(pass, reads);
        pass.reads = back;
        pass.back = against;
        links_forward_reads(pass, reads);
        for (int64_t i = 0; i < reads * stride; i += Vec<T>::N) store(d_read + i, load(d_read + i) + load(through + i));
        std::memset(d_links, 0, static_cast<size_t>(n * n) * sizeof(T));
        v.clear(4 * reads, 2 * reads);
        // Rows of d_links: grad_ahead_i r + r_i grad_back.
        for (int64_t r = 0; r < reads; ++r) {
          add_outer(d_links, n, n, ahead + r * stride, read + r * stride, 1, static_cast<const T*>(nullptr), links);
          add_outer(d_links, n, n, read + r * stride, back + r * stride, 1, static_cast<const T*>(nullptr), links);
        }
      }
      v.store(reads, out<T>(p.d_read_weights) + b * reads * n, reads);
    }
  });
}

template <class T>
void read_forward_rows(const ReadMemory& p, ParallelFor threads) {
  const int64_t n = p.slots, width = p.width, heads = p.heads;
  over_batch(threads, p.batch, n * width * heads, [&](int64_t begin, int64_t end) {
    Vectors<T> v(heads, n);
    for (int64_t b = begin; b < end; ++b) {
      v.load(0, in<T>(p.weights) + b * heads * n, heads);
      weighted_rows(v[0], heads, in<T>(p.memory) + b * n * width, n, width, out<T>(p.reads) + b * heads * width);
    }
  });
}

template <class T>
void read_backward_rows(const ReadMemory& p, ParallelFor threads) {
  const int64_t n = p.slots, width = p.width, heads = p.heads;
  over_batch(threads, p.batch, 2 * n * width * heads, [&](int64_t begin, int64_t end) {
    Vectors<T> v(2 * heads, n);
    for (int64_t b = begin; b < end; ++b) {
      const T *rows = in<T>(p.memory) + b * n * width, *grad = in<T>(p.grad) + b * heads * width;
      T* d_rows = out<T>(p.d_memory) + b * n * width;
      v.load(0, in<T>(p.weights) + b * heads * n, heads);
      row_dots(rows, n, width, grad, heads, v[heads], static_cast<T*>(nullptr));
      std::memset(d_rows, 0, static_cast<size_t>(n * width) * sizeof(T));
      add_outer(d_rows, n, width, v[0], grad, heads, static_cast<const T*>(nullptr), rows);
      v.store(heads, out<T>(p.d_weights) + b * heads * n, heads);
    }
  });
}

template <class T>
void write_forward_rows(const WriteMemory& p, ParallelFor threads) {
  const int64_t n = p.slots, width = p.width, heads = p.heads;
  over_batch(threads, p.batch, n * width * heads, [&](int64_t begin, int64_t end) {
    Vectors<T> v(heads, n);
    for (int64_t b = begin; b < end; ++b) {
      v.load(0, in<T>(p.weights) + b * heads * n, heads);
      write_rows(in<T>(p.memory) + b * n * width, out<T>(p.written) + b * n * width, n, width,
                 static_cast<const T*>(nullptr), v[0], in<T>(p.erase_vectors) + b * heads * width,
                 in<T>(p.write_vectors) + b * heads * width, heads);
    }
  });
}

template <class T>
void write_backward_rows(const WriteMemory& p, ParallelFor threads) {
  const int64_t n = p.slots, width = p.width, heads = p.heads;
  over_batch(threads, p.batch, 3 * n * width * heads, [&](int64_t begin, int64_t end) {
    Vectors<T> v(2 * heads, n);
    for (int64_t b = begin; b < end; ++b) {
      T* d_rows = out<T>(p.d_memory) + b * n * width;
      v.load(0, in<T>(p.weights) + b * heads * n, heads);
      v.clear(heads, heads);
      std::memcpy(d_rows, in<T>(p.grad) + b * n * width, static_cast<size_t>(n * width) * sizeof(T));
      write_rows_backward(d_rows, in<T>(p.memory) + b * n * width, n, width, static_cast<const T*>(nullptr), v[0],
                          in<T>(p.erase_vectors) + b * heads * width, in<T>(p.write_vectors) + b * heads * width, heads,
                          v[heads], out<T>(p.d_erase_vectors) + b * heads * width,
                          out<T>(p.d_write_vectors) + b * heads * width);
      v.store(heads, out<T>(p.d_weights) + b * heads * n, heads);
    }
  });
}

}  // namespace

#define MK_PART(name, Params) \
  void name(const Params& p, ParallelFor threads) { MK_MEMORY_DISPATCH(p.dtype, T, name##_rows<T>(p, threads)) }
MK_PART(content_forward, ContentWeights)
MK_PART(content_backward, ContentWeights)
MK_PART(sharpen_forward, Sharpen)
MK_PART(sharpen_backward, Sharpen)
MK_PART(allocation_forward, Allocation)
MK_PART(allocation_backward, Allocation)
MK_PART(usage_forward, UsageUpdate)
MK_PART(usage_backward, UsageUpdate)
MK_PART(links_forward, LinksUpdate)
MK_PART(links_backward, LinksUpdate)
MK_PART(directional_forward, Directional)
MK_PART(directional_backward, Directional)
MK_PART(read_forward, ReadMemory)
MK_PART(read_backward, ReadMemory)
MK_PART(write_forward, WriteMemory)
MK_PART(write_backward, WriteMemory)
#undef MK_PART

extern const MemoryTable memory = {memory_forward,      memory_backward,      content_forward,     content_backward,
                                   sharpen_forward,     sharpen_backward,     allocation_forward,  allocation_backward,
                                   usage_forward,       usage_backward,       links_forward,       links_backward,
                                   directional_forward, directional_backward, read_forward,        read_backward,
                                   write_forward,       write_backward};

}  // namespace memkern::cpu::MK_NS
