// SPDX-License-Identifier: Apache-2.0
// fastdistill._cpu: one line per entry point (addresses as integers, the GIL released), and the choice of the instruction
// set. The functions here check nothing: fastdistill/ops/<op>/cpp.py checks the arguments, called by torch's dispatcher.
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <tuple>

#include "bindings.h"
#include "isa.h"

namespace {

// The instruction sets that this machine can run, the best last.
const std::vector<fd::Kernels>& available() {
  static const std::vector<fd::Kernels> table = [] {
    std::vector<fd::Kernels> t = {FD_KERNELS(baseline)};
#ifdef FD_HAVE_AVX2
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // both imply F16C
    if (avx2) t.push_back(FD_KERNELS(avx2));
#endif
#ifdef FD_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      t.push_back(FD_KERNELS(avx512));
#endif
    return t;
  }();
  return table;
}

const fd::Kernels* kernels = nullptr;

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const fd::Kernels& k : available()) names.push_back(k.isa);
  return names;
}

void use_isa(const std::string& name) {
  std::string known;
  for (const fd::Kernels& k : available()) {
    if (name == k.isa) {
      kernels = &k;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(k.isa);
  }
  throw std::invalid_argument("instruction set: expected one of " + known + " (those this machine can run), got '" + name +
                              "'");
}

void feature_match(const Addresses& student, const Addresses& teacher, const Addresses& gradient, const std::vector<int64_t>& n,
                   const std::vector<int64_t>& samples, const std::vector<int>& student_dtype,
                   const std::vector<int>& teacher_dtype, Address weights, Address grad_scale, int distance, float parameter,
                   Address loss, Address tap_loss, int threads) {
  const std::vector<fd::Tap> taps = taps_of(student, teacher, gradient, n, samples, student_dtype, teacher_dtype);
  const int64_t count = int64_t(taps.size());
  std::vector<double> partials(size_t(kernels->feature_match_workspace(taps.data(), count)));
  kernels->feature_match({taps.data(), count, at<float>(weights), at<float>(grad_scale), fd::Distance(distance), parameter,
                          at<float>(loss), at<float>(tap_loss), partials.data(), threads});
}

void scale_gradients(const Addresses& gradient, const std::vector<int64_t>& n, const std::vector<int>& dtype, Address factor,
                     int threads) {
  const std::vector<fd::Tap> taps = taps_of(gradient, gradient, gradient, n, {}, dtype, dtype);
  fd::FeatureMatch arguments = {};
  arguments.taps = taps.data();
  arguments.count = int64_t(taps.size());
  arguments.threads = threads;
  kernels->scale_gradients(arguments, at<float>(factor));
}

void group_norm_silu(Address x, int dtype, const std::array<int64_t, 4>& sizes, bool silu, double eps,
                     const std::array<Given, 5>& given, Address mean, Address rstd, bool channels_last, int threads,
                     Address y) {
  fd::GroupNormSilu a = norm_of(x, dtype, sizes, channels_last, silu, eps, given, mean, rstd, threads);
  a.y = at<void>(y);
  const std::unique_ptr<double[]> workspace(new double[size_t(kernels->group_norm_silu_workspace(a))]);
  kernels->group_norm_silu(a, workspace.get());
}

void group_norm_silu_backward(Address x, int dtype, const std::array<int64_t, 4>& sizes, bool silu, double eps,
                              const std::array<Given, 5>& given, Address mean, Address rstd, bool channels_last, int threads,
                              Address grad, Address dx, const std::array<Given, 5>& outs) {
  const fd::GroupNormSilu a =
      backward_of(norm_of(x, dtype, sizes, channels_last, silu, eps, given, mean, rstd, threads), grad, dx, outs);
  const std::unique_ptr<double[]> workspace(new double[size_t(kernels->group_norm_silu_workspace(a))]);
  kernels->group_norm_silu(a, workspace.get());
}

void geglu(Address x, int dtype, int64_t rows, int64_t width, bool tanh, Address y, Address grad, Address dx, int threads) {
  kernels->geglu({at<void>(x), fd::Dtype(dtype), rows, width, tanh, at<void>(y), at<void>(grad), at<void>(dx), threads});
}

fd::LayerNormModulate norm_of(Address x, Address h, int dtype, const std::array<int64_t, 3>& sizes, double eps,
                              const std::array<Given, 5>& given, Address mean, Address rstd, int threads) {
  fd::LayerNormModulate a = {};
  a.x = at<void>(x), a.h = at<void>(h), a.dtype = fd::Dtype(dtype), a.eps = eps;
  a.batch = sizes[0], a.rows = sizes[1], a.width = sizes[2];
  a.gate = row_of(given[0]), a.scale = row_of(given[1]), a.shift = row_of(given[2]);
  a.weight = row_of(given[3]), a.bias = row_of(given[4]);
  a.mean = at<float>(mean), a.rstd = at<float>(rstd), a.threads = threads;
  return a;
}

void layer_norm_modulate(Address x, Address h, int dtype, const std::array<int64_t, 3>& sizes, double eps,
                         const std::array<Given, 5>& given, Address mean, Address rstd, int threads, Address y, Address s) {
  fd::LayerNormModulate a = norm_of(x, h, dtype, sizes, eps, given, mean, rstd, threads);
  a.y = at<void>(y), a.s = at<void>(s);
  std::vector<float> workspace(size_t(kernels->layer_norm_modulate_workspace(a)));
  kernels->layer_norm_modulate(a, workspace.data());
}

void layer_norm_modulate_backward(Address s, Address h, int dtype, const std::array<int64_t, 3>& sizes,
                                  const std::array<Given, 5>& given, Address mean, Address rstd, int threads, Address grad,
                                  Address grad_s, Address dx, Address dh, const std::array<Given, 5>& outs) {
  fd::LayerNormModulate a = norm_of(s, h, dtype, sizes, 0.0, given, mean, rstd, threads);
  a.grad = at<void>(grad), a.grad_s = at<void>(grad_s), a.dx = at<void>(dx), a.dh = at<void>(dh);
  a.dgate = row_of(outs[0]), a.dscale = row_of(outs[1]), a.dshift = row_of(outs[2]);
  a.dweight = row_of(outs[3]), a.dbias = row_of(outs[4]);
  std::vector<float> workspace(size_t(kernels->layer_norm_modulate_workspace(a)));
  kernels->layer_norm_modulate_backward(a, workspace.data());
}

int64_t noise_gather(Address latents, Address latent_prompts, const Addresses& prompts,
                     const std::vector<int64_t>& prompt_bytes, Address coefficients, Address replace, Address counter,
                     int64_t latent_count, int64_t prompt_count, int64_t steps, int64_t latent_ring, int64_t prompt_ring,
                     int64_t row, int64_t batch, int64_t first_sample, int64_t global_batch, int64_t pool, int64_t null_index,
                     int64_t null_threshold, bool with_replacement, int dtype, Address x_t, Address timestep,
                     const Addresses& prompt, Address target, Address latent_index, Address prompt_index, Address choice,
                     int threads) {
  fd::NoiseGather a =
      draw_of(latents, latent_prompts, prompts, prompt_bytes, coefficients, replace, counter, latent_count, prompt_count, steps,
              latent_ring, prompt_ring, row, batch, first_sample, global_batch, pool, null_index, null_threshold,
              with_replacement, dtype, x_t, timestep, prompt, target, latent_index, prompt_index, choice);
  a.threads = threads;
  return kernels->noise_gather(a);
}

int64_t output_match(const Matrix& student, const Matrix& teacher, const Matrix& unconditional, const Matrix& x_t,
                     const Matrix& latents, Address timestep, Address table, Address guidance, Address weights,
                     Address latent_index, Address choice, Address coefficients, Address counter, int64_t batch, int64_t n,
                     int64_t steps, int64_t latent_count, int64_t first_sample, float output_weight, float task_weight,
                     Address grad_scale, bool huber, float delta, Address loss, Address parts, Address samples,
                     Address gradient, int threads) {
  fd::OutputMatch a = match_of(student, teacher, unconditional, x_t, latents, timestep, table, guidance, weights, latent_index,
                               choice, coefficients, counter, batch, n, steps, latent_count, first_sample, output_weight,
                               task_weight, grad_scale, huber, delta, loss, parts, samples, gradient);
  std::vector<double> partials(size_t(2 * batch * fd::FD_ISA::output_match_chunks(a)));
  a.partials = partials.data();
  a.threads = threads;
  return kernels->output_match(a);
}

void grad_square_sum(Address rows, int64_t count, int64_t chunk, int64_t chunks, Address total, int threads) {
  std::vector<double> partials(chunks);
  kernels->grad_square_sum(at<fd::GradientRow>(rows), count, chunk, partials.data(), at<double>(total), threads);
}

void adamw_ema(Address rows, int64_t count, int64_t chunk, Address square_sum, Address grad_scale, Address found_inf,
               Address ema_weight, Address skipped, double max_norm, bool ema_warmup, bool zero_grads, int threads) {
  const fd::AdamWInputs inputs = inputs_of(square_sum, grad_scale, found_inf, ema_weight, max_norm, ema_warmup, zero_grads);
  kernels->adamw_ema(at<fd::AdamWRow>(rows), count, chunk, inputs, at<int64_t>(skipped), threads);
}

void philox(Address counter, Address key, Address words, Address normals, int64_t n) {
  kernels->philox(at<uint32_t>(counter), at<uint32_t>(key), at<uint32_t>(words), at<float>(normals), n);
}

void convert(Address from, int from_dtype, Address to, int to_dtype, int64_t n) {
  kernels->convert(at<void>(from), fd::Dtype(from_dtype), at<void>(to), fd::Dtype(to_dtype), n);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "C++ kernels on raw addresses. Call fastdistill.ops instead: these functions check no arguments.";
  m.def("feature_match", &feature_match, release());
  m.def("scale_gradients", &scale_gradients, release());
  m.def("group_norm_silu", &group_norm_silu, release());
  m.def("group_norm_silu_backward", &group_norm_silu_backward, release());
  m.def("geglu", &geglu, release());
  m.def("layer_norm_modulate", &layer_norm_modulate, release());
  m.def("layer_norm_modulate_backward", &layer_norm_modulate_backward, release());
  m.def("noise_gather", &noise_gather, release());
  m.def("output_match", &output_match, release());
  m.def("grad_square_sum", &grad_square_sum, release());
  m.def("adamw_ema", &adamw_ema, release());
  m.def("philox4x32", &philox, release(), "words[n, 4] and normals[n, 4] of counter[n, 4] under key[2]");
  m.def("convert", &convert, release(), "n elements between fp32 (0), bf16 (1) and fp16 (2)");
  m.def("isa", [] { return kernels->isa; }, "the instruction set in use");
  m.def("isas", &isas, "the instruction sets that this machine can run, the best last");
  m.def("use_isa", &use_isa, "use a lower instruction set (at import: the environment variable FASTDISTILL_CPU_ISA)");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  const char* forced = std::getenv("FASTDISTILL_CPU_ISA");
  if (forced && *forced) {
    try {
      use_isa(forced);
    } catch (const std::invalid_argument& e) {
      throw py::import_error(std::string("FASTDISTILL_CPU_ISA, ") + e.what());
    }
  } else {
    kernels = &available().back();
  }
}
