// SPDX-License-Identifier: Apache-2.0
// An emulation of CUDA on the CPU: enough of the language to run this project's kernels unchanged, one thread at a time.
//
// The threads of a block are fibers. Each runs until it has to wait: at __syncthreads, or for the other lanes of the mask at
// a shuffle, vote or __syncwarp. Blocks and threads run in an order that changes with every launch. A barrier that not all
// threads reach, and every error that memory.cpp detects, end the launch with an error that names kernel, block, thread and
// line. The blocks of a cluster alternate; each runs until all its threads wait. Accesses of a thread between its arrival at
// the cluster's barrier and its wait count as before the barrier. Shared memory is also filled with a pattern, which changes
// with every launch, because the compiler does not report every access.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__
// A single thread of the operating system runs everything; its thread-local memory in this module is the shared memory.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};

typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
struct cudaFuncAttributes {};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace fd_emulation {

extern uint3 thread, block;
extern dim3 block_size, grid_size;

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()>& body, unsigned cluster = 1);
const char* take_error();
void meet_block(int line);
// Stores a lane's value (``bytes`` bytes), waits for the lanes of the mask, and returns the values of the warp's 32 lanes.
const uint64_t* meet_warp(unsigned mask, uint64_t value, int line, bool orders = false);
void* dynamic_shared();
unsigned rank_in_cluster();
void arrive_at_cluster();
void wait_for_cluster(int line);
const void* dynamic_of(const void* here, unsigned rank);  // the same place in another block of the cluster
void fence();
void atomically(const void* address, size_t size);

template <typename T> uint64_t word_of(T value) {
  static_assert(sizeof(T) <= 8, "shuffles take at most eight bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  return word;
}
template <typename T> T value_of(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}
struct SyncWarp {
  int line;
  void operator()(unsigned mask = ~0u) const { meet_warp(mask, 0, line, true); }
};
inline int lane() { return int(thread.x % 32); }

template <typename T> T shuffle(unsigned mask, T value, int from, int line) {
  const uint64_t* values = meet_warp(mask, word_of(value), line);
  return from < 0 || from > 31 ? value : value_of<T>(values[from]);
}
inline unsigned ballot(unsigned mask, bool vote, int line) {
  const uint64_t* votes = meet_warp(mask, vote, line);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned((mask >> i & 1) && votes[i]) << i;
  return bits;
}

}  // namespace fd_emulation

#define threadIdx (fd_emulation::thread)
#define blockIdx (fd_emulation::block)
#define blockDim (fd_emulation::block_size)
#define gridDim (fd_emulation::grid_size)
constexpr int warpSize = 32;

#define __syncthreads() fd_emulation::meet_block(__LINE__)
#define __syncwarp(...) fd_emulation::SyncWarp{__LINE__}(__VA_ARGS__)
#define __shfl_sync(mask, value, from) fd_emulation::shuffle(mask, value, from, __LINE__)
#define __shfl_xor_sync(mask, value, bits) fd_emulation::shuffle(mask, value, fd_emulation::lane() ^ (bits), __LINE__)
#define __shfl_down_sync(mask, value, by) fd_emulation::shuffle(mask, value, fd_emulation::lane() + int(by), __LINE__)
#define __shfl_up_sync(mask, value, by) fd_emulation::shuffle(mask, value, fd_emulation::lane() - int(by), __LINE__)
#define cluster_rank() fd_emulation::rank_in_cluster()
#define cluster_arrive() fd_emulation::arrive_at_cluster()
#define cluster_wait() fd_emulation::wait_for_cluster(__LINE__)
#define __ballot_sync(mask, vote) fd_emulation::ballot(mask, vote, __LINE__)
#define __any_sync(mask, vote) (fd_emulation::ballot(mask, vote, __LINE__) != 0)
#define __all_sync(mask, vote) (fd_emulation::ballot(mask, vote, __LINE__) == (mask))

// Only one thread runs at a time, so a plain operation is atomic.
template <typename T, typename F> __attribute__((no_sanitize("thread"))) T fd_atomic(T* at, const F& change) {
  fd_emulation::atomically(at, sizeof(T));
  const T before = *at;
  *at = change(before);
  return before;
}
template <typename T> T atomicAdd(T* at, T value) {
  return fd_atomic(at, [=](T before) { return before + value; });
}
template <typename T> T atomicMax(T* at, T value) {
  return fd_atomic(at, [=](T before) { return value > before ? value : before; });
}
inline void __threadfence() { fd_emulation::fence(); }
template <typename T> T __ldg(const T* at) { return *at; }
template <typename T> T __ldcs(const T* at) { return *at; }
template <typename T> void __stcs(T* at, T value) { *at = value; }
template <typename T> void __stwb(T* at, T value) { *at = value; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

// Asynchronous copies are executed immediately here.
namespace fd {
template <typename T> const T* of_block(const T* here, unsigned rank) {
  return static_cast<const T*>(fd_emulation::dynamic_of(here, rank));
}
inline void copy_later(void* shared, const void* global) { *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global); }
inline void end_batch() {}
template <int n> void wait_for_copies() {}
template <typename K> int allow_clusters(K, unsigned cluster, unsigned, size_t) { return cluster <= 16; }
}  // namespace fd

inline cudaError_t cudaGetLastError() { return 1; }
inline const char* cudaGetErrorString(cudaError_t) { return fd_emulation::take_error(); }
template <typename F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F*) { return cudaSuccess; }
template <typename F> cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) { return cudaSuccess; }

// Each thread gets a copy of the arguments, which are never written, so these copies are not reported as accesses.
#define FD_LAUNCH(kernel, grid, block, shared, stream, ...) \
  fd_emulation::launch(#kernel, grid, block, shared, [=]() __attribute__((no_sanitize("thread"))) { kernel(__VA_ARGS__); })
#define FD_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared, stream, ...) \
  fd_emulation::launch(                                                      \
      #kernel, grid, block, shared, [=]() __attribute__((no_sanitize("thread"))) { kernel(__VA_ARGS__); }, cluster)
#define FD_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(fd_emulation::dynamic_shared())
#define FD_HOPPER "hopper.h"
