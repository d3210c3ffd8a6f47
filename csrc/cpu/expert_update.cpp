#include "ops/expert_update.h"

#include "cpu/isa.h"

#include "common/vec.h"

namespace memkern::cpu::MK_NS {

namespace {

// Elements of one part of a loop: fewer are not worth a thread.
constexpr int64_t kGrain = 1 << 14;

int64_t grain_of(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

template <class T>
const T* at(const void* data, int64_t offset) {
  return static_cast<const T*>(data) + offset;
}
template <class T>
T* at(void* data, int64_t offset) {
  return static_cast<T*>(data) + offset;
}

template <class T>
void copy_row(T* to, const T* from, int64_t width) {
  std::memcpy(to, from, size_t(width) * sizeof(T));
}
template <class T>
void zero_row(T* to, int64_t width) {
  std::memset(static_cast<void*>(to), 0, size_t(width) * sizeof(T));
}

// ---- gates and mixes ----

template <class T, class Z, class G>
void mix_forward_row(const MixForward& p, int64_t row, int64_t e) {
  using A = acc_t<T>;
  const int64_t b = p.batch0 + row / p.S, s = row % p.S, k = p.expert0 + e;
  const T* state = at<T>(p.states, b * p.states_batch + k * p.states_expert + s * p.states_slot);
  T* out = at<T>(p.out, ((b * p.K + k) * p.S + s) * p.D);
  const A prob = *at<A>(p.probs, b * p.K + k);
  const bool masked = p.row_mask && !p.row_mask[b], keep = masked || prob == A(0);
  if (keep) copy_row(out, state, p.D);
  if (keep && !p.gates) return;
  const Z* gate = at<Z>(p.gate, row * p.product_row + e * p.product_expert);
  const Z* update = at<Z>(p.update, row * p.product_row + e * p.product_expert);
  const int64_t more = row * p.more_row + e * p.more_expert;
  const Z* more_gate = p.more_gate ? at<Z>(p.more_gate, more) : nullptr;
  const Z* more_update = p.more_gate ? at<Z>(p.more_update, more) : nullptr;
  const A* gate_bias = p.gate_bias ? at<A>(p.gate_bias, k * p.D) : nullptr;
  const A* update_bias = p.update_bias ? at<A>(p.update_bias, k * p.D) : nullptr;
  const int64_t saved = (b * p.S + s) * p.K + k;
  G* gates = p.gates ? at<G>(p.gates, saved * p.D) : nullptr;
  G* updates = p.gates ? at<G>(p.updates, saved * p.D) : nullptr;
  for_each_vec<A>(p.D, [&](int64_t i, auto n) {
    Vec<A> x = load_part(gate + i, n), y = load_part(update + i, n);
    if (more_gate) {
      x += load_part(more_gate + i, n);
      y += load_part(more_update + i, n);
    }
    if (gate_bias) x += load_part(gate_bias + i, n);
    if (update_bias) y += load_part(update_bias + i, n);
    const Vec<A> g = sigmoid(x), u = tanh(y), m = load_part(state + i, n), a = prob * g;
    if (!keep) store_part(out + i, fma(a, u, (A(1) - a) * m), n);
    if (gates) {
      store_part(gates + i, g, n);
      store_part(updates + i, u, n);
    }
  });
}

template <class T, class Z, class G>
void mix_forward_as(const MixForward& p) {
  // Expert by expert within a row: what the product just wrote is read in its order.
  parallel(p.run, p.N * p.S, grain_of(p.E * p.D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t e = 0; e < p.E; ++e) mix_forward_row<T, Z, G>(p, row, e);
    }
  });
}

template <class T, class Z, class G>
void mix_backward_pair(const MixBackward& p, int64_t b, int64_t e) {
  using A = acc_t<T>;
  const int64_t k = p.expert0 + e;
  const bool masked = p.row_mask && !p.row_mask[b];
  const A prob = *at<A>(p.probs, b * p.K + k);
  double d_prob = 0;
  for (int64_t s = 0; s < p.S; ++s) {
    const int64_t saved = (b * p.S + s) * p.K + k;
    Z* d_gate = at<Z>(p.d_products, (b * p.S + s) * p.product_row + e * p.product_expert);
    Z* d_update = d_gate + p.product_half;
    if (masked) {
      zero_row(d_gate, p.D);
      zero_row(d_update, p.D);
      continue;
    }
    const T* grad = at<T>(p.grad, b * p.grad_batch + k * p.grad_expert + s * p.grad_slot);
    const T* state = at<T>(p.states, b * p.states_batch + k * p.states_expert + s * p.states_slot);
    const G* gates = at<G>(p.gates, saved * p.D);
    const G* updates = at<G>(p.updates, saved * p.D);
    Vec<A> sum = A(0);
    for_each_vec<A>(p.D, [&](int64_t i, auto n) {
      const Vec<A> dm = load_part(grad + i, n), g = load_part(gates + i, n), u = load_part(updates + i, n);
      // The tail's elements behind the row are zero in dm, and so add nothing.
      const Vec<A> dg = dm * (u - load_part(state + i, n));
      sum = fma(dg, g, sum);
      store_part(d_gate + i, prob * dg * (g * (A(1) - g)), n);
      store_part(d_update + i, prob * (dm * g) * (A(1) - u * u), n);
    });
    d_prob += reduce_sum(sum);
  }
  if (p.d_probs) *at<A>(p.d_probs, b * p.K + k) = A(d_prob);
}

// Column sums over all rows, in blocks of rows that do not depend on the threads.
template <class A, class Z>
void bias_gradients(const MixBackward& p) {
  constexpr int kVecs = 4, kRows = 32;
  constexpr int64_t kColumns = kVecs * Vec<A>::N;
  const int64_t rows = p.B * p.S, width = p.product_row, blocks = (p.D + kColumns - 1) / kColumns;
  parallel(p.run, p.E * 2 * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t pair = item / blocks, first = item % blocks * kColumns, e = pair / 2, half = pair % 2;
      A* out = at<A>(half ? p.d_update_bias : p.d_gate_bias, (p.expert0 + e) * p.D + first);
      const Z* column = at<Z>(p.d_products, e * p.product_expert + half * p.product_half + first);
      const int64_t count = std::min(kColumns, p.D - first);
      Vec<A> total[kVecs], sum[kVecs];
      for (auto& x : total) x = A(0);
      for (int64_t row0 = 0; row0 < rows; row0 += kRows) {
        for (auto& x : sum) x = A(0);
        for (int64_t row = row0; row < std::min(rows, row0 + kRows); ++row) {
          const Z* from = column + row * width;
          if (count == kColumns) {
            for (int v = 0; v < kVecs; ++v) sum[v] += load(from + v * Vec<A>::N);
          } else {
            for (int v = 0; v < kVecs && v * Vec<A>::N < count; ++v) {
              sum[v] += load_n(from + v * Vec<A>::N, std::min<int64_t>(Vec<A>::N, count - v * Vec<A>::N));
            }
          }
        }
        for (int v = 0; v < kVecs; ++v) total[v] += sum[v];
      }
      for (int v = 0; v < kVecs && v * Vec<A>::N < count; ++v) {
        store_n(out + v * Vec<A>::N, total[v], std::min<int64_t>(Vec<A>::N, count - v * Vec<A>::N));
      }
    }
  });
}

