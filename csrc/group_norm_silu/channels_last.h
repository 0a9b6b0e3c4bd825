// SPDX-License-Identifier: Apache-2.0
// group_norm_silu for channels last: a sample is divided into chunks of whole positions, each contiguous in memory.
//
// Threads   divide the samples if these split evenly, else the chunks of one sample after another. Each chunk has its own sums,
//           added in the order of the chunks: the same bits at any thread count
// Traffic   forward: x read twice, y written; backward: x and grad read, then x and dz read, dx written. The second pass goes
//           from the last chunk to the first, because the caches still hold the end of the sample
// Precision lane sums in fp32 (up to 64 terms) within a chunk, double across chunks; squares around the mean of the chunk,
//           then the moments are merged (Chan, Golub and LeVeque, 1983)
#pragma once
#include "group_norm_silu/channels.h"

namespace fd::FD_ISA {

constexpr int64_t chunk_elements = 1 << 16, chunk_rows = 64 * unroll;

// A sample, its chunks and the arrays for their sums.
struct Chunks {
  Channels all;
  int64_t rows, count;
  float* sums;    // [count][3][padded]
  double* means;  // [count][groups]
  float* held;    // [positions][channels]: dz between the passes, if dx has only two bytes

  float* of(int64_t chunk, int kind) const { return sums + (3 * chunk + kind) * all.padded; }
  int64_t from(int64_t chunk) const { return chunk * rows; }
  int64_t until(int64_t chunk) const { return smaller(from(chunk) + rows, all.a.positions); }
};

// Calls term(element, valid lanes, Of, sums) for every vector of n rows, which are ``apart`` positions from each other, and
// adds the sums to total, by channel.
template <int n, int given, int kinds, typename Term> FD_HD void walk_rows(int64_t p, int64_t apart, const float* numbers,
                                                                           float* total, int64_t channels, int64_t padded,
                                                                           const Term& term) {
  for (int64_t j = 0; j < channels; j += lanes) {
    const int64_t valid = smaller(channels - j, lanes);
    Of of;
    Lanes sum[kinds ? kinds : 1];
    for (int k = 0; k < given; ++k) of.value[k] = load(numbers + k * padded + j);
    for (int k = 0; k < kinds; ++k) sum[k] = splat(0.0f);
    if (valid == lanes) {
      FD_UNROLL
      for (int u = 0; u < n; ++u) term((p + u * apart) * channels + j, int64_t(lanes), of, sum);
    } else {
      for (int u = 0; u < n; ++u) term((p + u * apart) * channels + j, valid, of, sum);
    }
    for (int k = 0; k < kinds; ++k) store<false>(total + k * padded + j, load(total + k * padded + j) + sum[k]);
  }
}

template <int given, int kinds, typename Term>
FD_HD void walk_chunk(const Chunks& c, int64_t chunk, const float* numbers, float* total, const Term& term) {
  const int64_t channels = c.all.count, padded = c.all.padded, until = c.until(chunk);
  for (int64_t i = 0; i < kinds * padded; ++i) total[i] = 0;
  const int64_t from = c.from(chunk), part = (until - from) / unroll;  // a core reads faster from several pages at once
  for (int64_t i = 0; i < part; ++i) walk_rows<unroll, given, kinds>(from + i, part, numbers, total, channels, padded, term);
  for (int64_t p = from + unroll * part; p < until; ++p)
    walk_rows<1, given, kinds>(p, 0, numbers, total, channels, padded, term);
}

// Calls body(chunk) for every chunk; the chunks of a thread are consecutive.
template <bool backwards, typename Body> void for_chunks(const Chunks& c, int threads, const Body& body) {
  threads = int(smaller(threads, c.count));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    const int64_t first = c.count * part / threads, end = c.count * (part + 1) / threads;
    for (int64_t i = first; i < end; ++i) body(backwards ? first + end - 1 - i : i);
  }
}

// Adds the sums of all chunks, for the first ``kinds`` kinds of sums.
inline void add_chunks(const Chunks& c, int kinds) {
  const int64_t n = kinds * c.all.padded;
  for (int64_t i = 0; i < n; ++i) c.all.sums[i] = 0;
  for (int64_t chunk = 0; chunk < c.count; ++chunk)
    for (int64_t i = 0; i < n; ++i) c.all.sums[i] += c.of(chunk, 0)[i];
}

