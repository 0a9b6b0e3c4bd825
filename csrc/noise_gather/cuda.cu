// SPDX-License-Identifier: Apache-2.0
// noise_gather on a GPU: the draws of a batch, its latents with noise, its prompts (rows of up to eight banks), in one launch.
//
// Grid      256 threads per block, one block per piece of a sample: at most 2048 elements of its latent and the matching part
//           of its prompt. Half of the warps copy; one of these draws the row (seven or more Philox blocks in sequence).
//           The others generate noise: half of it before the row is known (noise does not depend on it), half while the
//           latent is loaded. The first piece writes the indices
// Traffic   latent row read, x_t written (and target if requested), prompt rows read and written, 16 bytes at a time if
//           rows and their parts are multiples of 16 bytes (else 4 or 1), with eight loads per thread in flight. Data that
//           was read is evicted first; the noise is never in memory. Banks may be in pinned host memory: each byte then
//           crosses the bus once
// Precision integers exact; noise, mixing and coefficients in fp32, rounded once to the dtype of the latents
// Limits    rows of any size; contiguous banks and outputs; fp32/bf16/fp16 latents; prompts are bytes, and
//           a prompt row out of range gives a row with all bits set (NaN, -1)
#include "common.cuh"
#include "noise_gather/math.h"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int copying_threads = threads_per_block / 2, noise_threads = threads_per_block - copying_threads;
constexpr int loads = 8;                                       // loads in flight per thread
constexpr int64_t noise_piece = 16 * noise_threads;            // at most so many elements of a latent per piece
constexpr int64_t most_copied = loads * 16 * copying_threads;  // at most so many bytes of the largest row per piece
constexpr int64_t least_copied = 16 * copying_threads;         // at least so many bytes of a row per piece, except the last

struct Pieces {
  int64_t count, elements, bytes[most_banks];  // pieces per sample; latent elements and bytes of each bank's row per piece
};

// What the drawing warp passes to the others: the rows to read (prompt is -1 if out of range) and the coefficients.
struct Drawn {
  int64_t latent, prompt;
  float coefficients[4];
};

