# SPDX-License-Identifier: Apache-2.0
"""The draw of a training batch in CUDA: ``csrc/noise_gather/cuda.cu``. It takes the calls that the C++ kernel takes."""

from __future__ import annotations

from torch import Tensor

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
    """One launch; arguments as the reference's. A prompt row that the bank does not have comes out as NaN."""
    rows, texts, steps, batch = latents.size(0), prompts.size(0), replace.size(0), x_t.size(0)
    _native.cuda().noise_gather(
        latents.data_ptr(), latent_prompts.data_ptr(), prompts.data_ptr(), coefficients.data_ptr(), replace.data_ptr(),
        counter.data_ptr(), rows, texts, steps, latents.numel() // rows, prompts.numel() // texts, batch, first_sample,
        global_batch, pool, null_index, null_threshold, with_replacement, _native.DTYPES[latents.dtype],
        _native.DTYPES[prompts.dtype], x_t.data_ptr(), timestep.data_ptr(), prompt.data_ptr(),
        target.data_ptr() if target.numel() else 0, latent_index.data_ptr(), prompt_index.data_ptr(), choice.data_ptr(),
        _native.stream(x_t),
    )  # fmt: skip
