// The expert_update column on the CPU. Its matrix products are torch's: memkern/ops/_expert_update_cpu.py makes them and
// calls the expert_mix operators below in between; the other operators are whole here.
#include "bind_cpu/common.h"
#include "ops/expert_update.h"

namespace {

using namespace memkern;
using namespace memkern::bind;

void* data_of(const Tensor& t) { return const_cast<void*>(t.data_ptr()); }
void* data_of(const OptTensor& t) { return t ? data_of(*t) : nullptr; }

// t with stride 1 in its last axis. Keep it while its data is in use.
Tensor rows_of(const Tensor& t) { return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }

void expert_mix_forward(const Tensor& out, const Tensor& gate, const Tensor& update, const OptTensor& more_gate,
                        const OptTensor& more_update, const Tensor& states, const Tensor& probs,
                        const OptTensor& gate_bias, const OptTensor& update_bias, const OptTensor& row_mask,
                        const OptTensor& gates, const OptTensor& updates, int64_t batch, int64_t expert) {
  cpu::MixForward p{};
  p.run = parallel_for;
  p.dtype = dtype_of(states);
  p.product_dtype = dtype_of(gate);
  p.gates_dtype = gates ? dtype_of(*gates) : p.dtype;
  p.batch0 = batch;
  p.expert0 = expert;
  p.S = states.size(2);
  p.N = gate.size(0) / p.S;
  p.E = gate.size(1);
  p.K = states.size(1);
  p.D = states.size(3);
  p.gate = gate.data_ptr();
  p.update = update.data_ptr();
  p.product_row = gate.stride(0);
  p.product_expert = gate.stride(1);
  if (more_gate) {
    p.more_gate = more_gate->data_ptr();
    p.more_update = more_update->data_ptr();
    p.more_row = more_gate->stride(0);
    p.more_expert = more_gate->stride(1);
  }
  p.states = states.data_ptr();
  p.states_batch = states.stride(0);
  p.states_expert = states.stride(1);
  p.states_slot = states.stride(2);
  p.probs = probs.data_ptr();
  p.gate_bias = data_of(gate_bias);
  p.update_bias = data_of(update_bias);
  p.row_mask = ptr<bool>(row_mask);
  p.out = data_of(out);
  p.gates = data_of(gates);
  p.updates = data_of(updates);
  cpu::expert_update_table().mix_forward(p);
}

// What both halves of backward read: where the gradient lies, the gates, and sizes (B, K, S, D).
template <class P>
P mix_params(const Tensor& sizes, const Tensor& products, const Tensor& grad, const Tensor& probs, const Tensor& gates,
             const OptTensor& row_mask) {
  P p{};
  p.run = parallel_for;
  p.dtype = dtype_of(sizes);
  p.product_dtype = dtype_of(products);
  p.gates_dtype = dtype_of(gates);
  p.B = sizes.size(0);
  p.K = sizes.size(1);
  p.S = sizes.size(2);
  p.D = sizes.size(3);
  p.grad = grad.data_ptr();
  p.grad_batch = grad.stride(0);
  p.grad_expert = grad.stride(1);
  p.grad_slot = grad.stride(2);
  p.probs = probs.data_ptr();
  p.gates = gates.data_ptr();
  p.row_mask = ptr<bool>(row_mask);
  return p;
}

void expert_mix_backward(const Tensor& d_products, const OptTensor& d_probs, const OptTensor& d_gate_bias,
                         const OptTensor& d_update_bias, const Tensor& grad, const Tensor& states, const Tensor& probs,
                         const Tensor& gates, const Tensor& updates, const OptTensor& row_mask, int64_t expert) {
  auto p = mix_params<cpu::MixBackward>(states, d_products, grad, probs, gates, row_mask);
  p.expert0 = expert;
  p.E = d_products.size(1);
  p.product_row = d_products.stride(0);
  p.product_expert = d_products.stride(1);
  p.product_half = d_products.stride(2);
  p.states = states.data_ptr();
  p.states_batch = states.stride(0);
  p.states_expert = states.stride(1);
  p.states_slot = states.stride(2);
  p.updates = updates.data_ptr();
  p.d_products = data_of(d_products);
  p.d_probs = data_of(d_probs);
  p.d_gate_bias = data_of(d_gate_bias);
  p.d_update_bias = data_of(d_update_bias);
  cpu::expert_update_table().mix_backward(p);
}

void expert_mix_states(const Tensor& d_states, const Tensor& grad, const Tensor& probs, const Tensor& gates,
                       const Tensor& through, const OptTensor& row_mask, int64_t expert) {
  auto p = mix_params<cpu::MixStates>(d_states, through, grad, probs, gates, row_mask);
  p.expert = expert;
  p.through = through.data_ptr();
  p.d_states = data_of(d_states);
  cpu::expert_update_table().mix_states(p);
}

cpu::Aggregate aggregate_params(const Tensor& states, const Tensor& probs) {
  cpu::Aggregate p{};
  p.run = parallel_for;
  p.dtype = dtype_of(states);
  p.B = states.size(0);
  p.K = states.size(1);
  p.S = states.size(2);
  p.D = states.size(3);
  p.states = states.data_ptr();
  p.states_batch = states.stride(0);
  p.states_expert = states.stride(1);
  p.states_slot = states.stride(2);
  p.probs = probs.data_ptr();
  return p;
}

Tensor aggregate_forward(const Tensor& states_, const Tensor& probs_) {
  const Tensor states = rows_of(states_), probs = as(probs_, acc_type(states));
  Tensor out = empty_cpu({states.size(0), states.size(2), states.size(3)}, states.scalar_type());
  auto p = aggregate_params(states, probs);
  p.out = data_of(out);
  cpu::expert_update_table().aggregate_forward(p);
  return out;
}

std::tuple<Tensor, Tensor> aggregate_backward(const Tensor& grad_, const Tensor& states_, const Tensor& probs_,
                                              bool need_states, bool need_probs) {
  const Tensor grad = rows_of(grad_), states = rows_of(states_), probs = as(probs_, acc_type(states));
  const auto type = states.scalar_type();
  Tensor d_states = need_states ? empty_cpu({states.size(0), states.size(1), states.size(2), states.size(3)}, type)
                                : empty_cpu({0}, type);
  Tensor d_probs = need_probs ? empty_cpu({states.size(0), states.size(1)}, acc_type(states))
                              : empty_cpu({0}, acc_type(states));
  auto p = aggregate_params(states, probs);
  p.grad = grad.data_ptr();
  p.grad_batch = grad.stride(0);
  p.grad_slot = grad.stride(1);
  p.d_states = need_states ? data_of(d_states) : nullptr;
  p.d_probs = need_probs ? data_of(d_probs) : nullptr;
  cpu::expert_update_table().aggregate_backward(p);
  return {d_states, d_probs};
}

cpu::Slots slots_params(const Tensor& like, const Tensor& input_ids, const Tensor& slot_ids) {
  cpu::Slots p{};
  p.run = parallel_for;
  p.dtype = dtype_of(like);
  p.B = input_ids.size(0);
  p.N = input_ids.size(1);
  p.S = slot_ids.size(0);
  p.D = like.size(2);
  p.input_ids = ptr<int64_t>(input_ids);
  p.slot_ids = ptr<int64_t>(slot_ids);
  return p;
}

void set_sequence(cpu::Slots& p, const Tensor& sequence) {
  p.sequence = sequence.data_ptr();
  p.sequence_batch = sequence.stride(0);
  p.sequence_token = sequence.stride(1);
}

void set_slots(cpu::Slots& p, const Tensor& slots) {
  p.slots = slots.data_ptr();
  p.slots_batch = slots.stride(0);
  p.slots_slot = slots.stride(1);
}

Tensor gather_forward(const Tensor& hiddens_, const Tensor& input_ids_, const Tensor& slot_ids_) {
  const Tensor hiddens = rows_of(hiddens_), input_ids = dense(input_ids_), slot_ids = dense(slot_ids_);
  auto p = slots_params(hiddens, input_ids, slot_ids);
  Tensor out = empty_cpu({p.B, p.S, p.D}, hiddens.scalar_type());
  set_sequence(p, hiddens);
  p.out_slots = data_of(out);
  cpu::expert_update_table().gather_forward(p);
  return out;
}

Tensor gather_backward(const Tensor& grad_, const Tensor& input_ids_, const Tensor& slot_ids_) {
  const Tensor grad = rows_of(grad_), input_ids = dense(input_ids_), slot_ids = dense(slot_ids_);
  auto p = slots_params(grad, input_ids, slot_ids);
  Tensor out = empty_cpu({p.B, p.N, p.D}, grad.scalar_type());
  set_slots(p, grad);
  p.out_sequence = data_of(out);
  cpu::expert_update_table().gather_backward(p);
  return out;
}

Tensor scatter_forward(const Tensor& sequence_, const Tensor& slots_, const Tensor& input_ids_,
                       const Tensor& slot_ids_) {
  const Tensor sequence = rows_of(sequence_), input_ids = dense(input_ids_), slot_ids = dense(slot_ids_);
  const auto type = sequence.scalar_type();
  const Tensor slots = slots_.scalar_type() == type ? rows_of(slots_) : as(slots_, type);
  auto p = slots_params(sequence, input_ids, slot_ids);
  Tensor out = empty_cpu({p.B, p.N, p.D}, type);
  set_sequence(p, sequence);
  set_slots(p, slots);
  p.out_sequence = data_of(out);
  cpu::expert_update_table().scatter_forward(p);
  return out;
}

std::tuple<Tensor, Tensor> scatter_backward(const Tensor& grad_, const Tensor& input_ids_, const Tensor& slot_ids_,
                                            bool need_sequence, bool need_slots) {
  const Tensor grad = rows_of(grad_), input_ids = dense(input_ids_), slot_ids = dense(slot_ids_);
  auto p = slots_params(grad, input_ids, slot_ids);
  Tensor d_sequence = need_sequence ? empty_cpu({p.B, p.N, p.D}, grad.scalar_type())
                                    : empty_cpu({0}, grad.scalar_type());
  Tensor d_slots = need_slots ? empty_cpu({p.B, p.S, p.D}, acc_type(grad)) : empty_cpu({0}, acc_type(grad));
  set_sequence(p, grad);
  p.out_sequence = need_sequence ? data_of(d_sequence) : nullptr;
  p.out_slots = need_slots ? data_of(d_slots) : nullptr;
  cpu::expert_update_table().scatter_backward(p);
  return {d_sequence, d_slots};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memkern, m) {
  m.def(
      "expert_mix_forward(Tensor(a!) out, Tensor gate, Tensor update, Tensor? more_gate, Tensor? more_update, "
      "Tensor states, Tensor probs, Tensor? gate_bias, Tensor? update_bias, Tensor? row_mask, Tensor(b!)? gates, "
      "Tensor(c!)? updates, int batch, int expert) -> ()");
  m.def(
      "expert_mix_backward(Tensor(a!) d_products, Tensor(b!)? d_probs, Tensor(c!)? d_gate_bias, "
      "Tensor(d!)? d_update_bias, Tensor grad, Tensor states, Tensor probs, Tensor gates, Tensor updates, "
      "Tensor? row_mask, int expert) -> ()");
  m.def(
      "expert_mix_states(Tensor(a!) d_states, Tensor grad, Tensor probs, Tensor gates, Tensor through, "
      "Tensor? row_mask, int expert) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) {
  m.impl("expert_mix_forward", TORCH_BOX(&expert_mix_forward));
  m.impl("expert_mix_backward", TORCH_BOX(&expert_mix_backward));
  m.impl("expert_mix_states", TORCH_BOX(&expert_mix_states));
  m.impl("aggregate_experts_fwd_cpp", TORCH_BOX(&aggregate_forward));
  m.impl("aggregate_experts_bwd_cpp", TORCH_BOX(&aggregate_backward));
  m.impl("gather_slots_fwd_cpp", TORCH_BOX(&gather_forward));
  m.impl("gather_slots_bwd_cpp", TORCH_BOX(&gather_backward));
  m.impl("scatter_slots_fwd_cpp", TORCH_BOX(&scatter_forward));
  m.impl("scatter_slots_bwd_cpp", TORCH_BOX(&scatter_backward));
}
