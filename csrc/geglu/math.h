// SPDX-License-Identifier: Apache-2.0
// GEGLU (Shazeer, arXiv 2002.05202): y = a gelu(g), where a and g are the two halves of a row of x.
//
//   erf    gelu(g) = g Phi(g)               gelu'(g) = Phi(g) + g phi(g), Phi and phi of the standard normal distribution
//   tanh   gelu(g) = g s, s = sigmoid(2u)   gelu'(g) = s + g s (1 - s) 2u',  u = sqrt(2 / pi) (g + 0.044715 g^3)
#pragma once
#include "common.h"

namespace fd {

struct Geglu {
  const void* x;  // [rows, 2 width]
  Dtype dtype;
  int64_t rows, width;
  bool tanh;
  void* y;  // [rows, width]
  const void* grad;
  void* dx;
  int threads;
};

namespace FD_ISA {

template <typename F> struct Gelu {
  F value, slope;
};

// 2u and 2u' of the tanh approximation.
template <typename F> FD_HD F twice_u(F g, F one, F cubic, F root) { return root * g * muladd(cubic * g, g, one); }
template <typename F> FD_HD F twice_slope(F g, F one, F three_cubic, F root) { return root * muladd(three_cubic * g, g, one); }

}  // namespace FD_ISA
}  // namespace fd
