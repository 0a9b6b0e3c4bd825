// SPDX-License-Identifier: Apache-2.0
// grad_square_sum and adamw_ema on a GPU: the norm of all gradients, then clip, AdamW, average, low-precision copy and zeroing
// in one pass over all parameters.
//
// Grid      256 threads per block, persistent: each block takes a range of consecutive chunks. The tables are kernel arguments
//           (no copy, and a graph keeps them): 1000 gradients or 250 parameters per launch. Before the update there is a
//           launch with one thread per parameter; one block adds the partial sums
// Traffic   fp32 gradients: norm 4 bytes per element; update 28, + 8 with an average, + 2 with a copy, + 4 with zeroing;
//           16-byte accesses (8 for two-byte dtypes) if arrays start at multiples of 16 bytes; stores are evicted first
// Precision elements in fp32 (a thread's sum has 32 terms), chunks in double in their order, constants in double; copies
//           rounded once
// Limits    any n >= 0 (64-bit); gradients fp32/bf16/fp16, copies bf16/fp16
#include "adamw_ema/math.h"
#include "common.cuh"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int finishing_threads = 1024, preparing_threads = 128, norm_blocks = 8, update_blocks = 4;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int table_bytes = 3900;
#else
constexpr int table_bytes = 32000;  // kernel arguments may have 32764 bytes
#endif

template <typename Row> struct Rows {
  static constexpr int most = table_bytes / int(sizeof(Row));
  int64_t chunk;        // elements of a chunk
  int64_t first, many;  // first chunk and number of chunks of these rows
  int count;
  Row row[most];
};

template <typename Row> Rows<Row> table(const Row* rows, int64_t count, int64_t chunk) {
  Rows<Row> a;
  a.chunk = chunk, a.count = int(smaller(count, Rows<Row>::most));
  for (int i = 0; i < a.count; ++i) a.row[i] = rows[i];
  const GradientRow& last = gradient_of(rows[a.count - 1]);
  a.first = gradient_of(rows[0]).first_chunk;
  a.many = last.first_chunk + ceil_div(last.n, chunk) - a.first;
  return a;
}

// Calls body for the chunks of this block.
template <typename Row, typename Body> __device__ void for_share(const Rows<Row>& a, const Body& body) {
  const int64_t from = a.first + a.many * blockIdx.x / gridDim.x, until = a.first + a.many * (blockIdx.x + 1) / gridDim.x;
  for_chunks(a.row, a.count, a.chunk, from, until, body);
}

template <int n, typename T> struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Vector {
  T x[n];
};

// The type that one instruction stores.
template <int bytes> struct Word;
template <> struct Word<2> {
  typedef unsigned short Type;
};
template <> struct Word<4> {
  typedef unsigned Type;
};
template <> struct Word<8> {
  typedef uint2 Type;
};
template <> struct Word<16> {
  typedef uint4 Type;
};

template <int n, typename T> __device__ void get_as(float (&to)[n], const void* from, int64_t i) {
  const Vector<n, T> vector = *reinterpret_cast<const Vector<n, T>*>(static_cast<const T*>(from) + i);
  FD_UNROLL
  for (int k = 0; k < n; ++k) to[k] = to_float(vector.x[k]);
}
template <int n, typename T> __device__ void put_as(void* to, int64_t i, const float (&from)[n]) {
  Vector<n, T> vector;
  FD_UNROLL
  for (int k = 0; k < n; ++k) vector.x[k] = from_float<T>(from[k]);
  typename Word<sizeof vector>::Type word;
  memcpy(&word, &vector, sizeof word);
  __stcs(reinterpret_cast<decltype(word)*>(static_cast<T*>(to) + i), word);  // the compiler would split a plain store
}
template <int n> __device__ void get(float (&to)[n], const void* from, int64_t i, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return get_as<n, float>(to, from, i);
    case Dtype::bf16: return get_as<n, bf16>(to, from, i);
    default: return get_as<n, f16>(to, from, i);
  }
}
template <int n> __device__ void put(void* to, int64_t i, const float (&from)[n], Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return put_as<n, float>(to, i, from);
    case Dtype::bf16: return put_as<n, bf16>(to, i, from);
    default: return put_as<n, f16>(to, i, from);
  }
}

template <typename T> __device__ float thread_square_sum(const T* grad, int64_t n) {
  float sum = 0.0f;
  int64_t done = 0;
  if (starts_vector(grad)) {
    done = n / 8 * 8;
    for (int64_t i = 8 * threadIdx.x; i < done; i += 8 * threads_per_block) {
      float g[8];
      get_as<8, T>(g, grad, i);
      FD_UNROLL
      for (int k = 0; k < 8; ++k) sum = muladd(g[k], g[k], sum);
    }
  }
  for (int64_t i = done + threadIdx.x; i < n; i += threads_per_block) {
    const float g = to_float(grad[i]);
    sum = muladd(g, g, sum);
  }
  return sum;
}

__global__ void __launch_bounds__(threads_per_block) square_sum(const __grid_constant__ Rows<GradientRow> a, double* partials) {
  __shared__ float by_warp[threads_per_block / 32];
  for_share(a, [&](const GradientRow& row, int64_t first, int64_t n, int64_t chunk) {
    float sum;
    switch (Dtype(row.grad_dtype)) {
      case Dtype::f32: sum = thread_square_sum(static_cast<const float*>(row.grad) + first, n); break;
      case Dtype::bf16: sum = thread_square_sum(static_cast<const bf16*>(row.grad) + first, n); break;
      default: sum = thread_square_sum(static_cast<const f16*>(row.grad) + first, n);
    }
    sum = block_sum<threads_per_block>(sum, by_warp);
    if (threadIdx.x == 0) partials[chunk] = double(sum);
  });
}

