# SPDX-License-Identifier: Apache-2.0
"""Paths from users: ``~`` is the home directory everywhere, and invalid paths are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill import LatentCache, PromptBank, TrainConfig, generate_latent_cache, open_pipeline, read_prompts
from fastdistill.errors import InputError, StorageError
from fastdistill.evaluate.report import write_report
from fastdistill.files import located
from fastdistill.train.config import from_yaml
from fastdistill.train.profiling import profile_steps, replay
from tests import tiny

WRONG: list[Any] = [3, "", b"runs", "a\0b", "~nobody-has-this-name/runs"]


def cache(path: Any) -> None:
    generate_latent_cache(
        path, lambda rows, _: torch.zeros(len(rows), 2), torch.zeros(3).long(), (2,), torch.float32, {}
    )


def bank() -> PromptBank:
    return PromptBank.build(["a", "b"], lambda texts: torch.zeros(len(texts), 2, 3))


#: Functions that take a path, and the files that they write there.
TAKERS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda path: bank().save(path), "manifest.json"),
    (PromptBank.load, ""),
    (PromptBank.open, ""),
    (cache, "manifest.json"),
    (LatentCache.load, ""),
    (LatentCache.open, ""),
    (lambda path: tiny.trainer().fit(path), "metrics.jsonl"),
    (lambda path: profile_steps(lambda: None, path, steps=1), "trace.json"),
    (read_prompts, ""),
    (lambda path: from_yaml(TrainConfig, path), ""),
    (replay, ""),
    (open_pipeline, ""),
]


@pytest.mark.parametrize(("take", "left"), TAKERS)
def test_the_home_directory(
    take: Callable[[Any], Any], left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    if left:
        take("~/runs/ä b")
        assert (home / "runs" / "ä b" / left).is_file()
    else:
        with pytest.raises((StorageError, InputError), match=str(home)):
            take(Path("~", "runs"))
    assert not list(here.iterdir())


@pytest.mark.parametrize(("take", "left"), TAKERS)
def test_what_is_no_path(
    take: Callable[[Any], Any], left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in WRONG[:2] if left == "metrics.jsonl" else WRONG:
        with pytest.raises(InputError, match="expected the path of a file or directory, got "):
            take(path)
    assert not list(tmp_path.iterdir())


def test_reports_and_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("~/a") == tmp_path / "a" and located(tmp_path) == tmp_path and located("a/~") == Path("a/~")
    with pytest.raises(InputError, match=r"^directory: expected the path of a file or directory, got None$"):
        located(None, "directory")
    with pytest.raises(InputError, match=r"^path: .*got ~nobody-has-this-name, a home directory that is not known$"):
        located("~nobody-has-this-name")
    with pytest.raises(InputError, match="report: expected"):
        write_report("~/report", {})