template <class T, class Z, class G>
void mix_backward_as(const MixBackward& p) {
  parallel(p.run, p.B * p.E, grain_of(p.S * p.D), [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) mix_backward_pair<T, Z, G>(p, pair / p.E, pair % p.E);
  });
  if (p.d_gate_bias) bias_gradients<acc_t<T>, Z>(p);
}

template <class T, class Z, class G>
void mix_states_as(const MixStates& p) {
  using A = acc_t<T>;
  parallel(p.run, p.B * p.S, grain_of(p.D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.S, s = row % p.S, k = p.expert;
      const T* grad = at<T>(p.grad, b * p.grad_batch + k * p.grad_expert + s * p.grad_slot);
      T* out = at<T>(p.d_states, ((b * p.K + k) * p.S + s) * p.D);
      if (p.row_mask && !p.row_mask[b]) {
        copy_row(out, grad, p.D);
        continue;
      }
      const A prob = *at<A>(p.probs, b * p.K + k);
      const G* gates = at<G>(p.gates, (row * p.K + k) * p.D);
      const Z* through = at<Z>(p.through, row * p.D);
      for_each_vec<A>(p.D, [&](int64_t i, auto n) {
        const Vec<A> own = load_part(grad + i, n) * (A(1) - prob * load_part(gates + i, n));
        store_part(out + i, own + load_part(through + i, n), n);
      });
    }
  });
}

