// The routing column on CUDA: torch tensors to the launchers of cuda/routing/routing.h.
#include "bind_cuda/common.h"

#include <tuple>

#include "cuda/routing/routing.h"

namespace memkern::bind {

namespace {

const ScalarType kFloat = ScalarType::Float;

DType type_or_float(const OptTensor& t) { return t ? dtype_of(*t) : DType::kF32; }

// Inputs in the layout the kernels take, kept alive for the call.
struct RouteTensors {
  RouteTensors(const Tensor& hiddens_, const Tensor& weight_, const OptTensor& temperature_, const OptTensor& query_,
               const OptTensor& slot_mask_, const OptTensor& row_mask_)
      : hiddens(hiddens_.size(2) <= 1 || hiddens_.stride(2) == 1 ? hiddens_ : dense(hiddens_)),
        weight(weight_.scalar_type() == hiddens_.scalar_type() ? dense(weight_) : as(weight_, kFloat)),
        temperature(temperature_),
        query(dense(query_)),
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
  cuda::ParamTypes types(const OptTensor& bias) const {
    return {dtype_of(weight), type_or_float(bias), type_or_float(query), type_or_float(temperature)};
  }

  Tensor hiddens, weight;
  OptTensor temperature, query, slot_mask, row_mask;
};

void zero(Tensor& t) { torch::stable::zero_(t); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_experts_fwd(
    const Tensor& hiddens, const Tensor& weight, const OptTensor& bias, const OptTensor& temperature,
    double temperature_value, int64_t pooling, const OptTensor& pool_query, const OptTensor& slot_mask,
    const OptTensor& row_mask, double clamp, bool save) {
  Launch launch(hiddens);
  const RouteTensors t(hiddens, weight, temperature, pool_query, slot_mask, row_mask);
  const OptTensor bias_dense = dense(bias);
  RouteForward p{};
  p.in = t.input(temperature_value, pooling, clamp);
  const int64_t rows = p.in.rows, slots = p.in.slots, width = p.in.width, experts = p.in.experts;
  const bool max = p.in.pooling == Pooling::kMax, attention = p.in.pooling == Pooling::kAttention;
  Tensor probs = launch.empty({rows, experts}, hiddens.scalar_type());
  Tensor logits = launch.empty({rows, experts}, kFloat);
  Tensor entropy = launch.empty({rows}, kFloat);
  Tensor loss = launch.empty({}, kFloat);
  Tensor raw = save ? launch.empty({rows, experts}, kFloat) : launch.empty({0}, kFloat);
  Tensor saved_pool =
      save && slots != 1 ? launch.empty({rows, width}, max ? ScalarType::Int : kFloat) : launch.empty({0}, kFloat);
  Tensor slot_weights = save && attention ? launch.empty({rows, slots}, kFloat) : launch.empty({0}, kFloat);
  Tensor loss_weights = save ? launch.empty({experts}, kFloat) : launch.empty({0}, kFloat);
  Tensor zero_rows = launch.empty({save ? rows : 0}, ScalarType::Bool);
  if (rows == 0) {
    zero(loss);
    zero(loss_weights);
    return {probs, logits, entropy, loss, raw, saved_pool, slot_weights, loss_weights, zero_rows};
  }
  p.bias = ptr<void>(bias_dense);
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
  if (attention && !save) scores = launch.empty({rows, slots}, kFloat);
  w.partial = partial ? out_ptr<float>(*partial) : nullptr;
  w.large = large ? out_ptr<int32_t>(*large) : nullptr;
  w.scores = scores ? out_ptr<float>(*scores) : nullptr;
  w.terms = out_ptr<float>(terms);
  w.groups = out_ptr<float>(group_terms);
  w.tickets = launch.tickets(1 + groups + (w.splits > 1 ? rows : 0));
  launch.check(cuda::route_forward(p, t.types(bias_dense), w, launch.stream()));
  return {probs, logits, entropy, loss, raw, saved_pool, slot_weights, loss_weights, zero_rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_experts_bwd(
    const OptTensor& grad_probs, const OptTensor& grad_logits, const OptTensor& grad_entropy, const OptTensor& grad_loss,
    const Tensor& hiddens, const Tensor& weight, const OptTensor& temperature, double temperature_value, int64_t pooling,
    const OptTensor& pool_query, const OptTensor& slot_mask, const OptTensor& row_mask, const Tensor& raw,
    const Tensor& saved_pool, const Tensor& slot_weights, const Tensor& loss_weights, const Tensor& zero_rows,
    double clamp, bool straight_through, bool need_hiddens, bool need_params, bool need_temperature) {
  Launch launch(hiddens);
  const RouteTensors t(hiddens, weight, temperature, pool_query, slot_mask, row_mask);
  const OptTensor g_probs = as(grad_probs, hiddens.scalar_type()), g_logits = as(grad_logits, kFloat),
                  g_entropy = as(grad_entropy, kFloat), g_loss = as(grad_loss, kFloat);
  const Tensor raw_f = dense(raw), pool = dense(saved_pool), shares = dense(slot_weights), loads = dense(loss_weights),
               zeros = dense(zero_rows);
  RouteBackward p{};
  p.in = t.input(temperature_value, pooling, clamp);
  const int64_t rows = p.in.rows, slots = p.in.slots, width = p.in.width, experts = p.in.experts;
  const bool attention = p.in.pooling == Pooling::kAttention, with_query = need_params && attention;
  Tensor d_hiddens = need_hiddens ? launch.empty({rows, slots, width}, hiddens.scalar_type())
                                  : launch.empty({0}, hiddens.scalar_type());
  Tensor d_weight = need_params ? launch.empty({experts, width}, t.weight.scalar_type())
                                : launch.empty({0}, t.weight.scalar_type());
  Tensor d_bias = launch.empty({need_params ? experts : 0}, kFloat);
  Tensor d_temperature = need_temperature ? launch.empty({}, kFloat) : launch.empty({0}, kFloat);
  Tensor d_query = launch.empty({with_query ? width : 0}, kFloat);
  if (rows == 0) {
    for (Tensor* out : {&d_hiddens, &d_weight, &d_bias, &d_temperature, &d_query}) zero(*out);
    return {d_hiddens, as(d_weight, weight.scalar_type()), d_bias, d_temperature, d_query};
  }
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
  const cuda::ParamTypes types = t.types(std::nullopt);
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
  return {d_hiddens, as(d_weight, weight.scalar_type()), d_bias, d_temperature, d_query};
}

// Rows are everything before the last axis.
template <class P>
void set_rows(P& p, const Tensor& t) {
  p.dtype = dtype_of(t);
  p.size = t.size(t.dim() - 1);
  p.rows = p.size == 0 ? 0 : t.numel() / p.size;
}

Tensor like(const Launch& launch, const Tensor& t) {
  const auto sizes = t.sizes();
  return launch.empty(sizes.data(), static_cast<int64_t>(sizes.size()), t.scalar_type());
}

RowSoftmax softmax_of(const Tensor& z, const OptTensor& temperature, double temperature_value, double clamp) {
  RowSoftmax p{};
  set_rows(p, z);
  p.logits = z.data_ptr();
  p.temperature = ptr<void>(temperature);
  p.temperature_value = temperature_value;
  p.clamp = clamp;
  return p;
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
