// SPDX-License-Identifier: Apache-2.0
// Shared by the kernels that work on rows: access to small tensors of any dtype, vectors with fewer than sixteen valid
// elements, sums over lanes.
#pragma once
#include <utility>

#include "common.h"
#ifndef __CUDACC__
#include "simd.h"
#endif

namespace fd {

// A small tensor with one number per channel, [C] or [B, C]; the address is null if the tensor is not given.
struct Row {
  void* address;
  Dtype dtype;
  int64_t stride;  // elements from one sample to the next
};

namespace FD_ISA {

FD_HD float number(const Row& row, int64_t sample, int64_t c, float missing) {
  const int64_t at = sample * row.stride + c;
  if (!row.address) return missing;
  switch (row.dtype) {
    case Dtype::f32: return static_cast<const float*>(row.address)[at];
    case Dtype::bf16: return to_float(static_cast<const bf16*>(row.address)[at]);
    default: return to_float(static_cast<const f16*>(row.address)[at]);
  }
}

FD_HD void put(const Row& row, int64_t sample, int64_t c, double value) {
  const int64_t at = sample * row.stride + c;
  if (!row.address) return;
  switch (row.dtype) {
    case Dtype::f32: static_cast<float*>(row.address)[at] = float(value); return;
    case Dtype::bf16: static_cast<bf16*>(row.address)[at] = from_float<bf16>(float(value)); return;
    default: static_cast<f16*>(row.address)[at] = from_float<f16>(float(value));
  }
}

#ifndef __CUDACC__
template <typename T> FD_HD Lanes get(const T* p, int64_t n) { return n == lanes ? load(p) : load_first(p, n); }
template <typename T> FD_HD void set(T* p, Lanes a, int64_t n) {
  if (n == lanes) store<false>(p, a);
  else store_first(p, a, n);
}
FD_HD Lanes keep(Lanes a, int64_t n) { return n == lanes ? a : first_of(a, n); }

// The numbers of channels [c, c + n), n <= lanes.
inline Lanes vector(const Row& row, int64_t sample, int64_t c, int64_t n, float missing) {
  const int64_t at = sample * row.stride + c;
  if (!row.address) return splat(missing);
  switch (row.dtype) {
    case Dtype::f32: return get(static_cast<const float*>(row.address) + at, n);
    case Dtype::bf16: return get(static_cast<const bf16*>(row.address) + at, n);
    default: return get(static_cast<const f16*>(row.address) + at, n);
  }
}

template <int by, int... i> FD_HD vfloat turned(vfloat x, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, ((i + by) % simd_width)...);
#else
  return __builtin_shuffle(x, vint{((i + by) % simd_width)...});
#endif
}

// The sum of the lanes in fp32, added pairwise (a tree).
FD_HD double total(Lanes a) {
  for (int n = simd_parts / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a.part[i] += a.part[i + n];
  vfloat x = a.part[0];
  const std::make_integer_sequence<int, simd_width> all;
  if (simd_width > 8) x += turned<8>(x, all);
  if (simd_width > 4) x += turned<4>(x, all);
  x += turned<2>(x, all);
  x += turned<1>(x, all);
  return x[0];
}

#endif

}  // namespace FD_ISA

}  // namespace fd
