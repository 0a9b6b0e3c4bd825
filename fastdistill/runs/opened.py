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

from fastdistill import files
from fastdistill.data.file_hashes import FileHashes
from fastdistill.data.fingerprint import differences, listed, plain, sha256_of_json
from fastdistill.data.images import captioned_images
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import MANIFEST_NAME, Manifest, StoredFile, read_manifest
from fastdistill.data.prompt_bank import PromptBank, attachments
from fastdistill.data.texts import PromptFile, read_prompts
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
    of the file. images: of ``cache.images``, each with the number of its caption."""

    texts: list[str]
    seen: int
    empty: int = 0
    duplicates: int = 0
    images: tuple[tuple[Path, int], ...] = ()


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
        """The prompts, captions of images first; the files are read when they are first asked for."""
        given = self.config.prompts
        if given.file is not None:
            found = read_prompts(
                given.file,
                column=given.column,
                strip=given.strip,
                unique=given.unique,
                skip_empty=given.skip_empty,
            )
        elif self.config.cache.images is None:
            found = PromptFile(texts := self._classes(), len(texts))
        else:
            found = PromptFile([], 0)
        if self.config.cache.images is not None:
            return self._captions(found)
        seen = len(found.texts) if given.seen is None else given.seen
        if seen > len(found.texts):
            raise InputError.of("prompts.seen", f"at most the {len(found.texts)} prompts that there are", seen)
        return Pool(found.texts, seen, found.empty, found.duplicates)

    def _captions(self, others: PromptFile) -> Pool:
        """The captions of the images, which are the seen prompts, and other prompts."""
        given = self.config.prompts
        for name, value, wanted in (
            ("prompts.seen", given.seen, None),
            ("cache.images_per_prompt", self.config.cache.images_per_prompt, 1),
        ):
            if value != wanted:
                raise InputError.of(
                    name, f"{wanted or 'none'}, as there is an image of each caption (cache.images)", value
                )
        rows: dict[str, int] = {}
        images, empty = [], others.empty
        for path, text in captioned_images(files.located(self.config.cache.images, "cache.images")):
            text = text.strip() if given.strip else text
            if given.skip_empty and not text.strip():
                empty += 1
            else:
                images.append((path, rows.setdefault(text, len(rows))))
        if not images:
            raise StorageError(f"{self.config.cache.images}: expected images with captions, got only empty captions")
        rest = [text for text in others.texts if not given.unique or text not in rows]
        twice = others.duplicates + len(others.texts) - len(rest)
        return Pool([*rows, *rest], len(rows), empty, twice, tuple(images))

    def _classes(self) -> list[str]:
        """The classes of a model that has such in place of texts, by a name that no other has or by their numbers."""
        if self.reads_texts:
            raise InputError.of("prompts.file", "a file of prompts", "none")
        names = self.pipeline.index.get("id2label")
        if not names:
            return [str(number) for number in range(self.pipeline.config["num_embeds_ada_norm"])]
        named = {int(number): [name.strip() for name in text.split(",")] for number, text in names.items()}
        found = {name: number for number, own in named.items() for name in own}  # as the pipeline understands them
        return [
            next((name for name in own if name and found[name] == number), str(number))
            for number, own in sorted(named.items())
        ]

    @property
    def prompt_index(self) -> torch.Tensor:
        """[N] int64: the prompt of each latent."""
        if self.config.cache.images is not None:
            return torch.tensor([row for _, row in self.pool.images], device="cpu")
        return torch.arange(self.pool.seen, device="cpu").repeat_interleave(self.config.cache.images_per_prompt)

    @property
    def reads_texts(self) -> bool:
        """Whether the prompts are texts, and not names of classes."""
        return any(name.startswith("text_encoder") for name in self.pipeline.components())

    @cached_property
    def hashes(self) -> FileHashes:
        """Of files of the teacher's folder, remembered in the cache's."""
        return FileHashes(files.located(self.config.cache.directory) / ".hashes.json")

    @cached_property
    def encoder(self) -> dict[str, Any]:
        """What decides the encodings of the prompts, the fingerprint of the bank: encoders, tokenizers, settings."""
        family, config = self.pipeline.family, self.pipeline.config
        settings = {n: v for n, v in self.pipeline.index.items() if not isinstance(v, list) and not n.startswith("_")}
        options: dict[str, Any] = {}
        if family.reads_guidance(config):
            options["guidance_scale"] = self.config.cache.guidance_scale
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

    def stored_prompts(self) -> Manifest | None:
        """The manifest of the encoded prompts, whole or unfinished; None: there are none.

        Raises:
            StorageError: they are of other prompts, in another order, or were made by another encoder.
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
        return manifest

    def bank(self, *, load: bool = False, device: torch.device | str = "cpu") -> PromptBank:
        """The stored encodings of ``pool``, left on the disk, or loaded.

        Raises:
            StorageError: they are not there or unfinished, or were made of other prompts or by another encoder.
        """
        place = self.prompts_place
        if self.stored_prompts() is None:
            raise StorageError(f"{place}: expected the encoded prompts (fastdistill cache), got none")
        return PromptBank.load(place, device=device) if load else PromptBank.open(place, verify=False)

    def stored_latents(self, size: Size, prompts: str | None) -> Manifest | None:
        """The manifest of the latents of a size, whole or unfinished; None: there are none.

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
        return manifest

    def latents(self, size: Size, bank: PromptBank, *, load: bool = False) -> LatentCache:
        """The stored latents of a size, left on the disk, or loaded.

        Raises:
            StorageError: they are not there or unfinished, or were made by another teacher, with other prompts or
                settings.
        """
        place = self.latents_place(size)
        if self.stored_latents(size, bank.identity) is None:
            raise StorageError(f"{place}: expected the teacher's latents (fastdistill cache), got none")
        return LatentCache.load(place) if load else LatentCache.open(place)

    def sampling(self, size: Size) -> dict[str, Any]:
        """What decides the latents of a size, besides teacher and prompts."""
        cache = self.config.cache
        if cache.images is not None:
            folder = files.located(cache.images)
            names = [[path.relative_to(folder).as_posix(), path.stat().st_size] for path, _ in self.pool.images]
            vae = self.hashes.of(self.pipeline.files("vae"))
            return plain({"images": sha256_of_json(names), "vae": vae, "size": self.pipeline.size(size)})
        scheduler = self.pipeline.scheduler()
        settings = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
        return plain(
            {
                "model": self.hashes.of(self.pipeline.files(self.pipeline.family.part)),
                "sampling": {
                    "scheduler": type(scheduler).__name__,
                    "settings": settings,
                    "steps": cache.steps,
                    "guidance_scale": cache.guidance_scale,
                    "images_per_prompt": cache.images_per_prompt,
                    "seen": self.pool.seen,
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
