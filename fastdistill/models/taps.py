# SPDX-License-Identifier: Apache-2.0
"""Taps: named places inside a model whose output of the last forward is kept for the feature loss."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastdistill.errors import InputError


def _inert(*_: object) -> None:
    """What a hook becomes in a deep copy or a pickle of the model."""


def _unpickled() -> Any:
    return _inert


class _Hook:
    """A module hook that belongs to one model only: an EMA copy or a pickled model must not feed these taps."""

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

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        self.taps._store(self.index, output)


class Taps:
    """Keeps the outputs of the modules called ``names`` in the last forward of ``model``.

    Names are resolved to module objects here, once, so wrapping the model afterwards (DDP, FSDP2, ``torch.compile``)
    changes nothing. Build taps before compiling, as hooks are traced into the graph. Also a context manager, which
    detaches on leaving. A tuple, list or ``ModelOutput`` stands for its first element: diffusers' down blocks return
    ``(hidden_states, residuals)``.

    Outputs are held by reference and keep their graph, dtype and memory layout. What fires after ``features()``, such
    as the recomputation of a checkpointed segment in the backward, is ignored until the next forward.

    Raises ``InputError`` for unknown names (near matches named), for none at all and for repeated ones.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._model = model
        modules = resolve(model, self.names)
        self._open = True
        self._outputs: list[list[object]] = [[] for _ in modules]
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(_Begin(self))]
        self._handles += [m.register_forward_hook(_Capture(self, i)) for i, m in enumerate(modules)]

    def _begin(self) -> None:
        self.clear()
        self._open = True

    def _store(self, index: int, output: object) -> None:
        if self._open:
            self._outputs[index].append(output)

    def clear(self) -> None:
        """Let go of whatever was captured."""
        for outputs in self._outputs:
            outputs.clear()

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
        """The last forward's outputs in the order of ``names``, handed over: a second call needs a second forward.

        Raises ``InputError`` naming the taps that did not fire, fired more than once in the forward, or gave no tensor.
        """
        counts = [len(outputs) for outputs in self._outputs]
        if any(count != 1 for count in counts):
            self._refuse_counts(counts)
        features = [_tensor(name, outputs[0]) for name, outputs in zip(self.names, self._outputs, strict=True)]
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
        """Refuse ``features`` (of the student, from a training forward) that the feature loss could not train.

        Called on the first step: a feature that needs no gradient adds a constant to the loss and nothing else.
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
        """Shapes of the tapped features for these inputs of the model, found on the meta device without computing."""
        state = {key: torch.empty_like(value, device="meta") for key, value in _named_tensors(self._model)}
        with torch.no_grad():
            torch.func.functional_call(self._model, state, _to_meta(args), _to_meta(kwargs))
        return [tuple(feature.shape) for feature in self.features()]


def resolve(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The module objects called ``names`` in ``model``; ``InputError`` lists the unknown ones with near matches."""
    if not names:
        raise InputError("taps: expected at least one module name, got none")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise InputError(f"taps: expected each name once, got {', '.join(repeated)} more than once")
    known = dict(model.named_modules())
    known.pop("", None)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"taps: expected modules of {type(model).__name__}, got "
            + "; ".join(_hint(n, list(known)) for n in unknown)
        )
    return [known[name] for name in names]


def channels(shape: Sequence[int]) -> int:
    """The channel count of a feature of this shape: axis 1 of maps [B, C, ...], the last axis of tokens [B, L, C]."""
    return shape[1] if len(shape) >= 4 else shape[-1]


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"{name!r} (near matches: {', '.join(near)})" if near else f"{name!r} (no near match)"


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _tensor(name: str, output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    first: object = None
    if isinstance(output, tuple | list) and output:
        first = output[0]
    elif isinstance(output, dict) and output:  # a diffusers or transformers ModelOutput
        first = next(iter(output.values()))
    if not isinstance(first, Tensor):
        raise InputError(
            f"taps: expected a tensor, or a tuple that starts with one, from {name}, got {type(output).__name__}"
        )
    return first


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _to_meta(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(item) for item in value)
    return value
