// Backward of memory_step and memory_scan. Each row of the batch walks back segment by segment: from the snapshot before a
// segment its links, memories and precedences are written again (the write weights are known, so no lookup is repeated),
// then its steps are taken backwards. Only one segment's matrices exist at a time, per thread.
#include "cpu/isa.h"
#include "common/vec.h"
#include "cpu/memory/step.h"
#include "cpu/memory/write_backward.h"
#include "cpu/memory/kernels.h"

namespace memkern::cpu::MK_NS {

namespace {

// Where the gradients of the interface of one row of the batch at one step go.
template <class T>
struct SaidGradient {
  SaidGradient(const MemoryBackward& p, int64_t batch, int64_t step) {
    const MemorySizes& s = p.sizes;
    const InterfaceFields<void*>& f = p.d_interface;
    const int64_t at = batch * s.steps + step, reads = s.read_heads, writes = s.write_heads;
    auto field = [&](void* base, int64_t count) { return static_cast<T*>(base) + at * count; };
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
    sharpness = p.d_sharpness == nullptr ? nullptr : field(p.d_sharpness, reads);
  }

  void clear(const MemorySizes& s) const {
    const int64_t reads = s.read_heads, writes = s.write_heads;
    auto zero = [](T* x, int64_t count) { std::memset(x, 0, static_cast<size_t>(count) * sizeof(T)); };
    for (T* x : {read_strengths, free_gates}) zero(x, reads);
    for (T* x : {write_strengths, allocation_gates, write_gates}) zero(x, writes);
    for (T* x : {write_keys, write_vectors, erase_vectors}) zero(x, writes * s.width);
    zero(read_keys, reads * s.width);
    zero(read_modes, reads * (1 + 2 * writes));
    if (sharpness != nullptr) zero(sharpness, reads);
  }

  T *read_keys, *read_strengths, *read_modes, *write_keys, *write_strengths, *write_vectors, *erase_vectors,
      *free_gates, *allocation_gates, *write_gates, *sharpness;
};

template <class T>
class WalkBack {
 public:
  explicit WalkBack(const MemoryBackward& p)
      : p_(p),
        s_(p.sizes),
        stride_(padded<T>(p.sizes.slots)),
        every_(std::min(p.sizes.every, p.sizes.steps)),
        memory_size_(p.sizes.slots * p.sizes.width),
        links_size_(p.sizes.write_heads * p.sizes.slots * p.sizes.slots),
        scratch_(scratch_size()),
        order_(p.sizes.slots),
        memory_at_(static_cast<size_t>(every_ + 1)),
        links_at_(static_cast<size_t>(every_ + 1)) {
    Pieces<T> pieces(scratch_.get());
    const int64_t reads = s_.read_heads, writes = s_.write_heads;
    auto slots = [&](int64_t count) { return pieces.zeros(count * stride_); };
    retention_ = slots(1), d_retention_ = slots(1), norms_ = slots(1), own_ = slots(1), before_ = slots(1);
    old_usage_ = slots(1), new_usage_ = slots(1), d_usage_ = slots(1), d_free_ = slots(1), row_ = slots(1);
    column_ = slots(1);
    old_read_ = slots(reads), new_read_ = slots(reads), found_ = slots(reads), mixed_ = slots(reads);
    d_read_ = slots(reads), d_old_read_ = slots(reads), read_dots_ = slots(reads), grad_ahead_ = slots(reads);
    grad_back_ = slots(reads), ahead_ = slots(reads), back_ = slots(reads), outer_weights_ = slots(2 * reads);
    old_write_ = slots(writes), new_write_ = slots(writes), looked_up_ = slots(writes), free_ = slots(writes);
    simulated_ = slots(writes), d_write_ = slots(writes), d_old_write_ = slots(writes), d_lookup_ = slots(writes);
    write_dots_ = slots(writes), d_precedence_ = slots(writes), scaled_ = slots(writes);
    precedences_ = slots((every_ + 1) * writes);
    outer_vectors_ = pieces.take(2 * reads * s_.width);
    memories_ = pieces.take(every_ * memory_size_);
    links_ = pieces.take(s_.track_links ? (every_ - 1) * links_size_ : 0);
  }

