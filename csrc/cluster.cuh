// SPDX-License-Identifier: Apache-2.0
// Clusters of blocks that run together and read each other's shared memory (from sm_90 on; elsewhere a cluster is one block),
// and helpers for kernels that keep their data there: asynchronous copies, conversions of 16 bytes to numbers.
#pragma once
#include "common.cuh"

// Launches blocks in clusters. A kernel whose blocks read each other's memory may only use dynamic shared memory.
#ifndef FD_LAUNCH_CLUSTER
#define FD_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared, stream, ...) \
  fd::launch_cluster(kernel, cluster, grid, block, shared, stream, __VA_ARGS__)

namespace fd {

inline cudaLaunchConfig_t configured(cudaLaunchAttribute* attribute, unsigned cluster, unsigned grid, unsigned block,
                                     size_t shared, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid), config.blockDim = dim3(block), config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = cluster, attribute->val.clusterDim.y = 1, attribute->val.clusterDim.z = 1;
  config.attrs = attribute, config.numAttrs = 1;
  return config;
}

// An error is read later with cudaGetLastError, as for other launches.
template <typename... P, typename... A> void launch_cluster(void (*kernel)(P...), unsigned cluster, unsigned grid,
                                                            unsigned block, size_t shared, void* stream, const A&... args) {
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config = configured(&attribute, cluster, grid, block, shared, stream);
  cudaLaunchKernelEx(&config, kernel, args...);
}

// Allows launches with this much shared memory and this many blocks per cluster on the current device. Returns how many
// clusters run at once; 0 or less: none, for example if the kernel was compiled for an architecture without clusters.
template <typename... P> int allow_clusters(void (*kernel)(P...), unsigned cluster, unsigned block, size_t shared) {
  int most = 0;
  cudaFuncAttributes found;
  cudaError_t error = cudaFuncGetAttributes(&found, kernel);
  if (error == cudaSuccess && found.ptxVersion < 90) return 0;
  if (error == cudaSuccess && size_t(found.maxDynamicSharedSizeBytes) < shared)  // never lower the limit of other calls
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess && cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = configured(&attribute, cluster, cluster, block, shared, nullptr);
    error = cudaOccupancyMaxActiveClusters(&most, kernel, &config);
  }
  if (error == cudaSuccess) return most;
  cudaGetLastError();  // clears the error, so that no launch reports it
  return -1;
}

}  // namespace fd
#endif

namespace fd {

#ifdef __CUDACC__
inline __device__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Writes to shared memory before cluster_arrive are visible to all threads of the cluster after their cluster_wait.
inline __device__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
inline __device__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The address that corresponds to ``here`` in the shared memory of block ``rank`` of the cluster.
template <typename T> __device__ const T* of_block(const T* here, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(rank));
  return reinterpret_cast<const T*>(there);
#else
  return here;
#endif
}

// Asynchronous copies of 16 bytes to shared memory. A thread sees its own copies after wait_for_copies<n>, which waits for
// all but the last n batches.
inline __device__ void copy_later(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
#endif
}
inline __device__ void end_batch() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int n> __device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}
#endif

// How many numbers fit into 16 bytes.
template <typename T> constexpr int wide = 16 / int(sizeof(T));

inline __device__ void numbers_of(const float*, const uint4& word, float* x) {
  x[0] = FD_ISA::as_float(word.x), x[1] = FD_ISA::as_float(word.y);
  x[2] = FD_ISA::as_float(word.z), x[3] = FD_ISA::as_float(word.w);
}
inline __device__ void numbers_of(const bf16*, const uint4& word, float* x) {
  const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = FD_ISA::as_float(words[i] << 16);
    x[2 * i + 1] = FD_ISA::as_float(words[i] & 0xFFFF0000u);
  }
}
inline __device__ void numbers_of(const f16*, const uint4& word, float* x) {
  const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = FD_ISA::to_float(f16{uint16_t(words[i])});
    x[2 * i + 1] = FD_ISA::to_float(f16{uint16_t(words[i] >> 16)});
  }
}

// Two numbers packed into 4 bytes, each rounded once.
template <typename T> __device__ uint32_t two_of(float low, float high) {
  const T a = FD_ISA::from_float<T>(low), b = FD_ISA::from_float<T>(high);
  return uint32_t(a.bits) | uint32_t(b.bits) << 16;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <> inline __device__ uint32_t two_of<bf16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <> inline __device__ uint32_t two_of<f16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

template <typename T> __device__ uint4 word_of(const float* x) {
  return uint4{two_of<T>(x[0], x[1]), two_of<T>(x[2], x[3]), two_of<T>(x[4], x[5]), two_of<T>(x[6], x[7])};
}
template <> inline __device__ uint4 word_of<float>(const float* x) {
  return uint4{FD_ISA::as_bits(x[0]), FD_ISA::as_bits(x[1]), FD_ISA::as_bits(x[2]), FD_ISA::as_bits(x[3])};
}

}  // namespace fd
