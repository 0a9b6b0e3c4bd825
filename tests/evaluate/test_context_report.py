# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.errors import InputError
from fastdistill.evaluate.context import ACCURACIES, figure, finding, shown, write_context_report
from fastdistill.evaluate.context_figures import (
    attack_curves,
    canonical_pairs,
    fraction_curve,
    removal_plane,
    saliency_grid,
    spectrum,
)
from fastdistill.evaluate.figures import png
from fastdistill.tasks.context.data import DIGITS
from tests.evaluate.faulty import refused

RADII = [0.05, 0.1, 0.2]


def made_up(seeds: int = 5) -> dict[str, Any]:
    """A report with numbers similar to those of the first trials."""

    def around(middle: float, n: int = 360, successes: bool = True) -> dict[str, Any]:
        return figure([middle + 0.004 * (i - (seeds - 1) / 2) for i in range(seeds)], n, successes=successes)

    def student(independent: float, attacked: float) -> dict[str, Any]:
        shares = [0.98, independent, independent - 0.1, 0.97, attacked + 0.01, attacked, attacked + 0.1]
        found: dict[str, Any] = {name: around(value) for name, value in zip(ACCURACIES, shares, strict=True)}
        names = ("noise", "blur", "contrast", "occlusion", "hue_shift", "background_swap", "clutter")
        found["corruptions"] = {name: [around(0.95 - 0.05 * i) for i in range(5)] for name in names}
        found |= {"ece": around(0.05, successes=False), "reliance": around(0.98 - independent + 0.1, successes=False)}
        return found | {"saliency": around(0.4, successes=False), "seconds": around(7.0, successes=False)}

    def row(t_e: int, k: int, tap: str, hue: float, ink: float) -> dict[str, Any]:
        nmis = {"nmi_raw": 0.55, "nmi": 0.95, "nmi_noise": 0.62, "nmi_noise_projected": 0.96}
        near = {name: [value - 0.03, min(value + 0.03, 1.0)] for name, value in nmis.items()}
        details = {
            "intervals": near,
            "random": {"irrelevant_removed": 0.09, "relevant_removed": 0.08, "judge_right": 1},
        }
        return {
            "t_e": t_e, "sigma": t_e / 400, "k": k, "tap": tap, **nmis, "nmi_shuffled_prompt": 0.5, "nmi_null": 0.48,
            "judge_right": 0.99, "irrelevant_removed": hue, "relevant_removed": ink, "energy": 0.2,
            "selectivity": hue - ink, "selectivity_random": 0.01, "products": 192, "seconds_per_image": 0.42,
            "details": details,
        }  # fmt: skip

    sweep = [
        row(t_e, k, tap, scale * (1 - math.exp(-k / 12)) * t_e / 800, 0.3 * (1 - math.exp(-k / 20)))
        for t_e in (500, 650, 800)
        for tap, scale in (("down_blocks.1", 0.5), ("mid_block", 0.6), ("up_blocks.0", 1.0))
        for k in (0, 5, 15, 40)
    ]
    kinds = {"plain": (0.82, 0.25), "samples": (0.72, 0.23), "random": (0.74, 0.22), "generated": (0.86, 0.29),
             "labels": (0.87, 0.3), "feature_kd": (0.83, 0.26), "logit_kd": (0.81, 0.24), "augment": (0.93, 0.27),
             "cadistill": (0.92, 0.34)}  # fmt: skip
    masking = {
        kind: {"failed": [], "epsilon": RADII, "apgd": [around(attacked + 0.3), around(attacked), around(attacked / 4)]}
        for kind, (_, attacked) in kinds.items()
    }
    masking["logit_kd"]["failed"] = ["seed 0: Square beat apgd by 3.0 points at epsilon 0.1"]
    best = next(r for r in sweep if (r["t_e"], r["k"], r["tap"]) == (650, 40, "up_blocks.0"))
    return {
        "teacher": {"kind": "broad", "right": 0.99, "round_trip": 0.022},
        "sweep": sweep,
        "chosen": {**best, "reason": "the highest selectivity of 27 settings", "neighbours": []},
        "students": {kind: student(*values) for kind, values in kinds.items()},
        "fraction": [
            {"share": part, "independent": around(0.82 + 0.02 * i), "apgd": around(0.25 + 0.02 * i)}
            for i, part in enumerate((0.01, 0.03, 0.1, 0.3, 1.0))
        ],
        "masking": masking,
        "seconds": {"total": 500.0, "students": 300.0},
        "versions": {"torch": "2.13.0"},
        "reproduce": ["fastdistill demo context --seeds 5"],
    }


def pictures(report: dict[str, Any]) -> dict[str, Any]:
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {
        "canonical": canonical_pairs(images, images.mean(1), DIGITS),
        "attacks": attack_curves(report["students"], report["masking"]),
    }


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return made_up()


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open, self.struck = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open == "s":
            self.struck, self._open = self.struck + data, ""


