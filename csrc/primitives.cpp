// SPDX-License-Identifier: Apache-2.0
// Philox and the dtype conversions as entry points, so that tests can compare them with published vectors and with torch.
#include "philox.h"

namespace fd::FD_ISA {
namespace {

template <typename From, typename To> void convert_typed(const void* from, void* to, int64_t n) {
  const From* x = static_cast<const From*>(from);
  To* y = static_cast<To*>(to);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store<false>(y + i, load(x + i));
  for (; i < n; ++i) y[i] = from_float<To>(to_float(x[i]));
}

template <typename From> void convert_from(const void* from, void* to, Dtype to_dtype, int64_t n) {
  switch (to_dtype) {
    case Dtype::f32: return convert_typed<From, float>(from, to, n);
    case Dtype::bf16: return convert_typed<From, bf16>(from, to, n);
    default: return convert_typed<From, f16>(from, to, n);
  }
}

}  // namespace

// words[n, 4] = philox(counter[n, 4], key[2]) and their normals[n, 4].
void philox(const uint32_t* counter, const uint32_t* key, uint32_t* words, float* normals, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t* c = counter + 4 * i;
    const Block<uint32_t> w = philox4x32(Block<uint32_t>{c[0], c[1], c[2], c[3]}, key[0], key[1]);
    const auto first = box_muller(w.x, w.y), second = box_muller(w.z, w.w);
    const uint32_t word[4] = {w.x, w.y, w.z, w.w};
    const float z[4] = {first.even, first.odd, second.even, second.odd};
    memcpy(words + 4 * i, word, sizeof word);
    memcpy(normals + 4 * i, z, sizeof z);
  }
}

// Converts via fp32: full registers with the SIMD conversions, the remaining elements with the scalar ones.
void convert(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t n) {
  switch (from_dtype) {
    case Dtype::f32: return convert_from<float>(from, to, to_dtype, n);
    case Dtype::bf16: return convert_from<bf16>(from, to, to_dtype, n);
    default: return convert_from<f16>(from, to, to_dtype, n);
  }
}

}  // namespace fd::FD_ISA
