// SPDX-License-Identifier: Apache-2.0
// feature_match on a GPU: the weighted distances of all taps and their gradients in one launch, and one block that adds the
// partial sums in order (for cosine, before it one warp per sample).
//
// Grid      256 threads per block, persistent over the chunks of all taps; the table of taps is a kernel argument
// Traffic   mse and huber with gradient: student + teacher read, gradient written, once (12 bytes per element in fp32, 6 in
//           bf16); normalized_mse and cosine read twice (20 and 10 bytes); 16-byte accesses if a tap (cosine: a sample)
//           starts at a multiple of 16 bytes
// Precision elements and a thread's sum in fp32 (at most 128 terms); over threads in fp32, in a warp by halving and over
//           warps in order; chunks in double in their order; gradients rounded once
// Limits    any n >= 0 (64-bit), fp32/bf16/fp16 for student and teacher independently, 16 taps per launch
#include "common.cuh"
#include "feature_match/math.h"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int most_taps = 16, finishing_threads = 1024, blocks_each = 8;
constexpr int64_t short_chunk = 4096, long_chunk = 32768, many_chunks = 4096;

struct Taps {
  Tap tap[most_taps];
  int64_t first[most_taps + 1];  // first chunk of each tap
  int64_t chunk;                 // elements of a chunk
  int count;
  bool continues;  // add to the loss of an earlier launch
  const float* weights;
  const float* grad_scale;
  float parameter;       // eps of normalized_mse and cosine, delta of huber
  double* denominators;  // [count]
  double* partials;      // [chunks, 3]
};

struct Sums {
  float difference, teacher, student;  // sums of the terms, of t^2 and of s^2
};

template <Pass pass, Kind kind, typename S, typename T>
__device__ void element(Sums& sums, const S& student, const T& teacher, S& gradient, float factor, float parameter) {
  const float s = to_float(student), t = to_float(teacher);
  if (pass != gradient_only) sums.difference += term<kind>(s, t, parameter, 0.5f);
  if (pass != gradient_only && (kind == normalized || kind == cosine)) sums.teacher = muladd(t, t, sums.teacher);
  if (pass != gradient_only && kind == cosine) sums.student = muladd(s, s, sums.student);
  if (pass != sum_only) gradient = from_float<S>(slope<kind>(s, t, factor, parameter));
}

template <Pass pass, Kind kind, typename S, typename T>
__device__ Sums run_chunk(const Tap& tap, int64_t first, int64_t n, float factor, float delta) {
  const S* student = static_cast<const S*>(tap.student) + first;
  const T* teacher = static_cast<const T*>(tap.teacher) + first;
  S* gradient = pass == sum_only ? nullptr : static_cast<S*>(tap.gradient) + first;
  Sums sums = {0.0f, 0.0f, 0.0f};
  int64_t done = 0;
  if (starts_vector(student) && starts_vector(teacher) && starts_vector(gradient)) {
    done = n / 8 * 8;
#pragma unroll 2
    for (int64_t i = 8 * threadIdx.x; i < done; i += 8 * threads_per_block) {
      const Eight<S> s = *reinterpret_cast<const Eight<S>*>(student + i);
      const Eight<T> t = *reinterpret_cast<const Eight<T>*>(teacher + i);
      Eight<S> g;
#pragma unroll
      for (int k = 0; k < 8; ++k) element<pass, kind>(sums, s.x[k], t.x[k], g.x[k], factor, delta);
      if (pass != sum_only) *reinterpret_cast<Eight<S>*>(gradient + i) = g;
    }
  }
  for (int64_t i = done + threadIdx.x; i < n; i += threads_per_block) {
    S g;
    element<pass, kind>(sums, student[i], teacher[i], g, factor, delta);
    if (pass != sum_only) gradient[i] = g;
  }
  return sums;
}

