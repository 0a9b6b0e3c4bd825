// SPDX-License-Identifier: Apache-2.0
// Kernels with one bug each, and the same without it: the emulation must tell them apart.
#include "cluster.cuh"

namespace {

constexpr int threads = 64;

enum Bug {
  none,
  missing_barrier,
  reused_too_early,
  ordered_by_a_shuffle,
  uninitialized,
  past_the_end,
  before_the_start,
  past_an_array,
  past_dynamic,
  misaligned,
  divergent,
  exited,
  wrong_mask,
  missing_fence,
  plain_counter,
  missing_cluster_barrier,
  left_too_early,
  not_all_arrive
};

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
  const float mirrored = bug == divergent ? 0 : all[bug == past_an_array ? threads - t : threads - 1 - t];
  if (bug == reused_too_early) all[t] = 2 * mirrored;
  float sum = all[t];
  const unsigned mask = bug == wrong_mask && t < 16 ? 0xFFFFu : 0xFFFFFFFFu;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(mask, sum, bits);
  if (t % 32 == 0) by_warp[t / 32] = sum;
  __syncthreads();
  y[bug == before_the_start ? first + t - 1 : first + t] = mirrored + by_warp[0] + by_warp[1];
}

// y = each warp's elements, turned by one through dynamic shared memory.
template <Bug bug> __global__ void turn(const float* x, float* y) {
  FD_DYNAMIC_SHARED(float, all);
  const int64_t first = int64_t(blockIdx.x) * threads;
  const int t = int(threadIdx.x), next = t / 32 * 32 + (t + 1) % 32;
  all[bug == past_dynamic ? t + 1 : t] = x[first + t];
  if (bug == ordered_by_a_shuffle) __shfl_sync(0xFFFFFFFFu, 0, 0);
  else __syncwarp();
  y[first + t] = all[next];
}

template <Bug bug> __global__ void copy(const float* x, float* y) {
  const int64_t i = blockIdx.x * threads + threadIdx.x;
  const int off = bug == misaligned && threadIdx.x < threads - 2 ? 1 : 0;
  if (threadIdx.x % 8 == 0)
    *reinterpret_cast<fd::Eight<float>*>(y + i) = *reinterpret_cast<const fd::Eight<float>*>(x + i + off);
}

// y[0] = the sum of x, by the block that finishes last; y[1] on: the blocks' sums.
template <Bug bug> __global__ void total(const float* x, float* y, unsigned* counter) {
  __shared__ float by_warp[threads / 32];
  __shared__ bool last;
  const float sum = fd::block_sum<threads>(x[blockIdx.x * threads + threadIdx.x], by_warp);
  if (threadIdx.x == 0) {
    y[1 + blockIdx.x] = sum;
    if (bug != missing_fence) __threadfence();
    last = (bug == plain_counter ? (*counter)++ : atomicAdd(counter, 1u)) == gridDim.x - 1;
    float all = 0;
    for (unsigned i = 0; last && i < gridDim.x; ++i) all += y[1 + i];
    if (last) y[0] = all, *counter = 0;
  }
}

// y = the block's elements, turned to the next block of its cluster through shared memory.
template <Bug bug> __global__ void pass_on(const float* x, float* y) {
  FD_DYNAMIC_SHARED(float, all);
  const int64_t first = int64_t(blockIdx.x) * threads;
  const int t = int(threadIdx.x);
  all[t] = x[first + t];
  if (bug == missing_cluster_barrier) __syncthreads();
  else if (bug != not_all_arrive || cluster_rank() == 0) cluster_arrive();
  if (bug != missing_cluster_barrier) cluster_wait();
  y[first + t] = fd::of_block(all, 1 - cluster_rank())[t];
  if (bug == left_too_early || bug == missing_cluster_barrier) return;
  cluster_arrive();
  cluster_wait();
}

template <Bug bug> const char* run(const float* x, float* y, unsigned* counter, int64_t n) {
  const auto reversing = &reverse<bug>;
  const auto turning = &turn<bug>;
  const auto copying = &copy<bug>;
  const auto adding = &total<bug>;
  const auto passing = &pass_on<bug>;
  const unsigned grid = unsigned(n / threads);
  FD_LAUNCH(copying, grid, threads, 0, nullptr, x, y);
  FD_LAUNCH(turning, grid, threads, threads * sizeof(float), nullptr, x, y);
  FD_LAUNCH_CLUSTER(passing, 2u, grid, threads, threads * sizeof(float), nullptr, x, y);
  FD_LAUNCH(adding, grid, threads, 0, nullptr, x, y, counter);
  FD_LAUNCH(reversing, grid, threads, 0, nullptr, x, y, n);
  return fd_launch_error();
}

}  // namespace

extern "C" const char* planted(int bug, const float* x, float* y, unsigned* counter, int64_t n) {
  static decltype(&run<none>) runs[] = {
      run<none>,           run<missing_barrier>, run<reused_too_early>, run<ordered_by_a_shuffle>,
      run<uninitialized>,  run<past_the_end>,    run<before_the_start>, run<past_an_array>,
      run<past_dynamic>,   run<misaligned>,      run<divergent>,        run<exited>,
      run<wrong_mask>,     run<missing_fence>,   run<plain_counter>,    run<missing_cluster_barrier>,
      run<left_too_early>, run<not_all_arrive>};
  return runs[bug](x, y, counter, n);
}
