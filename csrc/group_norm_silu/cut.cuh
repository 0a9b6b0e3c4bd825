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
  Row given[number_count];
  int cluster, clusters;        // blocks of a cluster; clusters, which take one slice after the other
  int groups, width, channels;  // groups and channels of a slice, channels of a group
  int columns, rows;            // of a block
  int slices, of_sample;        // of the call and of a sample
  int parts;                    // lanes that add up the sums of a column (backward)
  int64_t positions;            // of a block; the last blocks have fewer
  float* sums;                  // [2, batch, channels]: the samples' contributions to the gradients of weight and bias
};

// The work of a block and of a thread, the same in every slice.
struct Part {
  int64_t position;        // the first one
  int rank, count;         // rank in the cluster; number of positions
  int row, column, steps;  // of the thread; steps: how many vectors it reads
  int full, more;          // each row has ``full`` steps, the first ``more`` rows one more
  int group, left;         // of the first channel of the column, in the slice; channels from there to the group's end
};

// A slice: whole groups of a sample.
struct Slice {
  int number;
  int64_t sample, channel, group;  // the first ones
};

// a / b, where both are positive: faster without a sign.
__device__ int over(int a, int b) { return int(unsigned(a) / unsigned(b)); }

__device__ int64_t positions_of(const Cut& cut, int64_t rank) {
  return larger(smaller(cut.a.positions - rank * cut.positions, cut.positions), 0);
}

__device__ Part part_of(const Cut& cut) {
  Part p;
  p.rank = int(cluster_rank());
  p.position = p.rank * cut.positions, p.count = int(positions_of(cut, p.rank));
  p.row = over(int(threadIdx.x), cut.columns), p.column = int(threadIdx.x) - p.row * cut.columns;
  p.full = over(p.count, cut.rows), p.more = p.count - p.full * cut.rows;
  p.steps = p.row < cut.rows ? p.full + (p.row < p.more) : 0;
  const int first = p.column * over(cut.width, cut.columns);
  p.group = over(first, cut.channels), p.left = (p.group + 1) * cut.channels - first;
  return p;
}

// The slices of a cluster: the first one, and those that follow it in steps of the number of clusters.
__device__ Slice slice_of(const Cut& cut, int number) {
  const int sample = over(number, cut.of_sample), slice = number - sample * cut.of_sample;
  return {number, sample, int64_t(slice) * cut.width, int64_t(slice) * cut.groups};
}
__device__ Slice first_slice(const Cut& cut) { return slice_of(cut, over(int(blockIdx.x), cut.cluster)); }
__device__ Slice next_slice(const Cut& cut, const Slice& s) { return slice_of(cut, s.number + cut.clusters); }

// Calls use(k, group) for the channels of a column.
template <int n, typename F> __device__ void walk_channels(const Cut& cut, const Part& p, const F& use) {
  int group = p.group, left = p.left;
#pragma unroll
  for (int k = 0; k < n; ++k) {
    use(k, group);
    if (--left == 0) left = cut.channels, ++group;
  }
}

// Elements from the start of x to the thread's first vector.
template <typename T> __device__ int64_t start_of(const Cut& cut, const Part& p, const Slice& s) {
  return ((s.sample * cut.a.positions + p.position + p.row) * cut.a.channels + s.channel) + p.column * wide<T>;
}

// The thread's first step after a batch; all batches but the last have an even number of steps.
__device__ int end_of_batch(const Part& p, int batch) {
  const int each = ((p.full + batches) / batches + 1) / 2 * 2, end = each * (batch + 1);  // a thread has at most full + 1 steps
  return end < p.steps ? end : p.steps;
}

__device__ void wait_for_batch(int batch) {
  static_assert(batches == 4);
  switch (batch) {
    case 0: return wait_for_copies<3>();
    case 1: return wait_for_copies<2>();
    case 2: return wait_for_copies<1>();
    default: return wait_for_copies<0>();
  }
}

// Calls step(i) for all vectors of a thread, as their copies arrive.
template <typename F> __device__ void walk_batches(const Part& p, const F& step) {
#pragma unroll 1
  for (int batch = 0, i = 0; batch < batches; ++batch) {
    wait_for_batch(batch);
    const int end = end_of_batch(p, batch);
#pragma unroll 2
    for (; i < end; ++i) step(i);
  }
}

