// SPDX-License-Identifier: Apache-2.0
// group_norm_silu: a task is a group of a sample (channels last: neighboring groups, 64 channels or more), from x to y.
//
// Threads   static split of the tasks; what samples give to weight and bias is added in their order: the same bits at any
//           thread count
// Traffic   x three times and y, backward x and grad twice, dx three times (fp32), of which all but the first come from the
//           caches where a task's part of x fits: 40960 elements for the largest of SD-1.5 at 512 x 512
// Precision lane sums in fp32 (up to 64 terms), above a lane in double, squares about the mean; outputs rounded once
// Limits    any size (64-bit); x, y and gradients fp32/bf16/fp16 of one dtype, small tensors of any of them
#include "activations.h"
#include "group_norm_silu/math.h"

namespace fd::FD_ISA {
namespace {

constexpr int64_t piece = 4096;  // elements between two flushes of lane sums where positions are side by side
constexpr int64_t rows = 64;     // and positions where channels are
constexpr int unroll = 4;
constexpr int64_t stream_bytes_min = 4 << 20;  // larger outputs go past the caches, which could not hold them

// The channels [first, first + count) of one sample: addresses, what each channel multiplies and adds, and sums.
template <typename T> struct Task {
  const GroupNormSilu& a;
  int64_t sample, first, count, padded;
  float* numbers;  // [6][padded]: middle, rstd, factor, offset, and the means of dn and dn n
  double* sums;    // [3][padded]
  float* held;     // [count][positions]: dz between the passes

  float* of(int which) const { return numbers + which * padded; }
  int64_t start() const { return sample * a.channels * a.positions + (a.channels_last ? first : first * a.positions); }
};

struct Of {  // of the channels of a vector, or of one channel in all lanes
  Lanes value[6];
};

// Calls term(element, valid lanes, Of, accumulators) on every vector of a task and adds the accumulators up in sums, by
// channel; where positions are side by side and by_channel is false, those of all channels in the first of each.
template <bool last, int numbers, int kinds, bool by_channel = true, typename T, typename Term>
FD_HD void walk(const Task<T>& task, const Term& term) {
  const int64_t positions = task.a.positions, channels = task.a.channels;
  for (int64_t i = 0; i < kinds * task.padded; ++i) task.sums[i] = 0;
  Of of;
  Lanes sum[unroll][kinds ? kinds : 1];
  const auto clear = [&]() __attribute__((always_inline)) {
    FD_UNROLL
    for (int u = 0; u < unroll; ++u)
      for (int k = 0; k < kinds; ++k) sum[u][k] = splat(0.0f);
  };
  if (last) {
    for (int64_t from = 0; from < positions; from += rows) {
      const int64_t until = smaller(from + rows, positions);
      for (int64_t j = 0; j < task.count; j += lanes) {
        const int64_t n = smaller(task.count - j, lanes);
        for (int k = 0; k < numbers; ++k) of.value[k] = load(task.of(k) + j);
        clear();
        int64_t p = from;
        if (n == lanes)
          for (; p + unroll <= until; p += unroll) {
            FD_UNROLL
            for (int u = 0; u < unroll; ++u) term((p + u) * channels + j, int64_t(lanes), of, sum[u]);
          }
        for (; p < until; ++p) term(p * channels + j, n, of, sum[0]);
        for (int k = 0; k < kinds; ++k) {
          float x[lanes];
          store<false>(x, (sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]));
          for (int i = 0; i < lanes; ++i) task.sums[k * task.padded + j + i] += x[i];
        }
      }
    }
    return;
  }
  const auto flush = [&](int64_t c) __attribute__((always_inline)) {
    for (int k = 0; k < kinds; ++k) task.sums[k * task.padded + c] += total((sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]));
    clear();
  };
  clear();
  int64_t held = 0;
  for (int64_t c = 0; c < task.count; ++c) {
    for (int k = 0; k < numbers; ++k) of.value[k] = splat(task.of(k)[c]);
    for (int64_t from = 0; from < positions; from += piece) {
      const int64_t end = c * positions + smaller(from + piece, positions);
      int64_t i = c * positions + from;
      held += end - i;
      for (; i + unroll * lanes <= end; i += unroll * lanes) {
        FD_UNROLL
        for (int u = 0; u < unroll; ++u) term(i + u * lanes, int64_t(lanes), of, sum[u]);
      }
      for (; i + lanes <= end; i += lanes) term(i, int64_t(lanes), of, sum[0]);
      if (i < end) term(i, end - i, of, sum[0]);
      if (by_channel || held >= piece) flush(by_channel ? c : 0), held = 0;
    }
  }
  if (!by_channel) flush(0);
}

