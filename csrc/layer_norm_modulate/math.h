// SPDX-License-Identifier: Apache-2.0
// A gated residual, layer norm and modulation; F is sixteen lanes on a CPU. Means are over a row.
//
//   s = x + gate h      n = (s - mean(s)) rstd      y = (n weight + bias) (1 + scale) + shift
//   dn = dy weight (1 + scale)    ds = rstd (dn - mean(dn) - n mean(dn n)) + grad_s    dx = ds    dh = gate ds
#pragma once
#include "rows.h"

namespace fd {

struct LayerNormModulate {
  const void* x;  // [batch, rows, width]; in the backward this is s, written by the forward
  const void* h;  // like x, or null
  Dtype dtype;
  int64_t batch, rows, width;
  double eps;
  Row gate, scale, shift;  // [batch, width]
  Row weight, bias;        // [width]
  float *mean, *rstd;      // [batch, rows]
  void *y, *s;
  const void *grad, *grad_s;  // grad_s: the gradient of s from its other uses, or null
  void *dx, *dh;
  Row dgate, dscale, dshift, dweight, dbias;
  int threads;
};

namespace FD_ISA {

template <typename F> FD_HD F gradient(F dn, F n, F rstd, F mean, F mean_n) { return rstd * (dn - mean - n * mean_n); }

}  // namespace FD_ISA
}  // namespace fd
