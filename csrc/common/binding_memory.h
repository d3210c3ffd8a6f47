// What both bindings of the memory column share: everything but how a backend takes a tensor, makes one, and runs a
// kernel. memkern/ops/memory/_schemas.py describes the raw operators.
//
// A Backend (bind_cpu/memory.h, bind_cuda/memory.h) is made for one call, from a tensor on its device, and has
//     Tensor take(const Tensor&)                                  an input in the layout of its kernels: contiguous, f
//     Tensor empty(const int64_t* sizes, int64_t dims, ScalarType)
//     void forward(const P&), void backward(const P&)             for each structure of ops/memory.h
#pragma once

#include <array>
#include <vector>

#include "common/binding.h"
#include "ops/memory.h"

namespace memkern::bind {

using Tensors = std::vector<Tensor>;

template <class Backend>
OptTensor take(const Backend& backend, const OptTensor& t) {
  return t ? OptTensor(backend.take(*t)) : t;
}
template <class Backend>
Tensors take_all(const Backend& backend, const Tensors& tensors) {
  Tensors result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.push_back(backend.take(t));
  return result;
}

inline MemoryFields<const void*> state_of(const Tensors& t) {
  return {t[0].data_ptr(), t[1].data_ptr(), t[2].data_ptr(), t[3].data_ptr(), t[4].data_ptr(), t[5].data_ptr()};
}

inline InterfaceFields<const void*> interface_of(const Tensors& t) {
  return {t[0].data_ptr(), t[1].data_ptr(), t[2].data_ptr(), t[3].data_ptr(), t[4].data_ptr(),
          t[5].data_ptr(), t[6].data_ptr(), t[7].data_ptr(), t[8].data_ptr(), t[9].data_ptr()};
}

// Inputs in the layout the kernels take, kept alive for the call; every = 0 is a step.
template <class Backend>
struct Recurrence {
  Recurrence(const Tensors& state_, const Tensors& interface_, const OptTensor& sharpness_, const OptTensor& mask_,
             bool track_usage, bool track_links, bool deallocate, bool detach_usage, int64_t every)
      : backend(first_of(state_, interface_)),
        state(take_all(backend, state_)),
        interface(take_all(backend, interface_)),
        sharpness(take(backend, sharpness_)),
        mask(dense(mask_)) {
    sizes.dtype = dtype_of(state[0]);
    sizes.batch = state[0].size(0);
    sizes.slots = state[0].size(1);
    sizes.width = state[0].size(2);
    sizes.read_heads = state[4].size(1);
    sizes.write_heads = state[5].size(1);
    sizes.steps = every == 0 ? 1 : interface[0].size(1);
    sizes.every = every == 0 ? 1 : every;
    sizes.track_usage = track_usage;
    sizes.track_links = track_links;
    sizes.deallocate = deallocate;
    sizes.detach_usage = detach_usage;
    scan = every != 0;
    f = state[0].scalar_type();
  }

  Tensor make(bool there, std::initializer_list<int64_t> shape) const {
    return there ? empty(backend, shape, f) : empty(backend, {0}, f);
  }
  // A saved row of each step: (T, B, ...) for a scan, (B, ...) for a step.
  Tensor history(bool there, int64_t rows, std::initializer_list<int64_t> shape) const {
    if (!there) return empty(backend, {0}, f);
    if (!scan) return empty(backend, shape, f);
    std::array<int64_t, 8> full{rows};
    int64_t dims = 1;
    for (int64_t size : shape) full[static_cast<size_t>(dims++)] = size;
    return backend.empty(full.data(), dims, f);
  }

  static const Tensor& first_of(const Tensors& state, const Tensors& interface) {
    STD_TORCH_CHECK(state.size() == 6 && interface.size() == 10, "expected 6 fields of state and 10 of interface");
    return state[0];
  }

