// SPDX-License-Identifier: Apache-2.0
// The CPU entry points, declared once per instruction set, and the function table of an instruction set (chosen at run time).
#pragma once
#include "adamw_ema/math.h"
#include "feature_match/math.h"
#include "geglu/math.h"
#include "group_norm_silu/math.h"
#include "layer_norm_modulate/math.h"
#include "noise_gather/math.h"
#include "output_match/math.h"

#define FD_DECLARE(isa)                                                                                                      \
  namespace fd::isa {                                                                                                        \
  void philox(const uint32_t* counter, const uint32_t* key, uint32_t* words, float* normals, int64_t n);                     \
  void convert(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t n);                                     \
  int64_t feature_match_workspace(const Tap* taps, int64_t count);                                                           \
  void feature_match(const FeatureMatch& a);                                                                                 \
  void scale_gradients(const FeatureMatch& a, const float* factor);                                                          \
  int64_t group_norm_silu_workspace(const GroupNormSilu& a);                                                                 \
  void group_norm_silu(const GroupNormSilu& a, double* workspace);                                                           \
  void geglu(const Geglu& a);                                                                                                \
  int64_t layer_norm_modulate_workspace(const LayerNormModulate& a);                                                         \
  void layer_norm_modulate(const LayerNormModulate& a, float* workspace);                                                    \
  void layer_norm_modulate_backward(const LayerNormModulate& a, float* workspace);                                           \
  int64_t noise_gather(const NoiseGather& a);                                                                                \
  int64_t output_match(const OutputMatch& a);                                                                                \
  void grad_square_sum(const GradientRow* rows, int64_t count, int64_t chunk, double* partials, double* total, int threads); \
  void adamw_ema(const AdamWRow* rows, int64_t count, int64_t chunk, const AdamWInputs& a, int64_t* skipped, int threads);   \
  }
FD_DECLARE(baseline)
#ifdef FD_HAVE_AVX2
FD_DECLARE(avx2)
#endif
#ifdef FD_HAVE_AVX512
FD_DECLARE(avx512)
#endif

namespace fd {

struct Kernels {
  const char* isa;
  decltype(&baseline::philox) philox;
  decltype(&baseline::convert) convert;
  decltype(&baseline::feature_match_workspace) feature_match_workspace;
  decltype(&baseline::feature_match) feature_match;
  decltype(&baseline::scale_gradients) scale_gradients;
  decltype(&baseline::group_norm_silu_workspace) group_norm_silu_workspace;
  decltype(&baseline::group_norm_silu) group_norm_silu;
  decltype(&baseline::geglu) geglu;
  decltype(&baseline::layer_norm_modulate_workspace) layer_norm_modulate_workspace;
  decltype(&baseline::layer_norm_modulate) layer_norm_modulate;
  decltype(&baseline::layer_norm_modulate_backward) layer_norm_modulate_backward;
  decltype(&baseline::noise_gather) noise_gather;
  decltype(&baseline::output_match) output_match;
  decltype(&baseline::grad_square_sum) grad_square_sum;
  decltype(&baseline::adamw_ema) adamw_ema;
};

#define FD_KERNELS(isa)                     \
  {#isa,                                    \
   &fd::isa::philox,                        \
   &fd::isa::convert,                       \
   &fd::isa::feature_match_workspace,       \
   &fd::isa::feature_match,                 \
   &fd::isa::scale_gradients,               \
   &fd::isa::group_norm_silu_workspace,     \
   &fd::isa::group_norm_silu,               \
   &fd::isa::geglu,                         \
   &fd::isa::layer_norm_modulate_workspace, \
   &fd::isa::layer_norm_modulate,           \
   &fd::isa::layer_norm_modulate_backward,  \
   &fd::isa::noise_gather,                  \
   &fd::isa::output_match,                  \
   &fd::isa::grad_square_sum,               \
   &fd::isa::adamw_ema}

}  // namespace fd
