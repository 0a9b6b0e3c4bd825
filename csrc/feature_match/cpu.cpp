// SPDX-License-Identifier: Apache-2.0
// feature_match: the weighted distances of all taps and their gradients, in one parallel loop over chunks of 8192 elements.
//
// Threads   static split of all chunks of all taps; partial sums are kept by chunk and added in order, so the result has the
//           same bits at any thread count and on any instruction set
// Traffic   mse and huber with gradient: student + teacher read, gradient written, once (12 bytes per element in fp32, 6 in
//           bf16); normalized_mse and cosine read twice (20 and 10 bytes); without gradient 8 and 4
// Precision elements and lane sums in fp32 (128 terms per lane), sums over lanes in double; gradients rounded once
// Limits    any n >= 0 (64-bit), fp32/bf16/fp16 for student and teacher independently; samples of cosine are blocks of memory
#include "feature_match/math.h"
#include "simd.h"

namespace fd::FD_ISA {
namespace {

// Larger outputs are written with non-temporal stores: otherwise they evict the features, and the read for ownership is a
// third of the traffic.
constexpr int64_t stream_bytes_min = 4 << 20;

struct Sums {
  double difference, teacher, student;  // sums of the terms, of t^2 and of s^2
};

template <Pass pass, Kind kind, bool stream, typename S, typename T>
Sums run_chunk(const S* student, const T* teacher, S* gradient, int64_t n, float factor, float parameter) {
  constexpr int unroll = 4;
  constexpr bool squares = pass != gradient_only && (kind == normalized || kind == cosine);
  const Lanes f = splat(factor), delta = splat(parameter), half = splat(0.5f);
  Lanes difference[unroll], square_teacher[unroll], square_student[unroll];
  for (int u = 0; u < unroll; ++u) difference[u] = square_teacher[u] = square_student[u] = splat(0.0f);
  int64_t i = 0;
  for (; i + unroll * lanes <= n; i += unroll * lanes) {
    FD_UNROLL
    for (int u = 0; u < unroll; ++u) {
      const Lanes t = load(teacher + i + u * lanes), s = load(student + i + u * lanes);
      if (pass != gradient_only) difference[u] = difference[u] + term<kind>(s, t, delta, half);
      if (squares) square_teacher[u] = square_teacher[u] + square(t);
      if (squares && kind == cosine) square_student[u] = square_student[u] + square(s);
      if (pass != sum_only) store<stream>(gradient + i + u * lanes, slope<kind>(s, t, f, delta));
    }
  }
  for (; i < n; i += lanes) {
    const int64_t rest = smaller(n - i, lanes);
    const Lanes t = load_first(teacher + i, rest), s = load_first(student + i, rest);
    if (pass != gradient_only) difference[0] = difference[0] + term<kind>(s, t, delta, half);
    if (squares) square_teacher[0] = square_teacher[0] + square(t);
    if (squares && kind == cosine) square_student[0] = square_student[0] + square(s);
    if (pass != sum_only) store_first(gradient + i, slope<kind>(s, t, f, delta), rest);
  }
  const auto total = [](const Lanes* x) { return sum((x[0] + x[1]) + (x[2] + x[3])); };
  Sums sums = {0, 0, 0};
  if (pass != gradient_only) sums.difference = total(difference);
  if (squares) sums.teacher = total(square_teacher);
  if (squares && kind == cosine) sums.student = total(square_student);
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

int64_t chunks_of(const Tap& tap) { return tap.samples * chunks_of_sample(tap, feature_match_chunk); }

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

Sums sums_of(const Sums* chunks, int64_t count) {
  Sums sums = {0, 0, 0};
  for (int64_t i = 0; i < count; ++i) {
    sums.difference += chunks[i].difference;
    sums.teacher += chunks[i].teacher;
    sums.student += chunks[i].student;
  }
  return sums;
}

// Computes a tap's distance from the sums of its chunks. Overwrites some sums with what the gradient needs: the first chunk of
// the tap with the divisor; for cosine the first chunk of each sample with the two factors.
double finish(const FeatureMatch& a, const Tap& tap, Sums* chunks) {
  const int64_t each = chunks_of_sample(tap, feature_match_chunk);
  if (each == 0) return 0.0;
  if (a.distance != Distance::cosine) {
    const Sums sums = sums_of(chunks, each);
    const double n = double(tap.n);
    chunks->teacher = a.distance == Distance::normalized_mse ? sums.teacher / n + double(a.parameter) : 1.0;
    return sums.difference / n / chunks->teacher;
  }
  double total = 0;
  for (int64_t sample = 0; sample < tap.samples; ++sample, chunks += each) {
    const Sums sums = sums_of(chunks, each);
    const Cosine found = cosine_of(sums.difference, sums.student, sums.teacher, double(a.parameter));
    *chunks = {0, found.teacher, found.student};
    total += found.value;
  }
  return total / double(tap.samples);
}

}  // namespace

int64_t feature_match_workspace(const Tap* taps, int64_t count) {
  int64_t total = 0;
  for (int64_t l = 0; l < count; ++l) total += chunks_of(taps[l]);
  return 3 * total;
}

void feature_match(const FeatureMatch& a) {
  int64_t total = 0, written = 0;
  for (int64_t l = 0; l < a.count; ++l) {
    total += chunks_of(a.taps[l]);
    if (a.taps[l].gradient) written += a.taps[l].n * bytes_of(a.taps[l].student_dtype);
  }
  const bool stream = written >= stream_bytes_min, is_huber = a.distance == Distance::huber;
  Sums* sums = reinterpret_cast<Sums*>(a.partials);
  const float scale = *a.grad_scale;

  for_chunks(a, total, [&](int64_t l, int64_t chunk, int64_t at) {
    const Tap& tap = a.taps[l];
    const auto [first, n, sample] = piece_of(tap, chunk, feature_match_chunk);
    const float factor = gradient_factor(scale, a.weights[l], 1.0, tap.n, is_huber);
    if (a.distance == Distance::cosine) sums[at] = run<sum_only, cosine>(tap, first, n, 0.0f, 0.0f, false);
    else if (a.distance == Distance::normalized_mse) sums[at] = run<sum_only, normalized>(tap, first, n, 0.0f, 0.0f, false);
    else if (is_huber && tap.gradient) sums[at] = run<sum_and_gradient, huber>(tap, first, n, factor, a.parameter, stream);
    else if (is_huber) sums[at] = run<sum_only, huber>(tap, first, n, 0.0f, a.parameter, false);
    else if (tap.gradient) sums[at] = run<sum_and_gradient, squared>(tap, first, n, factor, 0.0f, stream);
    else sums[at] = run<sum_only, squared>(tap, first, n, 0.0f, 0.0f, false);
  });

  double loss = 0;
  Sums* chunks = sums;
  for (int64_t l = 0; l < a.count; ++l) {
    const double distance = finish(a, a.taps[l], chunks);
    chunks += chunks_of(a.taps[l]);
    a.tap_loss[l] = float(distance);
    loss += double(a.weights[l]) * distance;
  }
  *a.loss = float(loss);
  if (written == 0 || !two_passes(a.distance)) return;

  for_chunks(a, total, [&](int64_t l, int64_t chunk, int64_t at) {
    const Tap& tap = a.taps[l];
    if (!tap.gradient) return;
    const auto [first, n, sample] = piece_of(tap, chunk, feature_match_chunk);
    const Sums& found = sums[at - chunk + sample * chunks_of_sample(tap, feature_match_chunk)];
    if (a.distance == Distance::cosine) {
      const float of_student = cosine_factor(scale, a.weights[l], found.student, tap.samples),
                  of_teacher = cosine_factor(scale, a.weights[l], found.teacher, tap.samples);
      run<gradient_only, cosine>(tap, first, n, of_student, of_teacher, stream);
    } else {
      const float factor = gradient_factor(scale, a.weights[l], found.teacher, tap.n, false);
      run<gradient_only, squared>(tap, first, n, factor, 0.0f, stream);
    }
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

// scale_gradients: multiplies every gradient by *factor in place; does nothing if it is 1. Traffic: 8 bytes per element (fp32).
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
