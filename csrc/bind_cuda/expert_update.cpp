// memkern::update_experts_*_cuda, aggregate_experts_*_cuda, gather_slots_*_cuda and scatter_slots_*_cuda.
#include "cuda/expert_update.h"

#include <tuple>

#include "bind_cuda/common.h"

namespace {

using namespace memkern;
using namespace memkern::bind;
using memkern::cuda::ExpertAggregate;
using memkern::cuda::ExpertSlots;
using memkern::cuda::ExpertUpdate;

// Contiguous, of this dtype, at a multiple of 16 bytes.
Tensor packed(const Tensor& t, ScalarType dtype) {
  const Tensor found = as(t, dtype);
  return reinterpret_cast<uintptr_t>(found.data_ptr()) % 16 == 0 ? found : torch::stable::clone(found);
}

Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}
Tensor empty_like(const Launch& launch, const Tensor& t, ScalarType dtype) {
  const auto sizes = t.sizes();
  return launch.empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}

void* data_of(const Tensor& t) { return const_cast<void*>(t.data_ptr()); }
float* float_of(const Tensor& t) { return static_cast<float*>(data_of(t)); }

// The inputs as the kernels take them: one dtype, that of the states where hiddens and weights share it, else float.
struct UpdateCall {
  Launch launch;
  ScalarType dtype;
  Tensor states, hiddens, probs, gate_weight, update_weight;
  OptTensor gate_bias, update_bias, row_mask;
  ExpertUpdate p{};

  UpdateCall(const Tensor& states_in, const Tensor& hiddens_in, const Tensor& probs_in, const Tensor& gate_weight_in,
             const OptTensor& gate_bias_in, const Tensor& update_weight_in, const OptTensor& update_bias_in,
             const OptTensor& row_mask_in)
      : launch(states_in),
        dtype(common_type(states_in, hiddens_in, gate_weight_in, update_weight_in)),
        states(packed(states_in, dtype)),
        hiddens(packed(hiddens_in, dtype)),
        probs(as(probs_in, ScalarType::Float)),
        gate_weight(packed(gate_weight_in, dtype)),
        update_weight(packed(update_weight_in, dtype)),
        gate_bias(as(gate_bias_in, ScalarType::Float)),
        update_bias(as(update_bias_in, ScalarType::Float)),
        row_mask(dense(row_mask_in)) {
    p.dtype = dtype_of(states);
    p.B = states.size(0);
    p.K = states.size(1);
    p.S = states.size(2);
    p.D = states.size(3);
    p.states = states.data_ptr();
    p.hiddens = hiddens.data_ptr();
    p.probs = ptr<float>(probs);
    p.gate_weight = gate_weight.data_ptr();
    p.update_weight = update_weight.data_ptr();
    p.gate_bias = ptr<float>(gate_bias);
    p.update_bias = ptr<float>(update_bias);
    p.row_mask = ptr<bool>(row_mask);
  }

  static ScalarType common_type(const Tensor& states, const Tensor& hiddens, const Tensor& gate_weight,
                                const Tensor& update_weight) {
    const auto type = states.scalar_type();
    const bool same = hiddens.scalar_type() == type && gate_weight.scalar_type() == type &&
                      update_weight.scalar_type() == type;
    return same ? type : ScalarType::Float;
  }
  bool empty() const { return p.B * p.K * p.S * p.D == 0; }
  // (out, gates, updates), all in the kernels' dtype.
  std::tuple<Tensor, Tensor, Tensor> forward(bool save) {
    Tensor out = launch.empty({p.B, p.K, p.S, p.D}, dtype);
    Tensor gates = save ? launch.empty({p.B, p.S, p.K, p.D}, dtype) : launch.empty({0}, dtype);
    Tensor updates = save ? launch.empty({p.B, p.S, p.K, p.D}, dtype) : launch.empty({0}, dtype);
    if (!empty()) {
      ExpertUpdate call = p;
      call.out = data_of(out);
      call.gates = save ? data_of(gates) : nullptr;
      call.updates = save ? data_of(updates) : nullptr;
      launch.check(memkern::cuda::update_experts_forward(call, launch.stream()));
    }
    return {out, gates, updates};
  }
};

