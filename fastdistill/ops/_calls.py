# SPDX-License-Identifier: Apache-2.0
"""Check the arguments of a direct call of an op. Kernels do not check them, because the op's public function does;
but the arguments of a call that was read from a file are unchecked."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import InputError, described
from fastdistill.ops import _check
from fastdistill.ops._dispatch import OPS
from fastdistill.ops.feature_match.reference import DISTANCES
from fastdistill.ops.noise_gather import banks

Arguments = SimpleNamespace
# In ``fastdistill.ops`` these names are functions.
_NAMES = (
    "adamw_ema add_bias cross_attention feature_match geglu group_norm_silu layer_norm_modulate output_match "
    "quantize_rows".split()
)
(
    adamw_ema, add_bias, cross_attention, feature_match, geglu, group_norm_silu, layer_norm_modulate, output_match,
    quantize_rows,
) = (importlib.import_module(f"fastdistill.ops.{name}") for name in _NAMES)  # fmt: skip


def check(op: str, arguments: Sequence[Any]) -> None:
    """InputError unless the arguments have the op's types, and shapes and numbers that its kernels support."""
    stated = OPS[op].overload._schema.arguments  # type: ignore[attr-defined]
    _check.require(len(arguments) == len(stated), "arguments", f"{len(stated)} of {op}", len(arguments))
    for argument, value in zip(stated, arguments, strict=True):
        _typed(argument.name, str(argument.type), value)
    CHECKS[op](Arguments(**{a.name: value for a, value in zip(stated, arguments, strict=True)}))


def _typed(name: str, kind: str, value: Any) -> None:
    if kind.startswith("Optional["):
        if value is None:
            return
        kind = kind[len("Optional[") : -1]
    if kind.startswith("List["):
        _check.require(isinstance(value, list), name, "a list", described(value))
        for i, one in enumerate(value):
            _typed(f"{name}[{i}]", kind[len("List[") : -1], one)
        return
    if kind == "Tensor":
        _check.tensors(**{name: value})
        return
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}[kind]
    fits = isinstance(value, kinds) and (kind == "bool" or not isinstance(value, bool))
    _check.require(fits and (kind != "int" or abs(value) < 2**63), name, f"a value of type {kind}", described(value))


