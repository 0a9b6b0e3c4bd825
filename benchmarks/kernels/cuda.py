# SPDX-License-Identifier: Apache-2.0
"""What nvcc produced for every CUDA kernel of the built extension, for the architectures of the report."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator

from benchmarks.kernels import lint
from benchmarks.kernels.resources import SYSTEM_SHARED, Row, binary, cuobjdump, occupancy, usage

ARCHS = (80, 90, 100)
THREADS = {"add_squares": 1024, "finish": 1024, "prepare": 128}  # per block; 256 for all others
THREADS |= {
    f"attention_gradients<{dim}, 80, {swizzled}, {dtype}>": 128
    for dim in (40, 64) for swizzled in ("false", "true") for dtype in ("bf16", "f16")
}  # fmt: skip
THREADS |= {"attention": 128}
_OPS = {"match": "feature_match", "finish": "feature_match", "add_samples": "feature_match", "gather": "noise_gather"}
_OPS |= {"scale": "scale_gradients", "square_sum": "grad_square_sum", "add_squares": "grad_square_sum"}
_OPS |= {"match_output": "output_match", "finish_output": "output_match"}
_OPS |= {"cluster_forward": "group_norm_silu"}
_OPS |= {"cluster_backward": "group_norm_silu_backward", "add_channels": "group_norm_silu_backward"}
_OPS |= {
    "attention": "cross_attention",
    "attention_gradients": "cross_attention_backward",
    "add_chunks": "cross_attention_backward",
}
_OPS |= {"prepare": "adamw_ema", "update": "adamw_ema", "philox_kernel": "philox4x32"}


def rows() -> Iterator[Row]:
    """One row per kernel and architecture.

    Raises:
        RuntimeError: the extension was not built, or it contains a kernel that this table does not know.
    """
    return (row for row, _ in _kernels())


def figures() -> Iterator[lint.Figures]:
    """What costs time in each kernel; raises the same errors as ``rows``."""
    path, code = _extension(), lint.code_of(_extension())
    listed = subprocess.run([cuobjdump(), "-elf", "-arch", binary(lint.ARCH), path], capture_output=True, text=True)
    version = re.search(r"toolkit=([\d.]+)", listed.stdout)
    compiler = f"cuda {version[1] if version else 'unknown'}"
    for row, mangled in _kernels():
        if row.arch == f"sm_{lint.ARCH}":
            yield lint.figures(row.op, row.kernel, compiler, code[mangled], row.threads, row.occupancy)


def _extension() -> str:
    spec = importlib.util.find_spec("fastdistill._cuda")
    if spec is None or spec.origin is None:
        raise RuntimeError("the extension fastdistill._cuda was not built (no nvcc when it was installed?)")
    return spec.origin


def _kernels() -> Iterator[tuple[Row, str]]:
    """Rows with the mangled names of their kernels."""
    for arch, mangled, used in usage(_extension()):
        if arch not in ARCHS:
            continue
        name = _demangled(mangled)
        base = re.split(r"[<(]", name)[0]
        if base not in _OPS:
            raise RuntimeError(f"{name}: a kernel without an op in benchmarks/kernels/cuda.py")
        threads, shared = THREADS.get(name, THREADS.get(base, 256)), used["SHARED"]
        if arch >= 90 and shared:
            shared -= SYSTEM_SHARED  # on these architectures the compiler includes it
        row = Row(
            _OPS[base], name, "cuda", "", f"sm_{arch}", used["REG"], used["STACK"] + used["LOCAL"], shared, threads,
            occupancy(arch, used["REG"], shared, threads),
        )  # fmt: skip
        yield row, mangled


def _demangled(name: str) -> str:
    """``match<2, false>`` from a mangled name."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        raise RuntimeError("c++filt was not found (it comes with the compiler)")
    full = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(anonymous namespace\)::|fd::|device::", "", full).removeprefix("void ")
    plain = re.sub(r"\((\w+)\)(\d)", r"\1 \2", plain)
    return plain.split("(")[0]
