# SPDX-License-Identifier: Apache-2.0
"""The report of canonical latents and of the classifiers that learn from them: ``report.json`` and ``report.html``."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.errors import InputError
from fastdistill.evaluate.figures import label
from fastdistill.evaluate.jackknife import quantile
from fastdistill.evaluate.metrics import mean_spread, wilson_interval
from fastdistill.evaluate.page import check_interval, entry, percent, positive, share, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Heading and caption of known figures; any other figure has its name as heading.
CAPTIONS = {
    "canonical": (
        "Originals and their canonical samples",
        "Two images of every class, and beneath each what is left of it without the directions that move the "
        "teacher's feature most.",
    ),
    "plane": (
        "What a setting removes",
        "Variance within a class that is gone from the decoded samples: of the background's hue, and of the ink. Small "
        "gray: random directions that remove as much of the latent. On the line both lose the same share; the "
        "selectivity is the height above it. Ring: the chosen setting.",
    ),
    "attacks": (
        "Accuracy under attack",
        "APGD, the worse of its two losses, over the largest change of a value, images from \u22121 to 1. Bands: "
        "95\u202f% intervals. Dashed: the gradients of the student fail a check of masking.",
    ),
    "fraction": (
        "How much of the data needs canonical images",
        "CaDistill, with canonical images of this share of the data. Bands: 95\u202f% intervals.",
    ),
    "saliency": (
        "Where a student looks",
        "Magnitude of the gradient of the margin, for the same images: darker is more (on a dark page lighter).",
    ),
    "spectrum": (
        "Singular values, and what they cost",
        "Left: those of the chosen setting over the largest; the band holds 95\u202f% of the images. Right: products "
        "with the Jacobian, J v and J\u1d40u together, of an image.",
    ),
}
#: Fields of a student that are accuracies, with their names on the page.
ACCURACIES = {
    "clean": "Own hue",
    "independent": "Any hue",
    "swapped": "Other class's hue",
    "clutter": "Clutter",
    "pgd": "PGD",
    "apgd": "APGD",
    "square": "Square",
}
_WHITE = ("pgd", "apgd")  # figures that are meaningless if gradients are masked
NMI = {
    "nmi_raw": "images, raw",
    "nmi": "images, canonical",
    "nmi_noise": "noise",
    "nmi_noise_projected": "noise, projected",
    "nmi_shuffled_prompt": "images, shuffled prompt",
    "nmi_null": "images, null prompt",
}
_REMOVED = ("irrelevant_removed", "relevant_removed", "selectivity", "selectivity_random")
_ROW = ("t_e", "sigma", "k", "tap", *NMI, "judge_right", *_REMOVED, "energy", "products", "seconds_per_image")
_SEVERITIES = 5
#: The student that CaDistill is compared with first, and the words for this comparison.
_CAUSES = {
    "samples": "the same losses without the projection",
    "random": "the same losses with random directions",
    "generated": "canonical images of noise alone",
    "labels": "labels in place of the teacher's feature",
    "feature_kd": "feature KD",
    "augment": "hue and noise augmentation, which is told what is irrelevant",
}


def figure(values: Sequence[float], n: int, *, successes: bool = True) -> dict[str, Any]:
    """A figure of a student over seeds, in the form of a report: ``mean``, ``std``, ``each``, ``n``, ``interval``.

    Args:
        values: one per seed. n: number of images in each measurement.
        successes: whether a value is the share of correct images. Then one seed has a Wilson interval.

    Returns:
        ``std`` (over seeds) and ``interval`` (95 %, Student's t over seeds) are None for one seed. Needs scipy.
    """
    each = [float(value) for value in values]
    if not each or not all(map(math.isfinite, each)):
        raise InputError.of("values", "finite numbers, one for each seed", each)
    if len(each) == 1:
        interval = list(wilson_interval(round(each[0] * n), n)) if successes else None
        return {"mean": each[0], "std": None, "each": each, "n": n, "interval": interval}
    mean, std = mean_spread(each)
    reach = quantile(len(each) - 1) * std / math.sqrt(len(each))
    return {"mean": mean, "std": std, "each": each, "n": n, "interval": [mean - reach, mean + reach]}


def write_context_report(
    directory: str | os.PathLike[str], report: Mapping[str, Any], figures: Mapping[str, Figure] | None = None
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``directory``, which is created. Each file is written atomically.

    Args:
        report: plain JSON values. A *figure* is what ``figure`` makes.
            ``teacher``: ``kind``, ``right`` (share), ``round_trip``. ``sweep[]``: rows of ``distill.selection.sweep``;
            the page shows ``intervals`` and ``random`` from ``details``.
                ``chosen``: one of the rows, with ``reason``.
            ``students.<kind>``: figures ``clean``, ``independent``, ``swapped``, ``clutter``, ``pgd``, ``apgd``,
            ``square``, ``ece``, ``reliance``, ``saliency``, ``seconds``; ``corruptions.<name>``: five figures.
            ``fraction[]``: ``share`` of the data, figures ``independent`` and ``apgd``.
            ``masking.<kind>``: ``failed`` (sentences), ``epsilon`` (numbers) and for attacks a figure for each.
            ``seconds.total``, ``versions``; optional ``ink`` (share of the area that it covers), ``title``, ``finding``
            (default: made from the numbers), ``device``, ``date``, ``backend``, ``reproduce`` (a list of commands).
        figures: ``canonical``, ``plane``, ``attacks``, ``fraction``, ``saliency``, ``spectrum`` and any others, in the
            order of the page; ``canonical`` stands above the tables.

    Returns:
        The path of the HTML file.

    Raises:
        InputError: a missing or impossible entry; nothing is written.
        StorageError: the directory cannot be written.
    """
    _check(report)
    students = [
        {
            "name": named(kind),
            "cells": [
                {"heading": heading, "figure": student[name], "void": name in _WHITE and _masked(report, kind)}
                for name, heading in ACCURACIES.items()
            ],
            "corrupted": {name: _mean(parts) for name, parts in student["corruptions"].items()},
            "student": student,
            "failed": report["masking"].get(kind, {}).get("failed", []),
        }
        for kind, student in report["students"].items()
    ]
    return write_page(
        directory,
        "context.html.j2",
        report,
        figures,
        title="Canonical latents and the classifiers that learn from them",
        finding=finding,
        tiles=_tiles(report),
        captions=CAPTIONS,
        lead=("canonical",),
        students=students,
        accuracies=ACCURACIES,
        corruptions=[label(name) for name in next(iter(report["students"].values()))["corruptions"]],
        nmi=NMI,
        agreement=_agreement(report),
        shown=shown(report["chosen"]),
        middle=_middle(report),
    )


def finding(report: Mapping[str, Any]) -> str:
    """What the numbers say: what the chosen setting removes, what CaDistill gains with it, and whether the projection
    is the cause."""
    chosen, students = report["chosen"], report["students"]
    parts = []
    if chosen["selectivity"] is not None:
        random = "" if chosen["selectivity_random"] is None else (
            f" (selectivity {chosen['selectivity']:.2f}; random directions of equal energy "
            f"{chosen['selectivity_random']:.2f})"
        )  # fmt: skip
        parts.append(
            f"The chosen setting removes {_part(chosen['irrelevant_removed'])} of the variance of the "
            f"background's hue with {_part(chosen['relevant_removed'])} of the ink's{random}."
        )
    if {"plain", "cadistill"} <= students.keys():
        told = []
        for name, words in (("independent", "with any hue"), ("swapped", "with that of another class"), ("apgd", "")):
            if name != "apgd":
                told.append(f"{_against(students, 'plain', name)} {words}")
            elif not (_masked(report, "plain") or _masked(report, "cadistill")):
                told.append(f"{_against(students, 'plain', name)} under APGD")
        parts.append(f"Against plain training CaDistill changes the share of right images by {_listed(told)} (points).")
    others = [kind for kind in _CAUSES if kind in students]
    if others and "cadistill" in students:
        told = [f"{_against(students, kind, 'independent')} against {_CAUSES[kind]}" for kind in others]
        parts.append(f"With any hue that is {_listed(told)}.")
    return " ".join(parts) or "No setting was measured."


def named(kind: str) -> str:
    """The name of a student on the page."""
    return {"cadistill": "CaDistill", "feature_kd": "Feature KD", "logit_kd": "Logit KD"}.get(kind, label(kind))


def shown(row: Mapping[str, Any]) -> str:
    """What NMI shows in a row, as part of a sentence."""
    canonical, noise = row["nmi"], row["nmi_noise_projected"]
    if canonical is None or noise is None:
        return "NMI was not measured."
    interval = _intervals(row).get("nmi")
    least = canonical if interval is None else interval[0]
    if noise >= least:
        return (
            f"Projected noise, which has no image in it, clusters by class as well ({noise:.2f}) as canonical features "
            f"of images ({canonical:.2f}): what NMI shows here is the prompt."
        )
    return (
        f"Canonical features of images cluster by class better ({canonical:.2f}) than projected noise ({noise:.2f}): "
        "what they have above it comes from the images."
    )


def _against(students: Mapping[str, Any], kind: str, name: str) -> str:
    """By how many points CaDistill's mean is above another student's, and whether their intervals are disjoint."""
    ours, theirs = students["cadistill"][name], students[kind][name]
    points = f"{100 * (ours['mean'] - theirs['mean']):+.1f}".replace("-", "\u2212")
    ends = ours["interval"], theirs["interval"]
    if None in ends or ends[0][0] > ends[1][1] or ends[0][1] < ends[1][0]:
        return points
    return f"{points} (intervals overlap)"


def _part(value: float) -> str:
    return percent(value, 0).replace("-", "\u2212")


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _mean(figures: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(part["mean"] for part in figures)


def _masked(report: Mapping[str, Any], kind: str) -> bool:
    return bool(report["masking"].get(kind, {}).get("failed"))


def _middle(report: Mapping[str, Any]) -> float | None:
    """The epsilon of the attacks in the students' figures."""
    radii = next((found["epsilon"] for found in report["masking"].values() if found.get("epsilon")), None)
    return None if radii is None else float(radii[len(radii) // 2])


def _intervals(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = row.get("details", {}).get("intervals", {})
    return found


def _agreement(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the NMI table: the taps at the chosen t_e and k, the chosen tap first."""
    chosen = report["chosen"]
    rows = [row for row in report["sweep"] if (row["t_e"], row["k"]) == (chosen["t_e"], chosen["k"])]
    rows.sort(key=lambda row: bool(row["tap"] != chosen["tap"]))
    return [
        {"tap": row["tap"], "cells": [(row[name], _intervals(row).get(name)) for name in NMI]}
        for row in rows or [chosen]
    ]


def _tiles(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    chosen, students = report["chosen"], report["students"]
    if chosen["selectivity"] is not None:
        value = percent(chosen["irrelevant_removed"], 0)
        yield {"key": "student", "value": value, "text": "of the hue's variance removed by the chosen setting"}
        yield {
            "key": "paired",
            "value": percent(chosen["relevant_removed"], 0),
            "text": "of the ink's variance removed",
        }
    for kind, key in (("cadistill", "student"), ("plain", "teacher")):
        if kind in students:
            text = f"{'CaDistill' if kind == 'cadistill' else 'Plain training'}: right where the hue tells nothing"
            yield {"key": key, "value": percent(students[kind]["independent"]["mean"]), "text": text}


def _check(report: Mapping[str, Any]) -> None:
    """InputError unless all required entries exist and have possible values."""
    for part in ("teacher", "chosen", "students", "masking"):
        _mapping(report, part)
    if not report["students"]:
        raise InputError.of("report.students", "at least one student by name", report["students"])
    entry(report, "teacher.kind")
    share(report, "teacher.right")
    positive(report, "teacher.round_trip")
    for part in ("sweep", "fraction"):
        if not isinstance(entry(report, part), list):
            raise InputError.of(f"report.{part}", "a list", report[part])
    for place, _ in enumerate(report["sweep"]):
        _check_row(report, f"sweep.{place}")
    _check_row(report, "chosen")
    if not isinstance(entry(report, "chosen.reason"), str):
        raise InputError.of("report.chosen.reason", "a text", report["chosen"]["reason"])
    corruptions = None
    for kind in report["students"]:
        path = f"students.{kind}"
        for name in (*ACCURACIES, "ece", "saliency"):
            _check_figure(report, f"{path}.{name}", 0, 1)
        _check_figure(report, f"{path}.reliance", -1, 1)
        _check_figure(report, f"{path}.seconds", 0, math.inf)
        names = list(_mapping(report, f"{path}.corruptions"))
        if corruptions is not None and names != corruptions:
            raise InputError.of(f"report.{path}.corruptions", f"those of the others, {', '.join(corruptions)}", names)
        corruptions = names
        for name in names:
            parts = entry(report, f"{path}.corruptions.{name}")
            if not isinstance(parts, list) or len(parts) != _SEVERITIES:
                raise InputError.of(f"report.{path}.corruptions.{name}", f"a list of {_SEVERITIES} figures", parts)
            for severity in range(_SEVERITIES):
                _check_figure(report, f"{path}.corruptions.{name}.{severity}", 0, 1)
        if kind not in report["masking"]:
            raise InputError.of("report", f"an entry masking.{kind}", "none")
    for place, _ in enumerate(report["fraction"]):
        share(report, f"fraction.{place}.share")
        for name in ("independent", "apgd"):
            _check_figure(report, f"fraction.{place}.{name}", 0, 1)
    for kind in report["masking"]:
        _check_masking(report, f"masking.{kind}")


def _check_row(report: Mapping[str, Any], path: str) -> None:
    for name in _ROW:
        value = entry(report, f"{path}.{name}")
        if name == "tap":
            continue
        if value is None and (name in NMI or name in _REMOVED or name == "judge_right"):
            continue
        if not _is_number(value):
            raise InputError.of(f"report.{path}.{name}", "a finite number", value)
        if name in NMI or name in ("judge_right", "energy"):
            share(report, f"{path}.{name}")
    for name, interval in _intervals(entry(report, path)).items():
        check_interval(interval, f"{path}.details.intervals.{name}")


def _check_masking(report: Mapping[str, Any], path: str) -> None:
    failed = entry(report, f"{path}.failed")
    if not isinstance(failed, list) or not all(isinstance(text, str) for text in failed):
        raise InputError.of(f"report.{path}.failed", "a list of sentences", failed)
    radii = entry(report, path).get("epsilon", [])
    for place, _ in enumerate(radii):
        positive(report, f"{path}.epsilon.{place}")
    for name in ("pgd", "apgd", "square", "transfer"):
        parts = entry(report, path).get(name)
        if parts is not None and (not isinstance(parts, list) or len(parts) != len(radii)):
            raise InputError.of(f"report.{path}.{name}", f"{len(radii)} figures, one for each epsilon", parts)
        for place, _ in enumerate(parts or []):
            _check_figure(report, f"{path}.{name}.{place}", 0, 1)


def _check_figure(report: Mapping[str, Any], path: str, low: float, high: float) -> None:
    found = _mapping(report, path)
    for name in ("mean", "std", "each", "n", "interval"):
        entry(report, f"{path}.{name}")
    each = found["each"]
    rule = f"numbers from {low:g} to {high:g}" if high < math.inf else f"numbers from {low:g}"
    if not isinstance(each, list) or not each or not all(_is_number(one) and low <= one <= high for one in each):
        raise InputError.of(f"report.{path}.each", rule, each)
    if not _is_number(found["mean"]) or not math.isclose(found["mean"], statistics.fmean(each), abs_tol=1e-9):
        raise InputError.of(f"report.{path}.mean", f"the mean of each, {statistics.fmean(each):g}", found["mean"])
    if found["std"] is not None and not (_is_number(found["std"]) and found["std"] >= 0):
        raise InputError.of(f"report.{path}.std", "a number from 0, or None", found["std"])
    if isinstance(found["n"], bool) or not isinstance(found["n"], Integral) or found["n"] < 1:
        raise InputError.of(f"report.{path}.n", "a whole number from 1", found["n"])
    check_interval(found["interval"], f"{path}.interval")


def _mapping(report: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    found = entry(report, path)
    if not isinstance(found, Mapping):
        raise InputError.of(f"report.{path}", "a mapping by name", found)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
