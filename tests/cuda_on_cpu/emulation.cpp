// SPDX-License-Identifier: Apache-2.0
// The scheduler of fibers behind emulation.h.
#include "emulation.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "memory.h"

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
  bool orders;    // memory, at this meeting
  uint3 index;
  Runner runner;
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
sigjmp_buf failure;

std::string place() {
  char text[160];
  snprintf(text, sizeof text, "%s, block (%u, %u, %u), thread (%u, %u, %u)", kernel_name, block.x, block.y, block.z, thread.x,
           thread.y, thread.z);
  return text;
}

// ``file.cu:12`` of an address in this library, where addr2line is at hand.
std::string line_of(const void* code) {
  Dl_info info;
  if (!code || !dladdr(code, &info)) return "";
  char command[512], found[512] = "";
  const size_t offset = size_t(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)) - 1;
  snprintf(command, sizeof command, "addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  if (FILE* tool = popen(command, "r")) {
    if (!fgets(found, sizeof found, tool)) found[0] = 0;
    pclose(tool);
  }
  const std::string line = std::string(found).substr(0, strcspn(found, "\n ("));
  return line.empty() || line[0] == '?' ? "" : " (" + line + ")";
}

void on_fault(int signal, siginfo_t* info, void*) {
  if (signal == SIGILL) fail("indexes past an array or breaks an alignment", static_cast<const char*>(info->si_addr) + 1);
  char text[64];
  snprintf(text, sizeof text, "accesses %p, which is out of bounds", info->si_addr);
  fail(text, last_access());
}

void enter() {
  (*body)();
  runner = nullptr;
  current->state = done;
  swapcontext(&current->context, &scheduler);
}

void wait(State state, int line, unsigned mask) {
  current->state = state, current->line = line, current->mask = mask;
  runner = nullptr;
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
      const uint32_t now = next_moment();
      for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Fiber& f = fibers[32 * w + lane];
        f.state = ready;
        if (f.orders) f.runner.warp_sync = now;
      }
    }
  }
  return any;
}

bool release_block() {
  for (const Fiber& f : fibers)
    if (f.state != at_block || f.line != fibers[0].line) return false;
  const uint32_t now = next_moment();
  for (Fiber& f : fibers) f.state = ready, f.runner.block_sync = now;
  return true;
}

// Runs one block; false: an error is set.
bool run_block(std::mt19937_64& random, size_t number) {
  std::vector<size_t> order(fibers.size());
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    order[i] = i;
    f.state = ready, f.meetings = 0;
    f.index = {unsigned(i % block_size.x), unsigned(i / block_size.x % block_size.y),
               unsigned(i / block_size.x / block_size.y)};
    getcontext(&f.context);
    f.runner = {uint32_t(number << 10 | i), 0, 0, stacks[i].get(), stacks[i].get() + stack_bytes};
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
      runner = &current->runner;
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

void fail(const std::string& what, const void* caller) {
  runner = nullptr;
  error = place() + " " + what + line_of(caller);
  siglongjmp(failure, 1);
}

void meet_block(int line) { wait(at_block, line, 0); }

const uint64_t* meet_warp(unsigned mask, uint64_t value, int line, bool orders) {
  Fiber* self = current;
  const size_t at = size_t(self - fibers.data());
  uint64_t* values = warps[at / 32].values[self->meetings++ % 2];
  values[at % 32] = value;
  if (!(mask >> (at % 32) & 1)) fail("is not in the mask of its own shuffle or vote");
  self->orders = orders;
  wait(at_warp, line, mask);
  return values;
}

const char* take_error() {
  static std::string taken;
  taken = error;
  error.clear();
  return taken.empty() ? nullptr : taken.c_str();
}

void launch(const char* kernel, dim3 grid, dim3 size, size_t shared, const std::function<void()>& run) {
  if (!error.empty()) return;
  kernel_name = kernel, body = &run, grid_size = grid, block_size = size;
  const size_t threads = size_t(size.x) * size.y * size.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || blocks >> 19 || shared > most_dynamic) {
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

  watch_launch();
  struct sigaction action = {}, before[3];
  const int signals[3] = {SIGSEGV, SIGBUS, SIGILL};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &before[i]);
  if (sigsetjmp(failure, 1) == 0) {
    for (size_t i : order) {
      block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
      watch_block(shared, launches % 2 ? 0xFF : 0x47);
      if (!run_block(random, i)) break;
    }
  }
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &before[i], nullptr);
}

}  // namespace fd_emulation
