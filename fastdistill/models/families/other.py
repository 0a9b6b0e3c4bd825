# SPDX-License-Identifier: Apache-2.0
"""A diffusers model of no family: its blocks are found by trial, its prompts are encoded by its pipeline."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.models.families.base import Condition, Family
from fastdistill.own_code import imported

_POSITIONS = "_ids"  # of the tokens, equal for all prompts


class Other(Family):
    """Called by a user's function (``call``), with the banks that its pipeline encodes.

    Args:
        kind: the class of the model. config: its configuration.
        part: the component of a pipeline that is the model.
        pipeline: name of the pipeline's class. like: the family whose pipeline that is, if there is one.
    """

    name, prediction_type = "other", ""  # the schedule defines it

    def __init__(
        self,
        kind: type[nn.Module],
        config: Mapping[str, Any],
        *,
        part: str = "transformer",
        pipeline: str | None = None,
        like: Family | None = None,
    ) -> None:
        self.kind, self.part, self.like = kind, part, like  # type: ignore[misc]
        self.pipelines = () if pipeline is None else (pipeline,)  # type: ignore[misc]
        self.encoded = {} if pipeline is None else like.encoded if like else _returned(pipeline)  # type: ignore[misc]
        self.blocks = _blocks(kind, config)  # type: ignore[misc]

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        return {}  # the function that calls it defines them

    def scheduler(self, kind: str, scheduler: Any) -> Any:
        return scheduler if self.like is None else self.like.scheduler(kind, scheduler)

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config.get("in_channels") or 0)

    def latent_shape(
        self, config: Mapping[str, Any], vae: Mapping[str, Any], size: tuple[int, int] | None = None
    ) -> tuple[int, int, int]:
        own, height, width = super().latent_shape(config, vae, size)
        return int(vae.get("latent_channels", own)), height, width  # a token can be several latent positions

    def narrowed(self, config: dict[str, Any], factor: float) -> dict[str, Any]:
        raise InputError.of("spec.width", f"None, as {self} is of no family: blocks can be left out", factor)

    def _rows(
        self,
        pipeline: Any,
        texts: list[str],
        null: bool,
        config: Mapping[str, Any] | None,
        size: tuple[int, int] | None,
        guidance_scale: float | None,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        config = self._config(pipeline, config)
        encode = self._encode if self.like is None else self.like._encode
        with torch.no_grad():
            rows = encode(pipeline, texts, null, config, options)
        for name, value in rows.items():
            if not isinstance(value, Tensor) or len(value) != len(texts):
                rule = f"a row of {name} for each prompt from encode_prompt"
                raise InputError.of("pipeline", rule, f"{self.pipelines[0]}, which returns something else")
        return rows


def denoiser(place: str, index: Mapping[str, Any]) -> str:
    """The component with the model in a pipeline of no family."""
    found = [name for name in ("transformer", "unet") if isinstance(index.get(name), list)]
    if len(found) != 1:
        rule = "a pipeline with one model, called transformer or unet"
        raise InputError.of(place, rule, " and ".join(found) or "none")
    return found[0]


def model_class(place: str, library: str, name: str) -> type[nn.Module]:
    """The class of a model, from diffusers or from a module of the user."""
    found = imported(library, name, place)
    if not (isinstance(found, type) and issubclass(found, ModelMixin) and issubclass(found, ConfigMixin)):
        raise InputError.of(place, "a class of diffusers' ModelMixin and ConfigMixin", f"{name} of {library}")
    return found


def other_family(
    place: str, known: Family | None, kind: str, part: str, model: type[nn.Module], config: Mapping[str, Any]
) -> Family:
    """The family of a model whose class is in no known family; ``known``: the family of its pipeline."""
    if known is not None and issubclass(model, known.kind):
        own: Family = type(type(known).__name__, (type(known),), {"kind": model})()
        return own
    found = Other(model, {**defaults(model), **config}, part=part, pipeline=kind, like=known)
    if known is None and not found.encoded:
        raise InputError.of(place, "a pipeline of diffusers that has encode_prompt", kind)
    return found


def defaults(kind: type[nn.Module]) -> dict[str, Any]:
    """The arguments of a model's class that have defaults."""
    takes = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in takes if p.default is not inspect.Parameter.empty}


def _returned(pipeline: str) -> dict[str, tuple[int, int]]:
    """The names returned by the pipeline's ``encode_prompt`` (from its last line), each with its position and that of
    its ``negative_`` counterpart; without a counterpart its own position, because the null prompt is the empty one."""
    import diffusers

    function = getattr(getattr(diffusers, pipeline, None), "encode_prompt", None)
    names: list[str] = []
    if function is not None:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
        last = max(returns, key=lambda node: node.lineno, default=None)
        value = None if last is None else last.value
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        names = [part.id if isinstance(part, ast.Name) else "" for part in parts]
    own = [name for name in names if name and not name.startswith("negative_") and not name.endswith(_POSITIONS)]
    twins = {name: f"negative_{name}" for name in own}
    return {name: (names.index(name), names.index(twins[name] if twins[name] in names else name)) for name in own}


def _blocks(kind: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """The lists of blocks of a model, each with the configuration's field for its number: reducing this field by one
    removes one block from this list and none from others."""
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    sizes = _lists(kind, plain)
    found: dict[str, str] = {}
    for field, value in plain.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 2 or value not in sizes.values():
            continue
        with contextlib.suppress(Exception):  # a value that the class refuses
            fewer = _lists(kind, plain | {field: value - 1})
            shorter = [name for name, size in sizes.items() if fewer.get(name) != size]
            if len(shorter) == 1 and fewer.get(shorter[0]) == value - 1 and sizes[shorter[0]] == value:
                found.setdefault(shorter[0], field)
    return found


def _lists(kind: Any, config: Mapping[str, Any]) -> dict[str, int]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes that do not give a model
        children = kind.from_config(dict(config)).named_children()
    return {name: len(child) for name, child in children if isinstance(child, nn.ModuleList)}
