# SPDX-License-Identifier: Apache-2.0
"""The run file: everything that a run consists of, from the teacher's folder to the student that is exported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastdistill.diffusion.matching import LossWeighting
from fastdistill.documented import documented
from fastdistill.ops.feature_match import Distance
from fastdistill.train.config import Seed, TrainSettings

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _as_text(value: Any) -> Any:
    """A number as its text, which YAML may have read as a number."""
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


@documented
@dataclass(frozen=True)
class PromptSettings:
    """The pool of prompts."""

    file: str | None = None
    """Text (a prompt a line), CSV, TSV, JSON lines or Parquet file of prompts; a teacher of classes needs none."""
    column: str | None = None
    """Column or key of the prompts in a table; none: the one column, or the one called prompt, caption or text."""
    seen: Count | None = None
    """The first so many prompts get latents, all are in the pool; none: all of them."""
    strip: bool = True
    """Remove white space around prompts."""
    unique: bool = True
    """Keep only the first of equal prompts."""
    skip_empty: bool = True
    """Leave out prompts of white space alone."""


@documented
@dataclass(frozen=True)
class CacheSettings:
    """Encodings of the prompts and samples of the teacher, made once and read by any number of runs."""

    directory: str = "caches/run"
    """Where they are kept."""
    images_per_prompt: Count = 1
    """Latents of each seen prompt."""
    images: str | None = None
    """Folder of images with captions to use in place of the teacher's samples, through the VAE."""
    sampler: Literal["scheduler"] = "scheduler"
    """How the teacher samples: by the scheduler of its folder, with all its settings."""
    steps: Count = 25
    """Number of sampling steps."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guidance scale g of diffusers, 1 + w; 1 is no guidance; none: 7.5, or by guidance."""
    guidance: str | float | None = None
    """In place of guidance_scale a schedule of the weight w = g - 1, such as 8@10,-1@2,0 (docs/guidance.md)."""
    seed: Seed | None = None
    """Seed of the initial noise; none: that of the run. With one, runs of several seeds share a cache."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float16"
    """Dtype of the stored latents and encodings."""
    encodings: Literal["stored", "on_demand"] = "stored"
    """stored: every prompt is encoded once. on_demand: texts are encoded while training, ahead of use, and not kept."""
    batch: Count = 16
    """Samples that the teacher makes at once, and texts that are encoded at once."""
    read: Literal["auto", "memory", "disk"] = "auto"
    """Where they are while training; auto: in memory, if they take at most a quarter of what is free."""
    rows_per_shard: Count = 1024
    """Latents in a file, which is what an interruption loses at most."""
    sizes: tuple[tuple[Count, Count], ...] = ()
    """Height and width in pixels; several: one cache each, drawn from in turn; none: the size the model is for."""


@documented
@dataclass(frozen=True)
class LoraSettings:
    """A student that is the teacher with low-rank adapters (PEFT), where a rank is given."""

    rank: Count | None = None
    """Rank of the adapters; none: no adapters."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Scale of the adapters, alpha / rank of which applies; none: the rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Modules that get an adapter, by the end of their names."""


@documented
@dataclass(frozen=True)
class StudentSettings:
    """The student: a named spec, or one of the other fields, of which width goes with every, first and blocks."""

    spec: str | None = None
    """Name of a spec: bk_base, bk_small, ..., half_depth, half_width."""
    every: Count | None = None
    """Of a transformer: keep each so-many-th block, counted back from the last."""
    first: Count | None = None
    """Of a transformer: keep the first so many blocks."""
    blocks: tuple[int, ...] | None = None
    """Of a transformer: the numbers of the blocks to keep."""
    width: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the channels (U-Net) or the number of heads (transformer)."""
    channels: tuple[int, ...] | None = None
    """Of a U-Net: the channels of every stage."""
    lora: LoraSettings = LoraSettings()
    init: Literal["teacher", "random"] = "teacher"
    """Initial weights: the teacher's own, where it has them, or random ones."""


@documented
@dataclass(frozen=True)
class RollingSettings:
    """Samples that are states of a sampler that runs along with the training."""

    every: Annotated[int, Field(ge=2)] | None = None
    """Every so many-th sample of a batch is a state; none: none is."""
    by: Literal["teacher", "student"] = "teacher"
    """Whose output moves the states."""
    steps: Count = 20
    """Number of steps of a trajectory."""
    groups: Annotated[int, Field(ge=1, le=1024)] = 8
    """Groups of states that take turns, one a step."""
    clip_sample: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Limit of the magnitude of the predicted clean sample; none: none."""
    null: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How often a state is shown with the null prompt, and rests."""


@documented
@dataclass(frozen=True)
class RegionSettings:
    """Random prompts by the distance of student and teacher in regions of the pool."""

    count: Annotated[int, Field(ge=2, le=2**16)] | None = None
    """Number of regions, of consecutive prompts; none: random prompts are drawn evenly."""
    every: Count = 50
    """Steps between two tables of their probabilities."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Decay of the average of the distances from table to table."""
    uniform: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the draws that stay even."""
    power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Power of the distances to which the others go."""


