# SPDX-License-Identifier: Apache-2.0
"""Calling a model: the dtype of its inputs, its prediction, and forwards without side effects."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.models import families
from fastdistill.ops.noise_gather.banks import cast

Call = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Any]


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes and expects its inputs.

    The compute dtype of diffusers' layerwise casting, if it is enabled. Otherwise the dtype of the first floating-point
    weight (or else buffer) with at least 16 bits, because float8, int8 and 4-bit weights are only a storage format.
    Modules that diffusers keeps in float32 (``_keep_in_fp32_modules``) come last. If there is none, float32.
    """
    casting = layerwise_casting(model)
    if casting is not None:
        return casting
    kept = kept_in_float32(model)
    for tensors in ([t for t in model.parameters() if id(t) not in kept], model.parameters(), model.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.dtype.itemsize >= 2:
                return tensor.dtype
    return torch.float32


def layerwise_casting(model: nn.Module) -> torch.dtype | None:
    """The compute dtype of diffusers' layerwise casting, if a part of the model has it."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("layerwise_casting")
        if hook is not None:
            dtype: torch.dtype = hook.compute_dtype
            return dtype
    return None


def kept_in_float32(model: nn.Module) -> set[int]:
    """``id`` of the parameters and buffers that diffusers keeps in float32 for any dtype of the model."""
    kept: set[int] = set()
    for module in model.modules():
        if parts := getattr(module, "_keep_in_fp32_modules", None):
            names = {parts} if isinstance(parts, str) else set(parts)
            named = [*module.named_parameters(), *module.named_buffers()]
            kept |= {id(tensor) for name, tensor in named if names.intersection(name.split("."))}
    return kept


class Predictor:
    """``predictor(x_t, timestep, prompt)``: the prediction of a model, after casting floating-point inputs to the dtype
    in which it computes.

    A model of a family (``fastdistill.models.families``) is called as the family requires. Any other is called as
    ``model(x_t, timestep, encoder_hidden_states=prompt)``, or with several banks as ``model(x_t, timestep, **banks)``;
    with ``timestep=`` if its forward has an argument with this name. It returns a tensor, an object with ``.sample``,
    or a tuple that starts with the prediction.

    Args:
        call: used instead to call the model: ``call(model, x_t, timestep, rows)``, with the rows of the prompt's banks
            by name.
        times: [T], on the device: the time that the model gets for each timestep; None: the timestep itself.

    Attributes:
        dtype: the dtype in which the model computed when the predictor was made.
    """

    def __init__(self, model: nn.Module, call: Call | None = None, times: Tensor | None = None) -> None:
        self.model, self.dtype = model, compute_dtype(model)
        family = families.find(model)
        self._call = call or (family.call if family else _by_name(model))
        config = families.unwrapped(model).config if family else {}
        self._guidance = (family and family.guidance_bank(config)) or "timestep_cond"
        self._times = times

    def __call__(self, x_t: Tensor, timestep: Tensor, prompt: Any, timestep_cond: Tensor | None = None) -> Tensor:
        """``timestep_cond``: the rows of the bank with the guidance weight (``Family.guidance_rows``), instead of the
        prompt's rows; None: the prompt's rows, if it has them."""
        rows = prompt if isinstance(prompt, Mapping) else {families.EMBEDDINGS: prompt}
        if timestep_cond is not None:
            rows = {**rows, self._guidance: timestep_cond}
        if self._times is not None:
            timestep = self._times.index_select(0, timestep)
        return prediction(self._call(self.model, cast(x_t, self.dtype), timestep, cast(rows, self.dtype)))


def with_guidance(model: nn.Module, rows: Any, w: float) -> Any:
    """The rows [b, ...] of a prompt's banks, or one row [...] of each, with the bank for the guidance weight w added if
    the model has such an input and the bank is missing."""
    family = families.find(model)
    config = families.unwrapped(model).config if family else {}
    bank = family.guidance_bank(config) if family else None
    if family is None or bank is None or (isinstance(rows, Mapping) and bank in rows):
        return rows
    named = dict(rows) if isinstance(rows, Mapping) else {families.EMBEDDINGS: rows}
    embeddings = named[families.EMBEDDINGS]
    told = family.guidance_rows(config, torch.tensor([w], device=embeddings.device))[0].to(embeddings.dtype)
    batch = embeddings.shape[:1] if embeddings.ndim == 3 else ()
    return named | {bank: told.expand(*batch, *told.shape)}


def _by_name(model: nn.Module) -> Call:
    """Rows (and the timestep, if there is an argument with this name) as named arguments."""
    try:
        named = "timestep" in inspect.signature(families.unwrapped(model).forward).parameters
    except (TypeError, ValueError):  # a forward without a signature
        named = False
    if named:
        return lambda model, x_t, timestep, rows: model(x_t, timestep=timestep, **rows)
    return lambda model, x_t, timestep, rows: model(x_t, timestep, **rows)


def prediction(output: Any) -> Tensor:
    """The prediction in the output of a model.

    Raises:
        InputError: there is none.
    """
    found = getattr(output, "sample", output)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor):
        rule = "a tensor, an object with .sample, or a tuple that starts with a tensor, as output"
        raise InputError.of("model", rule, type(output).__name__)
    return found


@contextlib.contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Inside, forwards of ``model`` have no side effects.

    They run uncompiled, in eval mode and without gradient; afterwards the modes of its modules, its buffers and torch's
    random generators are restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    named = [(module, name, b) for module, _ in modes for name, b in module._buffers.items() if b is not None]
    buffers = [(module, name, buffer, buffer.clone()) for module, name, buffer in named]
    devices = {p.get_device() for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, buffer, saved in buffers:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                if not buffer.is_inference():
                    buffer.copy_(saved)
