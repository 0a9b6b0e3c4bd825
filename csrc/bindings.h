// SPDX-License-Identifier: Apache-2.0
// Shared by both extension modules: converts the arguments from Python (addresses as integers) to the structures of the ops.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "adamw_ema/math.h"
#include "cross_attention/math.h"
#include "feature_match/math.h"
#include "geglu/math.h"
#include "group_norm_silu/math.h"
#include "layer_norm_modulate/math.h"
#include "noise_gather/math.h"
#include "output_match/math.h"

namespace py = pybind11;
using Address = uintptr_t;
using Addresses = std::vector<uintptr_t>;

template <typename T> T* at(Address a) { return reinterpret_cast<T*>(a); }

// samples is empty if every tap is a single sample.
inline std::vector<fd::Tap> taps_of(const Addresses& student, const Addresses& teacher, const Addresses& gradient,
                                    const std::vector<int64_t>& n, const std::vector<int64_t>& samples,
                                    const std::vector<int>& student_dtype, const std::vector<int>& teacher_dtype) {
  std::vector<fd::Tap> taps(n.size());
  for (size_t l = 0; l < n.size(); ++l)
    taps[l] = {at<void>(student[l]),
               at<void>(teacher[l]),
               gradient.empty() ? nullptr : at<void>(gradient[l]),
               n[l],
               samples.empty() ? 1 : samples[l],
               fd::Dtype(student_dtype[l]),
               fd::Dtype(teacher_dtype[l])};
  return taps;
}

inline fd::AdamWInputs inputs_of(Address square_sum, Address grad_scale, Address found_inf, Address ema_weight, double max_norm,
                                 bool ema_warmup, bool zero_grads) {
  return {at<double>(square_sum),
          at<float>(grad_scale),
          at<float>(found_inf),
          at<float>(ema_weight),
          max_norm,
          ema_warmup,
          zero_grads};
}

inline fd::NoiseGather draw_of(Address latents, Address latent_prompts, const Addresses& prompts,
                               const std::vector<int64_t>& prompt_bytes, Address coefficients, Address replace, Address counter,
                               int64_t latent_count, int64_t prompt_count, int64_t steps, int64_t latent_ring,
                               int64_t prompt_ring, int64_t row, int64_t batch, int64_t first_sample, int64_t global_batch,
                               int64_t pool, int64_t null_index, int64_t null_threshold, bool with_replacement, int dtype,
                               Address x_t, Address timestep, const Addresses& prompt, Address target, Address latent_index,
                               Address prompt_index, Address choice) {
  fd::NoiseGather a = {};
  a.latents = at<void>(latents), a.latent_prompts = at<int64_t>(latent_prompts);
  a.bank_count = int(prompts.size());
  for (int i = 0; i < a.bank_count; ++i) {
    a.banks[i] = {at<void>(prompts[i]), at<void>(prompt[i]), prompt_bytes[i]};
    if (a.banks[i].bytes > a.banks[0].bytes) std::swap(a.banks[0], a.banks[i]);
  }
  a.coefficients = at<float>(coefficients), a.replace = at<int64_t>(replace), a.counter = at<int64_t>(counter);
  a.latent_count = latent_count, a.prompt_count = prompt_count, a.steps = steps;
  a.latent_ring = latent_ring, a.prompt_ring = prompt_ring, a.row = row;
  a.batch = batch, a.first_sample = first_sample, a.global_batch = global_batch, a.pool = pool;
  a.null_index = null_index, a.null_threshold = null_threshold, a.with_replacement = with_replacement;
  a.dtype = fd::Dtype(dtype);
  a.x_t = at<void>(x_t), a.timestep = at<int64_t>(timestep), a.target = at<void>(target);
  a.latent_index = at<int64_t>(latent_index), a.prompt_index = at<int64_t>(prompt_index), a.choice = at<int64_t>(choice);
  return a;
}

// Address, dtype, elements from one sample to the next. A tensor that is not given has address 0.
using Given = std::tuple<Address, int, int64_t>;
inline fd::Row row_of(const Given& given) {
  return {at<void>(std::get<0>(given)), fd::Dtype(std::get<1>(given)), std::get<2>(given)};
}

inline fd::GroupNormSilu norm_of(Address x, int dtype, const std::array<int64_t, 4>& sizes, bool channels_last, bool silu,
                                 double eps, const std::array<Given, 5>& given, Address mean, Address rstd, int threads) {
  fd::GroupNormSilu a = {};
  a.x = at<void>(x), a.dtype = fd::Dtype(dtype), a.channels_last = channels_last || sizes[2] == 1, a.silu = silu, a.eps = eps;
  a.batch = sizes[0], a.channels = sizes[1], a.positions = sizes[2], a.groups = sizes[3];
  a.weight = row_of(given[0]), a.bias = row_of(given[1]), a.time_bias = row_of(given[2]);
  a.scale = row_of(given[3]), a.shift = row_of(given[4]);
  a.mean = at<float>(mean), a.rstd = at<float>(rstd), a.threads = threads;
  return a;
}

inline fd::GroupNormSilu backward_of(fd::GroupNormSilu a, Address grad, Address dx, const std::array<Given, 5>& outs) {
  a.grad = at<void>(grad), a.dx = at<void>(dx);
  a.dweight = row_of(outs[0]), a.dbias = row_of(outs[1]), a.dtime_bias = row_of(outs[2]);
  a.dscale = row_of(outs[3]), a.dshift = row_of(outs[4]);
  return a;
}

// Address, dtype, elements from one row to the next.
using Matrix = std::tuple<Address, int, int64_t>;

inline fd::OutputMatch match_of(const Matrix& student, const Matrix& teacher, const Matrix& unconditional, const Matrix& x_t,
                                const Matrix& latents, Address timestep, Address table, Address guidance, Address weights,
                                Address latent_index, Address choice, Address coefficients, Address counter, int64_t batch,
                                int64_t n, int64_t steps, int64_t latent_count, int64_t first_sample, float output_weight,
                                float task_weight, Address grad_scale, bool huber, float delta, Address loss, Address parts,
                                Address samples, Address gradient) {
  const auto rows = [](const Matrix& m) {
    return fd::Rows{at<void>(std::get<0>(m)), fd::Dtype(std::get<1>(m)), std::get<2>(m)};
  };
  fd::OutputMatch a = {};
  a.student = rows(student), a.teacher = rows(teacher), a.unconditional = rows(unconditional), a.x_t = rows(x_t);
  a.latents = rows(latents), a.timestep = at<int64_t>(timestep), a.table = at<float>(table);
  a.guidance = at<float>(guidance), a.weights = at<float>(weights);
  a.latent_index = at<int64_t>(latent_index), a.choice = at<int64_t>(choice);
  a.coefficients = at<float>(coefficients), a.counter = at<int64_t>(counter);
  a.batch = batch, a.n = n, a.steps = steps, a.latent_count = latent_count, a.first_sample = first_sample;
  a.output_weight = output_weight, a.task_weight = task_weight, a.grad_scale = at<float>(grad_scale);
  a.huber = huber, a.delta = delta, a.loss = at<float>(loss), a.parts = at<float>(parts), a.samples = at<float>(samples);
  a.gradient = at<void>(gradient);
  return a;
}
