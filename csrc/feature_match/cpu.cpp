// SPDX-License-Identifier: Apache-2.0
// feature_match: the weighted distances of all taps and their gradients, in one parallel loop over chunks of 8192 elements.
//
// Threads   static split of all chunks of all taps; partial sums are kept by chunk and added in order, so the result has the
//           same bits at any thread count and on any instruction set
// Traffic   mse and huber with gradient: student + teacher read, gradient written, once (12 bytes an element in fp32, 6 in
// bf16);
//           normalized_mse reads twice (20 and 10 bytes); without gradient 8 and 4
// Precision elements and lane sums in fp32 (128 terms a lane), everything above a lane in double; gradients rounded once
// Limits    any n >= 0 (64-bit), fp32/bf16/fp16 for student and teacher independently
#include "feature_match/math.h"
#include "simd.h"

namespace fd::FD_ISA {
namespace {

// Outputs larger than this go past the caches: they would evict the features, and a read for ownership costs a third of the
// traffic.
constexpr int64_t stream_bytes_min = 4 << 20;

struct Sums {
  double difference, teacher;  // sums of (s - t)^2 and t^2
};

enum Pass { sum_only, gradient_only, sum_and_gradient };
enum Kind { squared, normalized, huber };

template <Pass pass, Kind kind, bool stream, typename S, typename T>
Sums run_chunk(const S* student, const T* teacher, S* gradient, int64_t n, float factor, float parameter) {
  constexpr int unroll = 4;
  const Lanes f = splat(factor), delta = splat(parameter), half = splat(0.5f);
  Lanes difference[unroll], square_teacher[unroll];
  for (int u = 0; u < unroll; ++u) difference[u] = square_teacher[u] = splat(0.0f);
  int64_t i = 0;
  for (; i + unroll * lanes <= n; i += unroll * lanes) {
    FD_UNROLL
    for (int u = 0; u < unroll; ++u) {
      const Lanes t = load(teacher + i + u * lanes), d = load(student + i + u * lanes) - t;
      if (pass != gradient_only) difference[u] = difference[u] + term<kind == huber>(d, delta, half);
      if (kind == normalized) square_teacher[u] = square_teacher[u] + square(t);
      if (pass != sum_only) store<stream>(gradient + i + u * lanes, f * slope<kind == huber>(d, delta));
    }
  }
  for (; i < n; i += lanes) {
    const int64_t rest = smaller(n - i, lanes);
    const Lanes t = load_first(teacher + i, rest), d = load_first(student + i, rest) - t;
    if (pass != gradient_only) difference[0] = difference[0] + term<kind == huber>(d, delta, half);
    if (kind == normalized) square_teacher[0] = square_teacher[0] + square(t);
    if (pass != sum_only) store_first(gradient + i, f * slope<kind == huber>(d, delta), rest);
  }
  Sums sums = {0, 0};
  if (pass != gradient_only) sums.difference = sum((difference[0] + difference[1]) + (difference[2] + difference[3]));
  if (kind == normalized) sums.teacher = sum((square_teacher[0] + square_teacher[1]) + (square_teacher[2] + square_teacher[3]));
  return sums;
}

template <Pass pass, Kind kind, typename S, typename T>
Sums run_typed(const Tap& tap, int64_t first, int64_t n, float factor, float parameter, bool stream) {
  const S* student = static_cast<const S*>(tap.student) + first;
  const T* teacher = static_cast<const T*>(tap.teacher) + first;
  if (pass == sum_only) return run_chunk<pass, kind, false>(student, teacher, (S*)nullptr, n, factor, parameter);
  S* gradient = static_cast<S*>(tap.gradient) + first;
  if (stream && uintptr_t(gradient) % 64 == 0)
    return run_chunk<pass, kind, true>(student, teacher, gradient, n, factor, parameter);
  return run_chunk<pass, kind, false>(student, teacher, gradient, n, factor, parameter);
}

template <Pass pass, Kind kind, typename S>
Sums run_student(const Tap& tap, int64_t first, int64_t n, float factor, float parameter, bool stream) {
  switch (tap.teacher_dtype) {
    case Dtype::f32: return run_typed<pass, kind, S, float>(tap, first, n, factor, parameter, stream);
    case Dtype::bf16: return run_typed<pass, kind, S, bf16>(tap, first, n, factor, parameter, stream);
    default: return run_typed<pass, kind, S, f16>(tap, first, n, factor, parameter, stream);
  }
}

template <Pass pass, Kind kind> Sums run(const Tap& tap, int64_t first, int64_t n, float factor, float parameter, bool stream) {
  switch (tap.student_dtype) {
    case Dtype::f32: return run_student<pass, kind, float>(tap, first, n, factor, parameter, stream);
    case Dtype::bf16: return run_student<pass, kind, bf16>(tap, first, n, factor, parameter, stream);
    default: return run_student<pass, kind, f16>(tap, first, n, factor, parameter, stream);
  }
}

int64_t chunks_of(const Tap& tap) { return ceil_div(tap.n, feature_match_chunk); }

// Calls body(tap, chunk of the tap, chunk of all) for every chunk of all taps, split evenly over the threads.
template <typename Body> void for_chunks(const FeatureMatch& a, int64_t total, const Body& body) {
  const int threads = int(smaller(a.threads, total));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    const int64_t end = total * (part + 1) / threads;
    int64_t at = total * part / threads, before = 0, tap = 0;
    for (; at < end; ++at) {
      while (at >= before + chunks_of(a.taps[tap])) before += chunks_of(a.taps[tap++]);
      body(tap, at - before, at);
    }
    stream_fence();
  }
}

}  // namespace

