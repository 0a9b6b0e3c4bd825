# SPDX-License-Identifier: Apache-2.0
"""A checked run file: its pipeline, its student and its prompts, and the places of all its files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistill import files
from fastdistill.data.encoded import Encode
from fastdistill.data.file_hashes import FileHashes
from fastdistill.data.fingerprint import differences, dtype_name, listed, plain, sha256_of_json
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import MANIFEST_NAME, Manifest, StoredFile, read_manifest
from fastdistill.data.prompt_bank import PromptBank, attachments
from fastdistill.diffusion.guidance import Guidance, shown
from fastdistill.diffusion.matching import named_weights
from fastdistill.distill import RandomConditioning
from fastdistill.distill.measured import MEASURED
from fastdistill.errors import InputError, StorageError, described, named, set_by
from fastdistill.files import located
from fastdistill.models import BlockSpec, Student, StudentSpec, float8, make_student
from fastdistill.models.calling import Call
from fastdistill.models.families import FAMILIES
from fastdistill.models.pipelines import PipelineFolder
from fastdistill.runs.config import GuidanceSettings, RunConfig
from fastdistill.runs.guidance import check_cache, check_distilled
from fastdistill.runs.objective import OF_GUIDANCE, OF_OBJECTIVE, check_conditioning, objective_of
from fastdistill.runs.pool import Pool, pool_of
from fastdistill.runs.student import fields_of, student_spec_of
from fastdistill.runs.teacher import open_teacher
from fastdistill.train import distributed
from fastdistill.train.config import validated
from fastdistill.train.devices import usable

Size = tuple[int, int] | None
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def opened(config: RunConfig, *, allow_code: bool = False) -> Run:
    """Check a run file and return its run. Only configurations are loaded, and nothing is written.

    Args:
        allow_code: whether ``config.call``, code of the user, may be imported.

    Raises:
        InputError: a value outside of its range; no teacher; a student that does not fit it; a missing device; ``call``
            without ``allow_code``.
        StorageError: a folder or file that is missing or damaged.
    """
    if not isinstance(config, RunConfig):
        raise InputError.of("config", "a RunConfig (fastdistill.runs.load reads one from a file)", described(config))
    config = validated(config, "run")
    device = distributed.own_device(config.device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    usable(device)
    if not config.teacher:
        raise InputError.of("teacher", "a pipeline folder of diffusers", "none")
    with named("teacher"):
        pipeline, call = open_teacher(config.teacher, config.call, allow_code)
    if config.family not in ("auto", pipeline.family.name):
        rule = f"auto, or {pipeline.family.name}, which {config.teacher} holds"
        known = "" if config.family in FAMILIES else f" (families: {', '.join(FAMILIES)}; others: call)"
        raise InputError.of("family", rule, config.family + known)
    if config.cache.guidance is not None:
        check_cache(config, config.cache.guidance, pipeline)
    run = Run(dataclasses.replace(config, device=device), pipeline, call)
    for size in run.sizes:
        try:
            pipeline.latent_shape(size)
        except InputError as error:
            raise InputError(f"cache.sizes: {error}") from error
    if len(set(run.sizes)) < len(run.sizes):
        raise InputError.of("cache.sizes", "different sizes, each of which has a cache", described(run.sizes))
    teacher = pipeline.model(device="meta")
    for name, part in (("cache", config.cache), ("preview", config.preview), ("evaluate", config.evaluate)):
        if part.steps is None or (name == "preview" and config.preview.every is None):
            continue
        schedule = run.guidance(None if name == "cache" else part.guidance_scale).get("guidance")
        pipeline.check_steps(teacher, part.steps, schedule, argument=f"{name}.steps")
    guidance = config.objective.guidance
    if guidance.schedule is not None:
        check_distilled(guidance, guidance.schedule, pipeline, run.sizes)
    elif guidance != GuidanceSettings():
        raise InputError.of("objective.guidance.schedule", "one, beside scale, grid or weight_limit", None)
    check_conditioning(config, len(pipeline.schedule(run.sizes[0])), distributed.size())
    check_teacher(config, teacher)
    with set_by(fields_of(config.student)):
        made = run.student(teacher)  # checks that it fits
    with set_by(OF_OBJECTIVE | OF_GUIDANCE):
        check_objective(objective_of(config.objective, made), run)
    if config.student.lora.rank is not None and not config.objective.weights.task and guidance.schedule is None:
        rule = "above 0 for a student with adapters, which begins as its teacher and differs from it by the task alone"
        raise InputError.of("objective.weights.task", rule, config.objective.weights.task)
    return run


def check_teacher(config: RunConfig, teacher: nn.Module) -> None:
    """InputError for options of the frozen teacher that cannot work on any device."""
    train = config.train
    if train.teacher_null_once:
        reason = "train.fuse is false" if train.fuse is False else None
        if config.objective.guidance.schedule is None:
            reason = "there is no objective.guidance.schedule"
        if reason is not None:
            raise InputError.of("train.teacher_null_once", "false", f"true, and {reason}")
    if train.teacher_ahead:
        given = config.objective.random_conditioning
        states, regions = given.rolling.every is not None, given.regions.count is not None
        reason = "the prompts of the next step (regions) may go by distances of this one" if regions else None
        reason = "the states of the next step (rolling) come out of this one" if states else reason
        reason = "there are latents of several shapes (cache.sizes)" if len(config.cache.sizes) > 1 else reason
        if reason is not None:
            raise InputError.of("train.teacher_ahead", "false", f"true, and {reason}")
    if train.teacher_fp8:
        float8.layers_of(teacher)
        if train.precision == "measured":
            raise InputError.of("train.teacher_fp8", "false with train.precision measured", True)


def check_objective(objective: RandomConditioning, run: Run) -> None:
    """InputError for settings that the objective refuses, and for p(t) and loss weights that this schedule has not."""
    objective.describe()
    for size in run.sizes:
        schedule = run.pipeline.schedule(size)
        if objective.probability != MEASURED:
            objective.check_regions(objective.p(schedule.clock))
        weighting = objective.loss_weighting
        if weighting is not None and (objective.weights.output or objective.weights.task):
            coefficients = schedule.coefficients(run.pipeline.prediction_type)
            named_weights(coefficients, weighting, objective.min_snr_gamma, "loss_weighting", "min_snr_gamma")


@dataclass(frozen=True, eq=False)
class Run:
    """A run, from ``opened``; ``call`` is the function that ``config.call`` names."""

    config: RunConfig
    pipeline: PipelineFolder
    call: Call | None

    @property
    def directory(self) -> Path:
        """The directory for checkpoints, metrics and reports."""
        return located(self.config.directory, "directory")

    @property
    def prompts_place(self) -> Path:
        """Directory of the prompt bank."""
        return located(self.config.cache.directory, "cache.directory") / "prompts"

    def latents_place(self, size: Size = None) -> Path:
        """Directory of the latent cache of images of this size (one of ``sizes``)."""
        name = "latents" if size is None else f"latents-{size[0]}x{size[1]}"
        return located(self.config.cache.directory, "cache.directory") / name

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Height and width of the images, with one cache for each; (None,): the size that the model is for."""
        return self.config.cache.sizes or (None,)

    @property
    def teacher_dtype(self) -> torch.dtype:
        if self.config.teacher_dtype == "auto":
            return torch.bfloat16 if torch.device(self.config.device).type == "cuda" else torch.float32
        return _DTYPES[self.config.teacher_dtype]

    @property
    def cache_seed(self) -> int:
        """The seed of the initial noise of the latents."""
        own = self.config.cache.seed
        return self.config.seed if own is None else own

    @property
    def cache_dtype(self) -> torch.dtype:
        return _DTYPES[self.config.cache.dtype]

    @cached_property
    def student_spec(self) -> StudentSpec | BlockSpec | Mapping[str, Any]:
        """The spec for ``make_student``."""
        return student_spec_of(self.config.student, bool(self.pipeline.family.blocks))

    def student(self, teacher: Any, *, seed: int = 0) -> Student:
        """The student of this teacher; random weights depend on ``seed``."""
        reads = self.config.objective.guidance.scale is not None
        init = self.config.student.init
        return make_student(teacher, self.student_spec, init=init, seed=seed, guidance_embedding=reads)

    def guidance(self, own: float | None = None) -> dict[str, Any]:
        """The guidance of samples, as arguments of ``PipelineFolder.sample``: the given scale, or that of the cache."""
        cache = self.config.cache
        if own is None and cache.guidance is not None:
            return {"guidance": cache.guidance}
        scale = cache.guidance_scale if own is None else own
        return {"guidance_scale": 7.5 if scale is None else scale}

    def student_guidance(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The guidance for sampling the student if the teacher uses ``given``: none if the student was distilled with
        guidance and does not read the scale."""
        guidance = self.config.objective.guidance
        return {"guidance_scale": 1.0} if guidance.schedule is not None and guidance.scale is None else given

    @property
    def guidance_text(self) -> str:
        """w of the cache's samples, as the text of a schedule."""
        given, family = self.guidance(), self.pipeline.family
        if "guidance" in given:
            return str(Guidance.parse(given["guidance"]))
        scale, config = given["guidance_scale"], self.pipeline.config
        return shown(Decimal(repr(scale if family.reads_guidance(config) else family.guided(config, scale))) - 1)

    @cached_property
    def pool(self) -> Pool:
        """The prompts; their files are read at the first use."""
        return pool_of(self.config, self.pipeline)

    @property
    def prompt_index(self) -> torch.Tensor:
        """[N] int64: the prompt of each latent."""
        if self.config.cache.images is not None:
            return torch.tensor([row for _, row in self.pool.images], device="cpu")
        return torch.arange(self.pool.seen, device="cpu").repeat_interleave(self.config.cache.images_per_prompt)

    @property
    def samples(self) -> int:
        """The number of latents of each size: N of ``prompt_index``."""
        images = self.pool.images if self.config.cache.images is not None else None
        return self.pool.seen * self.config.cache.images_per_prompt if images is None else len(images)

    @cached_property
    def hashes(self) -> FileHashes:
        """Hashes of files in the teacher's folder, stored in the cache's directory."""
        return FileHashes(files.located(self.config.cache.directory) / ".hashes.json")

    @cached_property
    def encoder(self) -> dict[str, Any]:
        """The fingerprint of the bank: encoders, tokenizers and settings, which determine the encodings of the
        prompts."""
        family, config = self.pipeline.family, self.pipeline.config
        settings = {n: v for n, v in self.pipeline.index.items() if not isinstance(v, list) and not n.startswith("_")}
        options: dict[str, Any] = {}
        if family.reads_guidance(config):
            options["guidance_scale"] = self.guidance()["guidance_scale"]
        if family.of_size(config, size := self.pipeline.size(self.sizes[0])):
            options["size"] = size
        parts = [name for name in self.pipeline.components() if name.startswith(("text_encoder", "tokenizer"))]
        return plain(
            {
                "pipeline": self.pipeline.kind,
                "settings": sha256_of_json(settings),
                "files": {name: self.hashes.of(self.pipeline.files(name)) for name in parts},
                "options": options,
            }
        )

    def encoding(self) -> tuple[Encode, Callable[[str], Mapping[str, torch.Tensor]]]:
        """Functions that encode prompts and the null prompt; they load the text encoders on the device and keep
        them."""
        family, pipeline = (
            self.pipeline.family,
            self.pipeline.encoders(device=self.config.device, dtype=self.teacher_dtype),
        )
        given: dict[str, Any] = {
            "config": self.pipeline.config,
            "size": self.pipeline.size(self.sizes[0]),
            "guidance_scale": self.guidance().get("guidance_scale"),
        }
        return partial(family.encode, pipeline, **given), partial(family.encode_null, pipeline, **given)

    @cached_property
    def _on_demand(self) -> PromptBank:
        encode, encode_null = self.encoding()
        return PromptBank.on_demand(
            self.pool.texts,
            encode,
            encode_null=encode_null,
            encoder=self.encoder,
            batch=self.config.cache.batch,
            dtype=self.cache_dtype,
        )

    def stored_prompts(self) -> Manifest | None:
        """The manifest of the encoded prompts, complete or not; None if there are none.

        Raises:
            StorageError: they belong to other prompts or another order, or were made by another encoder.
        """
        place = self.prompts_place
        if not (place / MANIFEST_NAME).exists():
            return None
        manifest = read_manifest(place)
        own = attachments(self.pool.texts, "")
        if any(manifest.attachments.get(name) != StoredFile.of(data) for name, data in own.items()):
            texts = PromptBank.texts_of(place, manifest)
            pairs = enumerate(zip(texts, self.pool.texts, strict=False))
            row = next((i for i, (a, b) in pairs if a != b), min(len(texts), len(self.pool.texts)))
            rule = f"the {len(texts):,} prompts that are encoded there"
            got = f"{len(self.pool.texts):,}, of which prompt {row} is the first that differs"
            raise StorageError(f"{place}: expected {rule}, got {got}; use another cache.directory")
        self.check_same(place, {"encoder": self.encoder}, {"encoder": manifest.fingerprint.get("encoder", {})})
        self._check_dtype(place, manifest)
        return manifest

    def mend_texts(self) -> None:
        """Write the texts of the encoded prompts again if they are damaged; for ``stored_prompts``."""
        for name, data in attachments(self.pool.texts, "").items():
            with contextlib.suppress(OSError):
                if (self.prompts_place / name).read_bytes() == data:
                    continue
            files.atomic_write(self.prompts_place / name, data)

    def bank(self, *, load: bool = False, device: torch.device | str = "cpu") -> PromptBank:
        """The stored encodings of ``pool``, on disk or loaded. If ``cache.encodings`` is on_demand: a bank that encodes
        its rows when they are read, with the text encoders on the run's device.

        Raises:
            StorageError: they are missing or incomplete, or were made from other prompts or by another encoder.
        """
        if self.config.cache.encodings == "on_demand":
            return self._on_demand
        place = self.prompts_place
        if self.stored_prompts() is None:
            raise StorageError(f"{place}: expected the encoded prompts (fastdistill cache), got none")
        return PromptBank.load(place, device=device) if load else PromptBank.open(place, verify=False)

    def stored_latents(self, size: Size, prompts: str | None) -> Manifest | None:
        """The manifest of the latents of a size, complete or not; None if there are none.

        ``prompts``: identity of the bank; None: not known yet.

        Raises:
            StorageError: they were made by another teacher, with other prompts or settings.
        """
        place = self.latents_place(size)
        if not (place / MANIFEST_NAME).exists():
            return None
        manifest = read_manifest(place)
        expected = plain(self.sampling(size) | ({} if prompts is None else {"prompts": prompts}))
        self.check_same(place, expected, {key: manifest.fingerprint.get(key) for key in expected})
        self._check_dtype(place, manifest)
        return manifest

    def latents(self, size: Size, bank: PromptBank, *, load: bool = False) -> LatentCache:
        """The stored latents of a size, on disk or loaded.

        Raises:
            StorageError: they are missing or incomplete, or were made by another teacher, with other prompts or
                settings.
        """
        place = self.latents_place(size)
        if self.stored_latents(size, bank.identity) is None:
            raise StorageError(f"{place}: expected the teacher's latents (fastdistill cache), got none")
        return LatentCache.load(place) if load else LatentCache.open(place)

    def sampling(self, size: Size) -> dict[str, Any]:
        """What determines the latents of a size, besides teacher and prompts."""
        cache = self.config.cache
        if cache.images is not None:
            images = self.hashes.each(path for path, _ in self.pool.images)
            vae = self.hashes.of(self.pipeline.files("vae"))
            return plain({"images": sha256_of_json(images), "vae": vae, "size": self.pipeline.size(size)})
        scheduler = self.pipeline.scheduler()
        settings = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
        return plain(
            {
                "model": self.hashes.of(self.pipeline.files(self.pipeline.family.part)),
                "sampling": {
                    "scheduler": type(scheduler).__name__,
                    "settings": settings,
                    "steps": cache.steps,
                    "guidance": self.guidance_text,
                    "images_per_prompt": cache.images_per_prompt,
                    "seen": self.pool.seen,
                },
                "size": self.pipeline.size(size),
                "seed": self.cache_seed,
            }
        )

    def _check_dtype(self, place: Path, manifest: Manifest) -> None:
        """StorageError if the stored rows are not in ``cache.dtype``."""
        for name, tensor in manifest.tensors.items():
            if tensor.dtype.is_floating_point and tensor.dtype != self.cache_dtype:
                dtypes = [dtype_name(dtype) for dtype in (self.cache_dtype, tensor.dtype)]
                self.check_same(place, {f"cache.dtype of {name}": dtypes[0]}, {f"cache.dtype of {name}": dtypes[1]})

    def check_same(self, place: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """StorageError if the contents of a directory were made with other inputs than those of this run."""
        if changed := differences(plain(wanted), plain(found)):
            raise StorageError(f"{place}: made differently ({listed(changed)}); use another directory or delete it")