template <Pass pass, Kind kind, typename S>
__device__ Sums run_student(const Tap& tap, int64_t first, int64_t n, float factor, float delta) {
  switch (tap.teacher_dtype) {
    case Dtype::f32: return run_chunk<pass, kind, S, float>(tap, first, n, factor, delta);
    case Dtype::bf16: return run_chunk<pass, kind, S, bf16>(tap, first, n, factor, delta);
    default: return run_chunk<pass, kind, S, f16>(tap, first, n, factor, delta);
  }
}

template <Pass pass, Kind kind> __device__ Sums run(const Tap& tap, int64_t first, int64_t n, float factor, float delta) {
  switch (tap.student_dtype) {
    case Dtype::f32: return run_student<pass, kind, float>(tap, first, n, factor, delta);
    case Dtype::bf16: return run_student<pass, kind, bf16>(tap, first, n, factor, delta);
    default: return run_student<pass, kind, f16>(tap, first, n, factor, delta);
  }
}

__device__ int tap_of(const Taps& a, int64_t chunk) {
  int l = 0;
  while (chunk >= a.first[l + 1]) ++l;
  return l;
}

template <Pass pass, Kind kind> __global__ void __launch_bounds__(threads_per_block, 3) match(const __grid_constant__ Taps a) {
  __shared__ float by_warp[threads_per_block / 32];
  for (int64_t chunk = blockIdx.x; chunk < a.first[a.count]; chunk += gridDim.x) {
    const int l = tap_of(a, chunk);
    const Tap& tap = a.tap[l];
    const Piece piece = piece_of(tap, chunk - a.first[l], a.chunk);
    float factor = 0.0f, parameter = a.parameter;
    if (pass == sum_and_gradient) factor = gradient_factor(*a.grad_scale, a.weights[l], 1.0, tap.n, kind == huber);
    if (pass == gradient_only && kind == squared)
      factor = gradient_factor(*a.grad_scale, a.weights[l], a.denominators[l], tap.n, false);
    if (pass == gradient_only && kind == cosine) {
      const double* factors = a.partials + 3 * (a.first[l] + piece.sample * chunks_of_sample(tap, a.chunk));
      factor = cosine_factor(*a.grad_scale, a.weights[l], factors[2], tap.samples);
      parameter = cosine_factor(*a.grad_scale, a.weights[l], factors[1], tap.samples);
    }
    const Sums sums = run<pass, kind>(tap, piece.first, piece.n, factor, parameter);
    if (pass == gradient_only) continue;
    const float difference = block_sum<threads_per_block>(sums.difference, by_warp);
    const float teacher = kind == normalized || kind == cosine ? block_sum<threads_per_block>(sums.teacher, by_warp) : 0.0f;
    const float student = kind == cosine ? block_sum<threads_per_block>(sums.student, by_warp) : 0.0f;
    if (threadIdx.x == 0) {
      a.partials[3 * chunk] = double(difference);
      if (kind == normalized || kind == cosine) a.partials[3 * chunk + 1] = double(teacher);
      if (kind == cosine) a.partials[3 * chunk + 2] = double(student);
    }
  }
}

// Writes 1 - c of every sample, from its chunks, to ``values``; the factors of its gradient overwrite the sums of its first
// chunk. One warp per sample.
__global__ void __launch_bounds__(threads_per_block) add_samples(const __grid_constant__ Taps a, double* values) {
  const int lane = threadIdx.x % 32, warps = threads_per_block / 32;
  int64_t before = 0;
  for (int l = 0; l < a.count; ++l) {
    const int64_t samples = a.tap[l].samples, each = chunks_of_sample(a.tap[l], a.chunk);
    for (int64_t sample = blockIdx.x * warps + threadIdx.x / 32; each > 0 && sample < samples; sample += gridDim.x * warps) {
      double* partials = a.partials + 3 * (a.first[l] + sample * each);
      double product = 0.0, teacher = 0.0, student = 0.0;
      for (int64_t i = lane; i < each; i += 32) {
        product += partials[3 * i];
        teacher += partials[3 * i + 1];
        student += partials[3 * i + 2];
      }
      for (int bits = 16; bits > 0; bits /= 2) {
        product += __shfl_xor_sync(0xFFFFFFFFu, product, bits);
        teacher += __shfl_xor_sync(0xFFFFFFFFu, teacher, bits);
        student += __shfl_xor_sync(0xFFFFFFFFu, student, bits);
      }
      if (lane != 0) continue;
      const Cosine found = cosine_of(product, student, teacher, double(a.parameter));
      partials[1] = found.teacher;
      partials[2] = found.student;
      values[3 * (before + sample)] = found.value;
    }
    before += each > 0 ? samples : 0;
  }
}

