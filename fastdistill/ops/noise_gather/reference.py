# SPDX-License-Identifier: Apache-2.0
"""The draw of a training batch in eager torch: the specification of the op's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops import philox

PAIRED, RANDOM, NULL = range(3)


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
    """Fill the outputs; every number is a function of (seed, step, sample, element), see ``fastdistill.ops.philox``."""
    seed, step = counter[0], counter[1]
    sample = first_sample + torch.arange(len(x_t), device=x_t.device)
    zero = torch.zeros((), dtype=torch.int64, device=x_t.device)
    word = philox.words(seed, step, sample, zero, philox.CHOICE)

    timestep.copy_(philox.below(word[0], len(coefficients)))
    is_random = word[1] < replace[timestep]
    is_null = word[3] < null_threshold
    choice.copy_(torch.where(is_null, NULL, torch.where(is_random, RANDOM, PAIRED)))

    if with_replacement:
        latent_index.copy_(philox.below(philox.words(seed, step, sample, zero + 1, philox.CHOICE)[0], len(latents)))
    else:
        position = step * global_batch + sample
        epoch = torch.div(position, len(latents), rounding_mode="floor")
        latent_index.copy_(philox.permute(position - epoch * len(latents), len(latents), seed, epoch))

    chosen = torch.where(is_random, philox.below(word[2], pool), latent_prompts[latent_index])
    prompt_index.copy_(torch.where(is_null, null_index, chosen))
    prompt.copy_(prompts[prompt_index])

    x = latents[latent_index].float()
    z = philox.normal(seed, step, sample, latents.shape[1:])
    signal, noise, target_signal, target_noise = coefficients[timestep].view(-1, 4, *[1] * (x.dim() - 1)).unbind(1)
    x_t.copy_(signal * x + noise * z)
    if target.numel():
        target.copy_(target_signal * x + target_noise * z)
