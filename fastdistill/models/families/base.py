# SPDX-License-Identifier: Apache-2.0
"""The parts that depend on a model's architecture: the banks of a prompt, and how the model is called with them."""

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

    shape: of a row; None is any size. field: the name of the last size in the model's configuration. integer: whether
    values can be integers or booleans, which are not cast (labels, masks, sizes in pixels). limit: if it is given,
    values are integers below it. required: whether the model needs this bank.
    """

    shape: tuple[int | None, ...]
    field: str = ""
    integer: bool = False
    limit: int | None = None
    required: bool = True


class Family(OfPipelines):
    """One architecture of diffusers, and its pipelines.

    name: the name of the family. kind: the model's class. blocks: for transformers, the lists of blocks, each with the
    configuration's field for their number. products: the parts of such a block whose linear layers can be in float8
    (``models.float8``). prediction_type: what its published models predict, if their scheduler does not define it.
    guidance: if there are models with the guidance weight as an input: the configuration's field and value for such
    models, and the module for this input, whose last linear layer adds to the timestep's embedding.
    """

    name: ClassVar[str]
    kind: ClassVar[type[nn.Module]]
    prediction_type: ClassVar[str] = "epsilon"
    blocks: ClassVar[Mapping[str, str]] = {"transformer_blocks": "num_layers"}
    products: ClassVar[tuple[str, ...]] = ()
    of_channels: ClassVar[str] = "in_channels"  # the configuration's field for the channels of the latents
    guidance: ClassVar[tuple[str, Any, str]] = ("", None, "")  # no such models

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        """The banks that a model with this configuration needs, by the names of its arguments."""
        raise NotImplementedError

    def call(self, model: nn.Module, x_t: Tensor, timestep: Tensor, rows: Mapping[str, Tensor]) -> Any:
        """The output of ``model``, which is of this family or wraps such a model.

        Args:
            x_t: [B, C, H, W]. timestep: [B], int64, or for flow matching float (sigma times 1000).
            rows: the rows of this batch, as in ``conditions``.
        """
        raise NotImplementedError

    def channels(self, config: Mapping[str, Any]) -> int:
        """Channels of the latents."""
        return int(config["in_channels"])

    def tokens(self, config: Mapping[str, Any], shape: tuple[int, ...]) -> int:
        """Tokens of a latent of this shape [C, H, W], which determine dynamic shifts."""
        patch = self.patch(config)
        return (shape[-2] // patch) * (shape[-1] // patch)

    def sigmas(self, steps: int) -> list[float] | None:
        """The noise levels of this family's pipeline, before the scheduler's shift; None: the scheduler's
        own."""
        return None

    def thinned(self, config: dict[str, Any], kept: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """A student's configuration, without the number of blocks: updates fields about single blocks.

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
        """The student's width divided by the teacher's."""
        return Fraction(self.width(student), self.width(teacher))

    def heads(self, key: str) -> tuple[str, int] | None:
        """For a tensor with an attention's heads on one of its axes: the attention's name and the axis."""
        if (found := _INTO_HEADS.fullmatch(key)) is not None:
            return found[1], 0
        found = _OUT_OF_HEADS.fullmatch(key)
        return None if found is None else (found[1], 1)

    def reading_guidance(self, config: dict[str, Any]) -> dict[str, Any]:
        """A configuration whose model has the guidance weight as an input.

        Raises:
            InputError: there is no such model in this family.
        """
        field, value, _ = self.guidance
        if not field:
            raise InputError.of("guidance_embedding", f"False for a {self}, which has no such input", True)
        return config if self.guidance_bank(config) else config | {field: value}

    def rows(self, source: str, own: tuple[int, ...], theirs: tuple[int, ...], ratio: Fraction) -> Tensor | None:
        """If the tensors differ before narrowing: the rows of the teacher's tensor ``source`` (shape ``theirs``) that
        correspond to the student's tensor (shape ``own``); None: all rows, in order."""
        return None

    def prepare(self, model: nn.Module) -> Callable[[], None]:
        """Switch off the model's own random draws that a step replaces by draws from counters; returns the undo."""
        return lambda: None

    def check(self, name: str, model: nn.Module, latents: tuple[int, ...], banks: Mapping[str, Any]) -> None:
        """InputError unless the model ``name`` can be called with latents [N, C, H, W] and these banks [M, ...].

        Raises:
            InputError: names the argument and the field of the model's configuration that do not agree.
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
    """The model inside its wrappers: torch.compile, DistributedDataParallel, PEFT."""
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
    """The valid tokens of the embeddings: [L], 1 or True if a token is valid."""
    return Condition((None,), integer=True, required=False)
