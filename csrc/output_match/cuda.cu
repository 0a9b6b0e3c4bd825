// SPDX-License-Identifier: Apache-2.0
// output_match on a GPU: loss and gradient of a student's output with respect to the teacher's output and its own target in
// one launch, and one block that adds the partial sums in order.
//
// Grid      256 threads per block, persistent over chunks of 2048 elements of all samples: eight per thread
// Traffic   student, teacher (two tensors with guidance), x_t if prediction types differ, the latent if the task's target
//           contains it: each read once; gradient written once; targets and noise never in memory. 16-byte accesses
//           if rows start at multiples of 16 bytes
// Precision elements and a thread's sum in fp32; over threads in fp32, in a warp by halving and over warps in order; chunks
//           in double in their order; gradients rounded once
// Limits    any n >= 0; contiguous rows; fp32/bf16/fp16 for each tensor independently; a timestep or latent index out of
//           range makes the loss NaN
#include "common.cuh"
#include "output_match/math.h"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int blocks_each = 8, finishing_threads = 256;

template <typename T> __device__ void widen(const T* from, int64_t n, float* to) {
  if (n == 8 && starts_vector(from)) {
    const Eight<T> x = *reinterpret_cast<const Eight<T>*>(from);
#pragma unroll
    for (int k = 0; k < 8; ++k) to[k] = to_float(x.x[k]);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) to[k] = k < n ? to_float(from[k]) : 0.0f;
  }
}

// Elements [first, first + n) of row b, n <= 8, as floats, then zeros; all zeros if the matrix is not given.
__device__ void floats(const Rows& rows, int64_t b, int64_t first, int64_t n, float* to) {
  const int64_t at = b * rows.row + first;
  if (!rows.data) n = 0;
  switch (rows.dtype) {
    case Dtype::f32: widen(static_cast<const float*>(rows.data) + at, n, to); break;
    case Dtype::bf16: widen(static_cast<const bf16*>(rows.data) + at, n, to); break;
    default: widen(static_cast<const f16*>(rows.data) + at, n, to); break;
  }
}

template <typename T> __device__ void narrow(const float* from, int64_t n, T* to) {
  Eight<T> x;
#pragma unroll
  for (int k = 0; k < 8; ++k) x.x[k] = from_float<T>(from[k]);
  if (n == 8 && starts_vector(to)) *reinterpret_cast<Eight<T>*>(to) = x;
  else
    for (int k = 0; k < n; ++k) to[k] = x.x[k];
}

__device__ void write(const OutputMatch& a, int64_t at, int64_t n, const float* from) {
  switch (a.student.dtype) {
    case Dtype::f32: narrow(from, n, static_cast<float*>(a.gradient) + at); break;
    case Dtype::bf16: narrow(from, n, static_cast<bf16*>(a.gradient) + at); break;
    default: narrow(from, n, static_cast<f16*>(a.gradient) + at); break;
  }
}

struct Sums {
  float output, task;
};

// Writes the gradient of elements [i, i + n), n <= 8, of sample b, and returns their terms of the sums.
__device__ Sums eight(const OutputMatch& a, const MatchRow& r, int64_t b, int64_t i, int64_t n) {
  float s[8], gradient[8] = {}, target[8];
  Sums sums = {0.0f, 0.0f};
  floats(a.student, b, i, n, s);
  if (a.teacher.data) {
    const bool guided = a.unconditional.data != nullptr;
    float unconditional[8], x_t[8];
    floats(a.teacher, b, i, n, target);
    floats(a.unconditional, b, i, n, unconditional);
    floats(a.x_t, b, i, n, x_t);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float d =
          s[k] - teacher_target(target[k], unconditional[k], x_t[k], r.guidance, r.from_x_t, r.from_teacher, guided);
      if (k < n) sums.output += match_term(d, a.delta, 0.5f, a.huber);
      gradient[k] = r.output_gradient * match_slope(d, a.delta, a.huber);
    }
  }
  if (a.counter) {
    float x[8];
    floats(r.target_signal == 0.0f ? Rows{} : a.latents, r.latent, i, n, x);
    eight_normals(uint64_t(a.counter[0]), uint64_t(a.counter[1]), uint32_t(a.first_sample + b), i, target);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float d = s[k] - muladd(r.target_signal, x[k], r.target_noise * target[k]);
      if (k < n) sums.task += match_term(d, a.delta, 0.5f, a.huber);
      gradient[k] = muladd(r.task_gradient, match_slope(d, a.delta, a.huber), gradient[k]);
    }
  }
  if (a.gradient) write(a, b * a.student.row + i, n, gradient);
  return sums;
}

