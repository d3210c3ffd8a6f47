// Forward of memory_step and memory_scan: each row of the batch walks through all its steps while its links and memory
// stay in the cache of one core.
#include "cpu/isa.h"
#include "common/vec.h"
#include "cpu/memory/step.h"
#include "cpu/memory/kernels.h"

namespace memkern::cpu::MK_NS {

namespace {

template <class T>
class Walk {
 public:
  explicit Walk(const MemoryForward& p)
      : p_(p),
        s_(p.sizes),
        stride_(padded<T>(p.sizes.slots)),
        scratch_(scratch_size()),
        order_(p.sizes.slots) {
    Pieces<T> pieces(scratch_.get());
    usage_ = pieces.zeros(stride_);
    retention_ = pieces.zeros(stride_);
    norms_ = pieces.zeros(stride_);
    simulated_ = pieces.zeros(stride_);
    free_ = pieces.zeros(stride_);
    before_ = pieces.zeros(stride_);
    precedence_ = pieces.zeros(s_.write_heads * stride_);
    write_ = pieces.zeros(s_.write_heads * stride_);
    looked_up_ = pieces.zeros(s_.write_heads * stride_);
    read_ = pieces.zeros(s_.read_heads * stride_);
    found_ = pieces.zeros(s_.read_heads * stride_);
    ahead_ = pieces.zeros(s_.read_heads * stride_);
    back_ = pieces.zeros(s_.read_heads * stride_);
    mixed_ = pieces.zeros(s_.read_heads * stride_);
  }

  void row(int64_t batch) {
    const int64_t n = s_.slots, reads = s_.read_heads, writes = s_.write_heads;
    load_slots(in(p_.state.usage) + batch * n, n, usage_);
    rows(in(p_.state.precedence) + batch * writes * n, writes, precedence_);
    rows(in(p_.state.read_weights) + batch * reads * n, reads, read_);
    rows(in(p_.state.write_weights) + batch * writes * n, writes, write_);
    memory_size_ = n * s_.width;
    links_size_ = writes * n * n;
    memory_ = in(p_.state.memory) + batch * memory_size_;
    links_ = in(p_.state.links) + batch * links_size_;
    memory_out_ = out(p_.result.memory) + batch * memory_size_;
    links_out_ = s_.track_links ? out(p_.result.links) + batch * links_size_ : nullptr;
    stream_ = s_.steps == 1 && s_.track_links && s_.read_heads <= 4 && streams(links_out_, n, s_.batch * links_size_);
    for (int64_t t = 0; t < s_.steps; ++t) {
      if (p_.saved.memory != nullptr && t > 0 && t % s_.every == 0) snapshot(batch, t / s_.every - 1);
      if (p_.step_mask != nullptr && !p_.step_mask[batch * s_.steps + t]) {
        std::memset(reads_at(batch, t), 0, static_cast<size_t>(reads * s_.width) * sizeof(T));
      } else {
        step(batch, t);
      }
      keep(batch, t);
    }
    finish(batch);
  }

 private:
  const T* in(const void* x) const { return static_cast<const T*>(x); }
  T* out(void* x) const { return static_cast<T*>(x); }

  int64_t scratch_size() const {
    const int64_t heads = 3 * s_.write_heads + 5 * s_.read_heads;
    return (6 + heads) * Pieces<T>::size(stride_) + 16 * 16;
  }

  void rows(const T* from, int64_t count, T* to) const {
    for (int64_t c = 0; c < count; ++c) load_slots(from + c * s_.slots, s_.slots, to + c * stride_);
  }
  void store_rows(const T* from, int64_t count, T* to) const {
    for (int64_t c = 0; c < count; ++c) store_slots(from + c * stride_, s_.slots, to + c * s_.slots);
  }

  T* reads_at(int64_t batch, int64_t t) const {
    return out(p_.reads) + (batch * s_.steps + t) * s_.read_heads * s_.width;
  }