  void row(int64_t batch) {
    const int64_t n = s_.slots, reads = s_.read_heads, writes = s_.write_heads;
    rows_or_zero(p_.grads.usage, batch, 1, d_usage_);
    rows_or_zero(p_.grads.precedence, batch, writes, d_precedence_);
    rows_or_zero(p_.grads.read_weights, batch, reads, d_read_);
    rows_or_zero(p_.grads.write_weights, batch, writes, d_write_);
    d_memory_ = out(p_.d_state.memory) + batch * memory_size_;
    copy_or_zero(p_.grads.memory, batch, memory_size_, d_memory_);
    d_links_ = s_.track_links ? out(p_.d_state.links) + batch * links_size_ : nullptr;
    grad_links_ = p_.grads.links == nullptr ? nullptr : in(p_.grads.links) + batch * links_size_;
    for (int64_t begin = (s_.steps - 1) / every_ * every_; begin >= 0; begin -= every_) {
      const int64_t end = std::min(begin + every_, s_.steps);
      replay(batch, begin, end);
      for (int64_t t = end - 1; t >= begin; --t) {
        const SaidGradient<T> gradient(p_, batch, t);
        if (masked(batch, t)) {
          gradient.clear(s_);
        } else {
          step(batch, t, t - begin, gradient);
        }
      }
    }
    if (s_.track_links) {
      if (grad_links_ != d_links_) copy_or_zero(p_.grads.links, batch, links_size_, d_links_);
      store_rows(d_precedence_, writes, out(p_.d_state.precedence) + batch * writes * n);
    }
    if (s_.track_usage) store_rows(d_usage_, 1, out(p_.d_state.usage) + batch * n);
    store_rows(d_read_, reads, out(p_.d_state.read_weights) + batch * reads * n);
    store_rows(d_write_, writes, out(p_.d_state.write_weights) + batch * writes * n);
  }

 private:
  const T* in(const void* x) const { return static_cast<const T*>(x); }
  T* out(void* x) const { return static_cast<T*>(x); }
  bool masked(int64_t batch, int64_t t) const {
    return p_.step_mask != nullptr && !p_.step_mask[batch * s_.steps + t];
  }

  int64_t scratch_size() const {
    const int64_t reads = s_.read_heads, writes = s_.write_heads;
    const int64_t vectors = 11 + 13 * reads + 11 * writes + (every_ + 1) * writes;
    return vectors * Pieces<T>::size(stride_) + Pieces<T>::size(2 * reads * s_.width) + 64 * 16 +
           Pieces<T>::size(every_ * memory_size_) + (s_.track_links ? (every_ - 1) * links_size_ : 0);
  }

  void load_rows(const T* from, int64_t count, T* to) const {
    for (int64_t c = 0; c < count; ++c) load_slots(from + c * s_.slots, s_.slots, to + c * stride_);
  }
  void store_rows(const T* from, int64_t count, T* to) const {
    for (int64_t c = 0; c < count; ++c) store_slots(from + c * stride_, s_.slots, to + c * s_.slots);
  }
  void rows_or_zero(const void* from, int64_t batch, int64_t count, T* to) const {
    if (from != nullptr) {
      load_rows(in(from) + batch * count * s_.slots, count, to);
    } else {
      zero(to, count * stride_);
    }
  }
  void copy_or_zero(const void* from, int64_t batch, int64_t size, T* to) const {
    if (from != nullptr) {
      std::memcpy(to, in(from) + batch * size, static_cast<size_t>(size) * sizeof(T));
    } else {
      zero(to, size);
    }
  }
  static void zero(T* x, int64_t count) { std::memset(x, 0, static_cast<size_t>(count) * sizeof(T)); }

  // Rows of a history after step t, or of the first state for t = -1.
  void state_rows(const void* history, const void* first, int64_t batch, int64_t t, int64_t count, T* to) const {
    const T* from = t < 0 ? in(first) + batch * count * s_.slots
                          : in(history) + (t * s_.batch + batch) * count * s_.slots;
    load_rows(from, count, to);
  }
  void saved_rows(const void* saved, int64_t batch, int64_t t, int64_t count, T* to) const {
    load_rows(in(saved) + (t * s_.batch + batch) * count * s_.slots, count, to);
  }

  void retention(const Said<T>& said) {
    for (int64_t i = 0; i < stride_; i += Vec<T>::N) {
      store(retention_ + i, retention_at(old_read_, said.free_gates, s_.read_heads, stride_, i));
    }
  }