def test_the_page_shows_the_numbers(tmp_path: Path, report: dict[str, Any]) -> None:
    path = write_context_report(tmp_path, report, pictures(report))
    assert json.loads((tmp_path / "report.json").read_text()) == {"schema": 1} | report
    page = Page(path.read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", page.text)
    for told in (
        "mean over 5 seeds",
        "Attacks may change a value by 0.1 (images",
        "92.0",
        "the highest selectivity of 27 settings",
        "Logit KD masks its gradients: seed 0: Square beat apgd by 3.0 points at epsilon 0.1.",
        "Projected noise, which has no image in it, clusters by class as well (0.96)",
    ):
        assert told in text, told
    assert page.struck == "25.024.0"  # PGD and APGD, only of the student that masks its gradients
    order = [str(attributes.get("id")) for _, attributes in page.tags if "id" in attributes]
    assert len(order) == len(set(order)) and order.index("figure-1") < order.index("students") < order.index("figure-2")
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_the_finding_is_worded_from_the_numbers() -> None:
    report = made_up()
    text = re.sub(r"\s", " ", finding(report))
    assert text.startswith(
        "The chosen setting removes 78 % of the variance of the background's hue with 26 % of the ink's"
    )
    assert "changes the share of right images by +10.0 with any hue, +10.0 with that of another class" in text
    assert "and +9.0 under APGD (points)." in text
    assert "+20.0 against the same losses without the projection" in text
    assert "−1.0 (intervals overlap) against hue and noise augmentation" in text
    report["masking"]["plain"]["failed"] = ["seed 0: the loss falls"]
    assert "APGD" not in finding(report)
    report["chosen"]["relevant_removed"] = -0.01
    assert "with \u22121\u202f% of the ink's" in finding(report)
    for kind in ("plain", "cadistill"):
        del report["students"][kind]
    assert re.sub(r"\s", " ", finding(report)).endswith("random directions of equal energy 0.01).")


def test_what_nmi_shows_depends_on_noise() -> None:
    row = made_up()["chosen"]
    assert shown(row).endswith("what NMI shows here is the prompt.")
    assert shown(row | {"nmi_noise_projected": 0.93}).endswith("the prompt.")  # within the interval of 0.95
    assert shown(row | {"nmi_noise_projected": 0.5}).endswith("comes from the images.")
    assert shown(row | {"nmi": None}) == "NMI was not measured."


def test_a_figure_over_seeds() -> None:
    """Student's t with four degrees of freedom has 95 % within 2.776; for one seed, a Wilson interval over its
    images."""
    found = figure([0.1, 0.2, 0.3, 0.4, 0.5], 360)
    assert found["mean"] == pytest.approx(0.3) and found["n"] == 360 and found["each"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    reach = 2.7764451 * found["std"] / math.sqrt(5)
    assert found["interval"] == pytest.approx([0.3 - reach, 0.3 + reach])
    one = figure([0.5], 100)
    assert one["std"] is None and one["interval"] == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert figure([7.0], 1, successes=False)["interval"] is None
    for values in ([], [math.nan]):
        with pytest.raises(InputError, match=r"^values: expected finite numbers, one for each seed"):
            figure(values, 10)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("teacher.right", 1.2, "report.teacher.right: expected a share from 0 to 1, got 1.2"),
        ("teacher.round_trip", None, "report: expected an entry teacher.round_trip"),
        ("sweep.0.nmi", 2.0, "report.sweep.0.nmi: expected a share from 0 to 1, got 2.0"),
        ("sweep.3.energy", math.nan, "report.sweep.3.energy: expected a finite number, got nan"),
        ("sweep.1.details.intervals.nmi", [1, 0], "report.sweep.1.details.intervals.nmi: expected [low, high]"),
        ("sweep", {}, "report.sweep: expected a list"),
        ("chosen.reason", None, "report: expected an entry chosen.reason"),
        ("chosen.tap", None, "report: expected an entry chosen.tap"),
        ("students", {}, "report.students: expected at least one student by name"),
        ("students.plain.pgd", None, "report: expected an entry students.plain.pgd"),
        ("students.plain.pgd", 0.3, "report.students.plain.pgd: expected a mapping by name, got 0.3"),
        ("students.plain.clean.each", [1.5], "report.students.plain.clean.each: expected numbers from 0 to 1"),
        (
            "students.plain.clean.mean",
            0.5,
            "report.students.plain.clean.mean: expected the mean of each, 0.98, got 0.5",
        ),
        ("students.plain.clean.n", 0, "report.students.plain.clean.n: expected a whole number from 1, got 0"),
        ("students.plain.ece.std", -1, "report.students.plain.ece.std: expected a number from 0, or None, got -1"),
        ("students.plain.corruptions.blur", [], "report.students.plain.corruptions.blur: expected a list of 5 figures"),
        ("students.random.corruptions.blur", None, "report.students.random.corruptions: expected those of the others"),
        ("fraction.1.share", 2, "report.fraction.1.share: expected a share from 0 to 1, got 2"),
        ("masking.plain", None, "report: expected an entry masking.plain"),
        ("masking.plain.failed", "no", "report.masking.plain.failed: expected a list of sentences, got no"),
        ("masking.plain.apgd", [], "report.masking.plain.apgd: expected 3 figures, one for each epsilon, got []"),
        ("masking.plain.epsilon.0", 0, "report.masking.plain.epsilon.0: expected a positive number, got 0"),
        ("seconds.total", None, "report: expected an entry seconds.total"),
    ],
)
def test_bad_reports_write_nothing(tmp_path: Path, report: dict[str, Any], path: str, value: Any, message: str) -> None:
    refused(write_context_report, tmp_path, report, path, value, message)


