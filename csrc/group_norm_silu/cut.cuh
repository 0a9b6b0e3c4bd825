// SPDX-License-Identifier: Apache-2.0
// How group_norm_silu is cut for clusters of blocks: what a block and a thread are to do, and what a block keeps.
#pragma once
#include "cluster.cuh"
#include "group_norm_silu/math.h"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int threads = threads_per_block, warps = threads / 32, batches = 4;

// Numbers by channel: what the call gives, 1 + scale, and of a backward the statistics of the channel's group.
enum Number { weight, bias, time_bias, scale, shift, given_count, mean = given_count, rstd, number_count };

// How a call is cut. The threads of a block are rows by columns, of 16 bytes each.
struct Cut {
  GroupNormSilu a;
  Row given[given_count];
  int cluster;        // blocks
  int groups, width;  // of a slice; width in channels
  int columns, rows;  // of a block
  int64_t positions;  // of a block, of the last ones fewer
  float* sums;        // [2, batch, channels]: what samples give to weight and bias
};

// What a block is to do.
struct Part {
  int64_t sample, channel, position, group;  // the first ones
  int rank, count;                           // in the cluster; positions
  int row, column, steps;                    // of the thread; vectors that it walks
  int full, more;                            // steps of every row, and rows that have one more
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

// From the start of x to the thread's first vector.
template <typename T> __device__ int64_t start_of(const Cut& cut, const Part& p) {
  return ((p.sample * cut.a.positions + p.position + p.row) * cut.a.channels + p.channel) + p.column * wide<T>;
}

// The steps [first, end) of a batch of the thread.
__device__ int end_of_batch(const Part& p, int batch) {
  const int each = (p.full + batches) / batches, end = each * (batch + 1);  // of at most full + 1 steps
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

// The shared memory of a block: vectors of the slice, what threads leave, numbers by channel, and by group.
template <int held, int left, int numbers, int sums> struct Memory {
  uint4* vectors;   // [held][positions][columns]
  float* leave;     // [left][rows][width]
  float* number;    // [Number][width]
  double* channel;  // [sums][width], for the cluster
  double* group;    // [groups][2], for the cluster
  float* final;     // [groups][2]
  int each;         // numbers of one of leave

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

// The numbers of the slice's channels: each thread some, so that it waits for memory once or twice.
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
