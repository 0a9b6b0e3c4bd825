// SPDX-License-Identifier: Apache-2.0
// What the kernels of cross_attention for Hopper share: matrices in shared memory as warpgroup products take them, their way
// from and to memory, and the softmax of scores in registers.
#pragma once
#include "cross_attention/math.h"
#include "hopper.cuh"

namespace fd {
namespace {

using namespace FD_ISA;

constexpr int most = 232448;  // bytes of shared memory

FD_HD constexpr int up(int n, int to) { return (n + to - 1) / to * to; }

// Shared memory, of which swizzled matrices start at multiples of 1024 bytes.
struct alignas(1024) Shared {
  unsigned char bytes[1024];
};

// A matrix with ``rows`` rows in shared memory, an operand of products that sum over its columns or over its rows. offset: in
// bytes, of an element whose column is a multiple of 8. moved: the offset of an element some rows (a multiple of 8) and columns
// (a multiple of 32) further on. after_columns(i), after_rows(i): bytes from an operand to the one 16 i columns or rows further
// on. next_64: the same for 64 columns.
template <int rows, bool swizzled> struct Matrix;

// In cores of 8 rows of 16 bytes, 8 columns after 8 columns. A product that sums over rows seems to read the same row of eight
// cores at a time: if these are not apart, all in the same banks. (So on an H200 it took 2.5 times the modelled clocks. That it
// takes less with cores apart has not been measured.)
template <int rows> struct Matrix<rows, false> {
  unsigned char* at;
  static constexpr int core = 128, apart = 16, next = rows * 16 + apart, next_64 = 8 * next;
  static FD_HD constexpr int bytes(int columns) { return columns / 8 * next; }
  static FD_HD constexpr int after_columns(int i) { return 2 * i * next; }
  static FD_HD constexpr int after_rows(int i) { return 2 * i * core; }
  static FD_HD unsigned moved(unsigned own, int row, int column) { return own + row / 8 * core + column / 8 * next; }
  static FD_HD int offset(int row, int column) { return column / 8 * next + row / 8 * core + row % 8 * 16; }
  __device__ unsigned char* of(int row, int column) const { return at + offset(row, column); }
  __device__ hopper::Operand over_columns(int row) const { return {of(row, 0), next, core}; }
  __device__ hopper::Operand over_rows(int column) const { return {of(0, column), core, next}; }
};

// 64 columns after 64 columns, in which rows are apart by 128 bytes, and their parts of 16 bytes swizzled.
template <int rows> struct Matrix<rows, true> {
  unsigned char* at;
  static constexpr int next_64 = rows * 128;
  static FD_HD constexpr int bytes(int columns) { return up(columns, 64) / 64 * next_64; }
  static FD_HD constexpr int after_columns(int i) { return i / 4 * next_64 + i % 4 * 32; }
  static FD_HD constexpr int after_rows(int i) { return i * 2048; }
  static FD_HD unsigned moved(unsigned own, int row, int column) {
    return (own ^ column % 64 * 2) + row * 128 + column / 64 * next_64;
  }
  static FD_HD int offset(int row, int column) { return column / 64 * next_64 + row * 128 + (column / 8 % 8 ^ row % 8) * 16; }
  __device__ unsigned char* of(int row, int column) const { return at + offset(row, column); }
  __device__ hopper::Operand over_columns(int row) const { return {at + row * 128, next_64, 1024, true}; }
  __device__ hopper::Operand over_rows(int column) const { return {at + column / 64 * next_64, next_64, 1024, true}; }
};

// Keeps a number in a register: the compiler would rather compute it again in every turn of a loop.
template <typename T> __device__ void keep(T& x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(x));
  else asm volatile("" : "+r"(x));
#endif
}

// Tiles of ``rows`` rows of ``dims`` elements of a head: eight rows of a warp at a time, 64 bytes of each. Rows from ``left``
// on are filled with zeros.
template <int dims, int warps, int rows, bool swizzled> struct Loader {
  const unsigned char* at;  // the thread's part of the next tile
  int64_t step;
  int left;
  unsigned place;
  __device__ Loader(const unsigned char* head, int64_t token, int64_t count) : step(2 * token), left(int(count)) {
    const int lane = threadIdx.x % 32, first = 8 * (threadIdx.x / 32) + lane % 8;
    at = head + first * step + lane / 8 * 16;
    left -= first;
    place = unsigned(Matrix<rows, swizzled>::offset(first, lane / 8 * 8));
    keep(at), keep(place);
  }
  __device__ void load(unsigned char* to) {
    FD_UNROLL
    for (int eight = 0; eight < rows; eight += 8 * warps) {
      if (rows % (8 * warps) && eight + 8 * int(threadIdx.x / 32) >= rows) break;
      const unsigned char* const source = at + eight * step;
      FD_UNROLL
      for (int part = 0; part < dims / 8; part += 4)
        if (part + 4 <= dims / 8 || int(threadIdx.x % 32) / 8 < dims / 8 - part)
          hopper::copy_16(to + Matrix<rows, swizzled>::moved(place, eight, 8 * part), source + part * 16,
                          eight < left ? 16 : 0);
    }
    at += rows * step, left -= rows;
  }
};

// Fills the columns that are not loaded with zeros.
template <int dims, int columns, int rows, bool swizzled> __device__ void clear(Matrix<rows, swizzled> to) {
  FD_UNROLL
  for (int column = dims; column < columns; column += 8)
    for (int row = threadIdx.x; row < rows; row += blockDim.x) *reinterpret_cast<uint4*>(to.of(row, column)) = uint4{};
}

// Fills what is between columns with zeros, where another matrix's product reads it.
template <int columns, int rows> __device__ void clear_between(Matrix<rows, false> to) {
  if (threadIdx.x < columns / 8) *reinterpret_cast<uint4*>(to.at + (threadIdx.x + 1) * to.next - to.apart) = uint4{};
}
template <int columns, int rows> __device__ void clear_between(Matrix<rows, true>) {}

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

// Exponents of the weights, and their maxima, for both rows of a thread. (Only products write the registers of a product: any
// other write would have to wait for all products in flight.)
template <int n>
__device__ void scale_scores(const float (&s)[n], const float* bias, float scale, float (&exponents)[n], float (&top)[2]) {
  top[0] = top[1] = minus_infinity();
  FD_UNROLL
  for (int i = 0; i < n; i += 4) {
    const float2 added = *reinterpret_cast<const float2*>(bias + 2 * i + 2 * (threadIdx.x % 4));
    FD_UNROLL
    for (int j = i; j < i + 4; ++j) exponents[j] = muladd(s[j], scale, j % 2 ? added.y : added.x);
    FD_UNROLL
    for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], fmaxf(exponents[i + 2 * r], exponents[i + 2 * r + 1]));
  }
  FD_UNROLL
  for (int r = 0; r < 2; ++r) top[r] = finite(over_row(top[r], false));
}