  void step(int64_t batch, int64_t t) {
    constexpr int N = Vec<T>::N;
    const Said<T> said(s_, p_.interface, p_.sharpness, batch, t);
    const int64_t n = s_.slots, reads = s_.read_heads, writes = s_.write_heads;
    for (int64_t i = 0; i < stride_; i += N) {
      const Vec<T> psi = retention_at(read_, said.free_gates, reads, stride_, i);
      store(retention_ + i, psi);
      if (s_.track_usage) {
        const Vec<T> u = load(usage_ + i), w = written_at(write_, writes, stride_, i);
        store(usage_ + i, within(clamp_unit(fma(w, T(1) - u, u) * psi), n - i));
      }
    }
    const T* scales = s_.deallocate ? retention_ : nullptr;
    row_dots(memory_, n, s_.width, said.write_keys, writes, looked_up_, norms_);
    for (int64_t h = 0; h < writes; ++h) {
      content_softmax(looked_up_ + h * stride_, norms_, scales, n, square_sum(said.write_keys + h * s_.width, s_.width),
                      said.write_strengths[h], nullptr);
    }
    write_weights(said, batch, t);
    write_rows(memory_, memory_out_, n, s_.width, scales, write_, said.erase_vectors, said.write_vectors, writes);
    memory_ = memory_out_;

    row_dots(memory_, n, s_.width, said.read_keys, reads, found_, norms_);
    for (int64_t r = 0; r < reads; ++r) {
      content_softmax(found_ + r * stride_, norms_, static_cast<const T*>(nullptr), n,
                      square_sum(said.read_keys + r * s_.width, s_.width), said.read_strengths[r], nullptr);
    }
    mix(said);
    for (int64_t r = 0; r < reads; ++r) {
      if (said.sharpness != nullptr) {
        sharpen_slots(mixed_ + r * stride_, said.sharpness[r], n, read_ + r * stride_);
      } else {
        std::memcpy(read_ + r * stride_, mixed_ + r * stride_, static_cast<size_t>(stride_) * sizeof(T));
      }
    }
    weighted_rows(read_, reads, memory_, n, s_.width, reads_at(batch, t));
  }

  // Write weights of all heads, each of which sees the usage that the earlier ones leave.
  void write_weights(const Said<T>& said, int64_t batch, int64_t t) {
    constexpr int N = Vec<T>::N;
    const int64_t n = s_.slots, writes = s_.write_heads;
    if (s_.track_usage) std::memcpy(simulated_, usage_, static_cast<size_t>(stride_) * sizeof(T));
    for (int64_t h = 0; h < writes; ++h) {
      const T gate = said.write_gates[h], towards = said.allocation_gates[h];
      if (s_.track_usage) {
        allocate_slots(order_, simulated_, n, before_, free_);
        if (p_.saved.allocation != nullptr) {
          store_slots(free_, n, out(p_.saved.allocation) + ((t * s_.batch + batch) * writes + h) * n);
        }
      } else {
        for (int64_t i = 0; i < stride_; i += N) store(free_ + i, within(Vec<T>(T(1) / T(n)), n - i));
      }
      for (int64_t i = 0; i < stride_; i += N) {
        const Vec<T> a = load(free_ + i), c = load(looked_up_ + h * stride_ + i);
        store(write_ + h * stride_ + i, (a * towards + c * (T(1) - towards)) * gate);
        const Vec<T> u = load(simulated_ + i);
        store(simulated_ + i, fma(T(1) - u, a * (gate * towards), u));
      }
    }
  }

