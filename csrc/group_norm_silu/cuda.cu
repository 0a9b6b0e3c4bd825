// SPDX-License-Identifier: Apache-2.0
// group_norm_silu for channels last, on a GPU with clusters: a slice (whole groups of a sample) stays in the shared memory of
// a cluster's blocks between its only read and its only write.
//
// Grid      clusters of 1 to 8 blocks (`CLUSTERS` in Python), as many as run at once (`GroupNormCut`); each takes a slice
//           and then every so-many-th. Its blocks share the positions equally. 256 threads per block; each thread iterates
//           over one column of 16 bytes, and overwrites what it has finished with a copy from the next slice, so that memory
//           is read while the block writes. The gradients of weight and bias need one more launch
// Traffic   x and y, backward x, grad and dx, once each: in bf16 4 and 6 bytes per element
// Precision a thread's moments in fp32 around its first value (squares lose at most its count of roundings), merged in double
//           around one of the means (Chan et al. 1983); a thread's gradient sums in fp32, over threads in double; outputs
//           rounded once; the order of all sums is fixed
// Limits    slices start and end at 16 bytes; a slice fits into the cluster (`Cut`, chosen in Python); 256 columns
#include "group_norm_silu/cut.cuh"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int shared_samples = 8;  // add_channels keeps the sums of this many samples in shared memory at once

// Starts to copy the block's part of a slice, in batches.
template <typename T> __device__ void copy_slice(const Cut& cut, const Part& p, const T* x, uint4* to) {
  const int64_t down = int64_t(cut.rows) * cut.a.channels;
  const int around = cut.rows * cut.columns;
  walk_pairs(p, [&](int i, auto steps) { copy_steps(steps, x + i * down, down, to + i * around, around); });
}

// Mean and sum of squares around it of n numbers, from sums of (number - pivot) and of its square.
__device__ void moments_of(double n, double pivot, double sum, double squares, double* to) {
  const double mean = n > 0 ? sum / n : 0.0, about = squares - sum * mean;
  to[0] = pivot + mean, to[1] = about > 0 ? about : 0.0;
}

// Mean and sum of squares around it, per group over the positions of the block: the threads' moments merged, a warp per group.
template <typename T> __device__ void block_moments(const Cut& cut, const Part& p, const Forward& m, int turn) {
  const int lane = int(threadIdx.x) % 32, channels = cut.channels, used = p.full ? cut.rows : p.more;
  const int rows_on = over(32, channels), channels_on = 32 - rows_on * channels;  // from one entry of a lane to the next
  const T* first = reinterpret_cast<const T*>(m.vectors);                         // the first position: threads count from it
  const float* bias = m.number(turn) + time_bias * cut.width;
#pragma unroll 1
  for (int g = int(threadIdx.x) / 32; g < cut.groups; g += warps) {
    const auto mean_of = [&](int row, int c) {
      return double(to_float(first[c])) + double(bias[c]) + double(m.leave[row * cut.width + c]);
    };
    const double pivot = used ? mean_of(0, g * channels) : 0.0;  // the mean of some of the numbers
    double sum = 0, squares = 0;
    for (int row = over(lane, channels), c = lane - row * channels; row < used;) {
      const int at = g * channels + c;
      const double n = p.full + (row < p.more), from = mean_of(row, at) - pivot;
      sum += n * from, squares += double(m.leave[m.each + row * cut.width + at]) + n * from * from;
      row += rows_on, c += channels_on;
      if (c >= channels) c -= channels, ++row;
    }
    sum = warp_sum(sum), squares = warp_sum(squares);
    if (lane == 0) moments_of(double(p.count) * channels, pivot, sum, squares, m.group(turn) + 2 * g);
  }
}