  // memory_at_[k], links_at_[k] and precedences_[k]: the state before step begin + k.
  void replay(int64_t batch, int64_t begin, int64_t end) {
    const int64_t n = s_.slots, writes = s_.write_heads, segment = begin / every_;
    if (segment == 0) {
      memory_at_[0] = in(p_.state.memory) + batch * memory_size_;
    } else {
      memory_at_[0] = in(p_.saved.memory) + ((segment - 1) * s_.batch + batch) * memory_size_;
    }
    if (s_.track_links) {
      if (segment == 0) {
        links_at_[0] = in(p_.state.links) + batch * links_size_;
        load_rows(in(p_.state.precedence) + batch * writes * n, writes, precedences_);
      } else {
        const int64_t at = (segment - 1) * s_.batch + batch;
        links_at_[0] = in(p_.saved.links) + at * links_size_;
        load_rows(in(p_.saved.precedence) + at * writes * n, writes, precedences_);
      }
    }
    for (int64_t t = begin; t < end; ++t) {
      const auto k = static_cast<size_t>(t - begin);
      T* precedence = precedences_ + (t - begin) * writes * stride_;
      if (masked(batch, t)) {
        memory_at_[k + 1] = memory_at_[k];
        links_at_[k + 1] = links_at_[k];
        std::memcpy(precedence + writes * stride_, precedence, static_cast<size_t>(writes * stride_) * sizeof(T));
        continue;
      }
      saved_rows(p_.saved.write_weights, batch, t, writes, new_write_);
      if (p_.final_memory != nullptr && t + 1 == s_.steps) {
        memory_at_[k + 1] = in(p_.final_memory) + batch * memory_size_;
      } else {
        const Said<T> said(s_, p_.interface, p_.sharpness, batch, t);
        if (s_.deallocate) {
          state_rows(p_.saved.read_weights, p_.state.read_weights, batch, t - 1, s_.read_heads, old_read_);
          retention(said);
        }
        T* to = memories_ + (t - begin) * memory_size_;
        write_rows(memory_at_[k], to, n, s_.width, s_.deallocate ? retention_ : nullptr, new_write_,
                   said.erase_vectors, said.write_vectors, writes);
        memory_at_[k + 1] = to;
      }
      if (!s_.track_links) continue;
      for (int64_t h = 0; h < writes; ++h) {
        const T *write = new_write_ + h * stride_, *old = precedence + h * stride_;
        follow(old, write, n, precedence + (writes + h) * stride_);
        if (t + 1 < end) {
          links_update(links_at_[k] + h * n * n, links_ + (t - begin) * links_size_ + h * n * n, write, old, n);
        }
      }
      links_at_[k + 1] = links_ + (t - begin) * links_size_;
    }
  }

  void step(int64_t batch, int64_t t, int64_t place, const SaidGradient<T>& d) {
    const Said<T> said(s_, p_.interface, p_.sharpness, batch, t);
    const int64_t reads = s_.read_heads, writes = s_.write_heads;
    state_rows(p_.saved.read_weights, p_.state.read_weights, batch, t - 1, reads, old_read_);
    state_rows(p_.saved.write_weights, p_.state.write_weights, batch, t - 1, writes, old_write_);
    saved_rows(p_.saved.read_weights, batch, t, reads, new_read_);
    saved_rows(p_.saved.write_weights, batch, t, writes, new_write_);
    saved_rows(p_.saved.read_content, batch, t, reads, found_);
    saved_rows(p_.saved.write_content, batch, t, writes, looked_up_);
    if (said.sharpness != nullptr) saved_rows(p_.saved.mixed, batch, t, reads, mixed_);
    if (s_.track_usage) {
      state_rows(p_.saved.usage, p_.state.usage, batch, t - 1, 1, old_usage_);
      saved_rows(p_.saved.usage, batch, t, 1, new_usage_);
      saved_rows(p_.saved.allocation, batch, t, writes, free_);
    }
    retention(said);
    zero(d_old_read_, reads * stride_);
    zero(d_old_write_, writes * stride_);
    zero(d_retention_, stride_);
    const T* d_reads = p_.grad_reads == nullptr ? nullptr : in(p_.grad_reads) + (batch * s_.steps + t) * reads * s_.width;
    read(said, d, memory_at_[static_cast<size_t>(place + 1)], d_reads, place);
    write(said, d, memory_at_[static_cast<size_t>(place)]);
    if (s_.track_usage) {
      usage_backward_slots(d_usage_, old_usage_, old_write_, writes, retention_, s_.slots, d_retention_,
                           s_.detach_usage ? nullptr : d_old_write_);
    }
    if (s_.deallocate) deallocate(memory_at_[static_cast<size_t>(place)]);
    retention_backward(d_retention_, old_read_, said.free_gates, reads, s_.slots, d_old_read_, d.free_gates);
    std::swap(d_read_, d_old_read_);
    std::swap(d_write_, d_old_write_);
  }

