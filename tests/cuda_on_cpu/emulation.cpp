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

enum State { ready, at_block, at_warp, at_cluster, done };

struct Fiber {
  ucontext_t context;
  State state;
  int line;             // of the barrier where it waits
  unsigned mask;        // of the lanes that it waits for
  int meetings;         // of its warp so far
  bool orders;          // memory, at this meeting
  int arrivals, waits;  // at the cluster's barrier
  uint3 index, block;
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

// The source line (``file.cu:12``) of an address in this library, if addr2line is installed.
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

// A range of fibers or warps: those of the block with this rank.
struct Range {
  size_t begin, end;
};
Range of_rank(size_t rank, size_t each) { return {rank * each, (rank + 1) * each}; }
size_t threads_each, warps_each;  // of a block

// Resumes the lanes of a block if all lanes of their mask wait at the same place. Returns whether there were any.
bool release_warps(size_t rank) {
  bool any = false;
  const Range all = of_rank(rank, threads_each);
  for (size_t first = all.begin; first < all.end; first += 32) {
    const size_t count = std::min<size_t>(32, all.end - first);
    for (size_t i = first; i < first + count; ++i) {
      if (fibers[i].state != at_warp) continue;
      const unsigned mask = fibers[i].mask & (count == 32 ? ~0u : (1u << count) - 1);
      bool whole = true;
      for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const Fiber& other = fibers[first + lane];
        whole = whole && other.state == at_warp && other.line == fibers[i].line && other.mask == fibers[i].mask;
      }
      if (!whole) continue;
      any = true;
      const uint32_t now = next_moment();
      for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Fiber& f = fibers[first + lane];
        f.state = ready;
        if (f.orders) f.runner.warp_sync = now;
      }
    }
  }
  return any;
}

bool release_block(size_t rank) {
  const Range all = of_rank(rank, threads_each);
  for (size_t i = all.begin; i < all.end; ++i)
    if (fibers[i].state != at_block || fibers[i].line != fibers[all.begin].line) return false;
  const uint32_t now = next_moment();
  for (size_t i = all.begin; i < all.end; ++i) fibers[i].state = ready, fibers[i].runner.block_sync = now;
  return true;
}

// Resumes the threads that wait at the cluster's barrier if all threads have arrived.
bool release_cluster() {
  int least = fibers[0].arrivals;
  for (const Fiber& f : fibers) least = std::min(least, f.arrivals);
  bool any = false;
  const uint32_t now = next_moment();
  for (Fiber& f : fibers) {
    if (f.state != at_cluster || f.arrivals > least) continue;
    any = true, f.state = ready, f.runner.cluster_sync = now;
  }
  return any;
}

bool all_of(const Range& range, State state) {
  return std::all_of(&fibers[range.begin], &fibers[range.begin] + (range.end - range.begin),
                     [=](const Fiber& f) { return f.state == state; });
}

// Runs the threads of one block until all of them wait or have ended.
void run_block(size_t rank, const std::vector<size_t>& order) {
  const Range all = of_rank(rank, threads_each);
  do {
    bool again = true;
    while (again) {
      again = false;
      for (size_t i : order) {
        Fiber& f = fibers[all.begin + i];
        if (f.state != ready) continue;
        again = true, current = &f;
        thread = f.index, block = f.block;
        runner = &f.runner;
        swapcontext(&scheduler, &f.context);
      }
    }
  } while (release_warps(rank) || release_block(rank));
  if (all_of(all, done)) end_block(unsigned(rank));
}

