// The routing column on the CPU: torch tensors to the plain functions of ops/routing.h.
#include "bind_cpu/common.h"

#include <limits>
#include <tuple>

#include "cpu/dispatch.h"
#include "ops/routing.h"

MK_CPU_TABLE(RoutingTable, routing)

namespace memkern::bind {

namespace {

// Inputs in the layout the kernels take, kept alive for the call.
struct RouteTensors {
  RouteTensors(const Tensor& hiddens_, const Tensor& weight_, const OptTensor& temperature_, const OptTensor& query_,
               const OptTensor& slot_mask_, const OptTensor& row_mask_)
      : f(acc_type(hiddens_)),
        hiddens(hiddens_.size(2) <= 1 || hiddens_.stride(2) == 1 ? hiddens_ : dense(hiddens_)),
        weight(as(weight_, f)),
        temperature(as(temperature_, f)),
        query(as(query_, f)),
        slot_mask(dense(slot_mask_)),
        row_mask(dense(row_mask_)) {}

  RouteInput input(double temperature_value, int64_t pooling, double clamp) const {
    RouteInput in{};
    in.dtype = dtype_of(hiddens);
    const auto sizes = hiddens.sizes();
    in.rows = sizes[0];
    in.slots = sizes[1];
    in.width = sizes[2];
    in.experts = weight.size(0);
    in.hiddens = hiddens.data_ptr();
    in.row_stride = hiddens.stride(0);
    in.slot_stride = hiddens.stride(1);
    in.weight = weight.data_ptr();
    in.temperature = ptr<void>(temperature);
    in.temperature_value = temperature_value;
    in.pooling = static_cast<Pooling>(pooling);
    in.query = ptr<void>(query);
    in.slot_mask = ptr<uint8_t>(slot_mask);
    in.row_mask = ptr<uint8_t>(row_mask);
    in.clamp = clamp;
    return in;
  }