__device__ void draw_piece(const NoiseGather& a, int64_t b, bool first, Drawn& drawn) {
  const int lane = threadIdx.x % 32;  // all lanes draw the same
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

// Two numbers, rounded like from_float, with one instruction if the GPU has one.
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

// Elements [i, i + 8) of a row; zeros from element n on.
template <typename T> __device__ Eight<T> read(const T* row, int i, int n, bool vector) {
  constexpr int words = sizeof(Eight<T>) / sizeof(uint4);
  Eight<T> x = {};
  if (vector && i + 8 <= n) {
    uint4 word[words];
    FD_UNROLL
    for (int k = 0; k < words; ++k) word[k] = __ldcs(reinterpret_cast<const uint4*>(row + i) + k);
    memcpy(&x, word, sizeof x);
  } else {
    FD_UNROLL
    for (int k = 0; k < 8; ++k)
      if (i + k < n) x.x[k] = row[i + k];
  }
  return x;
}

template <typename T> __device__ void write_mixed(T* row, int i, int n, bool vector, const Eight<T>& x, const float (&z)[8],
                                                  float signal, float noise) {
  constexpr int words = sizeof(Eight<T>) / sizeof(uint4);
  Eight<T> mixed;
  FD_UNROLL
  for (int k = 0; k < 8; k += 2)
    two_from_floats(mixed.x + k, mix(to_float(x.x[k]), z[k], signal, noise),
                    mix(to_float(x.x[k + 1]), z[k + 1], signal, noise));
  if (vector && i + 8 <= n) {
    uint4 word[words];
    memcpy(word, &mixed, sizeof mixed);
    FD_UNROLL
    for (int k = 0; k < words; ++k) __stwb(reinterpret_cast<uint4*>(row + i) + k, word[k]);  // nvcc would split a plain store
  } else {
    FD_UNROLL
    for (int k = 0; k < 8; ++k)
      if (i + k < n) row[i + k] = mixed.x[k];
  }
}

// Copies n bytes. n and both addresses are multiples of the size of Word.
template <typename Word> __device__ void copy_words(const char* from, char* to, int n) {
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* target = reinterpret_cast<Word*>(to);
  const int words = n / int(sizeof(Word));
  for (int i = threadIdx.x; i < words; i += loads * copying_threads) {
    Word word[loads] = {};  // without the zeros, nvcc keeps them in registers all the time
    FD_UNROLL
    for (int k = 0; k < loads; ++k)
      if (i + k * copying_threads < words) word[k] = __ldcs(source + i + k * copying_threads);
    FD_UNROLL
    for (int k = 0; k < loads; ++k)
      if (i + k * copying_threads < words) target[i + k * copying_threads] = word[k];
  }
}

// Copies piece ``piece`` of a bank's row; all bits set (NaN, -1) if the row is out of range.
__device__ void copy_part(const Bank& bank, int64_t bytes, int64_t prompt, int64_t b, int64_t piece) {
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
  const int64_t b = int64_t(blockIdx.z) * gridDim.y + blockIdx.y, piece = blockIdx.x;
  if (b >= a.batch) return;
  const bool copies = threadIdx.x < copying_threads;
  const int64_t first = piece * pieces.elements;
  const int n = int(smaller(pieces.elements, a.row - first));  // 0 or less in the last pieces of a small latent
  const int i = 8 * (int(threadIdx.x) - copying_threads), j = i + 8 * noise_threads;
  const uint64_t seed = uint64_t(a.counter[0]), step = uint64_t(a.counter[1]);
  const uint32_t sample = uint32_t(a.first_sample + b);
  float z[8], w[8] = {};
  if (threadIdx.x < 32) draw_piece(a, b, piece == 0, drawn);
  if (!copies && i < n) eight_normals(seed, step, sample, first + i, z);
  __syncthreads();
  if (copies) {
    for (int k = 0; k < a.bank_count; ++k) copy_part(a.banks[k], pieces.bytes[k], drawn.prompt, b, piece);
    return;
  }
  if (i >= n) return;
  const T* latent = static_cast<const T*>(a.latents) + drawn.latent * a.row + first;
  T* x_t = static_cast<T*>(a.x_t) + b * a.row + first;
  T* target = a.target ? static_cast<T*>(a.target) + b * a.row + first : nullptr;
  const bool vector = starts_vector(latent) && starts_vector(x_t) && starts_vector(target);
  const Eight<T> x = read(latent, i, n, vector), y = read(latent, j, n, vector);
  if (j < n) eight_normals(seed, step, sample, first + j, w);
  for (int k = 0; k < (target ? 2 : 1); ++k) {
    T* out = k == 0 ? x_t : target;
    const float signal = drawn.coefficients[2 * k], noise = drawn.coefficients[2 * k + 1];
    write_mixed(out, i, n, vector, x, z, signal, noise);
    write_mixed(out, j, n, vector, y, w, signal, noise);
  }
}

}  // namespace
}  // namespace fd

const char* noise_gather_cuda(const fd::NoiseGather& a, const fd::Queue& queue) {
  using namespace fd;
  if (a.batch == 0) return nullptr;
  Pieces p = {};
  p.count = larger(1, larger(ceil_div(a.row, noise_piece), ceil_div(a.banks[0].bytes, most_copied)));
  p.elements = larger(1, ceil_div(ceil_div(a.row, p.count), 8)) * 8;
  for (int i = 0; i < a.bank_count; ++i)
    p.bytes[i] = larger(least_copied, ceil_div(ceil_div(a.banks[i].bytes, p.count), 16) * 16);
  const int64_t samples = smaller(a.batch, 1 << 15);
  const dim3 grid{unsigned(p.count), unsigned(samples), unsigned(ceil_div(a.batch, samples))};
  switch (a.dtype) {
    case Dtype::f32: FD_LAUNCH(gather<float>, grid, threads_per_block, 0, queue.stream, a, p); break;
    case Dtype::bf16: FD_LAUNCH(gather<bf16>, grid, threads_per_block, 0, queue.stream, a, p); break;
    default: FD_LAUNCH(gather<f16>, grid, threads_per_block, 0, queue.stream, a, p);
  }
  return fd_launch_error();
}
