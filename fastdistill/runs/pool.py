# SPDX-License-Identifier: Apache-2.0
"""The prompts of a run: those of a file, the captions of images, or the names of classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastdistill.data.images import captioned_images
from fastdistill.data.texts import PromptFile, read_prompts
from fastdistill.errors import InputError, StorageError, named
from fastdistill.files import located
from fastdistill.models.pipelines import PipelineFolder
from fastdistill.runs.config import RunConfig

_MOST = 2**32  # maximum number of latents in a cache, limited by the draws


@dataclass(frozen=True)
class Pool:
    """The prompts of a run, in order; the first ``seen`` get latents. empty, duplicates: how many prompts of the file
    were left out. images: those of ``cache.images``, each with the number of its caption."""

    texts: list[str]
    seen: int
    empty: int = 0
    duplicates: int = 0
    images: tuple[tuple[Path, int], ...] = ()


def pool_of(config: RunConfig, pipeline: PipelineFolder) -> Pool:
    """The prompts of a run, the captions of ``cache.images`` first.

    Raises:
        InputError: no file of prompts for a model that reads texts; more seen prompts than there are.
        StorageError: a file that ``read_prompts``, or a folder that ``captioned_images`` refuses.
    """
    given = config.prompts
    if given.file is not None:
        found = prompts_in(config, given.file, "prompts.file")
    elif config.cache.images is None:
        if (texts := pipeline.own_prompts()) is None:
            raise InputError.of("prompts.file", "a file of prompts", "none")
        found = PromptFile(texts, len(texts))
    else:
        found = PromptFile([], 0)
    if config.cache.images is not None:
        return _captions(config, config.cache.images, found)
    seen = len(found.texts) if given.seen is None else given.seen
    if seen > len(found.texts):
        raise InputError.of("prompts.seen", f"at most the {len(found.texts)} prompts that there are", seen)
    most, each = _MOST // max(seen, 1), config.cache.images_per_prompt
    if each > most:
        raise InputError.of("cache.images_per_prompt", f"at most {most:,} of each of the {seen:,} seen prompts", each)
    return Pool(found.texts, seen, found.empty, found.duplicates)


def prompts_in(config: RunConfig, file: str, field: str) -> PromptFile:
    """The prompts of a file, cleaned like those of the run; ``field`` names the file in messages.

    Raises:
        InputError, StorageError: those of ``read_prompts``.
    """
    given = config.prompts
    path = located(file, field)
    try:
        with named(field):
            return read_prompts(
                path, column=given.column, strip=given.strip, unique=given.unique, skip_empty=given.skip_empty
            )
    except InputError as error:  # about the column, which has its own field
        raise InputError(f"prompts.{error}") from error


def _captions(config: RunConfig, folder: str, others: PromptFile) -> Pool:
    """The captions of the images, which are the seen prompts, and the other prompts."""
    given = config.prompts
    for name, value, wanted in (
        ("prompts.seen", given.seen, None),
        ("cache.images_per_prompt", config.cache.images_per_prompt, 1),
    ):
        if value != wanted:
            rule = f"{wanted or 'none'}, as there is an image of each caption (cache.images)"
            raise InputError.of(name, rule, value)
    rows: dict[str, int] = {}
    images, empty = [], others.empty
    with named("cache.images"):
        captioned = captioned_images(located(folder, "cache.images"))
    for path, text in captioned:
        text = text.strip() if given.strip else text
        if given.skip_empty and not text.strip():
            empty += 1
        else:
            images.append((path, rows.setdefault(text, len(rows))))
    if not images:
        raise StorageError(f"cache.images: {folder}: expected images with captions, got only empty captions")
    rest = [text for text in others.texts if not given.unique or text not in rows]
    twice = others.duplicates + len(others.texts) - len(rest)
    return Pool([*rows, *rest], len(rows), empty, twice, tuple(images))
