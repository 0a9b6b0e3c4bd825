# SPDX-License-Identifier: Apache-2.0
"""Prompts as one bank, as a list or as a dict of banks; and the checks of the op's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from typing import cast as typed

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastdistill.ops import _check

Banks = TypeVar("Banks", bound=Tensor | Sequence[Tensor] | Mapping[str, Tensor])


def listed(prompts: Any) -> list[Any]:
    """The banks in their order."""
    if isinstance(prompts, Mapping):
        return list(prompts.values())
    return list(prompts) if isinstance(prompts, Sequence) else [prompts]


def labels(prompts: Any) -> tuple[str, ...]:
    """The name of each bank in messages, after the argument's name."""
    if not isinstance(prompts, Mapping | Sequence):
        return ("",)
    keys = prompts if isinstance(prompts, Mapping) else range(len(prompts))
    return tuple(f"[{key!r}]" for key in keys)


def mapped(function: Callable[[Any], Tensor], prompts: Banks) -> Banks:
    """The function's result for each bank, in the structure of the banks: a tensor, list, tuple or dict."""
    results = map(function, listed(prompts))
    if isinstance(prompts, Mapping):
        return typed(Banks, dict(zip(prompts, results, strict=True)))
    if isinstance(prompts, Sequence):
        return typed(Banks, tuple(results) if isinstance(prompts, tuple) else list(results))
    return typed(Banks, next(results))


def cast(prompts: Banks, dtype: torch.dtype) -> Banks:
    """Floating-point banks as ``dtype``; others, such as class labels and masks, as they are."""
    return mapped(lambda bank: bank.to(dtype) if bank.is_floating_point() else bank, prompts)


def check(call: tuple[Tensor, ...], values: tuple[tuple[str, ...], tuple[int, ...]]) -> None:
    """Shapes, dtypes, devices and ranges: latents and tables, six outputs, then the banks and their outputs."""
    suffixes, (null_index, pool, first_sample, batch, global_batch, latent_rows, prompt_rows) = values
    latents, device = call[0], call[4].device
    banks = dict(zip([f"prompts{s}" for s in suffixes], call[11:], strict=False))
    prompts = dict(
        zip([f"prompt{s}" for s in suffixes], zip(call[11 + len(banks) :], banks.values(), strict=True), strict=True)
    )
    _check_latents(latents, latent_rows, batch)
    _check_tables(call[1:5], latent_rows or len(latents))
    _check_prompts(banks, prompt_rows, batch)
    for name, bank in {"latents": latents, **banks}.items():
        beside = device.type == "cuda" and bank.device.type == "cpu"
        _check.require(beside or bank.device == device, name, f"the device of counter ({device})", bank.device)
    rows = prompt_rows or len(call[11])
    last = first_sample + batch
    _check.require(0 <= null_index < rows, "null_index", f"a row of prompts, 0 to {rows - 1}", null_index)
    _check.require(1 <= pool <= rows, "pool", f"1 to the rows of prompts ({rows})", pool)
    _check.require(first_sample >= 0, "first_sample", "a sample number >= 0", first_sample)
    rule = f"at least first_sample + batch ({last}), at most 2**32"
    _check.require(last <= global_batch <= 2**32, "global_batch", rule, global_batch)
    _check_outputs(call[5:11], latents, prompts, batch, device)


def check_host_memory(banks: Mapping[str, Tensor], device: torch.device) -> None:
    """Host memory that a GPU reads must be pinned; for fake tensors this is unknown."""
    for name, bank in banks.items():
        if bank.device != device and not torch.compiler.is_compiling() and not isinstance(bank, FakeTensor):
            rule = f"memory of the device of counter ({device}) or pinned host memory (pin_memory())"
            _check.require(bank.is_pinned(), name, rule, "host memory that is not pinned")


def _check_latents(latents: Tensor, staged: int, batch: int) -> None:
    _check.dtype(latents, "latents", *_check.FLOATS)
    many = latents.dim() >= 2 and 1 <= len(latents) <= 2**32
    _check.require(many, "latents", "[N, ...] with 1 to 2**32 rows", tuple(latents.shape))
    _check_ring(latents, "latents", staged, batch, "latent_rows")


def _check_prompts(banks: dict[str, Tensor], staged: int, batch: int) -> None:
    _check.require(len(banks) >= 1, "prompts", "at least one bank", "none")
    first, rows = next(iter(banks)), None
    for name, bank in banks.items():
        _check.require(bank.dim() >= 1 and len(bank) >= 1, name, "[M, ...] with at least one row", tuple(bank.shape))
        rows = len(bank) if rows is None else rows
        _check.require(len(bank) == rows, name, f"as many rows as {first} ({rows})", len(bank))
        _check_ring(bank, name, staged, batch, "prompt_rows")


def _check_ring(ring: Tensor, name: str, staged: int, batch: int, argument: str) -> None:
    if staged:
        _check.require(1 <= staged <= 2**32, argument, "1 to 2**32, the rows of a bank", staged)
        fits = batch >= 1 and len(ring) % batch == 0
        _check.require(fits, name, f"a ring of whole batches, [R * {batch}, ...]", tuple(ring.shape))


def _check_tables(tables: tuple[Tensor, ...], rows: int) -> None:
    latent_prompts, coefficients, replace, counter = tables
    steps = len(replace) if replace.dim() else 0
    _check.require(replace.dim() == 1 and steps >= 1, "replace", "[T] with at least one timestep", tuple(replace.shape))
    _check.shape(latent_prompts, "latent_prompts", (rows,), f"one row number a latent ({rows},)")
    _check.shape(coefficients, "coefficients", (steps, 4), f"one row of 4 a timestep of replace ({steps}, 4)")
    _check.shape(counter, "counter", (2,), "(seed, step), shape (2,)")
    _check.dtype(coefficients, "coefficients", torch.float32)
    named = {"latent_prompts": latent_prompts, "replace": replace, "counter": counter}
    for name, tensor in named.items():
        _check.dtype(tensor, name, torch.int64)
    for name, tensor in {**named, "coefficients": coefficients}.items():
        _check.device(tensor, name, counter.device, "counter")


def _check_outputs(
    outputs: tuple[Tensor, ...],
    latents: Tensor,
    prompts: dict[str, tuple[Tensor, Tensor]],
    batch: int,
    device: torch.device,
) -> None:
    x_t, timestep, target, *indices = outputs
    like = {"x_t": (x_t, latents), **prompts}
    if target.numel() or target.dim() > 1:
        like["target"] = target, latents
    for name, (out, bank) in like.items():
        _check.shape(out, f"out.{name}", (batch, *bank.shape[1:]), f"shape {(batch, *bank.shape[1:])}")
        _check.dtype(out, f"out.{name}", bank.dtype)
        _check.device(out, f"out.{name}", device, "counter")
    for name, out in zip(("timestep", "latent_index", "prompt_index", "choice"), (timestep, *indices), strict=True):
        _check.shape(out, f"out.{name}", (batch,), f"shape ({batch},)")
        _check.dtype(out, f"out.{name}", torch.int64)
        _check.device(out, f"out.{name}", device, "counter")
