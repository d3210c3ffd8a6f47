// temperature_softmax, routing_entropy and load_balance_loss on rows of any size, and the column's table.
#include "cpu/isa.h"
#include "common/vec.h"
#include "cpu/routing/rows.h"
#include "cpu/routing/kernels.h"

namespace memkern::cpu::MK_NS {

namespace {

template <class Body>
void over_rows(int64_t rows, int64_t size, ParallelFor threads, const Body& body) {
  parallel(threads, rows, grain_of(8 * size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

template <class T>
void softmax_forward_rows(const RowSoftmax& p, ParallelFor threads) {
  using A = acc_t<T>;
  const A temperature = temperature_of<A>(p.temperature, p.temperature_value);
  parallel(threads, p.rows, grain_of(8 * p.size), [&](int64_t begin, int64_t end) {
    Scratch<A, 512> z(p.size), probs(p.size);
    for (int64_t row = begin; row < end; ++row) {
      load_row(static_cast<const T*>(p.logits) + row * p.size, z.get(), p.size);
      softmax_row(z.get(), probs.get(), p.size, A(p.clamp), temperature);
      store_row(static_cast<T*>(p.probs) + row * p.size, probs.get(), p.size);
    }
  });
}

template <class T>
void softmax_backward_rows(const RowSoftmax& p, ParallelFor threads) {
  using A = acc_t<T>;
  const A temperature = temperature_of<A>(p.temperature, p.temperature_value), limit = A(p.clamp);
  const int64_t chunk = chunk_rows(p.rows), chunks = chunk_count(p.rows);
  A shares[kChunks] = {};
  parallel(threads, chunks, grain_of(8 * chunk * p.size), [&](int64_t begin, int64_t end) {
    Scratch<A, 512> z(p.size), probs(p.size), g(p.size);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t row = c * chunk; row < std::min(p.rows, (c + 1) * chunk); ++row) {
        load_row(static_cast<const T*>(p.logits) + row * p.size, z.get(), p.size);
        load_row(static_cast<const T*>(p.grad) + row * p.size, g.get(), p.size);
        const A top = softmax_row(z.get(), probs.get(), p.size, limit, temperature);
        shares[c] += softmax_row_backward(probs.get(), z.get(), g.get(), p.size, limit, temperature, top);
        T* to = static_cast<T*>(p.d_logits) + row * p.size;
        const bool bounded = limit < std::numeric_limits<A>::infinity();
        for_each_vec<A>(p.size, [&](int64_t k, auto count) {
          Vec<A> dz = load_part(g.get() + k, count);
          if (bounded) dz = select(abs(load_part(z.get() + k, count)) <= limit, dz, Vec<A>(A(0)));
          store_part(to + k, dz, count);
        });
      }
    }
  });
  if (p.d_temperature == nullptr) return;
  A total = A(0);
  for (int64_t c = 0; c < chunks; ++c) total += shares[c];
  *static_cast<A*>(p.d_temperature) = total / -temperature;
}

template <class T>
void entropy_forward_rows(const RowEntropy& p, ParallelFor threads) {
  using A = acc_t<T>;
  parallel(threads, p.rows, grain_of(8 * p.size), [&](int64_t begin, int64_t end) {
    Scratch<A, 512> probs(p.size);
    for (int64_t row = begin; row < end; ++row) {
      load_row(static_cast<const T*>(p.probs) + row * p.size, probs.get(), p.size);
      static_cast<A*>(p.entropy)[row] = entropy_row(probs.get(), p.size);
    }
  });
}

template <class T>
void entropy_backward_rows(const RowEntropy& p, ParallelFor threads) {
  using A = acc_t<T>;
  over_rows(p.rows, p.size, threads, [&](int64_t row) {
    const T* probs = static_cast<const T*>(p.probs) + row * p.size;
    T* to = static_cast<T*>(p.d_probs) + row * p.size;
    const Vec<A> grad(static_cast<const A*>(p.grad)[row]);
    for_each_vec<A>(p.size, [&](int64_t k, auto count) {
      store_part(to + k, entropy_slope(load_part(probs + k, count)) * grad, count);
    });
  });
}

template <class T>
void balance_forward_rows(const BalanceLoss& p, ParallelFor threads) {
  using A = acc_t<T>;
  const int64_t chunk = chunk_rows(p.rows), chunks = chunk_count(p.rows), terms_size = 2 * p.size + 1;
  Scratch<A, 1024> terms(std::max<int64_t>(1, chunks) * terms_size);
  parallel(threads, chunks, grain_of(8 * chunk * p.size), [&](int64_t begin, int64_t end) {
    Scratch<A, 512> probs(p.size);
    for (int64_t c = begin; c < end; ++c) {
      A* own = terms.get() + c * terms_size;
      const LoadTerms<A> sums(own, own + p.size, own + 2 * p.size, p.size);
      for (int64_t row = c * chunk; row < std::min(p.rows, (c + 1) * chunk); ++row) {
        if (p.row_mask != nullptr && !p.row_mask[row]) continue;
        load_row(static_cast<const T*>(p.probs) + row * p.size, probs.get(), p.size);
        sums.add(probs.get(), p.size);
      }
    }
  });
  finish_loss(terms.get(), chunks, p.size, static_cast<A*>(p.loss), static_cast<A*>(p.loss_weights));
}

template <class T>
void balance_backward_rows(const BalanceLoss& p, ParallelFor threads) {
  using A = acc_t<T>;
  const Vec<A> grad(*static_cast<const A*>(p.grad));
  const A* weights = static_cast<const A*>(p.loss_weights);
  over_rows(p.rows, p.size, threads, [&](int64_t row) {
    T* to = static_cast<T*>(p.d_probs) + row * p.size;
    const bool counted = p.row_mask == nullptr || p.row_mask[row];
    for_each_vec<A>(p.size, [&](int64_t k, auto count) {
      store_part(to + k, counted ? load_part(weights + k, count) * grad : Vec<A>(A(0)), count);
    });
  });
}

}  // namespace

void softmax_forward(const RowSoftmax& p, ParallelFor threads) {
  MK_DISPATCH(p.dtype, T, softmax_forward_rows<T>(p, threads))
}
void softmax_backward(const RowSoftmax& p, ParallelFor threads) {
  MK_DISPATCH(p.dtype, T, softmax_backward_rows<T>(p, threads))
}
void entropy_forward(const RowEntropy& p, ParallelFor threads) {
  MK_DISPATCH(p.dtype, T, entropy_forward_rows<T>(p, threads))
}
void entropy_backward(const RowEntropy& p, ParallelFor threads) {
  MK_DISPATCH(p.dtype, T, entropy_backward_rows<T>(p, threads))
}
void balance_forward(const BalanceLoss& p, ParallelFor threads) {
  MK_DISPATCH(p.dtype, T, balance_forward_rows<T>(p, threads))
}
void balance_backward(const BalanceLoss& p, ParallelFor threads) {
  MK_DISPATCH(p.dtype, T, balance_backward_rows<T>(p, threads))
}

extern const RoutingTable routing = {route_forward,   route_backward,   softmax_forward, softmax_backward,
                                     entropy_forward, entropy_backward, balance_forward, balance_backward};

}  // namespace memkern::cpu::MK_NS
