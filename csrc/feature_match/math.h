// SPDX-License-Identifier: Apache-2.0
// Distances between student and teacher features, element by element. The number type F is float on a GPU and sixteen lanes
// on a CPU.
//
//   mse             tap = mean((s - t)^2)                       d tap / d s = 2 (s - t) / n
//   normalized_mse  tap = mean((s - t)^2) / (mean(t^2) + eps)   d tap / d s = 2 (s - t) / n / (mean(t^2) + eps)
//   huber           tap = mean(c (s - t - c / 2))               d tap / d s = c / n,  c = s - t clamped to [-delta, delta]
//   cosine          tap = mean over samples of 1 - c,  c = s.t / (S T),  S = max(|s|, eps),  T = max(|t|, eps)
//                                                               d tap / d s = (c s / S^2 - t / (S T)) / samples
#pragma once
#include "common.h"

namespace fd {

enum class Distance : int { mse = 0, normalized_mse = 1, huber = 2, cosine = 3 };

// Whether the gradient needs sums over the whole tap or sample.
FD_HD constexpr bool two_passes(Distance d) { return d == Distance::normalized_mse || d == Distance::cosine; }

// One tap: flat arrays of n elements with the same memory order. For the cosine distance they consist of samples of equal
// size; for the others samples is 1. gradient is null if it is not wanted.
struct Tap {
  const void* student;
  const void* teacher;
  void* gradient;
  int64_t n, samples;
  Dtype student_dtype, teacher_dtype;
};

struct FeatureMatch {
  const Tap* taps;
  int64_t count;
  const float* weights;     // [count]
  const float* grad_scale;  // []
  Distance distance;
  float parameter;   // eps of normalized_mse and cosine, delta of huber
  float* loss;       // []
  float* tap_loss;   // [count]
  double* partials;  // workspace: 3 numbers per chunk
  int threads;
};

namespace FD_ISA {

// Elements per partial sum. The chunks depend only on the sizes, so the sums do not depend on the number of threads.
constexpr int64_t feature_match_chunk = 8192;

template <typename F> FD_HD F square(F x) { return x * x; }

enum Pass { sum_only, gradient_only, sum_and_gradient };
enum Kind { squared, normalized, huber, cosine };

// The term that an element adds to the sum (cosine: to s.t), and its gradient: a factor times the slope (cosine: two factors).
template <Kind kind, typename F, typename H> FD_HD F term(F s, F t, F delta, H half) {
  if (kind == cosine) return s * t;
  const F d = s - t;
  if (kind != huber) return square(d);
  const F c = clamp(d, delta);
  return c * (d - half * c);
}
template <Kind kind, typename F> FD_HD F slope(F s, F t, F factor, F parameter) {
  if (kind == cosine) return factor * s + parameter * t;
  const F d = s - t;
  return factor * (kind == huber ? clamp(d, parameter) : d);
}

FD_HD float gradient_factor(float grad_scale, float weight, double denominator, int64_t n, bool huber) {
  return float(double(grad_scale) * double(weight) * (huber ? 1.0 : 2.0) / (double(n) * denominator));
}

// The first element, length and sample of a chunk of a tap. A chunk never spans two samples.
struct Piece {
  int64_t first, n, sample;
};

FD_HD int64_t chunks_of_sample(const Tap& tap, int64_t chunk) { return ceil_div(tap.n / tap.samples, chunk); }

FD_HD Piece piece_of(const Tap& tap, int64_t at, int64_t chunk) {
  if (tap.samples == 1) return {at * chunk, smaller(tap.n - at * chunk, chunk), 0};
  const int64_t size = tap.n / tap.samples, each = ceil_div(size, chunk), sample = at / each, offset = at % each * chunk;
  return {sample * size + offset, smaller(size - offset, chunk), sample};
}

// 1 - c of one sample, and the factors of its gradient ``student`` s + ``teacher`` t; computed from s.t, s.s and t.t.
struct Cosine {
  double value, student, teacher;
};

FD_HD Cosine cosine_of(double product, double student_square, double teacher_square, double eps) {
  const double norm = square_root(student_square), teacher_norm = square_root(teacher_square);
  const double s = norm < eps ? eps : norm, t = teacher_norm < eps ? eps : teacher_norm, c = product / (s * t);
  return {1.0 - c, norm < eps ? 0.0 : c / (s * s), -1.0 / (s * t)};
}

// One of these factors in the gradient of the loss.
FD_HD float cosine_factor(float grad_scale, float weight, double factor, int64_t samples) {
  return float(double(grad_scale) * double(weight) * factor / double(samples));
}

}  // namespace FD_ISA
}  // namespace fd