// Mean and 1 / standard deviation of each group: the moments of the cluster's blocks merged.
__device__ void cluster_moments(const Cut& cut, const Part& p, const Slice& s, const Forward& m, int turn) {
  const int lane = int(threadIdx.x) % 32, from = lane & (cut.cluster - 1), channels = cut.channels;
  const double n = double(positions_of(cut, from)) * channels, all = double(cut.a.positions) * channels;
#pragma unroll 1
  for (int g = int(threadIdx.x) / 32; g < cut.groups; g += warps) {
    const double* there = of_block(m.group(turn), unsigned(from)) + 2 * g;
    const double mean = there[0], about = there[1], pivot = __shfl_sync(0xFFFFFFFFu, mean, 0), d = mean - pivot;
    const double sum = warp_sum(n * d, cut.cluster), squares = warp_sum(about + n * d * d, cut.cluster);
    if (lane != 0) continue;
    double both[2];
    moments_of(all, pivot, sum, squares, both);
    const float middle = float(both[0]), r = float(1.0 / square_root(both[1] / all + cut.a.eps));
    m.final[2 * g] = middle, m.final[2 * g + 1] = r;
    const int64_t at = s.sample * cut.a.groups + s.group + g;
    if (p.rank == 0) cut.a.mean[at] = middle, cut.a.rstd[at] = r;
  }
}

template <typename T, bool silu> __global__ void __launch_bounds__(threads, sizeof(T) == 2 ? 3 : 2)
    cluster_forward(const __grid_constant__ Cut cut) {
  constexpr int n = wide<T>;
  FD_DYNAMIC_SHARED(uint4, memory);
  const Forward m(cut, reinterpret_cast<char*>(memory));
  const Part p = part_of(cut);
  const GroupNormSilu& a = cut.a;
  const int64_t down = int64_t(cut.rows) * a.channels;
  const int around = cut.rows * cut.columns;
  uint4* const own = m.vectors + threadIdx.x;
  Slice s = first_slice(cut);
  copy_slice(cut, p, static_cast<const T*>(a.x) + start_of<T>(cut, p, s), own);
  get_numbers<given_count>(cut, s, m.number(0));
  for (int turn = 0; s.number < cut.slices; turn ^= 1) {
    float first[n] = {}, sum[n] = {}, squares[n] = {};
    wait_for_copies<batches - 1>();
    if (p.steps > 0) numbers_of(static_cast<const T*>(nullptr), own[0], first);
    walk_batches(p, [&](int i) {
      float v[n];
      numbers_of(static_cast<const T*>(nullptr), own[i * around], v);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const float d = v[k] - first[k];
        sum[k] += d, squares[k] = muladd(d, d, squares[k]);
      }
    });
    __syncthreads();
    if (p.steps > 0) {
      float v[n];
      numbers_of(static_cast<const T*>(nullptr), m.vectors[p.column], v);
      const float inverse = 1.0f / float(p.steps);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const float mean = sum[k] * inverse, about = muladd(-sum[k], mean, squares[k]);
        sum[k] = (first[k] - v[k]) + mean;
        squares[k] = about < 0.0f ? 0.0f : about;
      }
      float* left = m.leave + p.row * cut.width + p.column * n;
      set_vector<n>(left, sum);
      set_vector<n>(left + m.each, squares);
    }
    __syncthreads();
    block_moments<T>(cut, p, m, turn);
    cluster_arrive();
    const Slice next = next_slice(cut, s);
    const bool more = next.number < cut.slices;
    if (more) get_numbers<given_count>(cut, next, m.number(turn ^ 1));
    cluster_wait();
    cluster_moments(cut, p, s, m, turn);
    __syncthreads();
    float middle[n], factor[n], offset[n];
    if (p.steps > 0) {
      affine_of<n>(m.number(turn), cut.width, p.column * n, factor, offset);
      const float* bias = m.number(turn) + time_bias * cut.width + p.column * n;
      walk_channels<n>(cut, p, [&](int k, int g) { middle[k] = m.final[2 * g] - bias[k], factor[k] *= m.final[2 * g + 1]; });
    }
    T* y = static_cast<T*>(a.y) + start_of<T>(cut, p, s);
    const T* x = static_cast<const T*>(a.x) + start_of<T>(cut, p, next);
    walk_pairs(p, [&](int i, auto steps) {
      constexpr int count = decltype(steps)::count;
      float v[count][n];
#pragma unroll
      for (int j = 0; j < count; ++j) numbers_of(static_cast<const T*>(nullptr), own[(i + j) * around], v[j]);
#pragma unroll
      for (int j = 0; j < count; ++j) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const float z = muladd(v[j][k] - middle[k], factor[k], offset[k]);
          v[j][k] = silu ? z * sigmoid(z) : z;
        }
        *reinterpret_cast<uint4*>(y) = word_of<T>(v[j]);
        y += down;
      }
      if (more) copy_steps(steps, x, down, own + i * around, around);
      x += count * down;
    });
    s = next;
  }
  cluster_arrive();
  cluster_wait();  // the other blocks may read this one's memory until here
}

