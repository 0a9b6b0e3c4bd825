# SPDX-License-Identifier: Apache-2.0
"""Taps: named modules of a model whose output in the last forward is kept for the feature loss."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastdistill.errors import InputError, described
from fastdistill.models import families
from fastdistill.models.calling import trial


def _inert(*_: object) -> None:
    """Replaces a hook in a deep copy or a pickle of the model."""


def _unpickled() -> Any:
    return _inert


class _Hook:
    """A module hook for one model only: an EMA copy or an unpickled model must not write to these taps."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, ()


class _Begin(_Hook):
    def __init__(self, taps: Taps) -> None:
        self.taps = taps

    def __call__(self, *_: object) -> None:
        self.taps._begin()


class _Capture(_Hook):
    def __init__(self, taps: Taps, index: int) -> None:
        self.taps = taps
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        self.taps._store(self.index, _Output(output, _main_input(args, kwargs)))


class _Output(NamedTuple):
    """What a tapped module returned, and the shape of its main input."""

    value: object
    like: torch.Size | None


class Taps:
    """Keeps the outputs of the modules called ``names`` in the last forward of ``model``.

    Names are resolved to module objects once, here, so wrapping the model later (DDP, FSDP2, ``torch.compile``) has no
    effect. Build taps before compiling, because hooks are traced into the graph. Can be used as a context manager,
    which detaches on leaving.

    If a module returns a tuple, list, dict or ``ModelOutput``, the tap takes the only tensor at its top level: element
    0 of diffusers' down blocks, which return ``(hidden_states, residuals)``. If there are several tensors, it takes the
    one with the shape of the module's ``hidden_states``, or else of its first argument: the image tokens of SD3's and
    Flux's blocks, which return ``(encoder_hidden_states, hidden_states)``. If no tensor or several have this shape,
    give the index: ``"transformer_blocks.3[1]"``, or ``"down_blocks.0[1][0]"`` for nested ones.

    Outputs are kept by reference, with their graph, dtype and memory layout. Calls after ``features()``, such as the
    recomputation of a checkpointed segment in the backward, are ignored until the next forward.

    Raises:
        InputError: unknown names (near matches are shown), no names, or repeated ones.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = resolve(model, names)
        self.names = tuple(names)
        self._places = [split_index(name)[1] for name in names]
        self._model = model
        self._open = True
        self._outputs: list[list[_Output]] = [[] for _ in names]
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(_Begin(self))]
        for index, module in enumerate(modules):
            self._handles.append(module.register_forward_hook(_Capture(self, index), with_kwargs=True))

    def _begin(self) -> None:
        self.clear()
        self._open = True

    def _store(self, index: int, output: _Output) -> None:
        if self._open:
            self._outputs[index].append(output)

    def clear(self) -> None:
        """Drop the outputs that were captured."""
        self._outputs = [[] for _ in self.names]  # a new list: compiled code would guard the old one

    def remove(self) -> None:
        """Detach from the model; captured features are dropped."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def features(self) -> list[Tensor]:
        """The outputs of the last forward, in the order of ``names``. The taps do not keep them: a second call needs
        another forward.

        Raises:
            InputError: names the taps that did not fire, fired more than once in the forward, returned no tensor, or
                several tensors of which none is the module's main output.
        """
        counts = [len(outputs) for outputs in self._outputs]
        if any(count != 1 for count in counts):
            self._refuse_counts(counts)
        found = zip(self.names, self._places, self._outputs, strict=True)
        features = [_tensor(name, place, outputs[0]) for name, place, outputs in found]
        self.clear()
        self._open = False
        return features

    def _refuse_counts(self, counts: list[int]) -> None:
        silent = [name for name, count in zip(self.names, counts, strict=True) if count == 0]
        repeated = [name for name, count in zip(self.names, counts, strict=True) if count > 1]
        self.clear()
        if not self._handles:
            raise InputError("taps: expected to be attached, got removed taps")
        if len(silent) == len(counts):
            raise InputError(
                "taps: expected a forward of the tapped model before features(), got none since the last call"
            )
        if silent:
            raise InputError(f"taps: expected every tap to fire in a forward, got nothing from {', '.join(silent)}")
        raise InputError(
            f"taps: expected every tap to fire once in a forward, got several outputs from {', '.join(repeated)}"
        )

    def check_gradients(self, features: Sequence[Tensor]) -> None:
        """InputError for ``features`` (of the student, from a training forward) that the feature loss could not train.

        Called at the first step: a feature without gradient would only add a constant to the loss.
        """
        dead = [name for name, feature in zip(self.names, features, strict=True) if not feature.requires_grad]
        if not dead:
            return
        if not any(p.requires_grad for p in self._model.parameters()):
            cause = "every parameter of the model is frozen"
        elif not torch.is_grad_enabled():
            cause = "the forward ran under no_grad"
        elif len(dead) < len(self.names) or _checkpoints(self._model):
            cause = (
                "a reentrant gradient checkpoint runs its segment without a graph (pass use_reentrant=False), "
                "or everything before these taps is frozen"
            )
        else:
            cause = "the forward ran under no_grad, or everything before these taps is frozen"
        raise InputError(
            f"taps: expected student features that carry gradient, got none in {', '.join(dead)}; likely {cause}"
        )

    def shapes(self, *args: Any, **kwargs: Any) -> list[tuple[int, ...]]:
        """Shapes of the tapped features for these inputs of the model, from one forward without side effects."""
        try:
            with trial(self._model):
                self._model(*args, **kwargs)
            return [tuple(feature.shape) for feature in self.features()]
        finally:
            self.clear()


