# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.gpu_simulated.host [NAME ...]``: the host's part of eager calls on a GPU, measured without one.

Each op takes the way of a GPU's tensors up to the launch, which does nothing: through Triton's own launcher, and for
the CUDA kernels up to the extension. Not included: what torch adds for a GPU (allocations, cudaLaunchKernel). Prints
JSON: for each op and kernel the microseconds of a forward without gradients, of one that is recorded, and of a
backward. With ``--calls``: how many Python functions of this package each of them calls, which does not depend on the
machine; nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import fastdistill
from fastdistill.ops import (
    _native,
    cross_attention,
    feature_match,
    geglu,
    group_norm_silu,
    layer_norm_modulate,
    use,
)
from fastdistill.ops._triton import target
from tests.gpu_simulated.dispatch import as_on_a_gpu
from tests.gpu_simulated.driver import simulated

PACKAGE = str(Path(fastdistill.__file__).parent)
TIMED, WARM = 300, 30
Call = tuple[Callable[[], Tensor], Sequence[Tensor]]  # and the tensors of which gradients are computed


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


def _group_norm(size: int) -> Call:
    x = torch.randn((2, 320, size, size), dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight, bias, time_bias = _leaf(320), _leaf(320), _leaf(2, 320)
    return lambda: group_norm_silu(x, weight, bias, 32, time_bias=time_bias), (x, weight, bias, time_bias)


def _layer_norm() -> Call:
    x, scale, shift = _leaf(2, 64, 320), _leaf(2, 320), _leaf(2, 320)
    return lambda: layer_norm_modulate(x, scale, shift), (x, scale, shift)


def _affine_layer_norm() -> Call:
    x, weight, bias = _leaf(2, 64, 320), _leaf(320), _leaf(320)
    return lambda: layer_norm_modulate(x, weight=weight, bias=bias), (x, weight, bias)


def _geglu() -> Call:
    x = _leaf(2, 64, 2560)
    return lambda: geglu(x), (x,)


def _cross_attention(dim: int) -> Call:
    q, k, v = _leaf(2, 64, 8, dim), _leaf(2, 77, 8, dim), _leaf(2, 77, 8, dim)
    return lambda: cross_attention(q, k, v), (q, k, v)


def _feature_match() -> Call:
    student = [_leaf(2, 32, 8, 8) for _ in range(9)]
    teacher, weights = [torch.randn_like(s) for s in student], torch.ones(9)
    return lambda: feature_match(student, teacher, weights=weights).loss, student


#: By name: the call, and the kernels that it is measured with.
WORKS: dict[str, tuple[Callable[[], Call], tuple[str, ...]]] = {
    "group_norm_silu": (lambda: _group_norm(16), ("cuda", "triton")),
    "group_norm_silu in tiles": (lambda: _group_norm(48), ("cuda", "triton")),
    "layer_norm_modulate": (_layer_norm, ("triton",)),
    "layer_norm_modulate affine": (_affine_layer_norm, ("triton",)),
    "geglu": (_geglu, ("triton",)),
    "cross_attention 40": (lambda: _cross_attention(40), ("triton",)),
    "cross_attention 80": (lambda: _cross_attention(80), ("cuda", "triton")),
    "feature_match 9 taps": (_feature_match, ("cuda", "triton")),
}


def _median(call: Callable[[], float]) -> float:
    for _ in range(WARM):
        call()
    return round(1e6 * statistics.median(call() for _ in range(TIMED)), 1)


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def times(run: Call) -> list[float]:
    """Microseconds of a forward without gradients, of a forward, and of a backward."""
    call, leaves = run
    grad = torch.ones_like(call())
    with torch.no_grad():
        alone = _median(lambda: _timed(call))

    def backward() -> float:
        y = call()
        return _timed(lambda: torch.autograd.grad(y, leaves, grad))

    return [alone, _median(lambda: _timed(call)), _median(backward)]


def calls(run: Call) -> list[int]:
    """The same parts, in calls of Python functions of this package."""
    call, leaves = run
    grad, counts = torch.ones_like(call()), []

    def count(run: Callable[[], Any]) -> Any:
        found = 0

        def profile(frame: Any, event: str, _: Any) -> None:
            nonlocal found
            found += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

        sys.setprofile(profile)
        try:
            made = run()
        finally:
            sys.setprofile(None)
        counts.append(found)
        return made

    with torch.no_grad():
        call()
        count(call)
    y = count(call)
    torch.autograd.grad(call(), leaves, grad)
    count(lambda: torch.autograd.grad(y, leaves, grad))
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.gpu_simulated.host", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="(all)")
    parser.add_argument("--calls", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[Any]]] = {}
    with ExitStack() as stack:
        if options.calls:
            stack.enter_context(patch.object(JITFunction, "run", lambda *args, **kwargs: None))
        else:
            stack.enter_context(simulated(lambda *args: None))
        stack.enter_context(target(9))
        for name in options.names or WORKS:
            make, kernels = WORKS[name]
            for kernel in kernels:
                if kernel == "cuda" and _native._load("_cuda")[0] is None:
                    continue
                with as_on_a_gpu(kernel), use(kernel):
                    found.setdefault(name, {})[kernel] = (calls if options.calls else times)(make())
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