int64_t feature_match_workspace(const Tap* taps, int64_t count) {
  int64_t total = count;
  for (int64_t l = 0; l < count; ++l) total += chunks_of(taps[l]);
  return 2 * total;
}

void feature_match(const FeatureMatch& a) {
  int64_t total = 0, written = 0;
  for (int64_t l = 0; l < a.count; ++l) {
    total += chunks_of(a.taps[l]);
    if (a.taps[l].gradient) written += a.taps[l].n * bytes_of(a.taps[l].student_dtype);
  }
  const bool stream = written >= stream_bytes_min, is_huber = a.distance == Distance::huber,
             one_pass = a.distance != Distance::normalized_mse;
  Sums* by_chunk = reinterpret_cast<Sums*>(a.partials);
  Sums* by_tap = by_chunk + total;
  const float scale = *a.grad_scale;

  for_chunks(a, total, [&](int64_t l, int64_t chunk, int64_t at) {
    const Tap& tap = a.taps[l];
    const int64_t first = chunk * feature_match_chunk, n = smaller(tap.n - first, feature_match_chunk);
    const float factor = gradient_factor(scale, a.weights[l], 1.0, tap.n, is_huber);
    if (!one_pass) by_chunk[at] = run<sum_only, normalized>(tap, first, n, 0.0f, 0.0f, false);
    else if (is_huber && tap.gradient) by_chunk[at] = run<sum_and_gradient, huber>(tap, first, n, factor, a.parameter, stream);
    else if (is_huber) by_chunk[at] = run<sum_only, huber>(tap, first, n, 0.0f, a.parameter, false);
    else if (tap.gradient) by_chunk[at] = run<sum_and_gradient, squared>(tap, first, n, factor, 0.0f, stream);
    else by_chunk[at] = run<sum_only, squared>(tap, first, n, 0.0f, 0.0f, false);
  });

  double loss = 0;
  for (int64_t l = 0, at = 0; l < a.count; ++l) {
    const Tap& tap = a.taps[l];
    Sums sums = {0, 0};
    for (const int64_t end = at + chunks_of(tap); at < end; ++at) {
      sums.difference += by_chunk[at].difference;
      sums.teacher += by_chunk[at].teacher;
    }
    const double n = double(tap.n > 0 ? tap.n : 1), denominator = one_pass ? 1.0 : sums.teacher / n + double(a.parameter);
    const double distance = tap.n > 0 ? sums.difference / n / denominator : 0.0;
    by_tap[l].teacher = denominator;
    a.tap_loss[l] = float(distance);
    loss += double(a.weights[l]) * distance;
  }
  *a.loss = float(loss);
  if (one_pass || written == 0) return;

  for_chunks(a, total, [&](int64_t l, int64_t chunk, int64_t) {
    const Tap& tap = a.taps[l];
    if (!tap.gradient) return;
    const int64_t first = chunk * feature_match_chunk, n = smaller(tap.n - first, feature_match_chunk);
    const float factor = gradient_factor(scale, a.weights[l], by_tap[l].teacher, tap.n, false);
    run<gradient_only, squared>(tap, first, n, factor, 0.0f, stream);
  });
}

namespace {

template <typename T> void scale_chunk(T* x, int64_t n, float factor) {
  const Lanes f = splat(factor);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store<false>(x + i, f * load(x + i));
  if (i < n) store_first(x + i, f * load_first(x + i, n - i), n - i);
}

}  // namespace

// scale_gradients: every gradient times *factor, in place; returns at once when that is 1. 8 bytes an element (fp32).
void scale_gradients(const FeatureMatch& a, const float* factor) {
  if (*factor == 1.0f) return;
  int64_t total = 0;
  for (int64_t l = 0; l < a.count; ++l) total += chunks_of(a.taps[l]);
  for_chunks(a, total, [&](int64_t l, int64_t chunk, int64_t) {
    const Tap& tap = a.taps[l];
    const int64_t first = chunk * feature_match_chunk, n = smaller(tap.n - first, feature_match_chunk);
    switch (tap.student_dtype) {
      case Dtype::f32: return scale_chunk(static_cast<float*>(tap.gradient) + first, n, *factor);
      case Dtype::bf16: return scale_chunk(static_cast<bf16*>(tap.gradient) + first, n, *factor);
      default: return scale_chunk(static_cast<f16*>(tap.gradient) + first, n, *factor);
    }
  });
}

}  // namespace fd::FD_ISA
