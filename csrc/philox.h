// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) and normals by Box-Muller. Branch-free, and written once for scalars (one
// block, as in a GPU thread) and for SIMD registers (several blocks). The functions that differ have the same names in
// common.h (scalars) and simd.h (registers).
//
// Contract: key = (seed low, seed high); counter = (block low, stream << 16 | block high, sample, step); one block is four
// words. The integers are equal in every backend. The normals are within 1.5e-6 of the exact value (the contract allows
// 4e-6). muladd is one fused operation with AVX2, AVX-512 and on GPUs, and two operations in the baseline instruction set,
// so the last bits of its normals may differ from the others; AVX2 and AVX-512 give equal bits.
#pragma once
#include "common.h"
#ifndef __CUDACC__
#include "simd.h"
#endif

namespace fd {

enum Stream : uint32_t { stream_choice = 0, stream_noise = 1, stream_permutation = 2 };

// Which kind of prompt was drawn.
enum Choice : int64_t { choice_paired = 0, choice_random = 1, choice_null = 2 };

namespace FD_ISA {

template <typename W> struct Block {
  W x, y, z, w;
};

template <typename W> FD_HD Block<W> philox_rounds(Block<W> c, uint32_t key0, uint32_t key1, int first) {
  FD_UNROLL
  for (int round = first; round < 10; ++round) {
    const auto p0 = multiply(c.x, 0xD2511F53u), p1 = multiply(c.z, 0xCD9E8D57u);
    c = {upper(p1) ^ c.y ^ key0, lower(p1), upper(p0) ^ c.w ^ key1, lower(p0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

template <typename W> FD_HD Block<W> philox4x32(Block<W> c, uint32_t key0, uint32_t key1) {
  return philox_rounds(c, key0, key1, 0);
}

// The same for blocks that differ only in their first word: half of the first two rounds can then use scalars.
template <typename W> FD_HD Block<W> philox4x32(W x, Block<uint32_t> c, uint32_t key0, uint32_t key1) {
  const auto p0 = multiply(x, 0xD2511F53u);
  const uint64_t p1 = multiply(c.z, 0xCD9E8D57u);
  const W z = upper(p0) ^ (c.w ^ key1);
  const uint32_t next = upper(p1) ^ c.y ^ key0;
  key0 += 0x9E3779B9u;
  key1 += 0xBB67AE85u;
  const uint64_t q0 = multiply(next, 0xD2511F53u);
  const auto q1 = multiply(z, 0xCD9E8D57u);
  const W w = W{} + lower(q0);
  return philox_rounds(Block<W>{upper(q1) ^ (lower(p1) ^ key0), lower(q1), lower(p0) ^ (upper(q0) ^ key1), w},
                       key0 + 0x9E3779B9u, key1 + 0xBB67AE85u, 2);
}

// Word -> integer in [0, n), n < 2^32.
FD_HD int64_t below(uint32_t word, int64_t n) { return int64_t((uint64_t(word) * uint64_t(n)) >> 32); }

// Word -> u in (0, 1), exact in fp32. U is uint32_t or a register of uint32_t.
template <typename U> FD_HD auto uniform(U word) { return muladd(int_to_float(word >> 9), 0x1p-23f, 0x1p-24f); }

// -2 ln u, relative error < 2e-7: u = 2^e m with m in [sqrt(1/2), sqrt(2)), ln(1 + f) = f + f^2 Q(f), Q minimax.
template <typename F> FD_HD F minus_two_log(F u) {
  const auto shifted = as_bits(u) - 0x3F3504F3u;  // bits of sqrt(1/2)
  const F e = int_to_float(shift_signed(shifted, 23));
  const F f = as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  F q = muladd(f, 0.08734843f, -0.14307522f);
  q = muladd(q, f, 0.14917974f);
  q = muladd(q, f, -0.16570508f);
  q = muladd(q, f, 0.19962072f);
  q = muladd(q, f, -0.25001755f);
  q = muladd(q, f, 0.33333950f);
  q = muladd(q, f, -0.49999992f);
  const F tail = muladd(f * f, q, e * -2.12194440e-4f) + f;
  return -2.0f * muladd(e, 0.693359375f, tail);  // ln 2 in two parts; the product of the larger one with e is exact
}

template <typename F> struct Pair {
  F even, odd;
};

// The square root, rounded to nearest, for numbers that are neither tiny nor huge.
#ifdef __CUDA_ARCH__
// These are the instructions of __fsqrt_rn without its branch for other numbers. nvcc moves no instructions past that branch.
FD_HD float plain_root(float x) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = __fmul_rn(x, inverse);
  return fmaf(fmaf(-root, root, x), __fmul_rn(inverse, 0.5f), root);
}
#else
template <typename F> FD_HD F plain_root(F x) { return square_root(x); }
#endif

// sqrt(-2 ln u1) (cos 2 pi u2, sin 2 pi u2). Integer arithmetic splits 4 u2 = q + f exactly, with |f| < 1/2: q, the nearest
// quadrant, is in the upper two bits of ``quadrant``; f is the remainder. Sine and cosine of f pi/2 are minimax polynomials.
template <typename U> FD_HD auto box_muller(U word1, U word2) {
  const U quadrant = word2 + (1u << 29);
  const auto f = muladd(int_to_float(shift_signed(word2 << 2, 11)), 0x1p-21f, 0x1p-22f), z = f * f;
  const auto sine_part = muladd(muladd(muladd(z, -0.00459225360f, 0.0796758897f), z, -0.645962937f), z, 1.57079631f);
  const U sine = as_bits(f * sine_part);
  const U cosine = as_bits(muladd(muladd(muladd(z, -0.0204260771f, 0.253606310f), z, -1.23369795f), z, 1.0f));
  const U swap = shift_signed(quadrant << 1, 31);
  const auto c = as_float(((sine & swap) | (cosine & ~swap)) ^ ((quadrant + (1u << 30)) & 0x80000000u));
  const auto s = as_float(((cosine & swap) | (sine & ~swap)) ^ (quadrant & 0x80000000u));
  const auto r = plain_root(minus_two_log(uniform(word1)));  // the argument of the root is in [2^-23, 34]
  return Pair<decltype(r * c)>{r * c, r * s};
}

// One block of four words of a stream.
using Words = Block<uint32_t>;
FD_HD Words draw(uint64_t seed, uint32_t stream, uint64_t block, uint32_t sample, uint64_t step) {
  const uint32_t high = stream << 16 | (uint32_t(block >> 32) & 0xFFFFu);
  return philox4x32(Words{uint32_t(block), high, sample, uint32_t(step)}, uint32_t(seed), uint32_t(seed >> 32));
}

// z[0, 8): the noise of a sample from element `first` on; `first` is a multiple of 4.
FD_HD void eight_normals(uint64_t seed, uint64_t step, uint32_t sample, int64_t first, float* z) {
  for (int half = 0; half < 2; ++half) {
    const Words w = draw(seed, stream_noise, uint64_t(first) / 4 + half, sample, step);
    const auto front = box_muller(w.x, w.y), back = box_muller(w.z, w.w);
    z[4 * half] = front.even, z[4 * half + 1] = front.odd, z[4 * half + 2] = back.even, z[4 * half + 3] = back.odd;
  }
}

#ifndef __CUDACC__
constexpr int blocks_at_once = 32;                   // even and odd lanes: two independent chains of rounds
constexpr int64_t noise_group = 4 * blocks_at_once;  // elements of noise generated together

// z[0, noise_group): the noise of a sample from element `first` on; `first` is a multiple of noise_group.
FD_HD void group_normals(uint64_t seed, uint64_t step, uint32_t sample, int64_t first, float* z) {
  const uint64_t block = uint64_t(first) / 4;
  const Words counter = {uint32_t(block), stream_noise << 16 | (uint32_t(block >> 32) & 0xFFFFu), sample, uint32_t(step)};
  const uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  vwide even, odd;  // the columns in the even and in the odd lanes
  for (int i = 0; i < simd_width / 2; ++i) even[i] = column(2 * i), odd[i] = column(2 * i + 1);
  for (int part = 0; part < blocks_at_once / simd_width; ++part) {
    const uint64_t at = counter.x + part * simd_width;
    const Block<vwide> a = philox4x32(even + at, counter, key0, key1);
    const Block<vwide> b = philox4x32(odd + at, counter, key0, key1);
    const auto front = box_muller(pack(a.x, b.x), pack(a.y, b.y)), back = box_muller(pack(a.z, b.z), pack(a.w, b.w));
    store_columns(z + 4 * part * simd_width, front.even, front.odd, back.even, back.odd);
  }
}
#endif

}  // namespace FD_ISA
}  // namespace fd
