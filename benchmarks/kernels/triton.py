# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel ahead of time, without a GPU: ``python -m benchmarks.kernels.triton`` prints rows as
JSON, with ``--lint`` the figures of ``lint``.

The ops' own launch functions run on tensors without memory; instead of being launched, the kernels are compiled. This
needs a process in which Triton does not interpret.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.kernels import lint
from benchmarks.kernels.launches import LAUNCHES
from benchmarks.kernels.resources import Row, occupancy, unequal_copies, usage
from fastdistill.ops._triton import target

# Triton 3.6's assembler keeps one register of feature_match in memory on sm_100; that version is only used for Hopper.
ARCHS = (80, 90, 100) if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6) else (80, 90)
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
#: Ops whose kernels need instructions that older GPUs do not have.
SINCE = {"quantize_rows": 89}


class Recorder:
    """Inside, a launch of a Triton kernel records (kernel, signature, constants, attributes, options) and runs
    nothing."""

    def __init__(self) -> None:
        self.launched: dict[str, tuple[JITFunction, Any, Any, Any, dict[str, int]]] = {}

    def __enter__(self) -> Recorder:
        self._run = JITFunction.run
        recorder = self

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            recorder.record(kernel, args, kwargs)

        JITFunction.run = run
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self._run

    def record(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "enable_fp_fusion" not in kwargs:
            raise RuntimeError(f"{kernel.__name__}: launched without enable_fp_fusion, whose default changes")
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            else:
                signature[parameter.name] = _specialized(value, (i,), constants, attributes)
        key = f"{kernel.__name__} {signature} {constants} {attributes} {options}"
        self.launched[key] = (kernel, signature, constants, attributes, options)


def _specialized(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type of an argument as Triton's launcher specializes it: 1 is a constant, multiples of 16 are marked."""
    if isinstance(value, tuple):
        return tuple(_specialized(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    if isinstance(value, Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        constants[path] = 1
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@dataclass(frozen=True)
class Compiled:
    """A kernel's specialization for an architecture. ``op``: the name of the launch. ``cubin``: a file that exists
    until the next one is compiled."""

    op: str
    kernel: str
    arch: int
    threads: int
    shared: int
    cubin: Path


def compiled(launches: dict[str, Callable[[], None]], archs: tuple[int, ...]) -> Iterator[Compiled]:
    for name, launch in launches.items():
        for arch in archs:
            if arch < SINCE.get(name.split()[0], 0):
                continue
            with Recorder() as recorder, target(arch // 10):
                launch()
            if not recorder.launched:
                raise RuntimeError(f"{name}: launched no Triton kernel")
            for kernel, signature, constants, attributes, options in recorder.launched.values():
                source = ASTSource(kernel, signature, constants, attributes)
                made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
                if unequal := unequal_copies(made.asm["ptx"]):
                    raise RuntimeError(f"{name}: {kernel.__name__}, sm_{arch}: unequal copies of a sum by {unequal}")
                threads = 32 * options.get("num_warps", 4)
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    Path(file.name).write_bytes(made.asm["cubin"])
                    yield Compiled(name, kernel.__name__, arch, threads, made.metadata.shared, Path(file.name))


def rows(launches: dict[str, Callable[[], None]] = LAUNCHES, archs: tuple[int, ...] = ARCHS) -> Iterator[Row]:
    """One row per kernel, specialization and architecture."""
    for one in compiled(launches, archs):
        ((_, _, used),) = usage(one.cubin)
        yield Row(
            one.op, one.kernel, "triton", triton.__version__, f"sm_{one.arch}", used["REG"],
            used["STACK"] + used["LOCAL"], one.shared, one.threads,
            occupancy(one.arch, used["REG"], one.shared, one.threads),
        )  # fmt: skip


def figures(launches: dict[str, Callable[[], None]] = LAUNCHES) -> Iterator[lint.Figures]:
    """What costs time in each kernel and specialization."""
    for one in compiled(launches, (lint.ARCH,)):
        ((_, _, used),) = usage(one.cubin)
        (code,) = lint.code_of(one.cubin).values()
        resident = occupancy(one.arch, used["REG"], one.shared, one.threads)
        yield lint.figures(one.op, one.kernel, f"triton {triton.__version__}", code, one.threads, resident)


if __name__ == "__main__":
    made = figures() if "--lint" in sys.argv[1:] else rows()
    json.dump([dataclasses.asdict(row) for row in made], sys.stdout, indent=1)