  Backend backend;
  Tensors state, interface;
  OptTensor sharpness, mask;
  MemorySizes sizes{};
  ScalarType f = ScalarType::Float;
  bool scan = false;
};

template <class Backend>
Tensors recurrence_fwd(Recurrence<Backend>& r, bool save) {
  const MemorySizes& s = r.sizes;
  const int64_t b = s.batch, n = s.slots, w = s.width, reads = s.read_heads, writes = s.write_heads;
  const int64_t snapshots = (s.steps + s.every - 1) / s.every - 1;
  const bool sharp = r.sharpness.has_value();
  Tensors made;
  made.reserve(17);
  made.push_back(like(r.backend, r.interface[0]));
  made.push_back(r.make(true, {b, n, w}));
  made.push_back(r.make(s.track_usage, {b, n}));
  made.push_back(r.make(s.track_links, {b, writes, n, n}));
  made.push_back(r.make(s.track_links, {b, writes, n}));
  made.push_back(r.make(true, {b, reads, n}));
  made.push_back(r.make(true, {b, writes, n}));
  made.push_back(r.history(save, s.steps, {b, writes, n}));
  made.push_back(r.history(save && s.track_usage, s.steps, {b, writes, n}));
  made.push_back(r.history(save, s.steps, {b, reads, n}));
  made.push_back(r.history(save && sharp, s.steps, {b, reads, n}));
  if (r.scan) {
    made.push_back(r.history(save && s.track_usage, s.steps, {b, n}));
    made.push_back(r.history(save, s.steps, {b, reads, n}));
    made.push_back(r.history(save, s.steps, {b, writes, n}));
    made.push_back(r.history(save, snapshots, {b, n, w}));
    made.push_back(r.history(save && s.track_links, snapshots, {b, writes, n, n}));
    made.push_back(r.history(save && s.track_links, snapshots, {b, writes, n}));
  }
  MemoryForward p{};
  p.sizes = s;
  p.state = state_of(r.state);
  p.interface = interface_of(r.interface);
  p.sharpness = ptr<void>(r.sharpness);
  p.step_mask = ptr<uint8_t>(r.mask);
  p.reads = made[0].data_ptr();
  p.result = {made[1].data_ptr(), made[2].data_ptr(), made[3].data_ptr(),
              made[4].data_ptr(), made[5].data_ptr(), made[6].data_ptr()};
  if (save) {
    p.saved.write_content = made[7].data_ptr();
    p.saved.allocation = s.track_usage ? made[8].data_ptr() : nullptr;
    p.saved.read_content = made[9].data_ptr();
    p.saved.mixed = sharp ? made[10].data_ptr() : nullptr;
    if (r.scan) {
      p.saved.usage = s.track_usage ? made[11].data_ptr() : nullptr;
      p.saved.read_weights = made[12].data_ptr();
      p.saved.write_weights = made[13].data_ptr();
      p.saved.memory = made[14].data_ptr();
      p.saved.links = made[15].data_ptr();
      p.saved.precedence = made[16].data_ptr();
    }
  }
  r.backend.forward(p);
  return made;
}

using MemoryGrads = std::array<OptTensor, 7>;

template <class Backend>
Tensors recurrence_bwd(const MemoryGrads& grads_, Recurrence<Backend>& r, const Tensors& saved_) {
  const MemorySizes& s = r.sizes;
  const Tensors saved = take_all(r.backend, saved_);
  MemoryGrads grads;
  for (size_t i = 0; i < grads.size(); ++i) grads[i] = take(r.backend, grads_[i]);
  Tensors made;
  made.reserve(17);
  const bool there[] = {true, s.track_usage, s.track_links, s.track_links, true, true};
  for (size_t i = 0; i < 6; ++i) made.push_back(there[i] ? like(r.backend, r.state[i]) : r.make(false, {}));
  for (const Tensor& field : r.interface) made.push_back(like(r.backend, field));
  made.push_back(r.sharpness ? like(r.backend, *r.sharpness) : r.make(false, {}));
  MemoryBackward p{};
  p.sizes = s;
  p.state = state_of(r.state);
  p.interface = interface_of(r.interface);
  p.sharpness = ptr<void>(r.sharpness);
  p.step_mask = ptr<uint8_t>(r.mask);
  // A step's saved tensors: memory, usage, read_weights and write_weights after it, then the rows of a scan.
  const size_t rows = r.scan ? 0 : 4;
  auto saved_at = [&](size_t i) -> const void* { return saved[i].data_ptr(); };
  p.saved.write_content = saved_at(rows);
  p.saved.allocation = saved_at(rows + 1);
  p.saved.read_content = saved_at(rows + 2);
  p.saved.mixed = saved_at(rows + 3);
  if (r.scan) {
    p.saved.usage = saved_at(4);
    p.saved.read_weights = saved_at(5);
    p.saved.write_weights = saved_at(6);
    p.saved.memory = saved_at(7);
    p.saved.links = saved_at(8);
    p.saved.precedence = saved_at(9);
  } else {
    p.final_memory = saved_at(0);
    p.saved.usage = saved_at(1);
    p.saved.read_weights = saved_at(2);
    p.saved.write_weights = saved_at(3);
  }
  p.grad_reads = ptr<void>(grads[0]);
  p.grads = {ptr<void>(grads[1]), ptr<void>(grads[2]), ptr<void>(grads[3]),
             ptr<void>(grads[4]), ptr<void>(grads[5]), ptr<void>(grads[6])};
  if (s.batch > 0 && s.steps > 0) {
    p.d_state = {made[0].data_ptr(), made[1].data_ptr(), made[2].data_ptr(),
                 made[3].data_ptr(), made[4].data_ptr(), made[5].data_ptr()};
  }
  p.d_interface = {made[6].data_ptr(),  made[7].data_ptr(),  made[8].data_ptr(),  made[9].data_ptr(),
                   made[10].data_ptr(), made[11].data_ptr(), made[12].data_ptr(), made[13].data_ptr(),
                   made[14].data_ptr(), made[15].data_ptr()};
  p.d_sharpness = r.sharpness ? made[16].data_ptr() : nullptr;
  r.backend.backward(p);
  return made;
}

template <class Backend>
Tensors memory_step_fwd(const Tensors& state, const Tensors& interface, const OptTensor& sharpness,
                        const OptTensor& step_mask, bool track_usage, bool track_links, bool deallocate, bool save) {
  Recurrence<Backend> r(state, interface, sharpness, step_mask, track_usage, track_links, deallocate, false, 0);
  return recurrence_fwd(r, save);
}

template <class Backend>
Tensors memory_scan_fwd(const Tensors& state, const Tensors& interface, const OptTensor& sharpness,
                        const OptTensor& step_mask, bool track_usage, bool track_links, bool deallocate,
                        int64_t checkpoint_every, bool save) {
  Recurrence<Backend> r(state, interface, sharpness, step_mask, track_usage, track_links, deallocate, false,
                        checkpoint_every);
  return recurrence_fwd(r, save);
}

template <class Backend>
Tensors memory_step_bwd(const OptTensor& d_reads, const OptTensor& d_memory, const OptTensor& d_usage,
                        const OptTensor& d_links, const OptTensor& d_precedence, const OptTensor& d_read_weights,
                        const OptTensor& d_write_weights, const Tensors& state, const Tensors& interface,
                        const OptTensor& sharpness, const OptTensor& step_mask, const Tensors& saved, bool track_usage,
                        bool track_links, bool deallocate, bool detach_usage) {
  Recurrence<Backend> r(state, interface, sharpness, step_mask, track_usage, track_links, deallocate, detach_usage, 0);
  return recurrence_bwd({d_reads, d_memory, d_usage, d_links, d_precedence, d_read_weights, d_write_weights}, r, saved);
}

template <class Backend>
Tensors memory_scan_bwd(const OptTensor& d_reads, const OptTensor& d_memory, const OptTensor& d_usage,
                        const OptTensor& d_links, const OptTensor& d_precedence, const OptTensor& d_read_weights,
                        const OptTensor& d_write_weights, const Tensors& state, const Tensors& interface,
                        const OptTensor& sharpness, const OptTensor& step_mask, const Tensors& saved, bool track_usage,
                        bool track_links, bool deallocate, bool detach_usage, int64_t checkpoint_every) {
  Recurrence<Backend> r(state, interface, sharpness, step_mask, track_usage, track_links, deallocate, detach_usage,
                        checkpoint_every);
  return recurrence_bwd({d_reads, d_memory, d_usage, d_links, d_precedence, d_read_weights, d_write_weights}, r, saved);
}

}  // namespace memkern::bind
