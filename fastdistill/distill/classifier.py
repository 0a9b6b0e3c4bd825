# SPDX-License-Identifier: Apache-2.0
"""Classifiers as students: their data, how they are called, and augmentation by counter."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdistill.data.fingerprint import differences, listed, plain, sha256_of_tensors
from fastdistill.data.staged import Rows
from fastdistill.data.values import blocks, require_bank
from fastdistill.distill.canonical_set import CanonicalSet
from fastdistill.errors import FastdistillError, InputError, described, quoted
from fastdistill.models.calling import compute_dtype, trial
from fastdistill.models.taps import Taps
from fastdistill.ops import _check, philox


@dataclass(frozen=True)
class ClassifierSetting:
    """The models and data of an objective for classifiers. The student is on its device; data and set may be elsewhere.

    student: returns logits [B, classes], or (feature, logits); see ``ClassifierCall``. images: [N, *S], a tensor or
    ``StoredRows``. labels: [N] int64 on the device. canonical: None for objectives without one; its ``rows`` are row
    numbers of ``images``, unless ``canonical_labels`` [n] int64 are given. posterior: [n, classes] float32, the
    teacher's posterior for the originals of the set. feature: the module whose output is the feature. batch: images per
    step.
    canonical_batch: rows of the set per step (None: ``batch``, or the whole set if that is smaller). expect: required
    values of the set's fingerprint, see ``CanonicalSet.load``. ahead, micro_batch, first_sample, global_batch: as in
    ``Setting``; every process has the whole canonical batch, so losses that compare its rows do not depend on the
    number of processes.
    """

    student: nn.Module
    images: Rows
    labels: Tensor
    canonical: CanonicalSet | None = None
    batch: int = 64
    canonical_batch: int | None = None
    canonical_labels: Tensor | None = None
    posterior: Tensor | None = None
    feature: str | None = None
    expect: Mapping[str, Any] = field(default_factory=dict)
    ahead: int = 3
    micro_batch: int | None = None
    first_sample: int = 0
    global_batch: int | None = None

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @cached_property
    def call(self) -> ClassifierCall:
        """How the student is called; its hooks exist from the first use until ``close``."""
        return ClassifierCall(self.student, self.feature)

    def check_data(self) -> None:
        """Raises InputError if images and labels do not fit together."""
        require_bank(self.images, "images")
        _check.require(self.images.dtype in _check.FLOATS, "images", "float32, bfloat16 or float16", self.images.dtype)
        _check.valued(labels=self.labels)
        _check.dtype(self.labels, "labels", torch.int64)
        _check.shape(self.labels, "labels", (len(self.images),), f"a class of each of the {len(self.images)} images")
        _check.require(len(self.labels) > 0, "images", "one image or more", 0)
        _check.require(int(self.labels.min()) >= 0, "labels", "classes from 0 on", int(self.labels.min()))
        _check.whole(self.batch, "batch", "a whole number from 1")

    def check_student(self, wanted: bool) -> tuple[int, int]:
        """The size of the feature (0 without one) and the number of classes, from one forward without side effects.

        Args:
            wanted: whether a feature is needed.

        Raises:
            InputError: the student cannot process the images, returns no feature, or has fewer classes than labels.
        """
        x = self.images[:1].to(self.device)
        try:
            with trial(self.student):
                z, logits = self.call(x)
        except (FastdistillError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            rule = f"a classifier of {x.dtype} images {tuple(x.shape)}"
            raise InputError.of("student", rule, quoted(error)) from error
        if logits.ndim != 2 or len(logits) != 1:
            raise InputError.of("student", "logits [B, classes]", tuple(logits.shape))
        if wanted and z is None:
            rule = "a feature beside the logits: (feature, logits), or feature= the name of a module"
            raise InputError.of("student", rule, f"{type(self.student).__name__}, which gives logits alone")
        classes, last = logits.shape[1], int(self.labels.max())
        _check.require(last < classes, "labels", f"classes below the {classes} of the student", last)
        return 0 if z is None else z.shape[1], classes

    def check_canonical(self, classes: int) -> tuple[Tensor, int]:
        """The class of each row of the set, [n] int64 on the device, and the number of rows per step.

        Raises:
            InputError: no set, or one of another model, other data or other images; classes without a row.
        """
        found = self.canonical
        if not isinstance(found, CanonicalSet):
            rule = "a CanonicalSet (extract_canonical) for losses on canonical samples"
            raise InputError.of("canonical", rule, described(found))
        wanted = plain(self.expect, "expect")
        if changed := differences(wanted, {k: v for k, v in found.fingerprint.items() if k in wanted}):
            raise InputError.of("canonical", "a set of this model and data", listed(changed))
        if tuple(found.samples.shape[1:]) != tuple(self.images.shape[1:]):
            rule = f"samples of the shape of the images {tuple(self.images.shape[1:])}"
            raise InputError.of("canonical", rule, tuple(found.samples.shape[1:]))
        labels = self._canonical_labels(found)
        low, high = int(labels.min()), int(labels.max())
        got = f"{low} to {high}"
        _check.require(low >= 0 and high < classes, "canonical_labels", f"0 to {classes - 1}", got)
        missing = sorted(set(self.labels.tolist()) - set(labels.tolist()))
        rule = "a row of every class of the labels"
        _check.require(not missing, "canonical", rule, f"none of {', '.join(map(str, missing))}")
        rows = min(self.batch, len(found)) if self.canonical_batch is None else self.canonical_batch
        _check.whole(rows, "canonical_batch", "a whole number from 1")
        _check.require(rows <= len(found), "canonical_batch", f"at most the {len(found)} rows of the set", rows)
        if self.posterior is not None:
            _check.valued(posterior=self.posterior)
            meaning = f"probabilities [{len(found)}, {classes}] of the rows of the set"
            _check.shape(self.posterior, "posterior", (len(found), classes), meaning)
            sums = self.posterior.sum(1)
            fits = bool((self.posterior >= 0).all()) and bool((sums - 1).abs().max() <= 1e-3)
            _check.require(fits, "posterior", meaning, f"sums from {float(sums.min()):g} to {float(sums.max()):g}")
        return labels, rows

    def _canonical_labels(self, found: CanonicalSet) -> Tensor:
        if self.canonical_labels is not None:
            labels = self.canonical_labels
            _check.valued(canonical_labels=labels)
            _check.dtype(labels, "canonical_labels", torch.int64)
            _check.shape(labels, "canonical_labels", (len(found),), f"a class of each of the {len(found)} rows")
            return labels.to(self.device)
        rows = found.rows[:].cpu()
        last = int(rows.max()) if len(rows) else -1
        rule = f"rows of the {len(self.labels)} images"
        _check.require(0 <= last < len(self.labels), "canonical", rule, last if len(rows) else "none")
        labels = self.labels.cpu()[rows]
        seen: dict[int, int] = {}
        for row, prompt, label in zip(rows.tolist(), found.prompt_index[:].tolist(), labels.tolist(), strict=True):
            if seen.setdefault(prompt, label) != label:
                got = f"classes {seen[prompt]} and {label} (row {row}) for prompt {prompt}"
                raise InputError.of("canonical", "a set of these images, with one class for each prompt", got)
        return labels.to(self.device)

    def fingerprint(self) -> dict[str, Any]:
        """For ``fit``: what a run depends on besides its objective and configuration."""
        made: dict[str, Any] = {"data": sha256_of_tensors({"images": self.images, "labels": self.labels})}
        if self.canonical is not None:
            names = {"samples": self.canonical.samples, "features": self.canonical.features}
            optional = {"canonical_labels": self.canonical_labels, "posterior": self.posterior}
            names |= {name: value for name, value in optional.items() if value is not None}
            made |= {"canonical": dict(self.canonical.fingerprint), "canonical_rows": sha256_of_tensors(names)}
        layout = {name: [list(p.shape), p.requires_grad] for name, p in self.student.named_parameters()}
        whole = self.batch if self.global_batch is None else self.global_batch
        return made | {"student": layout, "feature": self.feature, "batch": [whole, self.canonical_batch]}


class ClassifierCall:
    """``call(images)`` returns (feature [B, D] or None, logits [B, K]) of a classifier. Images are cast to the dtype in
    which it computes; maps and tokens are averaged over their positions.

    The classifier returns (feature, logits), or logits: a tensor or an object with ``.logits``. ``feature`` names the
    module whose output is the feature, as in ``Taps``. Its hook exists until ``close``, and again after ``attach``.

    Raises:
        InputError: the model has no module with this name; another kind of output.
    """

    def __init__(self, model: nn.Module, feature: str | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise InputError.of("student", "a torch.nn.Module", described(model))
        if feature is not None and not isinstance(feature, str):
            raise InputError.of("feature", "the name of a module, or None", described(feature))
        self.model, self.dtype, self._name = model, compute_dtype(model), feature
        self._taps: Taps | None = None
        self.attach()

    def attach(self) -> None:
        """Add the hook to the named module, if it is not there."""
        if self._name is not None and self._taps is None:
            with contextlib.ExitStack() as hooks:
                self._taps = hooks.enter_context(Taps(self.model, [self._name]))
                self._detach = weakref.finalize(self, hooks.pop_all().close)
                self._detach.atexit = False

    def close(self) -> None:
        """Remove the hook from the model."""
        if self._taps is not None:
            self._taps = None
            self._detach()

    def __call__(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        feature, logits = outputs(self.model(images.to(self.dtype)))
        if self._name is not None:
            if self._taps is None:
                raise InputError("step: expected one that was prepared, got none since the objective was closed")
            feature = self._taps.features()[0]
        return None if feature is None else pooled(feature), logits


def outputs(output: Any) -> tuple[Tensor | None, Tensor]:
    """(feature or None, logits) from a classifier's output."""
    if isinstance(output, Tensor):
        return None, output
    if isinstance(output, tuple | list) and len(output) == 2 and all(isinstance(t, Tensor) for t in output):
        return output[0], output[1]
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return None, logits
    raise InputError.of("student", "logits, or (feature, logits)", described(output))


