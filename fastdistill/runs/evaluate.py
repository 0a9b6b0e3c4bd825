# SPDX-License-Identifier: Apache-2.0
"""Compares the student of a run with its teacher, on the same prompts and noise (``fastdistill evaluate``)."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

import fastdistill
from fastdistill.data.images import image_files, load_image
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill import GuidanceDistillation
from fastdistill.distill.objective import Setting
from fastdistill.errors import InputError, described, named
from fastdistill.evaluate._optional import require
from fastdistill.evaluate.comparison import pixels, write_comparison
from fastdistill.evaluate.features import Extractor, FolderFeatures, inception_features, pixel_features
from fastdistill.evaluate.figures import losses_over_time, png, sample_grid
from fastdistill.evaluate.held_out import HeldOut, held_out_losses
from fastdistill.evaluate.measures import Measures
from fastdistill.evaluate.samples import MODELS, Samples, compared
from fastdistill.files import atomic_write, located, make_directory
from fastdistill.models import Adapters, Student
from fastdistill.models.calling import kept_in_float32
from fastdistill.runs.config import RunConfig
from fastdistill.runs.models import adapters_in, checkpoint_of, student_in
from fastdistill.runs.opened import Run, Size, opened
from fastdistill.runs.pool import prompts_in
from fastdistill.train.config import run_yaml

FOLDER = "evaluation"  # in the directory of the run
_SHOWN = 12


class _Prompts(NamedTuple):
    """texts: P texts. bank: their encodings for the first size. seen: whether the student was trained on their
    latents."""

    texts: list[str]
    bank: PromptBank
    seen: list[bool]


class _OfSize(NamedTuple):
    """The results for images of one size, named ``pixels``."""

    pixels: str
    samples: Samples
    losses: HeldOut
    measures: Measures


def evaluate(
    config: RunConfig,
    *,
    student: Any = None,
    step: int | None = None,
    features: Extractor | None = None,
    allow_code: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Compare the averaged student of a run with its teacher, with the settings ``config.evaluate``. Both compute in
    the teacher's dtype. If there are several image sizes, each is compared separately.

    Writes ``evaluation/`` in the run's directory: ``report.html``, ``report.json``, ``samples.png`` (with several sizes
    ``samples-HEIGHTxWIDTH.png``) and ``run.yaml``, to repeat the comparison.

    Args:
        student: a model, or a ``Student``, to compare instead of the run's student; it is not changed.
        step: step of the student's checkpoint; None: the newest.
        features: images [b, 3, H, W] in [0, 1] -> features [b, D]; used for all figures that need features, instead of
            those that ``config.evaluate`` names.
        progress: called with (samples made by both models, total), over all sizes.

    Returns:
        The report, as in ``report.json`` (``fastdistill.evaluate.comparison.write_comparison``).

    Raises:
        InputError: a value outside of its range, or a student that does not fit.
        StorageError: a folder, a file of weights or a checkpoint that is missing or damaged, before anything is
            sampled. FastdistillError: a missing package.
    """
    start = time.perf_counter()
    run = opened(config, allow_code=allow_code)
    settings, device = run.config.evaluate, run.config.device
    extractors = _extractors(run, features)
    with named("evaluate.reference"):
        real = settings.reference
        reference = [] if real is None else image_files(located(real, "evaluate.reference"))
    prompts = _prompts(run)
    own = _student(run, student, step)
    make_directory(run.directory / FOLDER)
    models = run.pipeline.model(device=device, dtype=run.teacher_dtype), own.model
    vae = run.pipeline.autoencoder(device=device, dtype=run.teacher_dtype)
    steps = run.config.cache.steps if settings.steps is None else settings.steps
    guidance = run.guidance(settings.guidance_scale)
    options: dict[str, Any] = {"steps": steps, "seed": settings.seed}
    rows = torch.arange(len(prompts.texts)).repeat(settings.images_per_prompt)
    seconds = dict.fromkeys(("samples", "held_out_losses", "measures"), 0.0)
    found: list[_OfSize] = []

    def lap(part: str) -> None:
        seconds[part] += time.perf_counter() - start - sum(seconds.values())

    for place, size in enumerate(run.sizes):
        bank = run.pipeline.sized(prompts.bank, size)

        def made(
            model: Any, guidance: Mapping[str, Any], size: Size = size, bank: PromptBank = bank
        ) -> Callable[[Tensor, Tensor], Tensor]:
            own = {**options, **guidance, "size": size}
            return lambda rows, noise: run.pipeline.sample(model, bank, rows, noise, call=run.call, **own)

        def told(done: int, total: int, place: int = place) -> None:
            if progress is not None:
                progress(place * total + done, len(run.sizes) * total)

        samples = compared(
            made(models[0], guidance), made(models[1], run.student_guidance(guidance)),
            lambda latents: run.pipeline.family.decode(vae, latents), rows,
            batch=settings.batch, extractors=extractors, shown=min(_SHOWN, len(prompts.texts)), progress=told,
        )  # fmt: skip
        lap("samples")
        losses = _losses(run, size, models[0], own, samples, rows, bank)
        lap("held_out_losses")
        measures = _measures(run, size, extractors, samples, losses, prompts, reference)
        lap("measures")
        found.append(_OfSize(pixels(run.pipeline.size(size)), samples, losses, measures))
    seconds["total"] = time.perf_counter() - start
    report = _report(run, models, found, prompts, options | guidance, seconds, _named(run, features))
    _write(run.directory / FOLDER, config, report, found, prompts.texts)
    return report


