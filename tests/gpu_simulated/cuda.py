# SPDX-License-Identifier: Apache-2.0
"""cross_attention and its gradients on CPU tensors, with nvcc's code of csrc/cross_attention/cuda.cu for Hopper."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops.cross_attention.cuda import SMALL
from tests.gpu_simulated.launch import run, storages
from tests.gpu_simulated.memory import Report
from tests.gpu_simulated.ptx import Kernel, parse

ROOT = Path(__file__).parents[2]
SHARED = 232448


class _Heads(ctypes.Structure):
    """``fd::Heads``."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]


class _Arguments(ctypes.Structure):
    """``fd::CrossAttentionBackward``."""

    _fields_ = [
        *((name, _Heads) for name in ("q", "k", "v", "grad_out", "grad_q")),
        *((name, ctypes.c_void_p) for name in ("mask", "rows", "grad_k", "grad_v", "partials")),
        *((name, ctypes.c_int64) for name in ("B", "N", "H", "D", "L", "R", "chunks", "span")),
        *((name, ctypes.c_int) for name in ("masking", "mask_dtype", "dtype")),
        ("scale", ctypes.c_float),
        ("swizzled", ctypes.c_bool),
    ]


class _Forward(ctypes.Structure):
    """``fd::CrossAttention``."""

    _fields_ = [
        *((name, _Heads) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("mask", "rows")),
        *((name, ctypes.c_int64) for name in ("B", "N", "H", "D", "L", "R", "chunks", "span")),
        *((name, ctypes.c_int) for name in ("masking", "mask_dtype", "dtype")),
        ("scale", ctypes.c_float),
        ("swizzled", ctypes.c_bool),
    ]


def compiled(folder: Path) -> str:
    """The PTX of all kernels."""
    source, made = ROOT / "csrc" / "cross_attention" / "cuda.cu", folder / "kernels.ptx"
    options = ["-std=c++17", "-O3", "-arch=compute_90a", f"-I{ROOT / 'csrc'}", "-ptx"]
    subprocess.run(["nvcc", *options, str(source), "-o", str(made)], check=True)
    return made.read_text()


def kernel(text: str, dim: int, dtype: torch.dtype, swizzled: bool = False, forward: bool = False) -> Kernel:
    head, *entries = re.split(r"^(?=(?:\.visible |\.weak )?\.entry )", text, flags=re.M)
    name = "4bf16" if dtype == torch.bfloat16 else "3f16"
    base = "9attention" if forward else "attention_gradients"
    pattern = re.compile(rf".*{base}ILi{dim}ELi\d+ELb{swizzled:d}ENS_{name}E")
    (entry,) = (e for e in entries if pattern.match(e.split("(")[0]))
    return parse(head + entry)


def gradients(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, grad_out: Tensor, chunks: int
) -> tuple[list[Tensor], Report]:
    """The gradients of Q, K and V (the chunks are added here), and forbidden operations of the launch."""
    (B, N, H, D), L = q.shape, k.shape[1]
    queries = 64 if D in SMALL else 128
    span = -(-N // queries // chunks) * queries
    chunks = -(-N // span)
    grads, report = [torch.full_like(t, torch.nan) for t in (q, k, v)], Report()
    partials = torch.full((2, B * chunks, L, H, D), torch.nan)
    a = _Arguments()
    for name, t in zip(("q", "k", "v", "grad_out", "grad_q"), (q, k, v, grad_out, grads[0]), strict=True):
        setattr(a, name, _Heads(t.data_ptr(), *t.stride()[:3]))
    a.mask, a.masking = (mask.data_ptr(), 1) if mask is not None else (None, 0)
    a.grad_k, a.grad_v = grads[1].data_ptr(), grads[2].data_ptr()
    a.partials = partials.data_ptr() if chunks > 1 else None
    a.B, a.N, a.H, a.D, a.L, a.R, a.chunks, a.span = B, N, H, D, L, B, chunks, span
    a.scale, a.dtype = scale, _native.DTYPES[q.dtype]
    run(kernel, [bytes(a)], storages(), report, (B * H * chunks, 1, 1), 2 * queries, SHARED)
    if chunks > 1:
        sums = partials.view(2, B, chunks, L, H, D).sum(2)
        grads[1:] = [sums[0].to(k.dtype), sums[1].to(v.dtype)]
    return grads, report


def outputs(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, chunks: int
) -> tuple[Tensor, Report]:
    (B, N, H, D), L = q.shape, k.shape[1]
    span = -(-N // 64 // chunks) * 64
    chunks = -(-N // span)
    out, report = torch.full_like(q, torch.nan), Report()
    a = _Forward()
    for name, t in zip(("q", "k", "v", "out"), (q, k, v, out), strict=True):
        setattr(a, name, _Heads(t.data_ptr(), *t.stride()[:3]))
    a.mask, a.masking = (mask.data_ptr(), 1) if mask is not None else (None, 0)
    a.B, a.N, a.H, a.D, a.L, a.R, a.chunks, a.span = B, N, H, D, L, B, chunks, span
    a.scale, a.dtype = scale, _native.DTYPES[q.dtype]
    run(kernel, [bytes(a)], storages(), report, (B * H * chunks, 1, 1), 128, SHARED)
    return out, report
