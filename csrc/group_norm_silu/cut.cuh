// SPDX-License-Identifier: Apache-2.0
// How group_norm_silu is divided among clusters, blocks and threads, and the layout of a block's shared memory.
#pragma once
#include "cluster.cuh"
#include "group_norm_silu/math.h"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int threads = threads_per_block, warps = threads / 32, batches = 4;

// The numbers stored for each channel: the tensors of the call (scale as 1 + scale); in a backward also the mean and rstd of
// the channel's group.
enum Number { weight, bias, time_bias, scale, shift, given_count, mean = given_count, rstd, number_count };

// How a call is divided. The threads of a block form a grid of rows and columns; a column is 16 bytes wide.
struct Cut {
  GroupNormSilu a;
  Row given[given_count];
  int cluster;        // blocks
  int groups, width;  // groups and channels of a slice
  int columns, rows;  // of a block
  int64_t positions;  // of a block; the last blocks have fewer
  float* sums;        // [2, batch, channels]: the samples' contributions to the gradients of weight and bias
};

// The work of a block and of a thread.
struct Part {
  int64_t sample, channel, position, group;  // the first ones of the block
  int rank, count;                           // rank in the cluster; number of positions
  int row, column, steps;                    // of the thread; steps: how many vectors it reads
  int full, more;                            // each row has ``full`` steps, the first ``more`` rows one more
};

__device__ int64_t positions_of(const Cut& cut, int64_t rank) {
  return larger(smaller(cut.a.positions - rank * cut.positions, cut.positions), 0);
}

__device__ Part part_of(const Cut& cut) {
  Part p;
  const int64_t slices = cut.a.groups / cut.groups, slice = blockIdx.x / cut.cluster;
  p.rank = int(cluster_rank());
  p.sample = slice / slices;
  p.group = slice % slices * cut.groups, p.channel = slice % slices * cut.width;
  p.position = p.rank * cut.positions, p.count = int(positions_of(cut, p.rank));
  p.row = int(threadIdx.x) / cut.columns, p.column = int(threadIdx.x) % cut.columns;
  p.full = p.count / cut.rows, p.more = p.count % cut.rows;
  p.steps = p.row < cut.rows ? p.full + (p.row < p.more) : 0;
  return p;
}

// Elements from the start of x to the thread's first vector.
template <typename T> __device__ int64_t start_of(const Cut& cut, const Part& p) {
  return ((p.sample * cut.a.positions + p.position + p.row) * cut.a.channels + p.channel) + p.column * wide<T>;
}

// The thread's first step after a batch.
__device__ int end_of_batch(const Part& p, int batch) {
  const int each = (p.full + batches) / batches, end = each * (batch + 1);  // a thread has at most full + 1 steps
  return end < p.steps ? end : p.steps;
}

template <int batch, typename F> __device__ void walk_batches(const Part& p, const F& step) {
  wait_for_copies<batches - 1 - batch>();
  for (int i = batch ? end_of_batch(p, batch - 1) : 0; i < end_of_batch(p, batch); ++i) step(i);
  if constexpr (batch + 1 < batches) walk_batches<batch + 1>(p, step);
}

template <int count> __device__ void set_vector(float* to, const float* from) {
#pragma unroll
  for (int k = 0; k < count; k += 4)
    *reinterpret_cast<float4*>(to + k) = float4{from[k], from[k + 1], from[k + 2], from[k + 3]};
}

__device__ double warp_sum(double value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, bits);
  return value;
}

// The shared memory of a block: vectors of the slice, results of the threads, numbers per channel and per group.
template <int held, int left, int numbers, int sums> struct Memory {
  uint4* vectors;   // [held][positions][columns]
  float* leave;     // [left][rows][width]
  float* number;    // [Number][width]
  double* channel;  // [sums][width], read by the cluster
  double* group;    // [groups][2], read by the cluster
  float* final;     // [groups][2]
  int each;         // elements of leave[i]

  static FD_HD int64_t bytes(const Cut& c) {
    const int64_t width = c.width;
    return 16 * held * c.positions * c.columns + 4 * left * c.rows * width + (4 * numbers + 8 * sums) * width + 24 * c.groups;
  }
  __device__ Memory(const Cut& c, char* start) {
    vectors = reinterpret_cast<uint4*>(start);
    leave = reinterpret_cast<float*>(vectors + held * c.positions * c.columns);
    each = c.rows * c.width;
    number = leave + left * each;
    channel = reinterpret_cast<double*>(number + numbers * c.width);
    group = channel + sums * c.width;
    final = reinterpret_cast<float*>(group + 2 * c.groups);
  }
};

using Forward = Memory<1, 2, given_count, 0>;
using Backward = Memory<2, 3, number_count, 3>;

// Loads the numbers of the slice's channels, split over all threads, so that each waits for memory only once or twice.
template <int count> __device__ void get_numbers(const Cut& cut, const Part& p, float* to) {
  for (int i = int(threadIdx.x); i < count * cut.width; i += threads) {
    const int which = i / cut.width, c = i % cut.width;
    if (which < given_count) {
      const float value = number(cut.given[which], p.sample, p.channel + c, which == weight ? 1.0f : 0.0f);
      to[i] = which == scale ? 1.0f + value : value;
    } else {
      const int64_t at = p.sample * cut.a.groups + p.group + c / (cut.width / cut.groups);
      to[i] = which == mean ? cut.a.mean[at] : cut.a.rstd[at];
    }
  }
}

// weight (1 + scale) and bias (1 + scale) + shift of the channels of a column.
template <int n> __device__ void affine_of(const float* numbers, int width, int first, float* factor, float* offset) {
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const float* of = numbers + first + k;
    factor[k] = of[weight * width] * of[scale * width];
    offset[k] = muladd(of[bias * width], of[scale * width], of[shift * width]);
  }
}

}  // namespace
}  // namespace fd