template <typename T, bool silu> void forward_last(const Chunks& c, int threads) {
  const Channels& all = c.all;
  const GroupNormSilu& a = all.a;
  const int64_t start = all.sample * a.channels * a.positions, width = all.width();
  const T* x = static_cast<const T*>(a.x) + start;
  T* y = static_cast<T*>(a.y) + start;
  affine(all);
  for_chunks<false>(c, threads, [&](int64_t chunk) {
    float *sums = c.of(chunk, 0), *squares = c.of(chunk, 1), *middles = c.of(chunk, 2);
    const double rows = double(c.until(chunk) - c.from(chunk));
    walk_chunk<0, 1>(c, chunk, nullptr, sums, [&](int64_t at, int64_t n, const Of&, Lanes* sum) __attribute__((always_inline)) {
      sum[0] = sum[0] + get(x + at, n);
    });
    for (int64_t g = 0; g < a.groups; ++g) {
      double sum = 0;
      for (int64_t i = g * width; i < (g + 1) * width; ++i) sum += sums[i] + rows * all.of(time_bias)[i];
      const double mean = c.means[chunk * a.groups + g] = sum / (rows * double(width));
      all.take(mean, g, middles);
    }
    walk_chunk<1, 1>(c, chunk, middles, squares,
                     [&](int64_t at, int64_t n, const Of& of, Lanes* sum) __attribute__((always_inline)) {
                       const Lanes d = keep(get(x + at, n) - of.value[middle], n);
                       sum[0] = muladd(d, d, sum[0]);
                     });
  });
  add_chunks(c, 2);
  for (int64_t g = 0; g < a.groups; ++g) {
    double mean = 0, between = 0;
    for (int64_t chunk = 0; chunk < c.count; ++chunk) {
      const double before = double(c.from(chunk)), until = double(c.until(chunk)), step = c.means[chunk * a.groups + g] - mean;
      mean += step * (until - before) / until;
      between += step * step * double(width) * before * (until - before) / until;
    }
    keep_mean(all, g, mean);
    keep_rstd(all, g, all.group_sum(all.sums + all.padded, g) + between);
  }
  for_chunks<true>(c, threads, [&](int64_t chunk) {
    walk_chunk<4, 0>(c, chunk, all.numbers, nullptr,
                     [&](int64_t at, int64_t n, const Of& of, Lanes*)
                         __attribute__((always_inline)) { set(y + at, output<silu>(get(x + at, n), of), n); });
  });
}

template <typename T, bool silu> void backward_last(const Chunks& c, int threads, double* shared) {
  const Channels& all = c.all;
  const GroupNormSilu& a = all.a;
  const int64_t start = all.sample * a.channels * a.positions;
  const T *x = static_cast<const T*>(a.x) + start, *grad = static_cast<const T*>(a.grad) + start;
  T* dx = static_cast<T*>(a.dx) + start;
  float* between = sizeof(T) == 4 ? reinterpret_cast<float*>(dx) : c.held;
  affine(all);
  statistics(all);
  for_chunks<false>(c, threads, [&](int64_t chunk) {
    walk_chunk<4, 3>(c, chunk, all.numbers, c.of(chunk, 0),
                     [&](int64_t at, int64_t k, const Of& of, Lanes* sum) __attribute__((always_inline)) {
                       const Lanes n = keep(standardized(get(x + at, k), of.value[middle], of.value[rstd]), k);
                       const Lanes dz = output_gradient<silu>(get(grad + at, k), n, of);
                       if (silu) set(between + at, dz, k);
                       sum[0] = sum[0] + dz, sum[1] = muladd(dz, n, sum[1]), sum[2] = sum[2] + n;
                     });
  });
  add_chunks(c, 3);
  reduce(all, shared);
  for_chunks<true>(c, threads, [&](int64_t chunk) {
    walk_chunk<6, 0>(c, chunk, all.numbers, nullptr,
                     [&](int64_t at, int64_t k, const Of& of, Lanes*) __attribute__((always_inline)) {
                       const Lanes n = standardized(get(x + at, k), of.value[middle], of.value[rstd]);
                       set(dx + at, input_gradient(silu ? get(between + at, k) : get(grad + at, k), n, of), k);
                     });
  });
}

// How many threads work on different samples: all of them, or 1 if all share the chunks of one sample at a time.
inline int sample_threads(const GroupNormSilu& a) {
  return a.batch % a.threads == 0 || a.batch >= 4 * a.threads ? a.threads : 1;
}

inline int64_t rows_of_chunk(const GroupNormSilu& a) {
  return smaller(larger(chunk_elements / a.channels / unroll, 1) * unroll, chunk_rows);
}

inline int64_t workspace_last(const GroupNormSilu& a) {
  const int64_t padded = ceil_div(a.channels, lanes) * lanes, chunks = ceil_div(a.positions, rows_of_chunk(a));
  return workspace_of(padded) + chunks * (3 * padded / 2 + a.groups) + held_of(a, a.channels);
}

// Calls body(chunks of a sample, threads for it) for every sample.
template <typename Body> void for_samples(const GroupNormSilu& a, double* workspace, const Body& body) {
  const int64_t padded = ceil_div(a.channels, lanes) * lanes, rows = rows_of_chunk(a), count = ceil_div(a.positions, rows);
  const int outer = sample_threads(a), inner = outer == 1 ? a.threads : 1;
#pragma omp parallel for num_threads(outer) schedule(static, 1) if (outer > 1)
  for (int part = 0; part < outer; ++part) {
    double *own = workspace + part * workspace_last(a), *means = own + workspace_of(padded);
    float *numbers = reinterpret_cast<float*>(own + sum_count * padded),
          *sums = reinterpret_cast<float*>(means + count * a.groups);
    for (int64_t s = a.batch * part / outer; s < a.batch * (part + 1) / outer; ++s)
      body(Chunks{{a, s, 0, a.channels, padded, own, numbers}, rows, count, sums, means, sums + 3 * count * padded}, inner);
  }
}

}  // namespace fd::FD_ISA
