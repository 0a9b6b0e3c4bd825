# SPDX-License-Identifier: Apache-2.0
"""Samples of a teacher and its student for the same prompts and noise, by batch: distances, features, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate.features import Extractor

#: (rows of prompts [b], numbers of noises [b]) -> latents [b, *S].
Make = Callable[[Tensor, Tensor], Tensor]

MODELS = ("teacher", "student")


class Distance(NamedTuple):
    """Root mean square differences of student and teacher.

    each: [N] float64. unrelated: mean difference between the teacher's own samples for other prompts and noise; None: a
    batch has only one sample.
    """

    each: Tensor
    unrelated: float | None


@dataclass(frozen=True)
class Samples:
    """The results for N samples, on the CPU.

    latents: [N, *S] of each model, float32. distances: of ``latents`` and of ``images`` (values in [0, 1]).
    features: by extractor and model, [N, D]. shown: by model, the images to show [n, 3, H, W].
    images_per_second: by model, after a warm-up; without the VAE, which both share.
    """

    latents: Mapping[str, Tensor]
    distances: Mapping[str, Distance]
    features: Mapping[str, Mapping[str, Tensor]]
    shown: Mapping[str, Tensor]
    images_per_second: Mapping[str, float]


@torch.no_grad()
def compared(
    teacher: Make,
    student: Make,
    decode: Callable[[Tensor], Tensor],
    prompts: Tensor,
    *,
    batch: int,
    extractors: Mapping[str, Extractor],
    shown: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Samples:
    """Sample n of both models has the prompt prompts[n] and noise n; so it does not depend on ``batch``.

    The first batch is sampled twice: once to warm up, once to measure. Teacher and student take turns.

    Args:
        teacher, student: in eval mode. decode: latents -> images [b, 3, H, W] in [0, 1].
        prompts: [N] int64. shown: the number of images to keep, from the first.
        progress: called with (samples done by both models, 2 N).

    Raises:
        InputError: latents of the student with another shape, or that are not finite.
    """
    makes = dict(zip(MODELS, (teacher, student), strict=True))
    found = _Found()
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        noise = torch.arange(first, first + len(part))
        latents = {}
        for place, (name, make) in enumerate(makes.items()):
            if first == 0:
                _waited(make(part, noise))
            start = time.perf_counter()
            latents[name] = _waited(make(part, noise).float())
            found.seconds[name] += time.perf_counter() - start
            if not latents[name].isfinite().all():
                raise InputError.of(name, "finite latents", f"NaN or infinity of prompt {int(part[0])} or one after it")
            if progress is not None:
                progress(2 * first + (place + 1) * len(part), 2 * len(prompts))
        if latents["student"].shape != latents["teacher"].shape:
            shapes = [tuple(latents[name].shape) for name in MODELS]
            raise InputError.of("student", f"latents {shapes[0]}, as the teacher's", shapes[1])
        images = {name: decode(latents[name]).float() for name in MODELS}
        found.add(latents, images, extractors, max(0, shown - first))
    speed = {name: len(prompts) / seconds for name, seconds in found.seconds.items()}
    return Samples(*found.whole(), images_per_second=speed)


class _Found:
    """Results that grow by one batch at a time."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(MODELS, 0.0)
        self.latents, self.shown = (_lists() for _ in range(2))
        self.distances: dict[str, list[Tensor]] = {"latents": [], "images": []}
        self.unrelated: dict[str, list[Tensor]] = {"latents": [], "images": []}
        self.features: dict[str, dict[str, list[Tensor]]] = {}

    def add(
        self, latents: dict[str, Tensor], images: dict[str, Tensor], extractors: Mapping[str, Extractor], shown: int
    ) -> None:
        for kind, values in (("latents", latents), ("images", images)):
            self.distances[kind].append(rms(values["student"], values["teacher"]))
            if len(values["teacher"]) > 1:
                self.unrelated[kind].append(rms(values["teacher"], values["teacher"].roll(1, 0)))
        for name in MODELS:
            self.latents[name].append(latents[name].cpu())
            self.shown[name].append(images[name][:shown].cpu())
            for extractor, function in extractors.items():
                self.features.setdefault(extractor, _lists())[name].append(function(images[name]).float().cpu())

    def whole(self) -> tuple[dict[str, Tensor], dict[str, Distance], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        distances = {
            kind: Distance(torch.cat(each), float(torch.cat(other).mean()) if (other := self.unrelated[kind]) else None)
            for kind, each in self.distances.items()
        }
        features = {name: _joined(lists) for name, lists in self.features.items()}
        return _joined(self.latents), distances, features, _joined(self.shown)


def rms(one: Tensor, two: Tensor) -> Tensor:
    """[B] float64 on the CPU: root of the mean square of the differences."""
    return (one - two).square().flatten(1).mean(1, dtype=torch.float64).sqrt().cpu()


def _lists() -> dict[str, list[Tensor]]:
    return {name: [] for name in MODELS}


def _joined(lists: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(parts) for name, parts in lists.items()}


def _waited(tensor: Tensor) -> Tensor:
    """Returns the tensor after its computation has finished."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return tensor