std::tuple<Tensor, Tensor, Tensor> update_forward(const Tensor& states, const Tensor& hiddens, const Tensor& probs,
                                                  const Tensor& gate_weight, const OptTensor& gate_bias,
                                                  const Tensor& update_weight, const OptTensor& update_bias,
                                                  const OptTensor& row_mask, bool save) {
  UpdateCall call(states, hiddens, probs, gate_weight, gate_bias, update_weight, update_bias, row_mask);
  auto [out, gates, updates] = call.forward(save);
  return {cast(out, states.scalar_type()), gates, updates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> update_backward(
    const Tensor& grad_in, const Tensor& states, const Tensor& hiddens, const Tensor& probs, const Tensor& gate_weight,
    const OptTensor& gate_bias, const Tensor& update_weight, const OptTensor& update_bias, const OptTensor& row_mask,
    const Tensor& gates_in, const Tensor& updates_in, bool need_states, bool need_hiddens, bool need_probs,
    bool need_params) {
  UpdateCall call(states, hiddens, probs, gate_weight, gate_bias, update_weight, update_bias, row_mask);
  const Launch& launch = call.launch;
  ExpertUpdate p = call.p;
  const auto f = ScalarType::Float;
  const auto made = [&](bool needed, const Tensor& like, ScalarType dtype) {
    return needed ? empty_like(launch, like, dtype) : launch.empty({0}, dtype);
  };
  Tensor d_states = made(need_states, states, call.dtype), d_hiddens = made(need_hiddens, hiddens, call.dtype);
  Tensor d_probs = made(need_probs, probs, f);
  Tensor d_gate_weight = made(need_params, gate_weight, call.dtype);
  Tensor d_update_weight = made(need_params, update_weight, call.dtype);
  Tensor d_gate_bias = need_params ? launch.empty({p.K, p.D}, f) : launch.empty({0}, f);
  Tensor d_update_bias = need_params ? launch.empty({p.K, p.D}, f) : launch.empty({0}, f);
  if (call.empty()) {
    for (Tensor* t : {&d_states, &d_hiddens, &d_probs, &d_gate_weight, &d_gate_bias, &d_update_weight, &d_update_bias}) {
      torch::stable::zero_(*t);
    }
  } else {
    const Tensor grad = packed(grad_in, call.dtype);
    Tensor gates = gates_in, updates = updates_in;
    if (gates.numel() == 0) {
      auto [out, made_gates, made_updates] = call.forward(true);
      gates = made_gates;
      updates = made_updates;
    }
    Tensor d_products = launch.empty({p.B * p.S, p.K, 2, p.D}, call.dtype);
    p.grad = grad.data_ptr();
    p.gates = data_of(gates);
    p.updates = data_of(updates);
    p.d_products = data_of(d_products);
    p.d_states = need_states ? data_of(d_states) : nullptr;
    p.d_hiddens = need_hiddens ? data_of(d_hiddens) : nullptr;
    p.d_probs = need_probs ? float_of(d_probs) : nullptr;
    if (need_params) {
      p.d_gate_weight = data_of(d_gate_weight);
      p.d_update_weight = data_of(d_update_weight);
      p.d_gate_bias = float_of(d_gate_bias);
      p.d_update_bias = float_of(d_update_bias);
    }
    launch.check(memkern::cuda::update_experts_backward(p, launch.stream()));
  }
  return {cast(d_states, states.scalar_type()),
          cast(d_hiddens, hiddens.scalar_type()),
          d_probs,
          cast(d_gate_weight, gate_weight.scalar_type()),
          d_gate_bias,
          cast(d_update_weight, update_weight.scalar_type()),
          d_update_bias};
}

ExpertAggregate aggregate_params(const Tensor& states, const Tensor& probs) {
  ExpertAggregate p{};
  p.dtype = dtype_of(states);
  p.B = states.size(0);
  p.K = states.size(1);
  p.S = states.size(2);
  p.D = states.size(3);
  p.states = states.data_ptr();
  p.probs = ptr<float>(probs);
  return p;
}

Tensor aggregate_forward(const Tensor& states_in, const Tensor& probs_in) {
  Launch launch(states_in);
  const Tensor states = dense(states_in), probs = as(probs_in, ScalarType::Float);
  auto p = aggregate_params(states, probs);
  Tensor out = launch.empty({p.B, p.S, p.D}, states.scalar_type());
  p.out = data_of(out);
  if (out.numel() > 0) launch.check(memkern::cuda::aggregate_experts_forward(p, launch.stream()));
  return out;
}

std::tuple<Tensor, Tensor> aggregate_backward(const Tensor& grad_in, const Tensor& states_in, const Tensor& probs_in,
                                              bool need_states, bool need_probs) {
  Launch launch(states_in);
  const Tensor grad = dense(grad_in), states = dense(states_in), probs = as(probs_in, ScalarType::Float);
  auto p = aggregate_params(states, probs);
  Tensor d_states = need_states ? empty_like(launch, states, states.scalar_type())
                                : launch.empty({0}, states.scalar_type());
  Tensor d_probs = need_probs ? launch.empty({p.B, p.K}, ScalarType::Float) : launch.empty({0}, ScalarType::Float);
  p.grad = grad.data_ptr();
  p.d_states = need_states ? data_of(d_states) : nullptr;
  p.d_probs = need_probs ? float_of(d_probs) : nullptr;
  if (p.B * p.K > 0) launch.check(memkern::cuda::aggregate_experts_backward(p, launch.stream()));
  return {d_states, d_probs};
}

struct SlotsCall {
  Launch launch;
  Tensor input_ids, slot_ids;
  ExpertSlots p{};

  SlotsCall(const Tensor& like, const Tensor& input_ids_in, const Tensor& slot_ids_in)
      : launch(like), input_ids(dense(input_ids_in)), slot_ids(dense(slot_ids_in)) {
    p.dtype = dtype_of(like);
    p.B = input_ids.size(0);
    p.N = input_ids.size(1);
    p.S = slot_ids.size(0);
    p.D = like.size(2);
    p.input_ids = ptr<int64_t>(input_ids);
    p.slot_ids = ptr<int64_t>(slot_ids);
  }
};

Tensor gather_forward(const Tensor& hiddens_in, const Tensor& input_ids, const Tensor& slot_ids) {
  SlotsCall call(hiddens_in, input_ids, slot_ids);
  const Tensor hiddens = dense(hiddens_in);
  auto& p = call.p;
  Tensor out = call.launch.empty({p.B, p.S, p.D}, hiddens.scalar_type());
  p.sequence = hiddens.data_ptr();
  p.out_slots = data_of(out);
  if (out.numel() > 0) call.launch.check(memkern::cuda::gather_slots_forward(p, call.launch.stream()));
  return out;
}

Tensor gather_backward(const Tensor& grad_in, const Tensor& input_ids, const Tensor& slot_ids) {
  SlotsCall call(grad_in, input_ids, slot_ids);
  const Tensor grad = dense(grad_in);
  auto& p = call.p;
  Tensor out = call.launch.empty({p.B, p.N, p.D}, grad.scalar_type());
  p.slots = grad.data_ptr();
  p.out_sequence = data_of(out);
  if (out.numel() > 0) call.launch.check(memkern::cuda::gather_slots_backward(p, call.launch.stream()));
  return out;
}

Tensor scatter_forward(const Tensor& sequence_in, const Tensor& slots_in, const Tensor& input_ids,
                       const Tensor& slot_ids) {
  SlotsCall call(sequence_in, input_ids, slot_ids);
  const Tensor sequence = dense(sequence_in), slots = as(slots_in, sequence.scalar_type());
  auto& p = call.p;
  Tensor out = call.launch.empty({p.B, p.N, p.D}, sequence.scalar_type());
  p.sequence = sequence.data_ptr();
  // Without slots nothing is replaced; the kernel takes a null pointer for zeros in their place.
  p.slots = p.S > 0 ? slots.data_ptr() : nullptr;
  p.out_sequence = data_of(out);
  if (out.numel() > 0) call.launch.check(memkern::cuda::scatter_slots_forward(p, call.launch.stream()));
  return out;
}

std::tuple<Tensor, Tensor> scatter_backward(const Tensor& grad_in, const Tensor& input_ids, const Tensor& slot_ids,
                                            bool need_sequence, bool need_slots) {
  SlotsCall call(grad_in, input_ids, slot_ids);
  const Tensor grad = dense(grad_in);
  auto& p = call.p;
  Tensor d_sequence = need_sequence ? call.launch.empty({p.B, p.N, p.D}, grad.scalar_type())
                                    : call.launch.empty({0}, grad.scalar_type());
  Tensor d_slots = need_slots ? call.launch.empty({p.B, p.S, p.D}, ScalarType::Float)
                              : call.launch.empty({0}, ScalarType::Float);
  p.sequence = grad.data_ptr();
  p.out_sequence = need_sequence ? data_of(d_sequence) : nullptr;
  p.out_slots = need_slots ? data_of(d_slots) : nullptr;
  call.launch.check(memkern::cuda::scatter_slots_backward(p, call.launch.stream()));
  return {d_sequence, d_slots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memkern, CUDA, m) {
  m.impl("update_experts_fwd_cuda", TORCH_BOX(&update_forward));
  m.impl("update_experts_bwd_cuda", TORCH_BOX(&update_backward));
  m.impl("aggregate_experts_fwd_cuda", TORCH_BOX(&aggregate_forward));
  m.impl("aggregate_experts_bwd_cuda", TORCH_BOX(&aggregate_backward));
  m.impl("gather_slots_fwd_cuda", TORCH_BOX(&gather_forward));
  m.impl("gather_slots_bwd_cuda", TORCH_BOX(&gather_backward));
  m.impl("scatter_slots_fwd_cuda", TORCH_BOX(&scatter_forward));
  m.impl("scatter_slots_bwd_cuda", TORCH_BOX(&scatter_backward));
}
