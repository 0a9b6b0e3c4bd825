// SPDX-License-Identifier: Apache-2.0
// The channels of a sample in group_norm_silu: what each multiplies and adds, sums by channel, and what is made of them.
#pragma once
#include "activations.h"
#include "group_norm_silu/math.h"

namespace fd::FD_ISA {

constexpr int unroll = 4;
constexpr int64_t stream_bytes_min = 4 << 20;  // larger outputs go past the caches, which could not hold them

// The channels [first, first + count) of one sample, whole groups; padded: count rounded up to whole vectors.
struct Channels {
  const GroupNormSilu& a;
  int64_t sample, first, count, padded;
  double* sums;    // [3][padded]
  float* numbers;  // [6][padded]: middle, rstd, factor, offset, and the means of dn and dn n

  float* of(int which) const { return numbers + which * padded; }
  int64_t width() const { return a.channels / a.groups; }
  double of_group() const { return double(width()) * double(a.positions); }  // elements of a group
  float time_bias(int64_t i) const { return number(a.time_bias, sample, first + i, 0.0f); }

  double group_sum(const double* sums, int64_t g) const {
    double sum = 0;
    for (int64_t i = g * width(); i < (g + 1) * width(); ++i) sum += sums[i];
    return sum;
  }
};

// Doubles: of sums and numbers, and of dz in float between the passes of a backward where dx cannot hold it.
inline int64_t workspace_of(int64_t padded) { return 6 * padded; }
inline int64_t held_of(const GroupNormSilu& a, int64_t channels) {
  return a.dx && a.silu && a.dtype != Dtype::f32 ? ceil_div(channels * a.positions, 2) : 0;
}

struct Of {  // numbers of the channels of a vector, or of one channel in all lanes
  Lanes value[6];
};

// weight (1 + scale) and bias (1 + scale) + shift of each channel; zero beyond the last, where vectors reach.
inline void affine(const Channels& c) {
  const GroupNormSilu& a = c.a;
  for (int64_t i = 0; i < 6 * c.padded; ++i) c.numbers[i] = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    const float scale = 1.0f + number(a.scale, c.sample, c.first + i, 0.0f);
    c.of(2)[i] = number(a.weight, 0, c.first + i, 1.0f) * scale;
    c.of(3)[i] = number(a.bias, 0, c.first + i, 0.0f) * scale + number(a.shift, c.sample, c.first + i, 0.0f);
  }
}

// What is taken from x in the groups of a mean.
inline void set_mean(const Channels& c, int64_t g, double mean) {
  for (int64_t i = g * c.width(); i < (g + 1) * c.width(); ++i) c.of(0)[i] = float(mean) - c.time_bias(i);
}

inline void keep_mean(const Channels& c, int64_t g, double mean) {
  c.a.mean[c.sample * c.a.groups + c.first / c.width() + g] = float(mean);
  set_mean(c, g, mean);
}

// From the sum of squares about the mean; the factors are times rstd from here on.
inline void keep_rstd(const Channels& c, int64_t g, double squares) {
  const float rstd = float(1.0 / square_root(squares / c.of_group() + c.a.eps));
  c.a.rstd[c.sample * c.a.groups + c.first / c.width() + g] = rstd;
  for (int64_t i = g * c.width(); i < (g + 1) * c.width(); ++i) c.of(1)[i] = rstd, c.of(2)[i] *= rstd;
}

inline void statistics(const Channels& c) {  // the forward's
  for (int64_t i = 0; i < c.count; ++i) {
    const int64_t group = c.sample * c.a.groups + (c.first + i) / c.width();
    c.of(0)[i] = c.a.mean[group] - c.time_bias(i);
    c.of(1)[i] = c.a.rstd[group];
  }
}

// From the sums of dz, dz n and n: the means over the groups, and the gradients of what has no positions. shared takes what
// this sample gives to weight and bias.
inline void reduce(const Channels& c, double* shared) {
  const GroupNormSilu& a = c.a;
  const double *ones = c.sums, *products = ones + c.padded, *normals = products + c.padded;
  const float *rstd = c.of(1), *factor = c.of(2);
  for (int64_t from = 0; from < c.count; from += c.width()) {
    double sum = 0, sum_n = 0;
    for (int64_t i = from; i < from + c.width(); ++i) sum += ones[i] * factor[i], sum_n += products[i] * factor[i];
    sum /= c.of_group(), sum_n /= c.of_group();
    for (int64_t i = from; i < from + c.width(); ++i) {
      const int64_t at = c.first + i, s = c.sample;
      const double w = number(a.weight, 0, at, 1.0f), b = number(a.bias, 0, at, 0.0f), f = 1.0f + number(a.scale, s, at, 0.0f);
      c.of(4)[i] = float(sum), c.of(5)[i] = float(sum_n);
      put(a.dtime_bias, s, at, rstd[i] * (ones[i] * factor[i] - double(a.positions) * sum - normals[i] * sum_n));
      put(a.dscale, s, at, w * products[i] + b * ones[i]);
      put(a.dshift, s, at, ones[i]);
      shared[s * a.channels + at] = f * products[i];
      shared[(a.batch + s) * a.channels + at] = f * ones[i];
    }
  }
}

template <bool silu> FD_HD Lanes output(Lanes x, const Of& of) {
  const Lanes z = muladd(x - of.value[0], of.value[2], of.value[3]);
  return silu ? z * sigmoid(z) : z;
}

template <bool silu> FD_HD Lanes output_gradient(Lanes dy, Lanes n, const Of& of) {
  if (!silu) return dy;
  const Lanes z = muladd(n, of.value[2], of.value[3]);
  return dy * silu_slope(z, sigmoid(z), splat(1.0f));
}

FD_HD Lanes input_gradient(Lanes dz, Lanes n, const Of& of) {
  return gradient(dz, n, of.value[1], of.value[2], of.value[4], of.value[5]);
}

}  // namespace fd::FD_ISA
