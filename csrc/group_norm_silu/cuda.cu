// SPDX-License-Identifier: Apache-2.0
// group_norm_silu for channels last, on a GPU with clusters: a slice (whole groups of a sample) stays in the shared memory of
// a cluster's blocks between its only read and its only write.
//
// Grid      one cluster of 1 to 8 blocks (`CLUSTERS` in Python) per sample and slice; its blocks share the positions equally.
//           256 threads per block; each thread iterates over one column of 16 bytes. The gradients of weight and bias need
//           one more launch
// Traffic   x and y, backward x, grad and dx, once each: in bf16 4 and 6 bytes per element
// Precision a thread's moments in fp32 around its first value (squares lose at most its count of roundings), merged in double
//           (Chan et al. 1979); a thread's gradient sums in fp32, over threads in double; outputs rounded once; the order of
//           all sums is fixed
// Limits    slices start and end at 16 bytes; a slice fits into the cluster (`Cut`, chosen in Python); 256 columns
#include "group_norm_silu/cut.cuh"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int shared_samples = 8;  // add_channels keeps the sums of this many samples in shared memory at once

// Mean and sum of squares around it, per group over the positions of the block: the threads' moments merged, a warp per group.
template <typename T> __device__ void block_moments(const Cut& cut, const Part& p, const Forward& m) {
  const int lane = int(threadIdx.x) % 32, channels = cut.width / cut.groups, used = p.full ? cut.rows : p.more;
  const T* first =
      reinterpret_cast<const T*>(m.vectors);  // the values of the first position: the threads' means are relative to them
  for (int g = int(threadIdx.x) / 32; g < cut.groups; g += warps) {
    const auto of_entry = [&](int i, int& n, double& mean) {
      const int row = i / channels, c = g * channels + i % channels;
      n = p.full + (row < p.more);
      mean = double(to_float(first[c])) + double(m.number[time_bias * cut.width + c]) + double(m.leave[row * cut.width + c]);
      return m.leave[m.each + row * cut.width + c];
    };
    double total = 0, squares = 0, mean;
    int n;
    for (int i = lane; i < used * channels; i += 32) of_entry(i, n, mean), total += n * mean;
    const double middle = warp_sum(total) / larger(int64_t(p.count) * channels, 1);
    for (int i = lane; i < used * channels; i += 32) {
      squares += double(of_entry(i, n, mean));
      squares += n * (mean - middle) * (mean - middle);
    }
    squares = warp_sum(squares);
    if (lane == 0) m.group[2 * g] = middle, m.group[2 * g + 1] = squares;
  }
}

// Mean and 1 / standard deviation of each group: the moments of the cluster's blocks merged.
__device__ void cluster_moments(const Cut& cut, const Part& p, const Forward& m) {
  const int lane = int(threadIdx.x) % 32, channels = cut.width / cut.groups;
  const double n = lane < cut.cluster ? double(positions_of(cut, lane)) * channels : 0.0;
  const double all = double(cut.a.positions) * channels;
  for (int g = int(threadIdx.x) / 32; g < cut.groups; g += warps) {
    const double* there = of_block(m.group, unsigned(lane % cut.cluster));
    const double mean = lane < cut.cluster ? there[2 * g] : 0.0, about = lane < cut.cluster ? there[2 * g + 1] : 0.0;
    const double middle = warp_sum(n * mean) / all;
    const double squares = warp_sum(about + n * (mean - middle) * (mean - middle));
    if (lane != 0) continue;
    const float r = float(1.0 / square_root(squares / all + cut.a.eps));
    m.final[2 * g] = float(middle), m.final[2 * g + 1] = r;
    const int64_t at = p.sample * cut.a.groups + p.group + g;
    if (p.rank == 0) cut.a.mean[at] = float(middle), cut.a.rstd[at] = r;
  }
}

