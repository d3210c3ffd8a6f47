// What both bindings of the routing column share: its inputs in the layout of the kernels, and the one buffer in which
// forward leaves what backward reads. memkern/ops/routing/_schemas.py describes the raw operators.
#pragma once

#include <utility>

#include "common/binding.h"
#include "ops/routing.h"

namespace memkern::bind {

// Inputs in the layout the kernels take, kept alive for the call. Weight, temperature and query come in the dtype and
// density that the backend wants.
struct RouteTensors {
  RouteTensors(const Tensor& hiddens_, Tensor weight_, OptTensor temperature_, OptTensor query_,
               const OptTensor& slot_mask_, const OptTensor& row_mask_)
      : hiddens(hiddens_.size(2) <= 1 || hiddens_.stride(2) == 1 ? hiddens_ : dense(hiddens_)),
        weight(std::move(weight_)),
        temperature(std::move(temperature_)),
        query(std::move(query_)),
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

  Tensor hiddens, weight;
  OptTensor temperature, query, slot_mask, row_mask;
};

// Where each part of what backward reads lies in one buffer of f: a tensor of its own would cost each part a microsecond
// both ways. In elements of f; a part starts at a multiple of 16.
struct SavedLayout {
  explicit SavedLayout(const RouteInput& in) {
    raw = take(in.rows * in.experts);
    pool = take(in.slots != 1 ? in.rows * in.width : 0);
    slot_weights = take(in.pooling == Pooling::kAttention ? in.rows * in.slots : 0);
    loss_weights = take(in.experts);
    zero_rows = take((in.rows + 3) / 4);  // a byte each
  }

  // Points a RouteForward or RouteBackward into the buffer.
  template <class P>
  void point(P& p, const Tensor& saved, ScalarType f) const {
    auto* base = static_cast<char*>(saved.data_ptr());
    const int64_t size = f == ScalarType::Double ? 8 : 4;
    p.raw = base + size * raw;
    p.saved_pool = p.in.slots != 1 ? base + size * pool : nullptr;
    p.slot_weights = p.in.pooling == Pooling::kAttention ? base + size * slot_weights : nullptr;
    p.loss_weights = base + size * loss_weights;
    p.zero_rows = reinterpret_cast<uint8_t*>(base + size * zero_rows);
  }

  int64_t raw, pool, slot_weights, loss_weights, zero_rows, size = 0;

 private:
  int64_t take(int64_t count) {
    const int64_t first = size;
    size += (count + 15) / 16 * 16;
    return first;
  }
};

// What forward returns; `empty(sizes, dtype)` makes a tensor on the backend's device.
struct RouteOutputs {
  template <class Empty>
  RouteOutputs(RouteForward& p, ScalarType dtype, ScalarType f, bool save, const Empty& empty)
      : probs(empty({p.in.rows, p.in.experts}, dtype)),
        logits(empty({p.in.rows, p.in.experts}, f)),
        entropy(empty({p.in.rows}, f)),
        loss(empty({}, f)),
        saved(empty({save ? SavedLayout(p.in).size : 0}, f)) {
    p.probs = probs.data_ptr();
    p.logits = logits.data_ptr();
    p.entropy = entropy.data_ptr();
    p.loss = loss.data_ptr();
    if (save) SavedLayout(p.in).point(p, saved, f);
  }

  Tensor probs, logits, entropy, loss, saved;
};

// The gradients that backward returns, each empty where it is not needed.
struct RouteGradients {
  template <class Empty>
  RouteGradients(RouteBackward& p, ScalarType dtype, ScalarType weight, ScalarType f, bool need_hiddens,
                 bool need_params, bool need_temperature, const Empty& empty)
      : hiddens(need_hiddens ? empty({p.in.rows, p.in.slots, p.in.width}, dtype) : empty({0}, dtype)),
        weight(need_params ? empty({p.in.experts, p.in.width}, weight) : empty({0}, weight)),
        bias(empty({need_params ? p.in.experts : 0}, f)),
        temperature(need_temperature ? empty({}, f) : empty({0}, f)),
        query(empty({need_params && p.in.pooling == Pooling::kAttention ? p.in.width : 0}, f)) {
    p.d_hiddens = need_hiddens ? hiddens.data_ptr() : nullptr;
    p.d_weight = need_params ? this->weight.data_ptr() : nullptr;
    p.d_bias = need_params ? bias.data_ptr() : nullptr;
    p.d_temperature = need_temperature ? temperature.data_ptr() : nullptr;
    p.d_query = need_params && p.in.pooling == Pooling::kAttention ? query.data_ptr() : nullptr;
  }

  Tensor hiddens, weight, bias, temperature, query;
};

// Rows are everything before the last axis.
template <class P>
void set_rows(P& p, const Tensor& t) {
  p.dtype = dtype_of(t);
  p.size = t.size(t.dim() - 1);
  p.rows = p.size == 0 ? 0 : t.numel() / p.size;
}

inline RowSoftmax softmax_of(const Tensor& z, const OptTensor& temperature, double temperature_value, double clamp) {
  RowSoftmax p{};
  set_rows(p, z);
  p.logits = z.data_ptr();
  p.temperature = ptr<void>(temperature);
  p.temperature_value = temperature_value;
  p.clamp = clamp;
  return p;
}

}  // namespace memkern::bind
