# SPDX-License-Identifier: Apache-2.0
"""The prompts that samplers pass to a model (alone, or after the rows of the null prompt), and its prediction."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import InputError, described

Rows = Tensor | Mapping[str, Tensor]


def check_prompts(x_T: Tensor, prompts: Rows, null_prompt: Rows | None, scale: float) -> None:
    """InputError unless ``prompts`` are rows for the batch of ``x_T`` and ``null_prompt`` is one row more (None if
    ``scale`` is 1), in the same banks and on the same device."""
    check_scale(scale)
    if null_prompt is None and scale != 1:
        raise InputError.of("null_prompt", f"a row, for a guidance_scale of {scale}", None)
    banks, nulls = _labelled("prompts", prompts), _labelled("null_prompt", null_prompt)
    if not banks or (null_prompt is not None and nulls.keys() != banks.keys()):
        rule = f"banks {', '.join(banks)}, as prompts" if banks else "at least one bank"
        raise InputError.of("null_prompt" if banks else "prompts", rule, ", ".join(nulls) or "none")
    for name, (label, bank) in banks.items():
        if bank.ndim < 1 or len(bank) != len(x_T):
            raise InputError.of(label, f"rows [{len(x_T)} (batch of x_T), ...]", tuple(bank.shape))
        row = tuple(bank.shape[1:])
        null_label, null = nulls.get(name, ("null_prompt", bank[:1]))
        if tuple(null.shape) not in (row, (1, *row)):
            raise InputError.of(null_label, f"a row of prompts {row}", tuple(null.shape))
        for argument, tensor in ((label, bank), (null_label, null)):
            if tensor.device != x_T.device:
                raise InputError.of(argument, f"the device of x_T ({x_T.device})", tensor.device)


def check_scale(scale: object) -> None:
    """InputError unless ``scale`` is a finite number."""
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise InputError.of("guidance_scale", "a finite number", described(scale))


def null_rows(prompts: Rows, null_prompt: Rows) -> Rows:
    """The null prompt, repeated once for each row of ``prompts``, in the dtype of each bank."""
    if isinstance(prompts, Mapping):
        assert isinstance(null_prompt, Mapping)
        return {name: null_prompt[name].to(bank.dtype).expand_as(bank) for name, bank in prompts.items()}
    assert isinstance(null_prompt, Tensor)
    return null_prompt.to(prompts.dtype).expand_as(prompts)


def after_null(prompts: Rows, null_prompt: Rows) -> Rows:
    """Null rows, then the prompts, in every bank: the input of a guided model in one batch of 2 B."""
    null = null_rows(prompts, null_prompt)
    if isinstance(prompts, Mapping):
        assert isinstance(null, Mapping)
        return {name: torch.cat([null[name], bank]) for name, bank in prompts.items()}
    assert isinstance(null, Tensor)
    return torch.cat([null, prompts])


def prediction_like(x: Tensor, output: Any) -> Tensor:
    """The prediction for x [B, C, ...] from a model's output; if it has 2 C channels, the first C."""
    output = getattr(output, "sample", output)
    output = output[0] if isinstance(output, tuple) else output
    if isinstance(output, Tensor) and output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    if not isinstance(output, Tensor) or output.shape != x.shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError.of("model", f"a prediction of shape {tuple(x.shape)}", got)
    return output


def _labelled(argument: str, rows: Rows | None) -> dict[str, tuple[str, Tensor]]:
    """Each bank by name, with the argument's name for error messages."""
    if isinstance(rows, Mapping):
        found = {str(name): (f"{argument}[{name!r}]", bank) for name, bank in rows.items()}
    else:
        found = {} if rows is None else {"": (argument, rows)}
    for label, bank in found.values():
        if not isinstance(bank, Tensor):
            raise InputError.of(label, "a tensor", described(bank))
    return found