template <typename T, bool silu> __global__ void __launch_bounds__(threads, 2)
    cluster_forward(const __grid_constant__ Cut cut) {
  constexpr int n = wide<T>;
  FD_DYNAMIC_SHARED(uint4, memory);
  const Forward m(cut, reinterpret_cast<char*>(memory));
  const Part p = part_of(cut);
  const GroupNormSilu& a = cut.a;
  const int64_t start = start_of<T>(cut, p), down = int64_t(cut.rows) * a.channels;
  const int around = cut.rows * cut.columns;
  const T* x = static_cast<const T*>(a.x) + start;
  uint4* own = m.vectors + threadIdx.x;
  uint4* to = own;
  for (int batch = 0, i = 0; batch < batches; ++batch) {
    for (; i < end_of_batch(p, batch); ++i, x += down, to += around) copy_later(to, x);
    end_batch();
  }
  get_numbers<given_count>(cut, p, m.number);
  float first[n] = {}, sum[n] = {}, squares[n] = {};
  wait_for_copies<batches - 1>();
  if (p.steps > 0) numbers_of(static_cast<const T*>(nullptr), own[0], first);
  walk_batches<0>(p, [&](int i) {
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
  block_moments<T>(cut, p, m);
  cluster_arrive();
  cluster_wait();
  cluster_moments(cut, p, m);
  __syncthreads();
  cluster_arrive();  // this block no longer reads the memory of the others
  float middle[n], factor[n], offset[n];
  if (p.steps > 0) {
    const int channels = cut.width / cut.groups;
    affine_of<n>(m.number, cut.width, p.column * n, factor, offset);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const int c = p.column * n + k, g = c / channels;
      middle[k] = m.final[2 * g] - m.number[time_bias * cut.width + c];
      factor[k] *= m.final[2 * g + 1];
    }
  }
  T* y = static_cast<T*>(a.y) + start;
#pragma unroll 2
  for (int i = 0; i < p.steps; ++i) {
    float v[n];
    numbers_of(static_cast<const T*>(nullptr), own[i * around], v);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float z = muladd(v[k] - middle[k], factor[k], offset[k]);
      v[k] = silu ? z * sigmoid(z) : z;
    }
    *reinterpret_cast<uint4*>(y) = word_of<T>(v);
    y += down;
  }
  cluster_wait();  // the other blocks may read this one's memory until here
}

// The means of dn and of dn n per group, from the sums of all blocks of the cluster.
__device__ void cluster_means(const Cut& cut, const Backward& m) {
  const int lane = int(threadIdx.x) % 32;
  const double inverse = 1.0 / (double(cut.a.positions) * (cut.width / cut.groups));
  for (int g = int(threadIdx.x) / 32; g < cut.groups; g += warps) {
    const double* there = of_block(m.group, unsigned(lane % cut.cluster));
    const double mean = warp_sum(lane < cut.cluster ? there[2 * g] : 0.0);
    const double mean_n = warp_sum(lane < cut.cluster ? there[2 * g + 1] : 0.0);
    if (lane == 0) m.final[2 * g] = float(mean * inverse), m.final[2 * g + 1] = float(mean_n * inverse);
  }
}

// The gradients of the small tensors (without positions); each block computes those of some channels.
__device__ void cluster_gradients(const Cut& cut, const Part& p, const Backward& m) {
  const GroupNormSilu& a = cut.a;
  if (!cut.sums && !a.dtime_bias.address && !a.dscale.address && !a.dshift.address) return;
  const int lane = int(threadIdx.x) % 32, from = lane % cut.cluster, each = 32 / cut.cluster;
  const int share = (cut.width + cut.cluster - 1) / cut.cluster, begin = p.rank * share;
  const int end = begin + share < cut.width ? begin + share : cut.width;
  const double* there = of_block(m.channel, unsigned(from));
  for (int first = begin + int(threadIdx.x) / 32 * each; first < end; first += warps * each) {
    const int c = first + lane / cut.cluster;
    double ones = 0, products = 0, normals = 0;
    if (c < end) ones = there[c], products = there[cut.width + c], normals = there[2 * cut.width + c];
    for (int bits = cut.cluster / 2; bits > 0; bits /= 2) {
      ones += __shfl_xor_sync(0xFFFFFFFFu, ones, bits);
      products += __shfl_xor_sync(0xFFFFFFFFu, products, bits);
      normals += __shfl_xor_sync(0xFFFFFFFFu, normals, bits);
    }
    if (c >= end || from != 0) continue;
    const int g = c / (cut.width / cut.groups);
    const int64_t channel = p.channel + c;
    const float* of = m.number + c;
    const double w = of[weight * cut.width], b = of[bias * cut.width], s = of[scale * cut.width];
    if (cut.sums) {
      float* to = cut.sums + p.sample * a.channels + channel;
      to[0] = float(s * products), to[a.batch * a.channels] = float(s * ones);
    }
    const double of_dn = m.final[2 * g], of_dn_n = m.final[2 * g + 1];
    const double through = w * s * ones - double(a.positions) * of_dn - normals * of_dn_n;
    put(a.dtime_bias, p.sample, channel, double(of[rstd * cut.width]) * through);
    put(a.dscale, p.sample, channel, w * products + b * ones);
    put(a.dshift, p.sample, channel, ones);
  }
}

