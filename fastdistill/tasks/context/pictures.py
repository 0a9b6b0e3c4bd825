# SPDX-License-Identifier: Apache-2.0
"""The figures of the report of the context experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastdistill.distill.canonical import Clarid
from fastdistill.evaluate.classification import saliency
from fastdistill.evaluate.context_figures import (
    attack_curves,
    canonical_pairs,
    fraction_curve,
    removal_plane,
    saliency_grid,
    spectrum,
)
from fastdistill.tasks.context import data, worker
from fastdistill.tasks.context.demo_config import DemoConfig
from fastdistill.tasks.context.students import restored

_LOOKED_AT = ("plain", "augment", "feature_kd", "cadistill")


def pictures(
    config: DemoConfig, output: Path, report: Mapping[str, Any], results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """By name, in the order of the page. results: of the parts, by seed."""
    choice = report["chosen"]
    setting = Clarid(choice["t_e"], choice["k"], choice["tap"])
    found = worker.sets_of(config, ["canonical"], setting, config.share).canonical
    assert found is not None
    two = _first(found.prompt_index, 2)
    beside = [row for row in report["sweep"] if (row["t_e"], row["tap"]) == (choice["t_e"], choice["tap"])]
    figures = {
        "canonical": canonical_pairs(
            _shown(data.students().images[found.rows[two]]), _shown(found.samples[two]), data.DIGITS
        ),
        "plane": removal_plane(report["sweep"], choice),
        "attacks": attack_curves(report["students"], report["masking"]),
    }
    if report["fraction"]:
        figures["fraction"] = fraction_curve(report["fraction"])
    scenes = data.held_out("independent")
    one = _first(scenes.digit, 1)
    maps = {}
    for kind in (kind for kind in _LOOKED_AT if kind in config.kinds):
        weights = output / "parts" / f"{kind}-0" / results[kind][0]["training"] / worker.WEIGHTS
        student = restored(safetensors.torch.load_file(weights), config.student.width)
        maps[str(kind)] = saliency(student, scenes.images[one], scenes.digit[one])
    figures["saliency"] = saliency_grid(_shown(scenes.images[one]), maps)
    figures["spectrum"] = spectrum(found.values, {f"k = {row['k']}": row["products"] for row in beside})
    return figures


def _first(labels: Tensor, many: int) -> Tensor:
    """The first rows of each digit, digit after digit."""
    return torch.cat([(labels == digit).nonzero()[:many, 0] for digit in range(len(data.DIGITS))])


def _shown(images: Tensor) -> Tensor:
    return (images.clamp(-1, 1) + 1) / 2
