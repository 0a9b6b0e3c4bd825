// SPDX-License-Identifier: Apache-2.0
// Only Philox words and normals, so that tests on a GPU can compare them with the published vectors.
//
// Grid      one thread per Philox block (four words), 256 threads per CTA
// Traffic   16 bytes read, 32 written per Philox block
// Precision words exact; normals as described in philox.h
// Limits    n < 2^31 * 256
#include "common.cuh"
#include "philox.h"

namespace {

__global__ void philox_kernel(const uint32_t* counter, const uint32_t* key, uint32_t* words, float* normals, int64_t n) {
  using namespace fd::FD_ISA;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint32_t* c = counter + 4 * i;
  const Block<uint32_t> w = philox4x32(Block<uint32_t>{c[0], c[1], c[2], c[3]}, key[0], key[1]);
  const auto first = box_muller(w.x, w.y), second = box_muller(w.z, w.w);
  const uint32_t word[4] = {w.x, w.y, w.z, w.w};
  const float z[4] = {first.even, first.odd, second.even, second.odd};
  for (int j = 0; j < 4; ++j) {
    words[4 * i + j] = word[j];
    normals[4 * i + j] = z[j];
  }
}

}  // namespace

const char* philox_cuda(const uint32_t* counter, const uint32_t* key, uint32_t* words, float* normals, int64_t n,
                        void* stream) {
  const unsigned grid = fd::blocks_for(n, fd::threads_per_block);
  FD_LAUNCH(philox_kernel, grid, fd::threads_per_block, 0, stream, counter, key, words, normals, n);
  return fd_launch_error();
}

// Why the current GPU cannot run a kernel of this file (built like all others): its architecture, or an old driver.
const char* unavailable_cuda() {
  cudaFuncAttributes attributes;
  return fd_error(cudaFuncGetAttributes(&attributes, philox_kernel));
}