// weight (1 + scale) and bias (1 + scale) + shift of each channel; zero beyond the last, where vectors reach.
template <typename T> void affine(const Task<T>& task) {
  const GroupNormSilu& a = task.a;
  for (int64_t i = 0; i < 6 * task.padded; ++i) task.numbers[i] = 0;
  for (int64_t i = 0; i < task.count; ++i) {
    const int64_t c = task.first + i;
    const float scale = 1.0f + number(a.scale, task.sample, c, 0.0f);
    task.of(2)[i] = number(a.weight, 0, c, 1.0f) * scale;
    task.of(3)[i] = number(a.bias, 0, c, 0.0f) * scale + number(a.shift, task.sample, c, 0.0f);
  }
}

template <typename T, bool last, bool silu, bool stream> void forward(const Task<T>& task) {
  const GroupNormSilu& a = task.a;
  const T* x = static_cast<const T*>(a.x) + task.start();
  T* y = static_cast<T*>(a.y) + task.start();
  const int64_t width = a.channels / a.groups, count = task.count / width;
  const double n = double(width) * double(a.positions);
  const int64_t ahead = rows * a.channels;
  affine(task);
  float *middle = task.of(0), *rstd = task.of(1), *factor = task.of(2);
  const auto of_group = [&](int64_t g) {
    double sum = 0;
    for (int64_t i = g * width; i < (g + 1) * width; ++i) sum += task.sums[i];
    return sum;
  };

  walk<last, 0, 1, last>(task, [&](int64_t at, int64_t k, const Of&, Lanes* sum) __attribute__((always_inline)) {
    if (last) __builtin_prefetch(x + at + ahead);
    sum[0] = sum[0] + get(x + at, k);
  });
  for (int64_t g = 0; g < count; ++g) {
    double added = 0;
    for (int64_t i = g * width; i < (g + 1) * width; ++i) added += number(a.time_bias, task.sample, task.first + i, 0.0f);
    const double mean = (of_group(g) + added * double(a.positions)) / n;
    a.mean[task.sample * a.groups + task.first / width + g] = float(mean);
    for (int64_t i = g * width; i < (g + 1) * width; ++i)
      middle[i] = float(mean) - number(a.time_bias, task.sample, task.first + i, 0.0f);
  }
  walk<last, 1, 1, last>(task, [&](int64_t at, int64_t k, const Of& of, Lanes* sum) __attribute__((always_inline)) {
    const Lanes d = keep(get(x + at, k) - of.value[0], k);
    sum[0] = muladd(d, d, sum[0]);
  });
  for (int64_t g = 0; g < count; ++g) {
    const float r = float(1.0 / square_root(of_group(g) / n + a.eps));
    a.rstd[task.sample * a.groups + task.first / width + g] = r;
    for (int64_t i = g * width; i < (g + 1) * width; ++i) rstd[i] = r, factor[i] *= r;
  }
  walk<last, 4, 0>(task, [&](int64_t at, int64_t k, const Of& of, Lanes*) __attribute__((always_inline)) {
    const Lanes z = muladd(get(x + at, k) - of.value[0], of.value[2], of.value[3]);
    set<stream>(y + at, silu ? z * sigmoid(z) : z, k);
  });
}