def pooled(feature: Tensor) -> Tensor:
    """[B, D] from vectors [B, D], tokens [B, L, D] or maps [B, D, ...]: the mean over positions."""
    if feature.ndim < 2:
        raise InputError.of("feature", "vectors [B, D], tokens [B, L, D] or maps [B, D, ...]", tuple(feature.shape))
    if feature.ndim == 2:
        return feature
    return feature.mean(1) if feature.ndim == 3 else feature.flatten(2).mean(2)


def rows_pooled(features: Any, whole: bool = False) -> Tensor:
    """All features of a set (Tensor or StoredRows) as [n, D] float32: pooled, or ``whole``."""
    parts = [block.flatten(1) if whole else pooled(block) for _, block in blocks(features)]
    return torch.cat([part.float().cpu() for part in parts])


@dataclass(frozen=True)
class Augmentation:
    """For each image, drawn by counter: a rotation of the hues around the gray axis by up to ``hue`` of a full circle
    in both directions (images with 3 channels), and Gaussian noise whose standard deviation is one of ``LEVELS`` levels
    from 0 to ``noise``."""

    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.5
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2

    LEVELS = 64

    def coefficients(self) -> Tensor:
        """[LEVELS, 4] float32 for ``noise_gather``: x + s eps."""
        table = torch.zeros(self.LEVELS, 4, device="cpu")
        table[:, 0], table[:, 1] = 1, torch.linspace(0, self.noise, self.LEVELS, device="cpu")
        return table

    def turned(self, images: Tensor, counter: Tensor, samples: Tensor) -> Tensor:
        """Rotated images [B, 3, ...] for the samples [B] int64 of the global batch in the step of ``counter`` [2]."""
        if not self.hue:
            return images
        word = philox.words(counter[0], counter[1], samples, torch.zeros_like(counter[0]), philox.AUGMENT)[0]
        return turn_hue(images, self.hue * (2 * philox.uniform(word) - 1))


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Images [B, 3, ...] with colors rotated around the gray axis by ``turns`` [B], fractions of a full circle."""
    angle = 2 * math.pi * turns.double()
    one, third = torch.eye(3, device=images.device).double(), torch.full((3, 3), 1 / 3, device=images.device).double()
    across = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=images.device).double() / math.sqrt(3)
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    rotation = third + cosine * (one - third) + sine * across
    return torch.einsum("bij,bj...->bi...", rotation.to(images.dtype), images)


def classes_of(labels: Tensor, classes: int) -> Tensor:
    """[B, classes] float32: 1 at the label of each row. (torch's ``one_hot`` would wait for the device.)"""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def named(names: Sequence[str], values: Mapping[str, Tensor], zero: Tensor) -> list[Tensor]:
    """The detached values in the order of the names; zero for missing ones."""
    return [values[name].detach() if name in values else zero for name in names]
