// SPDX-License-Identifier: Apache-2.0
// The loss of a student's output, element by element. The number type F is float on a GPU and sixteen lanes on a CPU.
//
//   target = from_x_t x_t + from_teacher (c + w (c - u))      c, u: the teacher's output with and without the prompt
//   task   = target_signal x + target_noise z                 z: the noise of noise_gather, generated again from its counter
//   sample = mean over elements of (s - target)^2, and of (s - task)^2; huber: d^2 / 2 if |d| <= delta, else linear
//   loss   = output_weight mean_b(weight_b sample_b) + task_weight mean_b(weight_b sample_b)
//
// A table with a row per timestep contains the noise schedule and the prediction types (fastdistill/diffusion/matching.py).
#pragma once
#include "philox.h"

namespace fd {

// A matrix of one of the three dtypes; data is null if it is not given.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t row;  // elements from one row to the next
};

struct OutputMatch {
  Rows student, teacher, unconditional, x_t, latents;
  const int64_t* timestep;  // [batch]
  const float* table;       // [steps, 5] guidance, from_x_t, from_teacher, weight of the output, weight of the task
  const float* guidance;    // [batch] factors of the table's guidance, or null
  const float* weights;     // [batch] factors of the table's weights, or null
  // Only for the task loss, else null:
  const int64_t* latent_index;                          // [batch]
  const int64_t* choice;                                // [batch]: samples of choice_random have no task
  const float* coefficients;                            // [steps, 4] like noise_gather's
  const int64_t* counter;                               // [2] seed, step
  int64_t batch, n, steps, latent_count, first_sample;  // n: matched elements of a row; the gradient of the others is 0
  float output_weight, task_weight;
  const float* grad_scale;  // []
  bool huber;
  float delta;
  float* loss;       // []
  float* parts;      // [2] output, task: with the weights per sample, without output_weight and task_weight
  float* samples;    // [batch, 2] output, task: unweighted
  void* gradient;    // like student, or null
  double* partials;  // workspace [batch * chunks of a row, 2]
  int threads;
};

namespace FD_ISA {

// Elements per partial sum. The chunks depend only on the sizes, so the sums do not depend on the number of threads.
constexpr int64_t output_match_chunk = 2048;

FD_HD int64_t output_match_chunks(const OutputMatch& a) { return larger(1, ceil_div(a.n, output_match_chunk)); }

// The constants of one sample.
struct MatchRow {
  float guidance, from_x_t, from_teacher, target_signal, target_noise;
  float output_weight, task_weight;      // of the sample
  float output_gradient, task_gradient;  // factors of (s - target) and (s - task) in the gradient
  int64_t latent;
};

// Whether the sample's timestep and latent are in their tables.
FD_HD bool known(const OutputMatch& a, int64_t b) {
  const bool timed = a.timestep[b] >= 0 && a.timestep[b] < a.steps;
  return timed && (!a.counter || (a.latent_index[b] >= 0 && a.latent_index[b] < a.latent_count));
}

// If a sample's timestep or latent is out of range, its weights and so its loss are NaN, and row 0 of the tables is read.
FD_HD MatchRow match_row(const OutputMatch& a, int64_t b) {
  const bool there = known(a, b);
  const float* t = a.table + 5 * (there ? a.timestep[b] : 0);
  const float own = there ? (a.weights ? a.weights[b] : 1.0f) : as_float(0x7FC00000u);
  MatchRow r = {};
  r.guidance = t[0] * (a.guidance ? a.guidance[b] : 1.0f);
  r.from_x_t = t[1], r.from_teacher = t[2];
  r.output_weight = t[3] * own;
  r.task_weight = a.counter && a.choice[b] == choice_random ? 0.0f : t[4] * own;
  if (a.counter) {
    const float* c = a.coefficients + 4 * (there ? a.timestep[b] : 0);
    r.target_signal = c[2], r.target_noise = c[3];
    r.latent = there ? a.latent_index[b] : 0;
  }
  const double scale = double(*a.grad_scale) * (a.huber ? 1.0 : 2.0) / (double(a.batch) * double(a.n));
  r.output_gradient = float(scale * double(a.output_weight) * double(r.output_weight));
  r.task_gradient = float(scale * double(a.task_weight) * double(r.task_weight));
  return r;
}

template <typename F>
FD_HD F teacher_target(F conditional, F unconditional, F x_t, F guidance, F from_x_t, F from_teacher, bool guided) {
  const F output = guided ? muladd(guidance, conditional - unconditional, conditional) : conditional;
  return muladd(from_x_t, x_t, from_teacher * output);
}

// The gradient of a difference (up to a factor), and the term that it adds to the sum.
template <typename F> FD_HD F match_slope(F d, F delta, bool huber) { return huber ? clamp(d, delta) : d; }
template <typename F> FD_HD F match_term(F d, F delta, F half, bool huber) {
  const F c = match_slope(d, delta, huber);
  return huber ? c * (d - half * c) : d * d;
}

// Computes the loss from the sums over the samples.
FD_HD void finish_match(const OutputMatch& a, double output, double task) {
  const double count = a.batch > 0 ? double(a.batch) : 1.0;
  a.parts[0] = float(output / count), a.parts[1] = float(task / count);
  *a.loss = float((double(a.output_weight) * output + double(a.task_weight) * task) / count);
}

}  // namespace FD_ISA
}  // namespace fd