template <typename T, bool last, bool silu> void backward(const Task<T>& task, double* shared) {
  const GroupNormSilu& a = task.a;
  const T *x = static_cast<const T*>(a.x) + task.start(), *grad = static_cast<const T*>(a.grad) + task.start();
  T* dx = static_cast<T*>(a.dx) + task.start();
  const int64_t width = a.channels / a.groups, s = task.sample, ahead = rows * a.channels;
  const double n = double(width) * double(a.positions);
  const Lanes one = splat(1.0f);
  constexpr bool kept = silu && (sizeof(T) == 4 || !last);  // dz between the passes, in the place of dx or in held
  float* between = sizeof(T) == 4 ? reinterpret_cast<float*>(dx) : task.held;
  affine(task);
  float *middle = task.of(0), *rstd = task.of(1), *factor = task.of(2), *mean = task.of(4), *mean_n = task.of(5);
  for (int64_t i = 0; i < task.count; ++i) {
    const int64_t c = task.first + i, group = s * a.groups + c / width;
    middle[i] = a.mean[group] - number(a.time_bias, s, c, 0.0f);
    rstd[i] = a.rstd[group];
  }
  const auto slope = [&](int64_t at, int64_t k, const Of& of, Lanes n) __attribute__((always_inline)) {
    const Lanes dy = get(grad + at, k);
    if (!silu) return dy;
    const Lanes z = muladd(n, of.value[2], of.value[3]);
    return dy * silu_slope(z, sigmoid(z), one);
  };
  walk<last, 4, 3>(task, [&](int64_t at, int64_t k, const Of& of, Lanes* sum) __attribute__((always_inline)) {
    if (last) __builtin_prefetch(x + at + ahead), __builtin_prefetch(grad + at + ahead);
    const Lanes n = keep(standardized(get(x + at, k), of.value[0], of.value[1]), k), dz = slope(at, k, of, n);
    if (kept) set<false>(between + at, dz, k);
    sum[0] = sum[0] + dz, sum[1] = muladd(dz, n, sum[1]), sum[2] = sum[2] + n;
  });
  const double *ones = task.sums, *products = ones + task.padded, *normals = products + task.padded;
  for (int64_t from = 0; from < task.count; from += width) {
    double sum = 0, sum_n = 0;
    for (int64_t i = from; i < from + width; ++i) sum += ones[i] * factor[i], sum_n += products[i] * factor[i];
    sum /= n, sum_n /= n;
    for (int64_t i = from; i < from + width; ++i) {
      const int64_t c = task.first + i;
      const double w = number(a.weight, 0, c, 1.0f), b = number(a.bias, 0, c, 0.0f), f = 1.0f + number(a.scale, s, c, 0.0f);
      mean[i] = float(sum), mean_n[i] = float(sum_n);
      put(a.dtime_bias, s, c, rstd[i] * (ones[i] * factor[i] - double(a.positions) * sum - normals[i] * sum_n));
      put(a.dscale, s, c, w * products[i] + b * ones[i]);
      put(a.dshift, s, c, ones[i]);
      shared[s * a.channels + c] = f * products[i];
      shared[(a.batch + s) * a.channels + c] = f * ones[i];
    }
  }
  walk<last, 6, 0>(task, [&](int64_t at, int64_t k, const Of& of, Lanes*) __attribute__((always_inline)) {
    const Lanes n = standardized(get(x + at, k), of.value[0], of.value[1]),
                dz = kept ? get(between + at, k) : slope(at, k, of, n);
    set<false>(dx + at, gradient(dz, n, of.value[1], of.value[2], of.value[4], of.value[5]), k);
  });
}

// The channels of a task: whole groups; of neighbors in memory enough for whole vectors, and 64 if there are.
int64_t task_channels(const GroupNormSilu& a) {
  const int64_t width = a.channels / a.groups;
  if (!a.channels_last) return width;
  for (int64_t count = 1; count < a.groups; ++count)
    if (a.groups % count == 0 && count * width >= 64 && (count * width % lanes == 0 || count * width >= 512))
      return count * width;
  return a.channels;
}

