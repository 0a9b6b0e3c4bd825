# SPDX-License-Identifier: Apache-2.0
"""A training batch drawn in one launch: latent, timestep and prompt (paired, random or null), noise injected.

    x_t = signal(t) x + noise(t) eps,   t ~ U{0..T-1},  eps ~ N(0, I)
    prompt = the latent's own with probability 1 - p(t), one of the pool with probability p(t); then null with
    probability p_null

Random Conditioning (arXiv 2504.02011). The random numbers come from a counter-based generator without state
(``fastdistill.ops.philox``).
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.ops import _check, _native
from fastdistill.ops._dispatch import Kernel, Prepared, later, register
from fastdistill.ops.noise_gather import banks, cpp, cuda, reference
from fastdistill.ops.noise_gather.banks import Banks
from fastdistill.ops.noise_gather.reference import NULL, PAIRED, RANDOM

__all__ = ["NULL", "PAIRED", "RANDOM", "Draw", "NoiseGather", "empty_draw", "noise_gather"]

_noise_gather = register(
    "noise_gather",
    "(Tensor latents, Tensor latent_prompts, Tensor[] prompts, Tensor coefficients, Tensor replace, Tensor counter,"
    " int first_sample, int global_batch, int latent_rows, int prompt_rows, int pool, int null_index,"
    " int null_threshold, bool with_replacement,"
    " Tensor(a!) x_t, Tensor(b!) timestep, Tensor(c!)[] prompt, Tensor(d!) target,"
    " Tensor(e!) latent_index, Tensor(f!) prompt_index, Tensor(g!) choice)",
    summary="x_t = signal(t) x + noise(t) eps with latent, t and prompt drawn by counter and gathered from the banks",
    reference=reference.noise_gather,
    kernels=[
        Kernel("cuda", "cuda", cuda.noise_gather, _native.cuda_reason, cpp.refuse),
        Kernel("triton", "cuda", later(f"{__name__}.triton", "noise_gather"), _native.triton_reason, cpp.refuse),
        Kernel("cpp", "cpu", cpp.noise_gather, _native.cpu_reason, cpp.refuse),
    ],
)


class Draw(NamedTuple, Generic[Banks]):
    """A batch. ``choice`` is PAIRED (0), RANDOM (1) or NULL (2); ``target`` has 0 elements unless it was requested."""

    x_t: Tensor  # [B, *S] dtype of the latents
    timestep: Tensor  # [B] int64
    prompt: Banks  # [B, *P] dtype of the prompts; a list, tuple or dict of them as the banks are
    target: Tensor  # [B, *S] dtype of the latents, or [0]
    latent_index: Tensor  # [B] int64
    prompt_index: Tensor  # [B] int64
    choice: Tensor  # [B] int64

    def replaced(self, **parts: Any) -> Draw[Any]:
        """A batch with other parts. (In torch 2.11 the result of ``_replace`` is empty after a graph break.)"""
        return Draw(*[parts.get(name, part) for name, part in zip(self._fields, self, strict=True)])

    def part(self, start: int, stop: int) -> Draw[Banks]:
        """Samples ``start`` to ``stop`` (exclusive), in the same memory."""
        parts = {name: getattr(self, name)[start:stop] for name in self._fields if name != "prompt"}
        return self.replaced(prompt=banks.mapped(lambda bank: bank[start:stop], self.prompt), **parts)


def empty_draw(
    latents: Tensor, prompts: Banks, batch: int, *, target: bool = False, device: torch.device | str | None = None
) -> Draw[Banks]:
    """Buffers for ``noise_gather(..., out=...)``, so that every step writes into the same memory.

    ``device``: the device of the step (None: that of the latents, which may also be in pinned host memory).
    """
    device = latents.device if device is None else device

    def buffer(bank: Tensor) -> Tensor:
        return bank.new_empty((batch, *bank.shape[1:]), device=device)

    index = [torch.empty(batch, dtype=torch.int64, device=device) for _ in range(4)]
    x_t = buffer(latents)
    wanted = torch.empty_like(x_t) if target else x_t.new_empty(0)
    return Draw(x_t, index[0], banks.mapped(buffer, prompts), wanted, *index[1:])


def noise_gather(
    latents: Tensor,
    latent_prompts: Tensor,
    prompts: Banks,
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
    latent_rows: int = 0,
    prompt_rows: int = 0,
    out: Draw[Banks] | None = None,
) -> Draw[Banks]:
    """Draw a batch of noised latents with their timesteps and prompts.

    Args:
        latents: [N, *S] float32, bfloat16 or float16: the cache.
        latent_prompts: [N] int64: the row of ``prompts`` from which each latent was generated.
        prompts: [M, *P] of any dtype: encoded prompts or class labels, including the null prompt. Or a list, tuple or
            dict of banks of M rows each, such as embeddings, pooled embeddings, time ids and masks: the same row of
            each bank is copied, and ``Draw.prompt`` has the same structure.
        coefficients: [T, 4] float32: signal, noise, target signal and target noise for each timestep, from
            ``NoiseSchedule.coefficients`` (epsilon, sample, v) or ``flow_coefficients`` (rectified flow).
        replace: [T] int64: floor(p(t) * 2**32), the probability of a random prompt (``conditioning.thresholds``).
        counter: [2] int64 on the device: seed and step.
        batch: number of samples of this process (or give ``out``).
        null_index: row of the null prompt. null_probability: probability that it replaces the chosen prompt.
        pool: random prompts are drawn from rows [0, pool); None: all rows before ``null_index``, or all rows if
            ``null_index`` is 0.
        first_sample, global_batch: this process draws samples [first_sample, first_sample + batch) of a global batch,
            so that draws do not depend on how the batch is split. None: ``batch`` is the global batch.
        with_replacement: True draws latents independently; False draws each latent once per epoch, in an order that
            depends on seed and epoch.
        target: also return target_signal(t) x + target_noise(t) eps.
        latent_rows, prompt_rows: 0, or the number of rows of the bank. Then ``latents`` or ``prompts`` is not the bank
            but a ring buffer [R * batch, ...] with the rows of R steps: sample b of step s is row
            (s mod R) * batch + b. The draw is the same (``fastdistill.data.staged`` fills such rings).
        out: buffers from ``empty_draw`` to write into, without shared memory.

    Banks or buffers that are not contiguous, and more than eight banks, are left to the reference, which is slow.
    All tensors must be on the device of ``counter``. With a GPU, ``latents`` and ``prompts`` may also be in pinned host
    memory, which the kernels read in place.

    Returns:
        ``Draw``. Integers are bit-equal in every kernel; noise agrees to 4e-6 absolute.

    Raises:
        InputError: a wrong shape, dtype, device or range, or a tensor that requires gradient. Nothing is launched
            then.
    """
    arguments, out = _prepared(
        (latents, latent_prompts, coefficients, replace, counter), prompts, batch, null_index, null_probability, pool,
        first_sample, global_batch, with_replacement, target, latent_rows, prompt_rows, out,
    )  # fmt: skip
    _noise_gather(None, *arguments)
    return out


class NoiseGather(Generic[Banks]):
    """``noise_gather`` with arguments that are prepared and checked once, for the calls of a training loop.

    It takes the arguments of ``noise_gather``. Each call draws the batch of the step that ``counter`` then contains,
    always into the same buffers, and returns them. Do not resize any of the tensors between calls.
    """

    def __init__(
        self,
        latents: Tensor,
        latent_prompts: Tensor,
        prompts: Banks,
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
        latent_rows: int = 0,
        prompt_rows: int = 0,
        out: Draw[Banks] | None = None,
    ) -> None:
        arguments, self.out = _prepared(
            (latents, latent_prompts, coefficients, replace, counter), prompts, batch, null_index, null_probability,
            pool, first_sample, global_batch, with_replacement, target, latent_rows, prompt_rows, out,
        )  # fmt: skip
        self._draw = Prepared(_noise_gather, *arguments)

    def __call__(self) -> Draw[Banks]:
        self._draw()
        return self.out


def _prepared(
    tables: tuple[Tensor, ...],
    prompts: Banks,
    batch: int | None,
    null_index: int,
    null_probability: float,
    pool: int | None,
    first_sample: int,
    global_batch: int | None,
    with_replacement: bool,
    target: bool,
    latent_rows: int,
    prompt_rows: int,
    out: Draw[Banks] | None,
) -> tuple[tuple[Any, ...], Draw[Banks]]:
    """The op's checked arguments, and the output buffers."""
    latents, latent_prompts, coefficients, replace, counter = tables
    given, names = banks.listed(prompts), banks.labels(prompts)
    named = {"latents": latents} | {f"prompts{name}": bank for name, bank in zip(names, given, strict=True)}
    _check.tensors(latent_prompts=latent_prompts, coefficients=coefficients, replace=replace, counter=counter, **named)
    _check.constants(coefficients=coefficients, **named)
    optional = {"pool": pool, "global_batch": global_batch, "batch": batch}
    _check.integers(
        null_index=null_index, first_sample=first_sample, latent_rows=latent_rows, prompt_rows=prompt_rows,
        **{name: number for name, number in optional.items() if number is not None},
    )  # fmt: skip
    for name, switch in {"with_replacement": with_replacement, "target": target}.items():
        _check.flag(switch, name)
    if out is None:
        _check.require(batch is not None and batch >= 0, "batch", "a number of samples >= 0 (or out=)", batch)
        out = empty_draw(latents, prompts, batch, target=target, device=counter.device)  # type: ignore[arg-type]
    x_t, timestep, prompt, wanted, latent_index, prompt_index, choice = out
    copied = banks.listed(prompt)
    if banks.labels(prompt) != names:
        has = ", ".join(f"prompt{name}" for name in banks.labels(prompt))
        raise InputError.of("out.prompt", f"a buffer for each of {', '.join(f'prompts{name}' for name in names)}", has)
    batch = len(x_t)
    global_batch = batch if global_batch is None else global_batch
    if pool is None:
        pool = null_index if null_index > 0 else prompt_rows or len(given[0])
    null_threshold = threshold(null_probability, "null_probability")
    for name, buffer in zip(Draw._fields, out, strict=True):
        for label, one in zip(banks.labels(buffer), banks.listed(buffer), strict=True):
            _check.tensors(**{f"out.{name}{label}": one})
            _check.own_memory(one, f"out.{name}{label}")
            _check.constants(**{f"out.{name}{label}": one})
    numbers = null_index, pool, first_sample, batch, global_batch, latent_rows, prompt_rows
    outputs = x_t, timestep, wanted, latent_index, prompt_index, choice
    _check.once(banks.check, (*tables, *outputs, *given, *copied), (names, numbers))
    if counter.is_cuda:
        banks.check_host_memory(named, counter.device)
    return (
        latents, latent_prompts, given, coefficients, replace, counter, first_sample, global_batch, latent_rows,
        prompt_rows, pool, null_index, null_threshold, with_replacement, x_t, timestep, copied, wanted, latent_index,
        prompt_index, choice,
    ), out  # fmt: skip


def threshold(probability: float, argument: str) -> int:
    """An event of this probability is a 32-bit word below floor(probability * 2**32)."""
    return int(_check.within(probability, argument, 0.0, 1.0, "a probability, 0 to 1") * 2**32)
