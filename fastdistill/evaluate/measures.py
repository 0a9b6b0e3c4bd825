# SPDX-License-Identifier: Apache-2.0
"""The figures of a comparison of student and teacher, with intervals if possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate.diversity import (
    LIMITS,
    bootstrap_all,
    class_separation,
    density_coverage,
    precision_recall,
    variance_ratio,
    vendi_score,
)
from fastdistill.evaluate.held_out import HeldOut
from fastdistill.evaluate.metrics import frechet_distance
from fastdistill.evaluate.samples import MODELS, Samples
from fastdistill.evaluate.scores import KID_SIZE, clip_scores, kid

_RESAMPLES = 200  # fewer for many images


class Measures:
    """``values``: by model and name, {value, interval: [low, high] or None}. ``left_out``: by name, the reason.

    Samples are I images for each of P prompts; sample n has prompt n mod P. Intervals (95 %) are from resampling the
    prompts: all images of a prompt, of teacher and student, are resampled together.

    Args:
        prompts: P. seed: of the resampling.
    """

    def __init__(self, samples: Samples, prompts: int, *, seed: int = 0) -> None:
        self.samples, self.prompts = samples, prompts
        self.values: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in MODELS}
        self.left_out: dict[str, str] = {}
        rows = len(samples.latents["teacher"])
        self.resamples = min(_RESAMPLES, max(20, 100_000 // rows))
        self._options: dict[str, Any] = {"n": self.resamples, "seed": seed}

    def distances(self) -> None:
        """From the teacher's sample with the same noise; for the teacher, from its sample with other noise."""
        for kind, distance in self.samples.distances.items():
            name = f"{kind}_distance"
            self._means("student", name, distance.each.view(-1, self.prompts).mean(0))
            if distance.unrelated is not None:
                self.values["teacher"][name] = {"value": distance.unrelated, "interval": None}

    def losses(self, losses: HeldOut) -> None:
        """The loss with index i is that of sample ``losses.latent[i]``."""
        for name, each in (("output_loss", losses.output), ("feature_loss", losses.feature)):
            if each is None:
                self.left_out[name] = "the features have other channels than the teacher's, or there are no taps"
                continue
            sums = torch.zeros(self.prompts, dtype=torch.float64)
            sums.index_add_(0, losses.latent % self.prompts, each)
            counts = torch.bincount(losses.latent % self.prompts, minlength=self.prompts)
            self._means("student", name, sums / counts)

    def diversity(self, extractor: str, reference: Tensor | None = None) -> None:
        """Precision, recall, density and coverage against the features ``reference`` [M, D] of real images, or else the
        teacher's; the Vendi score of both; with several images per prompt, their spread and separation."""
        by = self._by_prompt(extractor)
        for model in MODELS if reference is not None else ("student",):

            def near(rows: Tensor, model: str = model) -> list[float]:
                real = _of(by["teacher"], rows) if reference is None else reference
                fake = _of(by[model], rows)
                return [*precision_recall(real, fake), *density_coverage(real, fake)]

            self._each(model, tuple(LIMITS), near)

        def vendi(rows: Tensor) -> list[float]:
            return [vendi_score(_of(by[model], rows)) for model in MODELS]

        def ratio(rows: Tensor) -> list[float]:
            theirs, own = vendi(rows)
            return [own / theirs]

        for model, value in zip(MODELS, vendi(torch.arange(self.prompts)), strict=True):
            self.values[model]["vendi"] = {"value": value, "interval": None}
        self._each("student", ("vendi_ratio",), ratio)
        images = len(by["teacher"])
        if images == 1:
            self.left_out["variance_ratio"] = "there is one image of each prompt"
            return

        def spread(rows: Tensor) -> list[float]:
            labels = torch.arange(len(rows)).repeat(images)
            arguments = _of(by["student"], rows), labels, _of(by["teacher"], rows), labels
            return [variance_ratio(*arguments), class_separation(*arguments)]

        self._each("student", ("variance_ratio", "class_separation"), spread)

    def scores(self, extractor: str, names: Sequence[str], reference: Tensor | None = None) -> None:
        """FID and KID against the features of real images, or else the teacher's.

        Both are smooth functions of means over images, so the delete-half jackknife gives their spread. The FID has a
        bias of about c / N, which stays in its value. It is doubled in the halves, but the deviations from their mean
        do not contain it; so the interval is for this number of images. There is no interval for a KID of more images
        than are computed at once.
        """
        by = self._by_prompt(extractor)
        functions: dict[str, Callable[[Tensor, Tensor], float]] = {"fid": frechet_distance, "kid": kid}
        few = by["teacher"].shape[:2].numel() <= KID_SIZE
        for name in names:
            for model in MODELS if reference is not None else ("student",):

                def score(rows: Tensor, name: str = name, model: str = model) -> list[float]:
                    real = _of(by["teacher"], rows) if reference is None else reference
                    return [functions[name](real, _of(by[model], rows))]

                self._each(model, (name,), score, interval=few or name == "fid")

    def clip(self, extractor: str, texts: Tensor) -> None:
        """The CLIP score of each model; ``texts``: [P, D], embeddings of the prompts."""
        for model, features in self.samples.features[extractor].items():
            each = clip_scores(features, texts.cpu().repeat(len(features) // self.prompts, 1))
            self._means(model, "clip", each.view(-1, self.prompts).mean(0))

    def _by_prompt(self, extractor: str) -> Mapping[str, Tensor]:
        """[I, P, D]."""
        found = self.samples.features[extractor].items()
        return {model: features.view(-1, self.prompts, features.shape[1]) for model, features in found}

    def _means(self, model: str, name: str, each: Tensor) -> None:
        """The mean of one value per prompt [P]."""
        interval = None
        if len(each) > 1:
            found = bootstrap_all(lambda x: [float(x.mean())], each, **self._options)[0]
            interval = [found.low, found.high]
        self.values[model][name] = {"value": float(each.mean()), "interval": interval}

    def _each(
        self, model: str, names: Sequence[str], statistic: Callable[[Tensor], Sequence[float]], *, interval: bool = True
    ) -> None:
        """Values of rows of prompts; without an interval if half of the rows are too few, left out if all are too
        few."""
        rows = torch.arange(self.prompts)
        try:
            values = list(statistic(rows))
        except InputError as error:
            self.left_out |= dict.fromkeys(names, str(error))
            return
        ends: list[list[float] | None] = [None] * len(names)
        if interval:
            try:
                found = bootstrap_all(statistic, rows, replace=False, **self._options)
                within = [
                    each.within(0, LIMITS[n]) if n in LIMITS else each for n, each in zip(names, found, strict=True)
                ]
                ends = [[each.low, each.high] for each in within]
            except InputError:
                pass
        for name, value, end in zip(names, values, ends, strict=True):
            self.values[model][name] = {"value": value, "interval": end}


def _of(features: Tensor, rows: Tensor) -> Tensor:
    """The features of these prompts, [I * n, D]."""
    return features[:, rows].flatten(0, 1)
