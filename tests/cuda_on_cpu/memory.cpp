// SPDX-License-Identifier: Apache-2.0
// Checks every memory access of a kernel. The compiler's option -fsanitize=thread inserts a call for each access; the called
// functions are in this file, no sanitizer library is linked. For each byte it stores who wrote and read it last, and when:
//
// a race         two threads access a byte, one of them writes, and there is no barrier between them: __syncthreads for a
//                block, __syncwarp or __syncthreads for a warp, the cluster's barrier for its blocks, __threadfence of the
//                writer for another block. A shuffle orders no memory accesses
// uninitialized  a read of shared memory that no thread of the block has written
// ended          an access to the shared memory of a block of the cluster that has ended
// out of bounds  an access beside a guarded tensor (guard.py), or past the dynamic shared memory
#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

namespace fd_emulation {

const Runner* runner;

namespace {

enum Kind { read, write, atomic };
enum Scope { thread_scope, warp_scope, block_scope, cluster_scope, grid_scope };  // the smallest that holds all who did it
int id_bits[] = {0, 5, 10, 10};

struct Access {
  uint32_t moment;
  uint32_t id : 28, scope : 3, atomically : 1;
};
struct Byte {
  Access written, read;
};
constexpr uint32_t forbidden = 0xFFFFFFFF;  // a moment

constexpr uintptr_t page_bytes = 4096;
constexpr size_t most_pages = 4096;

std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;
struct {
  uintptr_t number;
  Byte* page;
} recent[64];  // pages, by the last bits of their numbers
const void* last_caller;
std::unordered_map<uint32_t, uint32_t> fences;  // moment of each block's last
uint32_t moment, launch_begin, block_begin;
uintptr_t shared_begin, shared_end;  // static shared memory: the thread-local memory of this library
alignas(1024) char dynamic_memory[most_in_cluster * most_dynamic];
size_t dynamic_bytes;
bool ended[most_in_cluster];
unsigned blocks;                     // of a cluster
thread_local volatile char touched;  // without a use, the library's thread-local memory would not be there yet

Byte& byte_at(uintptr_t address) {
  const uintptr_t number = address / page_bytes;
  auto& found = recent[number % 64];
  if (found.number != number) {
    std::unique_ptr<Byte[]>& page = pages[number];
    if (!page) page.reset(new Byte[page_bytes]());
    found = {number, page.get()};
  }
  return found.page[address % page_bytes];
}

uint32_t scope_with(const Access& a) {
  const uint32_t different = a.id ^ runner->id;
  uint32_t scope = a.scope;
  while (scope < grid_scope && different >> id_bits[scope]) ++scope;
  return scope;
}

// Whether an access happened before the running thread passed its last barrier.
bool is_over(const Access& a) {
  switch (scope_with(a)) {
    case thread_scope: return true;
    case warp_scope: return std::max(runner->warp_sync, std::max(runner->block_sync, runner->cluster_sync)) > a.moment;
    case block_scope: return std::max(runner->block_sync, runner->cluster_sync) > a.moment;
    case cluster_scope: return runner->cluster_sync > a.moment;
    default: return a.scope < grid_scope && fences.count(a.id >> 10) && fences[a.id >> 10] > a.moment;
  }
}

std::string others(const Access& a) {
  const char* scopes[] = {"thread ", "a warp with thread ", "threads of its block, one of them ",
                          "threads of its cluster, one of them ", "threads of several blocks, one of them "};
  const std::string block = uint32_t(a.id) >> 10 == runner->id >> 10 ? "" : " of block " + std::to_string(a.id >> 10);
  return scopes[a.scope] + std::to_string(a.id & 1023) + block;
}

// Records and checks an access of the running thread to one byte.
void check(Byte& b, Kind kind, bool shared, const void* caller) {
  const uint32_t begin = shared ? block_begin : launch_begin;
  const bool written = b.written.moment >= begin, was_read = b.read.moment >= begin;
  if (b.written.moment == forbidden) fail("accesses memory out of bounds", caller);
  if (shared && kind != write && !written) fail("reads shared memory that its block has not written", caller);
  if (written && !(kind == atomic && b.written.atomically) && !is_over(b.written))
    fail((kind == read ? "reads" : "writes") + (" without a barrier what was written by " + others(b.written)), caller);
  const bool over = !was_read || is_over(b.read);
  if (kind == read) {
    b.read = {moment, runner->id, over ? thread_scope : scope_with(b.read), false};
  } else {
    if (!over) fail("writes without a barrier what was read by " + others(b.read), caller);
    b.written = {moment, runner->id, thread_scope, kind == atomic};
  }
}

void touch(const void* address, size_t size, Kind kind, const void* caller) {
  const char* at = static_cast<const char*>(address);
  if (!runner || (at >= runner->stack_begin && at < runner->stack_end)) return;
  last_caller = caller;
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  const bool dynamic = at >= dynamic_memory && at < dynamic_memory + sizeof dynamic_memory;
  const size_t place = size_t(at - dynamic_memory);
  if (dynamic && place % most_dynamic + size > dynamic_bytes) fail("accesses shared memory past the end", caller);
  if (dynamic && ended[place / most_dynamic]) fail("accesses shared memory of a block that has ended", caller);
  Byte before = {}, after = {};  // of the last byte: most have the same history as their neighbor
  for (size_t i = 0; i < size; ++i) {
    Byte& b = byte_at(first + i);
    if (i == 0 || memcmp(&b, &before, sizeof b)) {
      before = b;
      check(b, kind, dynamic || (first >= shared_begin && first < shared_end), caller);
      after = b;
    } else {
      b = after;
    }
  }
}

void forget() {
  if (pages.size() < most_pages) return;
  pages.clear();
  memset(recent, 0, sizeof recent);
}

int find_shared(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<ElfW(Addr)>(&find_shared);
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = info->dlpi_phdr[i];
    const ElfW(Addr) start = info->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_TLS) {
      shared_begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      shared_end = shared_begin + part.p_memsz;
    }
    ours = ours || (part.p_type == PT_LOAD && here >= start && here < start + part.p_memsz);
  }
  return ours;
}

}  // namespace

