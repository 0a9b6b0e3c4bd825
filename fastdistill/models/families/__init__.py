# SPDX-License-Identifier: Apache-2.0
"""Families of models: all code that depends on an architecture is in its file here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.errors import InputError
from fastdistill.models.families.base import Condition, Family, unwrapped
from fastdistill.models.families.dit import DiT
from fastdistill.models.families.flux import Flux
from fastdistill.models.families.other import Other
from fastdistill.models.families.pipeline import vae_factor
from fastdistill.models.families.pixart import PixArt
from fastdistill.models.families.sana import Sana
from fastdistill.models.families.sd3 import SD3
from fastdistill.models.families.unet import UNet

__all__ = [
    "EMBEDDINGS",
    "FAMILIES",
    "Condition",
    "Family",
    "Other",
    "family_named",
    "family_of",
    "find",
    "tokens_of",
    "unwrapped",
    "vae_factor",
]

FAMILIES: dict[str, Family] = {family.name: family for family in (UNet(), DiT(), PixArt(), SD3(), Flux(), Sana())}


def find(model: nn.Module) -> Family | None:
    """The family of a model, or of the model inside its wrappers; None for a model of no known family."""
    core = unwrapped(model)
    return next((family for family in FAMILIES.values() if isinstance(core, family.kind)), None)


def family_of(model: nn.Module, argument: str = "model") -> Family:
    """The family of a model, ``Other`` for any other model of diffusers; InputError for anything else."""
    core, family = unwrapped(model), find(model)
    if family is None and isinstance(core, ModelMixin) and isinstance(core, ConfigMixin):
        return Other(type(core), core.config)
    if family is None:
        kinds = ", ".join(str(family) for family in FAMILIES.values())
        raise InputError.of(argument, f"a model of diffusers, one of {kinds} or another", type(core).__name__)
    return family


def tokens_of(model: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Tokens of a latent of this shape, which determine dynamic shifts; None: unknown for this model."""
    config = getattr(unwrapped(model), "config", None)
    if not isinstance(config, Mapping):
        return None
    return (find(model) or Family()).tokens(config, shape)


def family_named(name: str) -> Family:
    """The family of this name; InputError, with near matches, for any other."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError.of("family", f"one of {', '.join(FAMILIES)}", f"{name!r}{hint}")
    return FAMILIES[name]
