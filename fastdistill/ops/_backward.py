# SPDX-License-Identifier: Apache-2.0
"""Shared code of backwards, mainly for losses, which compute their gradient in the forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdistill.ops._dispatch import OPS, Kind, forced, quiet, use


def wanted(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call is differentiated. True also in forward mode, so that torch refuses it: the tangent would be 0."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def apply(kind: Kind | None, function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(kind, *args)``; a call of a known kind skips its check for functorch transforms."""
    if kind is None:
        return function.apply(kind, *distinct(args))
    return super(torch.autograd.Function, function).apply(kind, *args)  # type: ignore[misc]


def distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments, with repeated tensors replaced by views, as torch's compiler requires."""
    if not torch.compiler.is_compiling():
        return list(args)
    tensors: list[Tensor] = []
    found: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            if any(arg is one for one in tensors):
                arg = arg.view_as(arg)
            tensors.append(arg)
        found.append(arg)
    return found


def remember(ctx: Any, kind: Kind | None) -> None:
    """Store for the backward: the kind of the forward's call, and the kernel if ``use`` selected one."""
    ctx.kind = kind
    if (kernel := forced()) is not None:
        ctx.kernel = kernel


def with_its_kernel(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward with the kernel selection of its forward: it may run in another thread or after the block of ``use``.
    Its results are not differentiable; see ``again``."""
    careful = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        call = careful if torch.compiler.is_compiling() and torch.is_grad_enabled() else backward
        kernel = getattr(ctx, "kernel", None)
        if kernel == forced() or torch.compiler.is_compiling():
            return call(ctx, *grads)
        with use(kernel):
            return call(ctx, *grads)

    return run


def is_differentiated() -> bool:
    """Whether the result of the running backward will be differentiated itself (``create_graph=True``)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def again(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiable gradients, computed by torch's autograd through ``function``, the eager reference.

    Args:
        inputs: those of the forward, from ``saved_tensors``, with their graph; copies made in the forward have none.

    Returns:
        One gradient per input; None for inputs that require none.
    """
    own = [None if t is None else t.view_as(t) for t in inputs]  # one tensor may be two inputs
    differentiated = [t for t in own if t is not None and t.requires_grad]
    if not differentiated:
        return (None,) * len(own)
    found = iter(torch.autograd.grad(function(*own), differentiated, grad, create_graph=True, allow_unused=True))
    return tuple([next(found) if t is not None and t.requires_grad else None for t in own])


def kind_of(ctx: Any, *grads: Tensor | None) -> Kind | None:
    """``ctx.kind``, the kind of the forward's call, if the backward may also bypass torch's dispatcher; else None."""
    if ctx.kind is None or torch.is_grad_enabled() or not quiet():
        return None
    for grad in grads:
        if grad is not None and type(grad) is not Tensor:
            return None
    kind: Kind = ctx.kind
    return kind


def gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool], zero: bool) -> list[Tensor | None]:
    """Contiguous buffers (``zero``: filled with zeros) for the required gradients of small inputs."""
    make = torch.zeros_like if zero else torch.empty_like
    pairs = zip(inputs, needed, strict=True)
    return [None if t is None or not of else make(t, memory_format=torch.contiguous_format) for t, of in pairs]


def on_cpu(kind: Kind | None) -> bool:
    """Whether a call is of a known kind on a CPU. There, constants of earlier calls can be reused, and reading a number
    needs no synchronization. On a GPU, a constant created during graph capture would belong to that graph."""
    return kind is not None and kind.on_cpu


def one(kind: Kind | None, device: torch.device) -> Tensor:
    """The default loss scale, 1."""
    return _one() if on_cpu(kind) else torch.ones((), dtype=torch.float32, device=device)


@functools.cache
def _one() -> Tensor:
    """Never written to."""
    return torch.ones((), dtype=torch.float32, device="cpu")


def keep(ctx: Any, kind: Kind | None, grads: list[Tensor], grad_scale: Tensor | None) -> None:
    """Store what ``hand_on`` needs, and mark the buffers as modified, like torch after an in-place operation."""
    remember(ctx, kind)
    ctx.grads, ctx.grad_scale = grads, grad_scale
    ctx.set_materialize_grads(False)  # zeros for the outputs beside the loss
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([g for g in grads if not g.is_inference()])
        ctx.versions = _versions(grads)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [-1 if t.is_inference() else t._version for t in tensors]


def hand_on(op: str, ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    """``ctx.grads``, times ``grad_loss`` / ``ctx.grad_scale``: they were stored times ``ctx.grad_scale`` (None: 1).

    In place if this backward frees the graph: the consumers of the gradients then own the buffers.
    """
    if is_differentiated():
        raise RuntimeError(
            f"{op}: its gradient cannot be differentiated again (create_graph=True): where a second derivative is"
            " needed, write this loss in eager torch"
        )
    if ctx.grads is None:
        raise RuntimeError(
            f"{op}: backward ran a second time, after the first took the gradient: use retain_graph=True"
        )
    if not torch.compiler.is_compiling() and ctx.versions != _versions(ctx.grads):
        raise RuntimeError(
            f"{op}: a gradient buffer was written to between the forward and its backward: give each forward buffers"
            " of its own, or run its backward first"
        )
    factor = grad_loss.float() if ctx.grad_scale is None else grad_loss.float() / ctx.grad_scale
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        # In a compiled function the product fuses with its consumer; if the graph is kept, another backward needs the
        # buffers.
        return [(g.float() * factor).to(g.dtype) for g in ctx.grads]
    grads: list[Tensor] = ctx.grads
    ctx.grads = None
    kind = kind_of(ctx, grad_loss)
    if not on_cpu(kind) or factor.item() != 1.0:  # `item` only on a CPU, where it needs no synchronization
        OPS["scale_gradients"](kind, grads, factor)
    return grads