template <int number> struct Steps {
  static constexpr int count = number;
};

template <int count, typename T> __device__ void copy_steps(Steps<count>, const T* x, int64_t down, uint4* to, int around) {
#pragma unroll
  for (int j = 0; j < count; ++j) copy_later(to + j * around, x + j * down);
}

// Calls step(i, how many) for all vectors of a thread, two at a time, and ends the batches of copies that it starts.
template <typename F> __device__ void walk_pairs(const Part& p, const F& step) {
#pragma unroll 1
  for (int batch = 0, i = 0; batch < batches; ++batch) {
    const int end = end_of_batch(p, batch);
#pragma unroll 1
    for (; i + 1 < end; i += 2) step(i, Steps<2>());
    if (i < end) step(i++, Steps<1>());
    end_batch();
  }
}

template <int count> __device__ void set_vector(float* to, const float* from) {
#pragma unroll
  for (int k = 0; k < count; k += 4)
    *reinterpret_cast<float4*>(to + k) = float4{from[k], from[k + 1], from[k + 2], from[k + 3]};
}

// The sum over each ``lanes`` neighbors (a power of two) of a warp.
__device__ double warp_sum(double value, int lanes = 32) {
  for (int bits = lanes / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, bits);
  return value;
}

// The shared memory of a block: vectors of the slice, results of the threads, numbers per channel and per group. There are two
// copies of what the work on the next slice must not overwrite; ``turn`` (0 or 1) selects one.
template <int held, int left, int numbers, int sums> struct Memory {
  uint4* vectors;  // [held][positions][columns]
  float* leave;    // [left][rows][width]
  float* given;    // [2][Number][width]
  double* shared;  // [2]: [sums][width] and [groups][2], read by the cluster
  float* final;    // [groups][2]
  int each;        // elements of leave[i]
  int width, groups;

  static FD_HD int64_t bytes(const Cut& c) {
    const int64_t width = c.width;
    return 16 * held * c.positions * c.columns + 4 * left * c.rows * width + 2 * (4 * numbers + 8 * sums) * width +
           40 * c.groups;
  }
  __device__ Memory(const Cut& c, char* start) : width(c.width), groups(c.groups) {
    vectors = reinterpret_cast<uint4*>(start);
    leave = reinterpret_cast<float*>(vectors + held * c.positions * c.columns);
    each = c.rows * width;
    given = leave + left * each;
    shared = reinterpret_cast<double*>(given + 2 * numbers * width);
    final = reinterpret_cast<float*>(shared + 2 * (sums * width + 2 * groups));
  }
  __device__ float* number(int turn) const { return given + turn * numbers * width; }
  __device__ double* channel(int turn) const { return shared + turn * (sums * width + 2 * groups); }
  __device__ double* group(int turn) const { return channel(turn) + sums * width; }
};

using Forward = Memory<1, 2, given_count, 0>;
using Backward = Memory<2, 3, number_count, 3>;

// Loads the numbers of the slice's channels, split over all threads. A thread loads four before it stores the first, so that it
// seldom waits for memory.
template <int count> __device__ void get_numbers(const Cut& cut, const Slice& s, float* to) {
  constexpr int together = 4;
  const int all = count * cut.width;
#pragma unroll 1
  for (int first = int(threadIdx.x); first < all; first += together * threads) {
    uint32_t bits[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int i = first + j * threads;
      if (i >= all) break;
      const int which = over(i, cut.width), c = i - which * cut.width;
      const Row& row = cut.given[which];
      const bool by_group = which >= given_count;
      const int64_t at = s.sample * row.stride + (by_group ? s.group + over(c, cut.channels) : s.channel + c);
      bits[j] = 0;
      if (!row.address) continue;
      if (row.dtype == Dtype::f32) bits[j] = static_cast<const uint32_t*>(row.address)[at];
      else bits[j] = static_cast<const uint16_t*>(row.address)[at];
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int i = first + j * threads;
      if (i >= all) break;
      const int which = over(i, cut.width);
      const Row& row = cut.given[which];
      float value = as_float(bits[j]);
      if (row.dtype == Dtype::bf16) value = as_float(bits[j] << 16);
      if (row.dtype == Dtype::f16) value = to_float(f16{uint16_t(bits[j])});
      if (!row.address) value = which == weight ? 1.0f : 0.0f;
      to[i] = which == scale ? 1.0f + value : value;
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