// The means of dn and of dn n per group, from the sums of all blocks of the cluster.
__device__ void cluster_means(const Cut& cut, const Backward& m, int turn) {
  const int lane = int(threadIdx.x) % 32;
  const double inverse = 1.0 / (double(cut.a.positions) * (cut.channels));
#pragma unroll 1
  for (int g = int(threadIdx.x) / 32; g < cut.groups; g += warps) {
    const double* there = of_block(m.group(turn), unsigned(lane & (cut.cluster - 1))) + 2 * g;
    const double mean = warp_sum(there[0], cut.cluster), mean_n = warp_sum(there[1], cut.cluster);
    if (lane == 0) m.final[2 * g] = float(mean * inverse), m.final[2 * g + 1] = float(mean_n * inverse);
  }
}

// The gradients of the small tensors (without positions); each block computes those of some channels.
__device__ void cluster_gradients(const Cut& cut, const Part& p, const Slice& s, const Backward& m, int turn) {
  const GroupNormSilu& a = cut.a;
  if (!cut.sums && !a.dtime_bias.address && !a.dscale.address && !a.dshift.address) return;
  const int lane = int(threadIdx.x) % 32, from = lane & (cut.cluster - 1), each = over(32, cut.cluster);
  const int share = over(cut.width + cut.cluster - 1, cut.cluster), begin = p.rank * share;
  const int end = begin + share < cut.width ? begin + share : cut.width;
  const double* there = of_block(m.channel(turn), unsigned(from));
#pragma unroll 1
  for (int first = begin + int(threadIdx.x) / 32 * each; first < end; first += warps * each) {
    const int c = first + over(lane, cut.cluster);
    double ones = 0, products = 0, normals = 0;
    if (c < end) ones = there[c], products = there[cut.width + c], normals = there[2 * cut.width + c];
    ones = warp_sum(ones, cut.cluster), products = warp_sum(products, cut.cluster), normals = warp_sum(normals, cut.cluster);
    if (c >= end || from != 0) continue;
    const int g = over(c, cut.channels);
    const int64_t channel = s.channel + c;
    const float* of = m.number(turn) + c;
    const double w = of[weight * cut.width], b = of[bias * cut.width], one = of[scale * cut.width];
    if (cut.sums) {
      float* to = cut.sums + s.sample * a.channels + channel;
      to[0] = float(one * products), to[a.batch * a.channels] = float(one * ones);
    }
    const double of_dn = m.final[2 * g], of_dn_n = m.final[2 * g + 1];
    const double through = w * one * ones - double(a.positions) * of_dn - normals * of_dn_n;
    put(a.dtime_bias, s.sample, channel, double(of[rstd * cut.width]) * through);
    put(a.dscale, s.sample, channel, w * products + b * ones);
    put(a.dshift, s.sample, channel, ones);
  }
}

