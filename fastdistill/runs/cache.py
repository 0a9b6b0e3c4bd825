# SPDX-License-Identifier: Apache-2.0
"""The data of a run: the encoded prompts, and the teacher's samples for the seen ones."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill import files
from fastdistill.data.fingerprint import dtype_name
from fastdistill.data.images import check_images, load_image
from fastdistill.data.latent_cache import generate_latent_cache
from fastdistill.data.manifest import Manifest
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.prompt_writer import build_prompt_bank
from fastdistill.data.shards import damaged_shards, tidy
from fastdistill.diffusion.scheduled import check_scheduler
from fastdistill.errors import InputError
from fastdistill.models.weights import weights_hash
from fastdistill.runs.config import RunConfig
from fastdistill.runs.opened import Run, Size, opened

Progress = Callable[[str, int, int], object]
Generate = Callable[[Tensor, Tensor], Tensor]
Only = Literal["prompts", "latents"]


@dataclass(frozen=True)
class Cached:
    """What is on the disk after ``cache``. If ``cache.encodings`` is on_demand, there is no bank on the disk.

    prompts: directory of the bank. latents: one directory per size. texts: number of rows of the bank, with the null
    prompt. samples: number of rows of all latents. made: how many of these rows this call has made.
    """

    prompts: Path
    latents: tuple[Path, ...]
    texts: int
    samples: int
    made: int


def cache(
    config: RunConfig,
    *,
    only: Only | None = None,
    verify: bool = True,
    progress: Progress | None = None,
    allow_code: bool = False,
) -> Cached:
    """Encode the prompts of a run, then sample its teacher for the seen ones; existing rows are kept.

    If ``cache.encodings`` is on_demand, nothing is encoded in advance, and the text encoders stay in memory together
    with the teacher. With ``cache.images`` the latents are those images, encoded by the VAE; their captions are the
    seen prompts.

    The text encoders are freed before the teacher is loaded. Sample n depends only on the seed, n and its prompt.
    Encodings
    and samples are written shard by shard: an interrupted call is continued by the next one, and processes that make
    the same call at once (``torchrun``) share the shards; the result is the same.

    Args:
        only: "prompts" or "latents": do not change the other part.
        verify: read existing rows, and make damaged ones again.
        progress: ``progress("prompts" or "latents", rows done, rows)``, at the start and after each batch; with several
            sizes the second name is "latents HEIGHTxWIDTH".
        allow_code: whether ``config.call`` may be imported.

    Raises:
        InputError: what ``opened`` refuses; values that are not finite in ``cache.dtype``.
        StorageError: the directory has a cache with other prompts, another encoder, teacher or other settings; a disk
            that is too small; an image that is too small or cannot be opened. All before anything is written.
    """
    if only not in (None, "prompts", "latents"):
        raise InputError.of("only", "prompts or latents", repr(only))
    run = opened(config, allow_code=allow_code)
    report = progress or (lambda stage, done, total: None)
    check_scheduler(run.pipeline.scheduler())
    sizes = () if only == "prompts" else run.sizes
    on_demand = run.config.cache.encodings == "on_demand"
    stored = None if on_demand else run.stored_prompts()
    missing = _missing(run, sizes, run.samples, None if stored is None else stored.fingerprint["identity"], verify)
    room = sum(rows * _row_bytes(run, size) for size, rows in missing.items())
    files.require_space(run.prompts_place, room)
    index = run.prompt_index
    for size, rows in missing.items():
        if rows:
            check_images((path for path, _ in run.pool.images), run.pipeline.size(size))
    made = 0
    if not on_demand and only != "latents":
        if stored is not None:
            run.mend_texts()
        made = _encode(run, _lacking(run.prompts_place, stored, len(run.pool.texts) + 1, verify), room, report)
    if sizes:
        bank = run.bank()
        for size in sizes:
            run.stored_latents(size, bank.identity)
        for size in sizes:
            report(_stage(size), len(index) - missing[size], len(index))
        if any(missing.values()):
            _free()  # the text encoders
            _sample(run, bank, index, [size for size in sizes if missing[size]], report)
        made += sum(missing.values())
    places = [run.latents_place(size) for size in sizes] + [run.prompts_place]
    for place in places:
        tidy(place)
    return Cached(
        prompts=run.prompts_place,
        latents=tuple(run.latents_place(size) for size in sizes),
        texts=0 if on_demand else len(run.pool.texts) + 1,
        samples=len(index) * len(sizes),
        made=made,
    )


def _encode(run: Run, missing: int, room: int, report: Progress) -> int:
    """Encodes missing rows, if the disk has ``room`` also for what follows; returns the number of encoded rows."""
    texts = run.pool.texts
    if not missing:
        report("prompts", len(texts) + 1, len(texts) + 1)
        return 0
    encode, encode_null = run.encoding()
    if run.pipeline.own_prompts() is not None:
        encode(texts)  # labels or short texts: an invalid one is found at once
    null = encode_null("").values()
    stored = [bank[0].to(run.cache_dtype) if bank.is_floating_point() else bank[0] for bank in null]
    files.require_space(run.prompts_place, missing * sum(row.nbytes for row in stored) + room)
    build_prompt_bank(
        run.prompts_place,
        texts,
        encode,
        encoder=run.encoder,
        encode_null=encode_null,
        dtype=run.cache_dtype,
        batch=run.config.cache.batch,
        progress=partial(report, "prompts"),
    )
    return missing


def _sample(run: Run, bank: PromptBank, index: Tensor, sizes: list[Size], report: Progress) -> None:
    """Makes the latents of these sizes."""
    make, made_by = _by_teacher(run, bank) if run.config.cache.images is None else _by_autoencoder(run)
    for size in sizes:
        generate_latent_cache(
            run.latents_place(size),
            make(size),
            index,
            run.pipeline.latent_shape(size),
            run.cache_dtype,
            {**run.sampling(size), **made_by, "prompts": bank.identity},
            rows_per_shard=run.config.cache.rows_per_shard,
            batch=run.config.cache.batch,
            progress=partial(report, _stage(size)),
        )


def _by_teacher(run: Run, bank: PromptBank) -> tuple[Callable[[Size], Generate], dict[str, Any]]:
    """The function that samples the teacher, and its part of the fingerprint."""
    settings = run.config.cache
    model = run.pipeline.model(dtype=run.teacher_dtype)
    # A trainer recognizes a model with the precision of this hash or a higher one.
    teacher = weights_hash(model, torch.float16 if run.teacher_dtype == torch.float16 else torch.bfloat16)
    model.to(run.config.device)

    def make(size: Size) -> Generate:
        prompts = run.pipeline.sized(bank, size)
        return lambda rows, prompt_index: run.pipeline.sample(
            model,
            prompts,
            prompt_index,
            rows,
            steps=settings.steps,
            **run.guidance(),
            seed=run.cache_seed,
            size=size,
            call=run.call,
        )

    return make, {"teacher": teacher, "dtype": dtype_name(run.teacher_dtype)}


def _by_autoencoder(run: Run) -> tuple[Callable[[Size], Generate], dict[str, Any]]:
    """The function that encodes the images of ``cache.images`` in float32, and its part of the fingerprint."""
    paths = [path for path, _ in run.pool.images]
    vae = run.pipeline.autoencoder(device=run.config.device)
    readers = ThreadPoolExecutor()

    def make(size: Size) -> Generate:
        load = partial(load_image, size=run.pipeline.size(size))

        def encode(rows: Tensor, _: Tensor) -> Tensor:
            images = torch.stack(list(readers.map(load, [paths[row] for row in rows.tolist()])))
            return run.pipeline.family.to_latents(vae, images, batch=run.config.cache.batch)

        return encode

    return make, {}


def _stage(size: Size) -> str:
    return "latents" if size is None else f"latents {size[0]}x{size[1]}"


def _missing(run: Run, sizes: tuple[Size, ...], samples: int, prompts: str | None, verify: bool) -> dict[Size, int]:
    """For each size, the number of latents that are missing or damaged."""
    return {
        size: _lacking(run.latents_place(size), run.stored_latents(size, prompts), samples, verify) for size in sizes
    }


def _lacking(place: Path, stored: Manifest | None, rows: int, verify: bool) -> int:
    """How many rows of a directory are missing or damaged."""
    if stored is None:
        return rows
    damaged = damaged_shards(place, stored) if verify else {}
    return rows - sum(stored.shard_rows(index) for index in stored.shards if index not in damaged)


def _row_bytes(run: Run, size: Size) -> int:
    """Bytes of a latent and of the number of its prompt."""
    return math.prod(run.pipeline.latent_shape(size)) * run.cache_dtype.itemsize + torch.int64.itemsize


def _free() -> None:
    """Free the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