@documented
@dataclass(frozen=True)
class RandomConditioningSettings:
    """Random conditioning (arXiv 2504.02011)."""

    probability: str = "exp"
    """Name of p(t), the probability of a random prompt: exp, exp_two_sided, sigmoid, quadratic, const or measured."""
    parameters: dict[str, float] = field(default_factory=dict)
    """Parameters of p(t) by name."""
    null: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How often the null prompt replaces whichever was chosen."""
    with_replacement: bool = False
    """Draw the latents of an epoch with replacement."""
    rolling: RollingSettings = RollingSettings()
    regions: RegionSettings = RegionSettings()


@documented
@dataclass(frozen=True)
class LossSettings:
    """Weights of the terms of the loss."""

    output: Amount = 1.0
    """Weight of the distance of the outputs."""
    feature: Amount = 1.0
    """Weight of the distance of the features, at the student's taps."""
    task: Amount = 0.0
    """Weight of the denoising loss on the latents."""


@documented
@dataclass(frozen=True)
class GuidanceSettings:
    """Guidance distillation (arXiv 2210.03142), where a schedule is given: one pass is the teacher's guided one."""

    schedule: Annotated[str, BeforeValidator(_as_text)] | None = None
    """Guidance weight w = g - 1: 6.5, or 8@10,-1@2,0 (8 while sigma > 10, -1 while sigma > 2, then 0)."""
    scale: tuple[Finite, Finite] | None = None
    """Range of the factor of the positive weights that the student reads (guidance_scale - 1); none: it reads none."""
    lowest: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the samples with the lowest factor of that range itself, which is hard to learn at 0."""
    grid: str | None = None
    """Sampler whose steps are drawn, trailing:20, karras:30@30..0.09 or flow:28@3; none: all timesteps of training."""
    weight_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """The loss is weighted by 1 / abar (of epsilon; of v and flow 1) up to this, where loss_weighting is none."""


@documented
@dataclass(frozen=True)
class ObjectiveSettings:
    """What the student learns."""

    guidance: GuidanceSettings = GuidanceSettings()
    random_conditioning: RandomConditioningSettings = RandomConditioningSettings()
    weights: LossSettings = LossSettings()
    loss_weighting: LossWeighting | None = None
    """Weight of the output and the task loss at each timestep; none: uniform, of guidance that of its weight_limit."""
    min_snr_gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """Gamma of the min-SNR weighting."""
    feature_distance: Distance = "mse"
    """normalized_mse: divided by the teacher's mean square; huber: linear above 1; cosine: per sample."""


@documented
@dataclass(frozen=True)
class PreviewSettings:
    """Grids of images that teacher and student make of the same prompts and noise while training."""

    every: Count | None = None
    """Steps between two previews; none: no previews."""
    prompts: Count | tuple[str, ...] = 4
    """Texts, or how many of the pool, from the first."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Seeds of the initial noise, an image of each prompt for each."""
    steps: Count = 20
    """Number of sampling steps."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guidance scale as in diffusers; none: that of the cache."""


@documented
@dataclass(frozen=True)
class EvaluateSettings:
    """The comparison of student and teacher."""

    prompts: Count | str = 64
    """How many prompts of the pool, from the last (the unseen ones), or a file of prompts."""
    images_per_prompt: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Images of each prompt."""
    steps: Count | None = None
    """Number of sampling steps; none: that of the cache."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guidance scale as in diffusers; none: that of the cache."""
    seed: Seed = 2**31
    """Seed of the initial noise, other than that of the cache."""
    batch: Count = 16
    """Images that a model makes at once."""
    metrics: tuple[Literal["fid", "kid", "clip"], ...] = ()
    """Scores to add, with weights that are on this machine; KID and Inception's features by torchmetrics."""
    features: str | None = None
    """Folder of a CLIP or DINO model, the features for diversity; none: fixed features of the pixels."""
    inception: str | None = None
    """File of Inception-v3's weights for FID and KID; none: where torch keeps downloads."""
    clip: str | None = None
    """Folder of the CLIP model of the CLIP score."""
    reference: str | None = None
    """Folder of real images for FID, KID, precision and recall; none: the teacher's images."""


@documented
@dataclass(frozen=True)
class RunConfig:
    """A run: from the teacher's folder to the exported student."""

    directory: str = "runs/run"
    """Checkpoints, metrics and reports of the run."""
    device: str = "auto"
    """Device to run on; auto: a GPU if there is one, else the CPU."""
    seed: Seed = 0
    """Seed of the student, the cache and all random draws."""
    teacher: str = ""
    """Pipeline folder of diffusers, whose model is the teacher, or task:digits, the teacher of an embedded task."""
    family: str = "auto"
    """Family of the teacher; auto: by its model_index.json."""
    call: str | None = None
    """module:function that calls the models in place of a family's; needs --allow-code."""
    teacher_dtype: Dtype = "auto"
    """Dtype of the teacher's weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    shard: bool = False
    """Shard the student, its gradients and its optimizer over the ranks (FSDP2)."""
    log: tuple[Literal["bar", "jsonl", "tensorboard", "wandb"], ...] = ("bar", "jsonl")
    """Where progress and metrics go; jsonl (metrics.jsonl) is always written."""
    prompts: PromptSettings = PromptSettings()
    cache: CacheSettings = CacheSettings()
    student: StudentSettings = StudentSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    train: TrainSettings = TrainSettings()
    preview: PreviewSettings = PreviewSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
