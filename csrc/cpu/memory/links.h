// The one pass over the link matrix: update, forward and backward reads together; and its backward, also one pass. The
// loops are in links.cpp, compiled once for float and once for double.
#pragma once

#include "cpu/memory/rows.h"

namespace memkern::cpu::MK_NS {

template <class T>
struct LinkPass {
  int64_t n;
  const T* from;        // (N, N)
  T* to;                // (N, N), may be `from`; null to read without an update
  const T* write;       // this head's write weights
  const T* precedence;  // before the step
  const T* reads;       // read weights, one row per read head, stride padded(n)
  T* ahead;             // L w, set
  T* back;              // L^T w, grows
  bool stream;          // write `to` past the caches; see streams()
};

// Whether a result of `total` elements, which nothing reads again soon, goes past the caches: it would fetch each line only to
// overwrite it, and drive out what is still needed.
template <class T>
MK_INLINE bool streams(const T* to, int64_t n, int64_t total) {
  constexpr int64_t kLarge = 4 << 20, kLine = 64;
  return std::is_same_v<T, float> && total * int64_t(sizeof(T)) >= kLarge && n % (kLine / int64_t(sizeof(T))) == 0 &&
         reinterpret_cast<std::uintptr_t>(to) % kLine == 0;
}

// Updates the links from `from` to `to`, and reads them with `heads` read weights.
template <class T>
void links_forward_reads(LinkPass<T> p, int64_t heads);

// The update alone.
template <class T>
void links_update(const T* from, T* to, const T* write, const T* precedence, int64_t n);

template <class T>
struct LinkBackward {
  int64_t n;
  const T* links;       // (N, N) before the step
  const T* grad;        // (N, N) gradient of the links after the step, or null for zero
  T* d_links;           // (N, N), may be `grad`
  const T* write;
  const T* precedence;
  const T* reads;       // read weights r, one row per read head, stride padded(n)
  const T* d_reads;     // gradient g of the mixed read weights
  const T* grad_ahead;  // gradient of L r, one row per read head
  const T* grad_back;   // gradient of L^T r
  T* ahead;             // L g, set: the gradient through backward reads, up to their share
  T* back;              // L^T g, grows: the same through forward reads
  T* row;               // by row i: sum_j dL_ij (p_j - kept'_ij L_ij), set (with the last heads)
  T* column;            // by column j: - sum_i dL_ij kept'_ij L_ij, grows
  T* d_precedence;      // by column j: sum_i dL_ij w_i, grows
  bool stream;          // write d_links past the caches
};

// Gradients of the reads: dL_ij = grad_ij + sum_r ga_i r_j + r_i gb_j; then back through the update.
template <class T>
void links_backward_reads(LinkBackward<T> p, int64_t heads);

// precedence' = (1 - sum w) precedence + w, in place or not.
template <class T>
MK_INLINE void follow(const T* precedence, const T* write, int64_t n, T* to) {
  const int64_t size = padded<T>(n);
  const T total = sum_of(write, size);
  const T kept = total > T(1) ? T(0) : T(1) - total;
  for (int64_t i = 0; i < size; i += Vec<T>::N) store(to + i, fma(Vec<T>(kept), load(precedence + i), load(write + i)));
}

// d_write grows by the gradient of follow(), and d_precedence (of the new precedence) becomes that of the old.
template <class T>
MK_INLINE void follow_backward(const T* precedence, const T* write, int64_t n, T* d_precedence, T* d_write) {
  const int64_t size = padded<T>(n);
  const T total = sum_of(write, size);
  const T kept = total > T(1) ? T(0) : T(1) - total;
  const T d_total = total > T(1) ? T(0) : -dot(d_precedence, precedence, size);
  for (int64_t i = 0; i < size; i += Vec<T>::N) {
    const Vec<T> grad = load(d_precedence + i);
    store(d_write + i, within(load(d_write + i) + grad + d_total, n - i));
    store(d_precedence + i, grad * kept);
  }
}

}  // namespace memkern::cpu::MK_NS
