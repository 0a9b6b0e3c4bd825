// SPDX-License-Identifier: Apache-2.0
// fastdistill._cuda: one line per entry point; addresses and the stream as integers, launch errors as RuntimeError.
#include <stdexcept>

#include "bindings.h"

int64_t feature_match_cuda_workspace(const fd::Tap* taps, int64_t count);
const char* feature_match_cuda(const fd::Tap* taps, int64_t count, bool gradient, const float* weights, const float* grad_scale,
                               fd::Distance distance, float parameter, float* loss, float* tap_loss, double* workspace,
                               const fd::Queue& queue);
const char* scale_gradients_cuda(const fd::Tap* taps, int64_t count, const float* factor, const fd::Queue& queue);
const char* noise_gather_cuda(const fd::NoiseGather& a, const fd::Queue& queue);
int64_t output_match_cuda_workspace(int64_t batch, int64_t n);
const char* output_match_cuda(const fd::OutputMatch& a, const fd::Queue& queue);
const char* grad_square_sum_cuda(const fd::GradientRow* rows, int64_t count, int64_t chunk, double* partials, double* total,
                                 const fd::Queue& queue);
int64_t adamw_ema_cuda_workspace();
const char* adamw_ema_cuda(const fd::AdamWRow* rows, int64_t count, int64_t chunk, const fd::AdamWInputs& inputs,
                           int64_t* skipped, float* workspace, const fd::Queue& queue);
int64_t group_norm_silu_cuda_shared(const fd::GroupNormSilu& a, const fd::GroupNormCut& how, bool backward);
int group_norm_silu_cuda_clusters(const fd::GroupNormSilu& a, const fd::GroupNormCut& how, bool backward);
const char* group_norm_silu_cuda(const fd::GroupNormSilu& a, const fd::GroupNormCut& how, float* sums, void* stream);
const char* cross_attention_backward_cuda(const fd::CrossAttentionBackward& a, const fd::Queue& queue);
const char* cross_attention_cuda(const fd::CrossAttention& a, const fd::Queue& queue);
bool cross_attention_cuda_built();
const char* unavailable_cuda();
const char* philox_cuda(const uint32_t* counter, const uint32_t* key, uint32_t* words, float* normals, int64_t n, void* stream);

