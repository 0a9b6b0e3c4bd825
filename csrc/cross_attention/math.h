// SPDX-License-Identifier: Apache-2.0
// cross_attention, softmax(S) V, and its gradients: S = scale Q K^T + bias, P = softmax(S) over the keys, dV = P^T dO, dP = dO
// V^T, dS = P (dP - sum_j P_j dP_j), dQ = scale dS K, dK = scale dS^T Q. The softmax is computed with powers of two.
#pragma once
#include "common.h"

namespace fd {

enum class Mask : int { none = 0, kept = 1, bias = 2 };  // kept: bytes, 0 excludes a key; bias: numbers of ``mask_dtype``

// A tensor [batch, tokens, heads, dim] whose last dimension is contiguous; the strides count elements.
struct Heads {
  void* at;
  int64_t batch, token, head;
};

struct CrossAttention {
  Heads q, k, v, out;
  const void* mask;     // [B, L]
  const int64_t* rows;  // [B] row of K and V for each sample; null: row b for sample b
  int64_t B, N, H, D, L, R, chunks, span;
  Mask masking;
  Dtype mask_dtype, dtype;
  float scale;
  bool swizzled;  // whether matrices in shared memory are swizzled; only for head dims that can choose
};

struct CrossAttentionBackward {
  Heads q, k, v, grad_out, grad_q;
  const void* mask;     // [B, L]
  const int64_t* rows;  // [B] row of K and V for each sample; null: row b for sample b
  void *grad_k, *grad_v;
  float* partials;  // [2, B * chunks, L, H, D], null: grad_k and grad_v are written at once
  int64_t B, N, H, D, L, R, chunks, span;
  Mask masking;
  Dtype mask_dtype, dtype;
  float scale;
  bool swizzled;  // whether matrices in shared memory are swizzled; only for head dims that can choose
};

namespace FD_ISA {

struct alignas(16) Four {
  float x[4];
};

FD_HD float minus_infinity() { return as_float(0xFF800000u); }
FD_HD bool is_minus_infinity(float x) { return as_bits(x) == 0xFF800000u; }

// 2^x, error at most 2 ulp.
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

// The bias added to the scores of a key, times log2(e) because the softmax uses powers of two. A finite bias stays finite.
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

// The maximum that the softmax subtracts: 0 if the mask excludes every key.
FD_HD float finite(float top) { return is_minus_infinity(top) ? 0.0f : top; }

// 1 / (sum of the weights). It is 0 if the mask excludes every key, so that the output and gradients of the row are 0.
FD_HD float inverse(float total) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(total));  // the sum is 0, NaN or (nearly) at least 1
#else
  const float y = 1.0f / total;
#endif
  return total == 0.0f ? 0.0f : y;
}

// The row of K and V that sample b uses; -1 if its index is out of range.
template <typename A> FD_HD int64_t row_of(const A& a, int64_t b) {
  if (!a.rows) return b;
  const int64_t row = a.rows[b];
  return row >= 0 && row < a.R ? row : -1;
}

// Two numbers packed into a word, ``first`` in the lower half, rounded like from_float.
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

// The offset of an element in [outer, L, H, D]; outer is a chunk of the partial sums, or a row of the gradient.
FD_HD int64_t slot_of(const CrossAttentionBackward& a, int64_t outer, int64_t key, int64_t h, int64_t d) {
  return ((outer * a.L + key) * a.H + h) * a.D + d;
}

// Four elements of the gradient of a row of K or V: the partial sums of all samples that use it, added in order.
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
