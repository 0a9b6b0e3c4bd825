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
    """A number as text: YAML may have read the text as a number."""
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


@documented
@dataclass(frozen=True)
class PromptSettings:
    """The pool of prompts."""

    file: str | None = None
    """File of prompts: text (one per line), CSV, TSV, JSON lines or Parquet; a teacher of classes needs none."""
    column: str | None = None
    """Column or key of the prompts in a table; none: the only column, or the one called prompt, caption or text."""
    seen: Count | None = None
    """How many prompts get latents, from the first; all prompts are in the pool. none: all of them."""
    strip: bool = True
    """Remove white space around prompts."""
    unique: bool = True
    """Keep only the first of equal prompts."""
    skip_empty: bool = True
    """Leave out prompts that are empty or only white space."""


@documented
@dataclass(frozen=True)
class CacheSettings:
    """Encoded prompts and samples of the teacher, made once and read by any number of runs."""

    directory: str = "caches/run"
    """Where they are kept."""
    images_per_prompt: Count = 1
    """Latents of each seen prompt."""
    images: str | None = None
    """Folder of images with captions, which the VAE encodes, to use instead of samples of the teacher."""
    sampler: Literal["scheduler"] = "scheduler"
    """How the teacher samples: by the scheduler of its folder, with all its settings."""
    steps: Count = 25
    """Number of sampling steps."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guidance scale g = 1 + w, as in diffusers; 1 is no guidance; none: 7.5, or what guidance says."""
    guidance: str | float | None = None
    """Instead of guidance_scale, a schedule of the weight w = g - 1, such as 8@10,-1@2,0 (docs/guidance.md)."""
    seed: Seed | None = None
    """Seed of the initial noise; none: that of the run. If it is given, runs with other seeds can share the cache."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float16"
    """Dtype of the stored latents and encodings."""
    encodings: Literal["stored", "on_demand"] = "stored"
    """stored: every prompt is encoded once. on_demand: prompts are encoded during training, shortly before use."""
    batch: Count = 16
    """How many samples the teacher makes at once, and how many texts are encoded at once."""
    read: Literal["auto", "memory", "disk"] = "auto"
    """Where they are during training; auto: in memory, if they take at most a quarter of the free memory."""
    rows_per_shard: Count = 1024
    """Number of latents per file; an interruption loses at most one file."""
    sizes: tuple[tuple[Count, Count], ...] = ()
    """Height and width in pixels; several: one cache each, drawn from in turn; none: the model's own size."""


@documented
@dataclass(frozen=True)
class LoraSettings:
    """A student that is the teacher with low-rank adapters (PEFT), if a rank is given."""

    rank: Count | None = None
    """Rank of the adapters; none: no adapters."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The adapters are scaled by alpha / rank; none: the rank, so by 1."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Modules that get an adapter: the ends of their names."""


@documented
@dataclass(frozen=True)
class StudentSettings:
    """The student: a named spec, or one of the other fields; width can be combined with every, first and blocks."""

    spec: str | None = None
    """Name of a spec: bk_base, bk_small, ..., half_depth, half_width."""
    every: Count | None = None
    """For transformers: with 2, keep every second block, counted back from the last."""
    first: Count | None = None
    """For transformers: how many blocks to keep, from the first."""
    blocks: tuple[int, ...] | None = None
    """For transformers: the numbers of the blocks to keep."""
    width: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the channels (U-Net) or the number of heads (transformer)."""
    channels: tuple[int, ...] | None = None
    """For U-Nets: the channels of every stage."""
    lora: LoraSettings = LoraSettings()
    init: Literal["teacher", "random"] = "teacher"
    """Initial weights: copies of the teacher's, or random ones."""


