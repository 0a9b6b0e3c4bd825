# SPDX-License-Identifier: Apache-2.0
"""A training batch drawn in one launch: latent, timestep and prompt (paired, random or null), noise injected.

    x_t = signal(t) x + noise(t) eps,   t ~ U{0..T-1},  eps ~ N(0, I)
    prompt = the latent's own with probability 1 - p(t), one of the pool with probability p(t); then null with
    probability p_null

Random Conditioning (arXiv 2504.02011). The numbers come from a counter, never from a stateful generator
(``fastdistill.ops.philox``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.ops import _check, _native
from fastdistill.ops._dispatch import Kernel, later, register
from fastdistill.ops.noise_gather import cpp, cuda, reference
from fastdistill.ops.noise_gather.reference import NULL, PAIRED, RANDOM

__all__ = ["NULL", "PAIRED", "RANDOM", "Draw", "NoiseGather", "empty_draw", "noise_gather"]

_noise_gather = register(
    "noise_gather",
    "(Tensor latents, Tensor latent_prompts, Tensor prompts, Tensor coefficients, Tensor replace, Tensor counter,"
    " int first_sample, int global_batch, int pool, int null_index, int null_threshold, bool with_replacement,"
    " Tensor(a!) x_t, Tensor(b!) timestep, Tensor(c!) prompt, Tensor(d!) target,"
    " Tensor(e!) latent_index, Tensor(f!) prompt_index, Tensor(g!) choice)",
    summary="x_t = signal(t) x + noise(t) eps with latent, t and prompt drawn by counter and gathered from the banks",
    reference=reference.noise_gather,
    kernels=[
        Kernel("cuda", "cuda", cuda.noise_gather, _native.cuda_reason, cpp.refuse),
        Kernel("triton", "cuda", later(f"{__name__}.triton", "noise_gather"), _native.triton_reason, cpp.refuse),
        Kernel("cpp", "cpu", cpp.noise_gather, _native.cpu_reason, cpp.refuse),
    ],
)


class Draw(NamedTuple):
    """A batch. ``choice`` is PAIRED (0), RANDOM (1) or NULL (2); ``target`` has 0 elements where none was asked for."""

    x_t: Tensor  # [B, *S] dtype of the latents
    timestep: Tensor  # [B] int64
    prompt: Tensor  # [B, *P] dtype of the prompts
    target: Tensor  # [B, *S] dtype of the latents, or [0]
    latent_index: Tensor  # [B] int64
    prompt_index: Tensor  # [B] int64
    choice: Tensor  # [B] int64


def empty_draw(latents: Tensor, prompts: Tensor, batch: int, *, target: bool = False) -> Draw:
    """Buffers for ``noise_gather(..., out=...)``, so that every step writes into the same memory."""
    index = [torch.empty(batch, dtype=torch.int64, device=latents.device) for _ in range(4)]
    x_t = latents.new_empty((batch, *latents.shape[1:]))
    wanted = torch.empty_like(x_t) if target else latents.new_empty(0)
    return Draw(x_t, index[0], prompts.new_empty((batch, *prompts.shape[1:])), wanted, *index[1:])


def noise_gather(
    latents: Tensor,
    latent_prompts: Tensor,
    prompts: Tensor,
    coefficients: Tensor,
    replace: Tensor,
    counter: Tensor,
    *,
    batch: int | None = None,
    null_index: int,
    null_probability: float = 0.1,
    pool: int | None = None,
    first_sample: int = 0,
    global_batch: int | None = None,
    with_replacement: bool = False,
    target: bool = False,
    out: Draw | None = None,
) -> Draw:
    """Draw a batch of noised latents with their timesteps and prompts.

    Args:
        latents: [N, *S] float32, bfloat16 or float16: the cache.
        latent_prompts: [N] int64: the row of ``prompts`` that each latent was made from.
        prompts: [M, *P] float32, bfloat16 or float16: encoded prompts, the null prompt among them.
        coefficients: [T, 4] float32: signal, noise, target signal, target noise of each timestep
            (``NoiseSchedule.coefficients``).
        replace: [T] int64: floor(p(t) * 2**32), the probability of a random prompt (``conditioning.thresholds``).
        counter: [2] int64 on the device: seed and step.
        batch: number of samples of this process (or give ``out``).
        null_index: row of the null prompt. null_probability: how often it replaces whatever was chosen.
        pool: random prompts are drawn from rows [0, pool); None: all rows before ``null_index``, or all if it comes
            first.
        first_sample, global_batch: this process draws samples [first_sample, first_sample + batch) of a global batch,
            so that draws do not depend on how it is split. None: the batch is the whole.
        with_replacement: draw latents independently; otherwise each comes once an epoch, in an order keyed by seed and
            epoch.
        target: also return target_signal(t) x + target_noise(t) eps.
        out: buffers from ``empty_draw`` to write into.

    Returns:
        ``Draw``. Integers are bit-equal in every kernel; noise agrees to 4e-6 absolute.

    Raises:
        InputError: a wrong shape, dtype, device or range, before anything is launched.
    """
    arguments, out = _prepared(
        (latents, latent_prompts, prompts, coefficients, replace, counter),
        batch, null_index, null_probability, pool, first_sample, global_batch, with_replacement, target, out,
    )  # fmt: skip
    _noise_gather(*arguments)
    return out


class NoiseGather:
    """``noise_gather`` with its arguments prepared and checked once: what a training loop calls every step.

    It takes the arguments of ``noise_gather``. A call draws the batch of the step that ``counter`` holds by then, into
    the same buffers every time, and returns them. None of the tensors may be resized in between.
    """

    def __init__(
        self,
        latents: Tensor,
        latent_prompts: Tensor,
        prompts: Tensor,
        coefficients: Tensor,
        replace: Tensor,
        counter: Tensor,
        *,
        batch: int | None = None,
        null_index: int,
        null_probability: float = 0.1,
        pool: int | None = None,
        first_sample: int = 0,
        global_batch: int | None = None,
        with_replacement: bool = False,
        target: bool = False,
        out: Draw | None = None,
    ) -> None:
        self._arguments, self.out = _prepared(
            (latents, latent_prompts, prompts, coefficients, replace, counter),
            batch, null_index, null_probability, pool, first_sample, global_batch, with_replacement, target, out,
        )  # fmt: skip

    def __call__(self) -> Draw:
        _noise_gather(*self._arguments)
        return self.out


def _prepared(
    banks: tuple[Tensor, ...],
    batch: int | None,
    null_index: int,
    null_probability: float,
    pool: int | None,
    first_sample: int,
    global_batch: int | None,
    with_replacement: bool,
    target: bool,
    out: Draw | None,
) -> tuple[tuple[Any, ...], Draw]:
    """The op's arguments, checked, and the buffers among them."""
    latents, prompts = banks[0], banks[2]
    if out is None:
        _check.require(batch is not None and batch >= 0, "batch", "a number of samples >= 0 (or out=)", batch)
        out = empty_draw(latents, prompts, batch, target=target)  # type: ignore[arg-type]
    batch = len(out.x_t)
    global_batch = batch if global_batch is None else global_batch
    if pool is None:
        pool = null_index if null_index > 0 else len(prompts)
    null_threshold = threshold(null_probability, "null_probability")
    _check.once(_check_all, (*banks, *out), (null_index, pool, first_sample, batch, global_batch))
    return (
        *banks, first_sample, global_batch, pool, null_index, null_threshold, with_replacement, *out,
    ), out  # fmt: skip