// With d = x + time_bias - mean, factor = weight (1 + scale) rstd: z = d factor + offset, and
// dx = dz factor + d slope + constant, where the latter two hold the means over the group. With SiLU, z and the factor are
// times -log2(e) and dz times -ln 2, which saves two products per element.
template <typename T, bool silu> __global__ void __launch_bounds__(threads, 2)
    cluster_backward(const __grid_constant__ Cut cut) {
  constexpr int n = wide<T>;
  constexpr float unit = silu ? minus_log2e : 1.0f;
  constexpr double of_unit = silu ? 1.0 / double(minus_ln2) : 1.0;
  FD_DYNAMIC_SHARED(uint4, memory);
  const Backward m(cut, reinterpret_cast<char*>(memory));
  const Part p = part_of(cut);
  const GroupNormSilu& a = cut.a;
  const int64_t down = int64_t(cut.rows) * a.channels;
  const int around = cut.rows * cut.columns, lane = int(threadIdx.x) % 32, channels = cut.channels;
  uint4 *const own = m.vectors + threadIdx.x, *const own_grad = own + cut.positions * cut.columns;
  Slice s = first_slice(cut);
  {
    const int64_t start = start_of<T>(cut, p, s);
    const T *x = static_cast<const T*>(a.x) + start, *grad = static_cast<const T*>(a.grad) + start;
    walk_pairs(p, [&](int i, auto steps) {
      copy_steps(steps, x + i * down, down, own + i * around, around);
      copy_steps(steps, grad + i * down, down, own_grad + i * around, around);
    });
  }
  get_numbers<number_count>(cut, s, m.number(0));
  __syncthreads();
  for (int turn = 0; s.number < cut.slices; turn ^= 1) {
    float middle[n] = {}, factor[n] = {}, offset[n] = {};
    if (p.steps > 0) {
      affine_of<n>(m.number(turn), cut.width, p.column * n, factor, offset);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const float* of = m.number(turn) + p.column * n + k;
        middle[k] = of[mean * cut.width] - of[time_bias * cut.width];
        factor[k] *= of[rstd * cut.width] * unit, offset[k] *= unit;
      }
    }
    // d and dz (in its unit) of the vector of step i.
    const auto slopes = [&](int i, float* d, float* dz) {
      numbers_of(static_cast<const T*>(nullptr), own[i * around], d);
      numbers_of(static_cast<const T*>(nullptr), own_grad[i * around], dz);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        d[k] -= middle[k];
        if (!silu) continue;
        const float power = muladd(d[k], factor[k], offset[k]);
        dz[k] *= silu_slope_of_power(power, sigmoid_of_power(power));
      }
    };
    float ones[n] = {}, products[n] = {}, normals[n] = {};
    walk_batches(p, [&](int i) {
      float d[n], dz[n];
      slopes(i, d, dz);
#pragma unroll
      for (int k = 0; k < n; ++k) ones[k] += dz[k], products[k] = muladd(dz[k], d[k], products[k]), normals[k] += d[k];
    });
    if (p.row < cut.rows) {
      float* left = m.leave + p.row * cut.width + p.column * n;
      set_vector<n>(left, ones);
      set_vector<n>(left + m.each, products);
      set_vector<n>(left + 2 * m.each, normals);
    }
    __syncthreads();
    double* const channel = m.channel(turn);
#pragma unroll 1
    for (int first = int(threadIdx.x); first - lane < 3 * cut.width * cut.parts; first += threads) {
      const int i = over(first, cut.parts), which = over(i, cut.width), c = i - which * cut.width;
      double some[4] = {};  // sums that do not wait for each other
      if (which < 3) {
        const float* from = m.leave + which * m.each + c;
        int row = first - i * cut.parts;
#pragma unroll 1
        for (; row + 3 * cut.parts < cut.rows; row += 4 * cut.parts) {
#pragma unroll
          for (int j = 0; j < 4; ++j) some[j] += double(from[(row + j * cut.parts) * cut.width]);
        }
#pragma unroll 1
        for (; row < cut.rows; row += cut.parts) some[0] += double(from[row * cut.width]);
      }
      const double sum = warp_sum((some[0] + some[1]) + (some[2] + some[3]), cut.parts);
      if (which >= 3 || first != i * cut.parts) continue;
      const double r = m.number(turn)[rstd * cut.width + c];
      channel[i] = sum * (which ? r : 1.0) * (which < 2 ? of_unit : 1.0);
    }
    __syncthreads();