// Weights of exponents, in their place and unscaled; their scale; the sums of scaled weights times ``change``.
template <int n, typename F>
__device__ void softmax(float (&weights)[n], const float (&top)[2], float (&share)[2], float (&delta)[2], const F& change) {
  float total[2] = {};
  FD_UNROLL
  for (int i = 0; i < n; ++i) {
    weights[i] = power_of_two(weights[i] - top[i / 2 % 2]);
    total[i / 2 % 2] += weights[i];
    delta[i / 2 % 2] = muladd(weights[i], change(i), delta[i / 2 % 2]);
  }
  FD_UNROLL
  for (int r = 0; r < 2; ++r) share[r] = inverse(over_row(total[r], true)), delta[r] = over_row(delta[r], true) * share[r];
}

// Of a warp's 16 rows, as words of two columns, into a matrix.
template <int words, int rows, bool swizzled>
__device__ void store(Matrix<rows, swizzled> to, int row, const uint32_t (&x)[words]) {
  const int own = row + threadIdx.x % 16, column = threadIdx.x % 32 / 16 * 8;
  FD_UNROLL
  for (int i = 0; i + 4 <= words; i += 4) hopper::store_cores(to.of(own, 4 * i + column), x[i], x[i + 1], x[i + 2], x[i + 3]);
  if constexpr (words % 4 == 2) hopper::store_cores(to.of(own, 4 * (words - 2) + column), x[words - 2], x[words - 1]);
}