def _extractors(run: Run, features: Extractor | None) -> dict[str, Extractor]:
    """Feature extractors by their purpose: ``features``, ``inception`` and ``clip``, as the settings require."""
    settings, device = run.config.evaluate, run.config.device
    if features is not None and not callable(features):
        raise InputError.of("features", "a function of images", described(features))
    found: dict[str, Extractor] = {}
    if features is not None:
        found["features"] = features
    elif settings.features is None:
        found["features"] = pixel_features
    else:
        with named("evaluate.features"):
            found["features"] = FolderFeatures(located(settings.features, "evaluate.features"), device)
    if "kid" in settings.metrics:
        require("torchmetrics", "metrics")
    if {"fid", "kid"} & set(settings.metrics):
        with named("evaluate.inception"):
            own = None if settings.inception is None else located(settings.inception, "evaluate.inception")
            found["inception"] = features or inception_features(own, device)
    if "clip" in settings.metrics:
        if settings.clip is None:
            raise InputError.of("evaluate.clip", "the folder of a CLIP model, for the CLIP score", "none")
        with named("evaluate.clip"):
            clip = FolderFeatures(located(settings.clip, "evaluate.clip"), device)
        clip.texts(["a"])
        found["clip"] = clip
    return found


def _named(run: Run, features: Extractor | None) -> str:
    if features is not None:
        return getattr(features, "__name__", type(features).__name__)
    return run.config.evaluate.features or "colors of 8 x 8 areas"


def _prompts(run: Run) -> _Prompts:
    """The last prompts of the pool, or those of a file, encoded by the run's text encoders."""
    wanted = run.config.evaluate.prompts
    if isinstance(wanted, str):
        texts = prompts_in(run.config, wanted, "evaluate.prompts").texts
        trained = set(run.pool.texts[: run.pool.seen]) if run.config.prompts.file is not None else set()
        return _Prompts(texts, _encoded(run, texts), [text in trained for text in texts])
    first = max(0, len(run.pool.texts) - wanted)
    texts = run.pool.texts[first:]
    seen = [row < run.pool.seen for row in range(first, len(run.pool.texts))]
    cache = run.config.cache
    same = run.guidance(run.config.evaluate.guidance_scale) == run.guidance()  # some families encode the guidance scale
    stored = cache.encodings == "stored" and same
    if not stored or not (run.prompts_place / "manifest.json").exists():
        return _Prompts(texts, _encoded(run, texts), seen)
    bank = run.bank()
    at = torch.arange(first, bank.null_index + 1)
    banks = {name: rows[at] for name, rows in bank.banks.items()}
    return _Prompts(texts, PromptBank(banks, texts, bank.null_text, bank.encoder), seen)


def _encoded(run: Run, texts: list[str]) -> PromptBank:
    encoders = run.pipeline.encoders(device=run.config.device, dtype=run.teacher_dtype)
    scale = run.guidance(run.config.evaluate.guidance_scale).get("guidance_scale")
    return run.pipeline.encode(texts, encoders, size=run.sizes[0], guidance_scale=scale)


class _Compared(NamedTuple):
    """The student in eval mode and the teacher's dtype, its taps, and the adapters of their features."""

    model: nn.Module
    taps: list[tuple[str, str]]
    adapters: Adapters | None = None


def _student(run: Run, student: Any, step: int | None) -> _Compared:
    if student is None:
        path, saved, _ = checkpoint_of(run, step)
        model = _cast(student_in(run, path, saved, averaged=True), run.teacher_dtype)
        planned = run.student(run.pipeline.model(device="meta"))
        if not run.config.objective.weights.feature:
            return _Compared(model, _taps(planned) if not planned.needs_adapters else [])
        adapters = adapters_in(run, path, saved, planned.channels) if planned.needs_adapters else None
        return _Compared(model, _taps(planned), adapters)
    taps = _taps(student) if isinstance(student, Student) else []
    model = student.model if isinstance(student, Student) else student
    if not isinstance(model, nn.Module):
        raise InputError.of("student", "a model, or a Student", described(model))
    model = copy.deepcopy(model).to(run.config.device).eval().requires_grad_(False)
    return _Compared(_cast(model, run.teacher_dtype), taps)


