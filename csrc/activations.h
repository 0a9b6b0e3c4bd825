// SPDX-License-Identifier: Apache-2.0
// Elementary functions on sixteen lanes, error at most 2 ulp; NaN stays NaN.
#pragma once
#include "simd.h"

namespace fd::FD_ISA {

// x limited to [-87, 87], where e^x is a normal number; NaN stays NaN.
FD_HD vfloat in_range(vfloat x) {
  const vfloat high = vfloat{} + 87.0f, low = vfloat{} - 87.0f;
#ifdef FD_X86
  return (vfloat)FD_INTRINSIC(min_ps)(high, (vfloat)FD_INTRINSIC(max_ps)(low, x));  // returns the second if one is NaN
#else
  return x < low ? low : x > high ? high : x;
#endif
}

// e^x for x in [-87, 87]: x = k ln 2 + r, e^r = 1 + r + r^2 Q(r).
FD_HD vfloat exponential(vfloat x) {
  const vfloat one = vfloat{} + 1.0f;
  const vfloat shifted = muladd(x, 1.44269504f, 12582912.0f), k = shifted - 12582912.0f;
  const vfloat r = muladd(k, 2.12194440e-4f, muladd(k, -0.693359375f, x));
  vfloat q = muladd(r, 0.001392617612f, 0.008363173075f);
  q = muladd(q, r, 0.04166655466f);
  q = muladd(q, r, 0.1666657703f);
  q = muladd(q, r, 0.5f);
  const vfloat mantissa = one + muladd(r * r, q, r);
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_scalef_ps(0xFFFF, (__m512)mantissa, (__m512)k);
#else
  return mantissa * (vfloat)(((vuint)shifted + 127u) << 23);  // k is in the low bits of the sum
#endif
}

// 1 / x for normal x.
FD_HD vfloat reciprocal(vfloat x) {
  const vfloat one = vfloat{} + 1.0f;
#if defined(__AVX512F__)  // a division would take as long as the rest of the sigmoid
  const vfloat y = (vfloat)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
  return muladd(y, muladd(-x, y, one), y);
#else
  return one / x;
#endif
}

FD_HD Lanes sigmoid(Lanes x) {
  for (int i = 0; i < simd_parts; ++i) x.part[i] = reciprocal(1.0f + exponential(-in_range(x.part[i])));
  return x;
}

// sigmoid(x) and 1 - sigmoid(x) = sigmoid(-x), each with full relative precision.
struct Sigmoids {
  Lanes value, rest;
};
FD_HD Sigmoids sigmoids(Lanes x) {
  Sigmoids r;
  for (int i = 0; i < simd_parts; ++i) {
    const vfloat e = exponential(-in_range(x.part[i]));
    r.value.part[i] = reciprocal(1.0f + e);
    r.rest.part[i] = e * r.value.part[i];
  }
  return r;
}

// Phi(x) and phi(x) of the standard normal distribution; 1 - Phi(|x|) = e^(-x^2 / 2) t P(t), t = 1 / (1 + 0.23 |x|).
template <typename F> struct Normal {
  F below, density;
};
FD_HD Normal<Lanes> standard_normal(Lanes x) {
  Normal<Lanes> r;
  for (int i = 0; i < simd_parts; ++i) {
    const vfloat z = x.part[i], size = z < 0.0f ? -z : z, e = exponential(in_range(-0.5f * z * z));
    const vfloat t = reciprocal(muladd(size, 0.23f - vfloat{}, 1.0f));
    vfloat p = muladd(t, -0.0762817742f, 0.2791156449f);
    p = muladd(p, t, -0.2532405614f);
    p = muladd(p, t, 0.2710405169f);
    p = muladd(p, t, -0.01037977821f);
    p = muladd(p, t, 0.1091846186f);
    p = muladd(p, t, 0.08861670587f);
    p = muladd(p, t, 0.09194460268f);
    const vfloat above = e * (p * t);
    r.below.part[i] = z < 0.0f ? above : 1.0f - above;
    r.density.part[i] = 0.398942280f * e;
  }
  return r;
}

}  // namespace fd::FD_ISA
