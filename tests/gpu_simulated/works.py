# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.gpu_simulated.works [NAME ...]``: steps of ops with Triton's compiled kernels, as JSON.

Each step of tests/gpu/work.py (and more, until every kernel has run) is computed by the kernels and by the reference.
``--plant`` adds runs with removed instructions. This is a program of its own, because Triton decides at its import
whether it interprets.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import triton.language  # must come before tests.gpu_on_cpu, which makes Triton interpret

import tests.gpu_on_cpu  # noqa: F401 (registers the kernels for CPU tensors)

os.environ["TRITON_INTERPRET"] = "0"

import torch

from fastdistill.ops import cross_attention, group_norm_silu, use
from fastdistill.ops._triton import target
from tests.gpu import work
from tests.gpu_simulated.dispatch import as_on_a_gpu
from tests.gpu_simulated.driver import simulated
from tests.gpu_simulated.launch import Simulation
from tests.gpu_simulated.memory import Fault
from tests.gpu_simulated.ptx import Kernel


def _group_norm(device: str, last: bool) -> work.Work:
    """Groups that do not fit into a program: moments, their merge, the output, and the backward's counterparts."""

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        return group_norm_silu(x, weight, bias, 1)

    return work.model_work(device, call, (1, 16, 24, 48), (16,), (16,), dtype=torch.bfloat16)


def _cross_attention(
    device: str, queries: int, keys: int, dim: int, masked: bool = False, dtype: torch.dtype = torch.bfloat16
) -> work.Work:
    mask = torch.arange(keys).flip(0)[None] > 3
    call = functools.partial(cross_attention, mask=mask) if masked else cross_attention
    shapes = (1, queries, 1, dim), *[(1, keys, 1, dim)] * 2
    return work.model_work(device, call, *shapes, dtype=dtype)


WORKS: dict[str, Callable[[str], work.Work]] = {
    **{name: work.WORKS[name] for kernel, name in work.PAIRS if kernel == "triton"},
    "group_norm_silu-tiled": lambda device: _group_norm(device, False),
    "group_norm_silu-tiled-channels_last": lambda device: _group_norm(device, True),
    "cross_attention-77": lambda device: _cross_attention(device, 130, 77, 40),
    "cross_attention-77-narrow": lambda device: _cross_attention(device, 70, 77, 36),
    "cross_attention-77-masked": lambda device: _cross_attention(device, 70, 77, 80, masked=True),
    "cross_attention-120": lambda device: _cross_attention(device, 70, 120, 72),
    "cross_attention-160-fp16": lambda device: _cross_attention(device, 70, 77, 160, dtype=torch.float16),
    "cross_attention-77-fp32": lambda device: _cross_attention(device, 35, 77, 80, dtype=torch.float32),
    "cross_attention-300": lambda device: _cross_attention(device, 70, 300, 72),
    "cross_attention-300-masked": lambda device: _cross_attention(device, 70, 300, 112, masked=True),
}
#: Steps for architectures from this one on.
SINCE = {"quantize_rows": 89}
#: Instructions that are removed from a kernel, by the step that runs it.
PLANTS = {
    "bar.sync": "cross_attention",
    "fence.proxy.async": "cross_attention",
    "wgmma.wait_group": "cross_attention",
    "cp.async.wait_group": "cross_attention-long",
}


@dataclass
class Result:
    """``errors``: for each tensor of a dtype the largest error and magnitude. ``found``: (kernel, finding, instruction,
    count). ``ran``: kernel -> blocks, instructions. ``fault``: what ended it."""

    errors: list[tuple[str, float, float]] = field(default_factory=list)
    found: list[tuple[str, str, str, int]] = field(default_factory=list)
    ran: dict[str, list[int]] = field(default_factory=dict)
    fault: str = ""


def result(name: str, arch: int, planted: Callable[[Kernel], Kernel] = lambda kernel: kernel, steps: int = 2) -> Result:
    simulation, made = Simulation(planted), Result()
    try:
        with simulated(simulation, arch), target(arch // 10), as_on_a_gpu("triton"), use("triton"):
            written = work.steps_of(WORKS[name]("cpu"), steps)
    except Fault as fault:
        made.fault = str(fault)
    else:
        with use("reference"):
            expected = work.steps_of(WORKS[name]("cpu"), steps)
        pairs = [pair for step in zip(written, expected, strict=True) for pair in zip(*step, strict=True)]
        made.errors = [_error(x, y) for x, y in pairs if x.numel()]
    made.found = [(*key, times) for key, times in simulation.found.items()]
    made.ran = simulation.ran
    return made


def _error(got: torch.Tensor, expected: torch.Tensor) -> tuple[str, float, float]:
    x, y = got.double(), expected.double()
    same = (x == y) | (x.isnan() & y.isnan())
    difference = torch.where(same, 0.0, (x - y).abs()).max().item()
    return str(got.dtype).removeprefix("torch."), difference, y.abs().nan_to_num().max().item()


def _without(pattern: str) -> Callable[[Kernel], Kernel]:
    def planted(kernel: Kernel) -> Kernel:
        try:
            return kernel.without(pattern)
        except ValueError:
            return kernel

    return planted


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.gpu_simulated.works", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="(all)")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--plant", action="store_true")
    options = parser.parse_args(arguments)
    made: dict[str, Any] = {"triton": triton.__version__, "works": {}, "planted": {}}
    for name in options.names or (name for name in WORKS if options.arch >= SINCE.get(name, 0)):
        made["works"][name] = dataclasses.asdict(result(name, options.arch))
        print(name, made["works"][name]["fault"], file=sys.stderr, flush=True)
    for pattern, name in PLANTS.items() if options.plant else ():
        made["planted"][pattern] = dataclasses.asdict(result(name, options.arch, _without(pattern), steps=1))
    json.dump(made, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
