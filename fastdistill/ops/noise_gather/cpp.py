# SPDX-License-Identifier: Apache-2.0
"""The draw of a training batch in C++: ``csrc/noise_gather/cpu.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.ops import _native


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
    """One parallel loop over pieces of rows; arguments as the reference's.

    Raises:
        InputError: a latent names a prompt that the bank does not have.
    """
    rows, texts, steps, batch = latents.size(0), prompts.size(0), replace.size(0), x_t.size(0)
    outside = _native.cpu().noise_gather(
        latents.data_ptr(), latent_prompts.data_ptr(), prompts.data_ptr(), coefficients.data_ptr(), replace.data_ptr(),
        counter.data_ptr(), rows, texts, steps, latents.numel() // rows, prompts.numel() // texts, batch, first_sample,
        global_batch, pool, null_index, null_threshold, with_replacement,
        _native.DTYPES[latents.dtype], _native.DTYPES[prompts.dtype], x_t.data_ptr(), timestep.data_ptr(),
        prompt.data_ptr(), target.data_ptr() if target.numel() else 0, latent_index.data_ptr(), prompt_index.data_ptr(),
        choice.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if outside >= 0:
        row, named = int(latent_index[outside]), int(prompt_index[outside])
        raise InputError.of(f"latent_prompts[{row}]", f"a row of prompts, 0 to {len(prompts) - 1}", named)


def refuse(
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
    *outputs: Tensor,
) -> str | None:
    """Rows are read and written as flat memory: banks and outputs must be contiguous."""
    if all(map(Tensor.is_contiguous, (latents, latent_prompts, prompts, coefficients, replace, counter, *outputs))):
        return None
    names = "latents latent_prompts prompts coefficients replace counter".split()
    for name, bank in zip(names, (latents, latent_prompts, prompts, coefficients, replace, counter), strict=True):
        if not bank.is_contiguous():
            return f"{name} is not contiguous (strides {bank.stride()})"
    names = "x_t timestep prompt target latent_index prompt_index choice".split()
    for name, output in zip(names, outputs, strict=True):
        if not output.is_contiguous():
            return f"the output {name} is not contiguous (strides {output.stride()})"
    return None
