# SPDX-License-Identifier: Apache-2.0
"""Distil conditional diffusion models into smaller or cheaper ones, fast.

The public names, and the modules ``ops``, ``data``, ``models``, ``train``, ``diffusion``, ``distill`` and ``evaluate``,
are loaded when they are first used, so that ``import fastdistill`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOME = {
    "AdamWEMA": "train",
    "DistillTrainer": "train",
    "TrainConfig": "train",
    "RandomConditioning": "distill",
    "Weights": "distill",
    "LatentCache": "data.latent_cache",
    "generate_latent_cache": "data.latent_cache",
    "PromptBank": "data.prompt_bank",
    "NoiseSchedule": "diffusion.schedule",
    "ddim": "diffusion.sampler",
    "initial_noise": "diffusion.sampler",
    "make_student": "models",
    "fuse": "models.fuse",
    "unfuse": "models.fuse",
    "match_table": "diffusion.matching",
    "attention": "ops",
    "cross_attention": "ops",
    "feature_match": "ops",
    "geglu": "ops",
    "group_norm_silu": "ops",
    "layer_norm_modulate": "ops",
    "noise_gather": "ops",
    "NoiseGather": "ops",
    "output_match": "ops",
    "residual_layer_norm_modulate": "ops",
}
_MODULES = ("data", "diffusion", "distill", "errors", "evaluate", "models", "ops", "tasks", "train")
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from fastdistill import data as data
    from fastdistill import diffusion as diffusion
    from fastdistill import distill as distill
    from fastdistill import errors as errors
    from fastdistill import evaluate as evaluate
    from fastdistill import models as models
    from fastdistill import ops as ops
    from fastdistill import tasks as tasks
    from fastdistill import train as train
    from fastdistill.data.latent_cache import LatentCache as LatentCache
    from fastdistill.data.latent_cache import generate_latent_cache as generate_latent_cache
    from fastdistill.data.prompt_bank import PromptBank as PromptBank
    from fastdistill.diffusion.matching import match_table as match_table
    from fastdistill.diffusion.sampler import ddim as ddim
    from fastdistill.diffusion.sampler import initial_noise as initial_noise
    from fastdistill.diffusion.schedule import NoiseSchedule as NoiseSchedule
    from fastdistill.distill import RandomConditioning as RandomConditioning
    from fastdistill.distill import Weights as Weights
    from fastdistill.models import make_student as make_student
    from fastdistill.models.fuse import fuse as fuse
    from fastdistill.models.fuse import unfuse as unfuse
    from fastdistill.ops import NoiseGather as NoiseGather
    from fastdistill.ops import attention as attention
    from fastdistill.ops import cross_attention as cross_attention
    from fastdistill.ops import feature_match as feature_match
    from fastdistill.ops import geglu as geglu
    from fastdistill.ops import group_norm_silu as group_norm_silu
    from fastdistill.ops import layer_norm_modulate as layer_norm_modulate
    from fastdistill.ops import noise_gather as noise_gather
    from fastdistill.ops import output_match as output_match
    from fastdistill.ops import residual_layer_norm_modulate as residual_layer_norm_modulate
    from fastdistill.train import AdamWEMA as AdamWEMA
    from fastdistill.train import DistillTrainer as DistillTrainer
    from fastdistill.train import TrainConfig as TrainConfig


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastdistill.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fastdistill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastdistill.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