def threshold(probability: float, argument: str) -> int:
    """An event of this probability is a 32-bit word below floor(probability * 2**32)."""
    _check.require(0.0 <= probability <= 1.0, argument, "a probability, 0 to 1", probability)
    return int(probability * 2**32)


def _check_all(tensors: tuple[Tensor, ...], numbers: tuple[int, int, int, int, int]) -> None:
    banks, out = tensors[:6], Draw(*tensors[6:])
    latents, prompts, batch = tensors[0], tensors[2], numbers[3]
    _check_banks(*banks)
    _check_numbers(len(prompts), *numbers)
    _check_out(out, latents, prompts, batch)


def _check_banks(
    latents: Tensor, latent_prompts: Tensor, prompts: Tensor, coefficients: Tensor, replace: Tensor, counter: Tensor
) -> None:
    _check.dtype(latents, "latents", *_check.FLOATS)
    _check.dtype(prompts, "prompts", *_check.FLOATS)
    _check.require(
        latents.dim() >= 2 and 1 <= len(latents) <= 2**32,
        "latents",
        "[N, ...] with 1 to 2**32 rows",
        tuple(latents.shape),
    )
    _check.require(
        prompts.dim() >= 2 and len(prompts) >= 1, "prompts", "[M, ...] with at least one row", tuple(prompts.shape)
    )
    steps = len(replace)
    _check.require(replace.dim() == 1 and steps >= 1, "replace", "[T] with at least one timestep", tuple(replace.shape))
    _check.shape(latent_prompts, "latent_prompts", (len(latents),), f"one row number a latent ({len(latents)},)")
    _check.shape(coefficients, "coefficients", (steps, 4), f"one row of 4 a timestep of replace ({steps}, 4)")
    _check.shape(counter, "counter", (2,), "(seed, step), shape (2,)")
    _check.dtype(coefficients, "coefficients", torch.float32)
    for name, tensor in {"latent_prompts": latent_prompts, "replace": replace, "counter": counter}.items():
        _check.dtype(tensor, name, torch.int64)
    others = {
        "latent_prompts": latent_prompts,
        "prompts": prompts,
        "coefficients": coefficients,
        "replace": replace,
        "counter": counter,
    }
    for name, tensor in others.items():
        _check.device(tensor, name, latents.device, "latents")


def _check_numbers(rows: int, null_index: int, pool: int, first_sample: int, batch: int, global_batch: int) -> None:
    last = first_sample + batch
    _check.require(0 <= null_index < rows, "null_index", f"a row of prompts, 0 to {rows - 1}", null_index)
    _check.require(1 <= pool <= rows, "pool", f"1 to the rows of prompts ({rows})", pool)
    _check.require(first_sample >= 0, "first_sample", "a sample number >= 0", first_sample)
    rule = f"at least first_sample + batch ({last}), at most 2**32"
    _check.require(last <= global_batch <= 2**32, "global_batch", rule, global_batch)


def _check_out(out: Draw, latents: Tensor, prompts: Tensor, batch: int) -> None:
    like = {"x_t": latents, "prompt": prompts} | (
        {"target": latents} if out.target.numel() or out.target.dim() > 1 else {}
    )
    for name, bank in like.items():
        tensor: Tensor = getattr(out, name)
        _check.shape(tensor, f"out.{name}", (batch, *bank.shape[1:]), f"shape {(batch, *bank.shape[1:])}")
        _check.dtype(tensor, f"out.{name}", bank.dtype)
        _check.device(tensor, f"out.{name}", latents.device, "latents")
    for name in ("timestep", "latent_index", "prompt_index", "choice"):
        tensor = getattr(out, name)
        _check.shape(tensor, f"out.{name}", (batch,), f"shape ({batch},)")
        _check.dtype(tensor, f"out.{name}", torch.int64)
        _check.device(tensor, f"out.{name}", latents.device, "latents")