def test_pairs_stand_above_each_other() -> None:
    images, left = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1, 2, 2)
    drawn = canonical_pairs(images, left, ["a", "b"])
    shown_ones = drawn.axes[0].get_images()
    wanted = [images[0], images[1], left[0], left[1], images[2], images[3], left[2], left[3]]
    for one, image in zip(shown_ones, wanted, strict=True):
        assert torch.equal(torch.as_tensor(one.get_array()), image.expand(3, -1, -1).permute(1, 2, 0))
    (a, b), (c, _) = (
        (one.get_extent()[:1] + one.get_extent()[3:] for one in shown_ones[:2]),
        (one.get_extent()[:1] + one.get_extent()[3:] for one in shown_ones[2:4]),
    )
    assert a[0] == c[0] < b[0] and a[1] == b[1] < c[1]
    with pytest.raises(InputError, match=r"^canonical: expected images \[4"):
        canonical_pairs(images, left[:3], ["a", "b"])


def test_the_plane_has_a_point_for_each_setting_and_a_ring_around_the_chosen(report: dict[str, Any]) -> None:
    drawn = removal_plane(report["sweep"], report["chosen"])
    points = {(round(float(line.get_xdata()[0]), 9), round(float(line.get_ydata()[0]), 9))
              for line in drawn.axes[0].lines if len(line.get_xdata()) == 1}  # fmt: skip
    rows = [row for row in report["sweep"] if row["k"]]
    assert points == {(round(row["relevant_removed"], 9), round(row["irrelevant_removed"], 9)) for row in rows}
    assert "Chosen: 78% of the hue with 26% of the ink; random directions: 9% to 9%" in drawn.get_label()
    with pytest.raises(InputError, match=r"^sweep: expected settings with directions"):
        removal_plane([], report["chosen"])


def test_curves_have_the_means(report: dict[str, Any]) -> None:
    drawn = attack_curves(report["students"], report["masking"])
    assert "; CaDistill: 92 % at 0, 64 % at 0.05, 34 % at 0.1" in drawn.get_label()
    dashed = [line for line in drawn.axes[0].lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1  # the student that masks its gradients
    line = fraction_curve(report["fraction"][::-1]).axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 3, 10, 30, 100]
    assert list(line.get_ydata()) == pytest.approx([82, 84, 86, 88, 90])
    ends = {text.get_text(): text.xy for text in line.axes.texts}
    assert ends == {"Hue of any class": (100, pytest.approx(90)), "Under APGD": (100, pytest.approx(33))}


def test_maps_and_spectra_follow_the_colors_of_the_page() -> None:
    """A map without gradient and one with a single pixel: ink only there, on a light and on a dark page."""
    maps = torch.zeros(2, 4, 4)
    maps[1, 0, 0] = 3
    drawn = saliency_grid(torch.zeros(2, 3, 4, 4), {"cadistill": maps})
    assert drawn.get_label() == "Saliency of CaDistill for 2 images."
    squares = drawn.axes[0].collections
    assert [one.get_facecolor()[:, 3].tolist() for one in squares] == [[0.0] * 16, [1.0] + [0.0] * 15]
    assert png(drawn, dpi=20) != png(drawn, dpi=20, dark=True)
    with pytest.raises(InputError, match=r"^maps\['plain'\]: expected \[2, H, W\]"):
        saliency_grid(torch.zeros(2, 3, 4, 4), {"plain": maps[:1]})
    figures = spectrum([[4.0, 2.0], [2.0, 1.0]], {"dense": 192, "krylov": 66})
    assert (
        figures.get_label()
        == "Singular values fall to 0.500 of the largest at i = 2. Products: dense: 192; krylov: 66."
    )
    assert png(figures, dpi=20, dark=True)
    with pytest.raises(InputError, match=r"^values: expected singular values"):
        spectrum([[0.0, 0.0]], {})
