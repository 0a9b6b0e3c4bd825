// SPDX-License-Identifier: Apache-2.0
// Instructions of Hopper (sm_90a), in functions that an emulation on the CPU can replace: warpgroup products (wgmma) with
// operands in shared memory, asynchronous copies, stores of matrices (stmatrix).
//
// An operand consists of core matrices ("cores"): 8 rows of 16 bytes, contiguous (128 bytes). A product can read an operand
// as it is or transposed, so one copy of a matrix serves both.
#pragma once
#include "common.cuh"

#ifdef FD_HOPPER
#include FD_HOPPER
#else

namespace fd {
namespace hopper {

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// The descriptor of an operand: its address, and the strides in bytes between cores along the dimension that the product
// sums over and across it. A swizzled operand has no cores, but blocks of 64 columns with 128 bytes per row, in which the
// 16-byte part i of row r is stored as part i ^ r % 8. It starts at a multiple of 1024 bytes; its strides are those between
// such blocks and between groups of 8 rows (1024).
struct Operand {
  uint64_t bits;
  __device__ Operand(const void* at, int along, int across, bool swizzled = false)
      : bits(uint64_t(shared_address(at) >> 4 & 0x3FFF) | uint64_t(along >> 4) << 16 | uint64_t(across >> 4) << 32 |
             uint64_t(swizzled) << 62) {}
  __device__ Operand after(int bytes) const {
    Operand moved = *this;
    moved.bits += bytes >> 4;
    return moved;
  }
};

// wgmma.fence: needed before the first product of a series, and after other instructions wrote the products' registers.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most ``left`` series are in flight.
template <int left> __device__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
// Keeps reads of accumulators behind the last wait: if the compiler moved one ahead of it, it would make every product wait.
template <int n> __device__ void settle(float (&d)[n]) {
  FD_UNROLL
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// fence.proxy.async: makes this thread's stores to shared memory visible to products that are issued after a later barrier.
__device__ inline void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies 16 bytes to shared memory asynchronously; writes zeros instead if ``bytes`` is 0 (else it is 16).
__device__ inline void copy_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left> __device__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory"); }
// Prefetches a cache line into L2.
__device__ inline void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Stores four (or two) cores of 8x8 elements. A lane passes its part of each core: row lane / 4, columns 2 (lane % 4) and the
// next. ``row`` of lane 8 i + r is the address for row r of core i.
__device__ inline void store_cores(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
__device__ inline void store_cores(void* row, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(a), "r"(b)
               : "memory");
}

// The accumulators as operands of inline PTX, and their names there.
#define FD_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FD_20(d, i) FD_4(d, i), FD_4(d, i + 4), FD_4(d, i + 8), FD_4(d, i + 12), FD_4(d, i + 16)
#define FD_32(d) FD_20(d, 0), FD_4(d, 20), FD_4(d, 24), FD_4(d, 28)
#define FD_36(d) FD_32(d), FD_4(d, 32)
#define FD_40(d) FD_20(d, 0), FD_20(d, 20)
#define FD_60(d) FD_40(d), FD_20(d, 40)
#define FD_80(d) FD_60(d), FD_20(d, 60)
#define FD_NAMES_20 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define FD_NAMES_32 FD_NAMES_20 ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FD_NAMES_36 FD_NAMES_32 ", %32, %33, %34, %35"
#define FD_NAMES_40 FD_NAMES_36 ", %36, %37, %38, %39"
#define FD_NAMES_60 \
  FD_NAMES_40       \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59"
#define FD_NAMES_80 \
  FD_NAMES_60       \
  ", %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"

// p0 to p6: the numbers of the operands that follow the accumulators.
#define FD_PRODUCT(n, kind, accumulators, names, p0, p1, p2, p3, p4)                                                        \
  asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." kind "." kind \
               " {" names "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 ";\n}"                                          \
               : accumulators                                                                                               \
               : "l"(a.bits), "l"(b.bits), "r"(int(add)), "n"(int(a_transposed)), "n"(int(b_transposed)))
#define FD_PRODUCT_OF_REGISTERS(n, kind, accumulators, names, p0, p1, p2, p3, p4, p5, p6)                                   \
  asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %" #p5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." kind "." kind \
               " {" names "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", p, 1, 1, %" #p6 ";\n}"                    \
               : accumulators                                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(add)), "n"(int(b_transposed)))
#define FD_PRODUCTS(n, kind)                                                                 \
  if constexpr (n == 40) FD_PRODUCT(40, kind, FD_20(d, 0), FD_NAMES_20, 20, 21, 22, 23, 24); \
  if constexpr (n == 64) FD_PRODUCT(64, kind, FD_32(d), FD_NAMES_32, 32, 33, 34, 35, 36);    \
  if constexpr (n == 72) FD_PRODUCT(72, kind, FD_36(d), FD_NAMES_36, 36, 37, 38, 39, 40);    \
  if constexpr (n == 80) FD_PRODUCT(80, kind, FD_40(d), FD_NAMES_40, 40, 41, 42, 43, 44);    \
  if constexpr (n == 120) FD_PRODUCT(120, kind, FD_60(d), FD_NAMES_60, 60, 61, 62, 63, 64);  \
  if constexpr (n == 160) FD_PRODUCT(160, kind, FD_80(d), FD_NAMES_80, 80, 81, 82, 83, 84)
#define FD_PRODUCTS_OF_REGISTERS(n, kind)                                                                         \
  if constexpr (n == 40) FD_PRODUCT_OF_REGISTERS(40, kind, FD_20(d, 0), FD_NAMES_20, 20, 21, 22, 23, 24, 25, 26); \
  if constexpr (n == 64) FD_PRODUCT_OF_REGISTERS(64, kind, FD_32(d), FD_NAMES_32, 32, 33, 34, 35, 36, 37, 38);    \
  if constexpr (n == 72) FD_PRODUCT_OF_REGISTERS(72, kind, FD_36(d), FD_NAMES_36, 36, 37, 38, 39, 40, 41, 42);    \
  if constexpr (n == 80) FD_PRODUCT_OF_REGISTERS(80, kind, FD_40(d), FD_NAMES_40, 40, 41, 42, 43, 44, 45, 46);    \
  if constexpr (n == 160) FD_PRODUCT_OF_REGISTERS(160, kind, FD_80(d), FD_NAMES_80, 80, 81, 82, 83, 84, 85, 86)

// d = a b, or d + a b if ``add``: 64 rows, n columns, a sum over 16, by a warpgroup, asynchronously. T is bf16 or f16.
// Accumulator i of a thread is row 16 (warp % 4) + lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (lane % 4) + i % 2. The
// dimension of the sum is contiguous in a and in b, or strided if transposed. Only the first ``rows`` rows of d are used.
template <int n, typename T, bool a_transposed, bool b_transposed>
__device__ void multiply(float (&d)[n / 2], Operand a, Operand b, bool add, int rows = 64) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (__is_same(T, bf16)) {
    FD_PRODUCTS(n, "bf16");
  } else {
    FD_PRODUCTS(n, "f16");
  }
#endif
}

// The same with a in registers: laid out like the accumulators, with two columns in a word.
template <int n, typename T, bool b_transposed>
__device__ void multiply(float (&d)[n / 2], const uint32_t (&a)[4], Operand b, bool add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (__is_same(T, bf16)) {
    FD_PRODUCTS_OF_REGISTERS(n, "bf16");
  } else {
    FD_PRODUCTS_OF_REGISTERS(n, "f16");
  }
#endif
}

}  // namespace hopper
}  // namespace fd
#endif
