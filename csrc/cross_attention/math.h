// SPDX-License-Identifier: Apache-2.0
// cross_attention, softmax(S) V, and its gradients: S = scale Q K^T + bias, P = softmax(S) over the keys, dV = P^T dO, dP = dO
// V^T, dS = P (dP - sum_j P_j dP_j), dQ = scale dS K, dK = scale dS^T Q. Exponents are of two.
#pragma once
#include "common.h"

namespace fd {

enum class Mask : int { none = 0, kept = 1, bias = 2 };  // kept: bytes; bias: numbers of ``mask_dtype``

// Tensors [batch, tokens, heads, dim] of one dtype with a head's elements together; strides count elements.
struct Heads {
  void* at;
  int64_t batch, token, head;
};

struct CrossAttention {
  Heads q, k, v, out;
  const void* mask;     // [B, L]
  const int64_t* rows;  // [B], null: a sample's own
  int64_t B, N, H, D, L, R, chunks, span;
  Mask masking;
  Dtype mask_dtype, dtype;
  float scale;
  bool swizzled;  // operands of products, where there is a choice
};

struct CrossAttentionBackward {
  Heads q, k, v, grad_out, grad_q;
  const void* mask;     // [B, L]
  const int64_t* rows;  // [B], null: a sample's own
  void *grad_k, *grad_v;
  float* partials;  // [2, B * chunks, L, H, D], null: grad_k and grad_v are written at once
  int64_t B, N, H, D, L, R, chunks, span;
  Mask masking;
  Dtype mask_dtype, dtype;
  float scale;
  bool swizzled;  // operands of products, where there is a choice
};

namespace FD_ISA {

struct alignas(16) Four {
  float x[4];
};

FD_HD float minus_infinity() { return as_float(0xFF800000u); }
FD_HD bool is_minus_infinity(float x) { return as_bits(x) == 0xFF800000u; }

// 2^x, to two units in the last place.
FD_HD float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __builtin_exp2f(x);
#endif
}

constexpr float log2_e = 1.4426950408889634f;

// What is added to the scores of a key, in units of the exponent of two: a finite bias stays finite.
FD_HD float bias_of(float given) {
  const float limit = 3.4028234e38f, scaled = given * log2_e;
  const bool infinite = (as_bits(given) & 0x7FFFFFFFu) >= 0x7F800000u;
  return infinite ? given : clamp(scaled, limit);
}

template <typename A> FD_HD float key_bias(const A& a, int64_t b, int64_t key) {
  if (key >= a.L) return minus_infinity();
  const int64_t at = b * a.L + key;
  if (a.masking == Mask::kept) return static_cast<const uint8_t*>(a.mask)[at] ? 0.0f : minus_infinity();
  if (a.masking != Mask::bias) return 0.0f;
  if (a.mask_dtype == Dtype::bf16) return bias_of(to_float(static_cast<const bf16*>(a.mask)[at]));
  if (a.mask_dtype == Dtype::f16) return bias_of(to_float(static_cast<const f16*>(a.mask)[at]));
  return bias_of(static_cast<const float*>(a.mask)[at]);
}

// A maximum to subtract: 0 where every key is left out.
FD_HD float finite(float top) { return is_minus_infinity(top) ? 0.0f : top; }

// One over a sum of weights: 0 where every key is left out, so that such a row's gradients are 0.
FD_HD float inverse(float total) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(total));  // a total is 0, NaN, or at least 1, up to rounding
#else
  const float y = 1.0f / total;
#endif
  return total == 0.0f ? 0.0f : y;
}

// The row of K and V that a sample takes, -1: not one of those that are there.
template <typename A> FD_HD int64_t row_of(const A& a, int64_t b) {
  if (!a.rows) return b;
  const int64_t row = a.rows[b];
  return row >= 0 && row < a.R ? row : -1;
}

// Two numbers in the two halves of a word, the first in the lower, rounded as from_float does.
template <typename T> FD_HD uint32_t pair_of(float first, float second) {
  return uint32_t(from_float<T>(first).bits) | uint32_t(from_float<T>(second).bits) << 16;
}
#ifdef __CUDA_ARCH__
template <> FD_HD uint32_t pair_of<bf16>(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
template <> FD_HD uint32_t pair_of<f16>(float first, float second) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
#endif

// A chunk's element of a partial sum, or of the gradient itself where there is one chunk: [row or chunk, L, H, D].
FD_HD int64_t slot_of(const CrossAttentionBackward& a, int64_t outer, int64_t key, int64_t h, int64_t d) {
  return ((outer * a.L + key) * a.H + h) * a.D + d;
}

// Four elements of a row's gradient: its samples' chunks in order.
FD_HD void sum_of_chunks(const CrossAttentionBackward& a, const float* partials, int64_t row, int64_t at, float (&total)[4]) {
  const int64_t size = a.L * a.H * a.D;
  for (float& one : total) one = 0.0f;
  for (int64_t b = a.rows ? 0 : row; b < (a.rows ? a.B : row + 1); ++b) {
    if (a.rows && a.rows[b] != row) continue;
    for (int64_t chunk = b * a.chunks; chunk < (b + 1) * a.chunks; ++chunk) {
      const Four four = *reinterpret_cast<const Four*>(partials + chunk * size + at);
      for (int i = 0; i < 4; ++i) total[i] += four.x[i];
    }
  }
}

}  // namespace FD_ISA
}  // namespace fd