// Of four lanes' words, those of the own place in each.
__device__ uint4 of_four(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t x[4] = {a, b, c, d};
  FD_UNROLL
  for (int bits = 1; bits < 4; bits *= 2) {
    const bool upper = threadIdx.x & bits;
    FD_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & bits) continue;
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, upper ? x[i] : x[i + bits], bits);
      if (upper) x[i] = other;
      else x[i + bits] = other;
    }
  }
  return {x[0], x[1], x[2], x[3]};
}

// A warp's 16 rows of ``columns`` accumulators to memory, 16 bytes of a lane at a time, rows from ``left`` on not: through
// shared memory of the warp, or without any by shuffles, which are more instructions.
template <int columns> struct Out {
  static constexpr int row = (columns / 8 | 1) * 16, bytes = 16 * row;  // rows in different banks
};
template <typename T, int columns, bool by_shuffles, typename F> __device__ void put(unsigned char* to, int64_t step, int left,
                                                                                     const float (&x)[columns / 2],
                                                                                     const F& factor, unsigned char* shared) {
  const int lane = threadIdx.x % 32, row = lane / 4;
  const auto word = [&](int group, int r) {
    return pair_of<T>(x[4 * group + 2 * r] * factor(r), x[4 * group + 2 * r + 1] * factor(r));
  };
  constexpr int groups = columns / 8;
  if constexpr (!by_shuffles) {
    unsigned char* const own = shared + lane % 16 * Out<columns>::row;
    FD_UNROLL
    for (int i = 0; i + 2 <= groups; i += 2)
      hopper::store_cores(own + lane / 16 * 16 + 16 * i, word(i, 0), word(i, 1), word(i + 1, 0), word(i + 1, 1));
    if constexpr (groups % 2) hopper::store_cores(own + 16 * (groups - 1), word(groups - 1, 0), word(groups - 1, 1));
    __syncwarp();
    FD_UNROLL
    for (int i = 0; i < (16 * groups + 31) / 32; ++i) {
      const int one = 32 * i + lane, r = one / groups, part = one % groups * 16;
      if (one < 16 * groups && r < left)
        *reinterpret_cast<uint4*>(to + r * step + part) =
            *reinterpret_cast<const uint4*>(shared + r * Out<columns>::row + part);
    }
    __syncwarp();
    return;
  }
  unsigned char* const rows[2] = {to + row * step, to + (row + 8) * step};
  FD_UNROLL
  for (int i = 0; i + 4 <= groups; i += 4) FD_UNROLL
  for (int r = 0; r < 2; ++r) {
    const uint4 own = of_four(word(i, r), word(i + 1, r), word(i + 2, r), word(i + 3, r));
    if (row + 8 * r < left) *reinterpret_cast<uint4*>(rows[r] + 16 * (i + lane % 4)) = own;
  }
  if constexpr (groups % 4 >= 2) {
    constexpr int i = groups / 4 * 4;
    const int r = lane % 2;
    const uint4 own = of_four(word(i, 0), word(i, 1), word(i + 1, 0), word(i + 1, 1));
    if (row + 8 * r < left) *reinterpret_cast<uint4*>((r ? rows[1] : rows[0]) + 16 * (i + lane % 4 / 2)) = own;
  }
  if constexpr (groups % 2) {  // an even lane has the first row's 8 bytes, an odd one the second's
    constexpr int i = groups - 1;
    const int r = lane % 2;
    const uint32_t first = word(i, 0), second = word(i, 1), other = __shfl_xor_sync(0xFFFFFFFFu, r ? first : second, 1);
    const uint2 own = r ? uint2{other, second} : uint2{first, other};
    if (row + 8 * r < left) *reinterpret_cast<uint2*>((r ? rows[1] : rows[0]) + 16 * i + lane % 4 / 2 * 8) = own;
  }
}

}  // namespace
}  // namespace fd
