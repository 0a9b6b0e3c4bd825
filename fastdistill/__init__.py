# SPDX-License-Identifier: Apache-2.0
"""Distillation of conditional diffusion models with fused kernels.

``DistillTrainer`` trains a student with an objective such as ``RandomConditioning`` on a ``LatentCache`` and a
``PromptBank``. The ops (``help(fastdistill.ops)``) also work alone, in a loop of your own.

The public names, and the modules ``ops``, ``data``, ``models``, ``train``, ``diffusion``, ``distill`` and ``evaluate``,
are imported on first use, so ``import fastdistill`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AdamWEMA": "train",
    "DistillTrainer": "train",
    "FitResult": "train",
    "TrainConfig": "train",
    "GuidanceDistillation": "distill",
    "RandomConditioning": "distill",
    "Clarid": "distill.canonical",
    "Canonical": "distill.canonical",
    "canonical": "distill.canonical",
    "CanonicalSet": "distill.canonical_set",
    "extract_canonical": "distill.canonical_set",
    "CaDistill": "distill.cadistill",
    "cka": "distill.cadistill",
    "ClassifierSetting": "distill.classifier",
    "TrajectoryCache": "distill",
    "generate_trajectory_cache": "distill",
    "Weights": "distill",
    "Batches": "data.staged",
    "LatentCache": "data.latent_cache",
    "PromptBank": "data.prompt_bank",
    "build_prompt_bank": "data.prompt_writer",
    "read_prompts": "data.texts",
    "StoredRows": "data.stored",
    "generate_latent_cache": "data.latent_cache",
    "NoiseSchedule": "diffusion.schedule",
    "FlowSchedule": "diffusion.flow",
    "flow_coefficients": "diffusion.flow",
    "Grid": "diffusion.grid",
    "Guidance": "diffusion.guidance",
    "invert": "diffusion.inversion",
    "diffusion_posterior": "diffusion.posterior",
    "schedule_of": "diffusion.flow",
    "sample_with": "diffusion.scheduled",
    "ddim": "diffusion.sampler",
    "initial_noise": "diffusion.sampler",
    "loss_weights": "diffusion.matching",
    "match_table": "diffusion.matching",
    "replacement_probability": "diffusion.conditioning",
    "thresholds": "diffusion.conditioning",
    "DeviceError": "errors",
    "FastdistillError": "errors",
    "InputError": "errors",
    "KernelError": "errors",
    "StorageError": "errors",
    "Adapters": "models",
    "BlockSpec": "models",
    "Student": "models",
    "StudentSpec": "models",
    "Taps": "models",
    "make_student": "models",
    "TapFunction": "models.jacobian",
    "jvp": "models.jacobian",
    "vjp": "models.jacobian",
    "Subspace": "models.subspace",
    "top_subspace": "models.subspace",
    "open_pipeline": "models.pipelines",
    "fuse": "models.fuse",
    "unfuse": "models.fuse",
    "Draw": "ops",
    "FeatureMatch": "ops",
    "NoiseGather": "ops",
    "OutputMatch": "ops",
    "Task": "ops",
    "attention": "ops",
    "cross_attention": "ops",
    "empty_draw": "ops",
    "feature_match": "ops",
    "geglu": "ops",
    "group_norm_silu": "ops",
    "layer_norm_modulate": "ops",
    "noise_gather": "ops",
    "output_match": "ops",
    "residual_layer_norm_modulate": "ops",
}
_MODULES = (
    "commands",
    "data",
    "diffusion",
    "distill",
    "errors",
    "evaluate",
    "models",
    "ops",
    "plan",
    "runs",
    "tasks",
    "train",
)
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from fastdistill import commands as commands
    from fastdistill import data as data
    from fastdistill import diffusion as diffusion
    from fastdistill import distill as distill
    from fastdistill import errors as errors
    from fastdistill import evaluate as evaluate
    from fastdistill import models as models
    from fastdistill import ops as ops
    from fastdistill import plan as plan
    from fastdistill import runs as runs
    from fastdistill import tasks as tasks
    from fastdistill import train as train
    from fastdistill.data.latent_cache import LatentCache as LatentCache
    from fastdistill.data.latent_cache import generate_latent_cache as generate_latent_cache
    from fastdistill.data.prompt_bank import PromptBank as PromptBank
    from fastdistill.data.prompt_writer import build_prompt_bank as build_prompt_bank
    from fastdistill.data.staged import Batches as Batches
    from fastdistill.data.stored import StoredRows as StoredRows
    from fastdistill.data.texts import read_prompts as read_prompts
    from fastdistill.diffusion.conditioning import replacement_probability as replacement_probability
    from fastdistill.diffusion.conditioning import thresholds as thresholds
    from fastdistill.diffusion.flow import FlowSchedule as FlowSchedule
    from fastdistill.diffusion.flow import flow_coefficients as flow_coefficients
    from fastdistill.diffusion.flow import schedule_of as schedule_of
    from fastdistill.diffusion.grid import Grid as Grid
    from fastdistill.diffusion.guidance import Guidance as Guidance
    from fastdistill.diffusion.inversion import invert as invert
    from fastdistill.diffusion.matching import loss_weights as loss_weights
    from fastdistill.diffusion.matching import match_table as match_table
    from fastdistill.diffusion.posterior import diffusion_posterior as diffusion_posterior
    from fastdistill.diffusion.sampler import ddim as ddim
    from fastdistill.diffusion.sampler import initial_noise as initial_noise
    from fastdistill.diffusion.schedule import NoiseSchedule as NoiseSchedule
    from fastdistill.diffusion.scheduled import sample_with as sample_with
    from fastdistill.distill import GuidanceDistillation as GuidanceDistillation
    from fastdistill.distill import RandomConditioning as RandomConditioning
    from fastdistill.distill import TrajectoryCache as TrajectoryCache
    from fastdistill.distill import Weights as Weights
    from fastdistill.distill import generate_trajectory_cache as generate_trajectory_cache
    from fastdistill.distill.cadistill import CaDistill as CaDistill
    from fastdistill.distill.cadistill import cka as cka
    from fastdistill.distill.canonical import Canonical as Canonical
    from fastdistill.distill.canonical import Clarid as Clarid
    from fastdistill.distill.canonical import canonical as canonical
    from fastdistill.distill.canonical_set import CanonicalSet as CanonicalSet
    from fastdistill.distill.canonical_set import extract_canonical as extract_canonical
    from fastdistill.distill.classifier import ClassifierSetting as ClassifierSetting
    from fastdistill.errors import DeviceError as DeviceError
    from fastdistill.errors import FastdistillError as FastdistillError
    from fastdistill.errors import InputError as InputError
    from fastdistill.errors import KernelError as KernelError
    from fastdistill.errors import StorageError as StorageError
    from fastdistill.models import Adapters as Adapters
    from fastdistill.models import BlockSpec as BlockSpec
    from fastdistill.models import Student as Student
    from fastdistill.models import StudentSpec as StudentSpec
    from fastdistill.models import Taps as Taps
    from fastdistill.models import make_student as make_student
    from fastdistill.models.fuse import fuse as fuse
    from fastdistill.models.fuse import unfuse as unfuse
    from fastdistill.models.jacobian import TapFunction as TapFunction
    from fastdistill.models.jacobian import jvp as jvp
    from fastdistill.models.jacobian import vjp as vjp
    from fastdistill.models.pipelines import open_pipeline as open_pipeline
    from fastdistill.models.subspace import Subspace as Subspace
    from fastdistill.models.subspace import top_subspace as top_subspace
    from fastdistill.ops import Draw as Draw
    from fastdistill.ops import FeatureMatch as FeatureMatch
    from fastdistill.ops import NoiseGather as NoiseGather
    from fastdistill.ops import OutputMatch as OutputMatch
    from fastdistill.ops import Task as Task
    from fastdistill.ops import attention as attention
    from fastdistill.ops import cross_attention as cross_attention
    from fastdistill.ops import empty_draw as empty_draw
    from fastdistill.ops import feature_match as feature_match
    from fastdistill.ops import geglu as geglu
    from fastdistill.ops import group_norm_silu as group_norm_silu
    from fastdistill.ops import layer_norm_modulate as layer_norm_modulate
    from fastdistill.ops import noise_gather as noise_gather
    from fastdistill.ops import output_match as output_match
    from fastdistill.ops import residual_layer_norm_modulate as residual_layer_norm_modulate
    from fastdistill.train import AdamWEMA as AdamWEMA
    from fastdistill.train import DistillTrainer as DistillTrainer
    from fastdistill.train import FitResult as FitResult
    from fastdistill.train import TrainConfig as TrainConfig


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastdistill.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fastdistill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastdistill.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