// Runs the block with T the states' dtype, Z the products' and G that of the saved gates: T, or what T is computed in.
// Products in T come with gates in T.
#define MK_MIX_DISPATCH(p, call)                  \
  MK_DISPATCH(p.dtype, T, {                       \
    if (p.product_dtype == p.dtype) {             \
      call<T, T, T>(p);                           \
    } else if (p.gates_dtype == p.dtype) {        \
      call<T, acc_t<T>, T>(p);                    \
    } else {                                      \
      call<T, acc_t<T>, acc_t<T>>(p);             \
    }                                             \
  })

void mix_forward(const MixForward& p) { MK_MIX_DISPATCH(p, mix_forward_as) }
void mix_backward(const MixBackward& p) { MK_MIX_DISPATCH(p, mix_backward_as) }
void mix_states(const MixStates& p) { MK_MIX_DISPATCH(p, mix_states_as) }

// ---- the weighted sum of the experts ----

template <class T>
void aggregate_forward_as(const Aggregate& p) {
  using A = acc_t<T>;
  parallel(p.run, p.B * p.S, grain_of(p.K * p.D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.S, s = row % p.S;
      const T* states = at<T>(p.states, b * p.states_batch + s * p.states_slot);
      const A* probs = at<A>(p.probs, b * p.K);
      T* out = at<T>(p.out, row * p.D);
      for_each_vec<A>(p.D, [&](int64_t i, auto n) {
        Vec<A> sum = A(0);
        for (int64_t k = 0; k < p.K; ++k) sum = fma(Vec<A>(probs[k]), load_part(states + k * p.states_expert + i, n), sum);
        store_part(out + i, sum, n);
      });
    }
  });
}

template <class T>
void aggregate_backward_as(const Aggregate& p) {
  using A = acc_t<T>;
  parallel(p.run, p.B * p.K, grain_of(p.S * p.D), [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t b = pair / p.K, k = pair % p.K;
      const A prob = *at<A>(p.probs, pair);
      double d_prob = 0;
      for (int64_t s = 0; s < p.S; ++s) {
        const T* grad = at<T>(p.grad, b * p.grad_batch + s * p.grad_slot);
        const T* state = at<T>(p.states, b * p.states_batch + k * p.states_expert + s * p.states_slot);
        T* d_state = p.d_states ? at<T>(p.d_states, (pair * p.S + s) * p.D) : nullptr;
        Vec<A> sum = A(0);
        for_each_vec<A>(p.D, [&](int64_t i, auto n) {
          const Vec<A> x = load_part(grad + i, n);
          if (p.d_probs) sum = fma(x, load_part(state + i, n), sum);
          if (d_state) store_part(d_state + i, prob * x, n);
        });
        d_prob += reduce_sum(sum);
      }
      if (p.d_probs) *at<A>(p.d_probs, pair) = A(d_prob);
    }
  });
}

void aggregate_forward(const Aggregate& p) {
  MK_DISPATCH(p.dtype, T, { aggregate_forward_as<T>(p); })
}
void aggregate_backward(const Aggregate& p) {
  MK_DISPATCH(p.dtype, T, { aggregate_backward_as<T>(p); })
}

// ---- slots of a sequence ----

// The first slot with this id, or -1.
int64_t slot_of(const Slots& p, int64_t id) {
  for (int64_t s = 0; s < p.S; ++s) {
    if (p.slot_ids[s] == id) return s;
  }
  return -1;
}

int64_t count_of(const Slots& p, int64_t b, int64_t s) {
  const int64_t* ids = p.input_ids + b * p.N;
  int64_t count = 0;
  for (int64_t t = 0; t < p.N; ++t) count += ids[t] == p.slot_ids[s];
  return count;
}

// Sum of the sequence's rows with the slot's id, in their order, into `sum`; how many there are.
template <class T>
int64_t sum_rows(const Slots& p, int64_t b, int64_t s, acc_t<T>* sum) {
  using A = acc_t<T>;
  const int64_t* ids = p.input_ids + b * p.N;
  int64_t count = 0;
  zero_row(sum, p.D);
  for (int64_t t = 0; t < p.N; ++t) {
    if (ids[t] != p.slot_ids[s]) continue;
    ++count;
    const T* row = at<T>(p.sequence, b * p.sequence_batch + t * p.sequence_token);
    for_each_vec<A>(p.D, [&](int64_t i, auto n) {
      store_part(sum + i, load_part(sum + i, n) + load_part(row + i, n), n);
    });
  }
  return count;
}

