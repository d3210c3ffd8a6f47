// The parts of a memory step on the CPU: torch tensors to the plain functions of ops/memory.h.
#include "bind_cpu/common.h"

#include <tuple>

#include "cpu/dispatch.h"
#include "ops/memory.h"

MK_CPU_TABLE(MemoryTable, memory)

namespace memkern::bind {

namespace {

const cpu::MemoryTable& table() { return cpu::memory_table(); }

Tensor like(const Tensor& t) {
  const auto sizes = t.sizes();
  return empty_cpu(sizes.data(), static_cast<int64_t>(sizes.size()), t.scalar_type());
}

Tensor content_weights_fwd(const Tensor& memory_, const Tensor& keys_, const Tensor& strengths_,
                           const OptTensor& mask_) {
  const Tensor memory = dense(memory_), keys = dense(keys_), strengths = dense(strengths_);
  const OptTensor mask = dense(mask_);
  ContentWeights p{};
  p.dtype = dtype_of(memory);
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = keys.size(1);
  p.memory = memory.data_ptr(), p.keys = keys.data_ptr(), p.strengths = strengths.data_ptr();
  p.slot_mask = ptr<uint8_t>(mask);
  Tensor weights = empty_cpu({p.batch, p.heads, p.slots}, memory.scalar_type());
  p.weights = weights.data_ptr();
  table().content_forward(p, parallel_for);
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> content_weights_bwd(const Tensor& grad_, const Tensor& memory_, const Tensor& keys_,
                                                       const Tensor& strengths_, const OptTensor& mask_,
                                                       const Tensor& weights_) {
  const Tensor grad = dense(grad_), memory = dense(memory_), keys = dense(keys_), strengths = dense(strengths_),
               weights = dense(weights_);
  const OptTensor mask = dense(mask_);
  ContentWeights p{};
  p.dtype = dtype_of(memory);
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = keys.size(1);
  p.memory = memory.data_ptr(), p.keys = keys.data_ptr(), p.strengths = strengths.data_ptr();
  p.slot_mask = ptr<uint8_t>(mask);
  p.weights = weights.data_ptr(), p.grad = grad.data_ptr();
  Tensor d_memory = like(memory), d_keys = like(keys), d_strengths = like(strengths);
  p.d_memory = d_memory.data_ptr(), p.d_keys = d_keys.data_ptr(), p.d_strengths = d_strengths.data_ptr();
  table().content_backward(p, parallel_for);
  return {d_memory, d_keys, d_strengths};
}

Tensor sharpen_fwd(const Tensor& weights_, const Tensor& gamma_) {
  const Tensor weights = dense(weights_), gamma = dense(gamma_);
  Tensor sharpened = like(weights);
  Sharpen p{};
  p.dtype = dtype_of(weights);
  p.rows = weights.size(0), p.size = weights.size(1);
  p.weights = weights.data_ptr(), p.gamma = gamma.data_ptr(), p.sharpened = sharpened.data_ptr();
  table().sharpen_forward(p, parallel_for);
  return sharpened;
}

std::tuple<Tensor, Tensor> sharpen_bwd(const Tensor& grad_, const Tensor& weights_, const Tensor& gamma_,
                                       const Tensor& sharpened_) {
  const Tensor grad = dense(grad_), weights = dense(weights_), gamma = dense(gamma_), sharpened = dense(sharpened_);
  Tensor d_weights = like(weights), d_gamma = like(gamma);
  Sharpen p{};
  p.dtype = dtype_of(weights);
  p.rows = weights.size(0), p.size = weights.size(1);
  p.weights = weights.data_ptr(), p.gamma = gamma.data_ptr(), p.sharpened = sharpened.data_ptr();
  p.grad = grad.data_ptr(), p.d_weights = d_weights.data_ptr(), p.d_gamma = d_gamma.data_ptr();
  table().sharpen_backward(p, parallel_for);
  return {d_weights, d_gamma};
}

Tensor allocation_weights_fwd(const Tensor& usage_) {
  const Tensor usage = dense(usage_);
  Tensor weights = like(usage);
  Allocation p{};
  p.dtype = dtype_of(usage);
  p.batch = usage.size(0), p.slots = usage.size(1);
  p.usage = usage.data_ptr(), p.weights = weights.data_ptr();
  table().allocation_forward(p, parallel_for);
  return weights;
}

Tensor allocation_weights_bwd(const Tensor& grad_, const Tensor& usage_) {
  const Tensor grad = dense(grad_), usage = dense(usage_);
  Tensor d_usage = like(usage);
  Allocation p{};
  p.dtype = dtype_of(usage);
  p.batch = usage.size(0), p.slots = usage.size(1);
  p.usage = usage.data_ptr(), p.grad = grad.data_ptr(), p.d_usage = d_usage.data_ptr();
  table().allocation_backward(p, parallel_for);
  return d_usage;
}

UsageUpdate usage_of(const Tensor& usage, const Tensor& write, const Tensor& read, const Tensor& gates) {
  UsageUpdate p{};
  p.dtype = dtype_of(usage);
  p.batch = usage.size(0), p.slots = usage.size(1), p.read_heads = read.size(1), p.write_heads = write.size(1);
  p.usage = usage.data_ptr(), p.write_weights = write.data_ptr(), p.read_weights = read.data_ptr();
  p.free_gates = gates.data_ptr();
  return p;
}

Tensor update_usage_fwd(const Tensor& usage_, const Tensor& write_, const Tensor& read_, const Tensor& gates_) {
  const Tensor usage = dense(usage_), write = dense(write_), read = dense(read_), gates = dense(gates_);
  Tensor updated = like(usage);
  UsageUpdate p = usage_of(usage, write, read, gates);
  p.updated = updated.data_ptr();
  table().usage_forward(p, parallel_for);
  return updated;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> update_usage_bwd(const Tensor& grad_, const Tensor& usage_,
                                                            const Tensor& write_, const Tensor& read_,
                                                            const Tensor& gates_, bool detach_write) {
  const Tensor grad = dense(grad_), usage = dense(usage_), write = dense(write_), read = dense(read_),
               gates = dense(gates_);
  Tensor d_usage = like(usage), d_write = like(write), d_read = like(read), d_gates = like(gates);
  UsageUpdate p = usage_of(usage, write, read, gates);
  p.detach_write = detach_write;
  p.grad = grad.data_ptr();
  p.d_usage = d_usage.data_ptr(), p.d_write_weights = d_write.data_ptr(), p.d_read_weights = d_read.data_ptr();
  p.d_free_gates = d_gates.data_ptr();
  table().usage_backward(p, parallel_for);
  return {d_usage, d_write, d_read, d_gates};
}

LinksUpdate links_of(const Tensor& links, const Tensor& precedence, const Tensor& write) {
  LinksUpdate p{};
  p.dtype = dtype_of(links);
  p.rows = links.size(0) * links.size(1), p.slots = links.size(2);
  p.links = links.data_ptr(), p.precedence = precedence.data_ptr(), p.write_weights = write.data_ptr();
  return p;
}

std::tuple<Tensor, Tensor> update_links_fwd(const Tensor& links_, const Tensor& precedence_, const Tensor& write_) {
  const Tensor links = dense(links_), precedence = dense(precedence_), write = dense(write_);
  Tensor updated = like(links), followed = like(precedence);
  LinksUpdate p = links_of(links, precedence, write);
  p.updated = updated.data_ptr(), p.followed = followed.data_ptr();
  table().links_forward(p, parallel_for);
  return {updated, followed};
}

std::tuple<Tensor, Tensor, Tensor> update_links_bwd(const OptTensor& grad_links_, const OptTensor& grad_precedence_,
                                                    const Tensor& links_, const Tensor& precedence_,
                                                    const Tensor& write_) {
  const OptTensor grad_links = dense(grad_links_), grad_precedence = dense(grad_precedence_);
  const Tensor links = dense(links_), precedence = dense(precedence_), write = dense(write_);
  Tensor d_links = like(links), d_precedence = like(precedence), d_write = like(write);
  LinksUpdate p = links_of(links, precedence, write);
  p.grad_links = ptr<void>(grad_links), p.grad_precedence = ptr<void>(grad_precedence);
  p.d_links = d_links.data_ptr(), p.d_precedence = d_precedence.data_ptr(), p.d_write_weights = d_write.data_ptr();
  table().links_backward(p, parallel_for);
  return {d_links, d_precedence, d_write};
}

Directional directional_of(const Tensor& links, const Tensor& read) {
  Directional p{};
  p.dtype = dtype_of(links);
  p.batch = links.size(0), p.slots = links.size(2), p.read_heads = read.size(1), p.write_heads = links.size(1);
  p.links = links.data_ptr(), p.read_weights = read.data_ptr();
  return p;
}

std::tuple<Tensor, Tensor> directional_weights_fwd(const Tensor& links_, const Tensor& read_) {
  const Tensor links = dense(links_), read = dense(read_);
  Directional p = directional_of(links, read);
  Tensor ahead = empty_cpu({p.batch, p.write_heads, p.read_heads, p.slots}, links.scalar_type()), back = like(ahead);
  p.ahead = ahead.data_ptr(), p.back = back.data_ptr();
  table().directional_forward(p, parallel_for);
  return {ahead, back};
}

std::tuple<Tensor, Tensor> directional_weights_bwd(const OptTensor& grad_ahead_, const OptTensor& grad_back_,
                                                   const Tensor& links_, const Tensor& read_) {
  const OptTensor grad_ahead = dense(grad_ahead_), grad_back = dense(grad_back_);
  const Tensor links = dense(links_), read = dense(read_);
  Tensor d_links = like(links), d_read = like(read);
  Directional p = directional_of(links, read);
  p.grad_ahead = ptr<void>(grad_ahead), p.grad_back = ptr<void>(grad_back);
  p.d_links = d_links.data_ptr(), p.d_read_weights = d_read.data_ptr();
  table().directional_backward(p, parallel_for);
  return {d_links, d_read};
}

ReadMemory read_of(const Tensor& memory, const Tensor& weights) {
  ReadMemory p{};
  p.dtype = dtype_of(memory);
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = weights.size(1);
  p.memory = memory.data_ptr(), p.weights = weights.data_ptr();
  return p;
}

Tensor read_memory_fwd(const Tensor& memory_, const Tensor& weights_) {
  const Tensor memory = dense(memory_), weights = dense(weights_);
  ReadMemory p = read_of(memory, weights);
  Tensor reads = empty_cpu({p.batch, p.heads, p.width}, memory.scalar_type());
  p.reads = reads.data_ptr();
  table().read_forward(p, parallel_for);
  return reads;
}

std::tuple<Tensor, Tensor> read_memory_bwd(const Tensor& grad_, const Tensor& memory_, const Tensor& weights_) {
  const Tensor grad = dense(grad_), memory = dense(memory_), weights = dense(weights_);
  Tensor d_memory = like(memory), d_weights = like(weights);
  ReadMemory p = read_of(memory, weights);
  p.grad = grad.data_ptr(), p.d_memory = d_memory.data_ptr(), p.d_weights = d_weights.data_ptr();
  table().read_backward(p, parallel_for);
  return {d_memory, d_weights};
}

WriteMemory write_of(const Tensor& memory, const Tensor& weights, const Tensor& erase, const Tensor& vectors) {
  WriteMemory p{};
  p.dtype = dtype_of(memory);
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = weights.size(1);
  p.memory = memory.data_ptr(), p.weights = weights.data_ptr(), p.erase_vectors = erase.data_ptr();
  p.write_vectors = vectors.data_ptr();
  return p;
}

Tensor write_memory_fwd(const Tensor& memory_, const Tensor& weights_, const Tensor& erase_, const Tensor& vectors_) {
  const Tensor memory = dense(memory_), weights = dense(weights_), erase = dense(erase_), vectors = dense(vectors_);
  Tensor written = like(memory);
  WriteMemory p = write_of(memory, weights, erase, vectors);
  p.written = written.data_ptr();
  table().write_forward(p, parallel_for);
  return written;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> write_memory_bwd(const Tensor& grad_, const Tensor& memory_,
                                                            const Tensor& weights_, const Tensor& erase_,
                                                            const Tensor& vectors_) {
  const Tensor grad = dense(grad_), memory = dense(memory_), weights = dense(weights_), erase = dense(erase_),
               vectors = dense(vectors_);
  Tensor d_memory = like(memory), d_weights = like(weights), d_erase = like(erase), d_vectors = like(vectors);
  WriteMemory p = write_of(memory, weights, erase, vectors);
  p.grad = grad.data_ptr();
  p.d_memory = d_memory.data_ptr(), p.d_weights = d_weights.data_ptr(), p.d_erase_vectors = d_erase.data_ptr();
  p.d_write_vectors = d_vectors.data_ptr();
  table().write_backward(p, parallel_for);
  return {d_memory, d_weights, d_erase, d_vectors};
}

}  // namespace

}  // namespace memkern::bind

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) {
  using namespace memkern::bind;
  m.impl("content_weights_fwd_cpp", TORCH_BOX(&content_weights_fwd));
  m.impl("content_weights_bwd_cpp", TORCH_BOX(&content_weights_bwd));
  m.impl("sharpen_fwd_cpp", TORCH_BOX(&sharpen_fwd));
  m.impl("sharpen_bwd_cpp", TORCH_BOX(&sharpen_bwd));
  m.impl("allocation_weights_fwd_cpp", TORCH_BOX(&allocation_weights_fwd));
  m.impl("allocation_weights_bwd_cpp", TORCH_BOX(&allocation_weights_bwd));
  m.impl("update_usage_fwd_cpp", TORCH_BOX(&update_usage_fwd));
  m.impl("update_usage_bwd_cpp", TORCH_BOX(&update_usage_bwd));
  m.impl("update_links_fwd_cpp", TORCH_BOX(&update_links_fwd));
  m.impl("update_links_bwd_cpp", TORCH_BOX(&update_links_bwd));
  m.impl("directional_weights_fwd_cpp", TORCH_BOX(&directional_weights_fwd));
  m.impl("directional_weights_bwd_cpp", TORCH_BOX(&directional_weights_bwd));
  m.impl("read_memory_fwd_cpp", TORCH_BOX(&read_memory_fwd));
  m.impl("read_memory_bwd_cpp", TORCH_BOX(&read_memory_bwd));
  m.impl("write_memory_fwd_cpp", TORCH_BOX(&write_memory_fwd));
  m.impl("write_memory_bwd_cpp", TORCH_BOX(&write_memory_bwd));
}