const void* last_access() { return last_caller; }
uint32_t next_moment() { return ++moment; }

void watch_launch(unsigned cluster) {
  blocks = cluster;
  id_bits[cluster_scope] = id_bits[block_scope];
  while (cluster >>= 1) ++id_bits[cluster_scope];
  fences.clear();
  launch_begin = next_moment();
}

void watch_cluster(size_t dynamic, int poison) {
  touched = 1;
  dl_iterate_phdr(find_shared, nullptr);
  memset(reinterpret_cast<void*>(shared_begin), poison, shared_end - shared_begin);
  for (unsigned i = 0; i < blocks; ++i) {
    ended[i] = false;
    memset(dynamic_memory + i * most_dynamic, poison, dynamic_bytes = dynamic);
  }
  block_begin = next_moment();
}

void end_block(unsigned rank) { ended[rank] = true; }

void* dynamic_shared() { return dynamic_memory + runner->rank * most_dynamic; }

const void* dynamic_of(const void* here, unsigned rank) {
  return static_cast<const char*>(here) + (ptrdiff_t(rank) - ptrdiff_t(runner->rank)) * ptrdiff_t(most_dynamic);
}

void fence() { fences[runner->id >> 10] = next_moment(); }

void atomically(const void* address, size_t size) { touch(address, size, atomic, __builtin_return_address(0)); }

}  // namespace fd_emulation

// Forbids all kernels of this library to access these bytes, or allows it again.
extern "C" void fd_forbid(uintptr_t from, uintptr_t until, bool forbid) {
  for (uintptr_t i = from; i < until; ++i) fd_emulation::byte_at(i).written.moment = forbid ? fd_emulation::forbidden : 0;
  if (!forbid) fd_emulation::forget();
}

#define ANNOUNCED(size)                                                              \
  extern "C" void __tsan_read##size(void* at) {                                      \
    fd_emulation::touch(at, size, fd_emulation::read, __builtin_return_address(0));  \
  }                                                                                  \
  extern "C" void __tsan_write##size(void* at) {                                     \
    fd_emulation::touch(at, size, fd_emulation::write, __builtin_return_address(0)); \
  }                                                                                  \
  extern "C" void __tsan_unaligned_read##size(void* at) {                            \
    fd_emulation::touch(at, size, fd_emulation::read, __builtin_return_address(0));  \
  }                                                                                  \
  extern "C" void __tsan_unaligned_write##size(void* at) {                           \
    fd_emulation::touch(at, size, fd_emulation::write, __builtin_return_address(0)); \
  }
ANNOUNCED(1)
ANNOUNCED(2)
ANNOUNCED(4)
ANNOUNCED(8)
ANNOUNCED(16)
extern "C" void __tsan_read_range(void* at, size_t size) {
  fd_emulation::touch(at, size, fd_emulation::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* at, size_t size) {
  fd_emulation::touch(at, size, fd_emulation::write, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