def _like(name: str, tensor: Tensor, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    _check.shape(tensor, name, tuple(shape), f"shape {tuple(shape)}")
    _check.dtype(tensor, name, *dtypes)


def _float32(a: Arguments, **shapes: Sequence[int]) -> None:
    for name, shape in shapes.items():
        _like(name, getattr(a, name), shape, torch.float32)


def _geglu(a: Arguments) -> None:
    geglu._checked((a.x,), "tanh" if a.tanh else "none")
    half = (*a.x.shape[:-1], a.x.shape[-1] // 2)
    if hasattr(a, "y"):
        _like("y", a.y, half, a.x.dtype)
    else:
        _like("grad", a.grad, half, a.x.dtype)
        _like("dx", a.dx, a.x.shape, a.x.dtype)
        _check.require(len(a.dbias) < 2, "dbias", "one gradient at most", len(a.dbias))
        for total in a.dbias:
            _like("dbias", total, a.x.shape[-1:], *_check.FLOATS)


def _add_bias(a: Arguments) -> None:
    like = a.x.movedim(-1, 1), a.h.movedim(-1, 1)  # in the op's arguments channels are last
    add_bias._checked((*like, a.bias))
    _like("y", a.y, a.x.shape, a.x.dtype)


def _bias_gradient(a: Arguments) -> None:
    _check.dtype(a.grad, "grad", *_check.FLOATS)
    _check.shape(a.grad, "grad", (None, None), "[N, C]")
    _like("total", a.total, a.grad.shape[1:], *_check.FLOATS)


def _quantize_rows(a: Arguments) -> None:
    quantize_rows._checked((a.x,))
    _like("q", a.q, a.x.shape, torch.float8_e4m3fn)
    _like("scale", a.scale, (len(a.x), 1), torch.float32)


def _small(a: Arguments, given: dict[str, Sequence[int] | None]) -> None:
    """The gradients selected by the bits of ``wanted``, in that order."""
    _check.require(0 <= a.wanted < 2 ** len(given), "wanted", f"{len(given)} bits", a.wanted)
    names = [name for i, name in enumerate(given) if a.wanted >> i & 1]
    _check.require(len(a.small) == len(names), "small", f"a gradient for each of {names}", len(a.small))
    for name, gradient in zip(names, a.small, strict=True):
        shape = given[name]
        if shape is None:
            raise InputError.of("wanted", "what is given", name)
        _like(f"small ({name})", gradient, shape, *_check.FLOATS)


def _group_norm(a: Arguments) -> None:
    names = ("weight", "bias", "time_bias", "scale", "shift")
    given = {name: getattr(a, name) for name in names}
    group_norm_silu._checked((a.x, *given.values()), (a.groups, getattr(a, "eps", 0.0), a.silu))
    _float32(a, mean=(len(a.x), a.groups), rstd=(len(a.x), a.groups))
    if hasattr(a, "y"):
        _like("y", a.y, a.x.shape, a.x.dtype)
        return
    _like("grad", a.grad, a.x.shape, *_check.FLOATS)
    _like("dx", a.dx, a.x.shape, a.x.dtype)
    _small(a, {name: None if t is None else t.shape for name, t in given.items()})


def _layer_norm(a: Arguments) -> None:
    forward = hasattr(a, "y")
    x = a.x if forward else a.s
    shift = a.shift if forward else None
    layer_norm_modulate._checked((x, a.h, a.gate, a.scale, shift, a.weight, a.bias), getattr(a, "eps", 0.0))
    rows = (len(x), x.shape[-1])
    for name in ("gate", "scale", "shift"):
        if getattr(a, name, None) is not None:
            _like(name, getattr(a, name), rows, *_check.FLOATS)
    _check.require(a.gate is None or a.h is not None, "gate", "None without h", "a tensor")
    _float32(a, mean=x.shape[:-1], rstd=x.shape[:-1])
    name = "s" if forward else "dh"
    beside = getattr(a, name)
    _check.require(len(beside) == (a.h is not None), name, "one tensor where there is h, else none", len(beside))
    for tensor in (*beside, a.y if forward else a.dx):
        _like(name, tensor, x.shape, x.dtype)
    if forward:
        return
    for tensor in (a.grad, *([] if a.grad_s is None else [a.grad_s])):
        _like("grad", tensor, x.shape, *_check.FLOATS)
    shapes: dict[str, Sequence[int] | None] = {n: None if getattr(a, n) is None else rows for n in ("gate", "scale")}
    shapes["shift"] = rows
    _small(a, shapes | {n: None if getattr(a, n) is None else rows[1:] for n in ("weight", "bias")})


def _feature_match(a: Arguments) -> None:
    names = {number: name for name, number in DISTANCES.items()}
    _check.require(a.distance in names, "distance", f"one of {', '.join(map(str, names))}", a.distance)
    counts = len(a.student), len(a.teacher), len(a.grads) or None
    tensors = (a.weights, a.grad_scale, *a.student, *a.teacher, *a.grads)
    own = a.parameter if names[a.distance] in ("huber", "cosine") else 1.0
    feature_match._checked(tensors, (*counts, names[a.distance], own, own))
    _float32(a, loss=(), taps=(len(a.student),))


def _scale_gradients(a: Arguments) -> None:
    for i, gradient in enumerate(a.grads):
        _check.dtype(gradient, f"grads[{i}]", *_check.FLOATS)
    _float32(a, factor=())


def _output_match(a: Arguments) -> None:
    def given(*names: str) -> list[Tensor | None]:  # a tensor without elements means None
        return [t if t.numel() else None for t in map(a.__dict__.__getitem__, names)]

    optional = given("teacher", "unconditional", "guidance", "weights", "x_t", "grad")
    own = ("latents", "latent_index", "choice", "coefficients", "counter")
    task = [getattr(a, name) for name in own] if a.latents.numel() else [None] * len(own)
    tensors = (a.student, a.timestep, a.table, a.grad_scale, *optional, *task)
    output_match._checked(tensors, (a.channels, a.first_sample, "mse", a.delta))
    _float32(a, loss=(), parts=(2,), samples=(len(a.student), 2))


def _noise_gather(a: Arguments) -> None:
    labels = tuple(f"[{i}]" for i in range(len(a.prompts)))
    _check.require(len(a.prompt) == len(labels), "prompt", f"{len(labels)} buffers", len(a.prompt))
    outputs = (a.x_t, a.timestep, a.target, a.latent_index, a.prompt_index, a.choice)
    for name in ("x_t", "latents"):
        _check.require(getattr(a, name).dim() > 0, name, "[N, ...]", "a 0-dim tensor")
    tensors = (a.latents, a.latent_prompts, a.coefficients, a.replace, a.counter, *outputs, *a.prompts, *a.prompt)
    numbers = (a.null_index, a.pool, a.first_sample, len(a.x_t), a.global_batch, a.latent_rows, a.prompt_rows)
    banks.check(tensors, (labels, numbers))
    _check.require(0 <= a.null_threshold <= 2**32, "null_threshold", "0 to 2**32", a.null_threshold)


def _adamw_ema(a: Arguments) -> None:
    lists = [getattr(a, name) for name in adamw_ema._LISTS]
    optional = [a.grad_scale, a.found_inf, a.ema_weight]
    tensors = [t for some in lists for t in some] + [a.square_sum, a.skipped, *a.lr]
    tensors += [t for t in optional if t is not None]
    sizes = (*map(len, lists), len(a.lr))
    adamw_ema._check_update(tuple(tensors), (sizes, tuple(a.group), tuple(t is not None for t in optional)))
    _check.require(len(a.hyper) == 4 * len(a.lr), "hyper", f"4 numbers for each of {len(a.lr)} groups", len(a.hyper))


def _square_sum(a: Arguments) -> None:
    adamw_ema._check_gradients((a.total, *a.grads), None)


def _cross_attention(a: Arguments) -> None:
    cross_attention._checked((a.q, a.k, a.v, a.mask, a.rows), None)
    if hasattr(a, "out"):
        _like("out", a.out, a.q.shape, a.q.dtype)
        return
    _like("grad_out", a.grad_out, a.q.shape, *_check.FLOATS)
    for name, of in (("grad_q", a.q), ("grad_k", a.k), ("grad_v", a.v)):
        gradient = getattr(a, name)
        if gradient.numel():
            _like(name, gradient, of.shape, of.dtype)
    both = bool(a.grad_k.numel()) == bool(a.grad_v.numel())
    _check.require(both, "grad_k", "as many elements as grad_v", a.grad_k.numel())


CHECKS: dict[str, Callable[[Arguments], None]] = {
    "add_bias": _add_bias,
    "bias_gradient": _bias_gradient,
    "quantize_rows": _quantize_rows,
    "geglu": _geglu,
    "geglu_backward": _geglu,
    "group_norm_silu": _group_norm,
    "group_norm_silu_backward": _group_norm,
    "layer_norm_modulate": _layer_norm,
    "layer_norm_modulate_backward": _layer_norm,
    "feature_match": _feature_match,
    "scale_gradients": _scale_gradients,
    "output_match": _output_match,
    "noise_gather": _noise_gather,
    "adamw_ema": _adamw_ema,
    "grad_square_sum": _square_sum,
    "cross_attention": _cross_attention,
    "cross_attention_backward": _cross_attention,
}
