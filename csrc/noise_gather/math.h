// SPDX-License-Identifier: Apache-2.0
// The random draws of one batch row and the mixing with noise: the random-number contract, scalar, for host and device.
//
//   stream 0  block 0: word 0 timestep, 1 whether to replace the prompt, 2 random prompt, 3 whether to use the null prompt
//             block 1: word 0 latent (with replacement)
//   stream 1  noise            stream 2  permutation of an epoch
//   x_t = signal x + noise z      target = target_signal x + target_noise z
#pragma once
#include "philox.h"

namespace fd {

constexpr int most_banks = 8;

// A tensor whose rows are picked by the prompt index and copied as bytes, whatever their dtype.
struct Bank {
  const void* rows;  // [M, bytes]
  void* out;         // [batch, bytes]
  int64_t bytes;     // bytes of a row
};

// A staged bank does not hold all rows but a ring of R batches: sample b of step s is row (s mod R) batch + b.
struct NoiseGather {
  const void* latents;            // [N, row]
  const int64_t* latent_prompts;  // [N]
  Bank banks[most_banks];         // banks[0] has the largest rows
  int bank_count;
  const float* coefficients;                  // [T, 4] signal, noise, target_signal, target_noise
  const int64_t* replace;                     // [T] thresholds floor(p 2^32)
  const int64_t* counter;                     // [2] seed, step
  int64_t latent_count, prompt_count, steps;  // N, M, T
  int64_t latent_ring, prompt_ring;           // R if the latents (prompts) are staged, else 0
  int64_t row;                                // elements of a latent
  int64_t batch, first_sample, global_batch, pool, null_index, null_threshold;
  bool with_replacement;
  Dtype dtype;
  void* x_t;          // [batch, row]
  int64_t* timestep;  // [batch], like the three index tensors below
  void* target;       // [batch, row] or null
  int64_t* latent_index;
  int64_t* prompt_index;
  int64_t* choice;
  int threads;
};

namespace FD_ISA {

// a = quotient n + rest with 0 <= rest < n, n > 0, like divmod in Python.
struct Quotient {
  int64_t quotient, rest;
};
FD_HD Quotient divide(int64_t a, int64_t n) {
  if (uint64_t(a | n) >> 32 == 0) {  // 64-bit division is many times slower
    const uint32_t quotient = uint32_t(a) / uint32_t(n);
    return {quotient, uint32_t(a) - quotient * uint32_t(n)};
  }
  const int64_t quotient = a / n, rest = a - quotient * n;
  return rest < 0 ? Quotient{quotient - 1, rest + n} : Quotient{quotient, rest};
}

// Half the bits of n - 1, rounded up, at least 1: the width of one side of the Feistel network.
FD_HD int half_bits(int64_t n) {
#ifdef __CUDA_ARCH__
  const int bits = 64 - __clzll(n - 1);
#else
  int bits = 0;
  for (uint64_t v = uint64_t(n - 1); v != 0; v >>= 1) ++bits;
#endif
  return bits < 2 ? 1 : (bits + 1) / 2;
}

// Element ``at`` of the permutation of [0, n), n <= 2^32, for (seed, epoch): six Feistel rounds, repeated while the value is
// not below n.
FD_HD int64_t permute(int64_t at, int64_t n, uint64_t seed, uint64_t epoch) {
  const int half = half_bits(n);
  const uint32_t mask = (1u << half) - 1, last = uint32_t(n - 1);
  uint32_t v = uint32_t(at);
  do {
    uint32_t left = v >> half, right = v & mask;
    for (uint32_t round = 0; round < 6; ++round) {
      const Words w = philox4x32(Words{right, stream_permutation << 16 | round, uint32_t(epoch), uint32_t(epoch >> 32)},
                                 uint32_t(seed), uint32_t(seed >> 32));
      const uint32_t next = left ^ (w.x & mask);
      left = right;
      right = next;
    }
    v = left << half | right;
  } while (v > last);
  return v;
}

struct Draw {
  int64_t timestep, latent, prompt, choice;
};

// The words of block 0 of stream 0.
FD_HD Words choice_words(const NoiseGather& a, int64_t b) {
  return draw(uint64_t(a.counter[0]), stream_choice, 0, uint32_t(a.first_sample + b), uint64_t(a.counter[1]));
}

FD_HD Draw draw_row(const NoiseGather& a, int64_t b, const Words& w) {
  const uint64_t seed = uint64_t(a.counter[0]), step = uint64_t(a.counter[1]);
  const int64_t sample = a.first_sample + b;
  Draw d;
  d.timestep = below(w.x, a.steps);
  const int64_t replace = a.replace[d.timestep];  // loaded early: it arrives while the latent is drawn
  if (a.with_replacement) {
    d.latent = below(draw(seed, stream_choice, 1, uint32_t(sample), step).x, a.latent_count);
  } else {
    const Quotient q = divide(int64_t(step) * a.global_batch + sample, a.latent_count);
    d.latent = permute(q.rest, a.latent_count, seed, uint64_t(q.quotient));
  }
  if (int64_t(w.w) < a.null_threshold) {
    d.choice = choice_null;
    d.prompt = a.null_index;
  } else if (int64_t(w.y) < replace) {
    d.choice = choice_random;
    d.prompt = below(w.z, a.pool);
  } else {
    d.choice = choice_paired;
    d.prompt = a.latent_prompts[d.latent];
  }
  return d;
}

// The row to read for sample b: the drawn one, or the sample's row in the ring.
FD_HD int64_t place(const NoiseGather& a, int64_t drawn, int64_t ring, int64_t b) {
  if (ring == 0) return drawn;
  return divide(a.counter[1], ring).rest * a.batch + b;
}

template <typename F> FD_HD F mix(F x, F z, F signal, F noise) { return muladd(signal, x, noise * z); }

}  // namespace FD_ISA
}  // namespace fd