template <class T>
void gather_forward_as(const Slots& p) {
  using A = acc_t<T>;
  parallel(p.run, p.B * p.S, grain_of(p.D + p.N), [&](int64_t begin, int64_t end) {
    Scratch<A, 1024> sum(p.D);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t count = sum_rows<T>(p, pair / p.S, pair % p.S, sum.get());
      const A divisor = A(std::max<int64_t>(1, count));
      T* out = at<T>(p.out_slots, pair * p.D);
      for_each_vec<A>(p.D, [&](int64_t i, auto n) { store_part(out + i, load_part(sum.get() + i, n) / divisor, n); });
    }
  });
}

template <class T>
void gather_backward_as(const Slots& p) {
  using A = acc_t<T>;
  Scratch<A, 256> counts(p.B * p.S);
  parallel(p.run, p.B * p.S, grain_of(p.N), [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) counts[pair] = A(count_of(p, pair / p.S, pair % p.S));
  });
  parallel(p.run, p.B * p.N, grain_of(p.D + p.S), [&](int64_t begin, int64_t end) {
    Scratch<A, 1024> sum(p.D);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.N, id = p.input_ids[row];
      T* out = at<T>(p.out_sequence, row * p.D);
      const int64_t first = slot_of(p, id);
      if (first < 0) {
        zero_row(out, p.D);
        continue;
      }
      zero_row(sum.get(), p.D);
      for (int64_t s = first; s < p.S; ++s) {
        if (p.slot_ids[s] != id) continue;
        const T* grad = at<T>(p.slots, b * p.slots_batch + s * p.slots_slot);
        const A count = counts[b * p.S + s];
        for_each_vec<A>(p.D, [&](int64_t i, auto n) {
          store_part(sum.get() + i, load_part(sum.get() + i, n) + load_part(grad + i, n) / count, n);
        });
      }
      for_each_vec<A>(p.D, [&](int64_t i, auto n) { store_part(out + i, load_part(sum.get() + i, n), n); });
    }
  });
}

template <class T>
void scatter_forward_as(const Slots& p) {
  parallel(p.run, p.B * p.N, grain_of(p.D + p.S), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.N, t = row % p.N, s = slot_of(p, p.input_ids[row]);
      const T* from = s < 0 ? at<T>(p.sequence, b * p.sequence_batch + t * p.sequence_token)
                            : at<T>(p.slots, b * p.slots_batch + s * p.slots_slot);
      copy_row(at<T>(p.out_sequence, row * p.D), from, p.D);
    }
  });
}

template <class T>
void scatter_backward_as(const Slots& p) {
  if (p.out_sequence) {
    parallel(p.run, p.B * p.N, grain_of(p.D + p.S), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* out = at<T>(p.out_sequence, row * p.D);
        if (slot_of(p, p.input_ids[row]) < 0) {
          copy_row(out, at<T>(p.sequence, row / p.N * p.sequence_batch + row % p.N * p.sequence_token), p.D);
        } else {
          zero_row(out, p.D);
        }
      }
    });
  }
  if (p.out_slots) {
    parallel(p.run, p.B * p.S, grain_of(p.D + p.N), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t s = pair % p.S;
        acc_t<T>* out = at<acc_t<T>>(p.out_slots, pair * p.D);
        if (slot_of(p, p.slot_ids[s]) == s) {
          sum_rows<T>(p, pair / p.S, s, out);
        } else {
          zero_row(out, p.D);
        }
      }
    });
  }
}

void gather_forward(const Slots& p) {
  MK_DISPATCH(p.dtype, T, { gather_forward_as<T>(p); })
}
void gather_backward(const Slots& p) {
  MK_DISPATCH(p.dtype, T, { gather_backward_as<T>(p); })
}
void scatter_forward(const Slots& p) {
  MK_DISPATCH(p.dtype, T, { scatter_forward_as<T>(p); })
}
void scatter_backward(const Slots& p) {
  MK_DISPATCH(p.dtype, T, { scatter_backward_as<T>(p); })
}

}  // namespace

extern const ExpertUpdateTable expert_update = {
    mix_forward,    mix_backward,    mix_states,      aggregate_forward, aggregate_backward,
    gather_forward, gather_backward, scatter_forward, scatter_backward,
};

}  // namespace memkern::cpu::MK_NS
