// SPDX-License-Identifier: Apache-2.0
// The scheduler of fibers behind emulation.h.
#include "emulation.h"

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace fd_emulation {

uint3 thread, block;
dim3 block_size, grid_size;

namespace {

constexpr size_t stack_bytes = 64 << 10;

enum State { ready, at_block, at_warp, done };

struct Fiber {
  ucontext_t context;
  State state;
  int line;       // of the barrier where it waits
  unsigned mask;  // of the lanes that it waits for
  int meetings;   // of its warp so far
  uint3 index;
};

struct Warp {
  uint64_t values[2][32];  // two, as a fast lane may meet again before a slow one has read
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<std::unique_ptr<char[]>> stacks;
ucontext_t scheduler;
Fiber* current;
const std::function<void()>* body;
std::string error;
const char* kernel_name;
uint64_t launches = 0;
sigjmp_buf fault;
void* fault_address;

thread_local volatile char touched;  // without a use, the module's thread-local memory would not be there yet

// Fills all shared memory of this module.
int poison_shared(dl_phdr_info* info, size_t, void* value) {
  const auto here = reinterpret_cast<ElfW(Addr)>(&poison_shared);
  size_t bytes = 0;
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = info->dlpi_phdr[i];
    const ElfW(Addr) start = info->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_TLS) bytes = part.p_memsz;
    ours = ours || (part.p_type == PT_LOAD && here >= start && here < start + part.p_memsz);
  }
  if (ours) memset(info->dlpi_tls_data, *static_cast<int*>(value), bytes);
  return ours;
}

std::string place() {
  char text[160];
  snprintf(text, sizeof text, "%s, block (%u, %u, %u), thread (%u, %u, %u)", kernel_name, block.x, block.y, block.z, thread.x,
           thread.y, thread.z);
  return text;
}

void on_fault(int, siginfo_t* info, void*) {
  fault_address = info->si_addr;
  siglongjmp(fault, 1);
}

void enter() {
  (*body)();
  current->state = done;
  swapcontext(&current->context, &scheduler);
}

void wait(State state, int line, unsigned mask) {
  current->state = state, current->line = line, current->mask = mask;
  swapcontext(&current->context, &scheduler);
}

unsigned lanes_of(size_t warp) {
  const size_t left = fibers.size() - 32 * warp;
  return left >= 32 ? ~0u : (1u << left) - 1;
}

// Lets the lanes go on whose whole mask waits at one place. Returns whether there were any.
bool release_warps() {
  bool any = false;
  for (size_t w = 0; w < warps.size(); ++w) {
    for (size_t i = 32 * w; i < std::min(fibers.size(), 32 * (w + 1)); ++i) {
      if (fibers[i].state != at_warp) continue;
      const unsigned mask = fibers[i].mask & lanes_of(w);
      bool all = true;
      for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const Fiber& other = fibers[32 * w + lane];
        all = all && other.state == at_warp && other.line == fibers[i].line && other.mask == fibers[i].mask;
      }
      if (!all) continue;
      any = true;
      for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) fibers[32 * w + lane].state = ready;
    }
  }
  return any;
}

bool release_block() {
  for (const Fiber& f : fibers)
    if (f.state != at_block || f.line != fibers[0].line) return false;
  for (Fiber& f : fibers) f.state = ready;
  return true;
}

// Runs one block; false: an error is set.
bool run_block(std::mt19937_64& random, int poison) {
  touched = 1;
  dl_iterate_phdr(poison_shared, &poison);
  std::vector<size_t> order(fibers.size());
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    order[i] = i;
    f.state = ready, f.meetings = 0;
    f.index = {unsigned(i % block_size.x), unsigned(i / block_size.x % block_size.y),
               unsigned(i / block_size.x / block_size.y)};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks[i].get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    if (launches % 3 == 1) std::reverse(order.begin(), order.end());
    else if (launches % 3 == 2) std::shuffle(order.begin(), order.end(), random);
    for (size_t i : order) {
      if (fibers[i].state != ready) continue;
      current = &fibers[i];
      thread = current->index;
      swapcontext(&scheduler, &current->context);
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == done; })) return true;
    if (std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == ready; })) continue;
    if (release_warps() || release_block()) continue;
    for (const Fiber& f : fibers) {
      if (f.state == done) continue;
      thread = f.index;
      error = place() + " waits at " + (f.state == at_block ? "__syncthreads" : "a warp's meeting") + " in line " +
              std::to_string(f.line) + ", where not all that it waits for arrive";
      return false;
    }
  }
}

}  // namespace

void meet_block(int line) { wait(at_block, line, 0); }

const uint64_t* meet_warp(unsigned mask, uint64_t value, int line) {
  Fiber* self = current;
  const size_t at = size_t(self - fibers.data());
  uint64_t* values = warps[at / 32].values[self->meetings++ % 2];
  values[at % 32] = value;
  if (!(mask >> (at % 32) & 1)) error = place() + " is not in the mask of its own shuffle or vote";
  wait(at_warp, line, mask);
  return values;
}

const char* take_error() {
  static std::string taken;
  taken = error;
  error.clear();
  return taken.empty() ? nullptr : taken.c_str();
}

void launch(const char* kernel, dim3 grid, dim3 size, const std::function<void()>& run) {
  if (!error.empty()) return;
  kernel_name = kernel, body = &run, grid_size = grid, block_size = size;
  const size_t threads = size_t(size.x) * size.y * size.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0) {
    error = std::string(kernel) + ": invalid configuration";
    return;
  }
  ++launches;
  fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp{});
  while (stacks.size() < threads) stacks.emplace_back(new char[stack_bytes]);
  std::mt19937_64 random(launches);
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = i;
  if (launches % 2) std::shuffle(order.begin(), order.end(), random);
  const int poison = launches % 2 ? 0xFF : 0x47;

  struct sigaction action = {}, segv, bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);
  if (sigsetjmp(fault, 1) == 0) {
    for (size_t i : order) {
      block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
      if (!run_block(random, poison)) break;
    }
  } else {
    char text[64];
    snprintf(text, sizeof text, " accesses %p, which is out of bounds", fault_address);
    error = place() + text;
  }
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
}

}  // namespace fd_emulation
