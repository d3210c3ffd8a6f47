// The routing column on CUDA: torch tensors to the launchers of cuda/routing/routing.h.
#include "bind_cuda/common.h"

#include <tuple>

#include "common/binding_routing.h"
#include "cuda/routing/routing.h"

namespace memkern::bind {

namespace {

const ScalarType kFloat = ScalarType::Float;

DType type_or_float(const OptTensor& t) { return t ? dtype_of(*t) : DType::kF32; }

RouteTensors inputs(const Tensor& hiddens, const Tensor& weight, const OptTensor& temperature, const OptTensor& query,
                    const OptTensor& slot_mask, const OptTensor& row_mask) {
  return {hiddens, weight.scalar_type() == hiddens.scalar_type() ? dense(weight) : as(weight, kFloat), temperature,
          dense(query), slot_mask, row_mask};
}

cuda::ParamTypes types_of(const RouteTensors& t, const OptTensor& bias) {
  return {dtype_of(t.weight), type_or_float(bias), type_or_float(t.query), type_or_float(t.temperature)};
}

// Makes outputs on the device of a launch.
auto on(const Launch& launch) {
  return [&launch](std::initializer_list<int64_t> sizes, ScalarType dtype) { return launch.empty(sizes, dtype); };
}

void zero(Tensor& t) { torch::stable::zero_(t); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_experts_fwd(
    const Tensor& hiddens, const Tensor& weight, const OptTensor& bias, const OptTensor& temperature,
    double temperature_value, int64_t pooling, const OptTensor& pool_query, const OptTensor& slot_mask,
    const OptTensor& row_mask, double clamp, bool save) {
  Launch launch(hiddens);
  const RouteTensors t = inputs(hiddens, weight, temperature, pool_query, slot_mask, row_mask);
  const OptTensor bias_dense = dense(bias);
  RouteForward p{};
  p.in = t.input(temperature_value, pooling, clamp);
  p.bias = ptr<void>(bias_dense);
  const int64_t rows = p.in.rows, slots = p.in.slots, experts = p.in.experts;
  RouteOutputs out(p, hiddens.scalar_type(), kFloat, save, on(launch));
  if (rows == 0) {
    zero(out.loss);
    zero(out.saved);
    return {out.probs, out.logits, out.entropy, out.loss, out.saved};
  }
  cuda::RouteWorkspace w{};
  cuda::route_splits(p.in, w);
  const int64_t groups = cuda::group_count(rows);
  const Tensor terms = launch.empty({rows, experts + 1}, kFloat);
  const Tensor group_terms = launch.empty({groups, 2 * experts + 1}, kFloat);
  OptTensor partial, large, scores;
  if (w.splits > 1) {
    partial = launch.empty({w.splits, rows, experts}, kFloat);
    large = launch.empty({w.splits, rows}, ScalarType::Int);
  }
  if (p.in.pooling == Pooling::kAttention && !save) scores = launch.empty({rows, slots}, kFloat);
  w.partial = partial ? out_ptr<float>(*partial) : nullptr;
  w.large = large ? out_ptr<int32_t>(*large) : nullptr;
  w.scores = scores ? out_ptr<float>(*scores) : nullptr;
  w.terms = out_ptr<float>(terms);
  w.groups = out_ptr<float>(group_terms);
  w.tickets = launch.tickets(1 + groups + (w.splits > 1 ? rows : 0));
  launch.check(cuda::route_forward(p, types_of(t, bias_dense), w, launch.stream()));
  return {out.probs, out.logits, out.entropy, out.loss, out.saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_experts_bwd(
    const OptTensor& grad_probs, const OptTensor& grad_logits, const OptTensor& grad_entropy, const OptTensor& grad_loss,
    const Tensor& hiddens, const Tensor& weight, const OptTensor& temperature, double temperature_value, int64_t pooling,
    const OptTensor& pool_query, const OptTensor& slot_mask, const OptTensor& row_mask, const Tensor& saved,
    double clamp, bool straight_through, bool need_hiddens, bool need_params, bool need_temperature) {
  Launch launch(hiddens);
  const RouteTensors t = inputs(hiddens, weight, temperature, pool_query, slot_mask, row_mask);
  const OptTensor g_probs = as(grad_probs, hiddens.scalar_type()), g_logits = as(grad_logits, kFloat),
                  g_entropy = as(grad_entropy, kFloat), g_loss = as(grad_loss, kFloat);
  const Tensor state = dense(saved);
  RouteBackward p{};
  p.in = t.input(temperature_value, pooling, clamp);
  const int64_t rows = p.in.rows, slots = p.in.slots, width = p.in.width, experts = p.in.experts;
  const bool attention = p.in.pooling == Pooling::kAttention, with_query = need_params && attention;
  RouteGradients out(p, hiddens.scalar_type(), t.weight.scalar_type(), kFloat, need_hiddens, need_params,
                     need_temperature, on(launch));
  if (rows == 0) {
    for (Tensor* gradient : {&out.hiddens, &out.weight, &out.bias, &out.temperature, &out.query}) zero(*gradient);
    return {out.hiddens, as(out.weight, weight.scalar_type()), out.bias, out.temperature, out.query};
  }
  SavedLayout(p.in).point(p, state, kFloat);
  p.grad_probs = ptr<void>(g_probs);
  p.grad_logits = ptr<void>(g_logits);
  p.grad_entropy = ptr<void>(g_entropy);
  p.grad_loss = ptr<void>(g_loss);
  p.straight_through = straight_through;
  cuda::RouteWorkspace w{};
  cuda::route_splits(p.in, w);
  if (!need_hiddens) w.splits = 1;
  const int64_t groups = cuda::group_count(rows);
  const Tensor terms = launch.empty({rows, experts + 1}, kFloat);
  const Tensor group_terms = launch.empty({groups, experts + 1}, kFloat);
  OptTensor d_pool, scores, query_parts, d_raw;
  if (attention) {
    d_pool = launch.empty({rows, width}, kFloat);
    scores = launch.empty({rows, slots}, kFloat);
  }
  if (with_query) query_parts = launch.empty({rows, width}, kFloat);
  if (need_params) d_raw = launch.empty({rows, experts}, kFloat);
  w.terms = out_ptr<float>(terms);
  w.groups = out_ptr<float>(group_terms);
  w.pooled = d_pool ? out_ptr<float>(*d_pool) : nullptr;
  w.scores = scores ? out_ptr<float>(*scores) : nullptr;
  w.query_parts = query_parts ? out_ptr<float>(*query_parts) : nullptr;
  w.tickets = launch.tickets(1 + groups);
  float* d_raw_data = d_raw ? out_ptr<float>(*d_raw) : nullptr;
  const cuda::ParamTypes types = types_of(t, std::nullopt);
  launch.check(cuda::route_backward_rows(p, types, w, d_raw_data, launch.stream()));
  if (need_params && width > 0) {
    cuda::WeightWorkspace v{};
    const int64_t tiles = cuda::weight_splits(p.in, v);
    OptTensor partial, query_partial;
    if (v.splits > 1) {
      partial = launch.empty({v.splits, experts, width}, kFloat);
      query_partial = launch.empty({v.splits, width}, kFloat);
    }
    v.partial = partial ? out_ptr<float>(*partial) : nullptr;
    v.query_partial = query_partial ? out_ptr<float>(*query_partial) : nullptr;
    v.tickets = launch.tickets(tiles);
    launch.check(cuda::route_backward_weight(p, types, v, d_raw_data, w.query_parts, launch.stream()));
  }
  return {out.hiddens, as(out.weight, weight.scalar_type()), out.bias, out.temperature, out.query};
}

Tensor like(const Launch& launch, const Tensor& t) {
  const auto sizes = t.sizes();
  return launch.empty(sizes.data(), static_cast<int64_t>(sizes.size()), t.scalar_type());
}

Tensor temperature_softmax_fwd(const Tensor& logits, const OptTensor& temperature, double temperature_value,
                               double clamp) {
  Launch launch(logits);
  const Tensor z = dense(logits);
  Tensor probs = like(launch, z);
  RowSoftmax p = softmax_of(z, temperature, temperature_value, clamp);
  p.probs = probs.data_ptr();
  if (p.rows > 0) launch.check(cuda::softmax_forward(p, type_or_float(temperature), launch.stream()));
  return probs;
}

std::tuple<Tensor, Tensor> temperature_softmax_bwd(const Tensor& grad, const Tensor& logits,
                                                   const OptTensor& temperature, double temperature_value, double clamp,
                                                   bool need_temperature) {
  Launch launch(logits);
  const Tensor z = dense(logits), g = as(grad, logits.scalar_type());
  Tensor d_logits = like(launch, z);
  Tensor d_temperature = need_temperature ? launch.empty({}, kFloat) : launch.empty({0}, kFloat);
  RowSoftmax p = softmax_of(z, temperature, temperature_value, clamp);
  if (p.rows == 0) {
    zero(d_temperature);
    return {d_logits, d_temperature};
  }
  p.grad = g.data_ptr();
  p.d_logits = d_logits.data_ptr();
  p.d_temperature = need_temperature ? d_temperature.data_ptr() : nullptr;
  const Tensor groups = launch.empty({cuda::group_count(p.rows)}, kFloat);
  launch.check(cuda::softmax_backward(p, type_or_float(temperature), out_ptr<float>(groups), launch.tickets(1),
                                      launch.stream()));
  return {d_logits, d_temperature};
}

Tensor routing_entropy_fwd(const Tensor& probs) {
  Launch launch(probs);
  const Tensor x = dense(probs);
  const auto sizes = x.sizes();
  Tensor entropy = launch.empty(sizes.data(), static_cast<int64_t>(sizes.size()) - 1, kFloat);
  RowEntropy p{};
  set_rows(p, x);
  p.probs = x.data_ptr();
  p.entropy = entropy.data_ptr();
  if (p.rows > 0) launch.check(cuda::entropy_forward(p, launch.stream()));
  return entropy;
}

Tensor routing_entropy_bwd(const Tensor& grad, const Tensor& probs) {
  Launch launch(probs);
  const Tensor x = dense(probs), g = as(grad, kFloat);
  Tensor d_probs = like(launch, x);
  RowEntropy p{};
  set_rows(p, x);
  p.probs = x.data_ptr();
  p.grad = g.data_ptr();
  p.d_probs = d_probs.data_ptr();
  if (p.rows > 0) launch.check(cuda::entropy_backward(p, launch.stream()));
  return d_probs;
}

std::tuple<Tensor, Tensor> load_balance_loss_fwd(const Tensor& probs, const OptTensor& row_mask) {
  Launch launch(probs);
  const Tensor x = dense(probs);
  const OptTensor mask = dense(row_mask);
  Tensor loss = launch.empty({}, kFloat), loss_weights = launch.empty({x.size(1)}, kFloat);
  BalanceLoss p{};
  set_rows(p, x);
  if (p.rows == 0) {
    zero(loss);
    zero(loss_weights);
    return {loss, loss_weights};
  }
  p.probs = x.data_ptr();
  p.row_mask = ptr<uint8_t>(mask);
  p.loss = loss.data_ptr();
  p.loss_weights = loss_weights.data_ptr();
  const Tensor groups = launch.empty({cuda::group_count(p.rows), 2 * p.size + 1}, kFloat);
  launch.check(cuda::balance_forward(p, out_ptr<float>(groups), launch.tickets(1), launch.stream()));
  return {loss, loss_weights};
}

Tensor load_balance_loss_bwd(const Tensor& grad, const Tensor& probs, const OptTensor& row_mask,
                             const Tensor& loss_weights) {
  Launch launch(probs);
  const Tensor x = dense(probs), g = as(grad, kFloat), weights = dense(loss_weights);
  const OptTensor mask = dense(row_mask);
  Tensor d_probs = like(launch, x);
  BalanceLoss p{};
  set_rows(p, x);
  p.row_mask = ptr<uint8_t>(mask);
  p.grad = g.data_ptr();
  p.loss_weights = weights.data_ptr();
  p.d_probs = d_probs.data_ptr();
  if (p.rows > 0) launch.check(cuda::balance_backward(p, launch.stream()));
  return d_probs;
}

}  // namespace

}  // namespace memkern::bind

STABLE_TORCH_LIBRARY_IMPL(memkern, CUDA, m) {
  m.impl("route_experts_fwd_cuda", TORCH_BOX(&memkern::bind::route_experts_fwd));
  m.impl("route_experts_bwd_cuda", TORCH_BOX(&memkern::bind::route_experts_bwd));
  m.impl("temperature_softmax_fwd_cuda", TORCH_BOX(&memkern::bind::temperature_softmax_fwd));
  m.impl("temperature_softmax_bwd_cuda", TORCH_BOX(&memkern::bind::temperature_softmax_bwd));
  m.impl("routing_entropy_fwd_cuda", TORCH_BOX(&memkern::bind::routing_entropy_fwd));
  m.impl("routing_entropy_bwd_cuda", TORCH_BOX(&memkern::bind::routing_entropy_bwd));
  m.impl("load_balance_loss_fwd_cuda", TORCH_BOX(&memkern::bind::load_balance_loss_fwd));
  m.impl("load_balance_loss_bwd_cuda", TORCH_BOX(&memkern::bind::load_balance_loss_bwd));
}
