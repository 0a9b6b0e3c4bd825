// SPDX-License-Identifier: Apache-2.0
// The gradients of cross_attention on Hopper, with all keys of a sample on chip.
//
// Grid      one block per head, chunk of queries and sample; heads fastest, because they share cache lines. A block has one
//           warpgroup if its registers can hold dV and dK (two such blocks per multiprocessor), else two; a warpgroup has
//           tiles of 64 queries. Scores and softmax are recomputed in registers with queries as rows, so a row sum needs only
//           shuffles of four lanes. P and dS go through shared memory into dV and dK, which stay in registers until the chunk
//           ends; with two warpgroups the first accumulates dV, the second dK, each over all queries. dQ uses dS from
//           registers. The sum over chunks has one thread per four elements of a row
// Traffic   q and grad_out read, grad_q written, once each, 16 bytes at a time; K and V once per chunk; gradients of K and V:
//           one fp32 partial sum per chunk, written and read once (none if there is one chunk). The next tile is fetched
//           during the work on the current one: into shared memory, or into the cache if there is no space
// Precision scores, softmax and sums in fp32; P and dS rounded to the dtype for the products
// Limits    sm_90a; bf16 and fp16; head dims and keys of ``KEYS`` in cuda.py; heads start at multiples of 16 bytes; 64-bit
//           offsets; chunks depend only on the shape, and chunks and samples are added in order: the same bits in every run
#include "cross_attention/math.h"
#include "hopper.cuh"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int core = 128;  // bytes of 8 rows of 8 elements

constexpr int most = 232448;  // bytes of shared memory
// Padding in bytes between a column of cores (8 columns) and the next. A product that sums over rows seems to read only 16
// bytes per clock, as if its eight columns of cores were in the same banks (on an H200: 2.5 times the modelled clocks).
// A padding of 16 would put them in different banks; this has not been measured.
constexpr int gap = 0;

constexpr int up(int n, int to) { return (n + to - 1) / to * to; }

// A matrix with ``rows`` rows, stored as columns of cores (8 matrix columns each): the address of (row, column), and the
// descriptors for products that sum over its columns or over its rows.
template <int rows> struct Cores {
  unsigned char* at;
  static constexpr int next = rows * 16 + gap, next_columns = 2 * next,
                       next_rows = 2 * core;  // bytes to the next 8 columns, 16 columns, 16 rows
  static constexpr int bytes(int columns) { return columns / 8 * next; }
  __device__ unsigned char* of(int row, int column) const { return at + column / 8 * next + row / 8 * core + row % 8 * 16; }
  __device__ hopper::Operand over_columns(int row) const { return {of(row, 0), next, core}; }
  __device__ hopper::Operand over_rows(int column) const { return {of(0, column), core, next}; }
};

// Sizes in bytes and elements. The order in shared memory: first tile of Q and dO, P, dS, K, second tile, V, buffer for dQ,
// bias of the keys. A product always reads 64 rows. If a matrix has fewer, the product also reads the memory behind it; in
// this order nothing writes there during the product.
template <int D, int KEYS> struct Sizes {
  static constexpr int depth = up(D, 16), keys = up(KEYS, 16);           // products sum over multiples of 16
  static constexpr bool by_dims = up(D, 64) * KEYS <= up(KEYS, 64) * D;  // whether the rows of dV and dK are dims (else keys)
  static constexpr int rows = by_dims ? D : KEYS, columns = by_dims ? KEYS : D;  // of dV and dK in registers
  static constexpr int pieces = up(rows, 64) / 64;
  // Warpgroups of a block: one if its registers can hold both dV and dK, else two with one of them each.
  static constexpr int groups = pieces * columns <= 80 ? 1 : 2, queries = 64 * groups, threads = 128 * groups;
  static constexpr int weights = Cores<queries>::bytes(KEYS), tile = Cores<queries>::bytes(depth);
  static constexpr int bank = Cores<keys>::bytes(depth);
  static constexpr int out_columns = D > 128 ? D / 2 : D;  // of dQ, in one step
  static constexpr int out_row = (out_columns / 8 | 1) * 16,
                       out = queries * out_row;  // consecutive rows are in different banks
  static constexpr int fixed = 2 * weights + 2 * bank + out + 4 * KEYS;
  static constexpr int stages = fixed + 4 * tile <= most ? 2 : 1;
  static constexpr int p_at = 2 * tile, ds_at = p_at + weights, k_at = ds_at + weights, second_at = k_at + bank;
  static constexpr int v_at = second_at + (stages - 1) * 2 * tile, out_at = v_at + bank, bias_at = out_at + out;
  static constexpr int shared = bias_at + 4 * KEYS;
  static constexpr int past = Cores<queries>::bytes(by_dims ? up(D, 64) - depth : up(KEYS, 64) - KEYS);
  static_assert(shared <= most && past <= weights && past <= bank && past <= tile, "");
};

