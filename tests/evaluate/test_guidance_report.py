# SPDX-License-Identifier: Apache-2.0
"""The report of schedules of guidance, for a small artificial experiment."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.errors import InputError
from fastdistill.evaluate import write_guidance_report
from fastdistill.evaluate.guidance import finding
from fastdistill.evaluate.guidance_figures import diversity_plane, prompt_samples
from tests.evaluate.faulty import refused
from tests.evaluate.test_report import Page

WINDOW = "4@8,-1@2,0"


def row(schedule: str, separation: float, variance: float, evaluations: int = 60, **more: Any) -> dict[str, Any]:
    return {
        "schedule": schedule,
        "grid": "karras:30@30..0.09",
        "seeds": 3,
        "images": 640,
        "right": 0.95,
        "right_interval": [0.93, 0.97],
        "separation": separation,
        "variance_ratio": variance,
        "variance_ratio_interval": [variance - 0.02, variance + 0.02],
        "precision": 0.8,
        "recall": 0.5,
        "vendi": 5.25,
        "evaluations_per_image": evaluations,
        "images_per_second": 1200 / evaluations,
        **more,
    }


def world(schedule: str, **more: Any) -> dict[str, Any]:
    names = dict.fromkeys(("dimension", "classes", "alpha"), None)
    moments = {"mean": 1.82, "variance": 0.016, "shift": 0.4, "variance_ratio": 0.04}
    theory = {"expected": {"mean": 1.8, "variance": 0.0161}, "standard_error": {"mean": 0.01, "variance": 0.001}}
    return {"schedule": schedule, "method": "ddim", "grid": "karras:30", "source": "recursion", **names, **moments} | (
        theory | more
    )


@pytest.fixture
def report() -> dict[str, Any]:
    shades = [row("1", 1.456, 0.5), row("0", 0.907, 0.9, 30), row(WINDOW, 1.192, 0.8, 38), row("2", 1.856, 0.4)]
    return {
        "title": "Guidance <by> window",
        "worlds": {"gaussian": {"rows": [world("2"), world(WINDOW, expected=None, source=None)]}},
        "models": {
            "shades": {
                "rows": shades,
                "recovered": [
                    {"schedule": WINDOW, "at": "separation", "value": 0.64, "interval": [0.5, 0.78]},
                    {"schedule": WINDOW, "at": "accuracy", "value": None, "interval": None},
                ],
            },
            "digits": {"rows": [row("0", 0.97, 0.718, 20), row("1", 1.2, 0.5, 40)], "recovered": []},
        },
        "students": {"window": row(WINDOW, 1.19, 0.79, 30, parameters=984867, seconds=38.0)},
        "seconds": {"total": 500.0, "students": 80},
        "versions": {"torch": "2.13.0"},
        "reproduce": ["fastdistill demo guidance"],
    }


def words(html: str) -> str:
    return re.sub(r"\s+", " ", Page(html).text)


def test_page(tmp_path: Path, report: dict[str, Any]) -> None:
    rows = report["models"]["shades"]["rows"]
    path = write_guidance_report(tmp_path, report, {"plane": diversity_plane(rows, report["students"])})
    assert json.loads((tmp_path / "report.json").read_text()) == {"schema": 1} | report
    html = path.read_text()
    page, text = Page(html), words(html)
    assert page.open == [] and "script" not in {tag for tag, _ in page.tags}
    for shown in (
        "Guidance <by> window",
        "64.0 %",
        "50.0–78.0",
        WINDOW,
        "1.82",
        "1.80 by recursion",
        "984 867",
        "38 s",
    ):
        assert shown in text, shown
    alt = next(str(attributes["alt"]) for tag, attributes in page.tags if tag == "img")
    assert f"{WINDOW}: 0.800 at separation 1.192" in alt
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_the_finding_is_worded_from_the_numbers(report: dict[str, Any]) -> None:
    text = re.sub(r"\s", " ", finding(report))
    assert "On shades, constant guidance of w = 1 takes 44 % of the variance within a class." in text
    assert f"The window {WINDOW} gives back 64 % of what the constant weight with the same separation lost" in text
    assert "with 37 % fewer evaluations of the model." in text
    assert "2.00 times as many images per second as constant guidance" in text
    report["models"]["shades"]["recovered"][0]["value"] = -0.1
    assert "No window gives back variance at the same separation." in finding(report)
    report["models"]["shades"]["recovered"][0]["value"] = 0.64
    report["models"]["shades"]["rows"][2]["separation"] = 1.0  # hardly more than without guidance
    assert "No window gives back variance at the same separation." in finding(report)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("models.shades.rows.0.right", 1.5, "report.models.shades.rows.0.right: expected a share from 0 to 1, got 1.5"),
        ("models.shades.rows.0.right", math.nan, "report.models.shades.rows.0.right: expected a share from 0 to 1"),
        ("models.shades.rows.1.schedule", "8@", "report.models.shades.rows.1.schedule: expected a schedule"),
        ("models.digits.rows.0.images", 0, "report.models.digits.rows.0.images: expected a positive number, got 0"),
        ("models.digits.rows.0.separation", None, "report: expected an entry models.digits.rows.0.separation"),
        ("models.shades.rows.0.variance_ratio_interval", [1, 0], "variance_ratio_interval: expected [low, high]"),
        ("models.shades.recovered.0.at", "w", "recovered.0.at: expected separation or accuracy, got w"),
        ("models.shades.recovered.0.schedule", "5", "recovered.0.schedule: expected the schedule of a row, got 5"),
        ("models", {}, "report.models: expected at least one task by name"),
        ("students.window.parameters", 0, "report.students.window.parameters: expected a positive number"),
        ("worlds.gaussian.rows.1.shift", None, "report: expected an entry worlds.gaussian.rows.1.shift"),
        ("worlds", [], "report.worlds: expected a mapping by name"),
        ("seconds.total", None, "report: expected an entry seconds.total"),
    ],
)
def test_bad_reports_write_nothing(tmp_path: Path, report: dict[str, Any], path: str, value: Any, message: str) -> None:
    refused(write_guidance_report, tmp_path, report, path, value, message)


def test_samples_have_a_panel_for_each_prompt() -> None:
    images = torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    right = [True, True, False, True, True, True]
    figure = prompt_samples({"w = 0": images, "window": images}, ["a red seven", "a blue two"], {"window": right})
    shown = [image.get_array() for image in figure.axes[0].get_images()]
    wanted = images.flatten(0, 1).permute(0, 2, 3, 1)
    order = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]  # a panel has a row for each schedule
    assert len(shown) == 12
    assert all(torch.equal(torch.as_tensor(shown[i]), wanted[place]) for i, place in enumerate(order))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"a red seven", "a blue two", "2 of 3 right", "3 of 3 right"} <= set(texts)
    assert "Window wrong: 1." in figure.get_label()
    with pytest.raises(InputError, match=r"samples\['w = 0'\]: expected images \[1, n"):
        prompt_samples({"w = 0": images}, ["a red seven"], {})


def test_the_plane_has_a_line_of_constants_and_points_above_it(report: dict[str, Any]) -> None:
    figure = diversity_plane(report["models"]["shades"]["rows"], report["students"])
    (axes,) = figure.axes
    line = axes.lines[0]
    assert list(line.get_xdata()) == [0.907, 1.456, 1.856] and list(line.get_ydata()) == [0.9, 0.5, 0.4]
    assert {text.get_text() for text in axes.texts} >= {"w = 0", "w = 1", "w = 2", WINDOW}
