// Thread-block clusters: blocks that run together and read each other's shared memory. From compute capability 9.0 on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace memkern::cuda::slots {

// Of the architecture that this is compiled for: where it is false, a kernel of clusters needs no code.
#if defined(__CUDA_ARCH__)
constexpr bool kHasClusters = __CUDA_ARCH__ >= 900;
#else
constexpr bool kHasClusters = true;
#endif

// Every thread of every block of the cluster; what they wrote before is seen after.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in the dynamic shared memory of the block of this rank.
__device__ __forceinline__ const float* of_peer(const float* own, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t at;
  asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(own), "r"(rank));
  return reinterpret_cast<const float*>(at);
#else
  return own;
#endif
}

struct Clusters {
  int64_t count;
  int blocks, threads;  // of one cluster, of one block
  size_t shared;        // bytes of one block
  cudaStream_t stream;

  // Whether the current device can run such clusters of this kernel; also lets it have that much shared memory.
  template <class P>
  bool fit(void (*kernel)(P)) const {
    int device = 0, major = 0, most = 0, active = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (major < 9 || shared > static_cast<size_t>(most)) return false;
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t config = made(attribute);
    const bool fine = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared)) == cudaSuccess &&
                      cudaOccupancyMaxActiveClusters(&active, kernel, &config) == cudaSuccess;
    if (!fine) cudaGetLastError();  // not the caller's error: there is another way
    return fine && active > 0;
  }

  template <class P>
  cudaError_t launch(void (*kernel)(P), const P& p) const {
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t config = made(attribute);
    return cudaLaunchKernelEx(&config, kernel, p);
  }

 private:
  cudaLaunchConfig_t made(cudaLaunchAttribute& attribute) const {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned int>(blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned int>(count * blocks));
    config.blockDim = dim3(static_cast<unsigned int>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return config;
  }
};

}  // namespace memkern::cuda::slots
