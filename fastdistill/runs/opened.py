# SPDX-License-Identifier: Apache-2.0
"""A run file that has been checked: its pipeline, its student and its prompts, and where everything of the run is."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastdistill.data.fingerprint import differences, listed, plain
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.texts import read_prompts
from fastdistill.errors import FastdistillError, InputError, StorageError, described, quoted
from fastdistill.models import BLOCK_SPECS, SPECS, BlockSpec, StudentSpec, make_student
from fastdistill.models.calling import Call
from fastdistill.models.families import FAMILIES
from fastdistill.models.pipelines import PipelineFolder, open_pipeline
from fastdistill.runs.config import RunConfig, StudentSettings
from fastdistill.train.config import validated
from fastdistill.train.devices import usable

Size = tuple[int, int] | None
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Pool:
    """The prompts of a run, in their order: the first ``seen`` get latents. empty, duplicates: how many were left out
    of the file."""

    texts: list[str]
    seen: int
    empty: int = 0
    duplicates: int = 0


def opened(config: RunConfig, *, allow_code: bool = False) -> Run:
    """The run of a run file; nothing is loaded but configurations, and nothing is written.

    Args:
        allow_code: whether ``config.call``, code of the user's own, may be imported.

    Raises:
        InputError: a value outside of its range; no teacher; a student that does not fit it; a device that is not
            there; ``call`` without ``allow_code``.
        StorageError: a folder or file that is missing or damaged.
    """
    if not isinstance(config, RunConfig):
        raise InputError.of("config", "a RunConfig (fastdistill.runs.load reads one from a file)", described(config))
    config = validated(config, "run")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    usable(device)
    if not config.teacher:
        raise InputError.of("teacher", "a pipeline folder of diffusers", "none")
    pipeline = open_pipeline(Path(config.teacher).expanduser())
    if config.family not in ("auto", pipeline.family.name):
        rule = f"auto, or {pipeline.family.name}, which {config.teacher} holds"
        known = "" if config.family in FAMILIES else f" (families: {', '.join(FAMILIES)}; others: call)"
        raise InputError.of("family", rule, config.family + known)
    call = None if config.call is None else _call(config.call, allow_code)
    run = Run(dataclasses.replace(config, device=device), pipeline, call)
    for size in run.sizes:
        pipeline.latent_shape(size)
    make_student(pipeline.model(device="meta"), run.student_spec)  # whether it fits
    return run


@dataclass(frozen=True, eq=False)
class Run:
    """A run, by ``opened``; ``call`` is the function that ``config.call`` names."""

    config: RunConfig
    pipeline: PipelineFolder
    call: Call | None

    @property
    def directory(self) -> Path:
        """Checkpoints, metrics and reports."""
        return Path(self.config.directory).expanduser()

    @property
    def prompts_place(self) -> Path:
        """Directory of the prompt bank."""
        return Path(self.config.cache.directory).expanduser() / "prompts"

    def latents_place(self, size: Size = None) -> Path:
        """Directory of the latent cache of images of this size (one of ``sizes``)."""
        name = "latents" if size is None else f"latents-{size[0]}x{size[1]}"
        return Path(self.config.cache.directory).expanduser() / name

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Height and width of the images, a cache for each; (None,): the size that the model is for."""
        return self.config.cache.sizes or (None,)

    @property
    def teacher_dtype(self) -> torch.dtype:
        if self.config.teacher_dtype == "auto":
            return torch.bfloat16 if torch.device(self.config.device).type == "cuda" else torch.float32
        return _DTYPES[self.config.teacher_dtype]

    @property
    def cache_dtype(self) -> torch.dtype:
        return _DTYPES[self.config.cache.dtype]

    @cached_property
    def student_spec(self) -> StudentSpec | BlockSpec | Mapping[str, Any]:
        """What ``make_student`` takes."""
        return student_spec_of(self.config.student, bool(self.pipeline.family.blocks))

    @cached_property
    def pool(self) -> Pool:
        """The prompts; the file is read when they are first asked for."""
        given = self.config.prompts
        if given.file is None:
            texts, empty, duplicates = self._classes(), 0, 0
        else:
            found = read_prompts(
                Path(given.file).expanduser(),
                column=given.column,
                strip=given.strip,
                unique=given.unique,
                skip_empty=given.skip_empty,
            )
            texts, empty, duplicates = found.texts, found.empty, found.duplicates
        seen = len(texts) if given.seen is None else given.seen
        if seen > len(texts):
            raise InputError.of("prompts.seen", f"at most the {len(texts)} prompts that there are", seen)
        return Pool(texts, seen, empty, duplicates)

    def _classes(self) -> list[str]:
        """The names of the classes, of models that have such in place of texts."""
        names = self.pipeline.index.get("id2label")
        if not names:
            raise InputError.of("prompts.file", "a file of prompts", "none")
        return [str(name) for name in names.values()]

    def bank(self, *, load: bool = False, device: torch.device | str = "cpu") -> PromptBank:
        """The stored encodings of ``pool``, left on the disk, or loaded.

        Raises:
            StorageError: they are not there, or were made of other prompts or by another pipeline.
        """
        place = self.prompts_place
        if not (place / "manifest.json").exists():
            raise StorageError(f"{place}: expected the encoded prompts (fastdistill cache), got none")
        bank = PromptBank.load(place, device=device) if load else PromptBank.open(place, verify=False)
        if bank.texts != self.pool.texts:
            pairs = enumerate(zip(bank.texts, self.pool.texts, strict=False))
            row = next((i for i, (a, b) in pairs if a != b), min(len(bank), len(self.pool.texts)))
            rule = f"the {len(bank):,} prompts that are encoded there"
            got = f"{len(self.pool.texts):,}, of which prompt {row} is the first that differs"
            raise StorageError(f"{place}: expected {rule}, got {got}; use another cache.directory")
        told = bank.encoder.get("pipeline")
        if told not in (None, self.pipeline.kind):
            rule = f"prompts encoded by a {self.pipeline.kind}"
            raise StorageError(f"{place}: expected {rule}, got those of a {told}; use another cache.directory")
        return bank

    def latents(self, size: Size, bank: PromptBank, *, load: bool = False) -> LatentCache:
        """The stored latents of a size, left on the disk, or loaded.

        Raises:
            StorageError: they are not there or unfinished, or were made with other prompts or settings.
        """
        place = self.latents_place(size)
        expected = {**self.sampling(size), "prompts": bank.identity}
        if not (place / "manifest.json").exists():
            raise StorageError(f"{place}: expected the teacher's latents (fastdistill cache), got none")
        return LatentCache.load(place, expect=expected) if load else LatentCache.open(place, expect=expected)

    def sampling(self, size: Size) -> dict[str, Any]:
        """What decides the latents of a size, besides teacher and prompts."""
        cache = self.config.cache
        if cache.images is not None:
            return {"images": True, "size": list(self.pipeline.size(size))}
        scheduler = self.pipeline.scheduler()
        settings = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
        return plain(
            {
                "sampling": {
                    "scheduler": type(scheduler).__name__,
                    "settings": settings,
                    "steps": cache.steps,
                    "guidance_scale": cache.guidance_scale,
                },
                "size": self.pipeline.size(size),
                "seed": self.config.seed,
            }
        )

    def check_same(self, place: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """StorageError where what is in a directory was made otherwise than this run wants it."""
        if changed := differences(plain(wanted), plain(found)):
            raise StorageError(f"{place}: made differently ({listed(changed)}); use another directory or delete it")


def student_spec_of(student: StudentSettings, transformer: bool) -> StudentSpec | BlockSpec | Mapping[str, Any]:
    """The spec that the settings of a student mean, for a transformer or a U-Net.

    Raises:
        InputError: settings that say nothing, or two things.
    """
    kinds = ("spec", "every", "first", "blocks", "channels")
    given = [name for name in kinds if getattr(student, name) is not None]
    if student.lora.rank is not None:
        given.append("lora.rank")
    alone = student.width is not None and (not given or given[0] in ("every", "first", "blocks"))
    if len(given) > 1 or (student.width is not None and not alone) or not (given or alone):
        rule = "one of spec, every, first, blocks, width, channels and lora.rank (width goes with the blocks too)"
        raise InputError.of("student", rule, " and ".join([*given, *(["width"] if student.width else [])]) or "none")
    if student.lora.rank is not None:
        alpha = student.lora.rank if student.lora.alpha is None else student.lora.alpha
        return {
            "peft_type": "LORA",
            "r": student.lora.rank,
            "lora_alpha": alpha,
            "target_modules": list(student.lora.targets),
        }
    if student.spec is not None:
        named: Mapping[str, StudentSpec | BlockSpec] = BLOCK_SPECS if transformer else SPECS
        if student.spec not in named:
            raise InputError.of("student.spec", f"one of {', '.join(named)}", repr(student.spec))
        return named[student.spec]
    if transformer:
        if student.channels is not None:
            raise InputError.of("student.channels", "none, as the teacher is a transformer (width)", student.channels)
        return BlockSpec(student.every, student.first, student.blocks, width=student.width)
    for name in ("every", "first", "blocks"):
        if getattr(student, name) is not None:
            raise InputError.of(f"student.{name}", "none, as the teacher is a U-Net (spec)", getattr(student, name))
    return StudentSpec(width=student.width, block_out_channels=student.channels)


def _call(name: str, allow_code: bool) -> Call:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError.of("call", "module:function", repr(name))
    if not allow_code:
        rule = "no code of your own unless the command line has --allow-code (allow_code=True)"
        raise InputError.of("call", rule, f"{function} of {module}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise FastdistillError(f"call: {name} could not be imported: {quoted(error)}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise InputError.of("call", f"a function {function} of {module}", described(found))
    return found  # type: ignore[no-any-return]
