// SPDX-License-Identifier: Apache-2.0
// group_norm_silu on a CPU, per channel of a sample: factors and offsets, sums, and the statistics and gradients from the sums.
#pragma once
#include "activations.h"
#include "group_norm_silu/math.h"

namespace fd::FD_ISA {

constexpr int unroll = 4;

// The numbers stored for each channel.
enum Number { middle, rstd, factor, offset, mean, mean_n, time_bias, weight, bias, scale, number_count };
constexpr int sum_count = 3;

// The channels [first, first + count) of one sample: whole groups. padded is count rounded up to whole vectors.
struct Channels {
  const GroupNormSilu& a;
  int64_t sample, first, count, padded;
  double* sums;    // [sum_count][padded]
  float* numbers;  // [number_count][padded]; scale holds 1 + scale; mean and mean_n are the means of dn and dn n

  float* of(Number which) const { return numbers + which * padded; }
  int64_t width() const { return a.channels / a.groups; }
  int64_t groups() const { return count / width(); }
  int64_t group() const { return sample * a.groups + first / width(); }      // the first one
  double of_group() const { return double(width()) * double(a.positions); }  // elements of a group

  double group_sum(const double* sums, int64_t g) const {
    double sum = 0;
    for (int64_t i = g * width(); i < (g + 1) * width(); ++i) sum += sums[i];
    return sum;
  }
  // Writes what is subtracted from x in group g: its mean minus the time bias of the channel.
  void take(double mean, int64_t g, float* middle) const {
    for (int64_t i = g * width(); i < (g + 1) * width(); ++i) middle[i] = float(mean) - of(time_bias)[i];
  }
};

// Sizes in doubles: the sums and numbers; and dz as float between the two passes of a backward, if dx has only two bytes.
inline int64_t workspace_of(int64_t padded) { return sum_count * padded + number_count * padded / 2; }
inline int64_t held_of(const GroupNormSilu& a, int64_t channels) {
  return a.dx && a.silu && a.dtype != Dtype::f32 ? ceil_div(channels * a.positions, 2) : 0;
}

// The first six numbers (middle to mean_n): lane by lane for the channels of a vector, or one channel in all lanes.
struct Of {
  Lanes value[time_bias];
};

inline void read(const Channels& c, Number which, const Row& row, int64_t sample, float missing) {
  for (int64_t i = 0; i < c.count; i += lanes)
    store<false>(c.of(which) + i, vector(row, sample, c.first + i, smaller(c.count - i, lanes), missing));
}

// weight (1 + scale) and bias (1 + scale) + shift of each channel.
inline void affine(const Channels& c) {
  const GroupNormSilu& a = c.a;
  for (int64_t i = 0; i < number_count * c.padded; ++i) c.numbers[i] = 0;
  read(c, time_bias, a.time_bias, c.sample, 0.0f);
  read(c, weight, a.weight, 0, 1.0f);
  read(c, bias, a.bias, 0, 0.0f);
  read(c, scale, a.scale, c.sample, 0.0f);
  read(c, offset, a.shift, c.sample, 0.0f);
  for (int64_t i = 0; i < c.padded; ++i) {
    c.of(scale)[i] += 1.0f;
    c.of(factor)[i] = c.of(weight)[i] * c.of(scale)[i];
    c.of(offset)[i] += c.of(bias)[i] * c.of(scale)[i];
  }
}

inline void keep_mean(const Channels& c, int64_t g, double mean) {
  c.a.mean[c.group() + g] = float(mean);
  c.take(mean, g, c.of(middle));
}

// squares: sum of squares around the mean. Stores rstd and multiplies the factors by it.
inline void keep_rstd(const Channels& c, int64_t g, double squares) {
  const float r = float(1.0 / square_root(squares / c.of_group() + c.a.eps));
  c.a.rstd[c.group() + g] = r;
  for (int64_t i = g * c.width(); i < (g + 1) * c.width(); ++i) c.of(rstd)[i] = r, c.of(factor)[i] *= r;
}

inline void statistics(const Channels& c) {  // reads the mean and rstd that the forward has written
  for (int64_t g = 0; g < c.groups(); ++g) {
    c.take(c.a.mean[c.group() + g], g, c.of(middle));
    for (int64_t i = g * c.width(); i < (g + 1) * c.width(); ++i) c.of(rstd)[i] = c.a.rstd[c.group() + g];
  }
}

inline void write(const Channels& c, Number which, const Row& row) {
  const int64_t at = c.sample * row.stride + c.first;
  const auto all = [&](auto* to) {
    for (int64_t i = 0; i < c.count; i += lanes) set(to + at + i, load(c.of(which) + i), smaller(c.count - i, lanes));
  };
  if (!row.address) return;
  switch (row.dtype) {
    case Dtype::f32: return all(static_cast<float*>(row.address));
    case Dtype::bf16: return all(static_cast<bf16*>(row.address));
    default: return all(static_cast<f16*>(row.address));
  }
}

// Computes from the sums of dz, dz n and n the means over the groups and the gradients of the small tensors (those without
// positions). The sample's contributions to the gradients of weight and bias go to shared.
inline void reduce(const Channels& c, double* shared) {
  const double *ones = c.sums, *products = ones + c.padded, *normals = products + c.padded;
  const float *r = c.of(rstd), *f = c.of(factor), *w = c.of(weight), *b = c.of(bias), *s = c.of(scale);
  const double positions = double(c.a.positions), inverse = 1.0 / c.of_group();
  double *to_weight = shared + c.sample * c.a.channels + c.first, *to_bias = to_weight + c.a.batch * c.a.channels;
  for (int64_t from = 0; from < c.count; from += c.width()) {
    double sum = 0, sum_n = 0;
    for (int64_t i = from; i < from + c.width(); ++i) sum += ones[i] * f[i], sum_n += products[i] * f[i];
    sum *= inverse, sum_n *= inverse;
    for (int64_t i = from; i < from + c.width(); ++i) {
      c.of(mean)[i] = float(sum), c.of(mean_n)[i] = float(sum_n);
      c.of(time_bias)[i] = float(r[i] * (ones[i] * f[i] - positions * sum - normals[i] * sum_n));
    }
  }
  for (int64_t i = 0; i < c.count; ++i) to_weight[i] = s[i] * products[i], to_bias[i] = s[i] * ones[i];
  write(c, time_bias, c.a.dtime_bias);
  for (int64_t i = 0; i < c.count; ++i) c.of(scale)[i] = float(w[i] * products[i] + b[i] * ones[i]);
  write(c, scale, c.a.dscale);
  for (int64_t i = 0; i < c.count; ++i) c.of(scale)[i] = float(ones[i]);
  write(c, scale, c.a.dshift);
}

template <bool silu> FD_HD Lanes output(Lanes x, const Of& of) {
  const Lanes z = muladd(x - of.value[middle], of.value[factor], of.value[offset]);
  return silu ? z * sigmoid(z) : z;
}

template <bool silu> FD_HD Lanes output_gradient(Lanes dy, Lanes n, const Of& of) {
  if (!silu) return dy;
  const Lanes z = muladd(n, of.value[factor], of.value[offset]);
  return dy * silu_slope(z, sigmoid(z), splat(1.0f));
}

FD_HD Lanes input_gradient(Lanes dz, Lanes n, const Of& of) {
  return gradient(dz, n, of.value[rstd], of.value[factor], of.value[mean], of.value[mean_n]);
}

}  // namespace fd::FD_ISA
