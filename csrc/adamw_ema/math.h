// SPDX-License-Identifier: Apache-2.0
// Clipped AdamW with an average of the weights, element by element. The number type F is float on a GPU and sixteen lanes on
// a CPU.
//
//   g     = grad / grad_scale * min(1, max_norm / (norm + 1e-6)),  norm: of all gradients / grad_scale
//   m     = m + (1 - beta1) (g - m)
//   v     = beta2 v + (1 - beta2) g^2
//   p     = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
//   e     = e + move (p - e),  move = max(1 - decay, 9 / (9 + t)) with ema_warmup, else 1 - decay
//
// Loshchilov and Hutter, arXiv 1711.05101; t counts from 1.
#pragma once
#include "common.h"

namespace fd {

// One gradient: a flat array of n elements. Python passes a table of these rows, or of AdamWRow, as 64-bit words.
struct GradientRow {
  int64_t n, first_chunk;  // chunks of the gradients before this one
  void* grad;
  int64_t grad_dtype;
};

// One parameter: flat arrays with the same memory order, fp32 except grad and copy. average and copy are null if not wanted.
struct AdamWRow {
  GradientRow gradient;
  float* param;
  float* exp_avg;
  float* exp_avg_sq;
  float* average;
  void* copy;
  int64_t copy_dtype;
  float* step;
  const float* lr;
  double beta1, beta2, eps, weight_decay;
};

// The scalars of a step. The pointers are to device memory. grad_scale, found_inf and ema_weight may be null; then they are 1,
// 0 and no average.
struct AdamWInputs {
  const double* square_sum;
  const float* grad_scale;
  const float* found_inf;
  const float* ema_weight;
  double max_norm;
  int64_t ema_warmup, zero_grads;
};

namespace FD_ISA {

struct Gate {
  float factor;  // the gradients are multiplied by it
  bool skip;
};

FD_HD Gate adamw_gate(const AdamWInputs& a) {
  const double sum = *a.square_sum, scale = a.grad_scale ? double(*a.grad_scale) : 1.0;
  const double clip = a.max_norm / (square_root(sum) / scale + 1e-6);
  const bool finite = sum - sum == 0.0;
  return {float((clip < 1.0 ? clip : 1.0) / scale), !finite || (a.found_inf && *a.found_inf != 0.0f)};
}

template <typename F> struct AdamWConstants {
  F factor, keep, rest1, beta2, rest2, rate, correction, eps, move;
};

// The constants of a parameter in step number t.
FD_HD AdamWConstants<float> adamw_constants(const AdamWRow& row, const AdamWInputs& a, float factor, double t) {
  const double lr = *row.lr, warm = 9.0 / (9.0 + t);
  const double weight = row.average && a.ema_weight ? double(*a.ema_weight) : 0.0;
  return {factor,
          float(1.0 - lr * row.weight_decay),
          float(1.0 - row.beta1),
          float(row.beta2),
          float(1.0 - row.beta2),
          float(lr / (1.0 - power(row.beta1, t))),
          float(1.0 / square_root(1.0 - power(row.beta2, t))),
          float(row.eps),
          float(a.ema_warmup && warm > weight ? warm : weight)};
}

template <typename F> struct AdamWState {
  F param, exp_avg, exp_avg_sq;
};

template <typename F> FD_HD AdamWState<F> adamw(AdamWState<F> x, F grad, const AdamWConstants<F>& c) {
  const F g = grad * c.factor;
  x.exp_avg = x.exp_avg + c.rest1 * (g - x.exp_avg);
  x.exp_avg_sq = x.exp_avg_sq * c.beta2 + g * g * c.rest2;
  x.param = x.param * c.keep - c.rate * (x.exp_avg / (square_root(x.exp_avg_sq) * c.correction + c.eps));
  return x;
}

template <typename F> FD_HD F averaged(F average, F param, const AdamWConstants<F>& c) {
  return average + c.move * (param - average);
}

// Calls body(row, first element, number of elements, chunk) for the chunks [from, until) of all rows. The chunks depend only on
// the sizes of the rows, so their sums do not depend on which thread or block computes them.
template <typename Row> FD_HD const GradientRow& gradient_of(const Row& row);
template <> FD_HD const GradientRow& gradient_of(const GradientRow& row) { return row; }
template <> FD_HD const GradientRow& gradient_of(const AdamWRow& row) { return row.gradient; }

template <typename Row, typename Body>
FD_HD void for_chunks(const Row* rows, int64_t count, int64_t chunk, int64_t from, int64_t until, const Body& body) {
  int64_t row = 0;  // the last row that begins at or before chunk `from`
  for (int64_t end = count; row + 1 < end;) {
    const int64_t middle = (row + end) / 2;
    if (gradient_of(rows[middle]).first_chunk <= from) row = middle;
    else end = middle;
  }
  for (int64_t at = from; at < until; ++at) {
    while (row + 1 < count && gradient_of(rows[row + 1]).first_chunk <= at) ++row;
    const GradientRow& gradient = gradient_of(rows[row]);
    const int64_t first = (at - gradient.first_chunk) * chunk;
    body(rows[row], first, smaller(gradient.n - first, chunk), at);
  }
}

}  // namespace FD_ISA
}  // namespace fd