template <bool norm> __global__ void __launch_bounds__(finishing_threads)
    finish(const __grid_constant__ Taps a, float* loss, float* tap_loss) {
  __shared__ double by_warp[finishing_threads / 32];
  double total = 0.0;
  for (int l = 0; l < a.count; ++l) {
    double difference = 0.0, teacher = 0.0;
    for (int64_t chunk = a.first[l] + threadIdx.x; chunk < a.first[l + 1]; chunk += finishing_threads) {
      difference += a.partials[3 * chunk];
      if (norm) teacher += a.partials[3 * chunk + 1];
    }
    difference = block_sum<finishing_threads>(difference, by_warp);
    if (norm) teacher = block_sum<finishing_threads>(teacher, by_warp);
    if (threadIdx.x != 0) continue;
    const double n = double(larger(a.tap[l].n, 1)), denominator = norm ? teacher / n + double(a.parameter) : 1.0;
    const double distance = difference / n / denominator;
    a.denominators[l] = denominator;
    tap_loss[l] = float(distance);
    total += double(a.weights[l]) * distance;
  }
  if (threadIdx.x == 0) *loss = float(a.continues ? double(*loss) + total : total);
}

template <typename T> __device__ void scale_chunk(T* x, int64_t n, float factor) {
  int64_t done = 0;
  if (starts_vector(x)) {
    done = n / 8 * 8;
    for (int64_t i = 8 * threadIdx.x; i < done; i += 8 * threads_per_block) {
      Eight<T>& at = *reinterpret_cast<Eight<T>*>(x + i);
      Eight<T> values = at;
#pragma unroll
      for (int k = 0; k < 8; ++k) values.x[k] = from_float<T>(to_float(values.x[k]) * factor);
      at = values;
    }
  }
  for (int64_t i = done + threadIdx.x; i < n; i += threads_per_block) x[i] = from_float<T>(to_float(x[i]) * factor);
}

__global__ void __launch_bounds__(threads_per_block) scale(const __grid_constant__ Taps a, const float* factor) {
  const float by = *factor;
  if (by == 1.0f) return;
  for (int64_t chunk = blockIdx.x; chunk < a.first[a.count]; chunk += gridDim.x) {
    const int l = tap_of(a, chunk);
    const int64_t first = (chunk - a.first[l]) * a.chunk, n = smaller(a.tap[l].n - first, a.chunk);
    switch (a.tap[l].student_dtype) {
      case Dtype::f32: scale_chunk(static_cast<float*>(a.tap[l].gradient) + first, n, by); break;
      case Dtype::bf16: scale_chunk(static_cast<bf16*>(a.tap[l].gradient) + first, n, by); break;
      default: scale_chunk(static_cast<f16*>(a.tap[l].gradient) + first, n, by); break;
    }
  }
}

// The next taps of a call (at most 16), divided into chunks.
Taps table(const Tap* taps, int64_t count) {
  Taps a = {};
  a.count = int(smaller(count, most_taps));
  int64_t elements = 0;
  for (int l = 0; l < a.count; ++l) elements += taps[l].n;
  a.chunk = elements > many_chunks * short_chunk ? long_chunk : short_chunk;
  for (int l = 0; l < a.count; ++l) {
    a.tap[l] = taps[l];
    a.first[l + 1] = a.first[l] + taps[l].samples * chunks_of_sample(taps[l], a.chunk);
  }
  return a;
}

