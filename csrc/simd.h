// SPDX-License-Identifier: Apache-2.0
// Sixteen float lanes in the widest registers of the instruction set. Every operation works lane by lane, so a sum kept in
// lanes has the same bits on all instruction sets. Written with the vector extensions of GCC and clang; intrinsics only for
// what these cannot express (fp16 conversion, non-temporal stores) or compile badly.
#pragma once
#include "common.h"
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define FD_X86 1
#endif

#if defined(__AVX512F__)
#define FD_INTRINSIC(name) _mm512_##name
#elif defined(__AVX2__)
#define FD_INTRINSIC(name) _mm256_##name
#elif defined(FD_X86)
#define FD_INTRINSIC(name) _mm_##name
#endif

namespace fd::FD_ISA {

#if defined(__AVX512F__)
constexpr int simd_width = 16;
#elif defined(__AVX2__)
constexpr int simd_width = 8;
#else
constexpr int simd_width = 4;
#endif
constexpr int lanes = 16;
constexpr int simd_parts = lanes / simd_width;

typedef float vfloat __attribute__((vector_size(4 * simd_width)));
typedef double vdouble __attribute__((vector_size(4 * simd_width)));
typedef int32_t vint __attribute__((vector_size(4 * simd_width)));
typedef uint32_t vuint __attribute__((vector_size(4 * simd_width)));
typedef uint64_t vwide __attribute__((vector_size(4 * simd_width)));
typedef uint16_t vhalf __attribute__((vector_size(2 * simd_width)));

struct Lanes {
  vfloat part[simd_parts];
};

FD_HD Lanes splat(float x) {
  Lanes r;
  for (int i = 0; i < simd_parts; ++i) r.part[i] = x - vfloat{};  // x - 0 keeps the sign of zero
  return r;
}
FD_HD Lanes operator+(Lanes a, Lanes b) {
  for (int i = 0; i < simd_parts; ++i) a.part[i] += b.part[i];
  return a;
}
FD_HD Lanes operator-(Lanes a, Lanes b) {
  for (int i = 0; i < simd_parts; ++i) a.part[i] -= b.part[i];
  return a;
}
FD_HD Lanes operator*(Lanes a, Lanes b) {
  for (int i = 0; i < simd_parts; ++i) a.part[i] *= b.part[i];
  return a;
}
FD_HD Lanes operator/(Lanes a, Lanes b) {
  for (int i = 0; i < simd_parts; ++i) a.part[i] /= b.part[i];
  return a;
}

FD_HD Lanes clamp(Lanes x, Lanes limit) {
  for (int i = 0; i < simd_parts; ++i) {
    const vfloat high = limit.part[i], low = -high;
    x.part[i] = x.part[i] < low ? low : x.part[i] > high ? high : x.part[i];
  }
  return x;
}

// The sum of the lanes, always in this order.
FD_HD double sum(Lanes a) {
  float x[lanes];
  memcpy(x, &a, sizeof x);
  double total = 0;
  for (int i = 0; i < lanes; ++i) total += x[i];
  return total;
}

FD_HD Lanes load(const float* p) {
  Lanes r;
  memcpy(&r, p, sizeof r);
  return r;
}
FD_HD Lanes load(const bf16* p) {
  Lanes r;
  for (int i = 0; i < simd_parts; ++i) {  // without intrinsics, the compiler widens half a register at a time
#if defined(__AVX512F__)
    const vuint wide = (vuint)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    const vuint wide = (vuint)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + i * simd_width)));
#else
    vhalf half;
    memcpy(&half, p + i * simd_width, sizeof half);
    const vuint wide = __builtin_convertvector(half, vuint);
