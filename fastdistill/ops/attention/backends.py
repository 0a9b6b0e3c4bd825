# SPDX-License-Identifier: Apache-2.0
"""The backends of attention: torch's, and xformers and FlashAttention 3 if they are installed.

Inputs and outputs are [B, N, H, D]; each backend has its own backward.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastdistill.errors import quoted
from fastdistill.ops._backward import is_differentiated
from fastdistill.ops._dispatch import quiet
from fastdistill.ops._sdpa import sdpa

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _always(device: str) -> str | None:
    return None if device == "cpu" or torch.cuda.is_available() else "no CUDA device"


@dataclass(frozen=True)
class Backend:
    """``available`` returns why this installation cannot run it on a type of device (None: it can), ``deterministic``
    whether its backward gives the same bits in every run under torch's current deterministic mode."""

    name: str
    devices: tuple[str, ...]
    run: Attention
    available: Callable[[str], str | None] = _always
    deterministic: Callable[[str], bool] = lambda device: True


TORCH = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # No switch is set if torch would choose this backend itself: setting one takes as long as a small kernel.
    chosen = quiet() and torch._fused_sdp_choice(q, k, v, scale=scale) == TORCH[name].value
    return sdpa(q, k, v, scale=scale, backends=() if chosen else [TORCH[name]]).transpose(1, 2)


def default(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The backend that torch itself chooses; in its deterministic mode, among the deterministic ones."""
    allowed: list[SDPBackend] = []
    if torch.are_deterministic_algorithms_enabled():
        allowed = [TORCH[name] for name in candidates(q.device.type) if name in TORCH]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return sdpa(q, k, v, scale=scale, backends=allowed).transpose(1, 2)


def _once(out: Tensor) -> Tensor:
    """Refuse second derivatives of a result of other libraries: torch would treat their backwards as constants."""

    def refuse(grad: Tensor) -> None:
        if is_differentiated():
            raise RuntimeError(
                "attention: this backend's gradient cannot be differentiated again (create_graph=True):"
                " use backend='math' where a second derivative is needed"
            )

    if out.requires_grad:
        out.register_hook(refuse)
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out: Tensor = importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v, scale=scale)
    return _once(out)


def _fa3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    flash = importlib.import_module("flash_attn_interface").flash_attn_func
    given = flash(q, k, v, softmax_scale=scale, deterministic=torch.are_deterministic_algorithms_enabled())
    out: Tensor = given[0] if isinstance(given, tuple) else given  # older versions also return the log-sum-exp
    return _once(out)


@functools.cache
def _missing(module: str) -> str | None:
    return f"{module} is not installed" if importlib.util.find_spec(module) is None else None


def _installed(module: str, device: str) -> str | None:
    return _missing(module) or _always(device)


@functools.cache
def _xformers_unbuilt() -> str | None:
    """Why xformers has no kernels: it can be imported even if they were built for another torch or not for CUDA."""
    try:
        library = importlib.import_module("xformers._cpp_lib")
    except Exception as error:
        return f"xformers does not load: {quoted(error)}"
    failure = getattr(library, "_cpp_library_load_exception", None)
    if failure is not None:
        return " ".join(" ".join(str(failure).splitlines()[:2]).split())
    return None if getattr(library, "_built_with_cuda", True) else "xformers was built without CUDA"


def _xformers_here(device: str) -> str | None:
    return _installed("xformers", device) or _xformers_unbuilt()


def _fa3_here(device: str) -> str | None:
    reason = _installed("flash_attn_interface", device)
    if reason is None and torch.cuda.get_device_capability()[0] != 9:
        return "FlashAttention 3 is for Hopper GPUs"
    return reason


def _switched(device: str) -> bool:
    """Torch's flash and efficient backwards are deterministic if the deterministic mode is on and is not
    ``warn_only``."""
    return device == "cpu" or not torch.is_deterministic_algorithms_warn_only_enabled()


def _never(device: str) -> bool:
    return False


# The order of preference if nothing may be measured: torch's own order, then the other libraries.
BACKENDS = {
    b.name: b
    for b in (
        Backend("flash", ("cuda", "cpu"), functools.partial(_sdpa, "flash"), _always, _switched),
        Backend("efficient", ("cuda",), functools.partial(_sdpa, "efficient"), _always, _switched),
        Backend("math", ("cuda", "cpu"), functools.partial(_sdpa, "math")),
        Backend("cudnn", ("cuda",), functools.partial(_sdpa, "cudnn"), _always, _never),
        Backend("xformers", ("cuda",), _xformers, _xformers_here, _never),
        Backend("fa3", ("cuda",), _fa3, _fa3_here),
    )
}


def candidates(device: str) -> list[str]:
    """The backends that may be chosen on a type of device now."""
    strict = torch.are_deterministic_algorithms_enabled()
    return [
        name
        for name, b in BACKENDS.items()
        if device in b.devices and b.available(device) is None and (not strict or b.deterministic(device))
    ]
