// SPDX-License-Identifier: Apache-2.0
// noise_gather: the draws of a batch, its latents with noise, its prompts (rows of up to eight banks), in one
// parallel loop over pieces of rows.
//
// Threads   rows are drawn first (a few hundred integer operations each); then pieces of a sample, each a part of its
//           latent and the matching part of its prompt, are split statically. Every output depends only on its
//           position: same bits at any thread count
// Traffic   latent row read, x_t written (and target if requested), prompt row read and written; the noise never in memory.
//           The noise is limited by arithmetic, the prompt by memory. So while noise is computed, the row of the largest
//           bank is fetched and copied a few lines at a time; the other banks follow. Outputs stay in the caches, because
//           the models read them next
// Precision integers exact; noise, mixing and coefficients in fp32, rounded once to the dtype of the latents
// Limits    rows of any size; contiguous banks and outputs; fp32/bf16/fp16 latents; prompts are bytes
#include "noise_gather/math.h"
#include "simd.h"

namespace fd::FD_ISA {
namespace {

constexpr int64_t noise_piece = 8192;        // at most so many elements of a latent per piece
constexpr int64_t copy_piece = 128 << 10;    // at most so many bytes of a prompt per piece
constexpr int64_t fetch_distance = 1 << 10;  // bytes that are prefetched ahead
constexpr int64_t copy_streams = 8;

// A copy that proceeds a few cache lines at a time, in several streams: a core reads faster from many pages at once.
struct Copy {
  char* to;
  const char* from;
  const char* next;            // source of the next copy
  int64_t size, stream, done;  // bytes of all, of a stream, of a stream copied so far
};

FD_HD void fetch_start(const Copy& copy) {
  for (int64_t at = 0; at < smaller(fetch_distance, copy.stream); at += 64)
    for (int64_t i = 0; i < copy_streams; ++i) __builtin_prefetch(copy.from + i * copy.stream + at, 0, 3);
}

FD_HD void advance(Copy& copy, int64_t until) {
  for (; copy.done < until; copy.done += 64) {
    const int64_t ahead = copy.done + fetch_distance;
    const char* fetched = ahead < copy.stream ? copy.from + ahead : copy.next + (ahead - copy.stream);
    for (int64_t i = 0; i < copy_streams; ++i) {
      const int64_t at = i * copy.stream + copy.done;
      __builtin_prefetch(fetched + i * copy.stream, 0, 3);
      memcpy(copy.to + at, copy.from + at, 64);
    }
  }
}

void finish(Copy& copy) {
  advance(copy, copy.stream);
  const int64_t streamed = copy_streams * copy.stream;
  memcpy(copy.to + streamed, copy.from + streamed, copy.size - streamed);
}

template <bool with_target, typename T> void noise_rows(const T* x, T* x_t, T* target, const float* c, uint64_t seed,
                                                        uint64_t step, uint32_t sample, int64_t first, int64_t n, Copy& copy) {
  const Lanes signal = splat(c[0]), noise = splat(c[1]), target_signal = splat(c[2]), target_noise = splat(c[3]);
  float z[noise_group];
  const int64_t share = copy.stream / larger(1, n / noise_group);
  for (int64_t i = 0; i < n; i += noise_group) {
    advance(copy, smaller(copy.stream, (i / noise_group + 1) * share));
    group_normals(seed, step, sample, first + i, z);
    for (int64_t j = 0; j < noise_group && i + j < n; j += lanes) {
      const int64_t at = i + j, rest = n - at;
      const Lanes zs = load(z + j);
      if (rest >= lanes) {
        const Lanes xs = load(x + at);
        store<false>(x_t + at, mix(xs, zs, signal, noise));
        if (with_target) store<false>(target + at, mix(xs, zs, target_signal, target_noise));
      } else {
        const Lanes xs = load_first(x + at, rest);
        store_first(x_t + at, mix(xs, zs, signal, noise), rest);
        if (with_target) store_first(target + at, mix(xs, zs, target_signal, target_noise), rest);
      }
    }
  }
}

template <typename T> void noise_part(const NoiseGather& a, int64_t b, int64_t first, int64_t n, Copy& copy) {
  const int64_t out = b * a.row + first;
  const T* x = static_cast<const T*>(a.latents) + place(a, a.latent_index[b], a.latent_ring, b) * a.row + first;
  T* x_t = static_cast<T*>(a.x_t) + out;
  const float* c = a.coefficients + 4 * a.timestep[b];
  const uint64_t seed = uint64_t(a.counter[0]), step = uint64_t(a.counter[1]);
  const uint32_t sample = uint32_t(a.first_sample + b);
  if (a.target) noise_rows<true>(x, x_t, static_cast<T*>(a.target) + out, c, seed, step, sample, first, n, copy);
  else noise_rows<false>(x, x_t, static_cast<T*>(nullptr), c, seed, step, sample, first, n, copy);
}

const char* prompt_of(const NoiseGather& a, const Bank& bank, int64_t b) {
  return static_cast<const char*>(bank.rows) + place(a, a.prompt_index[b], a.prompt_ring, b) * bank.bytes;
}

// Copies one of ``pieces`` equal parts of a bank's row.
void copy_part(const NoiseGather& a, const Bank& bank, int64_t b, int64_t piece, int64_t pieces) {
  const int64_t part = ceil_div(bank.bytes, pieces), first = piece * part, n = smaller(bank.bytes - first, part);
  if (n > 0) memcpy(static_cast<char*>(bank.out) + b * bank.bytes + first, prompt_of(a, bank, b) + first, n);
}

}  // namespace

// Returns -1. If a prompt is not in the bank, it returns the first such batch row and has written nothing but the indices.
int64_t noise_gather(const NoiseGather& a) {
  int64_t outside = -1;
  for (int64_t b = 0; b < a.batch; ++b) {
    const Draw d = draw_row(a, b, choice_words(a, b));
    if (outside < 0 && (d.prompt < 0 || d.prompt >= a.prompt_count)) outside = b;
    a.timestep[b] = d.timestep;
    a.latent_index[b] = d.latent;
    a.prompt_index[b] = d.prompt;
    a.choice[b] = d.choice;
  }
  if (outside >= 0) return outside;
  const Bank& bank = a.banks[0];
  const int64_t pieces = larger(1, larger(ceil_div(a.row, noise_piece), ceil_div(bank.bytes, copy_piece)));
  const int64_t elements = larger(1, ceil_div(ceil_div(a.row, pieces), noise_group)) * noise_group,
                bytes = ceil_div(ceil_div(bank.bytes, pieces), 64) * 64;
  const int64_t total = a.batch * pieces;
  const int threads = int(smaller(a.threads, total));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    for (int64_t at = total * part / threads; at < total * (part + 1) / threads; ++at) {
      const int64_t b = at / pieces, piece = at % pieces, first = piece * elements, offset = piece * bytes;
      const int64_t n = smaller(a.row - first, elements), copied = larger(smaller(bank.bytes - offset, bytes), 0);
      const int64_t after = at + 1 < total ? at + 1 : at;
      const char* next = prompt_of(a, bank, after / pieces) + after % pieces * bytes;
      Copy copy = {static_cast<char*>(bank.out) + b * bank.bytes + offset,
                   prompt_of(a, bank, b) + offset,
                   next,
                   copied,
                   copied / copy_streams / 64 * 64,
                   0};
      if (at == total * part / threads) fetch_start(copy);
      switch (a.dtype) {
        case Dtype::f32: noise_part<float>(a, b, first, n, copy); break;
        case Dtype::bf16: noise_part<bf16>(a, b, first, n, copy); break;
        default: noise_part<f16>(a, b, first, n, copy); break;
      }
      finish(copy);
      for (int i = 1; i < a.bank_count; ++i) copy_part(a, a.banks[i], b, piece, pieces);
    }
  }
  return -1;
}

}  // namespace fd::FD_ISA