#endif
    r.part[i] = (vfloat)(wide << 16);
  }
  return r;
}
#if !defined(__AVX512F__) && !defined(__F16C__)
// The scalar conversions of common.h on registers of four lanes; not inlined because they are long.
static __attribute__((noinline, unused)) Lanes load_f16(const f16* p) {
  Lanes r;
  for (int i = 0; i < simd_parts; ++i) {
    vhalf half;
    memcpy(&half, p + i * simd_width, sizeof half);
    const vuint word = __builtin_convertvector(half, vuint) << 16, twice = word + word;
    const vfloat normal = (vfloat)((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
    const vfloat subnormal = (vfloat)((twice >> 17) | (126u << 23)) - 0.5f;
    const vuint small = (vuint)(twice < (1u << 27));
    r.part[i] = (vfloat)((word & 0x80000000u) | (small & (vuint)subnormal) | (~small & (vuint)normal));
  }
  return r;
}
static __attribute__((noinline, unused)) void store_f16(f16* p, Lanes a) {
  vhalf half[simd_parts];
  for (int i = 0; i < simd_parts; ++i) {
    const vuint bits = (vuint)a.part[i], twice = bits + bits, exponent = twice & 0xFF000000u;
    const vuint large = (vuint)(exponent > 0x71000000u), nan = (vuint)(twice > 0xFF000000u);
    const vuint bias = (large & exponent) | (~large & 0x71000000u);
    const vfloat magnitude = (vfloat)(bits & 0x7FFFFFFFu) * 0x1p+112f * 0x1p-110f;
    const vuint total = (vuint)((vfloat)((bias >> 1) + 0x07800000u) + magnitude);
    const vuint rounded = ((total >> 13) & 0x7C00u) + (total & 0x0FFFu);
    half[i] = __builtin_convertvector(((bits >> 16) & 0x8000u) | (nan & 0x7E00u) | (~nan & rounded), vhalf);
  }
  memcpy(p, half, sizeof half);
}
#endif

FD_HD Lanes load(const f16* p) {
  Lanes r;
#if defined(__AVX512F__)
  r.part[0] = (vfloat)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  for (int i = 0; i < simd_parts; ++i)
    r.part[i] = (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i * simd_width)));
#else
  r = load_f16(p);
#endif
  return r;
}

// The same functions as for scalars in common.h, on one register.
FD_HD vuint as_bits(vfloat x) { return (vuint)x; }
FD_HD vfloat as_float(vuint bits) { return (vfloat)bits; }
FD_HD vfloat int_to_float(vuint x) { return __builtin_convertvector((vint)x, vfloat); }
FD_HD vuint shift_signed(vuint x, int bits) { return (vuint)((vint)x >> bits); }
FD_HD vfloat square_root(vfloat x) {
#ifdef FD_X86
  return (vfloat)FD_INTRINSIC(sqrt_ps)(x);
#else
  for (int i = 0; i < simd_width; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

FD_HD Lanes square_root(Lanes a) {
  for (int i = 0; i < simd_parts; ++i) a.part[i] = square_root(a.part[i]);
  return a;
}

// a b + c, with one rounding if the instruction set has FMA.
FD_HD vfloat muladd(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__) || defined(__FMA__)
  return (vfloat)FD_INTRINSIC(fmadd_ps)(a, b, c);
#else
  return a * b + c;
#endif
}
FD_HD vfloat muladd(vfloat a, vfloat b, float c) { return muladd(a, b, c - vfloat{}); }
FD_HD vfloat muladd(vfloat a, float b, float c) { return muladd(a, b - vfloat{}, c - vfloat{}); }
FD_HD vfloat muladd(vfloat a, float b, vfloat c) { return muladd(a, b - vfloat{}, c); }
FD_HD Lanes muladd(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < simd_parts; ++i) a.part[i] = muladd(a.part[i], b.part[i], c.part[i]);
  return a;
}

// 32-bit words in 64-bit lanes, whose upper halves may hold any bits: this makes a product one instruction.
FD_HD vwide multiply(vwide a, uint32_t b) {
#if defined(__AVX512F__)
  return (vwide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vwide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(FD_X86)
  return (vwide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * uint64_t(b);
#endif
}
FD_HD vwide upper(vwide product) {
#if defined(__AVX512F__)
  return (vwide)_mm512_shuffle_epi32((__m512i)product,
                                     (_MM_PERM_ENUM)0xF5);  // a shift would use the same port as the multiplication
#else
  return product >> 32;
#endif
}
FD_HD vwide lower(vwide product) { return product; }
FD_HD vuint pack(vwide even, vwide odd) {
#if defined(__AVX512F__)
  return (vuint)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, (_MM_PERM_ENUM)0xA0);
#else
  return (vuint)((even & 0xFFFFFFFFu) | (odd << 32));
#endif
}

// p[4 i + k] = column i of register k (a, b, c, d). Lane l holds column (l mod 4) * width / 4 + l / 4, so only 4 x 4 blocks
// inside 128 bits need to be transposed.
FD_HD constexpr int column(int lane) { return lane % 4 * (simd_width / 4) + lane / 4; }
FD_HD void store_columns(float* p, vfloat a, vfloat b, vfloat c, vfloat d) {
#ifdef FD_X86
  const vdouble ab0 = (vdouble)FD_INTRINSIC(unpacklo_ps)(a, b), ab1 = (vdouble)FD_INTRINSIC(unpackhi_ps)(a, b);
  const vdouble cd0 = (vdouble)FD_INTRINSIC(unpacklo_ps)(c, d), cd1 = (vdouble)FD_INTRINSIC(unpackhi_ps)(c, d);
  const vdouble rows[4] = {(vdouble)FD_INTRINSIC(unpacklo_pd)(ab0, cd0), (vdouble)FD_INTRINSIC(unpackhi_pd)(ab0, cd0),
                           (vdouble)FD_INTRINSIC(unpacklo_pd)(ab1, cd1), (vdouble)FD_INTRINSIC(unpackhi_pd)(ab1, cd1)};
  memcpy(p, rows, sizeof rows);
#else
  for (int l = 0; l < simd_width; ++l) {
    const float z[4] = {a[l], b[l], c[l], d[l]};
    memcpy(p + 4 * column(l), z, sizeof z);
  }
#endif
}

FD_HD void stream_bytes(void* p, vfloat v) {
#ifdef FD_X86
  FD_INTRINSIC(stream_ps)((float*)p, v);
#else
  memcpy(p, &v, sizeof v);
#endif
}

// Streaming stores need addresses that are multiples of 64 bytes (of 32 for two-byte dtypes). A thread must call
// stream_fence() after its last one.
FD_HD void stream_fence() {
#ifdef FD_X86
  _mm_sfence();
#endif
}

template <bool stream> FD_HD void store(float* p, Lanes a) {
  if (stream)
    for (int i = 0; i < simd_parts; ++i) stream_bytes(p + i * simd_width, a.part[i]);
  else memcpy(p, &a, sizeof a);
}

template <bool stream> FD_HD void store_halves(void* p, const void* halves) {
#if defined(__AVX512F__)
  if (stream) return _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((const __m256i*)halves));
#elif defined(FD_X86)
  if (stream) {
    for (int i = 0; i < 2; ++i) _mm_stream_si128((__m128i*)p + i, _mm_loadu_si128((const __m128i*)halves + i));
    return;
  }
#endif
  memcpy(p, halves, 2 * lanes);
}