  void mix(const Said<T>& said) {
    constexpr int N = Vec<T>::N;
    const int64_t n = s_.slots, reads = s_.read_heads, writes = s_.write_heads, modes = 1 + 2 * writes;
    for (int64_t r = 0; r < reads; ++r) {
      const T share = said.read_modes[r * modes + writes];
      const T factor = s_.track_links ? share : (share == T(0) ? T(0) : T(1));
      for (int64_t i = 0; i < stride_; i += N) {
        const Vec<T> c = load(found_ + r * stride_ + i);
        store(mixed_ + r * stride_ + i, factor == T(0) && !s_.track_links ? Vec<T>(T(0)) : c * factor);
      }
    }
    if (!s_.track_links) return;
    for (int64_t h = 0; h < writes; ++h) {
      std::memset(back_, 0, static_cast<size_t>(reads * stride_) * sizeof(T));
      LinkPass<T> pass{n,
                       links_ + h * n * n,
                       links_out_ + h * n * n,
                       write_ + h * stride_,
                       precedence_ + h * stride_,
                       read_,
                       ahead_,
                       back_,
                       stream_};
      links_forward_reads(pass, reads);
      for (int64_t r = 0; r < reads; ++r) {
        const T backward = said.read_modes[r * modes + h], forward = said.read_modes[r * modes + writes + 1 + h];
        for (int64_t i = 0; i < stride_; i += N) {
          const int64_t at = r * stride_ + i;
          const Vec<T> w = fma(load(back_ + at), Vec<T>(backward), load(mixed_ + at));
          store(mixed_ + at, fma(load(ahead_ + at), Vec<T>(forward), w));
        }
      }
      follow(precedence_ + h * stride_, write_ + h * stride_, n, precedence_ + h * stride_);
    }
    links_ = links_out_;
  }

  // What backward reads of this step.
  void keep(int64_t batch, int64_t t) const {
    const MemorySaved<void*>& saved = p_.saved;
    const int64_t n = s_.slots, reads = s_.read_heads, writes = s_.write_heads, at = t * s_.batch + batch;
    auto put = [&](const T* from, int64_t count, void* to) {
      if (to != nullptr) store_rows(from, count, out(to) + at * count * n);
    };
    put(looked_up_, writes, saved.write_content);
    put(found_, reads, saved.read_content);
    put(mixed_, reads, saved.mixed);
    put(usage_, 1, saved.usage);
    put(read_, reads, saved.read_weights);
    put(write_, writes, saved.write_weights);
  }

  void snapshot(int64_t batch, int64_t index) const {
    const int64_t n = s_.slots, writes = s_.write_heads, at = index * s_.batch + batch;
    std::memcpy(out(p_.saved.memory) + at * memory_size_, memory_, static_cast<size_t>(memory_size_) * sizeof(T));
    if (!s_.track_links) return;
    std::memcpy(out(p_.saved.links) + at * links_size_, links_, static_cast<size_t>(links_size_) * sizeof(T));
    store_rows(precedence_, writes, out(p_.saved.precedence) + at * writes * n);
  }

  void finish(int64_t batch) const {
    const int64_t n = s_.slots, reads = s_.read_heads, writes = s_.write_heads;
    if (memory_ != memory_out_) std::memcpy(memory_out_, memory_, static_cast<size_t>(memory_size_) * sizeof(T));
    if (s_.track_links) {
      if (links_ != links_out_) std::memcpy(links_out_, links_, static_cast<size_t>(links_size_) * sizeof(T));
      store_rows(precedence_, writes, out(p_.result.precedence) + batch * writes * n);
    }
    if (s_.track_usage) store_slots(usage_, n, out(p_.result.usage) + batch * n);
    store_rows(read_, reads, out(p_.result.read_weights) + batch * reads * n);
    store_rows(write_, writes, out(p_.result.write_weights) + batch * writes * n);
  }

  const MemoryForward& p_;
  const MemorySizes& s_;
  const int64_t stride_;
  Scratch<T> scratch_;
  Order<T> order_;
  T *usage_, *retention_, *norms_, *simulated_, *free_, *before_, *precedence_, *write_, *looked_up_, *read_, *found_,
      *ahead_, *back_, *mixed_;
  int64_t memory_size_ = 0, links_size_ = 0;
  const T *memory_ = nullptr, *links_ = nullptr;
  T *memory_out_ = nullptr, *links_out_ = nullptr;
  bool stream_ = false;
};

template <class T>
void forward_rows(const MemoryForward& p, ParallelFor threads) {
  parallel(threads, p.sizes.batch, 1, [&](int64_t begin, int64_t end) {
    Walk<T> walk(p);
    for (int64_t b = begin; b < end; ++b) walk.row(b);
  });
}

}  // namespace

void memory_forward(const MemoryForward& p, ParallelFor threads) {
  MK_MEMORY_DISPATCH(p.sizes.dtype, T, forward_rows<T>(p, threads))
}

}  // namespace memkern::cpu::MK_NS
