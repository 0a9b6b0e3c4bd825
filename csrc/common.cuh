// SPDX-License-Identifier: Apache-2.0
// What every CUDA kernel shares: the one way to launch, and errors as strings (null: no error).
#pragma once
#include <cstdint>

#include "common.h"

namespace fd {

constexpr int threads_per_block = 256;

// Blocks for n items, at least one: an empty grid is a launch error.
inline unsigned blocks_for(int64_t n, int per_block) { return n > 0 ? unsigned((n + per_block - 1) / per_block) : 1u; }

}  // namespace fd

// Launches kernel<<<grid, block, shared bytes, stream>>>(...). A macro, so that a host emulation can put its own in place.
#ifndef FD_LAUNCH
#define FD_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

// The last error of a launch as a string, null if there was none.
inline const char* fd_launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
