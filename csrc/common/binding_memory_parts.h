// The parts of a memory step, for both bindings; common/binding_memory.h says what a Backend is.
#pragma once

#include <tuple>

#include "common/binding_memory.h"

namespace memkern::bind {

inline ContentWeights content_of(const Tensor& memory, const Tensor& keys, const Tensor& strengths,
                                 const OptTensor& mask) {
  ContentWeights p{};
  p.dtype = dtype_of(memory);
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = keys.size(1);
  p.memory = memory.data_ptr(), p.keys = keys.data_ptr(), p.strengths = strengths.data_ptr();
  p.slot_mask = ptr<uint8_t>(mask);
  return p;
}

template <class Backend>
Tensor content_weights_fwd(const Tensor& memory_, const Tensor& keys_, const Tensor& strengths_,
                           const OptTensor& mask_) {
  Backend backend(memory_);
  const Tensor memory = backend.take(memory_), keys = backend.take(keys_), strengths = backend.take(strengths_);
  const OptTensor mask = dense(mask_);
  ContentWeights p = content_of(memory, keys, strengths, mask);
  Tensor weights = empty(backend, {p.batch, p.heads, p.slots}, memory.scalar_type());
  p.weights = weights.data_ptr();
  backend.forward(p);
  return weights;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> content_weights_bwd(const Tensor& grad_, const Tensor& memory_, const Tensor& keys_,
                                                       const Tensor& strengths_, const OptTensor& mask_,
                                                       const Tensor& weights_) {
  Backend backend(grad_);
  const Tensor grad = backend.take(grad_), memory = backend.take(memory_), keys = backend.take(keys_);
  const Tensor strengths = backend.take(strengths_), weights = backend.take(weights_);
  const OptTensor mask = dense(mask_);
  ContentWeights p = content_of(memory, keys, strengths, mask);
  p.weights = weights.data_ptr(), p.grad = grad.data_ptr();
  Tensor d_memory = like(backend, memory), d_keys = like(backend, keys), d_strengths = like(backend, strengths);
  p.d_memory = d_memory.data_ptr(), p.d_keys = d_keys.data_ptr(), p.d_strengths = d_strengths.data_ptr();
  backend.backward(p);
  return {d_memory, d_keys, d_strengths};
}

template <class Backend>
Tensor sharpen_fwd(const Tensor& weights_, const Tensor& gamma_) {
  Backend backend(weights_);
  const Tensor weights = backend.take(weights_), gamma = backend.take(gamma_);
  Tensor sharpened = like(backend, weights);
  Sharpen p{};
  p.dtype = dtype_of(weights);
  p.rows = weights.size(0), p.size = weights.size(1);
  p.weights = weights.data_ptr(), p.gamma = gamma.data_ptr(), p.sharpened = sharpened.data_ptr();
  backend.forward(p);
  return sharpened;
}

template <class Backend>
std::tuple<Tensor, Tensor> sharpen_bwd(const Tensor& grad_, const Tensor& weights_, const Tensor& gamma_,
                                       const Tensor& sharpened_) {
  Backend backend(grad_);
  const Tensor grad = backend.take(grad_), weights = backend.take(weights_), gamma = backend.take(gamma_);
  const Tensor sharpened = backend.take(sharpened_);
  Tensor d_weights = like(backend, weights), d_gamma = like(backend, gamma);
  Sharpen p{};
  p.dtype = dtype_of(weights);
  p.rows = weights.size(0), p.size = weights.size(1);
  p.weights = weights.data_ptr(), p.gamma = gamma.data_ptr(), p.sharpened = sharpened.data_ptr();
  p.grad = grad.data_ptr(), p.d_weights = d_weights.data_ptr(), p.d_gamma = d_gamma.data_ptr();
  backend.backward(p);
  return {d_weights, d_gamma};
}

template <class Backend>
Tensor allocation_weights_fwd(const Tensor& usage_) {
  Backend backend(usage_);
  const Tensor usage = backend.take(usage_);
  Tensor weights = like(backend, usage);
  Allocation p{};
  p.dtype = dtype_of(usage);
  p.batch = usage.size(0), p.slots = usage.size(1);
  p.usage = usage.data_ptr(), p.weights = weights.data_ptr();
  backend.forward(p);
  return weights;
}

template <class Backend>
Tensor allocation_weights_bwd(const Tensor& grad_, const Tensor& usage_) {
  Backend backend(grad_);
  const Tensor grad = backend.take(grad_), usage = backend.take(usage_);
  Tensor d_usage = like(backend, usage);
  Allocation p{};
  p.dtype = dtype_of(usage);
  p.batch = usage.size(0), p.slots = usage.size(1);
  p.usage = usage.data_ptr(), p.grad = grad.data_ptr(), p.d_usage = d_usage.data_ptr();
  backend.backward(p);
  return d_usage;
}

inline UsageUpdate usage_of(const Tensor& usage, const Tensor& write, const Tensor& read, const Tensor& gates) {
  UsageUpdate p{};
  p.dtype = dtype_of(usage);
  p.batch = usage.size(0), p.slots = usage.size(1), p.read_heads = read.size(1), p.write_heads = write.size(1);
  p.usage = usage.data_ptr(), p.write_weights = write.data_ptr(), p.read_weights = read.data_ptr();
  p.free_gates = gates.data_ptr();
  return p;
}

template <class Backend>
Tensor update_usage_fwd(const Tensor& usage_, const Tensor& write_, const Tensor& read_, const Tensor& gates_) {
  Backend backend(usage_);
  const Tensor usage = backend.take(usage_), write = backend.take(write_), read = backend.take(read_);
  const Tensor gates = backend.take(gates_);
  Tensor updated = like(backend, usage);
  UsageUpdate p = usage_of(usage, write, read, gates);
  p.updated = updated.data_ptr();
  backend.forward(p);
  return updated;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> update_usage_bwd(const Tensor& grad_, const Tensor& usage_,
                                                            const Tensor& write_, const Tensor& read_,
                                                            const Tensor& gates_, bool detach_write) {
  Backend backend(grad_);
  const Tensor grad = backend.take(grad_), usage = backend.take(usage_), write = backend.take(write_);
  const Tensor read = backend.take(read_), gates = backend.take(gates_);
  Tensor d_usage = like(backend, usage), d_write = like(backend, write), d_read = like(backend, read);
  Tensor d_gates = like(backend, gates);
  UsageUpdate p = usage_of(usage, write, read, gates);
  p.detach_write = detach_write;
  p.grad = grad.data_ptr();
  p.d_usage = d_usage.data_ptr(), p.d_write_weights = d_write.data_ptr(), p.d_read_weights = d_read.data_ptr();
  p.d_free_gates = d_gates.data_ptr();
  backend.backward(p);
  return {d_usage, d_write, d_read, d_gates};
}

inline LinksUpdate links_of(const Tensor& links, const Tensor& precedence, const Tensor& write) {
  LinksUpdate p{};
  p.dtype = dtype_of(links);
  p.rows = links.size(0) * links.size(1), p.slots = links.size(2);
  p.links = links.data_ptr(), p.precedence = precedence.data_ptr(), p.write_weights = write.data_ptr();
  return p;
}

template <class Backend>
std::tuple<Tensor, Tensor> update_links_fwd(const Tensor& links_, const Tensor& precedence_, const Tensor& write_) {
  Backend backend(links_);
  const Tensor links = backend.take(links_), precedence = backend.take(precedence_), write = backend.take(write_);
  Tensor updated = like(backend, links), followed = like(backend, precedence);
  LinksUpdate p = links_of(links, precedence, write);
  p.updated = updated.data_ptr(), p.followed = followed.data_ptr();
  backend.forward(p);
  return {updated, followed};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> update_links_bwd(const OptTensor& grad_links_, const OptTensor& grad_precedence_,
                                                    const Tensor& links_, const Tensor& precedence_,
                                                    const Tensor& write_) {
  Backend backend(links_);
  const OptTensor grad_links = take(backend, grad_links_), grad_precedence = take(backend, grad_precedence_);
  const Tensor links = backend.take(links_), precedence = backend.take(precedence_), write = backend.take(write_);
  Tensor d_links = like(backend, links), d_precedence = like(backend, precedence), d_write = like(backend, write);
  LinksUpdate p = links_of(links, precedence, write);
  p.grad_links = ptr<void>(grad_links), p.grad_precedence = ptr<void>(grad_precedence);
  p.d_links = d_links.data_ptr(), p.d_precedence = d_precedence.data_ptr(), p.d_write_weights = d_write.data_ptr();
  backend.backward(p);
  return {d_links, d_precedence, d_write};
}

inline Directional directional_of(const Tensor& links, const Tensor& read) {
  Directional p{};
  p.dtype = dtype_of(links);
  p.batch = links.size(0), p.slots = links.size(2), p.read_heads = read.size(1), p.write_heads = links.size(1);
  p.links = links.data_ptr(), p.read_weights = read.data_ptr();
  return p;
}

template <class Backend>
std::tuple<Tensor, Tensor> directional_weights_fwd(const Tensor& links_, const Tensor& read_) {
  Backend backend(links_);
  const Tensor links = backend.take(links_), read = backend.take(read_);
  Directional p = directional_of(links, read);
  Tensor ahead = empty(backend, {p.batch, p.write_heads, p.read_heads, p.slots}, links.scalar_type());
  Tensor back = like(backend, ahead);
  p.ahead = ahead.data_ptr(), p.back = back.data_ptr();
  backend.forward(p);
  return {ahead, back};
}

template <class Backend>
std::tuple<Tensor, Tensor> directional_weights_bwd(const OptTensor& grad_ahead_, const OptTensor& grad_back_,
                                                   const Tensor& links_, const Tensor& read_) {
  Backend backend(links_);
  const OptTensor grad_ahead = take(backend, grad_ahead_), grad_back = take(backend, grad_back_);
  const Tensor links = backend.take(links_), read = backend.take(read_);
  Tensor d_links = like(backend, links), d_read = like(backend, read);
  Directional p = directional_of(links, read);
  p.grad_ahead = ptr<void>(grad_ahead), p.grad_back = ptr<void>(grad_back);
  p.d_links = d_links.data_ptr(), p.d_read_weights = d_read.data_ptr();
  backend.backward(p);
  return {d_links, d_read};
}

inline ReadMemory read_of(const Tensor& memory, const Tensor& weights) {
  ReadMemory p{};
  p.dtype = dtype_of(memory);
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = weights.size(1);
  p.memory = memory.data_ptr(), p.weights = weights.data_ptr();
  return p;
}

template <class Backend>
Tensor read_memory_fwd(const Tensor& memory_, const Tensor& weights_) {
  Backend backend(memory_);
  const Tensor memory = backend.take(memory_), weights = backend.take(weights_);
  ReadMemory p = read_of(memory, weights);
  Tensor reads = empty(backend, {p.batch, p.heads, p.width}, memory.scalar_type());
  p.reads = reads.data_ptr();
  backend.forward(p);
  return reads;
}

template <class Backend>
std::tuple<Tensor, Tensor> read_memory_bwd(const Tensor& grad_, const Tensor& memory_, const Tensor& weights_) {
  Backend backend(grad_);
  const Tensor grad = backend.take(grad_), memory = backend.take(memory_), weights = backend.take(weights_);
  Tensor d_memory = like(backend, memory), d_weights = like(backend, weights);
  ReadMemory p = read_of(memory, weights);
  p.grad = grad.data_ptr(), p.d_memory = d_memory.data_ptr(), p.d_weights = d_weights.data_ptr();
  backend.backward(p);
  return {d_memory, d_weights};
}

inline WriteMemory write_of(const Tensor& memory, const Tensor& weights, const Tensor& erase, const Tensor& vectors) {
  WriteMemory p{};
  p.dtype = dtype_of(memory);
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = weights.size(1);
  p.memory = memory.data_ptr(), p.weights = weights.data_ptr(), p.erase_vectors = erase.data_ptr();
  p.write_vectors = vectors.data_ptr();
  return p;
}

template <class Backend>
Tensor write_memory_fwd(const Tensor& memory_, const Tensor& weights_, const Tensor& erase_, const Tensor& vectors_) {
  Backend backend(memory_);
  const Tensor memory = backend.take(memory_), weights = backend.take(weights_);
  const Tensor erase = backend.take(erase_), vectors = backend.take(vectors_);
  Tensor written = like(backend, memory);
  WriteMemory p = write_of(memory, weights, erase, vectors);
  p.written = written.data_ptr();
  backend.forward(p);
  return written;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> write_memory_bwd(const Tensor& grad_, const Tensor& memory_,
                                                            const Tensor& weights_, const Tensor& erase_,
                                                            const Tensor& vectors_) {
  Backend backend(grad_);
  const Tensor grad = backend.take(grad_), memory = backend.take(memory_), weights = backend.take(weights_);
  const Tensor erase = backend.take(erase_), vectors = backend.take(vectors_);
  Tensor d_memory = like(backend, memory), d_weights = like(backend, weights);
  Tensor d_erase = like(backend, erase), d_vectors = like(backend, vectors);
  WriteMemory p = write_of(memory, weights, erase, vectors);
  p.grad = grad.data_ptr();
  p.d_memory = d_memory.data_ptr(), p.d_weights = d_weights.data_ptr(), p.d_erase_vectors = d_erase.data_ptr();
  p.d_write_vectors = d_vectors.data_ptr();
  backend.backward(p);
  return {d_memory, d_weights, d_erase, d_vectors};
}

}  // namespace memkern::bind
