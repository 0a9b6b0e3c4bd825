# SPDX-License-Identifier: Apache-2.0
"""A tiny call of every op, with which ``fastdistill doctor`` tests whether the available kernels really run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastdistill.ops import _failures
from fastdistill.ops._dispatch import OPS, REFERENCE, use
from fastdistill.ops.adamw_ema import AdamWGroup, adamw_ema, grad_square_sum
from fastdistill.ops.add_bias import add_bias
from fastdistill.ops.attention import attention
from fastdistill.ops.cross_attention import cross_attention
from fastdistill.ops.feature_match import feature_match
from fastdistill.ops.geglu import geglu
from fastdistill.ops.group_norm_silu import group_norm_silu
from fastdistill.ops.layer_norm_modulate import residual_layer_norm_modulate
from fastdistill.ops.noise_gather import noise_gather
from fastdistill.ops.output_match import output_match
from fastdistill.ops.quantize_rows import quantize_rows


def failures(device: str) -> dict[tuple[str, str], str]:
    """Try each available kernel on a type of device. Returns the reason for each (op, kernel) that does not run.

    After an error that leaves the device unusable, nothing more is tried.
    """
    before = [(op, op.calls.copy()) for op in OPS.values()]  # trials do not count as calls of the user
    here = [
        (op.name, k.name) for op in OPS.values() for k in op.kernels if k.device == device and k.available() is None
    ]
    found: dict[tuple[str, str], str] = {}
    try:
        with torch.device(device):
            calls = _calls()
        for name, kernel in here:
            try:
                with use(kernel):
                    calls[name]()
                if device == "cuda":
                    torch.cuda.synchronize()
            except RuntimeError as error:  # a KernelError, or an error of torch from the launched kernel
                found[name, kernel] = str(error)
                if _failures.is_final(error):
                    break
        return found
    except RuntimeError as error:  # from torch itself: the device is in use or its memory is full
        return dict.fromkeys(here, f"{device} cannot be used: {error}")
    finally:
        for op, counted in before:
            op.calls = counted


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of the last call of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdistill":
            self.arguments[func._opname] = tree_map_only(Tensor, Tensor.detach, args)
        return func(*args, **(kwargs or {}))


def _calls() -> dict[str, Callable[[], object]]:
    """A call of each op and of each backward, on the default device."""
    with use(REFERENCE), _Recorder() as recorder:
        _model_ops()
        _losses()
        _noise_gather()
        _adamw_ema()

    def again(name: str, arguments: tuple[Any, ...]) -> Callable[[], object]:
        return lambda: OPS[name].overload(*arguments)

    q = _floats(1, 4, 1, 16)
    calls: dict[str, Callable[[], object]] = {name: again(name, args) for name, args in recorder.arguments.items()}
    return calls | {"attention": lambda: attention(q, q, q)}


def _floats(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def _differentiated(call: Callable[..., Any], *inputs: Tensor) -> None:
    leaves = [t.requires_grad_() for t in inputs]
    made = call(*leaves)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    torch.autograd.grad([2.0 * out.float().sum() for out in outputs], leaves)


def _model_ops() -> None:
    image = _floats(2, 16, 4, 4).to(memory_format=torch.channels_last)  # the one layout that all kernels take
    norm = [_floats(*shape) for shape in ((16,), (16,), (2, 16))]
    _differentiated(lambda x, w, b, t: group_norm_silu(x, w, b, 2, time_bias=t), image, *norm)
    tokens = [_floats(*shape) for shape in ((2, 4, 8), (2, 4, 8), (2, 8), (2, 8), (2, 8))]
    _differentiated(residual_layer_norm_modulate, *tokens)
    _differentiated(geglu, _floats(2, 16))
    _differentiated(add_bias, *(_floats(2, 8, 4, 4) for _ in range(2)), _floats(8))
    quantize_rows(_floats(2, 16))
    _differentiated(cross_attention, *(_floats(2, n, 1, 16) for n in (4, 3, 3)))


def _losses() -> None:
    _differentiated(lambda s: feature_match([s], [torch.zeros_like(s)]).loss, _floats(2, 8))
    table, timestep = torch.ones(3, 5, dtype=torch.float32), torch.tensor([0, 1])
    _differentiated(lambda s: output_match(s, torch.zeros_like(s), timestep, table).loss, _floats(2, 8))


def _noise_gather() -> None:
    coefficients, thresholds = torch.ones(3, 4, dtype=torch.float32), torch.tensor([0, 2**31, 2**32])
    index, counter = torch.tensor([0, 1]), torch.tensor([0, 0])
    noise_gather(_floats(2, 8), index, _floats(3, 8), coefficients, thresholds, counter, batch=2, null_index=2)


def _adamw_ema() -> None:
    param, moment, square, step, lr = (torch.ones(n, dtype=torch.float32) for n in ((8,), (8,), (8,), (), ()))
    total, skipped = grad_square_sum([_floats(8)]), torch.tensor(0)
    groups = [AdamWGroup(lr)]
    adamw_ema([param], [_floats(8)], [moment], [square], [step], groups=groups, square_sum=total, skipped=skipped)
