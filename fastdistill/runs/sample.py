# SPDX-License-Identifier: Apache-2.0
"""Images of a run's student (``fastdistill sample``)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastdistill.errors import FastdistillError, InputError, StorageError
from fastdistill.files import atomic_directory, located
from fastdistill.runs.config import RunConfig
from fastdistill.runs.models import require_checkpoint, trained_student
from fastdistill.runs.opened import opened


def sample(
    config: RunConfig,
    prompts: Sequence[str],
    to: str | Path,
    *,
    teacher: bool = False,
    step: int | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: tuple[int, int] | None = None,
    allow_code: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> list[Path]:
    """Write an image of each prompt for each seed to the new folder ``to``, with ``metadata.jsonl`` (file_name, text,
    seed), in the format of Hugging Face's image folders.

    An image depends only on its prompt and seed, so the same call with ``teacher`` gives images to compare.

    Args:
        prompts: texts, encoded by the pipeline of the teacher.
        teacher: sample the teacher instead of the student. step: of the student's checkpoint; None: the newest.
        seeds: of the initial noise. steps, guidance_scale: None: those of the cache (guidance 1 for a student that was
            distilled with guidance and does not read the scale). size: height and width; None: first of
            ``cache.sizes``.
        progress: called with (images done, total).

    Returns:
        The files; those of a prompt are consecutive.

    Raises:
        InputError: no prompts, no seeds or a value outside of its range.
        StorageError: ``to`` exists or cannot be written; no checkpoint.
        FastdistillError: an image that is not finite; nothing is written.
    """
    to = located(to, "to")
    texts, own = list(prompts), list(dict.fromkeys(int(seed) for seed in seeds))
    steps = config.cache.steps if steps is None else steps
    for name, given in (("prompts", texts), ("seeds", own)):
        if not given:
            raise InputError.of(name, "at least one", "none")
    if steps < 1:
        raise InputError.of("steps", "at least 1", steps)
    if wrong := [seed for seed in own if not 0 <= seed < 2**63]:
        raise InputError.of("seeds", "numbers in [0, 2**63)", wrong[0])
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise InputError.of("guidance_scale", "a finite number", guidance_scale)
    if to.exists():
        raise StorageError(f"{to}: expected a new folder, got one that is there already")
    run = opened(config, allow_code=allow_code)
    if size is not None:
        run.pipeline.latent_shape(size)
    guidance = run.guidance(guidance_scale)
    run.pipeline.check_steps(run.pipeline.model(device="meta"), steps, guidance.get("guidance"))
    if not teacher and guidance_scale is None:
        guidance = dict(run.student_guidance(guidance))
    if not teacher:
        require_checkpoint(run, step)
    device, size = run.config.device, run.sizes[0] if size is None else size
    encoders, scale = run.pipeline.encoders(device=device), guidance.get("guidance_scale")
    bank = run.pipeline.encode(texts, encoders, size=size, guidance_scale=scale)
    model = run.pipeline.model(device=device, dtype=run.teacher_dtype) if teacher else trained_student(run, step=step)
    vae = run.pipeline.autoencoder(device=device)
    total = len(texts) * len(own)
    report = progress or (lambda done, total: None)
    report(0, total)
    with atomic_directory(to) as folder:
        lines = []
        for seed in own:
            for part in torch.split(torch.arange(len(texts)), config.evaluate.batch):
                latents = run.pipeline.sample(
                    model,
                    bank,
                    part,
                    torch.zeros_like(part),  # the first noise of the seed, independent of the other prompts
                    steps=steps,
                    **guidance,
                    seed=seed,
                    size=size,
                    call=run.call,
                )
                for row, image in zip(part.tolist(), run.pipeline.family.decode(vae, latents), strict=True):
                    if not image.isfinite().all():
                        got = f"NaN or infinity for {texts[row]!r} with seed {seed}"
                        why = "guidance that is too large, or a dtype that the model or the VAE does not bear"
                        raise FastdistillError(f"sample: expected finite images, got {got} ({why})")
                    name = f"{row:05d}-{seed}.png"
                    (folder / name).write_bytes(as_png(image))
                    lines.append((row, own.index(seed), {"file_name": name, "text": texts[row], "seed": seed}))
                    report(len(lines), total)
        lines.sort(key=lambda line: line[:2])
        told = "".join(json.dumps(line[2], ensure_ascii=False) + "\n" for line in lines)
        (folder / "metadata.jsonl").write_text(told, encoding="utf-8")
    return [to / line[2]["file_name"] for line in lines]


def as_png(image: Tensor) -> bytes:
    """The PNG file of an image [3, H, W] in [0, 1]."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()
