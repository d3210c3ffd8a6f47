// The memory column on a GPU: how it takes and makes tensors, and the launchers that it runs, with their scratch.
#pragma once

#include "bind_cuda/common.h"
#include "common/binding_memory.h"
#include "cuda/memory/memory.h"

namespace memkern::bind {

class CudaMemory {
 public:
  explicit CudaMemory(const Tensor& t) : launch_(t) {}

  // Contiguous, float32, and at an address that a 16-byte load takes.
  Tensor take(const Tensor& t) const {
    const Tensor found = as(t, ScalarType::Float);
    return reinterpret_cast<uintptr_t>(found.data_ptr()) % 16 == 0 ? found : torch::stable::clone(found);
  }
  Tensor empty(const int64_t* sizes, int64_t dims, ScalarType dtype) const { return launch_.empty(sizes, dims, dtype); }

  void forward(const MemoryForward& p) {
    run(cuda::memory_forward, p, cuda::memory_forward_scratch(p.sizes), p.sizes.batch);
  }
  void backward(const MemoryBackward& p) {
    run(cuda::memory_backward, p, cuda::memory_backward_scratch(p.sizes), p.sizes.batch);
  }
  void forward(const ContentWeights& p) {
    launch_.check(cuda::content_forward(p, launch_.tickets(p.batch), launch_.stream()));
  }
  void backward(const ContentWeights& p) {
    run(cuda::content_backward, p, cuda::content_backward_scratch(p), p.batch);
  }
  void forward(const Sharpen& p) { run(cuda::sharpen_forward, p); }
  void backward(const Sharpen& p) { run(cuda::sharpen_backward, p); }
  void forward(const Allocation& p) { run(cuda::allocation_forward, p, cuda::allocation_scratch(p)); }
  void backward(const Allocation& p) { run(cuda::allocation_backward, p, cuda::allocation_scratch(p)); }
  void forward(const UsageUpdate& p) { run(cuda::usage_forward, p); }
  void backward(const UsageUpdate& p) { run(cuda::usage_backward, p, cuda::usage_backward_scratch(p)); }
  void forward(const LinksUpdate& p) { run(cuda::links_forward, p); }
  void backward(const LinksUpdate& p) { run(cuda::links_backward, p, cuda::links_backward_scratch(p)); }
  void forward(const Directional& p) { run(cuda::directional_forward, p, cuda::directional_scratch(p)); }
  void backward(const Directional& p) { run(cuda::directional_backward, p, cuda::directional_scratch(p)); }
  void forward(const ReadMemory& p) { run(cuda::read_forward, p, cuda::read_scratch(p), p.batch); }
  void backward(const ReadMemory& p) { run(cuda::read_backward, p); }
  void forward(const WriteMemory& p) { run(cuda::write_forward, p); }
  void backward(const WriteMemory& p) { run(cuda::write_backward, p, cuda::write_backward_scratch(p), p.batch); }

 private:
  template <class P>
  void run(cudaError_t (*launcher)(const P&, cudaStream_t), const P& p) {
    launch_.check(launcher(p, launch_.stream()));
  }
  // Scratch goes back to the allocator, which reuses it in stream order alone, as soon as the kernels are launched.
  template <class P>
  void run(cudaError_t (*launcher)(const P&, float*, cudaStream_t), const P& p, int64_t scratch) {
    const Tensor floats = launch_.empty({scratch}, ScalarType::Float);
    launch_.check(launcher(p, out_ptr<float>(floats), launch_.stream()));
  }
  template <class P>
  void run(cudaError_t (*launcher)(const P&, float*, int32_t*, cudaStream_t), const P& p, int64_t scratch,
           int64_t tickets) {
    const Tensor floats = launch_.empty({scratch}, ScalarType::Float);
    launch_.check(launcher(p, out_ptr<float>(floats), launch_.tickets(tickets), launch_.stream()));
  }

  Launch launch_;
};

}  // namespace memkern::bind
