// SPDX-License-Identifier: Apache-2.0
// Shared by all kernels: the host/device macro, the namespace per instruction set, and conversions between dtypes and float.
//
// A CPU source is compiled once per instruction set, with FD_ISA as its namespace (fd::baseline, fd::avx2, fd::avx512).
// Every inline function below is in that namespace, so the linker cannot replace a baseline function by its AVX-512 version,
// which an older CPU could not run. For the same reason these sources use nothing of namespace std.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FD_HD __host__ __device__ __forceinline__
#else
#define FD_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__) || defined(__clang__)
#define FD_UNROLL _Pragma("unroll")
#else
#define FD_UNROLL _Pragma("GCC unroll 16")
#endif

#ifndef FD_ISA
#define FD_ISA device
#endif

namespace fd {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Where a CUDA kernel is launched: the stream, and the GPU's number of multiprocessors. Python passes both, because the CUDA
// runtime in this extension does not know which device is current in torch's own runtime.
struct Queue {
  void* stream;
  int processors;
};

FD_HD constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

namespace FD_ISA {

FD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FD_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
#ifdef __CUDA_ARCH__
FD_HD float muladd(float a, float b, float c) { return fmaf(a, b, c); }
#else
FD_HD float muladd(float a, float b, float c) { return a * b + c; }
#endif
FD_HD int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// x limited to [-limit, limit]; NaN stays NaN.
FD_HD float clamp(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }

FD_HD uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FD_HD float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

FD_HD float int_to_float(uint32_t x) { return float(int32_t(x)); }
FD_HD uint32_t shift_signed(uint32_t x, int bits) { return uint32_t(int32_t(x) >> bits); }
FD_HD float square_root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
FD_HD double square_root(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}
FD_HD double power(double x, double y) {
#ifdef __CUDA_ARCH__
  return pow(x, y);
#else
  return __builtin_pow(x, y);
#endif
}

FD_HD uint64_t multiply(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;  // without this, nvcc multiplies 64-bit numbers in larger kernels
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}
FD_HD uint32_t upper(uint64_t product) { return uint32_t(product >> 32); }
FD_HD uint32_t lower(uint64_t product) { return uint32_t(product); }

// To float: exact for every bit pattern (a signaling NaN may become a quiet NaN).
FD_HD float to_float(float x) { return x; }
FD_HD float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
FD_HD float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t word = uint32_t(x.bits) << 16, twice = word + word;
  const float normal = as_float((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = as_float((twice >> 17) | (126u << 23)) - 0.5f;
  return as_float((word & 0x80000000u) | as_bits(twice < (1u << 27) ? subnormal : normal));
#endif
}

// From float: rounded once, to nearest even, like the hardware; NaN stays NaN, but its payload is not kept.
template <typename T> FD_HD T from_float(float x);
template <> FD_HD float from_float<float>(float x) { return x; }
template <> FD_HD bf16 from_float<bf16>(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7FC0u)};
}
template <> FD_HD f16 from_float<f16>(float x) {
#ifdef __CUDA_ARCH__
  f16 value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t bits = as_bits(x), twice = bits + bits, sign = (bits >> 16) & 0x8000u;
  const uint32_t exponent = twice & 0xFF000000u, bias = exponent > 0x71000000u ? exponent : 0x71000000u;
  const float magnitude = as_float(bits & 0x7FFFFFFFu) * 0x1p+112f * 0x1p-110f;  // overflows to inf where fp16 does
  const uint32_t sum = as_bits(as_float((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t half = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return {uint16_t(sign | (twice > 0xFF000000u ? 0x7E00u : half))};
#endif
}

}  // namespace FD_ISA
}  // namespace fd
