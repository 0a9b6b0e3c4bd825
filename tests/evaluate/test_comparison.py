# SPDX-License-Identifier: Apache-2.0
"""The images of two models from the same noise, the measures of them, and their page."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate import sample_grid
from fastdistill.evaluate.comparison import finding, write_comparison
from fastdistill.evaluate.figures import losses_over_time
from fastdistill.evaluate.held_out import HeldOut
from fastdistill.evaluate.measures import Measures
from fastdistill.evaluate.page import number
from fastdistill.evaluate.samples import MODELS, Samples, compared
from tests.evaluate.faulty import refused
from tests.evaluate.test_report import Page
from tests.harness import EPS, generator

PROMPTS = 4


def noise(rows: Tensor) -> Tensor:
    return torch.stack([torch.randn(3, 2, 2, generator=generator(int(row))) for row in rows])


def made(batch: int = 5, images: int = 3, far: float = 0.5, **options: Any) -> Samples:
    """A student whose distance from the teacher is ``far`` times the number of the prompt."""

    def teacher(prompts: Tensor, rows: Tensor) -> Tensor:
        return noise(rows) + prompts[:, None, None, None]

    def student(prompts: Tensor, rows: Tensor) -> Tensor:
        return teacher(prompts, rows) + far * prompts[:, None, None, None]

    rows = torch.arange(PROMPTS).repeat(images)
    extractors = {"features": lambda x: x.flatten(1)}
    given = {"batch": batch, "extractors": extractors} | options
    return compared(teacher, student, lambda latents: latents / 10, rows, **given)


def test_samples_do_not_depend_on_the_batch() -> None:
    done: list[tuple[int, int]] = []
    one = made(12, shown=3)
    two = made(5, shown=3, progress=lambda *n: done.append(n))
    for model in ("teacher", "student"):
        assert torch.equal(one.latents[model], two.latents[model])
        assert torch.equal(one.features["features"][model], two.features["features"][model])
        assert torch.equal(one.shown[model], two.shown[model]) and len(one.shown[model]) == 3
    assert torch.equal(one.distances["images"].each, two.distances["images"].each)
    assert done == [(5, 24), (10, 24), (15, 24), (20, 24), (22, 24), (24, 24)]
    assert made(1).distances["latents"].unrelated is None and one.distances["latents"].unrelated is not None


def test_distances_are_means_over_prompts() -> None:
    measures = Measures(made(), PROMPTS)
    measures.distances()
    found = measures.values["student"]["latents_distance"]
    assert found["value"] == pytest.approx(0.5 * 1.5, rel=8 * EPS)  # prompts 0 to 3
    assert found["interval"][0] < 0.75 < found["interval"][1]
    assert measures.values["student"]["images_distance"]["value"] == pytest.approx(0.075, rel=8 * EPS)
    assert measures.values["teacher"]["images_distance"]["value"] > 0.1


def test_losses_are_means_over_prompts() -> None:
    measures = Measures(made(), PROMPTS)
    latent = torch.tensor([0, 4, 8, 1, 3, 2])
    output = torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0, 20.0], dtype=torch.float64)
    measures.losses(HeldOut(output, None, latent, latent))
    assert measures.values["student"]["output_loss"]["value"] == (2 + 10 + 20 + 30) / 4
    assert "other channels" in measures.left_out["feature_loss"]


def test_diversity_against_the_teacher_and_against_real_images() -> None:
    measures = Measures(made(far=0.0), PROMPTS)
    measures.diversity("features")
    student = measures.values["student"]
    for name in ("precision", "recall", "coverage", "vendi_ratio", "variance_ratio", "class_separation"):
        assert student[name]["value"] == pytest.approx(1, rel=64 * EPS), name
    assert student["precision"]["interval"] == [1, 1] and "precision" not in measures.values["teacher"]
    assert student["vendi"]["interval"] is None and measures.values["teacher"]["vendi"] == student["vendi"]
    real = torch.randn(40, 12, generator=generator(99))
    measures.diversity("features", real)
    assert measures.values["teacher"]["precision"] == measures.values["student"]["precision"]
    few = Measures(made(images=1), PROMPTS)
    few.diversity("features")
    assert re.search("more than k = 5 samples, got 4", few.left_out["precision"])
    assert few.left_out["variance_ratio"] == "there is one image of each prompt"


def test_scores_by_features() -> None:
    pytest.importorskip("torchmetrics")
    measures = Measures(made(far=3.0), PROMPTS)
    measures.scores("features", ["fid", "kid"])
    for name in ("fid", "kid"):
        low, high = measures.values["student"][name]["interval"]
        assert low < measures.values["student"][name]["value"] < high
    assert measures.values["student"]["fid"]["value"] > 1 and "fid" not in measures.values["teacher"]
    measures.clip("features", torch.ones(PROMPTS, 12))
    assert 0 < measures.values["teacher"]["clip"]["value"] < measures.values["student"]["clip"]["value"] <= 100


def test_latents_that_cannot_be_compared() -> None:
    rows = torch.arange(2)

    def run(student: Tensor) -> None:
        compared(lambda p, n: torch.zeros(2, 3, 2, 2), lambda p, n: student, lambda x: x, rows, batch=2, extractors={})

    with pytest.raises(InputError, match=r"^student: expected finite latents, got NaN or infinity of prompt 0"):
        run(torch.full((2, 3, 2, 2), torch.nan))
    with pytest.raises(InputError, match=r"^student: expected latents \(2, 3, 2, 2\), as the teacher's, got \(2, 4,"):
        run(torch.zeros(2, 4, 2, 2))


@pytest.fixture
def report() -> dict[str, Any]:
    def measure(value: float, *interval: float) -> dict[str, Any]:
        return {"value": value, "interval": list(interval) or None}

    return {
        "teacher": {"parameters": 1000, "images_per_second": 2.0, "measures": {"images_distance": measure(0.4)}},
        "student": {
            "parameters": 560,
            "images_per_second": 3.1,
            "measures": {"images_distance": measure(0.1, 0.08, 0.13), "fid": measure(12.345)},
        },
        "sampling": {"steps": 25},
        "prompts": [{"text": "near", "seen": True, "images_distance": 0.05}, {"text": "<far>", "seen": False,
                    "images_distance": 0.15}],
        "left_out": {"recall": "too few"},
        "seconds": {"total": 3.0},
        "versions": {"torch": "2.13.0"},
        "features": "colors",
    }  # fmt: skip


def test_page(tmp_path: Path, report: dict[str, Any]) -> None:
    figures = {
        "samples": sample_grid({"teacher": torch.zeros(1, 3, 4, 4), "student": torch.zeros(1, 3, 4, 4)}, ["near"]),
        "losses": losses_over_time([1, 500, 900], {"output": [1.0, 0.5, 0.1]}),
    }
    path = write_comparison(tmp_path, report, figures)
    assert json.loads((tmp_path / "report.json").read_text()) == {"schema": 1} | report
    page = Page(path.read_text())
    assert page.open == [] and not {"script", "far"} & {tag for tag, _ in page.tags}
    for words in ("56 %", "1.55×", "0.080 to 0.130", "12.3", "Recall left out: too few.", "steps", "colors", "2.13.0"):
        assert words in page.text, words
    assert page.text.index("<far>") < page.text.index("near")  # the largest distance first
    assert "Precision" not in page.text and "Kernels" not in page.text  # for which there are no data
    sources = [value for _, found in page.tags for key, value in found.items() if key in ("src", "srcset", "href")]
    assert len(sources) == 4 and all(str(source).startswith("data:image/png;base64,") for source in sources)
    words = finding(report)
    assert "makes 1.55 times as many images per second" in words
    assert re.search(r"by 0\.100 \(RMS\), 25.% of the difference", words)


def test_a_page_of_several_sizes(tmp_path: Path, report: dict[str, Any]) -> None:
    """A table and figures for each size, by name; the finding names its size."""
    values = {model: {name: report[model][name] for name in ("images_per_second", "measures")} for model in MODELS}
    report["sampling"]["pixels"] = "32 x 48, 64 x 24"
    report["sizes"] = {"64 x 24": copy.deepcopy(values) | {"left_out": {"coverage": "too few of them"}}}
    report["sizes"]["64 x 24"]["student"]["measures"]["fid"]["value"] = 98.76
    grid = sample_grid({"teacher": torch.zeros(1, 3, 4, 6)}, ["near"])
    page = Page(write_comparison(tmp_path, report, {"samples 32 x 48": grid, "samples 64 x 24": grid}).read_text())
    parts = ["Measures, 32 x 48", "Recall left out", "Measures, 64 x 24", "98.8", "Coverage left out: too few of them.",
             "Samples, 32 x 48", "Samples, 64 x 24"]  # fmt: skip
    assert sorted(parts, key=page.text.index) == parts and page.open == []
    assert "Its images of 32 x 48 differ" in finding(report)
    del report["sizes"]["64 x 24"]["student"]["images_per_second"]
    with pytest.raises(InputError, match=r"an entry sizes.64 x 24.student.images_per_second"):
        write_comparison(tmp_path / "new", report)


def test_numbers_have_three_digits() -> None:
    values = {0.0: "0.000", 0.1234: "0.123", 1.0: "1.00", 12.345: "12.3", 123.4: "123", -2.5: "-2.50", 1e-5: "1.00e-05"}
    assert {value: number(value) for value in values} == values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("student.parameters", 0, "report.student.parameters: expected a positive number, got 0"),
        ("teacher.images_per_second", None, "report: expected an entry teacher.images_per_second"),
        ("student.measures.speed", {"value": 1}, "report.student.measures: expected of images_distance"),
        ("student.measures.fid", {}, "report: expected an entry student.measures.fid.value"),
        ("student.measures.fid.interval", [2, 1], r"report.student.measures.fid.interval: expected [low, high]"),
        ("seconds.total", None, "report: expected an entry seconds.total"),
        ("versions", None, "report: expected an entry versions"),
    ],
)
def test_bad_reports_write_nothing(tmp_path: Path, report: dict[str, Any], path: str, value: Any, message: str) -> None:
    refused(write_comparison, tmp_path, report, path, value, message)
