// SPDX-License-Identifier: Apache-2.0
// The interface between the scheduler and the checks of memory accesses.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace fd_emulation {

// A running thread: its position, and the times of the last barriers that it has passed.
struct Runner {
  uint32_t id;  // block << 10 | thread of the block
  uint32_t warp_sync, block_sync, cluster_sync;
  uint32_t rank;  // of its block in the cluster
  const char *stack_begin, *stack_end;
};

constexpr int most_in_cluster = 16;         // blocks
constexpr size_t most_dynamic = 227 << 10;  // bytes of shared memory that a launch may ask for

extern const Runner* runner;  // null while no thread of a kernel runs

uint32_t next_moment();
const void* last_access();  // where in the code
void watch_launch(unsigned cluster);
void watch_cluster(size_t dynamic_bytes, int poison);  // shared memory is empty, its bytes hold the poison
void end_block(unsigned rank);                         // its shared memory is gone

// Ends the launch with an error of the running thread. ``caller``: the address in the code, null if unknown.
[[noreturn]] void fail(const std::string& what, const void* caller = nullptr);

}  // namespace fd_emulation