  // From the gradients of reads and read weights to those of the new memory, links, precedence and write weights.
  void read(const Said<T>& said, const SaidGradient<T>& d, const T* memory, const T* d_reads, int64_t place) {
    constexpr int N = Vec<T>::N;
    const int64_t n = s_.slots, reads = s_.read_heads, writes = s_.write_heads, width = s_.width;
    const int64_t modes = 1 + 2 * writes;
    T *content = outer_weights_, *direct = outer_weights_ + reads * stride_;
    row_dots(memory, n, width, said.read_keys, reads, read_dots_, norms_);
    if (d_reads != nullptr) {
      row_dots(memory, n, width, d_reads, reads, direct, static_cast<T*>(nullptr));
      for (int64_t i = 0; i < reads * stride_; i += N) store(d_read_ + i, load(d_read_ + i) + load(direct + i));
      std::memcpy(direct, new_read_, static_cast<size_t>(reads * stride_) * sizeof(T));
      std::memcpy(outer_vectors_ + reads * width, d_reads, static_cast<size_t>(reads * width) * sizeof(T));
    }
    if (said.sharpness != nullptr) {
      for (int64_t r = 0; r < reads; ++r) {
        const int64_t at = r * stride_;
        d.sharpness[r] = sharpen_backward_slots(d_read_ + at, mixed_ + at, new_read_ + at, said.sharpness[r], n);
      }
    }
    for (int64_t r = 0; r < reads; ++r) {
      const T share = said.read_modes[r * modes + writes];
      const T factor = s_.track_links ? share : (share == T(0) ? T(0) : T(1));
      for (int64_t i = r * stride_; i < (r + 1) * stride_; i += N) store(content + i, load(d_read_ + i) * factor);
      for (int64_t m = 0; m < modes; ++m) d.read_modes[r * modes + m] = T(0);
      if (s_.track_links) {
        d.read_modes[r * modes + writes] = dot(d_read_ + r * stride_, found_ + r * stride_, stride_);
      }
    }
    if (s_.track_links) {
      for (int64_t h = 0; h < writes; ++h) links(said, d, h, place);
      grad_links_ = d_links_;
    }
    zero(own_, stride_);
    for (int64_t r = 0; r < reads; ++r) {
      d.read_strengths[r] =
          content_backward(content + r * stride_, found_ + r * stride_, read_dots_ + r * stride_, norms_, n,
                           square_sum(said.read_keys + r * width, width), said.read_strengths[r], own_);
    }
    weighted_rows(content, reads, memory, n, width, d.read_keys);
    for (int64_t r = 0; r < reads; ++r) {
      const T* key = said.read_keys + r * width;
      project_key(d.read_keys + r * width, key, width, square_sum(key, width));
    }
    std::memcpy(outer_vectors_, said.read_keys, static_cast<size_t>(reads * width) * sizeof(T));
    add_outer(d_memory_, n, width, outer_weights_, outer_vectors_, d_reads == nullptr ? reads : 2 * reads, own_, memory);
  }

