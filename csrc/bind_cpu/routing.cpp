// The routing column on the CPU: torch tensors to the plain functions of ops/routing.h.
#include "bind_cpu/common.h"

#include <tuple>
#include <utility>

#include "common/binding_routing.h"
#include "cpu/dispatch.h"

MK_CPU_TABLE(RoutingTable, routing)

namespace memkern::bind {

namespace {

RouteTensors inputs(const Tensor& hiddens, const Tensor& weight, const OptTensor& temperature, const OptTensor& query,
                    const OptTensor& slot_mask, const OptTensor& row_mask) {
  const ScalarType f = acc_type(hiddens);
  return {hiddens, as(weight, f), as(temperature, f), as(query, f), slot_mask, row_mask};
}

const auto empty = [](std::initializer_list<int64_t> sizes, ScalarType dtype) { return empty_cpu(sizes, dtype); };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_experts_fwd(
    const Tensor& hiddens, const Tensor& weight, const OptTensor& bias, const OptTensor& temperature,
    double temperature_value, int64_t pooling, const OptTensor& pool_query, const OptTensor& slot_mask,
    const OptTensor& row_mask, double clamp, bool save) {
  const ScalarType f = acc_type(hiddens);
  const RouteTensors t = inputs(hiddens, weight, temperature, pool_query, slot_mask, row_mask);
  const OptTensor bias_f = as(bias, f);
  RouteForward p{};
  p.in = t.input(temperature_value, pooling, clamp);
  p.bias = ptr<void>(bias_f);
  RouteOutputs out(p, hiddens.scalar_type(), f, save, empty);
  cpu::routing_table().route_forward(p, parallel_for);
  return {std::move(out.probs), std::move(out.logits), std::move(out.entropy), std::move(out.loss),
          std::move(out.saved)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_experts_bwd(
    const OptTensor& grad_probs, const OptTensor& grad_logits, const OptTensor& grad_entropy, const OptTensor& grad_loss,
    const Tensor& hiddens, const Tensor& weight, const OptTensor& temperature, double temperature_value, int64_t pooling,
    const OptTensor& pool_query, const OptTensor& slot_mask, const OptTensor& row_mask, const Tensor& saved,
    double clamp, bool straight_through, bool need_hiddens, bool need_params, bool need_temperature) {
  const ScalarType f = acc_type(hiddens);
  const RouteTensors t = inputs(hiddens, weight, temperature, pool_query, slot_mask, row_mask);
  const OptTensor g_probs = as(grad_probs, hiddens.scalar_type()), g_logits = as(grad_logits, f),
                  g_entropy = as(grad_entropy, f), g_loss = as(grad_loss, f);
  const Tensor state = dense(saved);
  RouteBackward p{};
  p.in = t.input(temperature_value, pooling, clamp);
  SavedLayout(p.in).point(p, state, f);
  p.grad_probs = ptr<void>(g_probs);
  p.grad_logits = ptr<void>(g_logits);
  p.grad_entropy = ptr<void>(g_entropy);
  p.grad_loss = ptr<void>(g_loss);
  p.straight_through = straight_through;
  RouteGradients out(p, hiddens.scalar_type(), f, f, need_hiddens, need_params, need_temperature, empty);
  cpu::routing_table().route_backward(p, parallel_for);
  return {std::move(out.hiddens), as(out.weight, weight.scalar_type()), std::move(out.bias), std::move(out.temperature),
          std::move(out.query)};
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
  RowSoftmax p = softmax_of(z, t, temperature_value, clamp);
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
  RowSoftmax p = softmax_of(z, t, temperature_value, clamp);
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