#pragma unroll 1
    for (int g = int(threadIdx.x) / 32; g < cut.groups; g += warps) {
      const float* of = m.number(turn);
      double sum = 0, sum_n = 0;
#pragma unroll 1
      for (int c = g * channels + lane; c < (g + 1) * channels; c += 32) {
        const double by = double(of[weight * cut.width + c] * of[scale * cut.width + c]);
        sum += channel[c] * by, sum_n += channel[cut.width + c] * by;
      }
      sum = warp_sum(sum), sum_n = warp_sum(sum_n);
      if (lane == 0) m.group(turn)[2 * g] = sum, m.group(turn)[2 * g + 1] = sum_n;
    }
    cluster_arrive();
    const Slice next = next_slice(cut, s);
    const bool more = next.number < cut.slices;
    if (more) get_numbers<number_count>(cut, next, m.number(turn ^ 1));
    cluster_wait();
    cluster_means(cut, m, turn);
    __syncthreads();
    float slope[n] = {}, constant[n] = {};
    if (p.steps > 0) {
      const float* of = m.number(turn) + rstd * cut.width + p.column * n;
      walk_channels<n>(
          cut, p, [&](int k, int g) { constant[k] = -of[k] * m.final[2 * g], slope[k] = -of[k] * of[k] * m.final[2 * g + 1]; });
    }
    T* dx = static_cast<T*>(a.dx) + start_of<T>(cut, p, s);
    const int64_t start = start_of<T>(cut, p, next);
    const T *x = static_cast<const T*>(a.x) + start, *grad = static_cast<const T*>(a.grad) + start;
    walk_pairs(p, [&](int i, auto steps) {
      constexpr int count = decltype(steps)::count;
#pragma unroll
      for (int j = 0; j < count; ++j) {
        float d[n], dz[n];
        slopes(i + j, d, dz);
#pragma unroll
        for (int k = 0; k < n; ++k) dz[k] = muladd(dz[k], factor[k], muladd(d[k], slope[k], constant[k]));
        *reinterpret_cast<uint4*>(dx) = word_of<T>(dz);
        dx += down;
      }
      if (more) {
        copy_steps(steps, x, down, own + i * around, around);
        copy_steps(steps, grad, down, own_grad + i * around, around);
      }
      x += count * down, grad += count * down;
    });
    cluster_gradients(cut, p, s, m, turn);  // while copies arrive
    s = next;
  }
  cluster_arrive();
  cluster_wait();  // the other blocks may read this one's memory until here
}

// The gradients of weight and bias: the samples' contributions, added in order. 32 channels per block.
__global__ void __launch_bounds__(threads) add_channels(const __grid_constant__ Cut cut) {
  __shared__ double sums[2][shared_samples][32];
  const GroupNormSilu& a = cut.a;
  const int lane = int(threadIdx.x) % 32, part = int(threadIdx.x) / 32;
  const int64_t c = int64_t(blockIdx.x) * 32 + lane;
  double to_weight = 0, to_bias = 0;
  if (c < a.channels) {
#pragma unroll 4
    for (int64_t s = part; s < a.batch; s += shared_samples) {
      to_weight += double(cut.sums[s * a.channels + c]);
      to_bias += double(cut.sums[(a.batch + s) * a.channels + c]);
    }
  }
  sums[0][part][lane] = to_weight, sums[1][part][lane] = to_bias;
  __syncthreads();
  if (part > 1 || c >= a.channels) return;
  double total = 0;
  for (int i = 0; i < shared_samples; ++i) total += sums[part][i][lane];
  put(part ? a.dbias : a.dweight, 0, c, total);
}