// Loads rows of ``dims`` elements into cores, zeros from row ``end`` on. A warp loads 64 bytes of eight rows at a time.
template <int dims, int warps, int rows>
__device__ void load(Cores<rows> to, const unsigned char* from, int64_t step, int64_t end) {
  const int lane = threadIdx.x % 32, first = 8 * (threadIdx.x / 32) + lane % 8;
  FD_UNROLL
  for (int eight = 0; eight < rows; eight += 8 * warps) {
    const int row = first + eight;
    if (rows % (8 * warps) && row >= rows) break;
    const bool inside = row < end;
    const unsigned char* const source = from + (inside ? row : 0) * step + lane / 8 * 16;
    unsigned char* const place = to.of(row, lane / 8 * 8);
    FD_UNROLL
    for (int part = 0; part < dims / 8; part += 4)
      if (part + lane / 8 < dims / 8) hopper::copy_16(place + part * to.next, source + part * 16, inside ? 16 : 0);
  }
}

// Fills the columns of cores that are not loaded with zeros.
template <int dims, int depth, int rows> __device__ void clear(Cores<rows> to) {
  if constexpr (dims < depth)
    for (int row = threadIdx.x; row < rows; row += blockDim.x) *reinterpret_cast<uint4*>(to.of(row, dims)) = uint4{};
}

__device__ const unsigned char* head_of(const Heads& x, int64_t b, int64_t h) {
  return static_cast<const unsigned char*>(x.at) + 2 * (b * x.batch + h * x.head);
}

__device__ float over_row(float x, bool sum) {
  FD_UNROLL
  for (int bits = 1; bits < 4; bits *= 2) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, x, bits);
    x = sum ? x + other : fmaxf(x, other);
  }
  return x;
}

// Softmax of both rows of a thread: the weights before the division, and the factors (``share``) that normalize them. (Only
// products may write the accumulators of a product: any other write would have to wait for all products in flight.)
template <int n>
__device__ void softmax(const float (&s)[n], const float* bias, float scale, float (&weights)[n], float (&share)[2]) {
  float top[2] = {minus_infinity(), minus_infinity()}, total[2] = {};
  FD_UNROLL
  for (int i = 0; i < n; i += 4) {
    const float2 added = *reinterpret_cast<const float2*>(bias + 2 * i + 2 * (threadIdx.x % 4));
    weights[i] = muladd(s[i], scale, added.x), weights[i + 1] = muladd(s[i + 1], scale, added.y);
    weights[i + 2] = muladd(s[i + 2], scale, added.x), weights[i + 3] = muladd(s[i + 3], scale, added.y);
    top[0] = fmaxf(top[0], fmaxf(weights[i], weights[i + 1])), top[1] = fmaxf(top[1], fmaxf(weights[i + 2], weights[i + 3]));
  }
  FD_UNROLL
  for (int r = 0; r < 2; ++r) top[r] = finite(over_row(top[r], false));
  FD_UNROLL
  for (int i = 0; i < n; ++i) {
    weights[i] = power_of_two(weights[i] - top[i / 2 % 2]);
    total[i / 2 % 2] += weights[i];
  }
  FD_UNROLL
  for (int r = 0; r < 2; ++r) share[r] = inverse(over_row(total[r], true));
}

// Stores a warp's 16 rows, given as words of two columns, into cores.
template <int words, int rows> __device__ void store(Cores<rows> to, int row, const uint32_t (&x)[words]) {
  const int lane = threadIdx.x % 32;
  unsigned char* const own = to.of(row + lane % 16, 0) + lane / 16 * to.next;
  FD_UNROLL
  for (int i = 0; i + 4 <= words; i += 4) hopper::store_cores(own + i / 2 * to.next, x[i], x[i + 1], x[i + 2], x[i + 3]);
  if constexpr (words % 4 == 2) hopper::store_cores(own + (words / 2 - 1) * to.next, x[words - 2], x[words - 1]);
}

