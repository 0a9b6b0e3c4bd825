# SPDX-License-Identifier: Apache-2.0
"""The draw of a training batch in C++: ``csrc/noise_gather/cpu.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops.noise_gather import reference

MOST_BANKS = 8  # fd::most_banks of csrc/noise_gather/math.h
_TENSORS = (
    "latents latent_prompts prompts coefficients replace counter"
    " x_t timestep prompt target latent_index prompt_index choice"
).split()


def arguments(
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
) -> tuple[Any, ...]:
    """The arguments of ``_cpu.noise_gather`` and ``_cuda.noise_gather``, except the threads or the stream."""
    rows, texts, batch = latents.size(0), prompts[0].size(0), x_t.size(0)
    address = Tensor.data_ptr
    return (
        address(latents), address(latent_prompts), list(map(address, prompts)), [p.nbytes // texts for p in prompts],
        address(coefficients), address(replace), address(counter), latent_rows or rows, prompt_rows or texts,
        replace.size(0), rows // batch if latent_rows else 0, texts // batch if prompt_rows else 0,
        latents.numel() // rows, batch, first_sample, global_batch, pool, null_index, null_threshold, with_replacement,
        _native.DTYPES[latents.dtype], address(x_t), address(timestep), list(map(address, prompt)),
        address(target) if target.numel() else 0, address(latent_index), address(prompt_index), address(choice),
    )  # fmt: skip


def noise_gather(*args: Any) -> None:
    """One parallel loop over pieces of rows; arguments as in the reference.

    Raises:
        InputError: the prompt of a latent is out of range.
    """
    outside = _native.cpu().noise_gather(*arguments(*args), torch.get_num_threads())
    if outside >= 0:
        reference.refuse(outside, args[-3], args[-2], args[9] or len(args[2][0]))


def refuse(*args: Any) -> str | None:
    """Banks and outputs must be contiguous, because rows are read and written as flat memory."""
    if len(args[2]) > MOST_BANKS:
        return f"{len(args[2])} banks of prompts are more than {MOST_BANKS}"
    flat = (*args[:2], *args[2], *args[3:6], *args[14:16], *args[16], *args[17:])
    if all(map(Tensor.is_contiguous, flat)):
        return None
    tensors = dict(zip(_TENSORS, (*args[:6], *args[14:]), strict=True))
    named = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    for name in ("prompts", "prompt"):
        several = len(tensors[name]) > 1
        named |= {f"{name}[{i}]" if several else name: t for i, t in enumerate(tensors[name])}
    label, tensor = next((label, t) for label, t in named.items() if not t.is_contiguous())
    return f"{label} is not contiguous (strides {tensor.stride()})"
