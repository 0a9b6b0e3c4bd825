// SPDX-License-Identifier: Apache-2.0
// layer_norm_modulate: a task is 32 rows of a sample; each row is read from memory once and stays in the L1 cache.
//
// Threads   static split of the tasks; their sums over rows are added in order: the same bits at any thread count
// Traffic   forward x and y, with a residual x, h, s and y; backward s, grad and dx, with a residual also grad_s, h and dh
// Precision lane sums in fp32, rows and sums over tasks in double, squares around the mean; outputs rounded once
// Limits    any size (64-bit); tensors with rows all fp32, bf16 or fp16; each of the others may have any of these dtypes
#include "layer_norm_modulate/math.h"

namespace fd::FD_ISA {
namespace {

constexpr int64_t task_rows = 32;

struct Coefficients {  // one number per channel
  float *factor, *offset, *gate, *sums;
};

template <typename T, bool residual> void forward(const LayerNormModulate& a, int64_t row, const Coefficients& c) {
  const T *x = static_cast<const T*>(a.x) + row * a.width, *h = static_cast<const T*>(a.h) + (residual ? row * a.width : 0);
  T *y = static_cast<T*>(a.y) + row * a.width, *s = static_cast<T*>(a.s) + (residual ? row * a.width : 0);
  Lanes sum = splat(0.0f), squares = sum;
  for (int64_t i = 0; i < a.width; i += lanes) {
    const int64_t k = smaller(a.width - i, lanes);
    Lanes v = get(x + i, k);
    if (residual) {
      set(s + i, muladd(load(c.gate + i), get(h + i, k), v), k);
      v = get(s + i, k);  // with the rounding of the store
    }
    sum = sum + v;
  }
  const double mean = total(sum) / double(a.width);
  const T* from = residual ? s : x;
  const Lanes middle = splat(float(mean));
  for (int64_t i = 0; i < a.width; i += lanes) {
    const int64_t k = smaller(a.width - i, lanes);
    const Lanes d = keep(get(from + i, k) - middle, k);
    sum = i ? sum + d : d, squares = muladd(d, d, squares);
  }
  const double off = total(sum) / double(a.width);  // the rounding error of the first mean
  const float center = float(double(float(mean)) + off);
  const float r = float(1.0 / square_root(total(squares) / double(a.width) - off * off + a.eps));
  a.mean[row] = center, a.rstd[row] = r;
  const Lanes rstd = splat(r), about = splat(center);
  for (int64_t i = 0; i < a.width; i += lanes) {
    const int64_t k = smaller(a.width - i, lanes);
    set(y + i, muladd((get(from + i, k) - about) * rstd, load(c.factor + i), load(c.offset + i)), k);
  }
}

template <typename T, bool residual> void backward(const LayerNormModulate& a, int64_t row, const Coefficients& c) {
  const int64_t at = row * a.width, held = residual ? at : 0, padded = ceil_div(a.width, lanes) * lanes;
  const T *x = static_cast<const T*>(a.x) + at, *grad = static_cast<const T*>(a.grad) + at;
  const T *h = static_cast<const T*>(a.h) + held, *grad_s = a.grad_s ? static_cast<const T*>(a.grad_s) + at : nullptr;
  T *dx = static_cast<T*>(a.dx) + at, *dh = static_cast<T*>(a.dh) + held;
  const Lanes about = splat(a.mean[row]), rstd = splat(a.rstd[row]);
  float *ones = c.sums, *products = ones + padded, *gates = products + padded;
  Lanes sum = splat(0.0f), sum_n = sum;
  for (int64_t i = 0; i < a.width; i += lanes) {
    const int64_t k = smaller(a.width - i, lanes);
    const Lanes n = (get(x + i, k) - about) * rstd, dy = get(grad + i, k), dn = dy * load(c.factor + i);
    sum = sum + dn, sum_n = muladd(dn, n, sum_n);
    store<false>(ones + i, load(ones + i) + dy);
    store<false>(products + i, muladd(dy, n, load(products + i)));
  }
  const Lanes mean = splat(float(total(sum) / double(a.width))), mean_n = splat(float(total(sum_n) / double(a.width)));
  for (int64_t i = 0; i < a.width; i += lanes) {
    const int64_t k = smaller(a.width - i, lanes);
    const Lanes n = (get(x + i, k) - about) * rstd, dn = get(grad + i, k) * load(c.factor + i);
    Lanes d = gradient(dn, n, rstd, mean, mean_n);
    if (grad_s) d = d + get(grad_s + i, k);
    set(dx + i, d, k);
    if (!residual) continue;
    set(dh + i, load(c.gate + i) * d, k);
    store<false>(gates + i, muladd(get(h + i, k), d, load(gates + i)));
  }
}

// Computes weight (1 + scale), bias (1 + scale) + shift and the gate of a sample.
void coefficients(const LayerNormModulate& a, int64_t sample, const Coefficients& c) {
  for (int64_t i = 0; i < a.width; i += lanes) {
    const int64_t k = smaller(a.width - i, lanes);
    const Lanes factor = splat(1.0f) + vector(a.scale, sample, i, k, 0.0f);
    store<false>(c.factor + i, vector(a.weight, 0, i, k, 1.0f) * factor);
    store<false>(c.offset + i, muladd(vector(a.bias, 0, i, k, 0.0f), factor, vector(a.shift, sample, i, k, 0.0f)));
    store<false>(c.gate + i, vector(a.gate, sample, i, k, 1.0f));
  }
}

int64_t padded_width(const LayerNormModulate& a) { return ceil_div(a.width, lanes) * lanes; }
int64_t tasks_of(const LayerNormModulate& a) { return ceil_div(a.rows, task_rows); }

// Calls body(row, coefficients) for every row. The sums of each task, [3][padded], start at zero and stay in the workspace.
template <typename Body> void for_rows(const LayerNormModulate& a, float* workspace, bool sums, const Body& body) {
  const int64_t tasks = tasks_of(a), all = a.batch * tasks, padded = padded_width(a);
  const int threads = int(smaller(a.threads, all));
  float* partials = workspace + a.threads * 3 * padded;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    float* own = workspace + part * 3 * padded;
    Coefficients c = {own, own + padded, own + 2 * padded, nullptr};
    int64_t prepared = -1;
    for (int64_t task = all * part / threads; task < all * (part + 1) / threads; ++task) {
      const int64_t sample = task / tasks, first = task % tasks * task_rows;
      if (sample != prepared) coefficients(a, sample, c), prepared = sample;
      c.sums = partials + task * 3 * padded;
      for (int64_t i = 0; sums && i < 3 * padded; ++i) c.sums[i] = 0;
      for (int64_t row = first; row < smaller(first + task_rows, a.rows); ++row) body(sample * a.rows + row, c);
    }
  }
}

// The gradients of the small tensors (shared by rows), from the sums of the tasks, added in order.
void merge(const LayerNormModulate& a, float* workspace) {
  const int64_t padded = padded_width(a), tasks = tasks_of(a);
  const float* partials = workspace + a.threads * 3 * padded;
  const int64_t blocks = padded / lanes;
  const int threads = int(smaller(a.threads, blocks));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    double weight[lanes] = {}, bias[lanes] = {};
    const int64_t first = block * lanes, count = smaller(a.width - first, lanes);
    for (int64_t sample = 0; sample < a.batch; ++sample) {
      double sums[3][lanes] = {};
      for (int64_t task = sample * tasks; task < (sample + 1) * tasks; ++task)
        for (int k = 0; k < 3; ++k)
          for (int i = 0; i < lanes; ++i) sums[k][i] += partials[(task * 3 + k) * padded + first + i];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = first + i;
        const double w = number(a.weight, 0, c, 1.0f), b = number(a.bias, 0, c, 0.0f);
        const double factor = 1.0 + number(a.scale, sample, c, 0.0f);
        put(a.dshift, sample, c, sums[0][i]);
        put(a.dscale, sample, c, w * sums[1][i] + b * sums[0][i]);
        put(a.dgate, sample, c, sums[2][i]);
        weight[i] += factor * sums[1][i], bias[i] += factor * sums[0][i];
      }
    }
    for (int64_t i = 0; i < count; ++i) put(a.dweight, 0, first + i, weight[i]), put(a.dbias, 0, first + i, bias[i]);
  }
}