template <int D, int KEYS, typename T> __global__ void __launch_bounds__(Sizes<D, KEYS>::threads, 2 / Sizes<D, KEYS>::groups)
    attention_gradients(CrossAttentionBackward a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Sizes<D, KEYS>;
  FD_DYNAMIC_SHARED(unsigned char, memory);
  constexpr int queries = S::queries, warps = S::threads / 32, sets = 2 / S::groups;
  const Cores<queries> p{memory + S::p_at}, ds{memory + S::ds_at};
  const Cores<S::keys> k{memory + S::k_at}, v{memory + S::v_at};
  float* const bias = reinterpret_cast<float*>(memory + S::bias_at);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int64_t h = blockIdx.x % a.H, chunk = blockIdx.x / a.H % a.chunks, b = blockIdx.x / a.H / a.chunks;
  const int64_t row = row_of(a, b), first = chunk * a.span, end = smaller(first + a.span, a.N);
  const float scale = row < 0 ? as_float(0x7FC00000u) : a.scale * log2_e;
  const unsigned char* const q_head = head_of(a.q, b, h);
  const unsigned char* const g_head = head_of(a.grad_out, b, h);
  unsigned char* const out = memory + S::out_at + warp * 16 * S::out_row;

  const auto tile = [&](int stage, int which) { return Cores<queries>{memory + stage * S::second_at + which * S::tile}; };
  const auto load_tile = [&](int stage, int64_t begin) {
    load<D, warps>(tile(stage, 0), q_head + 2 * begin * a.q.token, 2 * a.q.token, end - begin);
    load<D, warps>(tile(stage, 1), g_head + 2 * begin * a.grad_out.token, 2 * a.grad_out.token, end - begin);
  };
  const int64_t bank = row < 0 ? 0 : row;
  load<D, warps>(k, head_of(a.k, bank, h), 2 * a.k.token, a.L);
  load<D, warps>(v, head_of(a.v, bank, h), 2 * a.v.token, a.L);
  load_tile(0, first);
  hopper::commit_copies();
  clear<D, S::depth>(k), clear<D, S::depth>(v);
  for (int stage = 0; stage < S::stages; ++stage) clear<D, S::depth>(tile(stage, 0)), clear<D, S::depth>(tile(stage, 1));
  for (int key = threadIdx.x; key < KEYS; key += S::threads) bias[key] = key_bias(a, b, key);

  float sums[sets][S::pieces]
            [S::columns / 2];  // dV and dK / scale; with two warpgroups the first has dV, the second dK / scale
  FD_UNROLL
  for (int set = 0; set < sets; ++set) FD_UNROLL
  for (int piece = 0; piece < S::pieces; ++piece) FD_UNROLL
  for (int i = 0; i < S::columns / 2; ++i) sums[set][piece][i] = 0.0f;

  float s[KEYS / 2], changes[KEYS / 2];  // S and dP
  const auto multiply_scores = [&](int stage) {
    const Cores<queries> x = tile(stage, 0), g = tile(stage, 1);
    hopper::begin_products();
    hopper::Operand left = x.over_columns(64 * group), right = k.over_columns(0);
    FD_UNROLL
    for (int i = 0; i < S::depth / 16; ++i)
      hopper::multiply<KEYS, T, false, false>(s, left.after(i * x.next_columns), right.after(i * k.next_columns), i > 0);
    hopper::commit_products();
    left = g.over_columns(64 * group), right = v.over_columns(0);
    FD_UNROLL
    for (int i = 0; i < S::depth / 16; ++i)
      hopper::multiply<KEYS, T, false, false>(changes, left.after(i * g.next_columns), right.after(i * v.next_columns), i > 0);
    hopper::commit_products();
  };
  uint32_t parts[S::keys / 16][4] = {};  // dS as the operand of products: 16 keys each
  // Computes P and dS of the warp's queries.
  const auto weigh = [&] {
    float weights[KEYS / 2], share[2], delta[2] = {};
    uint32_t words[KEYS / 4];
    hopper::wait_products<1>();
    softmax(s, bias, scale, weights, share);
    FD_UNROLL
    for (int i = 0; i < KEYS / 2; ++i) weights[i] *= share[i / 2 % 2];
    FD_UNROLL
    for (int i = 0; i < KEYS / 4; ++i) words[i] = two_of<T>(weights[2 * i], weights[2 * i + 1]);
    store(p, 16 * warp, words);
    hopper::wait_products<0>();
    FD_UNROLL
    for (int i = 0; i < KEYS / 2; ++i) delta[i / 2 % 2] = muladd(weights[i], changes[i], delta[i / 2 % 2]);
    FD_UNROLL
    for (int r = 0; r < 2; ++r) delta[r] = over_row(delta[r], true);
    FD_UNROLL
    for (int i = 0; i < KEYS / 2; ++i) weights[i] *= changes[i] - delta[i / 2 % 2];
    FD_UNROLL
    for (int i = 0; i < KEYS / 4; ++i) parts[i / 4][i % 4] = words[i] = two_of<T>(weights[2 * i], weights[2 * i + 1]);
    store(ds, 16 * warp, words);
  };
  float dq[S::out_columns / 2];
  const auto multiply_dq = [&](int column) {
    hopper::begin_products();
    const hopper::Operand keys = k.over_rows(column);
    FD_UNROLL
    for (int i = 0; i < S::keys / 16; ++i)
      hopper::multiply<S::out_columns, T, true>(dq, parts[i], keys.after(i * k.next_rows), i > 0);
    hopper::commit_products();
  };
  const auto multiply_sums = [&](int stage) {
    hopper::begin_products();
    FD_UNROLL
    for (int set = 0; set < sets; ++set) {
      const bool of_k = set + group;
      const Cores<queries> of_keys = of_k ? ds : p, tokens = tile(stage, 1 - of_k);
      const hopper::Operand left = (S::by_dims ? tokens : of_keys).over_rows(0);
      const hopper::Operand right = (S::by_dims ? of_keys : tokens).over_rows(0);
      FD_UNROLL
      for (int piece = 0; piece < S::pieces; ++piece) FD_UNROLL
      for (int i = 0; i < queries / 16; ++i)
        hopper::multiply<S::columns, T, true, true>(sums[set][piece], left.after(piece * 8 * p.next + i * p.next_rows),
                                                    right.after(i * p.next_rows), true, S::rows - 64 * piece);
    }
    hopper::commit_products();
  };
  unsigned char* const to = static_cast<unsigned char*>(a.grad_q.at) + 2 * (b * a.grad_q.batch + h * a.grad_q.head);
  const auto put_dq = [&](int64_t begin, int column) {
    uint32_t changed[S::out_columns / 4];
    FD_UNROLL
    for (int i = 0; i < S::out_columns / 4; ++i) changed[i] = two_of<T>(dq[2 * i] * a.scale, dq[2 * i + 1] * a.scale);
    unsigned char* const own = out + lane % 16 * S::out_row;
    FD_UNROLL
    for (int i = 0; i + 4 <= S::out_columns / 4; i += 4)
      hopper::store_cores(own + lane / 16 * 16 + 8 * i, changed[i], changed[i + 1], changed[i + 2], changed[i + 3]);
    if constexpr (S::out_columns % 16)
      hopper::store_cores(own + 2 * S::out_columns - 16, changed[S::out_columns / 4 - 2], changed[S::out_columns / 4 - 1]);
    __syncwarp();
    constexpr int width = S::out_columns / 8;  // in vectors of 16 bytes
    FD_UNROLL
    for (int i = 0; i < (16 * width + 31) / 32; ++i) {
      const int one = 32 * i + lane, r = one / width;
      const int64_t query = begin + 16 * warp + r;
      if (one < 16 * width && query < end)
        *reinterpret_cast<uint4*>(to + 2 * (query * a.grad_q.token + column) + one % width * 16) =
            *reinterpret_cast<const uint4*>(out + r * S::out_row + one % width * 16);
    }
    __syncwarp();
  };

  int stage = 0;
  for (int64_t begin = first; begin < end; begin += queries) {
    hopper::wait_copies<0>();
    hopper::publish_to_products();
    __syncthreads();  // the tile is loaded, and no thread uses the previous one any more
    const int64_t next = begin + queries;
    if (S::stages == 2 && next < end) {
      load_tile(1 - stage, next);
      hopper::commit_copies();
    } else if (S::stages == 1 && next < end) {
      const int64_t query = next + threadIdx.x / 2;
      if (query < end)
        for (int line = threadIdx.x % 2 * 128; line < 2 * D; line += 256) {  // cache lines
          hopper::prefetch(q_head + 2 * query * a.q.token + line);
          hopper::prefetch(g_head + 2 * query * a.grad_out.token + line);
        }
    }
    multiply_scores(stage);
    weigh();
    hopper::publish_to_products();
    multiply_dq(0);
    __syncthreads();  // P and dS of all queries are written
    multiply_sums(stage);
    hopper::wait_products<1>();
    put_dq(begin, 0);
    if constexpr (S::out_columns < D) {
      multiply_dq(S::out_columns);
      hopper::wait_products<0>();
      put_dq(begin, S::out_columns);
    }
    hopper::wait_products<0>();
    if (S::stages == 2) {
      stage = 1 - stage;
    } else if (next < end) {
      __syncthreads();  // both warpgroups have finished with the tile
      load_tile(0, next);
      hopper::commit_copies();
    }
  }

  const int first_row = 16 * (warp % 4) + lane / 4, first_column = 2 * (lane % 4);
  const int64_t step = a.H * a.D, across = S::by_dims ? 1 : step, along = S::by_dims ? step : 1;
  const int64_t at = slot_of(a, b * a.chunks + chunk, 0, h, 0) + first_row * across + first_column * along;
  FD_UNROLL
  for (int set = 0; set < sets; ++set) {
    const bool of_k = set + group;
    const float factor = of_k ? a.scale : 1.0f;
    float* const partials = a.partials ? a.partials + at + (of_k ? 0 : a.B * a.chunks * a.L * step) : nullptr;
    T* const whole = static_cast<T*>(of_k ? a.grad_k : a.grad_v) + at;
    FD_UNROLL
    for (int piece = 0; piece < S::pieces; ++piece) FD_UNROLL
    for (int i = 0; i < S::columns / 2; ++i) {
      const int rows = 64 * piece + 8 * (i / 2 % 2), columns = 8 * (i / 4) + i % 2;
      if (first_row + rows >= (S::by_dims ? D : a.L) || first_column + columns >= (S::by_dims ? a.L : D)) continue;
      const float x = sums[set][piece][i] * factor;
      if (partials) partials[rows * across + columns * along] = x;
      else whole[rows * across + columns * along] = from_float<T>(x);
    }
  }
#else
  asm("trap;");
#endif
}

