# SPDX-License-Identifier: Apache-2.0
"""The draw of a training batch in Triton.

Grid      (batch rows, chunks): a program draws its row (seven Philox blocks), makes the noise of ELEMENTS elements of
          its latent and copies as large a share of its prompt; the first of a row writes the indices
Traffic   latent read, x_t written (and target where wanted), prompt row read and written; noise never in memory
Precision integers exact; noise, mixing and coefficients in fp32, rounded once to the dtype of the latents; the same
          operations as csrc/philox.h
Limits    contiguous banks and outputs; a prompt row outside of the bank comes out as NaN
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import CHOICE, below, normals, permute, philox_words

ELEMENTS = 2048
COPIED = 4096  # elements of a prompt in a program at most
WARPS = 4


@triton.jit
def _draw(
    latents, latent_prompts, prompts, coefficients, replace, counter, x_t, timestep, prompt, target, latent_index,
    prompt_index, choice, rows, texts, steps, row, prompt_row, first_sample, global_batch, pool, null_index,
    null_threshold, half, chunks, share, REPLACEMENT: tl.constexpr, TARGET: tl.constexpr, ELEMENTS: tl.constexpr,
    COPIED: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    seed, step = tl.load(counter), tl.load(counter + 1)
    sample = first_sample + b
    w0, w1, w2, w3 = philox_words(seed, step, sample, tl.full((), 0, tl.int64), CHOICE)
    t = below(w0, steps)
    if REPLACEMENT:
        v0, _, _, _ = philox_words(seed, step, sample, tl.full((), 1, tl.int64), CHOICE)
        latent = below(v0, rows)
    else:
        position = step * global_batch + sample
        at = position % rows
        at = tl.where(at < 0, at + rows, at)  # floor, as Python divides
        latent = permute(at, rows, half, seed, (position - at) // rows)
    is_null = w3.to(tl.int64) < null_threshold
    is_random = w1.to(tl.int64) < tl.load(replace + t)
    text = tl.where(is_random, below(w2, pool), tl.load(latent_prompts + latent))
    text = tl.where(is_null, null_index, text)
    if chunk == 0:
        tl.store(timestep + b, t)
        tl.store(latent_index + b, latent)
        tl.store(prompt_index + b, text)
        tl.store(choice + b, tl.where(is_null, 2, tl.where(is_random, 1, 0)).to(tl.int64))

    first = chunk * ELEMENTS
    if first < row:
        e = first + tl.arange(0, ELEMENTS)
        inside = e < row
        x = tl.load(latents + latent * row + e, mask=inside, other=0.0).to(tl.float32)
        z = normals(seed, step, sample, first, ELEMENTS)
        c = coefficients + 4 * t
        mixed = tl.fma(tl.load(c), x, tl.load(c + 1) * z)
        tl.store(x_t + b * row + e, mixed.to(x_t.dtype.element_ty), mask=inside)
        if TARGET:
            wanted = tl.fma(tl.load(c + 2), x, tl.load(c + 3) * z)
            tl.store(target + b * row + e, wanted.to(target.dtype.element_ty), mask=inside)

    end = tl.minimum((chunk + 1) * share, prompt_row)
    there = tl.where(text < 0, 0, tl.where(text < texts, end, 0))  # nothing of a row that is not in the bank
    for start in range(chunk * share, end, COPIED):
        e = start + tl.arange(0, COPIED)
        values = tl.load(prompts + text * prompt_row + e, mask=e < there, other=float("nan"))
        tl.store(prompt + b * prompt_row + e, values, mask=e < end)


def noise_gather(
    latents: Tensor,
    latent_prompts: Tensor,
    prompts: Tensor,
    coefficients: Tensor,
    replace: Tensor,
    counter: Tensor,
    first_sample: int,
    global_batch: int,
    pool: int,
    null_index: int,
    null_threshold: int,
    with_replacement: bool,
    x_t: Tensor,
    timestep: Tensor,
    prompt: Tensor,
    target: Tensor,
    latent_index: Tensor,
    prompt_index: Tensor,
    choice: Tensor,
) -> None:
    """One launch; arguments as the reference's."""
    rows, texts, batch = latents.size(0), prompts.size(0), x_t.size(0)
    if batch == 0:
        return
    row, prompt_row = latents.numel() // rows, prompts.numel() // texts
    chunks = max(triton.cdiv(row, ELEMENTS), triton.cdiv(prompt_row, 4 * COPIED), 1)
    share = 16 * triton.cdiv(prompt_row, 16 * chunks)
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    wants_target = target.numel() > 0
    _draw[(batch * chunks,)](
        latents, latent_prompts, prompts, coefficients, replace, counter, x_t, timestep, prompt,
        target if wants_target else x_t, latent_index, prompt_index, choice, rows, texts, replace.size(0), row,
        prompt_row, first_sample, global_batch, pool, null_index, null_threshold, half, chunks, share,
        with_replacement, wants_target, ELEMENTS, COPIED, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
