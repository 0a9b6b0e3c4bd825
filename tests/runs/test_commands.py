# SPDX-License-Identifier: Apache-2.0
"""The commands of a run, on one that has ended; and what they say of mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from fastdistill import runs
from fastdistill.cli import main
from fastdistill.runs import RunConfig


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        out, error = capsys.readouterr()
        return code, out, error

    yield call


def test_commands(
    again: Path,
    said: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: Callable[[str], Path],
) -> None:
    file = str(again)
    code, out, error = said("init", str(saved("sd")))
    assert code == 0 and out == runs.init(saved("sd")) and not error
    code, out, error = said("distill", file, "--json")
    assert code == 0 and json.loads(out)["steps"] == 3
    given = ("--prompt", "a cat", "a dog", "--to", str(tmp_path / "images"), "--size", "16", "32", "--json")
    code, out, error = said("sample", file, *given)
    assert code == 0 and [Image.open(file).size for file in json.loads(out)] == [(32, 16)] * 2
    code, out, error = said("export", file, "--to", str(tmp_path / "exported"), "--dtype", "bfloat16")
    assert code == 0 and out.startswith(f"{tmp_path / 'exported'}: ") and (tmp_path / "exported" / "README.md").exists()
    with monkeypatch.context() as ranks:  # another of torchrun's processes has nothing to do
        ranks.setenv("TORCHELASTIC_RUN_ID", "a run")
        ranks.setenv("RANK", "1")
        assert said("export", file, "--to", str(tmp_path / "never")) == (0, "", "")
    assert not (tmp_path / "never").exists()
    code, out, _ = said("distill", file, "--train.steps", "7", "--dry-run")
    assert code == 0
    (tmp_path / "dry.yaml").write_text(out)
    assert runs.load(tmp_path / "dry.yaml").train.steps == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill",), r"distill: expected a run file \(fastdistill init FOLDER > run.yaml\), got nothing"),
        (("distill", "--json"), "distill: expected a run file .*, got '--json'"),
        (("distill", "nothing.yaml"), "nothing.yaml"),
        (("init",), "init: expected a pipeline folder of diffusers, got nothing"),
        (("init", "nothing"), "nothing: expected a pipeline folder of diffusers, got no folder"),
        (("sample", "RUN"), "sample: expected one of --prompts FILE and --prompt TEXT"),
        (("sample", "RUN", "--prompts", "nothing.txt"), r"--prompts: nothing.txt: could not be read: No such file"),
        (("sample", "RUN", "--prompts", "."), r"--prompts: \.: could not be read: Is a directory"),
        (("sample", "RUN", "--prompts", ""), r"prompts: input should be a text that is not empty, got ''"),
        (("sample", "RUN", "--prompt", "a", "--to", ""), r"to: input should be a text that is not empty, got ''"),
        (
            ("sample", "RUN", "--prompt", "a", "--seeds", "0", "-1"),
            r"seeds: expected numbers in \[0, .*\), got -1",
        ),
        (
            ("sample", "RUN", "--prompt", "a", "--guidance-scale", "nan"),
            "guidance_scale: expected a finite .* nan",
        ),
        (
            ("sample", "RUN", "--prompt", "a", "--size", "16", "65538"),
            "width: expected at most 65,536 pixels",
        ),
        (("evaluate", "RUN", "--evaluate.features", ""), "evaluate.features: input should be a text that is not"),
        (("export", "RUN", "--to", "x", "--dtype", "float17"), r"--dtype: expected one of .*, got float17"),
        (("export", "RUN"), r"export: expected a new folder \(--to FOLDER\), got none"),
        (("export", "RUN", "--to", "x", "--train.lr", "-3"), r"export: 1 problem"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    message: str,
    ended: tuple[RunConfig, Path],
    said: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, error = said(*(str(ended[1]) if argument == "RUN" else argument for argument in arguments))
    assert code == 2 and not out
    assert error.startswith("fastdistill: ") and re.search(message, error), error