__global__ void __launch_bounds__(finishing_threads) add_squares(const double* partials, int64_t count, double* total) {
  __shared__ double by_warp[finishing_threads / 32];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += finishing_threads) sum += partials[i];
  sum = block_sum<finishing_threads>(sum, by_warp);
  if (threadIdx.x == 0) *total = sum;
}

struct Prepared {
  AdamWConstants<float> constants;
  float taken;  // 0: the step is skipped
};

__global__ void __launch_bounds__(preparing_threads)
    prepare(const __grid_constant__ Rows<AdamWRow> a, AdamWInputs inputs, Prepared* prepared, int64_t* skipped) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  const Gate gate = adamw_gate(inputs);
  if (i == 0 && skipped && gate.skip) ++*skipped;
  if (i >= a.count) return;
  const AdamWRow& row = a.row[i];
  const double t = double(*row.step) + 1.0;
  prepared[i] = {adamw_constants(row, inputs, gate.factor, t), gate.skip ? 0.0f : 1.0f};
  if (!gate.skip) *row.step = float(t);
}

template <int n>
__device__ void update_elements(const AdamWRow& row, int64_t i, const AdamWConstants<float>& c, bool taken, bool zero) {
  const Dtype dtype = Dtype(row.gradient.grad_dtype);
  if (taken) {
    float grad[n], param[n], exp_avg[n], exp_avg_sq[n], average[n];
    get(grad, row.gradient.grad, i, dtype);
    get_as<n, float>(param, row.param, i);
    get_as<n, float>(exp_avg, row.exp_avg, i);
    get_as<n, float>(exp_avg_sq, row.exp_avg_sq, i);
    if (row.average) get_as<n, float>(average, row.average, i);
    FD_UNROLL
    for (int k = 0; k < n; ++k) {
      const AdamWState<float> x = adamw(AdamWState<float>{param[k], exp_avg[k], exp_avg_sq[k]}, grad[k], c);
      param[k] = x.param, exp_avg[k] = x.exp_avg, exp_avg_sq[k] = x.exp_avg_sq;
      if (row.average) average[k] = averaged(average[k], x.param, c);
    }
    put_as<n, float>(row.param, i, param);
    put_as<n, float>(row.exp_avg, i, exp_avg);
    put_as<n, float>(row.exp_avg_sq, i, exp_avg_sq);
    if (row.average) put_as<n, float>(row.average, i, average);
    if (row.copy) put(row.copy, i, param, Dtype(row.copy_dtype));
  }
  const float zeros[n] = {};
  if (zero) put(row.gradient.grad, i, zeros, dtype);
}

__device__ bool all_start_vectors(const AdamWRow& row) {
  return starts_vector(row.gradient.grad) && starts_vector(row.param) && starts_vector(row.exp_avg) &&
         starts_vector(row.exp_avg_sq) && starts_vector(row.average) && starts_vector(row.copy);
}

__global__ void __launch_bounds__(threads_per_block, update_blocks)
    update(const __grid_constant__ Rows<AdamWRow> a, const Prepared* prepared, bool zero) {
  for_share(a, [&](const AdamWRow& row, int64_t first, int64_t n, int64_t) {
    const Prepared& p = prepared[&row - a.row];
    const AdamWConstants<float> c = p.constants;
    const bool taken = p.taken != 0.0f;
    const int64_t end = first + n, vectors = all_start_vectors(row) ? first + n / 4 * 4 : first;
    for (int64_t i = first + 4 * threadIdx.x; i < vectors; i += 4 * threads_per_block)
      update_elements<4>(row, i, c, taken, zero);
    for (int64_t i = vectors + threadIdx.x; i < end; i += threads_per_block) update_elements<1>(row, i, c, taken, zero);
  });
}

}  // namespace
}  // namespace fd

const char* grad_square_sum_cuda(const fd::GradientRow* rows, int64_t count, int64_t chunk, double* partials, double* total,
                                 const fd::Queue& queue) {
  using namespace fd;
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; i += Rows<GradientRow>::most) {
    const Rows<GradientRow> a = table(rows + i, count - i, chunk);
    const unsigned grid = persistent_blocks(queue, a.many, norm_blocks);
    if (a.many > 0) FD_LAUNCH(square_sum, grid, threads_per_block, 0, queue.stream, a, partials);
    chunks = a.first + a.many;
  }
  FD_LAUNCH(add_squares, 1, finishing_threads, 0, queue.stream, partials, chunks, total);
  return fd_launch_error();
}

// The size of the workspace per parameter, in floats.
int64_t adamw_ema_cuda_workspace() { return sizeof(fd::Prepared) / sizeof(float); }

const char* adamw_ema_cuda(const fd::AdamWRow* rows, int64_t count, int64_t chunk, const fd::AdamWInputs& inputs,
                           int64_t* skipped, float* workspace, const fd::Queue& queue) {
  using namespace fd;
  Prepared* prepared = reinterpret_cast<Prepared*>(workspace);
  for (int64_t i = 0; i < count; i += Rows<AdamWRow>::most) {
    const Rows<AdamWRow> a = table(rows + i, count - i, chunk);
    int64_t* counted = i == 0 ? skipped : nullptr;  // count a skipped step only once
    const unsigned blocks = blocks_for(a.count, preparing_threads), grid = persistent_blocks(queue, a.many, update_blocks);
    Prepared* some = prepared + i;
    FD_LAUNCH(prepare, blocks, preparing_threads, 0, queue.stream, a, inputs, some, counted);
    const bool zero = inputs.zero_grads;
    if (a.many > 0) FD_LAUNCH(update, grid, threads_per_block, 0, queue.stream, a, some, zero);
  }
  return fd_launch_error();
}
