# SPDX-License-Identifier: Apache-2.0
"""Measures of canonical latents, and the controls that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdistill.errors import InputError, described
from fastdistill.evaluate.clusters import kmeans, nmi, pooled
from fastdistill.evaluate.jackknife import left_out, numbers
from fastdistill.evaluate.spread import moments
from fastdistill.ops import _check
from fastdistill.ops.philox import CONTROL, normal

Measure = Callable[[Tensor], Tensor]
_NOISE, _DIRECTIONS = 0, 1  # steps of the random stream CONTROL
_GROUPS = 10  # maximum number of groups for an interval
_PERMUTED = 50  # random labelings, for the agreement by chance


@dataclass(frozen=True)
class Measures:
    """How samples [n, ...] are measured.

    irrelevant: what canonical samples should lose, [n, ...]. relevant: what they should keep, [n, ...]; None: whether
    the judge gives a sample the same class as its image. judge: samples -> the class [n] int64.
    """

    irrelevant: Measure
    relevant: Measure | None = None
    judge: Measure | None = None

    def __post_init__(self) -> None:
        if self.relevant is None and self.judge is None:
            raise InputError.of("relevant", "what canonical samples should keep, or a judge in its place", None)

    @classmethod
    def of_classifier(cls, classifier: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Measures:
        """For a task without its own measures. ``classifier``: an independent classifier, samples -> (features,
        logits). The irrelevant variance is that of its features within a class; relevant is that it agrees on a sample
        and its image."""
        return cls(
            irrelevant=lambda samples: classifier(samples)[0], judge=lambda samples: classifier(samples)[1].argmax(1)
        )


@dataclass(frozen=True)
class Agreement:
    """NMI of clusters of features with the classes, each [1 + groups]: with flat features; with pooled features; with
    flat features and the classes of shuffled prompts; and with the classes in random order."""

    flat: Tensor
    pooled: Tensor
    shuffled: float
    chance: float


class Subject:
    """Images [N, *S] with their classes [N], and measures of samples that were made from them.

    Figures are [1 + groups]: first over all samples, then without each group in turn (``jackknife``).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        measures: Measures | None,
        decode: Measure | None,
        *,
        seed: int,
        starts: int,
    ) -> None:
        _check.valued(images=images, labels=labels)
        if images.ndim < 2 or not images.dtype.is_floating_point:
            raise InputError.of("images", "floating point [N, ...]", f"{images.dtype} {tuple(images.shape)}")
        _check.require(bool(images.isfinite().all()), "images", "finite values", "NaN or infinity")
        _check.dtype(labels, "labels", torch.int64)
        _check.shape(labels, "labels", (len(images),), f"classes [{len(images)}], one per image")
        self.classes, counts = torch.unique(labels, return_counts=True)
        _check.require(len(counts) > 1, "labels", "at least two classes", len(counts))
        fewest = int(counts.argmin())
        got = f"{int(counts[fewest])} of class {int(self.classes[fewest])}"
        _check.require(int(counts[fewest]) > 2, "labels", "at least three images of each class", got)
        if measures is not None and not isinstance(measures, Measures):
            raise InputError.of("measures", "Measures or None", described(measures))
        _check.whole(starts, "starts", "at least 1")
        self.images, self.labels, self.measures, self._decode = images, labels, measures, decode
        self.seed, self._starts = _check.seed(seed), starts
        self.others = others(labels)
        self._kept = left_out(labels, _GROUPS)
        self.judged = None if measures is None or measures.judge is None else self._judged(self._decoded(images))
        self.measured(images)  # so that invalid measures raise an error now

    def measured(self, samples: Tensor) -> dict[str, Tensor]:
        """``irrelevant`` and ``relevant``: traces of the covariances within classes, averaged over classes (or the
        fraction of agreement). ``right``: the fraction in which the judge sees the class."""
        if self.measures is None:
            return {}
        shown, found = self._decoded(samples), {}
        for name in ("irrelevant", "relevant"):
            measure: Measure | None = getattr(self.measures, name)
            if measure is not None:
                values = measure(shown)
                fits = isinstance(values, Tensor) and len(values) == len(shown) and bool(values.isfinite().all())
                _check.require(fits, f"measures.{name}", f"finite values [{len(shown)}, ...]", described(values))
                found[name] = self._within(values.to(self.labels.device))
        if self.judged is not None:
            seen = self._judged(shown)
            found["right"] = self._share(seen == self.labels)
            found.setdefault("relevant", self._share(seen == self.judged))
        return found

    def seen(self, samples: Tensor) -> dict[str, float] | None:
        """For samples decoded with the prompt of another class: the fractions in which the judge sees the class of the
        latent and that of the prompt; None without a judge."""
        if self.judged is None:
            return None
        found = self._judged(self._decoded(samples))
        return {
            "latent": float((found == self.labels).double().mean()),
            "prompt": float((found == self.others).double().mean()),
        }

    def agreement(self, features: Tensor) -> Agreement:
        """The agreement for features [N, *F] of the tap."""

        def clusters(values: Tensor) -> Tensor:
            return kmeans(values, len(self.classes), starts=self._starts, seed=self.seed, kept=self._kept)[0]

        flat = clusters(features)
        found = nmi(flat, self.labels)
        mean = nmi(clusters(pooled(features)), self.labels) if features.ndim > 2 else found
        random = torch.Generator().manual_seed(0)
        order = torch.stack([torch.randperm(len(flat[0]), generator=random) for _ in range(_PERMUTED)])
        chance = nmi(self.labels[order.to(self.labels.device)], flat[0]).mean()
        return Agreement(found, mean, float(nmi(flat[:1], self.others)), float(chance))

    def noise(self, latents: Tensor) -> Tensor:
        """Noise with the size of each of the latents [N, *S]."""
        drawn = _drawn(latents, self.seed, _NOISE)
        return drawn * latents.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (latents.ndim - 1))

    def _decoded(self, samples: Tensor) -> Tensor:
        return self._decode(samples) if self._decode is not None else samples

    def _judged(self, shown: Tensor) -> Tensor:
        assert self.measures is not None and self.measures.judge is not None
        found = self.measures.judge(shown)
        fits = isinstance(found, Tensor) and found.shape == (len(shown),)
        _check.require(fits, "measures.judge", f"classes [{len(shown)}]", described(found))
        return found.to(self.labels.device)

    def _within(self, values: Tensor) -> Tensor:
        kept, flat = self._kept.double(), values.double().flatten(1)
        each = [moments(kept[:, own], flat[own])[1] for own in (self.labels == c for c in self.classes)]
        return torch.stack(each).mean(0)

    def _share(self, which: Tensor) -> Tensor:
        kept = self._kept.double()
        return kept @ which.double() / kept.sum(1)