Cut cut_of(const GroupNormSilu& a, const GroupNormCut& how, float* sums) {
  Cut cut = {};
  const Row given[number_count] = {
      a.weight, a.bias, a.time_bias, a.scale, a.shift, {a.mean, Dtype::f32, a.groups}, {a.rstd, Dtype::f32, a.groups}};
  for (int i = 0; i < number_count; ++i) cut.given[i] = given[i];
  cut.a = a, cut.sums = sums, cut.parts = 1, cut.cluster = how.cluster, cut.groups = how.groups;
  cut.channels = int(a.channels / a.groups), cut.width = cut.channels * how.groups;
  cut.columns = int(cut.width * bytes_of(a.dtype) / 16);
  cut.rows = threads / cut.columns;
  cut.positions = ceil_div(a.positions, how.cluster);
  cut.of_sample = int(a.groups / how.groups), cut.slices = int(a.batch) * cut.of_sample;
  const int64_t turns = ceil_div(cut.slices, how.clusters > 0 ? how.clusters : 1);
  cut.clusters = int(ceil_div(cut.slices, turns));  // so that all take equally many slices, or one fewer
  while (2 * cut.parts * 3 * cut.width <= threads) cut.parts *= 2;
  return cut;
}

// Calls use(kernel, bytes of shared memory) with the kernel for this call.
template <typename T, typename Use> auto with_kernel(const Cut& cut, bool backward, const Use& use) {
  const size_t bytes = size_t(backward ? Backward::bytes(cut) : Forward::bytes(cut));
  if (backward) return cut.a.silu ? use(&cluster_backward<T, true>, bytes) : use(&cluster_backward<T, false>, bytes);
  return cut.a.silu ? use(&cluster_forward<T, true>, bytes) : use(&cluster_forward<T, false>, bytes);
}

template <typename Use> auto with_kernel(const Cut& cut, bool backward, const Use& use) {
  switch (cut.a.dtype) {
    case Dtype::f32: return with_kernel<float>(cut, backward, use);
    case Dtype::bf16: return with_kernel<bf16>(cut, backward, use);
    default: return with_kernel<f16>(cut, backward, use);
  }
}

}  // namespace
}  // namespace fd

// Bytes of shared memory per block of a call.
int64_t group_norm_silu_cuda_shared(const fd::GroupNormSilu& a, const fd::GroupNormCut& how, bool backward) {
  using namespace fd;
  return int64_t(with_kernel(cut_of(a, how, nullptr), backward, [](auto, size_t bytes) { return bytes; }));
}

// How many clusters of a call run at once on the current GPU; 0 or less: none. Also allows the launch.
int group_norm_silu_cuda_clusters(const fd::GroupNormSilu& a, const fd::GroupNormCut& how, bool backward) {
  using namespace fd;
  return with_kernel(cut_of(a, how, nullptr), backward, [&](auto kernel, size_t bytes) {
    return allow_clusters(kernel, unsigned(how.cluster), unsigned(threads), bytes);
  });
}

// Forward, or backward if dx is given; with sums [2, batch, channels] for the gradients of weight and bias.
const char* group_norm_silu_cuda(const fd::GroupNormSilu& a, const fd::GroupNormCut& how, float* sums, void* stream) {
  using namespace fd;
  const Cut cut = cut_of(a, how, sums);
  const unsigned grid = unsigned(cut.clusters * cut.cluster);
  with_kernel(cut, a.dx != nullptr, [&](auto kernel, size_t bytes) {
    FD_LAUNCH_CLUSTER(kernel, unsigned(how.cluster), grid, unsigned(threads), bytes, stream, cut);
    return 0;
  });
  if (sums) FD_LAUNCH(add_channels, blocks_for(a.channels, 32), threads, 0, stream, cut);
  return fd_launch_error();
}