__global__ void __launch_bounds__(threads_per_block) match_output(const __grid_constant__ OutputMatch a) {
  __shared__ float by_warp[threads_per_block / 32];
  __shared__ MatchRow row;
  const int64_t chunks = output_match_chunks(a);
  for (int64_t at = blockIdx.x; at < a.batch * chunks; at += gridDim.x) {
    const int64_t b = at / chunks, first = at % chunks * output_match_chunk, end = smaller(first + output_match_chunk, a.n);
    if (threadIdx.x == 0) row = match_row(a, b);
    __syncthreads();
    const int64_t i = first + 8 * threadIdx.x;
    Sums sums = {0.0f, 0.0f};
    if (i < end) sums = eight(a, row, b, i, smaller(end - i, 8));
    if (a.gradient && end == a.n) {
      const float zeros[8] = {};
      for (int64_t e = a.n + 8 * threadIdx.x; e < a.student.row; e += 8 * threads_per_block)
        write(a, b * a.student.row + e, smaller(a.student.row - e, 8), zeros);
    }
    const float output = block_sum<threads_per_block>(sums.output, by_warp);
    const float task = block_sum<threads_per_block>(sums.task, by_warp);
    if (threadIdx.x == 0) a.partials[2 * at] = double(output), a.partials[2 * at + 1] = double(task);
  }
}

__global__ void __launch_bounds__(finishing_threads) finish_output(const __grid_constant__ OutputMatch a) {
  __shared__ double by_warp[finishing_threads / 32];
  const int64_t chunks = output_match_chunks(a);
  const double count = double(larger(a.n, 1));
  double output = 0.0, task = 0.0;
  for (int64_t b = threadIdx.x; b < a.batch; b += finishing_threads) {
    double of_output = 0.0, of_task = 0.0;
    for (int64_t at = b * chunks; at < (b + 1) * chunks; ++at)
      of_output += a.partials[2 * at], of_task += a.partials[2 * at + 1];
    const MatchRow r = match_row(a, b);
    a.samples[2 * b] = float(of_output / count), a.samples[2 * b + 1] = float(of_task / count);
    output += double(r.output_weight) * of_output / count;
    task += double(r.task_weight) * of_task / count;
  }
  output = block_sum<finishing_threads>(output, by_warp);
  task = block_sum<finishing_threads>(task, by_warp);
  if (threadIdx.x == 0) finish_match(a, output, task);
}

}  // namespace
}  // namespace fd

// The size of the workspace of output_match_cuda, in doubles.
int64_t output_match_cuda_workspace(int64_t batch, int64_t n) {
  fd::OutputMatch a = {};
  a.n = n;
  return 2 * batch * fd::FD_ISA::output_match_chunks(a);
}

const char* output_match_cuda(const fd::OutputMatch& a, const fd::Queue& queue) {
  using namespace fd;
  const int64_t total = a.batch * output_match_chunks(a);
  if (total > 0) FD_LAUNCH(match_output, persistent_blocks(queue, total, blocks_each), threads_per_block, 0, queue.stream, a);
  FD_LAUNCH(finish_output, 1, finishing_threads, 0, queue.stream, a);
  return fd_launch_error();
}