def random_directions(latents: Tensor, energy: Tensor, seed: int) -> Tensor:
    """[B, n, 1]: directions with the effect of a random subspace that takes the energy [B] of each latent [B, *S].

    The projection of x onto a random subspace of any dimension has an angle to x that follows from its energy e, and a
    uniform direction r around x. So the single direction sqrt(e) x / ||x|| + sqrt(1 - e) r has the same effect.
    """
    along = torch.nn.functional.normalize(latents.flatten(1).double(), dim=1)
    r = _drawn(latents, seed, _DIRECTIONS).flatten(1).double()
    r = torch.nn.functional.normalize(r - along * (along * r).sum(1, keepdim=True), dim=1)
    share = energy.double()[:, None].clamp(0, 1)
    return (share.sqrt() * along + (1 - share).sqrt() * r).to(latents.dtype)[:, :, None]


def others(labels: Tensor) -> Tensor:
    """Another class for each label [N]; the images of a class get the other classes in turn."""
    classes, place = torch.unique(labels, return_inverse=True)
    turn = 1 + numbers(labels) % (len(classes) - 1)
    found: Tensor = classes[(place + turn) % len(classes)]
    return found


def _drawn(latents: Tensor, seed: int, step: int) -> Tensor:
    """Normal numbers by counter from (seed, row)."""
    key, number = torch.tensor([_check.seed(seed), step], dtype=torch.int64, device=latents.device)
    rows = torch.arange(len(latents), device=latents.device)
    return normal(key, number, rows, latents.shape[1:], stream=CONTROL).to(latents.dtype)
