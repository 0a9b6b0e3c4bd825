# SPDX-License-Identifier: Apache-2.0
"""Arguments of the optimizer's update and of the norm before it."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from fastdistill.ops import AdamWGroup, adamw_ema, grad_square_sum
from tests.fuzz.calls import Call, rounded
from tests.fuzz.tensors import Spec, limited, plain, sizes, small_sizes, spec

shapes = st.lists(st.one_of(small_sizes, sizes), max_size=3).map(tuple).map(limited)


def square_sum_call(draw: Any) -> Call:
    arguments: dict[str, Any] = {"grads": [plain(spec(draw, s)) for s in draw(st.lists(shapes, max_size=4))]}

    def truth(grads: Any) -> tuple[Tensor]:
        zero = torch.zeros((), dtype=torch.float64)
        return (sum((rounded(g.double().square().sum(), g.numel()) for g in grads), zero).double(),)

    def function(grads: Any) -> tuple[Tensor]:
        return (grad_square_sum(grads).float(),)  # its precision is float32's

    return Call("grad_square_sum", function, arguments, truth)


STATE = ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages", "copies")


def adamw_call(draw: Any) -> Call:
    listed = draw(st.lists(shapes, min_size=1, max_size=3))
    alike = draw(st.booleans())  # whether all tensors of a parameter have one layout
    base = [plain(spec(draw, s, torch.float32)) for s in listed]

    def like(dtype: Any = torch.float32, **options: Any) -> list[Spec]:
        made = []
        for s, one in zip(listed, base, strict=True):
            own = one if alike else plain(spec(draw, s, torch.float32))
            made.append(Spec(**{**vars(own), "dtype": dtype, **options}))
        return made

    count = len(listed)
    groups = draw(st.sampled_from((1, 2)))
    arguments: dict[str, Any] = {
        "params": base,
        "grads": like(draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))),
        "exp_avgs": like(scale=0.1),
        "exp_avg_sqs": like(scale=0.0, center=0.25),
        "averages": like() if draw(st.booleans()) else [],
        "copies": like(draw(st.sampled_from((torch.bfloat16, torch.float16)))) if draw(st.booleans()) else [],
        "steps": [Spec((), torch.float32, below=9) for _ in range(count)],
        "lr": [Spec((), torch.float32, scale=0.0, center=1e-2) for _ in range(groups)],
        "group": [i % groups for i in range(count)],
        "square_sum": Spec((), torch.float64, scale=0.0, center=draw(st.sampled_from((4.0, math.inf, math.nan, 0.0)))),
        "skipped": Spec((), torch.int64, below=3),
        "max_norm": draw(st.sampled_from((math.inf, 1.0, 0.0, 0.5))),
        "ema_warmup": draw(st.booleans()),
        "zero_grads": draw(st.booleans()),
        "grad_scale": None,
        "found_inf": None,
        "ema_weight": None,
    }
    if arguments["averages"] or draw(st.booleans()):
        arguments["ema_weight"] = Spec((), torch.float32, scale=0.0, center=0.1)
    if draw(st.booleans()):
        arguments["grad_scale"] = Spec((), torch.float32, scale=0.0, center=4.0)
    if draw(st.booleans()):
        arguments["found_inf"] = Spec((), torch.float32, scale=0.0, center=draw(st.sampled_from((0.0, 1.0))))

    def function(lr: Any, **given: Any) -> tuple[Tensor, ...]:
        groups = [AdamWGroup(one, *OPTIONS[i % 2]) for i, one in enumerate(lr)] if isinstance(lr, list) else lr
        adamw_ema(groups=groups, **given)
        return ()

    written = frozenset((*STATE, "steps", "skipped"))
    return Call("adamw_ema", function, arguments, _adamw_truth, written=written)


OPTIONS = (((0.9, 0.999), 1e-8, 1e-2), ((0.8, 0.95), 1e-6, 0.1))


def _adamw_truth(
    params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, averages: Any, copies: Any, steps: Any, lr: Any,
    group: Any, square_sum: Tensor, skipped: Tensor, max_norm: float, ema_warmup: bool, zero_grads: bool,
    grad_scale: Any, found_inf: Any, ema_weight: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One step in any precision, into separate tensors; returned in the order of the names of the written arguments."""
    skip = not square_sum.isfinite() or (found_inf is not None and found_inf != 0)
    scale = 1.0 if grad_scale is None else grad_scale.double().item()
    clip = min(1.0, max_norm / (square_sum.sqrt().item() / scale + 1e-6)) if not skip else 0.0
    found: dict[str, list[Tensor]] = {name: [] for name in (*STATE, "steps", "skipped")}
    for i, p in enumerate(params):
        (b1, b2), eps, decay = OPTIONS[group[i] % 2]
        rate, k = lr[group[i]].double().item(), steps[i].item()
        g = rounded(grads[i].to(p.dtype) * (clip / scale)) if not skip else grads[i].to(p.dtype)
        m, v, average = exp_avgs[i], exp_avg_sqs[i], averages[i] if averages else None
        if not skip:
            m = rounded(rounded(b1 * m) + rounded((1 - b1) * g))
            v = rounded(b2 * v + rounded((1 - b2) * g * g))
            size = rounded(v.sqrt() / (1 - b2 ** (k + 1)) ** 0.5) + eps
            p = rounded(rounded(p * (1 - rate * decay)) - rounded(rate / (1 - b1 ** (k + 1)) * m / size))
            if average is not None:
                keep = 1 - ema_weight.double().item()
                keep = min(keep, (1 + k) / (10 + k)) if ema_warmup else keep
                average = rounded(average + rounded((1 - keep) * rounded(p - average)))
        values = {"params": p, "exp_avgs": m, "exp_avg_sqs": v, "averages": average}
        values["grads"] = torch.zeros_like(grads[i]) if zero_grads else grads[i]
        values["copies"] = (copies[i] if skip else p) if copies else None
        values["steps"] = steps[i] + (not skip)
        for name, value in values.items():
            if value is not None:
                found[name].append(value)
    found["skipped"].append(skipped + skip)
    return tuple(t for name in sorted(found) for t in found[name])