  ScalarType f;
  Tensor hiddens, weight;
  OptTensor temperature, query, slot_mask, row_mask;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_experts_fwd(
    const Tensor& hiddens, const Tensor& weight, const OptTensor& bias, const OptTensor& temperature,
    double temperature_value, int64_t pooling, const OptTensor& pool_query, const OptTensor& slot_mask,
    const OptTensor& row_mask, double clamp, bool save) {
  const RouteTensors t(hiddens, weight, temperature, pool_query, slot_mask, row_mask);
  const OptTensor bias_f = as(bias, t.f);
  RouteForward p{};
  p.in = t.input(temperature_value, pooling, clamp);
  const int64_t rows = p.in.rows, slots = p.in.slots, width = p.in.width, experts = p.in.experts;
  const bool max = p.in.pooling == Pooling::kMax, attention = p.in.pooling == Pooling::kAttention;
  Tensor probs = empty_cpu({rows, experts}, hiddens.scalar_type());
  Tensor logits = empty_cpu({rows, experts}, t.f);
  Tensor entropy = empty_cpu({rows}, t.f);
  Tensor loss = empty_cpu({}, t.f);
  Tensor raw = save ? empty_cpu({rows, experts}, t.f) : empty_cpu({0}, t.f);
  Tensor saved_pool = save && slots != 1 ? empty_cpu({rows, width}, max ? ScalarType::Int : t.f) : empty_cpu({0}, t.f);
  Tensor slot_weights = save && attention ? empty_cpu({rows, slots}, t.f) : empty_cpu({0}, t.f);
  Tensor loss_weights = save ? empty_cpu({experts}, t.f) : empty_cpu({0}, t.f);
  Tensor zero_rows = empty_cpu({save ? rows : 0}, ScalarType::Bool);
  p.bias = ptr<void>(bias_f);
  p.probs = probs.data_ptr();
  p.logits = logits.data_ptr();
  p.entropy = entropy.data_ptr();
  p.loss = loss.data_ptr();
  if (save) {
    p.raw = raw.data_ptr();
    p.saved_pool = slots != 1 ? saved_pool.data_ptr() : nullptr;
    p.slot_weights = attention ? slot_weights.data_ptr() : nullptr;
    p.loss_weights = loss_weights.data_ptr();
    p.zero_rows = out_ptr<uint8_t>(zero_rows);
  }
  cpu::routing_table().route_forward(p, parallel_for);
  return {probs, logits, entropy, loss, raw, saved_pool, slot_weights, loss_weights, zero_rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_experts_bwd(
    const OptTensor& grad_probs, const OptTensor& grad_logits, const OptTensor& grad_entropy, const OptTensor& grad_loss,
    const Tensor& hiddens, const Tensor& weight, const OptTensor& temperature, double temperature_value, int64_t pooling,
    const OptTensor& pool_query, const OptTensor& slot_mask, const OptTensor& row_mask, const Tensor& raw,
    const Tensor& saved_pool, const Tensor& slot_weights, const Tensor& loss_weights, const Tensor& zero_rows,
    double clamp, bool straight_through, bool need_hiddens, bool need_params, bool need_temperature) {
  const RouteTensors t(hiddens, weight, temperature, pool_query, slot_mask, row_mask);
  const OptTensor g_probs = as(grad_probs, hiddens.scalar_type()), g_logits = as(grad_logits, t.f),
                  g_entropy = as(grad_entropy, t.f), g_loss = as(grad_loss, t.f);
  const Tensor raw_f = dense(raw), pool = dense(saved_pool), shares = dense(slot_weights), loads = dense(loss_weights),
               zeros = dense(zero_rows);
  RouteBackward p{};
  p.in = t.input(temperature_value, pooling, clamp);
  const int64_t rows = p.in.rows, slots = p.in.slots, width = p.in.width, experts = p.in.experts;
  const bool with_query = need_params && p.in.pooling == Pooling::kAttention;
  Tensor d_hiddens = need_hiddens ? empty_cpu({rows, slots, width}, hiddens.scalar_type())
                                  : empty_cpu({0}, hiddens.scalar_type());
  Tensor d_weight = need_params ? empty_cpu({experts, width}, t.f) : empty_cpu({0}, t.f);
  Tensor d_bias = empty_cpu({need_params ? experts : 0}, t.f);
  Tensor d_temperature = need_temperature ? empty_cpu({}, t.f) : empty_cpu({0}, t.f);
  Tensor d_query = empty_cpu({with_query ? width : 0}, t.f);
  p.grad_probs = ptr<void>(g_probs);
  p.grad_logits = ptr<void>(g_logits);
  p.grad_entropy = ptr<void>(g_entropy);
  p.grad_loss = ptr<void>(g_loss);
  p.raw = raw_f.data_ptr();
  p.saved_pool = pool.data_ptr();
  p.slot_weights = shares.data_ptr();
  p.loss_weights = loads.data_ptr();
  p.zero_rows = ptr<uint8_t>(zeros);
  p.straight_through = straight_through;
  p.d_hiddens = need_hiddens ? d_hiddens.data_ptr() : nullptr;
  p.d_weight = need_params ? d_weight.data_ptr() : nullptr;
  p.d_bias = need_params ? d_bias.data_ptr() : nullptr;
  p.d_temperature = need_temperature ? d_temperature.data_ptr() : nullptr;
  p.d_query = with_query ? d_query.data_ptr() : nullptr;
  cpu::routing_table().route_backward(p, parallel_for);
  return {d_hiddens, as(d_weight, weight.scalar_type()), d_bias, d_temperature, d_query};
}

// Rows are everything before the last axis.
template <class P>
void set_rows(P& p, const Tensor& t) {
  p.dtype = dtype_of(t);
  p.size = t.size(t.dim() - 1);
  p.rows = p.size == 0 ? 0 : t.numel() / p.size;
}

Tensor like(const Tensor& t) {
  const auto sizes = t.sizes();
  return empty_cpu(sizes.data(), static_cast<int64_t>(sizes.size()), t.scalar_type());
}

Tensor temperature_softmax_fwd(const Tensor& logits, const OptTensor& temperature, double temperature_value,
                               double clamp) {
  const Tensor z = dense(logits);
  const OptTensor t = as(temperature, acc_type(logits));
  Tensor probs = like(z);
  RowSoftmax p{};
  set_rows(p, z);
  p.logits = z.data_ptr();
  p.temperature = ptr<void>(t);
  p.temperature_value = temperature_value;
  p.clamp = clamp;
  p.probs = probs.data_ptr();
  cpu::routing_table().softmax_forward(p, parallel_for);
  return probs;
}

std::tuple<Tensor, Tensor> temperature_softmax_bwd(const Tensor& grad, const Tensor& logits,
                                                   const OptTensor& temperature, double temperature_value, double clamp,
                                                   bool need_temperature) {
  const ScalarType f = acc_type(logits);
  const Tensor z = dense(logits), g = as(grad, logits.scalar_type());
  const OptTensor t = as(temperature, f);
  Tensor d_logits = like(z);
  Tensor d_temperature = need_temperature ? empty_cpu({}, f) : empty_cpu({0}, f);
  RowSoftmax p{};
  set_rows(p, z);
  p.logits = z.data_ptr();
  p.temperature = ptr<void>(t);
  p.temperature_value = temperature_value;
  p.clamp = clamp;
  p.grad = g.data_ptr();
  p.d_logits = d_logits.data_ptr();
  p.d_temperature = need_temperature ? d_temperature.data_ptr() : nullptr;
  cpu::routing_table().softmax_backward(p, parallel_for);
  return {d_logits, d_temperature};
}

Tensor routing_entropy_fwd(const Tensor& probs) {
  const Tensor x = dense(probs);
  const auto sizes = x.sizes();
  Tensor entropy = empty_cpu(sizes.data(), static_cast<int64_t>(sizes.size()) - 1, acc_type(probs));
  RowEntropy p{};
  set_rows(p, x);
  p.probs = x.data_ptr();
  p.entropy = entropy.data_ptr();
  cpu::routing_table().entropy_forward(p, parallel_for);
  return entropy;
}

Tensor routing_entropy_bwd(const Tensor& grad, const Tensor& probs) {
  const Tensor x = dense(probs), g = as(grad, acc_type(probs));
  Tensor d_probs = like(x);
  RowEntropy p{};
  set_rows(p, x);
  p.probs = x.data_ptr();
  p.grad = g.data_ptr();
  p.d_probs = d_probs.data_ptr();
  cpu::routing_table().entropy_backward(p, parallel_for);
  return d_probs;
}

std::tuple<Tensor, Tensor> load_balance_loss_fwd(const Tensor& probs, const OptTensor& row_mask) {
  const ScalarType f = acc_type(probs);
  const Tensor x = dense(probs);
  const OptTensor mask = dense(row_mask);
  Tensor loss = empty_cpu({}, f), loss_weights = empty_cpu({x.size(1)}, f);
  BalanceLoss p{};
  set_rows(p, x);
  p.probs = x.data_ptr();
  p.row_mask = ptr<uint8_t>(mask);
  p.loss = loss.data_ptr();
  p.loss_weights = loss_weights.data_ptr();
  cpu::routing_table().balance_forward(p, parallel_for);
  return {loss, loss_weights};
}

Tensor load_balance_loss_bwd(const Tensor& grad, const Tensor& probs, const OptTensor& row_mask,
                             const Tensor& loss_weights) {
  const Tensor x = dense(probs), g = as(grad, acc_type(probs)), weights = dense(loss_weights);
  const OptTensor mask = dense(row_mask);
  Tensor d_probs = like(x);
  BalanceLoss p{};
  set_rows(p, x);
  p.row_mask = ptr<uint8_t>(mask);
  p.grad = g.data_ptr();
  p.loss_weights = weights.data_ptr();
  p.d_probs = d_probs.data_ptr();
  cpu::routing_table().balance_backward(p, parallel_for);
  return d_probs;
}

}  // namespace

}  // namespace memkern::bind

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) {
  m.impl("route_experts_fwd_cpp", TORCH_BOX(&memkern::bind::route_experts_fwd));
  m.impl("route_experts_bwd_cpp", TORCH_BOX(&memkern::bind::route_experts_bwd));
  m.impl("temperature_softmax_fwd_cpp", TORCH_BOX(&memkern::bind::temperature_softmax_fwd));
  m.impl("temperature_softmax_bwd_cpp", TORCH_BOX(&memkern::bind::temperature_softmax_bwd));
  m.impl("routing_entropy_fwd_cpp", TORCH_BOX(&memkern::bind::routing_entropy_fwd));
  m.impl("routing_entropy_bwd_cpp", TORCH_BOX(&memkern::bind::routing_entropy_bwd));
  m.impl("load_balance_loss_fwd_cpp", TORCH_BOX(&memkern::bind::load_balance_loss_fwd));
  m.impl("load_balance_loss_bwd_cpp", TORCH_BOX(&memkern::bind::load_balance_loss_bwd));
}