template <typename T> void forward_typed(const LayerNormModulate& a, float* workspace) {
  for_rows(a, workspace, false,
           [&](int64_t row, const Coefficients& c) { a.h ? forward<T, true>(a, row, c) : forward<T, false>(a, row, c); });
}

template <typename T> void backward_typed(const LayerNormModulate& a, float* workspace) {
  for_rows(a, workspace, true,
           [&](int64_t row, const Coefficients& c) { a.h ? backward<T, true>(a, row, c) : backward<T, false>(a, row, c); });
}

}  // namespace

// The size of the workspace of a call, in floats.
int64_t layer_norm_modulate_workspace(const LayerNormModulate& a) {
  return 3 * padded_width(a) * (a.threads + (a.dx ? a.batch * tasks_of(a) : 0));
}

void layer_norm_modulate(const LayerNormModulate& a, float* workspace) {
  switch (a.dtype) {
    case Dtype::f32: return forward_typed<float>(a, workspace);
    case Dtype::bf16: return forward_typed<bf16>(a, workspace);
    default: return forward_typed<f16>(a, workspace);
  }
}

void layer_norm_modulate_backward(const LayerNormModulate& a, float* workspace) {
  switch (a.dtype) {
    case Dtype::f32: backward_typed<float>(a, workspace); break;
    case Dtype::bf16: backward_typed<bf16>(a, workspace); break;
    default: backward_typed<f16>(a, workspace);
  }
  merge(a, workspace);
}

}  // namespace fd::FD_ISA
