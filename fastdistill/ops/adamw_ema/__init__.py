# SPDX-License-Identifier: Apache-2.0
"""The optimizer's pass over all parameters: clip by the global norm, AdamW, average, low-precision copy, zeroing.

    norm = sqrt(square_sum) / grad_scale,    g = grad / grad_scale * min(1, max_norm / (norm + 1e-6))

then AdamW (arXiv 1711.05101) as in ``torch.optim.AdamW(fused=True)``, and average += move (param - average). The norm
and the update are two calls, so that a sharded run can all-reduce the sum between them. The optimizer
``fastdistill.train.AdamWEMA`` calls both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.errors import described
from fastdistill.ops import _check, _native
from fastdistill.ops._dispatch import Kernel, later, register
from fastdistill.ops.adamw_ema import cpp, cuda, reference, table

_triton = functools.partial(later, f"{__name__}.triton")
_grad_square_sum = register(
    "grad_square_sum",
    "(Tensor[] grads, Tensor(a!) total)",
    summary="sum of the squares of all gradients, which is what clipping needs",
    reference=reference.grad_square_sum,
    kernels=[
        Kernel("cuda", "cuda", cuda.grad_square_sum, _native.cuda_reason, cpp.refuse_square_sum),
        Kernel("triton", "cuda", _triton("grad_square_sum"), _native.triton_reason, _triton("refuse_square_sum")),
        Kernel("cpp", "cpu", cpp.grad_square_sum, _native.cpu_reason, cpp.refuse_square_sum),
    ],
)
_adamw_ema = register(
    "adamw_ema",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] averages,"
    " Tensor(f!)[] copies, Tensor(g!)[] steps, Tensor[] lr, Tensor square_sum, Tensor? grad_scale, Tensor? found_inf,"
    " Tensor? ema_weight, Tensor(h!) skipped, int[] group, float[] hyper, float max_norm, bool ema_warmup,"
    " bool zero_grads)",
    summary="clip, AdamW, average of the weights, low-precision copy and zeroed gradients in one pass",
    reference=reference.adamw_ema,
    kernels=[
        Kernel("cuda", "cuda", cuda.adamw_ema, _native.cuda_reason, cuda.refuse),
        Kernel("triton", "cuda", _triton("adamw_ema"), _native.triton_reason, _triton("refuse")),
        Kernel("cpp", "cpu", cpp.adamw_ema, _native.cpu_reason, cpp.refuse),
    ],
)


class AdamWGroup(NamedTuple):
    """Hyper-parameters that parameters share. ``lr``: 0-dim float32 on the device."""

    lr: Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2


def grad_square_sum(grads: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """The sum of the squares of all gradients; its square root is their global norm.

    Args:
        grads: tensors of any shape and layout on one device, float32, bfloat16 or float16.
        out: 0-dim float64 on the device to write into (None: a new one, on the CPU if there are no gradients).

    Returns:
        0-dim float64. It is not finite if a gradient is not finite or exceeds 1.8e19 (squares are computed in
        float32). The bits are the same in every run and for any number of threads.

    Raises:
        InputError: other dtypes or devices.
    """
    grads = _check.listed(grads, "grads")
    _check.constants(grads=grads)
    if out is not None:
        _check.tensors(out=out)
        _check.constants(out=out)
    else:
        out = torch.empty((), dtype=torch.float64, device=grads[0].device if grads else "cpu")
    _check.once(_check_gradients, (out, *grads), None)
    _grad_square_sum(None, grads, out)
    return out


def _check_gradients(tensors: tuple[Tensor, ...], _: Any) -> None:
    out, *grads = tensors
    _check.shape(out, "out", (), "a 0-dim tensor")
    _check.dtype(out, "out", torch.float64)
    for i, g in enumerate(grads):
        _check.dtype(g, f"grads[{i}]", *_check.FLOATS)
        _check.device(g, f"grads[{i}]", out.device, "out" if i == 0 else "grads[0]")


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    groups: Sequence[AdamWGroup],
    group: Sequence[int] | None = None,
    square_sum: Tensor,
    skipped: Tensor,
    averages: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    max_norm: float = math.inf,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    ema_weight: Tensor | None = None,
    ema_warmup: bool = False,
    zero_grads: bool = False,
) -> None:
    """One optimizer step in place, for all parameters of all groups at once, without synchronization with the host.

    If ``square_sum`` is not finite or ``found_inf`` is not 0, nothing is updated and ``skipped`` increases by 1; with
    ``zero_grads`` gradients are zeroed also in this case.

    Args:
        params: N float32 tensors, the weights or their master copies.
        grads: N tensors of the same shapes: float32, bfloat16 or float16.
        exp_avgs, exp_avg_sqs: the moments, float32 of the same shapes.
        steps: N 0-dim float32 counts of the steps taken, increased by one.
        groups, group: hyper-parameters, and for each parameter the index of its group (None: all in the first).
        square_sum: 0-dim float64, the result of ``grad_square_sum`` for all gradients of the model.
        skipped: 0-dim int64, the count of skipped steps.
        averages: empty, or N float32 tensors; a tensor without elements means no average for this parameter.
        copies: empty, or N bfloat16 or float16 tensors that get the new weights, rounded once; a tensor without
            elements means no copy of this parameter.
        max_norm: the norm of all gradients (after ``grad_scale``) is clipped to this, as by ``clip_grad_norm_``.
        grad_scale: 0-dim float32, the loss scale that gradients are divided by (None: 1).
        found_inf: 0-dim float32, as from ``torch.amp.GradScaler`` (None: 0).
        ema_weight: 0-dim float32, 1 - decay; required with ``averages``.
        ema_warmup: the decay at step k (from 0) is then at most (1 + k) / (10 + k).
        zero_grads: write zeros over the gradients in the same pass.

    Raises:
        InputError: the counts, shapes, dtypes or devices do not match.
    """
    max_norm = _check.within(max_norm, "max_norm", 0, math.inf, "a number >= 0")
    for name, switch in {"ema_warmup": ema_warmup, "zero_grads": zero_grads}.items():
        _check.flag(switch, name)
    given_lists = (params, grads, exp_avgs, exp_avg_sqs, averages, copies, steps)
    lists = [_check.listed(values, name) for values, name in zip(given_lists, _LISTS, strict=True)]
    groups = _groups(groups)
    group = [0] * len(lists[0]) if group is None else _check.numbers(group, "group")
    _check.tensors(square_sum=square_sum, skipped=skipped)
    _check.constants(grads=lists[1], square_sum=square_sum, lr=[g.lr for g in groups])
    scalars = [square_sum, skipped, *[g.lr for g in groups]]
    optional = (grad_scale, found_inf, ema_weight)
    given = tuple(t is not None for t in optional)
    flat = [t for tensors in lists for t in tensors] + scalars + [t for t in optional if t is not None]
    sizes = (*map(len, lists), len(groups))
    _check.once(_check_update, tuple(flat), (sizes, tuple(group), given))
    for name, tensors in zip(_LISTS, lists, strict=True):
        for i, tensor in enumerate(tensors):
            if name != "grads" or zero_grads:
                _check.own_memory(tensor, f"{name}[{i}]")
    rates, hyper = [g.lr for g in groups], table.hyper(groups)
    with torch.no_grad():  # parameters may require gradients
        _adamw_ema(None, *lists, rates, square_sum, *optional, skipped, group, hyper, max_norm, ema_warmup, zero_grads)


_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages", "copies", "steps")


def _groups(groups: Any) -> list[AdamWGroup]:
    """The groups, with hyper-parameters that are numbers."""
    several, rule = isinstance(groups, Sequence) and not isinstance(groups, str), "a list of AdamWGroup"
    _check.require(several, "groups", rule, type(groups).__name__)
    for i, one in enumerate(groups):
        _check.require(isinstance(one, AdamWGroup), f"groups[{i}]", "an AdamWGroup", type(one).__name__)
        _check.tensors(**{f"groups[{i}].lr": one.lr})
        betas = one.betas if isinstance(one.betas, Sequence) and not isinstance(one.betas, str) else ()
        _check.require(len(betas) == 2, f"groups[{i}].betas", "two numbers", described(one.betas))
        for name, value in zip(("betas[0]", "betas[1]", "eps", "weight_decay"), (*betas, *one[2:]), strict=True):
            _check.real(value, f"groups[{i}].{name}")
    return list(groups)


def _check_update(tensors: tuple[Tensor, ...], values: Any) -> None:
    require = _check.require
    (*lengths, group_count), group, given = values
    rest = iter(tensors)
    named = {name: [next(rest) for _ in range(length)] for name, length in zip(_LISTS, lengths, strict=True)}
    scalars = {"square_sum": torch.float64, "skipped": torch.int64}
    scalars |= {f"groups[{i}].lr": torch.float32 for i in range(group_count)}
    optional = ("grad_scale", "found_inf", "ema_weight")
    scalars |= {name: torch.float32 for name, is_given in zip(optional, given, strict=True) if is_given}
    params = named["params"]
    device = tensors[sum(lengths)].device
    for name, dtype in scalars.items():
        scalar = next(rest)
        _check.tensors(**{name: scalar})
        _check.shape(scalar, name, (), "a 0-dim tensor")
        _check.dtype(scalar, name, dtype)
        _check.device(scalar, name, device, "square_sum")
    for name, found in named.items():
        if found or name not in ("averages", "copies"):
            require(len(found) == len(params), name, f"as many tensors as params ({len(params)})", len(found))
        allowed = {"grads": _check.FLOATS, "copies": (torch.bfloat16, torch.float16)}.get(name, (torch.float32,))
        for i, (t, p) in enumerate(zip(found, params, strict=True) if found else ()):
            _check.dtype(t, f"{name}[{i}]", *allowed)
            _check.device(t, f"{name}[{i}]", device, "square_sum")
            if name == "steps":
                _check.shape(t, f"steps[{i}]", (), "a 0-dim tensor")
            elif t.numel() or name not in ("averages", "copies"):
                rule = f"the shape of params[{i}] {tuple(p.shape)}"
                require(t.shape == p.shape, f"{name}[{i}]", rule, tuple(t.shape))
    require(not named["averages"] or given[2], "ema_weight", "a tensor, as averages are given", None)
    require(len(group) == len(params), "group", f"as many numbers as params ({len(params)})", len(group))
    for i, index in enumerate(group):
        require(0 <= index < group_count, f"group[{i}]", f"at least 0, below {group_count} (groups)", index)
