// SPDX-License-Identifier: Apache-2.0
// grad_square_sum and adamw_ema: the norm of all gradients, then clip, AdamW, average, low-precision copy and zeroing in one
// pass over all parameters.
//
// Threads   static split of all chunks of all parameters; partial sums are kept by chunk and added in order, so results have
//           the same bits at any thread count and on any instruction set
// Traffic   fp32 gradients: norm 4 bytes per element; update 28, + 8 with an average, + 2 with a copy, + 4 with zeroing
// Precision elements in fp32 (128 squares per lane), sums over lanes and all constants in double; copies rounded once
// Limits    any n >= 0 (64-bit); gradients fp32/bf16/fp16, copies bf16/fp16. A gradient beyond 1.8e19 overflows the sum of
//           squares, so it is treated as not finite
#include "adamw_ema/math.h"
#include "simd.h"

namespace fd::FD_ISA {
namespace {

template <typename Row, typename Body>
void for_all(const Row* rows, int64_t count, int64_t chunk, int most_threads, const Body& body) {
  if (count == 0) return;
  const GradientRow& last = gradient_of(rows[count - 1]);
  const int64_t total = last.first_chunk + ceil_div(last.n, chunk);
  const int threads = int(smaller(most_threads, total));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part)
    for_chunks(rows, count, chunk, total * part / threads, total * (part + 1) / threads, body);
}

template <typename G> double square_sum(const G* grad, int64_t n) {
  constexpr int unroll = 4;
  Lanes sums[unroll];
  for (int u = 0; u < unroll; ++u) sums[u] = splat(0.0f);
  int64_t i = 0;
  for (; i + unroll * lanes <= n; i += unroll * lanes) {
    FD_UNROLL
    for (int u = 0; u < unroll; ++u) {
      const Lanes g = load(grad + i + u * lanes);
      sums[u] = sums[u] + g * g;
    }
  }
  for (; i < n; i += lanes) {
    const Lanes g = load_first(grad + i, smaller(n - i, lanes));
    sums[0] = sums[0] + g * g;
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

AdamWConstants<Lanes> in_lanes(const AdamWConstants<float>& c) {
  return {splat(c.factor), splat(c.keep),       splat(c.rest1), splat(c.beta2), splat(c.rest2),
          splat(c.rate),   splat(c.correction), splat(c.eps),   splat(c.move)};
}

// Load and store sixteen elements, or only the first `some` of them.
template <bool whole, typename T> FD_HD Lanes get(const T* p, int64_t some) { return whole ? load(p) : load_first(p, some); }
template <bool whole, typename T> FD_HD void put(T* p, Lanes a, int64_t some) {
  if (whole) store<false>(p, a);
  else store_first(p, a, some);
}

struct Nothing {};

template <bool whole, bool with_average, typename G, typename C>
FD_HD void update_lanes(const AdamWRow& row, int64_t i, int64_t some, const AdamWConstants<Lanes>& c, bool zero) {
  G* grad = static_cast<G*>(row.gradient.grad) + i;
  AdamWState<Lanes> x = {get<whole>(row.param + i, some), get<whole>(row.exp_avg + i, some),
                         get<whole>(row.exp_avg_sq + i, some)};
  x = adamw(x, get<whole>(grad, some), c);
  put<whole>(row.param + i, x.param, some);
  put<whole>(row.exp_avg + i, x.exp_avg, some);
  put<whole>(row.exp_avg_sq + i, x.exp_avg_sq, some);
  if constexpr (with_average) put<whole>(row.average + i, averaged(get<whole>(row.average + i, some), x.param, c), some);
  if constexpr (sizeof(C) == 2) put<whole>(static_cast<C*>(row.copy) + i, x.param, some);
  if (zero) memset(grad, 0, (whole ? lanes : some) * sizeof(G));
}

template <bool with_average, typename G, typename C>
void update_chunk(const AdamWRow& row, int64_t first, int64_t n, const AdamWConstants<float>& constants, bool zero) {
  const AdamWConstants<Lanes> c = in_lanes(constants);
  int64_t i = first;
  for (; i + lanes <= first + n; i += lanes) update_lanes<true, with_average, G, C>(row, i, lanes, c, zero);
  if (i < first + n) update_lanes<false, with_average, G, C>(row, i, first + n - i, c, zero);
}

template <typename G, typename C>
void update_copy(const AdamWRow& row, int64_t first, int64_t n, const AdamWConstants<float>& c, bool zero) {
  if (row.average) update_chunk<true, G, C>(row, first, n, c, zero);
  else update_chunk<false, G, C>(row, first, n, c, zero);
}

template <typename G>
void update_gradient(const AdamWRow& row, int64_t first, int64_t n, const AdamWConstants<float>& c, bool zero) {
  if (!row.copy) update_copy<G, Nothing>(row, first, n, c, zero);
  else if (Dtype(row.copy_dtype) == Dtype::bf16) update_copy<G, bf16>(row, first, n, c, zero);
  else update_copy<G, f16>(row, first, n, c, zero);
}

}  // namespace

void grad_square_sum(const GradientRow* rows, int64_t count, int64_t chunk, double* partials, double* total, int threads) {
  for_all(rows, count, chunk, threads, [&](const GradientRow& row, int64_t first, int64_t n, int64_t at) {
    switch (Dtype(row.grad_dtype)) {
      case Dtype::f32: partials[at] = square_sum(static_cast<float*>(row.grad) + first, n); break;
      case Dtype::bf16: partials[at] = square_sum(static_cast<bf16*>(row.grad) + first, n); break;
      default: partials[at] = square_sum(static_cast<f16*>(row.grad) + first, n);
    }
  });
  double sum = 0;
  const int64_t chunks = count ? rows[count - 1].first_chunk + ceil_div(rows[count - 1].n, chunk) : 0;
  for (int64_t i = 0; i < chunks; ++i) sum += partials[i];
  *total = sum;
}

void adamw_ema(const AdamWRow* rows, int64_t count, int64_t chunk, const AdamWInputs& a, int64_t* skipped, int threads) {
  const Gate gate = adamw_gate(a);
  if (gate.skip) {
    ++*skipped;
    for (int64_t i = 0; i < count && a.zero_grads; ++i) {
      const GradientRow& g = rows[i].gradient;
      memset(g.grad, 0, g.n * bytes_of(Dtype(g.grad_dtype)));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) *rows[i].step += 1.0f;
  for_all(rows, count, chunk, threads, [&](const AdamWRow& row, int64_t first, int64_t n, int64_t) {
    const AdamWConstants<float> c = adamw_constants(row, a, gate.factor, *row.step);
    switch (Dtype(row.gradient.grad_dtype)) {
      case Dtype::f32: return update_gradient<float>(row, first, n, c, a.zero_grads);
      case Dtype::bf16: return update_gradient<bf16>(row, first, n, c, a.zero_grads);
      default: return update_gradient<f16>(row, first, n, c, a.zero_grads);
    }
  });
}

}  // namespace fd::FD_ISA