@documented
@dataclass(frozen=True)
class RollingSettings:
    """Samples of a batch that are states of a sampler, which runs along with the training."""

    every: Annotated[int, Field(ge=2)] | None = None
    """With 2, every second sample of a batch is such a state; none: no sample is."""
    by: Literal["teacher", "student"] = "teacher"
    """The model whose output moves the states."""
    steps: Count = 20
    """Number of steps of a trajectory."""
    groups: Annotated[int, Field(ge=1, le=1024)] = 8
    """Groups of states that take turns, one per step."""
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
    """How often the null prompt replaces the chosen one."""
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
    """Weight of the distance of the features at the taps."""
    task: Amount = 0.0
    """Weight of the denoising loss on the latents."""


@documented
@dataclass(frozen=True)
class GuidanceSettings:
    """Guidance distillation (arXiv 2210.03142), if a schedule is given: the student learns the guided prediction."""

    schedule: Annotated[str, BeforeValidator(_as_text)] | None = None
    """Guidance weight w = g - 1: 6.5, or 8@10,-1@2,0 (8 while sigma > 10, -1 while sigma > 2, then 0)."""
    scale: tuple[Finite, Finite] | None = None
    """Range of the scale (guidance_scale - 1) that the student gets as an input; none: it has no such input."""
    lowest: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the samples with the lowest scale of that range, which is hard to learn if it is 0."""
    grid: str | None = None
    """Sampler whose timesteps are drawn: trailing:20, karras:30@30..0.09 or flow:28@3; none: all of training."""
    weight_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """If loss_weighting is none, a loss on epsilon is weighted by 1 / abar up to this (on v and flow by 1)."""


@documented
@dataclass(frozen=True)
class ObjectiveSettings:
    """What the student learns."""

    guidance: GuidanceSettings = GuidanceSettings()
    random_conditioning: RandomConditioningSettings = RandomConditioningSettings()
    weights: LossSettings = LossSettings()
    loss_weighting: LossWeighting | None = None
    """Weight of the output and the task loss at each timestep; none: uniform (guidance: by its weight_limit)."""
    min_snr_gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """Gamma of the min-SNR weighting."""
    feature_distance: Distance = "mse"
    """normalized_mse: divided by the teacher's mean square; huber: linear above 1; cosine: per sample."""


@documented
@dataclass(frozen=True)
class PreviewSettings:
    """Grids of images of teacher and student from the same prompts and noise, during training."""

    every: Count | None = None
    """Steps between two previews; none: no previews."""
    prompts: Count | tuple[str, ...] = 4
    """Texts, or a number: the first so many of the pool."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Seeds of the initial noise; each gives one image per prompt."""
    steps: Count = 20
    """Number of sampling steps."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guidance scale as in diffusers; none: that of the cache."""


@documented
@dataclass(frozen=True)
class EvaluateSettings:
    """The comparison of student and teacher."""

    prompts: Count | str = 64
    """A number: the last so many prompts of the pool (the unseen ones); or a file of prompts."""
    images_per_prompt: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Images per prompt."""
    steps: Count | None = None
    """Number of sampling steps; none: that of the cache."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guidance scale as in diffusers; none: that of the cache."""
    seed: Seed = 2**31
    """Seed of the initial noise; the default differs from that of the cache."""
    batch: Count = 16
    """How many images a model makes at once."""
    metrics: tuple[Literal["fid", "kid", "clip"], ...] = ()
    """Further scores, which need weights on this machine; KID and Inception features need torchmetrics."""
    features: str | None = None
    """Folder of a CLIP or DINO model whose features measure diversity; none: fixed features of the pixels."""
    inception: str | None = None
    """File with the weights of Inception-v3 for FID and KID; none: the folder in which torch keeps downloads."""
    clip: str | None = None
    """Folder of the CLIP model for the CLIP score."""
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
    """Pipeline folder of diffusers with the teacher, or task:digits, a teacher that is part of the package."""
    family: str = "auto"
    """Family of the teacher; auto: by its model_index.json."""
    call: str | None = None
    """module:function that calls models of no known family; needs --allow-code."""
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
