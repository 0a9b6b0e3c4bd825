# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastdistill.errors import StorageError
from fastdistill.evaluate import page as module
from fastdistill.evaluate import probability_curve, write_report
from fastdistill.evaluate.page import count, duration, percent
from fastdistill.evaluate.report import finding
from tests.evaluate.faulty import refused


def model(seen: float, unseen: float, parameters: int, **more: Any) -> dict[str, Any]:
    return {"seen": seen, "unseen": unseen, "parameters": parameters, **more}


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "title": "Digits <by> prompt",
        "teacher": model(0.98, 0.96, 1000, seen_interval=[0.97, 0.99], seen_n=512, images_per_second=210.6),
        "students": {
            "random_conditioning": model(0.93, 0.84, 500, unseen_mean=0.864, unseen_std=0.0123, seeds=[0, 1, 2]),
            "paired": model(0.94, 0.0096, 500, seconds=251),
        },
        "seconds": {"total": 588.4, "cache": 41},
        "versions": {"torch": "2.13.0"},
        "backend": {"feature_match": "cpp"},
        "judge": {"accuracy": 0.97, "interval": [0.95, 0.98], "n": 540},
    }


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))  # narrow spaces too


def test_report(tmp_path: Path, report: dict[str, Any]) -> None:
    folder = tmp_path / "new" / "digits"
    path = write_report(folder, report, {"probability": probability_curve([0.1, 0.5])})
    assert sorted(file.name for file in folder.iterdir()) == ["report.html", "report.json"]
    assert json.loads((folder / "report.json").read_text()) == {"schema": 1} | report
    html = path.read_text()
    page = Page(html)
    assert page.open == []
    assert "Digits <by> prompt" in page.text
    for words in (
        "98.0 %",
        "97.0–99.0",
        "86.4 %",
        "± 1.2 % over 3 seeds",
        "4 min 11 s",
        "211",
        "feature_match",
        "2.13.0",
        "540",
    ):
        assert words in page.text, words
    assert "84.0 %" not in page.text  # the mean over seeds replaces the single value
    (image,) = (attributes for tag, attributes in page.tags if tag == "img")
    assert "0.100 at t = 0" in str(image["alt"])
    assert "script" not in {tag for tag, _ in page.tags}
    links = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "srcset", "href")
    ]
    assert len(links) == 2 and len(set(links)) == 2  # light and dark
    assert all(str(link).startswith("data:image/png;base64,") for link in links)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def likeness(seen: float, unseen: float) -> dict[str, Any]:
    each = {"interval": [0.01, 0.9], "each": [0.1, 0.2]}
    kinds = {"seen": seen, "unseen": unseen}
    return {
        kind: {"distance": {"value": value, "unrelated": 0.4, **each}, "frechet": {"value": 3 * value, **each}}
        for kind, value in kinds.items()
    }


def test_how_far_samples_are_from_the_teachers(tmp_path: Path, report: dict[str, Any]) -> None:
    report["students"]["random_conditioning"]["likeness"] = likeness(0.2, 0.31)
    report["students"]["paired"]["likeness"] = likeness(0.2, 0.62)
    page = Page(write_report(tmp_path, report).read_text())
    assert page.open == []
    for words in ("1.55 ×", "0.310", "0.620", "0.930", "3.10", "95 %: 0.010–0.900", "seeds: 0.100, 0.200"):
        assert words in page.text, words
    assert "Random conditioning's samples of these prompts are 1.55 times as far from the teacher's" in page.text
    for part, value, message in (
        ("frechet.value", -1.0, "expected a number from 0, got -1.0"),
        ("distance.interval", [0.2, 0.1], "expected [low, high], got [0.2, 0.1]"),
        ("distance", None, "expected an entry students.paired.likeness.seen.distance.value, got none"),
    ):
        refused(write_report, tmp_path / "new", report, f"students.paired.likeness.seen.{part}", value, message)


def test_texts_of_a_report_are_escaped(tmp_path: Path, report: dict[str, Any]) -> None:
    hard = '<script>alert("x")</script> \' &amp; {{ 1 }} 红 \ud800 \x00\x07'
    report |= {"title": hard, "finding": hard, "device": hard, "date": hard, "reproduce": [hard]}
    report["versions"] = report["backend"] = {hard: hard}
    report["students"][hard] = report["students"]["paired"]
    figure = probability_curve([0.1, 0.5])
    figure.set_label(hard)
    path = write_report(tmp_path, report, {hard: figure})
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    shown = hard.replace("\ud800", "\\ud800").replace("\x00\x07", "\\x00\\x07")
    (image,) = (attributes for tag, attributes in page.tags if tag == "img")
    assert image["alt"] == shown
    assert page.open == [] and "script" not in {tag for tag, _ in page.tags}
    assert "".join(page.words).count(shown) == 12  # every text given; the student's name is in a tile and in a row
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {"schema": 1} | report


def test_finding_is_worded_from_the_numbers(report: dict[str, Any]) -> None:
    words = re.sub(r"\s", " ", finding(report))
    assert (
        "a student with 50 % of the parameters keeps 90 % of the teacher's accuracy with random conditioning" in words
    )
    assert words.endswith(", against 1 % with paired prompts only.")
    report["teacher"]["unseen"] = 0.0
    assert "keeps n/a" in finding(report)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("teacher", None, "report: expected an entry teacher.seen"),
        ("students.paired.unseen", None, "report: expected an entry students.paired.unseen"),
        ("students.paired.unseen", 95.0, "report.students.paired.unseen: expected an accuracy from 0 to 1, got 95.0"),
        ("students.paired.seen", math.nan, "report.students.paired.seen: expected an accuracy"),
        ("seconds.total", None, "report: expected an entry seconds.total"),
        ("backend", None, "report: expected an entry backend"),
        ("versions.torch", math.nan, "report: expected plain JSON"),
        ("versions.torch", {1, 2}, "report: expected plain JSON"),
    ],
)
def test_bad_reports_write_nothing(tmp_path: Path, report: dict[str, Any], path: str, value: Any, message: str) -> None:
    refused(write_report, tmp_path, report, path, value, message)


def test_a_failing_figure_leaves_the_old_report(tmp_path: Path, report: dict[str, Any], monkeypatch: Any) -> None:
    before = write_report(tmp_path, report).read_text()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "png", interrupt)
    report["title"] = "Another"
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, report, {"probability": probability_curve([0.1, 0.5])})
    assert (tmp_path / "report.html").read_text() == before
    assert json.loads((tmp_path / "report.json").read_text())["title"] == "Digits <by> prompt"


def test_a_file_in_the_way(tmp_path: Path, report: dict[str, Any]) -> None:
    (tmp_path / "digits").write_text("")
    with pytest.raises(StorageError, match="digits"):
        write_report(tmp_path / "digits", report)


def test_formats() -> None:
    plain = {0.04: "0.0 s", 9.96: "10.0 s", 42.4: "42 s", 59.6: "1 min 00 s", 432.2: "7 min 12 s", 3900: "1 h 05 min"}
    assert {seconds: re.sub(r"\s", " ", duration(seconds)) for seconds in plain} == plain
    assert re.sub(r"\s", " ", count(1234567.4)) == "1 234 567"
    assert re.sub(r"\s", " ", percent(0.914)) == "91.4 %"