def _taps(student: Student) -> list[tuple[str, str]]:
    return list(zip(student.teacher_taps, student.student_taps, strict=True))


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in this dtype, except for the weights that diffusers keeps in float32."""
    kept = kept_in_float32(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.to(dtype)
    return model


def _losses(
    run: Run, size: Size, teacher: Any, student: _Compared, samples: Samples, rows: Tensor, bank: PromptBank
) -> HeldOut:
    """The losses on the teacher's samples of this comparison."""
    device = torch.device(run.config.device)
    setting = Setting(
        teacher,
        student.model,
        run.pipeline.schedule(size),
        samples.latents["teacher"].to(device),
        rows.to(device),
        bank.to(device).rows,
        min(run.config.evaluate.batch, len(rows)),
        run.pipeline.prediction_type,
        call=run.call,
    )
    settings, guided = run.config.objective.guidance, None
    if settings.schedule is not None:
        setting, guiding = GuidanceDistillation(**dataclasses.asdict(settings)).guiding(setting)
        asked = run.guidance(run.config.evaluate.guidance_scale)
        guided = guiding, 1.0 if settings.scale is None else float(asked["guidance_scale"]) - 1
    seed = run.config.evaluate.seed
    return held_out_losses(setting, student.taps, seed=seed, adapters=student.adapters, guided=guided)


def _measures(
    run: Run,
    size: Size,
    extractors: Mapping[str, Extractor],
    samples: Samples,
    losses: HeldOut,
    prompts: _Prompts,
    reference: list[Path],
) -> Measures:
    settings = run.config.evaluate
    measures = Measures(samples, len(prompts.texts), seed=settings.seed)
    measures.distances()
    measures.losses(losses)
    real: dict[str, Tensor] = {}
    if reference:
        real = _features(reference, run.pipeline.size(size), settings.batch, extractors)
    measures.diversity("features", real.get("features"))
    if names := [name for name in settings.metrics if name != "clip"]:
        measures.scores("inception", names, real.get("inception"))
    clip = extractors.get("clip")
    if isinstance(clip, FolderFeatures):
        measures.clip("clip", clip.texts(prompts.texts))
    return measures


@torch.no_grad()
def _features(
    files: list[Path], size: tuple[int, int], batch: int, extractors: Mapping[str, Extractor]
) -> dict[str, Tensor]:
    """The features of real images, by extractor."""
    found: dict[str, list[Tensor]] = {name: [] for name in extractors if name != "clip"}
    for first in range(0, len(files), batch):
        images = torch.stack([load_image(file, size, enlarge=True) for file in files[first : first + batch]])
        for name, parts in found.items():
            parts.append(extractors[name](images).float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _report(
    run: Run,
    models: tuple[Any, Any],
    found: Sequence[_OfSize],
    prompts: _Prompts,
    options: Mapping[str, Any],
    seconds: Mapping[str, float],
    features: str,
) -> dict[str, Any]:
    settings, first = run.config.evaluate, found[0]
    each = first.samples.distances["images"].each.view(-1, len(prompts.texts)).mean(0).tolist()
    parameters = {
        name: {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        for name, model in zip(MODELS, models, strict=True)
    }
    told: dict[str, Any] = {
        "prompts": len(prompts.texts),
        "seen_prompts": sum(prompts.seen),
        "images_per_prompt": settings.images_per_prompt,
        "pixels": ", ".join(each.pixels for each in found),
        "dtype": str(run.teacher_dtype).removeprefix("torch."),
        "resamples": first.measures.resamples,
    }
    device = run.config.device
    return {
        "title": f"Student and teacher of {run.directory.name}",
        **{name: parameters[name] | own for name, own in _values(first).items()},
        "left_out": first.measures.left_out,
        "sizes": {each.pixels: _values(each) | {"left_out": each.measures.left_out} for each in found[1:]},
        "sampling": {**told, **options},
        "features": features,
        "reference": "the teacher's images" if settings.reference is None else settings.reference,
        "prompts": [
            {"text": text, "seen": seen, "images_distance": distance}
            for text, seen, distance in zip(prompts.texts, prompts.seen, each, strict=True)
        ],
        "seconds": dict(seconds),
        "versions": {
            "fastdistill": fastdistill.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if "cuda" in device else f"{platform.machine()} CPU",
        "date": datetime.date.today().isoformat(),
        "reproduce": [f"fastdistill evaluate {run.directory / FOLDER / 'run.yaml'}"],
    }


def _values(found: _OfSize) -> dict[str, dict[str, Any]]:
    """The figures of each model."""
    speed, values = found.samples.images_per_second, found.measures.values
    return {name: {"images_per_second": speed[name], "measures": values[name]} for name in MODELS}


def _write(
    folder: Path, config: RunConfig, report: Mapping[str, Any], found: Sequence[_OfSize], texts: list[str]
) -> None:
    figures = {}
    for each in found:
        own = f" {each.pixels}" if len(found) > 1 else ""
        losses = each.losses
        terms = {"output": losses.output} | ({} if losses.feature is None else {"feature": losses.feature})
        shown = each.samples.shown
        figures[f"samples{own}"] = sample_grid(shown, texts[: len(shown["teacher"])])
        lines = {name: term.tolist() for name, term in terms.items()}
        figures[f"losses{own}"] = losses_over_time(losses.timestep.tolist(), lines)
    for name, figure in figures.items():
        if name.startswith("samples"):
            file = name.replace(" x ", "x").replace(" ", "-")
            atomic_write(folder / f"{file}.png", png(figure, transparent=False))
    atomic_write(folder / "run.yaml", run_yaml(config).encode())
    write_comparison(folder, report, figures)
