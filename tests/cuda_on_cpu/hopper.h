// SPDX-License-Identifier: Apache-2.0
// csrc/hopper.cuh on the CPU. Copies and products are executed immediately; each thread computes its own accumulators. Errors
// that come from their asynchronous execution are left to compute-sanitizer and tests/gpu_simulated.
#pragma once

namespace fd {
namespace hopper {

struct Operand {
  const unsigned char* at;
  int along, across;
  bool swizzled;
  Operand(const void* at, int along, int across, bool swizzled = false)
      : at(static_cast<const unsigned char*>(at)), along(along), across(across), swizzled(swizzled) {}
  Operand after(int bytes) const { return {at + bytes, along, across, swizzled}; }
  template <typename T> float element(int row, int k, bool transposed) const {
    if (swizzled) {
      const int line = transposed ? k : row, column = transposed ? row : k;
      const uintptr_t plain = uintptr_t(at) + line / 8 * across + line % 8 * 128 + column / 64 * along + column % 64 * 2;
      return FD_ISA::to_float(*reinterpret_cast<const T*>(plain ^ (plain >> 7 & 7) << 4));
    }
    const unsigned char* const core = at + row / 8 * across + k / 8 * along;
    const int outer = transposed ? k % 8 : row % 8, inner = transposed ? row % 8 : k % 8;
    return FD_ISA::to_float(*reinterpret_cast<const T*>(core + 16 * outer + 2 * inner));
  }
};

inline void begin_products() {}
inline void commit_products() {}
template <int left> void wait_products() {}
template <int n> void settle(float (&)[n]) {}
inline void publish_to_products() {}
inline void commit_copies() {}
template <int left> void wait_copies() {}
inline void prefetch(const void* at) { static_cast<void>(*static_cast<const volatile unsigned char*>(at)); }

inline void copy_16(void* to, const void* from, int bytes) {
  *static_cast<uint4*>(to) = bytes == 16 ? *static_cast<const uint4*>(from) : uint4{};
}

inline void store_cores(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t words[] = {a, b, c, d};
  const int lane = fd_emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const uint64_t at = __shfl_sync(~0u, reinterpret_cast<uint64_t>(row), 8 * i + lane / 4);
    reinterpret_cast<uint32_t*>(at)[lane % 4] = words[i];
  }
}
inline void store_cores(void* row, uint32_t a, uint32_t b) {
  const uint32_t words[] = {a, b};
  const int lane = fd_emulation::lane();
  for (int i = 0; i < 2; ++i) {
    const uint64_t at = __shfl_sync(~0u, reinterpret_cast<uint64_t>(row), 8 * i + lane / 4);
    reinterpret_cast<uint32_t*>(at)[lane % 4] = words[i];
  }
}

// ``a`` has the thread's two rows; the result is NaN for rows that are not used.
template <int n, typename T, bool b_transposed>
void multiply_rows(float (&d)[n / 2], const float (&a)[2][16], Operand b, bool add) {
  for (int i = 0; i < n / 2; ++i) {
    if (i % 4 > 1) continue;  // with the other row's
    const int column = 8 * (i / 4) + 2 * (fd_emulation::lane() % 4) + i % 2;
    double sums[2] = {add ? d[i] : 0.0, add ? d[i + 2] : 0.0};
    for (int k = 0; k < 16; ++k) {
      const double x = b.element<T>(column, k, b_transposed);
      sums[0] += a[0][k] * x, sums[1] += a[1][k] * x;
    }
    d[i] = float(sums[0]), d[i + 2] = float(sums[1]);
  }
}

template <int n, typename T, bool a_transposed, bool b_transposed>
void multiply(float (&d)[n / 2], Operand a, Operand b, bool add, int rows = 64) {
  float own[2][16];
  for (int r = 0; r < 2; ++r) {
    const int row = int(threadIdx.x / 32 % 4 * 16) + fd_emulation::lane() / 4 + 8 * r;
    for (int k = 0; k < 16; ++k) own[r][k] = row < rows ? a.element<T>(row, k, a_transposed) : __builtin_nanf("");
  }
  multiply_rows<n, T, b_transposed>(d, own, b, add);
}

template <int n, typename T, bool b_transposed> void multiply(float (&d)[n / 2], const uint32_t (&a)[4], Operand b, bool add) {
  float own[2][16];
  const int lane = fd_emulation::lane();
  for (int k = 0; k < 16; ++k)
    for (int r = 0; r < 2; ++r) {  // the words of column k are with lane (k % 8) / 2 of the row
      uint32_t words[2];
      for (int half = 0; half < 2; ++half) words[half] = __shfl_sync(~0u, a[r + 2 * half], lane / 4 * 4 + k % 8 / 2);
      own[r][k] = FD_ISA::to_float(T{uint16_t(words[k / 8] >> 16 * (k % 2))});
    }
  multiply_rows<n, T, b_transposed>(d, own, b, add);
}

}  // namespace hopper
}  // namespace fd