namespace {

void check(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA error: " + error);
}

// The handle of a stream, and how many multiprocessors its GPU has.
using Stream = std::tuple<Address, int>;

fd::Queue queue_of(const Stream& stream) { return {at<void>(std::get<0>(stream)), std::get<1>(stream)}; }

void philox(Address counter, Address key, Address words, Address normals, int64_t n, Address stream) {
  check("philox4x32",
        philox_cuda(at<uint32_t>(counter), at<uint32_t>(key), at<uint32_t>(words), at<float>(normals), n, at<void>(stream)));
}

int64_t feature_match_workspace(const std::vector<int64_t>& n, const std::vector<int64_t>& samples) {
  std::vector<fd::Tap> taps(n.size());
  for (size_t l = 0; l < n.size(); ++l) taps[l].n = n[l], taps[l].samples = samples.empty() ? 1 : samples[l];
  return feature_match_cuda_workspace(taps.data(), int64_t(n.size()));
}

void feature_match(const Addresses& student, const Addresses& teacher, const Addresses& gradient, const std::vector<int64_t>& n,
                   const std::vector<int64_t>& samples, const std::vector<int>& student_dtype,
                   const std::vector<int>& teacher_dtype, Address weights, Address grad_scale, int distance, float parameter,
                   Address loss, Address tap_loss, Address workspace, const Stream& stream) {
  const std::vector<fd::Tap> taps = taps_of(student, teacher, gradient, n, samples, student_dtype, teacher_dtype);
  check("feature_match", feature_match_cuda(taps.data(), int64_t(taps.size()), !gradient.empty(), at<float>(weights),
                                            at<float>(grad_scale), fd::Distance(distance), parameter, at<float>(loss),
                                            at<float>(tap_loss), at<double>(workspace), queue_of(stream)));
}

void scale_gradients(const Addresses& gradient, const std::vector<int64_t>& n, const std::vector<int>& dtype, Address factor,
                     const Stream& stream) {
  const std::vector<fd::Tap> taps = taps_of(gradient, gradient, gradient, n, {}, dtype, dtype);
  check("scale_gradients", scale_gradients_cuda(taps.data(), int64_t(taps.size()), at<float>(factor), queue_of(stream)));
}

void noise_gather(Address latents, Address latent_prompts, const Addresses& prompts, const std::vector<int64_t>& prompt_bytes,
                  Address coefficients, Address replace, Address counter, int64_t latent_count, int64_t prompt_count,
                  int64_t steps, int64_t latent_ring, int64_t prompt_ring, int64_t row, int64_t batch, int64_t first_sample,
                  int64_t global_batch, int64_t pool, int64_t null_index, int64_t null_threshold, bool with_replacement,
                  int dtype, Address x_t, Address timestep, const Addresses& prompt, Address target, Address latent_index,
                  Address prompt_index, Address choice, const Stream& stream) {
  check("noise_gather",
        noise_gather_cuda(
            draw_of(latents, latent_prompts, prompts, prompt_bytes, coefficients, replace, counter, latent_count, prompt_count,
                    steps, latent_ring, prompt_ring, row, batch, first_sample, global_batch, pool, null_index, null_threshold,
                    with_replacement, dtype, x_t, timestep, prompt, target, latent_index, prompt_index, choice),
            queue_of(stream)));
}

void output_match(const Matrix& student, const Matrix& teacher, const Matrix& unconditional, const Matrix& x_t,
                  const Matrix& latents, Address timestep, Address table, Address guidance, Address weights,
                  Address latent_index, Address choice, Address coefficients, Address counter, int64_t batch, int64_t n,
                  int64_t steps, int64_t latent_count, int64_t first_sample, float output_weight, float task_weight,
                  Address grad_scale, bool huber, float delta, Address loss, Address parts, Address samples, Address gradient,
                  Address workspace, const Stream& stream) {
  fd::OutputMatch a = match_of(student, teacher, unconditional, x_t, latents, timestep, table, guidance, weights, latent_index,
                               choice, coefficients, counter, batch, n, steps, latent_count, first_sample, output_weight,
                               task_weight, grad_scale, huber, delta, loss, parts, samples, gradient);
  a.partials = at<double>(workspace);
  check("output_match", output_match_cuda(a, queue_of(stream)));
}

void grad_square_sum(Address rows, int64_t count, int64_t chunk, Address partials, Address total, const Stream& stream) {
  check("grad_square_sum", grad_square_sum_cuda(at<fd::GradientRow>(rows), count, chunk, at<double>(partials),
                                                at<double>(total), queue_of(stream)));
}

void adamw_ema(Address rows, int64_t count, int64_t chunk, Address square_sum, Address grad_scale, Address found_inf,
               Address ema_weight, Address skipped, double max_norm, bool ema_warmup, bool zero_grads, Address workspace,
               const Stream& stream) {
  const fd::AdamWInputs inputs = inputs_of(square_sum, grad_scale, found_inf, ema_weight, max_norm, ema_warmup, zero_grads);
  check("adamw_ema", adamw_ema_cuda(at<fd::AdamWRow>(rows), count, chunk, inputs, at<int64_t>(skipped), at<float>(workspace),
                                    queue_of(stream)));
}

using Cut = std::array<int, 3>;  // groups per slice, blocks per cluster, clusters at once

fd::GroupNormSilu shaped(int dtype, const std::array<int64_t, 4>& sizes, bool silu) {
  return norm_of(0, dtype, sizes, true, silu, 0.0, {}, 0, 0, 1);
}

int64_t group_norm_silu_shared(int dtype, const std::array<int64_t, 4>& sizes, const Cut& cut, bool backward) {
  return group_norm_silu_cuda_shared(shaped(dtype, sizes, true), {cut[0], cut[1], cut[2]}, backward);
}

int group_norm_silu_clusters(int dtype, const std::array<int64_t, 4>& sizes, bool silu, const Cut& cut, bool backward) {
  return group_norm_silu_cuda_clusters(shaped(dtype, sizes, silu), {cut[0], cut[1], cut[2]}, backward);
}

void group_norm_silu(Address x, int dtype, const std::array<int64_t, 4>& sizes, bool silu, double eps,
                     const std::array<Given, 5>& given, Address mean, Address rstd, const Cut& cut, const Stream& stream,
                     Address y) {
  fd::GroupNormSilu a = norm_of(x, dtype, sizes, true, silu, eps, given, mean, rstd, 1);
  a.y = at<void>(y);
  check("group_norm_silu", group_norm_silu_cuda(a, {cut[0], cut[1], cut[2]}, nullptr, queue_of(stream).stream));
}

void group_norm_silu_backward(Address x, int dtype, const std::array<int64_t, 4>& sizes, bool silu, double eps,
                              const std::array<Given, 5>& given, Address mean, Address rstd, const Cut& cut,
                              const Stream& stream, Address grad, Address dx, const std::array<Given, 5>& outs, Address sums) {
  const fd::GroupNormSilu a = backward_of(norm_of(x, dtype, sizes, true, silu, eps, given, mean, rstd, 1), grad, dx, outs);
  check("group_norm_silu_backward",
        group_norm_silu_cuda(a, {cut[0], cut[1], cut[2]}, at<float>(sums), queue_of(stream).stream));
}

// The address of a tensor, and the strides of batch, tokens and heads in elements.
using Strided = std::tuple<Address, int64_t, int64_t, int64_t>;

fd::Heads heads_of(const Strided& x) { return {at<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)}; }