int64_t padded_channels(const GroupNormSilu& a) { return ceil_div(task_channels(a), lanes) * lanes; }

// Doubles of a thread: sums, numbers, and dz of a task where dx cannot hold it and its vectors are side by side.
int64_t thread_workspace(const GroupNormSilu& a) {
  const bool held = a.dx && a.silu && a.dtype != Dtype::f32 && !a.channels_last;
  return 6 * padded_channels(a) + (held ? ceil_div(task_channels(a) * a.positions, 2) : 0);
}

// Calls body(task) for every task, split evenly over the threads.
template <typename T, typename Body> void for_tasks(const GroupNormSilu& a, double* workspace, const Body& body) {
  const int64_t count = task_channels(a), padded = padded_channels(a), parts = a.channels / count, all = a.batch * parts;
  const int threads = int(smaller(a.threads, all));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    double* own = workspace + part * thread_workspace(a);
    for (int64_t i = all * part / threads; i < all * (part + 1) / threads; ++i)
      body(Task<T>{a, i / parts, i % parts * count, count, padded, reinterpret_cast<float*>(own + 3 * padded), own,
                   reinterpret_cast<float*>(own + 6 * padded)});
  }
}

template <typename T, bool last, bool silu> void forward_tasks(const GroupNormSilu& a, double* workspace) {
  const int64_t line = last ? a.channels : a.positions, elements = a.batch * a.channels * a.positions;
  const bool large = elements * int64_t(sizeof(T)) >= stream_bytes_min;
  if (large && line % lanes == 0 && uintptr_t(a.y) % 64 == 0 && (!last || task_channels(a) % lanes == 0))
    for_tasks<T>(a, workspace, [](const Task<T>& task) { forward<T, last, silu, true>(task), stream_fence(); });
  else for_tasks<T>(a, workspace, [](const Task<T>& task) { forward<T, last, silu, false>(task); });
}

template <typename T> void forward_typed(const GroupNormSilu& a, double* workspace) {
  if (a.channels_last) a.silu ? forward_tasks<T, true, true>(a, workspace) : forward_tasks<T, true, false>(a, workspace);
  else a.silu ? forward_tasks<T, false, true>(a, workspace) : forward_tasks<T, false, false>(a, workspace);
}

template <typename T> void backward_typed(const GroupNormSilu& a, double* workspace) {
  double* shared = workspace + a.threads * thread_workspace(a);
  for_tasks<T>(a, workspace, [&](const Task<T>& task) {
    if (a.channels_last) a.silu ? backward<T, true, true>(task, shared) : backward<T, true, false>(task, shared);
    else a.silu ? backward<T, false, true>(task, shared) : backward<T, false, false>(task, shared);
  });
  if (!a.dweight.address && !a.dbias.address) return;
  for (int64_t c = 0; c < a.channels; ++c) {
    double weight = 0, bias = 0;
    for (int64_t s = 0; s < a.batch; ++s) weight += shared[s * a.channels + c], bias += shared[(a.batch + s) * a.channels + c];
    put(a.dweight, 0, c, weight), put(a.dbias, 0, c, bias);
  }
}

}  // namespace

// Doubles that a call needs beside its tensors.
int64_t group_norm_silu_workspace(const GroupNormSilu& a) {
  return a.threads * thread_workspace(a) + (a.dx ? 2 * a.batch * a.channels : 0);
}

void group_norm_silu(const GroupNormSilu& a, double* workspace) {
  switch (a.dtype) {
    case Dtype::f32: return forward_typed<float>(a, workspace);
    case Dtype::bf16: return forward_typed<bf16>(a, workspace);
    default: return forward_typed<f16>(a, workspace);
  }
}

void group_norm_silu_backward(const GroupNormSilu& a, double* workspace) {
  switch (a.dtype) {
    case Dtype::f32: return backward_typed<float>(a, workspace);
    case Dtype::bf16: return backward_typed<bf16>(a, workspace);
    default: return backward_typed<f16>(a, workspace);
  }
}

}  // namespace fd::FD_ISA
