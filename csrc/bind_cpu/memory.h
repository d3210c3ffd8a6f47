// The memory column on the CPU: how it takes and makes tensors, and the plain functions of ops/memory.h that it runs.
#pragma once

#include "bind_cpu/common.h"
#include "common/binding_memory.h"
#include "cpu/dispatch.h"
#include "ops/memory.h"

MK_CPU_TABLE(MemoryTable, memory)

namespace memkern::bind {

struct CpuMemory {
  explicit CpuMemory(const Tensor&) {}

  Tensor take(const Tensor& t) const { return dense(t); }
  Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype) const { return empty_cpu(sizes, dims, dtype); }

  void forward(const MemoryForward& p) { table().forward(p, parallel_for); }
  void backward(const MemoryBackward& p) { table().backward(p, parallel_for); }
  void forward(const ContentWeights& p) { table().content_forward(p, parallel_for); }
  void backward(const ContentWeights& p) { table().content_backward(p, parallel_for); }
  void forward(const Sharpen& p) { table().sharpen_forward(p, parallel_for); }
  void backward(const Sharpen& p) { table().sharpen_backward(p, parallel_for); }
  void forward(const Allocation& p) { table().allocation_forward(p, parallel_for); }
  void backward(const Allocation& p) { table().allocation_backward(p, parallel_for); }
  void forward(const UsageUpdate& p) { table().usage_forward(p, parallel_for); }
  void backward(const UsageUpdate& p) { table().usage_backward(p, parallel_for); }
  void forward(const LinksUpdate& p) { table().links_forward(p, parallel_for); }
  void backward(const LinksUpdate& p) { table().links_backward(p, parallel_for); }
  void forward(const Directional& p) { table().directional_forward(p, parallel_for); }
  void backward(const Directional& p) { table().directional_backward(p, parallel_for); }
  void forward(const ReadMemory& p) { table().read_forward(p, parallel_for); }
  void backward(const ReadMemory& p) { table().read_backward(p, parallel_for); }
  void forward(const WriteMemory& p) { table().write_forward(p, parallel_for); }
  void backward(const WriteMemory& p) { table().write_backward(p, parallel_for); }

 private:
  static const cpu::MemoryTable& table() { return cpu::memory_table(); }
};

}  // namespace memkern::bind