// The same taps with one value per sample instead of sums per chunk; the mean of the values is the tap's distance.
Taps table_of_samples(const Taps& a, double* values) {
  Taps b = a;
  b.chunk = 1, b.partials = values;
  for (int l = 0; l < a.count; ++l) {
    b.tap[l].n = a.tap[l].n > 0 ? a.tap[l].samples : 0;
    b.first[l + 1] = b.first[l] + b.tap[l].n;
  }
  return b;
}

int64_t samples_of(const Tap* taps, int64_t count) {
  int64_t samples = 0;
  for (int64_t l = 0; l < count; ++l) samples += taps[l].samples;
  return samples;
}

template <Pass pass, Kind kind> void launch_match(const Taps& a, const Queue& queue) {
  const auto kernel = &match<pass, kind>;
  if (a.first[a.count] > 0)
    FD_LAUNCH(kernel, persistent_blocks(queue, a.first[a.count], blocks_each), threads_per_block, 0, queue.stream, a);
}

}  // namespace
}  // namespace fd

// The size of the workspace of feature_match_cuda, in doubles.
int64_t feature_match_cuda_workspace(const fd::Tap* taps, int64_t count) {
  int64_t most = 0;
  for (int64_t l = 0; l < count; l += fd::most_taps) {
    const fd::Taps a = fd::table(taps + l, count - l);
    most = fd::larger(most, 3 * (a.first[a.count] + fd::samples_of(taps + l, a.count)));
  }
  return most + fd::most_taps;
}

const char* feature_match_cuda(const fd::Tap* taps, int64_t count, bool gradient, const float* weights, const float* grad_scale,
                               fd::Distance distance, float parameter, float* loss, float* tap_loss, double* workspace,
                               const fd::Queue& queue) {
  using namespace fd;
  for (int64_t l = 0; l < count; l += most_taps) {
    Taps a = table(taps + l, count - l);
    a.continues = l > 0, a.weights = weights + l, a.grad_scale = grad_scale, a.parameter = parameter;
    a.denominators = workspace, a.partials = workspace + most_taps;
    if (distance == Distance::cosine) {
      double* values = a.partials + 3 * a.first[a.count];
      const Taps samples = table_of_samples(a, values);
      launch_match<sum_only, cosine>(a, queue);
      if (a.first[a.count] > 0) {
        const unsigned blocks = persistent_blocks(queue, ceil_div(samples.first[a.count], threads_per_block / 32), blocks_each);
        FD_LAUNCH(add_samples, blocks, threads_per_block, 0, queue.stream, a, values);
      }
      const auto kernel = &finish<false>;
      FD_LAUNCH(kernel, 1, finishing_threads, 0, queue.stream, samples, loss, tap_loss + l);
      if (gradient) launch_match<gradient_only, cosine>(a, queue);
    } else if (distance != Distance::normalized_mse) {
      if (distance == Distance::huber)
        gradient ? launch_match<sum_and_gradient, huber>(a, queue) : launch_match<sum_only, huber>(a, queue);
      else gradient ? launch_match<sum_and_gradient, squared>(a, queue) : launch_match<sum_only, squared>(a, queue);
      const auto kernel = &finish<false>;
      FD_LAUNCH(kernel, 1, finishing_threads, 0, queue.stream, a, loss, tap_loss + l);
    } else {
      launch_match<sum_only, normalized>(a, queue);
      const auto kernel = &finish<true>;
      FD_LAUNCH(kernel, 1, finishing_threads, 0, queue.stream, a, loss, tap_loss + l);
      if (gradient) launch_match<gradient_only, squared>(a, queue);
    }
  }
  return fd_launch_error();
}

const char* scale_gradients_cuda(const fd::Tap* taps, int64_t count, const float* factor, const fd::Queue& queue) {
  using namespace fd;
  for (int64_t l = 0; l < count; l += most_taps) {
    const Taps a = table(taps + l, count - l);
    if (a.first[a.count] > 0)
      FD_LAUNCH(scale, persistent_blocks(queue, a.first[a.count], blocks_each), threads_per_block, 0, queue.stream, a, factor);
  }
  return fd_launch_error();
}
