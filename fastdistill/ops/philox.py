# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 and the draws from it, in torch int64 arithmetic: the specification of every kernel's random
numbers.

A draw depends only on (seed, step, sample, element), so it is the same in every backend, for any split of the
batch, after any resume, and inside a replayed CUDA graph. Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy
as 1, 2, 3" (SC 2011).

=========  =====================================================================================================
stream     use: counter = (block low 32, stream << 16 | block high 16, sample, step), key = (seed low 32, seed high 32)
=========  =====================================================================================================
0          block 0: word 0 timestep, 1 random prompt?, 2 which random prompt, 3 null prompt?
           block 1: word 0 latent index when drawing with replacement
1          training noise: element e is word e mod 4 of block e div 4, elements in logical order
2          order of the latents in an epoch; counter = (half, 2 << 16 | round, epoch low 32, epoch high 32)
3          initial noise of samplers: elements as in stream 1, *sample* is the row number; from *step* 1 on, noise of
           the draws of a diffusion classifier
4          block 0: words 0 and 1 seed the generator of a stochastic sampler, *sample* is the row number
5          noise of ancestral sampling: elements as in stream 1, *sample* is the row number, *step* the sampler's
6          block 0: word 0 guidance weight of a training sample
7          noise of annealed prompts: as stream 5, elements of a prompt's banks one after another
8          start vectors of subspaces: elements as in stream 1, *sample* is the row number, *step* counts the draws
9          augmentation of a classifier's image: block 0: word 0 turn of its hues
10         centers of clusters: word 0 of block c places center c, *sample* is the number of the start
11         what canonical latents are compared with: as stream 8, step 0 noise, step 1 directions
12         noise and places of corruptions: elements as in stream 1, *sample* is the row number, *step* the corruption
13         random prompts by region: block 0: word 0 cell of the alias table, 1 the cell's own region?, 2 which prompt
=========  =====================================================================================================

The rows of a canonical set beside a batch of images are drawn from streams 0 and 2 with 2**63 added to the seed;
the samples for the measurement of p(t) are drawn in the same way from streams 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHOICE, NOISE, PERMUTATION, INITIAL_NOISE, SAMPLING, ANCESTRAL, GUIDANCE, CONDITION, START = range(9)
AUGMENT, CLUSTERS, CONTROL, CORRUPTION, REGION = range(9, 14)

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_PERMUTATION_ROUNDS = 6


def _high_low(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The 64-bit product of two 32-bit numbers as (high 32, low 32); computed from 16-bit halves, so int64 suffices."""
    p = multiplier * (x & 0xFFFF)
    q = multiplier * (x >> 16) + (p >> 16)
    return q >> 16, ((q & 0xFFFF) << 16) | (p & 0xFFFF)


def philox4x32(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors holding 32-bit words, broadcastable against each other.
        key: two int64 tensors (or 0-dim) holding 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _high_low(_M0, c0)
        high1, low1 = _high_low(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def key_of(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The key of an int64 seed (0-dim or any shape): its low and high 32 bits."""
    return seed & _MASK, (seed >> 32) & _MASK


def words(
    seed: Tensor, step: Tensor, sample: Tensor, block: Tensor, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of a block of a stream; arguments are int64 and broadcast."""
    c1 = (stream << 16) | (block >> 32)
    c0, c1, c2, c3 = torch.broadcast_tensors(block & _MASK, c1, sample & _MASK, step & _MASK)
    return philox4x32((c0, c1, c2, c3), key_of(seed))


def below(word: Tensor, n: int) -> Tensor:
    """A 32-bit word as an integer in [0, n), n <= 2**32: the high 32 bits of word * n."""
    low, high = n & 0xFFFF, n >> 16
    return (word * high + ((word * low) >> 16)) >> 16


def uniform(word: Tensor) -> Tensor:
    """A 32-bit word as ((word >> 9) + 1/2) * 2**-23 in float32: exact, never 0 or 1."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def box_muller(word1: Tensor, word2: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float32 normals of two words: sqrt(-2 ln u1) times cos and sin of 2 pi u2; |z| <= 5.77."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(word1)))
    angle = (2.0 * math.pi) * uniform(word2)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normal(seed: Tensor, step: Tensor, samples: Tensor, shape: Sequence[int], *, stream: int = NOISE) -> Tensor:
    """Standard normals for a batch of samples.

    Args:
        seed: int64, 0-dim. step: int64, 0-dim.
        samples: [B] int64 in [0, 2**32), each sample's index in the global batch (or row number).
        shape: the shape of one sample; elements are numbered in logical (row-major) order.
        stream: ``NOISE`` for training, ``INITIAL_NOISE``, ``ANCESTRAL`` and ``CONDITION`` for samplers.

    Returns:
        [B, *shape] float32 on the device of ``samples``; row i depends on ``samples[i]`` alone.
    """
    count = math.prod(shape)
    block = torch.arange((count + 3) // 4, device=samples.device)
    w0, w1, w2, w3 = words(seed, step, samples[:, None], block, stream)
    z = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=-1)
    return z.flatten(1)[:, :count].reshape(len(samples), *shape)


def permute(position: Tensor, n: int, seed: Tensor, epoch: Tensor) -> Tensor:
    """The keyed permutation of [0, n) that orders an epoch's latents.

    A six-round Feistel network with Philox, over the smallest even number of bits that holds n, is repeated until the
    result is in [0, n).

    Args:
        position: int64 in [0, n). epoch: int64, broadcastable with it. n: 1 <= n < 2**62.

    Returns:
        int64, like ``position``. (The host checks whether another iteration is needed: a few at most, each over the
        whole tensor.)
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = key_of(seed)
    epoch_low, epoch_high = epoch & _MASK, (epoch >> 32) & _MASK

    def feistel(value: Tensor) -> Tensor:
        left, right = value >> half, value & mask
        for turn in range(_PERMUTATION_ROUNDS):
            tag = torch.full_like(right, (PERMUTATION << 16) | turn)
            mixed = philox4x32((right, tag, epoch_low, epoch_high), key)[0]
            left, right = right, left ^ (mixed & mask)
        return (left << half) | right

    value = feistel(position)
    while bool((outside := value >= n).any()):
        value = torch.where(outside, feistel(value), value)
    return value
