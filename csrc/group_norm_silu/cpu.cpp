// SPDX-License-Identifier: Apache-2.0
// group_norm_silu: a task is one group of one sample, from x to y; for channels last see channels_last.h.
//
// Threads   static split of the tasks; contributions of samples to weight and bias are added in order: the same bits at any
//           thread count
// Traffic   forward: x read three times, y written; backward: x and grad read, then x and dz read, dx written. All reads but
//           the first come from the caches if a group fits there (SD-1.5 at 512 x 512: at most 40960 elements)
// Precision lane sums in fp32 (up to 64 terms), sums over lanes in double, squares around the mean; outputs rounded once
// Limits    any size (64-bit); x, y and gradients all fp32, bf16 or fp16; each small tensor may have any of these dtypes

#include "group_norm_silu/channels_last.h"

namespace fd::FD_ISA {
namespace {

constexpr int64_t piece = 4096;  // elements between two flushes of lane sums

// Calls term(element, valid lanes, Of, accumulators) for every vector of a task and adds the accumulators to the sums of
// the channel; if by_channel is false, all channels are added to the first element of each sum.
template <int given, int kinds, bool by_channel, typename Term> FD_HD void walk(const Channels& task, const Term& term) {
  const int64_t positions = task.a.positions;
  for (int64_t i = 0; i < kinds * task.padded; ++i) task.sums[i] = 0;
  Of of;
  Lanes sum[unroll][kinds ? kinds : 1];
  const auto clear = [&]() __attribute__((always_inline)) {
    FD_UNROLL
    for (int u = 0; u < unroll; ++u)
      for (int k = 0; k < kinds; ++k) sum[u][k] = splat(0.0f);
  };
  const auto flush = [&](int64_t c) __attribute__((always_inline)) {
    for (int k = 0; k < kinds; ++k) task.sums[k * task.padded + c] += total((sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]));
    clear();
  };
  clear();
  int64_t held = 0;
  for (int64_t c = 0; c < task.count; ++c) {
    for (int k = 0; k < given; ++k) of.value[k] = splat(task.numbers[k * task.padded + c]);
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

template <typename T, bool silu> void forward(const Channels& task) {
  const GroupNormSilu& a = task.a;
  const int64_t start = (task.sample * a.channels + task.first) * a.positions;
  const T* x = static_cast<const T*>(a.x) + start;
  T* y = static_cast<T*>(a.y) + start;
  affine(task);
  walk<0, 1, false>(task, [&](int64_t at, int64_t k, const Of&, Lanes* sum)
                              __attribute__((always_inline)) { sum[0] = sum[0] + get(x + at, k); });
  double added = 0;
  for (int64_t i = 0; i < task.count; ++i) added += task.of(time_bias)[i];
  keep_mean(task, 0, (task.sums[0] + added * double(a.positions)) / task.of_group());
  walk<1, 1, false>(task, [&](int64_t at, int64_t k, const Of& of, Lanes* sum) __attribute__((always_inline)) {
    const Lanes d = keep(get(x + at, k) - of.value[middle], k);
    sum[0] = muladd(d, d, sum[0]);
  });
  keep_rstd(task, 0, task.sums[0]);
  walk<4, 0, false>(task, [&](int64_t at, int64_t k, const Of& of, Lanes*)
                              __attribute__((always_inline)) { set(y + at, output<silu>(get(x + at, k), of), k); });
}

// dz is kept from the first pass to the second: in dx (fp32) or in held (two-byte dtypes).
template <typename T, bool silu> void backward(const Channels& task, double* shared, float* held) {
  const GroupNormSilu& a = task.a;
  const int64_t start = (task.sample * a.channels + task.first) * a.positions;
  const T *x = static_cast<const T*>(a.x) + start, *grad = static_cast<const T*>(a.grad) + start;
  T* dx = static_cast<T*>(a.dx) + start;
  float* between = sizeof(T) == 4 ? reinterpret_cast<float*>(dx) : held;
  affine(task);
  statistics(task);
  walk<4, 3, true>(task, [&](int64_t at, int64_t k, const Of& of, Lanes* sum) __attribute__((always_inline)) {
    const Lanes n = keep(standardized(get(x + at, k), of.value[middle], of.value[rstd]), k);
    const Lanes dz = output_gradient<silu>(get(grad + at, k), n, of);
    if (silu) set(between + at, dz, k);
    sum[0] = sum[0] + dz, sum[1] = muladd(dz, n, sum[1]), sum[2] = sum[2] + n;
  });
  reduce(task, shared);
  walk<6, 0, true>(task, [&](int64_t at, int64_t k, const Of& of, Lanes*) __attribute__((always_inline)) {
    const Lanes n = standardized(get(x + at, k), of.value[middle], of.value[rstd]),
                dz = silu ? get(between + at, k) : get(grad + at, k);
    set(dx + at, input_gradient(dz, n, of), k);
  });
}

int64_t padded_width(const GroupNormSilu& a) { return ceil_div(a.channels / a.groups, lanes) * lanes; }

int64_t thread_workspace(const GroupNormSilu& a) {
  return a.channels_last ? workspace_last(a) : workspace_of(padded_width(a)) + held_of(a, a.channels / a.groups);
}

// Calls body(task, buffer for dz) for every task, split evenly over the threads.
template <typename Body> void for_groups(const GroupNormSilu& a, double* workspace, const Body& body) {
  const int64_t width = a.channels / a.groups, padded = padded_width(a), all = a.batch * a.groups;
  const int threads = int(smaller(a.threads, all));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    double* own = workspace + part * thread_workspace(a);
    float *numbers = reinterpret_cast<float*>(own + sum_count * padded),
          *held = reinterpret_cast<float*>(own + workspace_of(padded));
    for (int64_t i = all * part / threads; i < all * (part + 1) / threads; ++i)
      body(Channels{a, i / a.groups, i % a.groups * width, width, padded, own, numbers}, held);
  }
}

template <typename T, bool silu> void run(const GroupNormSilu& a, double* workspace) {
  double* shared = workspace + a.threads * thread_workspace(a);
  const auto last = [&](const Chunks& c, int threads) {
    a.dx ? backward_last<T, silu>(c, threads, shared) : forward_last<T, silu>(c, threads);
  };
  const auto group = [&](const Channels& task, float* held) {
    a.dx ? backward<T, silu>(task, shared, held) : forward<T, silu>(task);
  };
  if (a.channels_last) for_samples(a, workspace, last);
  else for_groups(a, workspace, group);
  if (!a.dweight.address && !a.dbias.address) return;
  for (int64_t c = 0; c < a.channels; ++c) {
    double weight = 0, bias = 0;
    for (int64_t s = 0; s < a.batch; ++s) weight += shared[s * a.channels + c], bias += shared[(a.batch + s) * a.channels + c];
    put(a.dweight, 0, c, weight), put(a.dbias, 0, c, bias);
  }
}

template <typename T> void run(const GroupNormSilu& a, double* workspace) {
  a.silu ? run<T, true>(a, workspace) : run<T, false>(a, workspace);
}

}  // namespace

// The size of the workspace of a call, in doubles.
int64_t group_norm_silu_workspace(const GroupNormSilu& a) {
  return a.threads * thread_workspace(a) + (a.dx ? 2 * a.batch * a.channels : 0);
}

// Forward, or backward if dx is given.
void group_norm_silu(const GroupNormSilu& a, double* workspace) {
  switch (a.dtype) {
    case Dtype::f32: return run<float>(a, workspace);
    case Dtype::bf16: return run<bf16>(a, workspace);
    default: return run<f16>(a, workspace);
  }
}

}  // namespace fd::FD_ISA