  void links(const Said<T>& said, const SaidGradient<T>& d, int64_t head, int64_t place) {
    constexpr int N = Vec<T>::N;
    const int64_t n = s_.slots, reads = s_.read_heads, writes = s_.write_heads, modes = 1 + 2 * writes;
    const T* precedence = precedences_ + (place * writes + head) * stride_;
    for (int64_t r = 0; r < reads; ++r) {
      const T backward = said.read_modes[r * modes + head], forward = said.read_modes[r * modes + writes + 1 + head];
      for (int64_t i = r * stride_; i < (r + 1) * stride_; i += N) {
        store(grad_ahead_ + i, load(d_read_ + i) * forward);
        store(grad_back_ + i, load(d_read_ + i) * backward);
      }
    }
    zero(back_, reads * stride_);
    zero(column_, stride_);
    T *write = new_write_ + head * stride_, *d_write = d_write_ + head * stride_;
    T* d_precedence = d_precedence_ + head * stride_;
    follow_backward(precedence, write, n, d_precedence, d_write);
    LinkBackward<T> pass{};
    pass.n = n;
    pass.links = links_at_[static_cast<size_t>(place)] + head * n * n;
    pass.grad = grad_links_ == nullptr ? nullptr : grad_links_ + head * n * n;
    pass.d_links = d_links_ + head * n * n;
    pass.write = write;
    pass.precedence = precedence;
    pass.reads = old_read_;
    pass.d_reads = d_read_;
    pass.grad_ahead = grad_ahead_;
    pass.grad_back = grad_back_;
    pass.ahead = ahead_;
    pass.back = back_;
    pass.row = row_;
    pass.column = column_;
    pass.d_precedence = d_precedence;
    pass.stream = s_.steps == 1 && streams(d_links_, n, s_.batch * links_size_);
    links_backward_reads(pass, reads);
    for (int64_t i = 0; i < stride_; i += N) {
      store(d_write + i, load(d_write + i) + load(row_ + i) + load(column_ + i));
    }
    for (int64_t r = 0; r < reads; ++r) {
      const T backward = said.read_modes[r * modes + head], forward = said.read_modes[r * modes + writes + 1 + head];
      d.read_modes[r * modes + head] = dot(old_read_ + r * stride_, ahead_ + r * stride_, stride_);
      d.read_modes[r * modes + writes + 1 + head] = dot(old_read_ + r * stride_, back_ + r * stride_, stride_);
      for (int64_t i = r * stride_; i < (r + 1) * stride_; i += N) {
        const Vec<T> grown = fma(load(back_ + i), Vec<T>(forward), load(d_old_read_ + i));
        store(d_old_read_ + i, fma(load(ahead_ + i), Vec<T>(backward), grown));
      }
    }
  }

  // From the gradients of the new memory and the write weights to those of the memory as the lookup saw it, of usage and of
  // the write's part of the interface.
  void write(const Said<T>& said, const SaidGradient<T>& d, const T* memory) {
    constexpr int N = Vec<T>::N;
    const int64_t n = s_.slots, writes = s_.write_heads, width = s_.width;
    const T* scales = s_.deallocate ? retention_ : nullptr;
    write_rows_backward(d_memory_, memory, n, width, scales, new_write_, said.erase_vectors, said.write_vectors, writes,
                        d_write_, d.erase_vectors, d.write_vectors);
    if (s_.track_usage) {
      // The usage that each head saw.
      std::memcpy(simulated_, new_usage_, static_cast<size_t>(stride_) * sizeof(T));
      for (int64_t h = 0; h + 1 < writes; ++h) {
        const T product = said.write_gates[h] * said.allocation_gates[h];
        for (int64_t i = h * stride_; i < (h + 1) * stride_; i += N) {
          const Vec<T> u = load(simulated_ + i);
          store(simulated_ + stride_ + i, fma(T(1) - u, load(free_ + i) * product, u));
        }
      }
    }
    zero(d_free_, stride_);
    for (int64_t h = writes - 1; h >= 0; --h) head_backward(said, d, h);
    if (s_.track_usage) {
      for (int64_t i = 0; i < stride_; i += N) store(d_usage_ + i, load(d_usage_ + i) + load(d_free_ + i));
    }
    lookup(said, d, memory, scales);
  }

  void head_backward(const Said<T>& said, const SaidGradient<T>& d, int64_t h) {
    constexpr int N = Vec<T>::N;
    const int64_t n = s_.slots;
    const T gate = said.write_gates[h], towards = said.allocation_gates[h];
    const bool simulates = s_.track_usage && h + 1 < s_.write_heads;
    const T* grad = d_write_ + h * stride_;
    const T* seen = simulated_ + h * stride_;
    T* d_seen = d_free_;  // gradient of the next head's usage, then of this head's
    Vec<T> d_gate(T(0)), d_towards(T(0)), d_product(T(0));
    for (int64_t i = 0; i < stride_; i += N) {
      const Vec<T> a = s_.track_usage ? load(free_ + h * stride_ + i) : within(Vec<T>(T(1) / T(n)), n - i);
      const Vec<T> c = load(looked_up_ + h * stride_ + i), g = load(grad + i);
      d_gate = fma(g, a * towards + c * (T(1) - towards), d_gate);
      d_towards = fma(g, a - c, d_towards);
      store(d_lookup_ + h * stride_ + i, g * (gate * (T(1) - towards)));
      Vec<T> d_allocated = g * (gate * towards);
      if (simulates) {
        const Vec<T> next = load(d_seen + i), u = load(seen + i);
        d_product = fma(next * (T(1) - u), a, d_product);
        d_allocated = fma(next * (T(1) - u), Vec<T>(gate * towards), d_allocated);
        store(d_seen + i, next * (T(1) - a * (gate * towards)));
      }
      store(row_ + i, d_allocated);
    }
    const T product = reduce_sum(d_product);
    d.write_gates[h] = reduce_sum(d_gate) + product * towards;
    d.allocation_gates[h] = (reduce_sum(d_towards) + product) * gate;
    if (s_.track_usage) {
      order_.fill(seen, before_);
      allocate_backward(order_, seen, before_, row_, n, d_seen);
    }
  }

