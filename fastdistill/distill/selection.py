# SPDX-License-Identifier: Apache-2.0
"""Choice of a CLARID setting: a sweep over t_e, k and the tap, selected by selectivity, with the necessary controls.

The paper (2506.09955) chooses by the agreement of clusters of canonical features with the classes. But features of a
conditional model follow the prompt, even for pure noise, so this says nothing about the images. We use selectivity: the
fraction of the irrelevant variance within classes that a setting removes from the decoded samples, minus that of the
relevant variance; compared with random directions that remove as much of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.diffusion.prompts import Rows
from fastdistill.diffusion.schedule import PredictionType, Schedule, check_prediction_type
from fastdistill.distill.canonical import Clarid
from fastdistill.distill.controls import Measure, Measures, Subject
from fastdistill.distill.sweep_level import Level, Teacher, key
from fastdistill.errors import InputError, described
from fastdistill.ops import _check

__all__ = ["Measures", "chosen", "sweep"]


@torch.no_grad()
def sweep(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    prompts: Rows,
    settings: Sequence[Clarid],
    *,
    schedule: Schedule,
    null_prompt: Rows | None = None,
    measures: Measures | None = None,
    decode: Measure | None = None,
    prediction_type: PredictionType | None = None,
    clip_sample: float | None = None,
    seed: int = 0,
    starts: int = 10,
    batch: int = 64,
    chunk: int | None = None,
    known: Sequence[Mapping[str, Any]] = (),
    on_row: Callable[[dict[str, Any]], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[dict[str, Any]]:
    """Measures settings of CLARID on images, with their controls: one row of figures per setting.

    Images are inverted once for each t_e. There is one search for each t_e and tap, at the largest k, because the
    leading singular vectors are those of a smaller k. If the search is dense, one Jacobian serves all taps.

    Args:
        model, schedule, prediction_type, clip_sample, chunk: see ``canonical``.
        images: [N, *S], in the model's scale, at least three per class. labels: [N] int64, their classes.
        prompts: rows of all classes; row ``labels[i]`` belongs to image i. null_prompt: one row.
        settings: with any t_e, k and taps, each once; k = 0: images are only inverted and decoded.
        measures: for decoded samples and for the images.
        decode: samples -> what is measured; for example of a VAE.
        seed: of the noise, the random directions and the starts of K-means. starts: number of starts of K-means.
        batch: number of images at once.
        known: rows of an earlier call; their settings are not computed again.
        on_row: called with each new row. progress: called with (evaluations of the model done, estimated total).

    Returns:
        Rows in the order of the settings. A figure that is not defined is None.

        - t_e, sigma (noise over signal), k, tap; - nmi_raw, nmi: NMI between the classes and K-means clusters of the
        tap's features, for latents and for canonical
          latents; nmi_noise, nmi_noise_projected: the same for noise with the same prompts; nmi_shuffled_prompt,
          nmi_null: for latents with the prompt of another class and with the null prompt;
        - judge_right; irrelevant_removed, relevant_removed: fractions of the variance within classes, relative to
        images
          that are only inverted and decoded; energy: mean of ||x - x~||^2 / ||x||^2; selectivity; selectivity_random:
          for random directions with the same energy;
        - products, seconds_per_image: cost of this setting alone, measured with the first image;
        - details: intervals (95 %, jackknife over groups of images); the same NMI for pooled features; nmi_chance;
          nmi_shuffled_by_prompt: with the class of the prompt; judge_right_before (k = 0) and judge_right_images;
          random: for the random directions; other_prompt: for samples decoded with the prompt of another class, the
          fractions in which the judge sees the latent's class and the prompt's; settled: fraction of the searches;
          nested: sine of the largest angle between the directions and those of a search for this k alone, for the first
          image.

    Raises:
        InputError: what ``canonical`` refuses, classes with fewer than three images, repeated settings; before anything
            runs.
    """
    _check_settings(settings)
    if not isinstance(schedule, Schedule):
        raise InputError.of("schedule", "a NoiseSchedule or a FlowSchedule", described(schedule))
    subject = Subject(images, labels, measures, decode, seed=seed, starts=starts)
    _check.whole(batch, "batch", "at least 1")
    teacher = Teacher(
        model, prompts, null_prompt, schedule, check_prediction_type(prediction_type or schedule.prediction_types[0]),
        clip_sample, batch, chunk,
    )  # fmt: skip
    levels = [Level(subject, teacher, group) for group in _grouped(settings)]
    found = {key(row): dict(row) for row in known}
    done, total = 0, sum(level.work(found) for level in levels)

    def tick(evaluations: int) -> None:
        nonlocal done
        done += evaluations
        if progress is not None:
            progress(min(done, total), total)

    tick(0)
    for level in levels:
        for row in level.rows(found, tick):
            found[key(row)] = row
            if on_row is not None:
                on_row(row)
    return [found[key(vars(setting))] for setting in settings]


def chosen(rows: Sequence[Mapping[str, Any]], *, least_right: float = 0.95) -> dict[str, Any]:
    """The row that removes the most irrelevant variance, among those whose interval of the selectivity overlaps that of
    the highest; with ``reason`` and ``neighbours``, the rows next to it in t_e, k or tap.

    Fewer directions are often more selective but remove little, therefore the second criterion. The judge must be right
    on at least ``least_right`` of its accuracy on the images; without a judge this is not checked.

    Raises:
        InputError: no row with directions and a selectivity, or none that is judged right.
    """

    def right(row: Mapping[str, Any]) -> bool:
        before = row["details"]["judge_right_images"]
        return before is None or row["judge_right"] >= least_right * before

    measured = [row for row in rows if row["k"] and row["selectivity"] is not None]
    _check.require(bool(measured), "rows", "some with directions and measures, to choose from", f"{len(rows)} without")
    judged = [row for row in measured if right(row)]
    _check.require(
        bool(judged), "rows", f"one whose samples are judged right on {least_right:.0%} of the images'", "none"
    )
    highest = max(judged, key=lambda row: float(row["selectivity"]))
    low, high = highest["details"]["intervals"]["selectivity"]
    close = [row for row in judged if row is highest or row["details"]["intervals"]["selectivity"][1] >= low]
    best = max(close, key=lambda row: float(row["irrelevant_removed"]))
    gone, lost = (f"{round(best[f'{name}_removed'], 2) + 0.0:.0%}" for name in ("irrelevant", "relevant"))  # no -0%
    reason = (
        f"{gone} of the irrelevant variance is removed with {lost} of the relevant, selectivity "
        f"{best['selectivity']:.2f} (random directions of equal energy: {best['selectivity_random']:.2f}); of "
        f"{len(judged)} settings the highest selectivity is {highest['selectivity']:.2f} [{low:.2f}, {high:.2f}], and "
        f"of the {len(close)} whose intervals overlap that one it removes most of the irrelevant"
    )
    beside = [row for row in rows if row["k"] and _beside(row, best, rows)]
    fields = ("t_e", "k", "tap", "selectivity", "irrelevant_removed", "relevant_removed", "judge_right")
    return {**best, "reason": reason, "neighbours": [{name: row[name] for name in fields} for row in beside]}


def _beside(row: Mapping[str, Any], best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a row differs in one property only: the next t_e or k on either side, or the tap."""
    changed = [name for name in ("t_e", "k", "tap") if row[name] != best[name]]
    if len(changed) != 1 or changed == ["tap"]:
        return len(changed) == 1
    values = sorted({other[changed[0]] for other in rows})
    return abs(values.index(row[changed[0]]) - values.index(best[changed[0]])) == 1


def _check_settings(settings: Sequence[Clarid]) -> None:
    _check.require(bool(settings), "settings", "at least one Clarid", "none")
    for place, setting in enumerate(settings):
        if not isinstance(setting, Clarid):
            raise InputError.of(f"settings[{place}]", "a Clarid", described(setting))
    keys = [key(vars(setting)) for setting in settings]
    twice = next((found for found in keys if keys.count(found) > 1), None)
    if twice is not None:
        raise InputError.of("settings", "each (t_e, k, tap) once", f"{twice} {keys.count(twice)} times")


def _grouped(settings: Sequence[Clarid]) -> list[list[Clarid]]:
    """Groups of settings that differ only in k and tap."""
    groups: dict[Clarid, list[Clarid]] = {}
    for setting in settings:
        groups.setdefault(replace(setting, k=0, tap=""), []).append(setting)
    return list(groups.values())
