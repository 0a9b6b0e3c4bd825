# SPDX-License-Identifier: Apache-2.0
"""The draw of a training batch in eager torch: the specification of the op's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.ops import philox

PAIRED, RANDOM, NULL = range(3)


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
    """Fill the outputs; every number depends only on (seed, step, sample, element), see ``fastdistill.ops.philox``.

    ``latent_rows`` and ``prompt_rows`` are 0, or the rows of the bank if ``latents`` or ``prompts`` is a ring buffer.
    """
    seed, step = counter[0], counter[1]
    sample = first_sample + torch.arange(len(x_t), device=x_t.device)
    zero = torch.zeros((), dtype=torch.int64, device=x_t.device)
    word = philox.words(seed, step, sample, zero, philox.CHOICE)
    rows = latent_rows or len(latents)

    timestep.copy_(philox.below(word[0], len(coefficients)))
    is_random = word[1] < replace[timestep]
    is_null = word[3] < null_threshold
    choice.copy_(torch.where(is_null, NULL, torch.where(is_random, RANDOM, PAIRED)))

    if with_replacement:
        latent_index.copy_(philox.below(philox.words(seed, step, sample, zero + 1, philox.CHOICE)[0], rows))
    else:
        position = step * global_batch + sample
        epoch = torch.div(position, rows, rounding_mode="floor")
        latent_index.copy_(philox.permute(position - epoch * rows, rows, seed, epoch))

    chosen = torch.where(is_random, philox.below(word[2], pool), latent_prompts[latent_index])
    prompt_index.copy_(torch.where(is_null, null_index, chosen))
    texts = prompt_rows or len(prompts[0])
    there = (prompt_index >= 0) & (prompt_index < texts)
    if there.device.type == "cpu" and not there.all():
        refuse(int((~there).nonzero()[0]), latent_index, prompt_index, texts)
    for bank, out in zip(prompts, prompt, strict=True):
        rows_of = _rows(bank, torch.where(there, prompt_index, 0), prompt_rows, step)
        unknown = torch.nan if out.is_floating_point() or out.is_complex() else True if out.dtype == torch.bool else -1
        out.copy_(torch.where(there.view(-1, *[1] * (out.dim() - 1)), rows_of, unknown))

    x = _rows(latents, latent_index, latent_rows, step).float()
    z = philox.normal(seed, step, sample, latents.shape[1:])
    signal, noise, target_signal, target_noise = coefficients[timestep].view(-1, 4, *[1] * (x.dim() - 1)).unbind(1)
    x_t.copy_(signal * x + noise * z)
    if target.numel():
        target.copy_(target_signal * x + target_noise * z)


def refuse(sample: int, latent_index: Tensor, prompt_index: Tensor, texts: int) -> None:
    """Raise the error for a sample whose latent has a prompt out of range."""
    name, rule = f"latent_prompts[{int(latent_index[sample])}]", f"a row of prompts, 0 to {texts - 1}"
    raise InputError.of(name, rule, int(prompt_index[sample]))


def _rows(bank: Tensor, index: Tensor, staged: int, step: Tensor) -> Tensor:
    """The drawn rows, or the ring buffer's rows of this step; a bank in host memory is indexed there."""
    if staged:
        batch = len(index)
        index = step % (len(bank) // max(batch, 1)) * batch + torch.arange(batch, device=index.device)
    return bank[index.to(bank.device)].to(index.device)
