# SPDX-License-Identifier: Apache-2.0
"""Group norm, affine maps and SiLU in CUDA on thread block clusters: ``csrc/group_norm_silu/cuda.cu``. It supports
channels last, if a slice (one or more groups of a sample) fits into the shared memory of a cluster."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops._dispatch import forced
from fastdistill.ops.group_norm_silu import cpp
from fastdistill.ops.group_norm_silu.layout import channels_last
from fastdistill.ops.group_norm_silu.reference import spread

ARCH, MISSING = (9, 0), "clusters of blocks (sm_90)"
SHARED = 227 << 10  # most bytes per block
PAIRED = (
    SHARED // 2 - 1024
)  # most bytes per block if two blocks share a multiprocessor, so that one computes while the other waits
SECTOR = 32  # bytes per memory transaction
NARROW = 128  # bytes that a slice should have at least per position
BLOCKS = 132  # one per multiprocessor of an H100
# Blocks. With 16 (32 x 320 x 64 x 64, bfloat16) an H200 took 122 µs and more, with 8 it took 94.
CLUSTERS = (1, 2, 4, 8)
# Positions up to which Triton is faster: 32 x 1280 x 8 x 8 in bfloat16 took 40 µs here and 31 in Triton on an H200.
FEW = 64
THREADS = COLUMNS = 256  # threads per block; most columns of 16 bytes per slice
STEPS = 2  # minimum steps per thread
EMULATED = 3  # clusters at once where there is no GPU

Sizes = tuple[int, int, int, int]  # batch, channels, positions, groups
Cut = tuple[int, int, int]  # groups per slice, blocks per cluster, clusters at once (each takes several slices)


@functools.cache
def reason() -> str | None:
    """Why these kernels cannot run in this installation, or None."""
    if why := _native.cuda_reason():
        return why
    newest = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if newest >= ARCH else f"no GPU here has {MISSING}"


def refuse(x: Tensor, *args: Any) -> str | None:
    """Like the C++ kernel; also refuses calls that do not fit into a cluster."""
    *_, groups, _, silu, y, _, _ = args
    return cpp.refuse(x, *args) or _refuse(x, {"x": x, "y": y}, groups, silu, False)


def refuse_backward(grad: Tensor, x: Tensor, *args: Any) -> str | None:
    """See ``refuse``."""
    *_, groups, silu, _, dx, _ = args
    return cpp.refuse_backward(grad, x, *args) or _refuse(x, {"x": x, "grad": grad, "dx": dx}, groups, silu, True)


def _refuse(x: Tensor, large: dict[str, Tensor], groups: int, silu: bool, backward: bool) -> str | None:
    if not channels_last(x):
        return "channels must be side by side"
    for name, tensor in large.items():
        if tensor.data_ptr() % 16:
            return f"{name} must start at a multiple of 16 bytes"
    sizes = cpp.sizes_of(x, groups)
    if x.is_cuda and sizes[2] <= FEW and forced() != "cuda":
        return f"up to {FEW} positions are faster in Triton"
    cut = _cut(x.get_device(), x.dtype, sizes, silu, backward)
    return cut if isinstance(cut, str) else None


@functools.lru_cache(4096)
def _cut(device: int, dtype: torch.dtype, sizes: Sizes, silu: bool, backward: bool) -> Cut | str:
    """How a call is divided on a GPU (-1: emulated), or the reason why it cannot be divided.

    Preferred are, in this order: two blocks per multiprocessor, several positions per thread, enough blocks for all
    multiprocessors, whole sectors; then small clusters (which start and synchronize faster), and narrow slices.
    """
    if device >= 0 and torch.cuda.get_device_capability(device) < ARCH:
        return f"the GPU has no {MISSING}"
    batch, channels, positions, groups = sizes
    step, number, cuda = channels // groups * dtype.itemsize, _native.DTYPES[dtype], _native.cuda()
    found: list[tuple[tuple[Any, ...], tuple[int, int]]] = []
    for some in (n for n in range(1, groups + 1) if groups % n == 0):
        width = some * step
        if width % 16 or width > 16 * COLUMNS:
            continue
        whole, wide = width % SECTOR == 0, width >= min(NARROW, groups * step)
        for cluster in CLUSTERS:
            shared = cuda.group_norm_silu_shared(number, sizes, (some, cluster, 0), backward)
            blocks = batch * (groups // some) * cluster
            if shared <= SHARED and blocks < 1 << 31:
                busy = cluster == 1 or positions * width >= STEPS * 16 * THREADS * cluster
                fits, full = (shared <= PAIRED, busy, min(blocks, BLOCKS)), min(blocks, 2 * BLOCKS)
                worth = *fits, whole and wide, full, -cluster, -width
                found.append((worth, (some, cluster)))
    if not found:
        return "no slice of whole groups of 16 bytes fits into the shared memory of a cluster"
    for _, cut in sorted(found, reverse=True):
        most = EMULATED if device < 0 else cuda.group_norm_silu_clusters(number, sizes, silu, (*cut, 0), backward)
        if most > 0:
            return *cut, most
    return "the GPU runs no cluster of this size"


def _common(
    x: Tensor, given: cpp.Given, groups: int, silu: bool, eps: float, mean: Tensor, rstd: Tensor, backward: bool
) -> tuple[Any, ...]:
    common = cpp.common(x, given, groups, silu, eps, mean, rstd)
    return *common, _cut(x.get_device(), x.dtype, common[2], silu, backward), _native.queue(x)


def group_norm_silu(x: Tensor, *args: Any) -> None:
    """One launch; arguments as in the reference."""
    *given, groups, eps, silu, y, mean, rstd = args
    _native.cuda().group_norm_silu(*_common(x, given, groups, silu, eps, mean, rstd, False), y.data_ptr())


def group_norm_silu_backward(grad: Tensor, x: Tensor, *args: Any) -> None:
    """One launch, and one more for weight and bias; arguments as in the reference."""
    *given, mean, rstd, groups, silu, wanted, dx, small = args
    sums = 0
    if wanted & 3:
        held = torch.empty((2, *x.shape[:2]), dtype=torch.float32, device=x.device)
        sums = held.data_ptr()
    _native.cuda().group_norm_silu_backward(
        *_common(x, given, groups, silu, 0.0, mean, rstd, True), grad.data_ptr(), dx.data_ptr(),
        cpp.rows(spread(wanted, small)), sums,
    )  # fmt: skip