  void lookup(const Said<T>& said, const SaidGradient<T>& d, const T* memory, const T* scales) {
    constexpr int N = Vec<T>::N;
    const int64_t n = s_.slots, writes = s_.write_heads, width = s_.width;
    row_dots(memory, n, width, said.write_keys, writes, write_dots_, norms_);
    if (scales != nullptr) {
      for (int64_t i = 0; i < stride_; i += N) {
        const Vec<T> scale = load(scales + i);
        store(norms_ + i, load(norms_ + i) * scale * scale);
        for (int64_t h = 0; h < writes; ++h) {
          store(write_dots_ + h * stride_ + i, load(write_dots_ + h * stride_ + i) * scale);
        }
      }
    }
    zero(own_, stride_);
    for (int64_t h = 0; h < writes; ++h) {
      d.write_strengths[h] =
          content_backward(d_lookup_ + h * stride_, looked_up_ + h * stride_, write_dots_ + h * stride_, norms_, n,
                           square_sum(said.write_keys + h * width, width), said.write_strengths[h], own_);
    }
    const T* along = d_lookup_;
    if (scales != nullptr) {
      // The lookup saw rows times their scale: so does the key's gradient, and the part of the rows' own along themselves.
      for (int64_t i = 0; i < stride_; i += N) {
        const Vec<T> scale = load(scales + i);
        store(own_ + i, load(own_ + i) * scale);
        for (int64_t h = 0; h < writes; ++h) {
          store(scaled_ + h * stride_ + i, load(d_lookup_ + h * stride_ + i) * scale);
        }
      }
      along = scaled_;
    }
    weighted_rows(along, writes, memory, n, width, d.write_keys);
    for (int64_t h = 0; h < writes; ++h) {
      const T* key = said.write_keys + h * width;
      project_key(d.write_keys + h * width, key, width, square_sum(key, width));
    }
    add_outer(d_memory_, n, width, d_lookup_, said.write_keys, writes, own_, memory);
  }

  // d_memory_ from that of the scaled rows to that of the rows, and its share of the retention's gradient.
  void deallocate(const T* memory) {
    const int64_t width = s_.width;
    for (int64_t i = 0; i < s_.slots; ++i) {
      Vec<T> along(T(0));
      for_each_vec<T>(width, [&](int64_t k, auto part) {
        const Vec<T> grad = load_part(d_memory_ + i * width + k, part);
        along = fma(grad, load_part(memory + i * width + k, part), along);
        store_part(d_memory_ + i * width + k, grad * retention_[i], part);
      });
      d_retention_[i] += reduce_sum(along);
    }
  }

  const MemoryBackward& p_;
  const MemorySizes& s_;
  const int64_t stride_, every_, memory_size_, links_size_;
  Scratch<T> scratch_;
  Order<T> order_;
  std::vector<const T*> memory_at_, links_at_;
  T *retention_, *d_retention_, *norms_, *own_, *before_, *old_usage_, *new_usage_, *d_usage_, *d_free_, *row_, *column_;
  T *old_read_, *new_read_, *found_, *mixed_, *d_read_, *d_old_read_, *read_dots_, *grad_ahead_, *grad_back_, *ahead_,
      *back_, *outer_weights_;
  T *old_write_, *new_write_, *looked_up_, *free_, *simulated_, *d_write_, *d_old_write_, *d_lookup_, *write_dots_,
      *d_precedence_, *scaled_, *precedences_;
  T *outer_vectors_, *memories_, *links_;
  T *d_memory_ = nullptr, *d_links_ = nullptr;
  const T* grad_links_ = nullptr;
};

template <class T>
void backward_rows(const MemoryBackward& p, ParallelFor threads) {
  parallel(threads, p.sizes.batch, 1, [&](int64_t begin, int64_t end) {
    WalkBack<T> walk(p);
    for (int64_t b = begin; b < end; ++b) walk.row(b);
  });
}

}  // namespace

void memory_backward(const MemoryBackward& p, ParallelFor threads) {
  MK_MEMORY_DISPATCH(p.sizes.dtype, T, backward_rows<T>(p, threads))
}

}  // namespace memkern::cpu::MK_NS