template <bool stream> FD_HD void store(bf16* p, Lanes a) {
  vhalf half[simd_parts];
  for (int i = 0; i < simd_parts; ++i) {
    const vuint bits = (vuint)a.part[i];
    const vuint rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
#if defined(__AVX512F__)
    const __mmask16 ordered = _mm512_cmp_ps_mask((__m512)a.part[i], (__m512)a.part[i], _CMP_ORD_Q);
    half[i] = (vhalf)_mm512_mask_cvtepi32_epi16(_mm256_set1_epi16(0x7FC0), ordered, (__m512i)rounded);
#else
    const vuint ordered = (vuint)(a.part[i] == a.part[i]);  // all bits set, or 0 for NaN
    half[i] = __builtin_convertvector((rounded & ordered) | (~ordered & 0x7FC0u), vhalf);
#endif
  }
  store_halves<stream>(p, half);
}
template <bool stream> FD_HD void store(f16* p, Lanes a) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(0xFFFF, (__m512)a.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  store_halves<stream>(p, &half);
#elif defined(__F16C__)
  __m128i half[simd_parts];
  for (int i = 0; i < simd_parts; ++i) half[i] = _mm256_cvtps_ph((__m256)a.part[i], _MM_FROUND_TO_NEAREST_INT);
  store_halves<stream>(p, half);
#else
  f16 half[lanes];
  store_f16(half, a);
  store_halves<stream>(p, half);
#endif
}

// load_first, first_of: the first n lanes, the others zero. store_first writes only the first n lanes.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)  // AddressSanitizer does not check masked instructions
#define FD_MASKS 1
FD_HD __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }
#endif

template <typename T> FD_HD Lanes load_first(const T* p, int64_t n) {
  T x[lanes] = {};
#ifdef FD_MASKS
  if constexpr (sizeof(T) == 4) return {(vfloat)_mm512_maskz_loadu_ps(first(n), p)};
  else _mm256_storeu_si256((__m256i*)x, _mm256_maskz_loadu_epi16(first(n), p));
#else
  memcpy(x, p, n * sizeof(T));
#endif
  return load(x);
}

template <typename T> FD_HD void store_first(T* p, Lanes a, int64_t n) {
  T x[lanes];
  store<false>(x, a);
#ifdef FD_MASKS
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, first(n), (__m512)a.part[0]);
  else _mm256_mask_storeu_epi16(p, first(n), _mm256_loadu_si256((const __m256i*)x));
#else
  memcpy(p, x, n * sizeof(T));
#endif
}

FD_HD Lanes first_of(Lanes a, int64_t n) {
#ifdef FD_MASKS
  return {(vfloat)_mm512_maskz_mov_ps(first(n), (__m512)a.part[0])};
#else
  float x[lanes];
  memcpy(x, &a, sizeof x);
  return load_first(x, n);
#endif
}

}  // namespace fd::FD_ISA