template <typename T, bool silu> __global__ void __launch_bounds__(threads, 2)
    cluster_backward(const __grid_constant__ Cut cut) {
  constexpr int n = wide<T>;
  FD_DYNAMIC_SHARED(uint4, memory);
  const Backward m(cut, reinterpret_cast<char*>(memory));
  const Part p = part_of(cut);
  const GroupNormSilu& a = cut.a;
  const int64_t start = start_of<T>(cut, p), down = int64_t(cut.rows) * a.channels;
  const int around = cut.rows * cut.columns, lane = int(threadIdx.x) % 32, channels = cut.width / cut.groups;
  const T *x = static_cast<const T*>(a.x) + start, *grad = static_cast<const T*>(a.grad) + start;
  uint4 *own = m.vectors + threadIdx.x, *own_grad = own + cut.positions * cut.columns;
  uint4 *to = own, *to_grad = own_grad;
  for (int batch = 0, i = 0; batch < batches; ++batch) {
    for (; i < end_of_batch(p, batch); ++i, x += down, grad += down, to += around, to_grad += around) {
      copy_later(to, x);
      copy_later(to_grad, grad);
    }
    end_batch();
  }
  get_numbers<number_count>(cut, p, m.number);
  __syncthreads();
  float middle[n] = {}, r[n] = {}, factor[n] = {}, offset[n] = {};
  if (p.steps > 0) {
    affine_of<n>(m.number, cut.width, p.column * n, factor, offset);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float* of = m.number + p.column * n + k;
      middle[k] = of[mean * cut.width] - of[time_bias * cut.width];
      r[k] = of[rstd * cut.width];
    }
  }
  // n and dz of the vector of step i.
  const auto slopes = [&](int i, float* normal, float* dz) {
    numbers_of(static_cast<const T*>(nullptr), own[i * around], normal);
    numbers_of(static_cast<const T*>(nullptr), own_grad[i * around], dz);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      normal[k] = standardized(normal[k], middle[k], r[k]);
      if (!silu) continue;
      const float z = muladd(normal[k], factor[k], offset[k]);
      dz[k] *= silu_slope(z, sigmoid(z), 1.0f);
    }
  };
  float ones[n] = {}, products[n] = {}, normals[n] = {};
  walk_batches<0>(p, [&](int i) {
    float normal[n], dz[n];
    slopes(i, normal, dz);
#pragma unroll
    for (int k = 0; k < n; ++k) ones[k] += dz[k], products[k] = muladd(dz[k], normal[k], products[k]), normals[k] += normal[k];
  });
  if (p.row < cut.rows) {
    float* left = m.leave + p.row * cut.width + p.column * n;
    set_vector<n>(left, ones);
    set_vector<n>(left + m.each, products);
    set_vector<n>(left + 2 * m.each, normals);
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < 3 * cut.width; i += threads) {
    const float* from = m.leave + i / cut.width * m.each + i % cut.width;
    double sum = 0;
    for (int row = 0; row < cut.rows; ++row) sum += double(from[row * cut.width]);
    m.channel[i] = sum;
  }
  __syncthreads();
  for (int g = int(threadIdx.x) / 32; g < cut.groups; g += warps) {
    const auto factor_of = [&](int c) { return double(m.number[weight * cut.width + c] * m.number[scale * cut.width + c]); };
    double sum = 0, sum_n = 0;
    for (int c = g * channels + lane; c < (g + 1) * channels; c += 32)
      sum += m.channel[c] * factor_of(c), sum_n += m.channel[cut.width + c] * factor_of(c);
    sum = warp_sum(sum), sum_n = warp_sum(sum_n);
    if (lane == 0) m.group[2 * g] = sum, m.group[2 * g + 1] = sum_n;
  }
  cluster_arrive();
  cluster_wait();
  cluster_means(cut, m);
  __syncthreads();
  cluster_gradients(cut, p, m);
  cluster_arrive();  // this block no longer reads the memory of the others
  float of_dn[n] = {}, of_dn_n[n] = {};
  if (p.steps > 0) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const int g = (p.column * n + k) / channels;
      of_dn[k] = m.final[2 * g], of_dn_n[k] = m.final[2 * g + 1];
    }
  }
  T* dx = static_cast<T*>(a.dx) + start;
  for (int i = 0; i < p.steps; ++i) {
    float normal[n], dz[n];
    slopes(i, normal, dz);
#pragma unroll
    for (int k = 0; k < n; ++k) dz[k] = gradient(dz[k], normal[k], r[k], factor[k], of_dn[k], of_dn_n[k]);
    *reinterpret_cast<uint4*>(dx) = word_of<T>(dz);
    dx += down;
  }
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
  const Row given[given_count] = {a.weight, a.bias, a.time_bias, a.scale, a.shift};
  for (int i = 0; i < given_count; ++i) cut.given[i] = given[i];
  cut.a = a, cut.sums = sums, cut.cluster = how.cluster, cut.groups = how.groups;
  cut.width = int(a.channels / a.groups) * how.groups;
  cut.columns = int(cut.width * bytes_of(a.dtype) / 16);
  cut.rows = threads / cut.columns;
  cut.positions = ceil_div(a.positions, how.cluster);
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
  const unsigned grid = unsigned(a.batch * (a.groups / how.groups) * how.cluster);
  with_kernel(cut, a.dx != nullptr, [&](auto kernel, size_t bytes) {
    FD_LAUNCH_CLUSTER(kernel, unsigned(how.cluster), grid, unsigned(threads), bytes, stream, cut);
    return 0;
  });
  if (sums) FD_LAUNCH(add_channels, blocks_for(a.channels, 32), threads, 0, stream, cut);
  return fd_launch_error();
}