// Adds the partial sums: four elements per thread of the gradient of K (blockIdx.y = 0) or V (blockIdx.y = 1).
template <typename T> __global__ void __launch_bounds__(threads_per_block) add_chunks(CrossAttentionBackward a) {
  const int64_t size = a.L * a.H * a.D, blocks = ceil_div(size, 4 * threads_per_block);
  const int64_t row = blockIdx.x / blocks, at = (blockIdx.x % blocks * threads_per_block + threadIdx.x) * 4;
  if (at >= size) return;
  const float* const partials = a.partials + (blockIdx.y ? a.B * a.chunks * size : 0);
  float total[4];
  sum_of_chunks(a, partials, row, at, total);
  T* const to = static_cast<T*>(blockIdx.y ? a.grad_v : a.grad_k) + row * size + at;
  *reinterpret_cast<uint2*>(to) = uint2{two_of<T>(total[0], total[1]), two_of<T>(total[2], total[3])};
}

template <int D, int KEYS, typename T> const char* launch(const CrossAttentionBackward& a, const Queue& queue) {
  constexpr int shared = Sizes<D, KEYS>::shared;
  if (const char* error =
          fd_error(cudaFuncSetAttribute(attention_gradients<D, KEYS, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)))
    return error;
  FD_LAUNCH((attention_gradients<D, KEYS, T>), unsigned(a.B * a.H * a.chunks), (Sizes<D, KEYS>::threads), shared, queue.stream,
            a);
  if (a.partials) {
    const int64_t blocks = a.R * ceil_div(a.L * a.H * a.D, 4 * threads_per_block);
    FD_LAUNCH(add_chunks<T>, dim3(unsigned(blocks), 2), threads_per_block, 0, queue.stream, a);
  }
  return fd_launch_error();
}

template <typename T> const char* launch(const CrossAttentionBackward& a, const Queue& queue) {
  if (a.L <= 80) {
    if (a.D == 40) return launch<40, 80, T>(a, queue);
    if (a.D == 64) return launch<64, 80, T>(a, queue);
    if (a.D == 80) return launch<80, 80, T>(a, queue);
    if (a.D == 160) return launch<160, 80, T>(a, queue);
  }
  if (a.L <= 120 && a.D == 72) return launch<72, 120, T>(a, queue);
  return "no kernel for these head dims and keys";
}

}  // namespace
}  // namespace fd

const char* cross_attention_backward_cuda(const fd::CrossAttentionBackward& a, const fd::Queue& queue) {
  return a.dtype == fd::Dtype::bf16 ? fd::launch<fd::bf16>(a, queue) : fd::launch<fd::f16>(a, queue);
}

// Whether this build contains the code for Hopper; on other GPUs the kernel traps.
bool cross_attention_backward_cuda_built() {
#ifdef __CUDACC__
  for (int arch : {__CUDA_ARCH_LIST__})
    if (arch == 900) return true;
  return false;
#else
  return true;
#endif
}
