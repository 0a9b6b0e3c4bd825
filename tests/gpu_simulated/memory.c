// SPDX-License-Identifier: Apache-2.0
// Accesses of an interpreted block to global memory (the host's memory).
#include <stdint.h>
#include <string.h>

// Memory that a kernel may access. For each byte: the block of this launch that wrote it (-1: none), and the block that
// read it (-2: several).
typedef struct {
  uint64_t begin, end;
  int32_t *writer, *reader;
} Region;

enum { IN_ORDER, OUTSIDE, MISALIGNED, RACE, UNEQUAL };

static int access(uint64_t address, int bytes, int write, int block, const Region* regions, int count) {
  if (address % bytes) return MISALIGNED;
  for (const Region* r = regions; r < regions + count; ++r) {
    if (address < r->begin || address + bytes > r->end) continue;
    for (uint64_t i = address - r->begin; i < address - r->begin + bytes; ++i) {
      if (r->writer[i] >= 0 && r->writer[i] != block) return RACE;
      if (write && r->reader[i] != -1 && r->reader[i] != block) return RACE;
      if (write) r->writer[i] = block;
      else r->reader[i] = r->reader[i] == -1 || r->reader[i] == block ? block : -2;
    }
    return IN_ORDER;
  }
  return OUTSIDE;
}

// Each thread whose mask is set copies ``bytes`` bytes between its address and its row of ``data``. Returns an error code,
// with the thread in ``*thread``.
int simulated_access(int threads, const uint64_t* address, const uint8_t* mask, int bytes, int write, uint8_t* data, int block,
                     const Region* regions, int count, int* thread) {
  for (int i = 0; i < threads; ++i) {
    if (!mask[i]) continue;
    const int wrong = access(address[i], bytes, write, block, regions, count);
    if (wrong) {
      *thread = i;
      return wrong;
    }
    uint8_t* row = data + (size_t)i * bytes;
    if (write) memcpy((void*)address[i], row, bytes);
    else memcpy(row, (const void*)address[i], bytes);
  }
  for (int i = 0; write && i < threads; ++i)
    if (mask[i] && memcmp((const void*)address[i], data + (size_t)i * bytes, bytes)) {
      *thread = i;
      return UNEQUAL;
    }
  return IN_ORDER;
}
