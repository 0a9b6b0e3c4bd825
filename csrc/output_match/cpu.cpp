// SPDX-License-Identifier: Apache-2.0
// output_match: loss and gradient of a student's output with respect to the teacher's output and its own target, in one
// parallel loop over chunks of 2048 elements.
//
// Threads   static split of all chunks of all samples; partial sums are kept by chunk and added in order, so the result has
//           the same bits at any thread count
// Traffic   student, teacher (two tensors with guidance), x_t if prediction types differ, the latent if the task's target
//           contains it: each read once; gradient written once; targets and noise never in memory
// Precision elements and lane sums in fp32 (128 terms per lane), sums over lanes in double; gradients rounded once
// Limits    any n >= 0; contiguous rows; fp32/bf16/fp16 for each tensor independently: 128 elements at a time are converted to
//           fp32 in the L1 cache
#include "output_match/math.h"
#include "simd.h"

namespace fd::FD_ISA {
namespace {

template <typename T> void widen(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < noise_group; i += lanes)
    store<false>(to + i, i + lanes <= n ? load(from + i) : load_first(from + i, larger(0, n - i)));
}

constexpr float zeros[noise_group] = {};

// Elements [first, first + n) of row b as floats, then zeros up to noise_group; all zeros if the matrix is not given.
const float* floats(const Rows& rows, int64_t b, int64_t first, int64_t n, float* buffer) {
  const int64_t at = b * rows.row + first;
  if (!rows.data) return zeros;
  if (rows.dtype == Dtype::bf16) widen(static_cast<const bf16*>(rows.data) + at, n, buffer);
  else if (rows.dtype == Dtype::f16) widen(static_cast<const f16*>(rows.data) + at, n, buffer);
  else if (n == noise_group) return static_cast<const float*>(rows.data) + at;
  else widen(static_cast<const float*>(rows.data) + at, n, buffer);
  return buffer;
}

template <typename T> void narrow(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store<false>(to + i, load(from + i));
  if (i < n) store_first(to + i, load(from + i), n - i);
}

void write(const OutputMatch& a, int64_t at, int64_t n, const float* from) {
  switch (a.student.dtype) {
    case Dtype::f32: return narrow(from, n, static_cast<float*>(a.gradient) + at);
    case Dtype::bf16: return narrow(from, n, static_cast<bf16*>(a.gradient) + at);
    default: return narrow(from, n, static_cast<f16*>(a.gradient) + at);
  }
}

struct Sums {
  double output, task;
};

template <bool huber> Sums run_chunk(const OutputMatch& a, const MatchRow& r, int64_t b, int64_t first, int64_t end) {
  const Lanes guidance = splat(r.guidance), from_x_t = splat(r.from_x_t), from_teacher = splat(r.from_teacher);
  const Lanes target_signal = splat(r.target_signal), target_noise = splat(r.target_noise);
  const Lanes output_gradient = splat(r.output_gradient), task_gradient = splat(r.task_gradient);
  const Lanes delta = splat(a.delta), half = splat(0.5f), none = splat(0.0f);
  const Rows latents = r.target_signal == 0.0f ? Rows{} : a.latents;
  Lanes output = none, task = none;
  for (int64_t i = first; i < end; i += noise_group) {
    const int64_t n = smaller(end - i, noise_group);
    float buffers[6][noise_group], made[noise_group];
    const float* z = zeros;
    const float* student = floats(a.student, b, i, n, buffers[0]);
    const float* conditional = floats(a.teacher, b, i, n, buffers[1]);
    const float* unconditional = floats(a.unconditional, b, i, n, buffers[2]);
    const float* x_t = floats(a.x_t, b, i, n, buffers[3]);
    const float* x = floats(latents, r.latent, i, n, buffers[4]);
    if (a.counter) {
      group_normals(uint64_t(a.counter[0]), uint64_t(a.counter[1]), uint32_t(a.first_sample + b), i, made);
      memset(made + n, 0, (noise_group - n) * sizeof(float));
      z = made;
    }
    for (int64_t j = 0; j < noise_group; j += lanes) {
      const Lanes s = load(student + j);
      Lanes gradient = none;
      if (a.teacher.data) {
        const Lanes target = teacher_target(load(conditional + j), load(unconditional + j), load(x_t + j), guidance, from_x_t,
                                            from_teacher, a.unconditional.data != nullptr);
        output = output + match_term(s - target, delta, half, huber);
        gradient = output_gradient * match_slope(s - target, delta, huber);
      }
      if (a.counter) {
        const Lanes target = muladd(target_signal, load(x + j), target_noise * load(z + j));
        task = task + match_term(s - target, delta, half, huber);
        gradient = muladd(task_gradient, match_slope(s - target, delta, huber), gradient);
      }
      store<false>(buffers[5] + j, gradient);
    }
    if (a.gradient) write(a, b * a.student.row + i, n, buffers[5]);
  }
  return {sum(output), sum(task)};
}

}  // namespace

// Returns -1. If a timestep or latent is not in its table, it returns the first such sample and has written nothing.
int64_t output_match(const OutputMatch& a) {
  for (int64_t b = 0; b < a.batch; ++b)
    if (!known(a, b)) return b;
  const int64_t chunks = output_match_chunks(a), total = a.batch * chunks;
  Sums* partials = reinterpret_cast<Sums*>(a.partials);
  const int threads = int(smaller(a.threads, total));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    for (int64_t at = total * part / threads; at < total * (part + 1) / threads; ++at) {
      const int64_t b = at / chunks, first = at % chunks * output_match_chunk, end = smaller(first + output_match_chunk, a.n);
      const MatchRow r = match_row(a, b);
      partials[at] = a.huber ? run_chunk<true>(a, r, b, first, end) : run_chunk<false>(a, r, b, first, end);
      if (a.gradient && end == a.n) {
        const int64_t each = bytes_of(a.student.dtype);
        memset(static_cast<char*>(a.gradient) + (b * a.student.row + a.n) * each, 0, (a.student.row - a.n) * each);
      }
    }
  }
  double output = 0, task = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    Sums sums = {0, 0};
    for (int64_t i = 0; i < chunks; ++i)
      sums.output += partials[b * chunks + i].output, sums.task += partials[b * chunks + i].task;
    const MatchRow r = match_row(a, b);
    const double count = double(larger(a.n, 1));
    a.samples[2 * b] = float(sums.output / count), a.samples[2 * b + 1] = float(sums.task / count);
    output += double(r.output_weight) * sums.output / count;
    task += double(r.task_weight) * sums.task / count;
  }
  finish_match(a, output, task);
  return -1;
}

}  // namespace fd::FD_ISA
