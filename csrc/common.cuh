// SPDX-License-Identifier: Apache-2.0
// Shared by all CUDA kernels: the launch macro, errors as strings (null: no error), 16-byte vectors, block sums in a fixed
// order.
#pragma once
#include <cstdint>

#include "common.h"

// Launches kernel<<<grid, block, shared bytes, stream>>>(...). It is a macro, so that an emulation on the CPU can replace it.
#ifndef FD_LAUNCH
#define FD_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// Declares the dynamic shared memory of the launch as an array in the kernel.
#define FD_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

// The error as a string; null if there is none.
inline const char* fd_error(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// The last error of a launch.
inline const char* fd_launch_error() { return fd_error(cudaGetLastError()); }

namespace fd {

constexpr int threads_per_block = 256;

// The number of blocks for n items; at least one, because an empty grid is a launch error.
inline unsigned blocks_for(int64_t n, int per_block) { return n > 0 ? unsigned((n + per_block - 1) / per_block) : 1u; }

// The number of blocks of a persistent grid: one per item, but at most ``each`` per multiprocessor.
inline unsigned persistent_blocks(const Queue& queue, int64_t items, int each) {
  const int64_t most = int64_t(queue.processors) * each;
  return unsigned(items < 1 ? 1 : items < most ? items : most);
}

// Eight elements, read and written in 16-byte accesses (the address must be a multiple of 16 bytes).
template <typename T> struct alignas(16) Eight {
  T x[8];
};

inline __device__ bool starts_vector(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The sum over a block, valid in thread 0: within a warp by butterfly shuffles, then over warps in order. All threads must
// call it.
template <int threads, typename F> __device__ F block_sum(F value, F* by_warp) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, bits);
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = value;
  __syncthreads();
  F total = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < threads / 32; ++i) total += by_warp[i];
  __syncthreads();  // by_warp may be used again
  return total;
}

}  // namespace fd
