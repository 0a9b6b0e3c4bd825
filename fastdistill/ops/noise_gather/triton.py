# SPDX-License-Identifier: Apache-2.0
"""The draw of a training batch in Triton.

Grid      (batch rows, chunks): a program draws its row (seven Philox blocks), generates the noise of ELEMENTS elements
          of its latent and copies a part of its prompt from every bank; the first one of a row writes the indices
Traffic   latent read, x_t written (and target if requested), prompt rows read and written; noise never in memory.
          Banks may be in pinned host memory
Precision integers exact; noise, mixing and coefficients in fp32, rounded once to the dtype of the latents; the same
          operations as csrc/philox.h
Limits    contiguous banks and outputs; prompts are copied as integers of the same size; a prompt row out of range gives
          a row with all bits set (NaN, -1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import CHOICE, below, cdiv, normals, permute, philox_words, power_of_2

ELEMENTS = 2048
COPIED = 4096  # most elements of a prompt that a program holds at once
WARPS = 4
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _place(drawn, ring, step, batch, b):
    """The row to read: the drawn one, or for a staged bank the sample's row in the ring buffer."""
    turn = step % tl.maximum(ring, 1)
    turn = tl.where(turn < 0, turn + ring, turn)
    return tl.where(ring == 0, drawn, turn * batch + b)


@triton.jit
def _noise_gather(
    latents, latent_prompts, prompts, coefficients, replace, counter, x_t, timestep, prompt, target, latent_index,
    prompt_index, choice, rows, texts, steps, row, prompt_row, first_sample, global_batch, pool, null_index,
    null_threshold, half, latent_ring, prompt_ring, batch, chunks, share, BANKS: tl.constexpr,
    REPLACEMENT: tl.constexpr, TARGET: tl.constexpr, ELEMENTS: tl.constexpr, COPIED: tl.constexpr,
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
        from_row = _place(latent, latent_ring, step, batch, b)
        c = coefficients + 4 * t
        signal, noise = tl.load(c), tl.load(c + 1)
        x = tl.load(latents + from_row * row + e, mask=inside, other=0.0).to(tl.float32)
        z = normals(seed, step, sample, first, ELEMENTS)
        mixed = tl.fma(signal, x, noise * z)
        tl.store(x_t + b * row + e, mixed.to(x_t.dtype.element_ty), mask=inside)
        if TARGET:
            wanted = tl.fma(tl.load(c + 2), x, tl.load(c + 3) * z)
            tl.store(target + b * row + e, wanted.to(target.dtype.element_ty), mask=inside)

    from_text = _place(text, prompt_ring, step, batch, b)
    for i in tl.static_range(BANKS):
        end = tl.minimum((chunk + 1) * share[i], prompt_row[i])
        there = tl.where(text < 0, 0, tl.where(text < texts, end, 0))  # reads nothing if the row is out of range
        for start in range(chunk * share[i], end, COPIED[i]):
            e = start + tl.arange(0, COPIED[i])
            values = tl.load(prompts[i] + from_text * prompt_row[i] + e, mask=e < there, other=-1)
            tl.store(prompt[i] + b * prompt_row[i] + e, values, mask=e < end)


def _words(bank: Tensor) -> Tensor:
    """The same memory as integers, so that the copy does not depend on the dtype."""
    return bank.detach().view(_WORDS[min(bank.element_size(), 8)])


def noise_gather(
    latents: Tensor,
    latent_prompts: Tensor,
    prompts: Sequence[Tensor],
    coefficients: Tensor,
    replace: Tensor,
    counter: Tensor,
    first_sample: int,
    global_batch: int,
    latent_rows: int,
    prompt_rows: int,
    pool: int,
    null_index: int,
    null_threshold: int,
    with_replacement: bool,
    x_t: Tensor,
    timestep: Tensor,
    prompt: Sequence[Tensor],
    target: Tensor,
    latent_index: Tensor,
    prompt_index: Tensor,
    choice: Tensor,
) -> None:
    """One launch; arguments as in the reference."""
    rows, texts, batch = latents.size(0), prompts[0].size(0), x_t.size(0)
    if batch == 0:
        return
    banks, outputs = tuple(map(_words, prompts)), tuple(map(_words, prompt))
    row, prompt_row = latents.numel() // rows, tuple(bank.numel() // texts for bank in banks)
    chunks = max(cdiv(row, ELEMENTS), cdiv(max(prompt_row), 4 * COPIED), 1)
    share = tuple(16 * cdiv(n, 16 * chunks) for n in prompt_row)
    copied = tuple(min(COPIED, power_of_2(max(n, 1))) for n in share)
    half = max(1, (((latent_rows or rows) - 1).bit_length() + 1) // 2)
    wants_target = target.numel() > 0
    _noise_gather[(batch * chunks,)](
        latents, latent_prompts, banks, coefficients, replace, counter, x_t, timestep, outputs,
        target if wants_target else x_t, latent_index, prompt_index, choice, latent_rows or rows, prompt_rows or texts,
        replace.size(0), row, prompt_row, first_sample, global_batch, pool, null_index, null_threshold, half,
        rows // batch if latent_rows else 0, texts // batch if prompt_rows else 0, batch, chunks, share, len(banks),
        with_replacement, wants_target, ELEMENTS, copied, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
