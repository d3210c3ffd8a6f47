// The parts of a memory step: memkern::content_weights_*_cuda and their like.
#include "bind_cuda/memory.h"

#include <tuple>

namespace memkern::bind {

namespace {

Tensor content_weights_fwd(const Tensor& memory_, const Tensor& keys_, const Tensor& strengths_,
                           const OptTensor& mask_) {
  Launch launch(memory_);
  const Tensor memory = as_floats(memory_), keys = as_floats(keys_), strengths = as_floats(strengths_);
  const OptTensor mask = dense(mask_);
  ContentWeights p{};
  p.dtype = DType::kF32;
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = keys.size(1);
  p.memory = memory.data_ptr(), p.keys = keys.data_ptr(), p.strengths = strengths.data_ptr();
  p.slot_mask = ptr<uint8_t>(mask);
  Tensor weights = floats_of(launch, {p.batch, p.heads, p.slots});
  p.weights = weights.data_ptr();
  launch.check(cuda::content_forward(p, launch.tickets(p.batch), launch.stream()));
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> content_weights_bwd(const Tensor& grad_, const Tensor& memory_, const Tensor& keys_,
                                                       const Tensor& strengths_, const OptTensor& mask_,
                                                       const Tensor& weights_) {
  Launch launch(grad_);
  const Tensor grad = as_floats(grad_), memory = as_floats(memory_), keys = as_floats(keys_);
  const Tensor strengths = as_floats(strengths_), weights = as_floats(weights_);
  const OptTensor mask = dense(mask_);
  ContentWeights p{};
  p.dtype = DType::kF32;
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = keys.size(1);
  p.memory = memory.data_ptr(), p.keys = keys.data_ptr(), p.strengths = strengths.data_ptr();
  p.slot_mask = ptr<uint8_t>(mask);
  p.weights = weights.data_ptr(), p.grad = grad.data_ptr();
  Tensor d_memory = like(launch, memory), d_keys = like(launch, keys), d_strengths = like(launch, strengths);
  p.d_memory = d_memory.data_ptr(), p.d_keys = d_keys.data_ptr(), p.d_strengths = d_strengths.data_ptr();
  const Tensor scratch = floats_of(launch, {cuda::content_backward_scratch(p)});
  launch.check(cuda::content_backward(p, out_ptr<float>(scratch), launch.tickets(p.batch), launch.stream()));
  return {d_memory, d_keys, d_strengths};
}

Tensor sharpen_fwd(const Tensor& weights_, const Tensor& gamma_) {
  Launch launch(weights_);
  const Tensor weights = as_floats(weights_), gamma = as_floats(gamma_);
  Tensor sharpened = like(launch, weights);
  Sharpen p{};
  p.dtype = DType::kF32;
  p.rows = weights.size(0), p.size = weights.size(1);
  p.weights = weights.data_ptr(), p.gamma = gamma.data_ptr(), p.sharpened = sharpened.data_ptr();
  launch.check(cuda::sharpen_forward(p, launch.stream()));
  return sharpened;
}

std::tuple<Tensor, Tensor> sharpen_bwd(const Tensor& grad_, const Tensor& weights_, const Tensor& gamma_,
                                       const Tensor& sharpened_) {
  Launch launch(grad_);
  const Tensor grad = as_floats(grad_), weights = as_floats(weights_), gamma = as_floats(gamma_);
  const Tensor sharpened = as_floats(sharpened_);
  Tensor d_weights = like(launch, weights), d_gamma = like(launch, gamma);
  Sharpen p{};
  p.dtype = DType::kF32;
  p.rows = weights.size(0), p.size = weights.size(1);
  p.weights = weights.data_ptr(), p.gamma = gamma.data_ptr(), p.sharpened = sharpened.data_ptr();
  p.grad = grad.data_ptr(), p.d_weights = d_weights.data_ptr(), p.d_gamma = d_gamma.data_ptr();
  launch.check(cuda::sharpen_backward(p, launch.stream()));
  return {d_weights, d_gamma};
}

Tensor allocation_weights_fwd(const Tensor& usage_) {
  Launch launch(usage_);
  const Tensor usage = as_floats(usage_);
  Tensor weights = like(launch, usage);
  Allocation p{};
  p.dtype = DType::kF32;
  p.batch = usage.size(0), p.slots = usage.size(1);
  p.usage = usage.data_ptr(), p.weights = weights.data_ptr();
  const Tensor scratch = floats_of(launch, {cuda::allocation_scratch(p)});
  launch.check(cuda::allocation_forward(p, out_ptr<float>(scratch), launch.stream()));
  return weights;
}

Tensor allocation_weights_bwd(const Tensor& grad_, const Tensor& usage_) {
  Launch launch(grad_);
  const Tensor grad = as_floats(grad_), usage = as_floats(usage_);
  Tensor d_usage = like(launch, usage);
  Allocation p{};
  p.dtype = DType::kF32;
  p.batch = usage.size(0), p.slots = usage.size(1);
  p.usage = usage.data_ptr(), p.grad = grad.data_ptr(), p.d_usage = d_usage.data_ptr();
  const Tensor scratch = floats_of(launch, {cuda::allocation_scratch(p)});
  launch.check(cuda::allocation_backward(p, out_ptr<float>(scratch), launch.stream()));
  return d_usage;
}

UsageUpdate usage_of(const Tensor& usage, const Tensor& write, const Tensor& read, const Tensor& gates) {
  UsageUpdate p{};
  p.dtype = DType::kF32;
  p.batch = usage.size(0), p.slots = usage.size(1), p.read_heads = read.size(1), p.write_heads = write.size(1);
  p.usage = usage.data_ptr(), p.write_weights = write.data_ptr(), p.read_weights = read.data_ptr();
  p.free_gates = gates.data_ptr();
  return p;
}

Tensor update_usage_fwd(const Tensor& usage_, const Tensor& write_, const Tensor& read_, const Tensor& gates_) {
  Launch launch(usage_);
  const Tensor usage = as_floats(usage_), write = as_floats(write_), read = as_floats(read_), gates = as_floats(gates_);
  Tensor updated = like(launch, usage);
  UsageUpdate p = usage_of(usage, write, read, gates);
  p.updated = updated.data_ptr();
  launch.check(cuda::usage_forward(p, launch.stream()));
  return updated;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> update_usage_bwd(const Tensor& grad_, const Tensor& usage_,
                                                            const Tensor& write_, const Tensor& read_,
                                                            const Tensor& gates_, bool detach_write) {
  Launch launch(grad_);
  const Tensor grad = as_floats(grad_), usage = as_floats(usage_), write = as_floats(write_), read = as_floats(read_),
               gates = as_floats(gates_);
  Tensor d_usage = like(launch, usage), d_write = like(launch, write), d_read = like(launch, read);
  Tensor d_gates = like(launch, gates);
  UsageUpdate p = usage_of(usage, write, read, gates);
  p.detach_write = detach_write;
  p.grad = grad.data_ptr();
  p.d_usage = d_usage.data_ptr(), p.d_write_weights = d_write.data_ptr(), p.d_read_weights = d_read.data_ptr();
  p.d_free_gates = d_gates.data_ptr();
  const Tensor scratch = floats_of(launch, {cuda::usage_backward_scratch(p)});
  launch.check(cuda::usage_backward(p, out_ptr<float>(scratch), launch.stream()));
  return {d_usage, d_write, d_read, d_gates};
}

LinksUpdate links_of(const Tensor& links, const Tensor& precedence, const Tensor& write) {
  LinksUpdate p{};
  p.dtype = DType::kF32;
  p.rows = links.size(0) * links.size(1), p.slots = links.size(2);
  p.links = links.data_ptr(), p.precedence = precedence.data_ptr(), p.write_weights = write.data_ptr();
  return p;
}

std::tuple<Tensor, Tensor> update_links_fwd(const Tensor& links_, const Tensor& precedence_, const Tensor& write_) {
  Launch launch(links_);
  const Tensor links = as_floats(links_), precedence = as_floats(precedence_), write = as_floats(write_);
  Tensor updated = like(launch, links), followed = like(launch, precedence);
  LinksUpdate p = links_of(links, precedence, write);
  p.updated = updated.data_ptr(), p.followed = followed.data_ptr();
  launch.check(cuda::links_forward(p, launch.stream()));
  return {updated, followed};
}

std::tuple<Tensor, Tensor, Tensor> update_links_bwd(const OptTensor& grad_links_, const OptTensor& grad_precedence_,
                                                    const Tensor& links_, const Tensor& precedence_,
                                                    const Tensor& write_) {
  Launch launch(links_);
  const OptTensor grad_links = as_floats(grad_links_), grad_precedence = as_floats(grad_precedence_);
  const Tensor links = as_floats(links_), precedence = as_floats(precedence_), write = as_floats(write_);
  Tensor d_links = like(launch, links), d_precedence = like(launch, precedence), d_write = like(launch, write);
  LinksUpdate p = links_of(links, precedence, write);
  p.grad_links = ptr<void>(grad_links), p.grad_precedence = ptr<void>(grad_precedence);
  p.d_links = d_links.data_ptr(), p.d_precedence = d_precedence.data_ptr(), p.d_write_weights = d_write.data_ptr();
  const Tensor scratch = floats_of(launch, {cuda::links_backward_scratch(p)});
  launch.check(cuda::links_backward(p, out_ptr<float>(scratch), launch.stream()));
  return {d_links, d_precedence, d_write};
}

Directional directional_of(const Tensor& links, const Tensor& read) {
  Directional p{};
  p.dtype = DType::kF32;
  p.batch = links.size(0), p.slots = links.size(2), p.read_heads = read.size(1), p.write_heads = links.size(1);
  p.links = links.data_ptr(), p.read_weights = read.data_ptr();
  return p;
}

std::tuple<Tensor, Tensor> directional_weights_fwd(const Tensor& links_, const Tensor& read_) {
  Launch launch(links_);
  const Tensor links = as_floats(links_), read = as_floats(read_);
  Directional p = directional_of(links, read);
  Tensor ahead = floats_of(launch, {p.batch, p.write_heads, p.read_heads, p.slots}), back = like(launch, ahead);
  p.ahead = ahead.data_ptr(), p.back = back.data_ptr();
  const Tensor scratch = floats_of(launch, {cuda::directional_scratch(p)});
  launch.check(cuda::directional_forward(p, out_ptr<float>(scratch), launch.stream()));
  return {ahead, back};
}

std::tuple<Tensor, Tensor> directional_weights_bwd(const OptTensor& grad_ahead_, const OptTensor& grad_back_,
                                                   const Tensor& links_, const Tensor& read_) {
  Launch launch(links_);
  const OptTensor grad_ahead = as_floats(grad_ahead_), grad_back = as_floats(grad_back_);
  const Tensor links = as_floats(links_), read = as_floats(read_);
  Tensor d_links = like(launch, links), d_read = like(launch, read);
  Directional p = directional_of(links, read);
  p.grad_ahead = ptr<void>(grad_ahead), p.grad_back = ptr<void>(grad_back);
  p.d_links = d_links.data_ptr(), p.d_read_weights = d_read.data_ptr();
  const Tensor scratch = floats_of(launch, {cuda::directional_scratch(p)});
  launch.check(cuda::directional_backward(p, out_ptr<float>(scratch), launch.stream()));
  return {d_links, d_read};
}

ReadMemory read_of(const Tensor& memory, const Tensor& weights) {
  ReadMemory p{};
  p.dtype = DType::kF32;
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = weights.size(1);
  p.memory = memory.data_ptr(), p.weights = weights.data_ptr();
  return p;
}

Tensor read_memory_fwd(const Tensor& memory_, const Tensor& weights_) {
  Launch launch(memory_);
  const Tensor memory = as_floats(memory_), weights = as_floats(weights_);
  ReadMemory p = read_of(memory, weights);
  Tensor reads = floats_of(launch, {p.batch, p.heads, p.width});
  p.reads = reads.data_ptr();
  const Tensor scratch = floats_of(launch, {cuda::read_scratch(p)});
  launch.check(cuda::read_forward(p, out_ptr<float>(scratch), launch.tickets(p.batch), launch.stream()));
  return reads;
}

std::tuple<Tensor, Tensor> read_memory_bwd(const Tensor& grad_, const Tensor& memory_, const Tensor& weights_) {
  Launch launch(grad_);
  const Tensor grad = as_floats(grad_), memory = as_floats(memory_), weights = as_floats(weights_);
  Tensor d_memory = like(launch, memory), d_weights = like(launch, weights);
  ReadMemory p = read_of(memory, weights);
  p.grad = grad.data_ptr(), p.d_memory = d_memory.data_ptr(), p.d_weights = d_weights.data_ptr();
  launch.check(cuda::read_backward(p, launch.stream()));
  return {d_memory, d_weights};
}

WriteMemory write_of(const Tensor& memory, const Tensor& weights, const Tensor& erase, const Tensor& vectors) {
  WriteMemory p{};
  p.dtype = DType::kF32;
  p.batch = memory.size(0), p.slots = memory.size(1), p.width = memory.size(2), p.heads = weights.size(1);
  p.memory = memory.data_ptr(), p.weights = weights.data_ptr(), p.erase_vectors = erase.data_ptr();
  p.write_vectors = vectors.data_ptr();
  return p;
}

Tensor write_memory_fwd(const Tensor& memory_, const Tensor& weights_, const Tensor& erase_, const Tensor& vectors_) {
  Launch launch(memory_);
  const Tensor memory = as_floats(memory_), weights = as_floats(weights_);
  const Tensor erase = as_floats(erase_), vectors = as_floats(vectors_);
  Tensor written = like(launch, memory);
  WriteMemory p = write_of(memory, weights, erase, vectors);
  p.written = written.data_ptr();
  launch.check(cuda::write_forward(p, launch.stream()));
  return written;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> write_memory_bwd(const Tensor& grad_, const Tensor& memory_,
                                                            const Tensor& weights_, const Tensor& erase_,
                                                            const Tensor& vectors_) {
  Launch launch(grad_);
  const Tensor grad = as_floats(grad_), memory = as_floats(memory_), weights = as_floats(weights_);
  const Tensor erase = as_floats(erase_), vectors = as_floats(vectors_);
  Tensor d_memory = like(launch, memory), d_weights = like(launch, weights);
  Tensor d_erase = like(launch, erase), d_vectors = like(launch, vectors);
  WriteMemory p = write_of(memory, weights, erase, vectors);
  p.grad = grad.data_ptr();
  p.d_memory = d_memory.data_ptr(), p.d_weights = d_weights.data_ptr(), p.d_erase_vectors = d_erase.data_ptr();
  p.d_write_vectors = d_vectors.data_ptr();
  const Tensor scratch = floats_of(launch, {cuda::write_backward_scratch(p)});
  launch.check(cuda::write_backward(p, out_ptr<float>(scratch), launch.tickets(p.batch), launch.stream()));
  return {d_memory, d_weights, d_erase, d_vectors};
}

}  // namespace

}  // namespace memkern::bind

STABLE_TORCH_LIBRARY_IMPL(memkern, CUDA, m) {
  using namespace memkern::bind;
  m.impl("content_weights_fwd_cuda", TORCH_BOX(&content_weights_fwd));
  m.impl("content_weights_bwd_cuda", TORCH_BOX(&content_weights_bwd));
  m.impl("sharpen_fwd_cuda", TORCH_BOX(&sharpen_fwd));
  m.impl("sharpen_bwd_cuda", TORCH_BOX(&sharpen_bwd));
  m.impl("allocation_weights_fwd_cuda", TORCH_BOX(&allocation_weights_fwd));
  m.impl("allocation_weights_bwd_cuda", TORCH_BOX(&allocation_weights_bwd));
  m.impl("update_usage_fwd_cuda", TORCH_BOX(&update_usage_fwd));
  m.impl("update_usage_bwd_cuda", TORCH_BOX(&update_usage_bwd));
  m.impl("update_links_fwd_cuda", TORCH_BOX(&update_links_fwd));
  m.impl("update_links_bwd_cuda", TORCH_BOX(&update_links_bwd));
  m.impl("directional_weights_fwd_cuda", TORCH_BOX(&directional_weights_fwd));
  m.impl("directional_weights_bwd_cuda", TORCH_BOX(&directional_weights_bwd));
  m.impl("read_memory_fwd_cuda", TORCH_BOX(&read_memory_fwd));
  m.impl("read_memory_bwd_cuda", TORCH_BOX(&read_memory_bwd));
  m.impl("write_memory_fwd_cuda", TORCH_BOX(&write_memory_fwd));
  m.impl("write_memory_bwd_cuda", TORCH_BOX(&write_memory_bwd));
}
