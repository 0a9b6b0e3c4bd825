# SPDX-License-Identifier: Apache-2.0
"""The measures of a classifier of the task: held-out images of each kind, attacks, corruptions, saliency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdistill.evaluate.classification import accuracy, calibration, logits_of, reliance, saliency_on
from fastdistill.evaluate.corruptions import corruptions
from fastdistill.evaluate.robustness import robustness
from fastdistill.tasks.context import data
from fastdistill.tasks.context.classifier import Classifier
from fastdistill.tasks.context.demo_config import DemoConfig

Progress = Callable[[str, int, int], object]
_SEED = 1  # for the starts of the attacks and for the corruptions


def on_curve(config: DemoConfig, model: Classifier, progress: Progress) -> dict[str, Any]:
    """``independent``, and ``attacks`` by APGD at the middle epsilon, of a classifier in eval mode."""
    any_hue, middle = data.held_out("independent"), config.epsilon[len(config.epsilon) // 2]
    attacks = robustness(
        model, any_hue.images, any_hue.digit, epsilon=[middle], attacks=["apgd"], steps=config.steps, seed=_SEED,
        progress=lambda done, total: progress("attacks", done, total),
    )  # fmt: skip
    return {"independent": accuracy(model, any_hue.images, any_hue.digit), "attacks": attacks}


def measured(
    config: DemoConfig, model: Classifier, transfer_from: Classifier | None, progress: Progress
) -> dict[str, Any]:
    """Measures of a classifier in eval mode.

    ``clean``, ``independent``, ``swapped``, ``clutter``: accuracies on the kinds of held-out images (clean: own hues).
    ``attacks``: of ``robustness``, on images of any hue; also for these images ``ece``, ``nll`` and ``saliency``, the
    share of the gradient that is on the ink. ``corruptions``: on images with their own hues; ``reliance``: the loss of
    accuracy on these with the hue of another digit.
    """
    scenes = {kind: data.held_out(kind) for kind in data.HELD_OUT}
    own, any_hue, other = scenes["same"], scenes["independent"], scenes["swapped"]
    found: dict[str, Any] = {
        "clean" if kind == "same" else kind: accuracy(model, one.images, one.digit) for kind, one in scenes.items()
    }
    attacks = robustness(
        model, any_hue.images, any_hue.digit, epsilon=config.epsilon, steps=config.steps, queries=config.queries,
        queried=config.square_images, seed=_SEED, transfer_from=transfer_from,
        progress=lambda done, total: progress("attacks", done, total),
    )  # fmt: skip
    towards: dict[str, Tensor] = {"background_swap": other.images, "clutter": scenes["clutter"].images}
    damaged = corruptions(
        model, own.images, own.digit, towards=towards, seed=_SEED,
        progress=lambda done, total: progress("corruptions", done, total),
    )  # fmt: skip
    ece, nll = calibration(logits_of(model, any_hue.images), any_hue.digit)
    return found | {
        "attacks": attacks,
        "corruptions": damaged,
        "ece": ece,
        "nll": nll,
        "reliance": reliance(model, own.images, other.images, own.digit),
        "saliency": saliency_on(model, any_hue.images, any_hue.digit, any_hue.ink),
    }
