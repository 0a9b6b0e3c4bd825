// SPDX-License-Identifier: Apache-2.0
// noise_gather on a GPU: the draws of a batch, its latents with noise, its prompts (rows of up to eight banks), in one launch.
//
// Grid      256 threads a block, a block for a piece of a sample: at most 2048 elements of its latent and the matching part of
//           its prompt. Half of the warps copy: one of them draws the row (seven Philox blocks and more, one after the other).
//           The others make noise: half before the row is known, which needs no draw, half while the latent is on its way.
//           The first piece writes the indices
// Traffic   latent row read, x_t written (and target where wanted), prompt rows read and written, 16 bytes at a time where
//           rows and their parts are multiples of 16 bytes (else 4 or 1), eight loads of a thread under way at once. What is
//           read leaves the cache first; the noise is never in memory. Banks may lie in pinned host memory: each byte then
//           crosses the bus once
// Precision integers exact; noise, mixing and coefficients in fp32, rounded once to the dtype of the latents
// Limits    rows of any size; below 2^31 pieces; contiguous banks and outputs; fp32/bf16/fp16 latents; prompts are bytes, and
//           a row outside of the bank comes out with all bits set (NaN, -1)
#include "common.cuh"
#include "noise_gather/math.h"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int copying_threads = threads_per_block / 2, noise_threads = threads_per_block - copying_threads;
constexpr int64_t noise_piece = 16 * noise_threads;     // elements of a latent in a piece at most
constexpr int64_t most_copied = 32 << 10;               // bytes of the largest bank's row in a piece at most
constexpr int64_t least_copied = 16 * copying_threads;  // of any bank's, but for the last piece that has some of it
constexpr int loads = 8;                                // of a thread under way at once

struct Pieces {
  uint32_t count;                       // of a sample
  int64_t elements, bytes[most_banks];  // of a latent and of each bank's row in a piece
};

// What the drawing warp tells the others: rows to read, the prompt's -1 if the bank has no such row.
struct Drawn {
  int64_t latent, prompt;
  float coefficients[4];
};

__device__ void draw_piece(const NoiseGather& a, int64_t b, bool first, Drawn& drawn) {
  const int lane = threadIdx.x % 32;  // all do the same
  const Words w = choice_words(a, b);
  const float coefficient = lane < 4 ? a.coefficients[4 * below(w.x, a.steps) + lane] : 0.0f;
  const Draw d = draw_row(a, b, w);
  if (lane < 4) drawn.coefficients[lane] = coefficient;
  if (lane != 0) return;
  drawn.latent = place(a, d.latent, a.latent_ring, b);
  drawn.prompt = d.prompt >= 0 && d.prompt < a.prompt_count ? place(a, d.prompt, a.prompt_ring, b) : -1;
  if (!first) return;
  a.timestep[b] = d.timestep;
  a.latent_index[b] = d.latent;
  a.prompt_index[b] = d.prompt;
  a.choice[b] = d.choice;
}

// Two numbers, rounded as from_float does, by one instruction where there is one.
template <typename T> __device__ void two_from_floats(T* to, float first, float second) {
  to[0] = from_float<T>(first), to[1] = from_float<T>(second);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <> __device__ void two_from_floats<bf16>(bf16* to, float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  memcpy(to, &both, sizeof both);
}
template <> __device__ void two_from_floats<f16>(f16* to, float first, float second) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  memcpy(to, &both, sizeof both);
}
#endif

// Elements [i, i + 8) of a row, those before ``end``.
template <typename T> __device__ Eight<T> read(const T* row, int64_t i, int64_t end, bool vector) {
  constexpr int words = sizeof(Eight<T>) / sizeof(uint4);
  Eight<T> x = {};
  if (vector && i + 8 <= end) {
    uint4 word[words];
    FD_UNROLL
    for (int k = 0; k < words; ++k) word[k] = __ldcs(reinterpret_cast<const uint4*>(row + i) + k);
    memcpy(&x, word, sizeof x);
  } else {
    FD_UNROLL
    for (int k = 0; k < 8; ++k)
      if (i + k < end) x.x[k] = row[i + k];
  }
  return x;
}

template <typename T> __device__ void write_mixed(T* row, int64_t i, int64_t end, bool vector, const Eight<T>& x,
                                                  const float (&z)[8], float signal, float noise) {
  constexpr int words = sizeof(Eight<T>) / sizeof(uint4);
  Eight<T> mixed;
  FD_UNROLL
  for (int k = 0; k < 8; k += 2)
    two_from_floats(mixed.x + k, mix(to_float(x.x[k]), z[k], signal, noise),
                    mix(to_float(x.x[k + 1]), z[k + 1], signal, noise));
  if (vector && i + 8 <= end) {
    uint4 word[words];
    memcpy(word, &mixed, sizeof mixed);
    FD_UNROLL
    for (int k = 0; k < words; ++k) __stwb(reinterpret_cast<uint4*>(row + i) + k, word[k]);  // a plain store is taken apart
  } else {
    FD_UNROLL
    for (int k = 0; k < 8; ++k)
      if (i + k < end) row[i + k] = mixed.x[k];
  }
}