def release(model: nn.Module) -> None:
    """Release the features that all taps on ``model`` captured."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _Begin):
            hook.taps.clear()


def resolve(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules called ``names`` in ``model``, or in the model that it wraps; an index after a name is ignored.

    Raises:
        InputError: unknown names (near matches are shown), no names, or repeated ones.
    """
    if not isinstance(model, nn.Module):
        raise InputError.of("taps", "names of modules of a torch.nn.Module", described(model))
    wrong = isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names)
    if wrong:
        raise InputError.of("taps", "a list of module names", described(names))
    if not names:
        raise InputError("taps: expected at least one module name, got none")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise InputError(f"taps: expected each name once, got {', '.join(repeated)} more than once")
    known = dict(families.unwrapped(model).named_modules()) | dict(model.named_modules())
    known.pop("", None)
    modules = [split_index(name)[0] for name in names]
    unknown = [name for name in modules if name not in known]
    if unknown:
        raise InputError(
            f"taps: expected modules of {type(model).__name__}, got "
            + "; ".join(_hint(n, list(known)) for n in unknown)
        )
    return [known[name] for name in modules]


def split_index(name: str) -> tuple[str, tuple[int, ...]]:
    """``"transformer_blocks.3[1]"`` -> ``("transformer_blocks.3", (1,))``: the module, and the index in its output."""
    module = re.sub(r"(\[\d+\])+$", "", name)
    return module, tuple(int(number) for number in re.findall(r"\d+", name[len(module) :]))


def feature(name: str, output: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor for tap ``name`` in its module's output for these arguments; see ``Taps``."""
    return _tensor(name, split_index(name)[1], _Output(output, _main_input(args, kwargs)))


def channels(shape: Sequence[int]) -> int:
    """The number of channels of a feature with this shape: axis 1 of vectors [B, C] and of maps [B, C, H, W] or
    [B, C, F, H, W], the last axis of tokens [B, L, C]."""
    return shape[2] if len(shape) == 3 else shape[1]


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"{name!r} (near matches: {', '.join(near)})" if near else f"{name!r} (no near match)"


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _main_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
    """The shape of the ``hidden_states`` of a call, or of its first argument."""
    first = kwargs.get("hidden_states", next(iter((*args, *kwargs.values())), None))
    return first.shape if isinstance(first, Tensor) else None


def _tensor(name: str, place: tuple[int, ...], output: _Output) -> Tensor:
    """The feature in the output of a module; see ``Taps``."""
    value = output.value
    for number in place:
        elements = _elements(value)
        if number >= len(elements):
            got = f"{type(value).__name__} of {len(elements)}" if elements else type(value).__name__
            raise InputError.of("taps", f"an output with an element [{number}] from {name}", got)
        value = elements[number]
    if isinstance(value, Tensor):
        return value
    tensors = {} if place else {i: e for i, e in enumerate(_elements(value)) if isinstance(e, Tensor)}
    if not tensors:
        rule = f"a tensor from {name}" if place else f"a tensor, or a tuple with one, from {name}"
        raise InputError.of("taps", rule, type(value).__name__)
    chosen = list(tensors.values())
    if len(chosen) > 1:
        chosen = [tensor for tensor in chosen if tensor.shape == output.like]
    if len(chosen) != 1:
        shapes = ", ".join(f"{name}[{i}] {tuple(tensor.shape)}" for i, tensor in tensors.items())
        rule = f"the name of an element, as {name} returns several tensors"
        raise InputError.of("taps", rule, f"{name} without one: {shapes}")
    return chosen[0]


def _elements(value: object) -> Sequence[object]:
    """The elements of a tuple, list, dict or ``ModelOutput``; none of anything else."""
    if isinstance(value, Mapping):
        return tuple(value.values())
    return value if isinstance(value, tuple | list) else ()
