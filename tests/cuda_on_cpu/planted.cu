// SPDX-License-Identifier: Apache-2.0
// Kernels with one bug each, and the same without it: the emulation must tell them apart.
#include "common.cuh"

namespace {

constexpr int threads = 64;

enum Bug { none, missing_barrier, uninitialized, past_the_end, before_the_start, divergent, exited, wrong_mask };

// y = x reversed within each block, plus the block's sum.
template <Bug bug> __global__ void reverse(const float* x, float* y, int64_t n) {
  __shared__ float all[threads];
  __shared__ float by_warp[threads / 32];
  const int64_t first = int64_t(blockIdx.x) * threads;
  const int t = int(threadIdx.x);
  if (bug == exited && t == 5) return;
  if (bug == uninitialized ? t % 2 == 0 : true) all[t] = x[bug == past_the_end ? first + t + 1 : first + t];
  if (bug == divergent) {
    if (t < 32) __syncthreads();
  } else if (bug != missing_barrier) {
    __syncthreads();
  }
  const float mirrored = all[threads - 1 - t];
  float sum = all[t];
  const unsigned mask = bug == wrong_mask && t < 16 ? 0xFFFFu : 0xFFFFFFFFu;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(mask, sum, bits);
  if (t % 32 == 0) by_warp[t / 32] = sum;
  __syncthreads();
  y[bug == before_the_start ? first + t - 1 : first + t] = mirrored + by_warp[0] + by_warp[1];
}

template <Bug bug> const char* run(const float* x, float* y, int64_t n) {
  const auto kernel = &reverse<bug>;
  FD_LAUNCH(kernel, unsigned(n / threads), threads, 0, nullptr, x, y, n);
  return fd_launch_error();
}

}  // namespace

extern "C" const char* planted(int bug, const float* x, float* y, int64_t n) {
  switch (bug) {
    case none: return run<none>(x, y, n);
    case missing_barrier: return run<missing_barrier>(x, y, n);
    case uninitialized: return run<uninitialized>(x, y, n);
    case past_the_end: return run<past_the_end>(x, y, n);
    case before_the_start: return run<before_the_start>(x, y, n);
    case divergent: return run<divergent>(x, y, n);
    case exited: return run<exited>(x, y, n);
    default: return run<wrong_mask>(x, y, n);
  }
}