// Copies n bytes, a multiple of Word's, between multiples of it.
template <typename Word> __device__ void copy_words(const char* from, char* to, int n) {
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* target = reinterpret_cast<Word*>(to);
  const int words = n / int(sizeof(Word));
  for (int i = threadIdx.x; i < words; i += loads * copying_threads) {
    Word word[loads] = {};  // else each stays in a register all along
    FD_UNROLL
    for (int k = 0; k < loads; ++k)
      if (i + k * copying_threads < words) word[k] = __ldcs(source + i + k * copying_threads);
    FD_UNROLL
    for (int k = 0; k < loads; ++k)
      if (i + k * copying_threads < words) target[i + k * copying_threads] = word[k];
  }
}

// Piece ``piece`` of a bank's row; all bits set (NaN, -1) where there is none.
__device__ void copy_part(const Bank& bank, int64_t bytes, int64_t prompt, int64_t b, uint32_t piece) {
  const int64_t first = piece * bytes, rest = smaller(bank.bytes - first, bytes);
  if (rest <= 0) return;
  const int n = int(rest);
  char* to = static_cast<char*>(bank.out) + b * bank.bytes + first;
  if (prompt < 0) {
    for (int i = threadIdx.x; i < n; i += copying_threads) to[i] = char(0xFF);
    return;
  }
  const char* from = static_cast<const char*>(bank.rows) + prompt * bank.bytes + first;
  const uintptr_t multiple = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | uintptr_t(n);
  if (multiple % sizeof(uint4) == 0) copy_words<uint4>(from, to, n);
  else if (multiple % sizeof(unsigned) == 0) copy_words<unsigned>(from, to, n);
  else copy_words<unsigned char>(from, to, n);
}

template <typename T> __global__ void __launch_bounds__(threads_per_block, 4)
    gather(const __grid_constant__ NoiseGather a, const __grid_constant__ Pieces pieces) {
  __shared__ Drawn drawn;
  const uint32_t b = blockIdx.x / pieces.count, piece = blockIdx.x - b * pieces.count;
  const bool copies = threadIdx.x < copying_threads;
  const int64_t first = piece * pieces.elements, end = smaller(first + pieces.elements, a.row);
  const int64_t i = first + 8 * (int64_t(threadIdx.x) - copying_threads), j = i + 8 * noise_threads;
  float z[8];
  if (!copies) {
    if (i < end) eight_normals(uint64_t(a.counter[0]), uint64_t(a.counter[1]), uint32_t(a.first_sample + b), i, z);
  } else if (threadIdx.x < 32) {
    draw_piece(a, b, piece == 0, drawn);
  }
  __syncthreads();
  if (copies) {
    for (int k = 0; k < a.bank_count; ++k) copy_part(a.banks[k], pieces.bytes[k], drawn.prompt, b, piece);
    return;
  }
  if (i >= end) return;
  const T* latent = static_cast<const T*>(a.latents) + drawn.latent * a.row;
  T* x_t = static_cast<T*>(a.x_t) + b * a.row;
  T* target = a.target ? static_cast<T*>(a.target) + b * a.row : nullptr;
  const float signal = drawn.coefficients[0], noise = drawn.coefficients[1];
  const float target_signal = drawn.coefficients[2], target_noise = drawn.coefficients[3];
  const bool vector = starts_vector(latent) && starts_vector(x_t) && starts_vector(target);
  const Eight<T> x = read(latent, i, end, vector), y = read(latent, j, end, vector);
  write_mixed(x_t, i, end, vector, x, z, signal, noise);
  if (target) write_mixed(target, i, end, vector, x, z, target_signal, target_noise);
  if (j >= end) return;
  eight_normals(uint64_t(a.counter[0]), uint64_t(a.counter[1]), uint32_t(a.first_sample + b), j, z);
  write_mixed(x_t, j, end, vector, y, z, signal, noise);
  if (target) write_mixed(target, j, end, vector, y, z, target_signal, target_noise);
}

}  // namespace
}  // namespace fd

const char* noise_gather_cuda(const fd::NoiseGather& a, const fd::Queue& queue) {
  using namespace fd;
  if (a.batch == 0) return nullptr;
  Pieces p = {};
  const int64_t count = larger(1, larger(ceil_div(a.row, noise_piece), ceil_div(a.banks[0].bytes, most_copied)));
  if (a.batch > 0x7FFFFFFF / count) return "the batch has more than 2^31 - 1 pieces";
  p.count = uint32_t(count);
  p.elements = larger(1, ceil_div(ceil_div(a.row, count), 8)) * 8;
  for (int i = 0; i < a.bank_count; ++i)
    p.bytes[i] = larger(least_copied, ceil_div(ceil_div(a.banks[i].bytes, count), 16) * 16);
  const unsigned grid = unsigned(a.batch * count);
  switch (a.dtype) {
    case Dtype::f32: FD_LAUNCH(gather<float>, grid, threads_per_block, 0, queue.stream, a, p); break;
    case Dtype::bf16: FD_LAUNCH(gather<bf16>, grid, threads_per_block, 0, queue.stream, a, p); break;
    default: FD_LAUNCH(gather<f16>, grid, threads_per_block, 0, queue.stream, a, p);
  }
  return fd_launch_error();
}
