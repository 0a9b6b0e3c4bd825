# SPDX-License-Identifier: Apache-2.0
"""The random-number contract written again with NumPy's uint64 and float64, to compare the package's Philox with."""

from __future__ import annotations

import numpy as np

U32 = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """[..., 4] words in, [..., 4] words out, ten rounds."""
    c = counter.astype(np.uint64)
    k = [key[0], key[1]]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[..., 0], np.uint64(0xCD9E8D57) * c[..., 2]
        c = np.stack(
            [
                (p1 >> SHIFT) ^ c[..., 1] ^ np.uint64(k[0]),
                p1 & U32,
                (p0 >> SHIFT) ^ c[..., 3] ^ np.uint64(k[1]),
                p0 & U32,
            ],
            -1,
        )
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def words(seed: int, step: int, sample: int, blocks: int, stream: int) -> np.ndarray:
    """[blocks, 4] words of one sample."""
    counter = np.zeros((blocks, 4), np.uint64)
    counter[:, 0] = np.arange(blocks)
    counter[:, 1:] = [stream << 16, sample, step % 2**32]
    return philox4x32(counter, (seed % 2**32, (seed >> 32) % 2**32))


def normals(w: np.ndarray, count: int, dtype: type) -> np.ndarray:
    """Box-Muller of [blocks, 4] words in the given precision."""
    u = ((w >> np.uint64(9)).astype(dtype) + dtype(0.5)) * dtype(2.0**-23)
    radius = np.sqrt(dtype(-2) * np.log(u[:, 0::2]))
    angle = dtype(2 * np.pi) * u[:, 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)[:count]


def permute(position: int, n: int, seed: int, epoch: int) -> int:
    half = 1
    while 4**half < n:
        half += 1
    left_right = position
    while True:
        left, right = left_right >> half, left_right % 2**half
        for r in range(6):
            counter = np.array([right, (2 << 16) | r, epoch % 2**32, (epoch >> 32) % 2**32], np.uint64)
            mixed = int(philox4x32(counter, (seed % 2**32, (seed >> 32) % 2**32))[0])
            left, right = right, left ^ (mixed % 2**half)
        left_right = left * 2**half + right
        if left_right < n:
            return left_right


def draw(
    latents: np.ndarray, latent_prompts: np.ndarray, prompts: np.ndarray, coefficients: np.ndarray, replace: np.ndarray,
    seed: int, step: int, *, first: int, batch: int, total: int, pool: int, null: int, null_threshold: int,
    with_replacement: bool, dtype: type,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """x_t, timestep, prompt, target, latent_index, prompt_index, choice; floats in ``dtype``."""
    rows = []
    for sample in range(first, first + batch):
        w = [int(v) for v in words(seed, step, sample, 1, 0)[0]]
        t = (w[0] * len(coefficients)) >> 32
        if with_replacement:
            latent = (int(words(seed, step, sample, 2, 0)[1, 0]) * len(latents)) >> 32
        else:
            epoch, place = divmod(step * total + sample, len(latents))
            latent = permute(place, len(latents), seed, epoch)
        row, choice = int(latent_prompts[latent]), 0
        if w[1] < replace[t]:
            row, choice = (w[2] * pool) >> 32, 1
        if w[3] < null_threshold:
            row, choice = null, 2
        x = latents[latent].astype(dtype)
        z = normals(words(seed, step, sample, (x.size + 3) // 4, 1), x.size, dtype).reshape(x.shape)
        a, b, c, d = coefficients[t].astype(dtype)
        rows.append((a * x + b * z, t, prompts[row].astype(dtype), c * x + d * z, latent, row, choice))
    return tuple(np.stack(column) for column in zip(*rows, strict=True))