// Runs the blocks of one cluster. Returns false after an error.
bool run_cluster(std::mt19937_64& random, size_t first, size_t ranks) {
  std::vector<size_t> order(threads_each);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    const size_t rank = i / threads_each, t = i % threads_each, number = first + rank;
    order[t] = t;
    f.state = ready, f.meetings = f.arrivals = f.waits = 0;
    f.index = {unsigned(t % block_size.x), unsigned(t / block_size.x % block_size.y),
               unsigned(t / block_size.x / block_size.y)};
    f.block = {unsigned(number % grid_size.x), unsigned(number / grid_size.x % grid_size.y),
               unsigned(number / grid_size.x / grid_size.y)};
    getcontext(&f.context);
    f.runner = {uint32_t(number << 10 | t), 0, 0, 0, uint32_t(rank), stacks[i].get(), stacks[i].get() + stack_bytes};
    f.context.uc_stack.ss_sp = stacks[i].get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  do {
    if (launches % 3 == 1) std::reverse(order.begin(), order.end());
    else if (launches % 3 == 2) std::shuffle(order.begin(), order.end(), random);
    for (size_t i = 0; i < ranks; ++i) run_block(launches % 2 ? i : ranks - 1 - i, order);
    if (all_of({0, fibers.size()}, done)) return true;
  } while (release_cluster());
  for (const Fiber& f : fibers) {
    if (f.state == done) continue;
    thread = f.index, block = f.block;
    const char* barrier = f.state == at_block  ? "__syncthreads"
                          : f.state == at_warp ? "a warp's meeting"
                                               : "the cluster's barrier";
    error =
        place() + " waits at " + barrier + " in line " + std::to_string(f.line) + ", where not all that it waits for arrive";
    return false;
  }
  return true;
}

}  // namespace

void fail(const std::string& what, const void* caller) {
  runner = nullptr;
  error = place() + " " + what + line_of(caller);
  siglongjmp(failure, 1);
}

void meet_block(int line) { wait(at_block, line, 0); }

unsigned rank_in_cluster() { return current->runner.rank; }

void arrive_at_cluster() { ++current->arrivals; }

void wait_for_cluster(int line) {
  if (current->waits++ == current->arrivals)
    fail("waits at the cluster's barrier in line " + std::to_string(line) + ", where not all that it waits for arrive");
  wait(at_cluster, line, 0);
}

const uint64_t* meet_warp(unsigned mask, uint64_t value, int line, bool orders) {
  Fiber* self = current;
  const size_t at = size_t(self - fibers.data()) % threads_each;
  uint64_t* values = warps[self->runner.rank * warps_each + at / 32].values[self->meetings++ % 2];
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

void launch(const char* kernel, dim3 grid, dim3 size, size_t shared, const std::function<void()>& run, unsigned cluster) {
  if (!error.empty()) return;
  kernel_name = kernel, body = &run, grid_size = grid, block_size = size;
  const size_t threads = size_t(size.x) * size.y * size.z, blocks = size_t(grid.x) * grid.y * grid.z;
  const bool fits = cluster > 0 && cluster <= most_in_cluster && (cluster & (cluster - 1)) == 0 && grid.x % cluster == 0;
  if (threads == 0 || threads > 1024 || blocks == 0 || blocks >> 18 || shared > most_dynamic || !fits) {
    error = std::string(kernel) + ": invalid configuration";
    return;
  }
  ++launches;
  threads_each = threads, warps_each = (threads + 31) / 32;
  fibers.resize(cluster * threads);
  warps.assign(cluster * warps_each, Warp{});
  while (stacks.size() < fibers.size()) stacks.emplace_back(new char[stack_bytes]);
  std::mt19937_64 random(launches);
  std::vector<size_t> order(blocks / cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i * cluster;
  if (launches % 2) std::shuffle(order.begin(), order.end(), random);

  watch_launch(cluster);
  struct sigaction action = {}, before[3];
  const int signals[3] = {SIGSEGV, SIGBUS, SIGILL};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &before[i]);
  if (sigsetjmp(failure, 1) == 0) {
    for (size_t i : order) {
      watch_cluster(shared, launches % 2 ? 0xFF : 0x47);
      if (!run_cluster(random, i, cluster)) break;
    }
  }
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &before[i], nullptr);
}

}  // namespace fd_emulation
