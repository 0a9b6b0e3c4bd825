// SPDX-License-Identifier: Apache-2.0
// geglu: the rows are divided evenly among the threads.
//
// Traffic   12 bytes per element of y in fp32, 6 in bf16; backward 20 and 10
// Precision fp32, within 2e-7 of the largest factor; outputs rounded once
// Limits    any size (64-bit), fp32/bf16/fp16
#include "activations.h"
#include "geglu/math.h"
#include "rows.h"

namespace fd::FD_ISA {
namespace {

template <bool tanh> FD_HD Gelu<Lanes> gelu(Lanes g) {
  const Lanes one = splat(1.0f);
  if (tanh) {
    const Lanes root = splat(1.59576912f);
    const Sigmoids s = sigmoids(twice_u(g, one, splat(0.044715f), root));
    const Lanes slope = twice_slope(g, one, splat(0.134145f), root);
    return {g * s.value, muladd(g * s.value * s.rest, slope, s.value)};
  }
  const Normal<Lanes> normal = standard_normal(g);
  return {g * normal.below, muladd(g, normal.density, normal.below)};
}

template <typename T, bool tanh> void forward(const Geglu& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * 2 * a.width;
  T* y = static_cast<T*>(a.y) + row * a.width;
  for (int64_t i = 0; i < a.width; i += lanes) {
    const int64_t k = smaller(a.width - i, lanes);
    set(y + i, get(x + i, k) * gelu<tanh>(get(x + a.width + i, k)).value, k);
  }
}

template <typename T, bool tanh> void backward(const Geglu& a, int64_t row) {
  const T *x = static_cast<const T*>(a.x) + row * 2 * a.width, *grad = static_cast<const T*>(a.grad) + row * a.width;
  T* dx = static_cast<T*>(a.dx) + row * 2 * a.width;
  for (int64_t i = 0; i < a.width; i += lanes) {
    const int64_t k = smaller(a.width - i, lanes);
    const Lanes dy = get(grad + i, k);
    const Gelu<Lanes> g = gelu<tanh>(get(x + a.width + i, k));
    set(dx + i, dy * g.value, k);
    set(dx + a.width + i, dy * get(x + i, k) * g.slope, k);
  }
}

template <typename T> void run_row(const Geglu& a, int64_t row) {
  if (a.dx) a.tanh ? backward<T, true>(a, row) : backward<T, false>(a, row);
  else a.tanh ? forward<T, true>(a, row) : forward<T, false>(a, row);
}

}  // namespace

// Forward, or backward if dx is given.
void geglu(const Geglu& a) {
  const int threads = int(smaller(a.threads, a.rows));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) switch (a.dtype) {
      case Dtype::f32: run_row<float>(a, row); break;
      case Dtype::bf16: run_row<bf16>(a, row); break;
      default: run_row<f16>(a, row);
    }
}

}  // namespace fd::FD_ISA
