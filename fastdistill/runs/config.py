# SPDX-License-Identifier: Apache-2.0
"""The run file: all settings of a run, from the teacher's folder to the exported student."""

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
    """Only the first n prompts get latents (none: all of them); the student learns all prompts of the pool."""
    strip: bool = True
    """Remove white space around prompts."""
    unique: bool = True
    """Keep only the first of equal prompts."""
    skip_empty: bool = True
    """Leave out prompts that are empty or only white space."""


@documented
@dataclass(frozen=True)
class CacheSettings:
    """Encoded prompts and samples of the teacher; they are created once, and any number of runs can read them."""

    directory: str = "caches/run"
    """Folder of the cache."""
    images_per_prompt: Count = 1
    """Latents of each seen prompt."""
    images: str | None = None
    """Folder of images with captions, to be encoded by the VAE and used instead of samples of the teacher."""
    sampler: Literal["scheduler"] = "scheduler"
    """How the teacher samples: with the scheduler of its folder and all its settings."""
    steps: Count = 25
    """Number of sampling steps."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guidance scale g = 1 + w, as in diffusers; 1: no guidance; none: 7.5, or the schedule in guidance."""
    guidance: str | float | None = None
    """Instead of guidance_scale, a schedule of the weight w = g - 1, such as 8@10,-1@2,0 (docs/guidance.md)."""
    seed: Seed | None = None
    """Seed of the initial noise; none: that of the run. If it is given, runs with other seeds can share the cache."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float16"
    """Dtype of the stored latents and encodings."""
    encodings: Literal["stored", "on_demand"] = "stored"
    """stored: every prompt is encoded once. on_demand: prompts are encoded during training, shortly before use."""
    batch: Count = 16
    """Batch size of the teacher's sampling and of the text encoder."""
    read: Literal["auto", "memory", "disk"] = "auto"
    """Where the cache is during training; auto: in memory if it needs at most a quarter of the free memory."""
    rows_per_shard: Count = 1024
    """Number of latents per file; an interruption loses at most one file."""
    sizes: tuple[tuple[Count, Count], ...] = ()
    """Heights and widths in pixels; one cache per size, used in proportion to its latents; none: the model's size."""


@documented
@dataclass(frozen=True)
class LoraSettings:
    """If a rank is given, the student is the teacher with low-rank adapters (PEFT)."""

    rank: Annotated[int, Field(ge=1, le=2**15)] | None = None
    """Rank of the adapters; none: no adapters."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The adapters are scaled by alpha / rank; none: alpha = rank (a scale of 1)."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Modules that get an adapter: the ends of their names."""


@documented
@dataclass(frozen=True)
class StudentSettings:
    """The student: a named spec, or one of the other fields; width can be combined with every, first and blocks."""

    spec: str | None = None
    """Name of a spec: bk_base, bk_small, ..., half_depth, half_width."""
    every: Count | None = None
    """For transformers: n keeps every n-th block, counted back from the last."""
    first: Count | None = None
    """For transformers: number of blocks to keep, from the first one on."""
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
    """Rolling states: some samples of a batch are states of a sampler that runs during the training."""

    every: Annotated[int, Field(ge=2)] | None = None
    """n replaces every n-th sample of a batch by such a state; none: no states."""
    by: Literal["teacher", "student"] = "teacher"
    """The model whose output advances the states."""
    steps: Count = 20
    """Number of sampling steps of a trajectory."""
    groups: Annotated[int, Field(ge=1, le=1024)] = 8
    """Number of groups of states; each training step uses and advances one group."""
    clip_sample: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Limit of the magnitude of the predicted clean sample; none: no limit."""
    null: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a state is shown with the null prompt; it does not advance then."""


@documented
@dataclass(frozen=True)
class RegionSettings:
    """Draw random prompts more often from regions of the pool in which student and teacher differ more."""

    count: Annotated[int, Field(ge=2, le=2**16)] | None = None
    """Number of regions (groups of consecutive prompts); none: random prompts are drawn uniformly."""
    every: Count = 50
    """Steps between two updates of the regions' probabilities."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Decay of the moving average of the distances at each update."""
    uniform: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Fraction of the draws that are uniform over all prompts."""
    power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The other draws weight each prompt by the distance of its region to this power."""


@documented
@dataclass(frozen=True)
class RandomConditioningSettings:
    """Random conditioning (arXiv 2504.02011)."""

    probability: str = "exp"
    """Name of p(t), the probability of a random prompt: exp, exp_two_sided, sigmoid, quadratic, const or measured."""
    parameters: dict[str, Finite] = field(default_factory=dict)
    """Parameters of p(t) by name."""
    null: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability that the null prompt replaces the chosen one."""
    with_replacement: bool = False
    """Draw latents independently, instead of each one once per epoch."""
    rolling: RollingSettings = RollingSettings()
    regions: RegionSettings = RegionSettings()


@documented
@dataclass(frozen=True)
class LossSettings:
    """Weights of the terms of the loss."""

    output: Amount = 1.0
    """Weight of the distance between the outputs."""
    feature: Amount = 1.0
    """Weight of the distance between the features at the taps."""
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
    """Fraction of the samples with the lowest scale of that range (a scale of 0 is hard to learn)."""
    grid: str | None = None
    """Draw only timesteps of this sampler: trailing:20, karras:30@30..0.09 or flow:28@3; none: all timesteps."""
    weight_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """If loss_weighting is none, a loss on epsilon has the weight min(1 / abar, this limit); on v and flow 1."""


@documented
@dataclass(frozen=True)
class ObjectiveSettings:
    """What the student learns."""

    guidance: GuidanceSettings = GuidanceSettings()
    random_conditioning: RandomConditioningSettings = RandomConditioningSettings()
    weights: LossSettings = LossSettings()
    loss_weighting: LossWeighting | None = None
    """Weight of the output and the task loss at each timestep; none: uniform (with guidance: see its weight_limit)."""
    min_snr_gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """Gamma of the min-SNR weighting."""
    feature_distance: Distance = "mse"
    """normalized_mse: MSE / mean square of the teacher; huber: linear above 1; cosine: one distance per sample."""


@documented
@dataclass(frozen=True)
class PreviewSettings:
    """Grids of images from teacher and student during training, with the same prompts and noise."""

    every: Count | None = None
    """Steps between two previews; none: no previews."""
    prompts: Count | tuple[str, ...] = 4
    """Texts; or a number n: the first n prompts of the pool."""
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
    """A number n: the last n prompts of the pool (the unseen ones); or a file of prompts."""
    images_per_prompt: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Images per prompt."""
    steps: Count | None = None
    """Number of sampling steps; none: that of the cache."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guidance scale as in diffusers; none: that of the cache."""
    seed: Seed = 2**31
    """Seed of the initial noise; the default differs from that of the cache."""
    batch: Count = 16
    """Batch size of the sampling."""
    metrics: tuple[Literal["fid", "kid", "clip"], ...] = ()
    """Additional scores; they need weights on this machine. KID and Inception features need torchmetrics."""
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
    """Folder for the checkpoints, metrics and reports of the run."""
    device: str = "auto"
    """Device to run on; auto: a GPU if there is one, else the CPU."""
    seed: Seed = 0
    """Seed of the student, the cache and all random draws."""
    teacher: str = ""
    """Folder of the teacher's diffusers pipeline; or task:digits, a teacher that is part of the package."""
    family: str = "auto"
    """Family of the teacher; auto: by its model_index.json."""
    call: str | None = None
    """module:function that calls a model whose family is unknown; needs --allow-code."""
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
