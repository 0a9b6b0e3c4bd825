// SPDX-License-Identifier: Apache-2.0
// noise_gather on a GPU: the draws of a batch, its latents with noise, its prompts (rows of up to eight banks), in one launch.
//
// Grid      256 threads a block, persistent over pieces of samples; one thread draws the row (seven Philox blocks), all make
//           the noise of a part of its latent and copy the matching part of its prompt; the first piece writes the indices
// Traffic   latent row read, x_t written (and target where wanted), prompt rows read and written, 16 bytes at a time where
//           rows start at multiples of 16 bytes; the noise never in memory. Banks may lie in pinned host memory: each byte
//           then crosses the bus once
// Precision integers exact; noise, mixing and coefficients in fp32, rounded once to the dtype of the latents
// Limits    rows of any size; contiguous banks and outputs; fp32/bf16/fp16 latents; prompts are bytes, and a row outside of
//           the bank comes out with all bits set (NaN, -1)
#include "common.cuh"
#include "noise_gather/math.h"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int blocks_each = 8;
constexpr int64_t noise_piece = 8 * threads_per_block;  // elements of a latent in a piece
constexpr int64_t copy_piece = 32 << 10;                // bytes of a prompt in a piece at most

struct Pieces {
  int64_t count, elements, bytes[most_banks];  // pieces of a sample; of a latent and of each bank's row in each
};

template <typename T> __device__ void noise_part(const NoiseGather& a, const Draw& d, int64_t b, int64_t first, int64_t end) {
  const float* c = a.coefficients + 4 * d.timestep;
  const float signal = c[0], noise = c[1], target_signal = c[2], target_noise = c[3];
  const T* latent = static_cast<const T*>(a.latents) + place(a, d.latent, a.latent_ring, b) * a.row;
  T* x_t = static_cast<T*>(a.x_t) + b * a.row;
  T* target = a.target ? static_cast<T*>(a.target) + b * a.row : nullptr;
  for (int64_t i = first + 8 * threadIdx.x; i < end; i += 8 * threads_per_block) {
    float z[8];
    eight_normals(uint64_t(a.counter[0]), uint64_t(a.counter[1]), uint32_t(a.first_sample + b), i, z);
    Eight<T> x, mixed, wanted;
    const bool vector = i + 8 <= end && starts_vector(latent + i) && starts_vector(x_t + i) && starts_vector(target + i);
    const int64_t n = smaller(end - i, 8);
    if (vector) x = *reinterpret_cast<const Eight<T>*>(latent + i);
    else
      for (int k = 0; k < 8; ++k) x.x[k] = latent[i + (k < n ? k : 0)];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      mixed.x[k] = from_float<T>(mix(to_float(x.x[k]), z[k], signal, noise));
      wanted.x[k] = from_float<T>(mix(to_float(x.x[k]), z[k], target_signal, target_noise));
    }
    if (vector) {
      *reinterpret_cast<Eight<T>*>(x_t + i) = mixed;
      if (target) *reinterpret_cast<Eight<T>*>(target + i) = wanted;
    } else {
      for (int k = 0; k < n; ++k) x_t[i + k] = mixed.x[k];
      for (int k = 0; target && k < n; ++k) target[i + k] = wanted.x[k];
    }
  }
}

// Bytes [first, end) of a bank's row, or all bits set (NaN, -1) where the row is not in the bank.
__device__ void copy_part(const NoiseGather& a, const Bank& bank, const Draw& d, int64_t b, int64_t first, int64_t end) {
  const bool there = d.prompt >= 0 && d.prompt < a.prompt_count;
  const char* from = static_cast<const char*>(bank.rows) + (there ? place(a, d.prompt, a.prompt_ring, b) * bank.bytes : 0);
  char* to = static_cast<char*>(bank.out) + b * bank.bytes;
  int64_t done = first;
  if (starts_vector(from + first) && starts_vector(to + first)) {
    done = first + (end - first) / 16 * 16;
    const uint4 nan = {~0u, ~0u, ~0u, ~0u};
#pragma unroll 4
    for (int64_t i = first + 16 * threadIdx.x; i < done; i += 16 * threads_per_block)
      *reinterpret_cast<uint4*>(to + i) = there ? *reinterpret_cast<const uint4*>(from + i) : nan;
  }
  for (int64_t i = done + threadIdx.x; i < end; i += threads_per_block) to[i] = there ? from[i] : char(0xFF);
}

__global__ void __launch_bounds__(threads_per_block)
    gather(const __grid_constant__ NoiseGather a, const __grid_constant__ Pieces pieces) {
  __shared__ Draw drawn;
  for (int64_t at = blockIdx.x; at < a.batch * pieces.count; at += gridDim.x) {
    const int64_t b = at / pieces.count, piece = at % pieces.count;
    if (threadIdx.x == 0) {
      drawn = draw_row(a, b);
      if (piece == 0) {
        a.timestep[b] = drawn.timestep;
        a.latent_index[b] = drawn.latent;
        a.prompt_index[b] = drawn.prompt;
        a.choice[b] = drawn.choice;
      }
    }
    __syncthreads();
    const Draw d = drawn;
    const int64_t first = piece * pieces.elements, end = smaller(first + pieces.elements, a.row);
    switch (a.dtype) {
      case Dtype::f32: noise_part<float>(a, d, b, first, end); break;
      case Dtype::bf16: noise_part<bf16>(a, d, b, first, end); break;
      default: noise_part<f16>(a, d, b, first, end); break;
    }
    for (int i = 0; i < a.bank_count; ++i) {
      const int64_t bytes = a.banks[i].bytes, offset = smaller(piece * pieces.bytes[i], bytes);
      copy_part(a, a.banks[i], d, b, offset, smaller(offset + pieces.bytes[i], bytes));
    }
    __syncthreads();  // before the next row is drawn
  }
}

}  // namespace
}  // namespace fd

const char* noise_gather_cuda(const fd::NoiseGather& a, const fd::Queue& queue) {
  using namespace fd;
  if (a.batch == 0) return nullptr;
  Pieces p = {};
  p.count = larger(1, larger(ceil_div(a.row, noise_piece), ceil_div(a.banks[0].bytes, copy_piece)));
  p.elements = larger(1, ceil_div(ceil_div(a.row, p.count), 8)) * 8;
  for (int i = 0; i < a.bank_count; ++i) p.bytes[i] = ceil_div(ceil_div(a.banks[i].bytes, p.count), 16) * 16;
  FD_LAUNCH(gather, persistent_blocks(queue, a.batch * p.count, blocks_each), threads_per_block, 0, queue.stream, a, p);
  return fd_launch_error();
}
