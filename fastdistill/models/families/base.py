# SPDX-License-Identifier: Apache-2.0
"""What depends on a model's architecture: what a prompt consists of, and how the model is called with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.errors import InputError
from fastdistill.models.families.pipeline import OfPipelines

_INTO_HEADS = re.compile(r"(.+)\.(?:(?:to|add)_[qkv](?:_proj)?|norm_(?:added_)?[qk])\.(?:weight|bias)")
_OUT_OF_HEADS = re.compile(r"(.+)\.(?:to_out\.0|to_add_out)\.weight")


@dataclass(frozen=True)
class Condition:
    """One bank of a prompt.

    shape: of a row; None is any size. field: the name in the model's configuration that says its last size. integer:
    whether the values may be integers or booleans, which are not cast (labels, masks, sizes in pixels). limit: they are
    integers below it. required: whether the model cannot do without.
    """

    shape: tuple[int | None, ...]
    field: str = ""
    integer: bool = False
    limit: int | None = None
    required: bool = True


class Family(OfPipelines):
    """One architecture of diffusers, and its pipelines.

    name: by which it is asked for. kind: its class. blocks: of a transformer, the lists of its blocks with the field of
    the configuration that says their number. products: the parts of such a block whose linear layers may be in float8
    (``models.float8``). prediction_type: what its published models predict, where their scheduler does not say.
    guidance: of models that may read the guidance weight, the field of the configuration and its value
    for those that do, and the module that reads it, whose last linear layer adds to the timestep's embedding.
    """

    name: ClassVar[str]
    kind: ClassVar[type[nn.Module]]
    prediction_type: ClassVar[str] = "epsilon"
    blocks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "num_layers"}
    products: ClassVar[tuple[str, ...]] = ()
    of_channels: ClassVar[str] = "in_channels"  # where its configuration has the channels of the latents
    guidance: ClassVar[tuple[str, Any, str]] = ("", None, "")  # of no model

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        """The banks that a model of this configuration reads, by the names of its arguments."""
        raise NotImplementedError

    def call(self, model: nn.Module, x_t: Tensor, timestep: Tensor, rows: Mapping[str, Tensor]) -> Any:
        """The output of ``model``, this family's or a wrapper of one.

        Args:
            x_t: [B, C, H, W]. timestep: [B], int64 or, of flow matching, float (sigma times 1000).
            rows: the rows of this batch, by ``conditions``.
        """
        raise NotImplementedError

    def channels(self, config: Mapping[str, Any]) -> int:
        """Channels of the latents."""
        return int(config["in_channels"])

    def tokens(self, config: Mapping[str, Any], shape: tuple[int, ...]) -> int:
        """Tokens of a latent of this shape [C, H, W], by which schedules with a dynamic shift go."""
        patch = self.patch(config)
        return (shape[-2] // patch) * (shape[-1] // patch)

    def sigmas(self, steps: int) -> list[float] | None:
        """The noise levels that this family's pipeline samples at, before the scheduler's shift; None: the scheduler's
        own."""
        return None

    def thinned(self, config: dict[str, Any], kept: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """A student's configuration, except for the number of blocks: where it says something of single ones.

        kept: the teacher's blocks in each of the lists that ``blocks`` names.
        """
        return config

    def width(self, config: Mapping[str, Any]) -> int:
        """Channels of the tokens between the blocks."""
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])

    def narrowed(self, config: dict[str, Any], factor: float) -> dict[str, Any]:
        """A student's configuration with ``factor`` times the heads (at least one), each as wide as the teacher's."""
        return config | {"num_attention_heads": max(1, round(factor * int(config["num_attention_heads"])))}

    def ratio(self, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Fraction:
        """The student's width of the teacher's."""
        return Fraction(self.width(student), self.width(teacher))

    def heads(self, key: str) -> tuple[str, int] | None:
        """Of a tensor with an attention's heads on one of its axes: the attention's name and the axis."""
        if (found := _INTO_HEADS.fullmatch(key)) is not None:
            return found[1], 0
        found = _OUT_OF_HEADS.fullmatch(key)
        return None if found is None else (found[1], 1)

    def reading_guidance(self, config: dict[str, Any]) -> dict[str, Any]:
        """A configuration whose model reads the guidance weight.

        Raises:
            InputError: no model of this family does.
        """
        field, value, _ = self.guidance
        if not field:
            raise InputError.of("guidance_embedding", f"False for a {self}, which has no such input", True)
        return config if self.guidance_bank(config) else config | {field: value}

    def rows(self, source: str, own: tuple[int, ...], theirs: tuple[int, ...], ratio: Fraction) -> Tensor | None:
        """The rows of the teacher's tensor ``source`` of shape ``theirs`` that one of a student of shape ``own`` stands
        for before it is narrowed, where they differ; None: all, in their order."""
        return None

    def prepare(self, model: nn.Module) -> Callable[[], None]:
        """Switch off what a model draws by itself that a step draws by counter; returns what undoes it."""
        return lambda: None

    def check(self, name: str, model: nn.Module, latents: tuple[int, ...], banks: Mapping[str, Any]) -> None:
        """Whether the model ``name`` can be called with latents [N, C, H, W] and these banks [M, ...].

        Raises:
            InputError: names the argument and the field of the model's configuration that it goes against.
        """
        config = unwrapped(model).config
        channels = self.channels(config)
        if latents[1] != channels:
            raise InputError.of("latents", f"{channels} channels ({self.of_channels} of the {name})", latents[1])
        wanted = self.conditions(config)
        for bank in banks:
            if bank not in wanted:
                raise InputError.of("prompts", f"banks among {', '.join(wanted)} (the {name} is a {self})", repr(bank))
        missing = [bank for bank, condition in wanted.items() if condition.required and bank not in banks]
        if missing:
            rule = f"banks {', '.join(missing)} too (the {name} is a {self})"
            raise InputError.of("prompts", rule, f"only {', '.join(banks)}")
        for bank, rows in banks.items():
            label = "prompts" if len(banks) == 1 and bank == EMBEDDINGS else f"prompts[{bank!r}]"
            _check_bank(label, wanted[bank], rows, name)

    def __str__(self) -> str:
        return self.kind.__name__


def _check_bank(label: str, condition: Condition, bank: Any, name: str) -> None:
    shape = tuple(bank.shape[1:])
    if bank.dtype.is_floating_point and condition.limit is not None:
        raise InputError.of(label, "integers", bank.dtype)
    if not condition.integer and not bank.dtype.is_floating_point:
        raise InputError.of(label, "floating point", bank.dtype)
    if len(shape) != len(condition.shape):
        sizes = ", ".join("any" if size is None else str(size) for size in condition.shape)
        raise InputError.of(label, f"rows of shape [{sizes}]", list(shape))
    for size, own in zip(condition.shape, shape, strict=True):
        if size is not None and size != own:
            field = f" ({condition.field} of the {name})" if condition.field else f" (of the {name})"
            raise InputError.of(label, f"rows of width {size}{field}", own)
    if condition.limit is not None and isinstance(bank, Tensor) and not bank.is_meta and bank.numel():
        outside = (bank < 0) | (bank >= condition.limit)
        if bool(outside.any()):
            row = int(outside.reshape(len(bank), -1).any(1).nonzero()[0])
            rule = f"0 to {condition.limit - 1} ({condition.field} of the {name})"
            raise InputError.of(f"{label}[{row}]", rule, int(bank[row].reshape(-1)[0]))


def unwrapped(model: nn.Module) -> Any:
    """The model inside of what wraps it: torch.compile, DistributedDataParallel, PEFT."""
    for _ in range(8):
        inner = next(_inside(model), None)
        if inner is None:
            break
        model = inner
    return model


def _inside(model: Any) -> Iterator[nn.Module]:
    if isinstance(model, torch._dynamo.OptimizedModule):
        yield model._orig_mod
    if isinstance(model, nn.parallel.DistributedDataParallel):
        yield model.module
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        yield model.get_base_model()


def mask() -> Condition:
    """Which tokens of the embeddings count: [L], 1 or True if they do."""
    return Condition((None,), integer=True, required=False)