void cross_attention(const Strided& q, const Strided& k, const Strided& v, const Strided& out, Address mask, int masking,
                     int mask_dtype, Address rows, int64_t batch, int64_t queries, int64_t heads, int64_t dim, int64_t keys,
                     int64_t bank, int64_t chunks, int64_t span, float scale, int dtype, bool swizzled, const Stream& stream) {
  fd::CrossAttention a = {};
  a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v), a.out = heads_of(out);
  a.mask = at<void>(mask), a.masking = fd::Mask(masking), a.mask_dtype = fd::Dtype(mask_dtype), a.rows = at<int64_t>(rows);
  a.B = batch, a.N = queries, a.H = heads, a.D = dim, a.L = keys, a.R = bank, a.chunks = chunks, a.span = span;
  a.scale = scale, a.dtype = fd::Dtype(dtype), a.swizzled = swizzled;
  check("cross_attention", cross_attention_cuda(a, queue_of(stream)));
}

void cross_attention_backward(const Strided& q, const Strided& k, const Strided& v, const Strided& grad_out,
                              const Strided& grad_q, Address mask, int masking, int mask_dtype, Address rows, Address grad_k,
                              Address grad_v, Address partials, int64_t batch, int64_t queries, int64_t heads, int64_t dim,
                              int64_t keys, int64_t bank, int64_t chunks, int64_t span, float scale, int dtype, bool swizzled,
                              const Stream& stream) {
  fd::CrossAttentionBackward a = {};
  a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v), a.grad_out = heads_of(grad_out), a.grad_q = heads_of(grad_q);
  a.mask = at<void>(mask), a.masking = fd::Mask(masking), a.mask_dtype = fd::Dtype(mask_dtype), a.rows = at<int64_t>(rows);
  a.grad_k = at<void>(grad_k), a.grad_v = at<void>(grad_v), a.partials = at<float>(partials);
  a.B = batch, a.N = queries, a.H = heads, a.D = dim, a.L = keys, a.R = bank, a.chunks = chunks, a.span = span;
  a.scale = scale, a.dtype = fd::Dtype(dtype), a.swizzled = swizzled;
  check("cross_attention_backward", cross_attention_backward_cuda(a, queue_of(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels on raw addresses. Call fastdistill.ops instead: these functions check no arguments.";
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("unavailable", &unavailable_cuda, "why the current GPU or its driver cannot run these kernels, or None");
  m.def("feature_match", &feature_match, release());
  m.def("feature_match_workspace", &feature_match_workspace, "doubles that feature_match needs for taps of n elements");
  m.def("scale_gradients", &scale_gradients, release());
  m.def("noise_gather", &noise_gather, release());
  m.def("output_match_workspace", &output_match_cuda_workspace, "doubles that output_match needs for batch samples of n");
  m.def("output_match", &output_match, release());
  m.def("group_norm_silu_shared", &group_norm_silu_shared, "bytes of shared memory that a block needs with this cut");
  m.def("group_norm_silu_clusters", &group_norm_silu_clusters, "how many clusters with this cut the current GPU runs at once");
  m.def("group_norm_silu", &group_norm_silu, release());
  m.def("group_norm_silu_backward", &group_norm_silu_backward, release());
  m.def("grad_square_sum", &grad_square_sum, release());
  m.def("adamw_ema_workspace", &adamw_ema_cuda_workspace, "floats that adamw_ema needs for each parameter");
  m.def("adamw_ema", &adamw_ema, release());
  m.def("cross_attention", &cross_attention, release());
  m.def("cross_attention_backward", &cross_attention_backward, release());
  m.def("cross_attention_built", &cross_attention_cuda_built, "whether this build contains the kernels for Hopper");
  m.def("philox4x32", &philox, release(),
        "words[n, 4] and normals[n, 4] of counter[n, 4] under key[2], on the device and the stream");
}
