// Takes the place of the header of this path: clusters of emulated blocks, where MEMKERN_EMULATED_CLUSTERS asks for
// them with the KiB of shared memory that a block may have.
#pragma once

#include <cuda_runtime.h>

namespace memkern::cuda::slots {

constexpr bool kHasClusters = true;

inline void cluster_sync() { emulated::wait_for_cluster(); }
inline const float* of_peer(const float* own, int rank) {
  return static_cast<const float*>(emulated::of_peer(own, rank));
}

struct Clusters {
  int64_t count;
  int blocks, threads;
  size_t shared;
  cudaStream_t stream;

  template <class P>
  bool fit(void (*)(P)) const {
    const char* wanted = std::getenv("MEMKERN_EMULATED_CLUSTERS");
    return wanted != nullptr && shared <= size_t(std::atoi(wanted)) << 10;
  }
  template <class P>
  cudaError_t launch(void (*kernel)(P), const P& p) const {
    emulated::run(dim3(unsigned(count * blocks)), dim3(unsigned(threads)), shared, [&] { kernel(p); }, blocks);
    return cudaSuccess;
  }
};

}  // namespace memkern::cuda::slots
