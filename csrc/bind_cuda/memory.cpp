// memkern::memory_step_*_cuda and memory_scan_*_cuda.
#include "bind_cuda/memory.h"

#include <array>
#include <tuple>
#include <vector>

namespace memkern::bind {

namespace {

using Tensors = std::vector<Tensor>;

Tensors floats(const Tensors& tensors) {
  Tensors result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.push_back(as_floats(t));
  return result;
}

MemoryFields<const void*> state_of(const Tensors& t) {
  return {t[0].data_ptr(), t[1].data_ptr(), t[2].data_ptr(), t[3].data_ptr(), t[4].data_ptr(), t[5].data_ptr()};
}

InterfaceFields<const void*> interface_of(const Tensors& t) {
  return {t[0].data_ptr(), t[1].data_ptr(), t[2].data_ptr(), t[3].data_ptr(), t[4].data_ptr(),
          t[5].data_ptr(), t[6].data_ptr(), t[7].data_ptr(), t[8].data_ptr(), t[9].data_ptr()};
}

// Inputs in the layout the kernels take, kept alive for the call; every = 0 is a step.
struct Recurrence {
  Recurrence(const Tensors& state_, const Tensors& interface_, const OptTensor& sharpness_, const OptTensor& mask_,
             bool track_usage, bool track_links, bool deallocate, bool detach_usage, int64_t every)
      : launch(state_[0]),
        state(floats(state_)),
        interface(floats(interface_)),
        sharpness(as_floats(sharpness_)),
        mask(dense(mask_)) {
    STD_TORCH_CHECK(state.size() == 6 && interface.size() == 10, "expected 6 fields of state and 10 of interface");
    sizes.dtype = DType::kF32;
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
  }

  Tensor make(bool there, std::initializer_list<int64_t> shape) const {
    return there ? floats_of(launch, shape) : floats_of(launch, {0});
  }
  // A saved row of each step: (T, B, ...) for a scan, (B, ...) for a step.
  Tensor history(bool there, int64_t rows, std::initializer_list<int64_t> shape) const {
    if (!there) return floats_of(launch, {0});
    if (!scan) return floats_of(launch, shape);
    std::array<int64_t, 8> full{rows};
    int64_t dims = 1;
    for (int64_t size : shape) full[static_cast<size_t>(dims++)] = size;
    return launch.empty(full.data(), dims, ScalarType::Float);
  }

  Launch launch;
  Tensors state, interface;
  OptTensor sharpness, mask;
  MemorySizes sizes{};
  bool scan = false;
};

Tensors recurrence_fwd(Recurrence&& r, bool save) {
  const MemorySizes& s = r.sizes;
  const int64_t b = s.batch, n = s.slots, w = s.width, reads = s.read_heads, writes = s.write_heads;
  const int64_t snapshots = (s.steps + s.every - 1) / s.every - 1;
  const bool sharp = r.sharpness.has_value();
  Tensors made;
  made.reserve(17);
  made.push_back(like(r.launch, r.interface[0]));
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
  const Tensor scratch = floats_of(r.launch, {cuda::memory_forward_scratch(s)});
  r.launch.check(cuda::memory_forward(p, out_ptr<float>(scratch), r.launch.tickets(s.batch), r.launch.stream()));
  return made;
}

using Grads = std::array<OptTensor, 7>;

Tensors recurrence_bwd(const Grads& grads_, Recurrence&& r, const Tensors& saved_) {
  const MemorySizes& s = r.sizes;
  const Tensors saved = floats(saved_);
  Grads grads;
  for (size_t i = 0; i < grads.size(); ++i) grads[i] = as_floats(grads_[i]);
  Tensors made;
  made.reserve(17);
  const bool there[] = {true, s.track_usage, s.track_links, s.track_links, true, true};
  for (size_t i = 0; i < 6; ++i) made.push_back(there[i] ? like(r.launch, r.state[i]) : r.make(false, {}));
  for (const Tensor& field : r.interface) made.push_back(like(r.launch, field));
  made.push_back(r.sharpness ? like(r.launch, *r.sharpness) : r.make(false, {}));
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
  const Tensor scratch = floats_of(r.launch, {cuda::memory_backward_scratch(s)});
  r.launch.check(cuda::memory_backward(p, out_ptr<float>(scratch), r.launch.tickets(s.batch), r.launch.stream()));
  return made;
}

Tensors memory_step_fwd(const Tensors& state, const Tensors& interface, const OptTensor& sharpness,
                        const OptTensor& step_mask, bool track_usage, bool track_links, bool deallocate, bool save) {
  return recurrence_fwd(
      Recurrence(state, interface, sharpness, step_mask, track_usage, track_links, deallocate, false, 0), save);
}

Tensors memory_scan_fwd(const Tensors& state, const Tensors& interface, const OptTensor& sharpness,
                        const OptTensor& step_mask, bool track_usage, bool track_links, bool deallocate,
                        int64_t checkpoint_every, bool save) {
  return recurrence_fwd(Recurrence(state, interface, sharpness, step_mask, track_usage, track_links, deallocate, false,
                                   checkpoint_every),
                        save);
}

Tensors memory_step_bwd(const OptTensor& d_reads, const OptTensor& d_memory, const OptTensor& d_usage,
                        const OptTensor& d_links, const OptTensor& d_precedence, const OptTensor& d_read_weights,
                        const OptTensor& d_write_weights, const Tensors& state, const Tensors& interface,
                        const OptTensor& sharpness, const OptTensor& step_mask, const Tensors& saved, bool track_usage,
                        bool track_links, bool deallocate, bool detach_usage) {
  return recurrence_bwd({d_reads, d_memory, d_usage, d_links, d_precedence, d_read_weights, d_write_weights},
                        Recurrence(state, interface, sharpness, step_mask, track_usage, track_links, deallocate,
                                   detach_usage, 0),
                        saved);
}

Tensors memory_scan_bwd(const OptTensor& d_reads, const OptTensor& d_memory, const OptTensor& d_usage,
                        const OptTensor& d_links, const OptTensor& d_precedence, const OptTensor& d_read_weights,
                        const OptTensor& d_write_weights, const Tensors& state, const Tensors& interface,
                        const OptTensor& sharpness, const OptTensor& step_mask, const Tensors& saved, bool track_usage,
                        bool track_links, bool deallocate, bool detach_usage, int64_t checkpoint_every) {
  return recurrence_bwd({d_reads, d_memory, d_usage, d_links, d_precedence, d_read_weights, d_write_weights},
                        Recurrence(state, interface, sharpness, step_mask, track_usage, track_links, deallocate,
                                   detach_usage, checkpoint_every),
                        saved);
}

}  // namespace

}  // namespace memkern::bind

STABLE_TORCH_LIBRARY_IMPL(memkern, CUDA, m) {
  m.impl("memory_step_fwd_cuda", TORCH_BOX(&memkern::bind::memory_step_fwd));
  m.impl("memory_step_bwd_cuda", TORCH_BOX(&memkern::bind::memory_step_bwd));
  m.impl("memory_scan_fwd_cuda", TORCH_BOX(&memkern::bind::memory_scan_fwd));
  m.impl("memory_scan_bwd_cuda", TORCH_BOX(&memkern::bind::memory_scan_bwd));
}
