# SPDX-License-Identifier: Apache-2.0
"""The command line and the doctor: their output, and their messages for errors."""

from __future__ import annotations

import contextlib
import importlib.abc
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import fastdistill
from fastdistill import commands
from fastdistill.cli import main
from fastdistill.commands._bars import Bars
from fastdistill.errors import Stopped
from fastdistill.ops import OPS, feature_match, use, used
from fastdistill.tasks.digits import teacher
from fastdistill.tasks.digits.config import DigitsConfig
from fastdistill.train.config import from_yaml
from tests.processes import call

NAMES = ", ".join(dict.fromkeys(name.partition(" ")[0] for name in commands.listed()))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, error = capsys.readouterr()
    return code, out, error


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",), ("demo", "-h"), ("profile", "--help")])
def test_help(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, out, error = said(capsys, *arguments)
    assert code == 0 and not error
    for command in ("demo digits", "teacher digits", "teacher shades", "profile digits", "profile replay", "doctor"):
        assert f"  {command} " in out
    assert [line.split("  ")[1] for line in out.splitlines() if line.startswith("  ") and line[2:3].isalpha()] == [
        *commands.listed()
    ]
    assert all(len(line) <= 100 for line in out.splitlines())


@pytest.mark.parametrize(
    "command",
    [
        ("demo", "context"),
        ("demo", "digits"),
        ("teacher", "digits"),
        ("teacher", "shades"),
        ("teacher", "context"),
        ("doctor",),
        ("profile", "digits"),
        ("profile", "replay"),
    ],
)
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: fastdistill {' '.join(command)}" in out
    assert "``" not in out
    if command[0] in ("demo", "teacher"):
        assert "train.lr FLOAT" in out and "Learning rate" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version")[1].strip() == fastdistill.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("docter",),
            f"fastdistill: command: expected {NAMES}, got 'docter' (did you mean doctor? fastdistill --help)",
        ),
        (("demo",), "fastdistill: demo: expected context, digits or guidance, got none"),
        (("profile",), "fastdistill: profile: expected digits or replay, got none"),
        (("profile", "replay"), "fastdistill: profile replay: expected a file that a profile left, got nothing"),
        (
            ("profile", "replay", "none.pt"),
            "fastdistill: call: expected a file that a profile left, got none.pt, which is not there",
        ),
        (("teacher", "cats"), "fastdistill: teacher: expected context, digits or shades, got cats"),
        (("demo", "digits", "--config"), "fastdistill: --config: expected a YAML file, got nothing"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert said(capsys, *arguments) == (2, "", message + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train.step", "3"), "--train.step: no such option (did you mean --train.steps?)"),
        (("--train.lr", "x"), "--train.lr: expected FLOAT, got x"),
        (("--train.lr=x",), "--train.lr: expected FLOAT, got x"),
        (("--train.lr", "true"), "--train.lr: expected FLOAT, got true"),
        *(
            (("--train.steps", v), f"--train.steps: expected INT, got {v}")
            for v in ("true", "1.0", '"1"', "1e3", "null")
        ),
        (("--train.steps=1.0",), "--train.steps: expected INT, got 1.0"),
        (("--train.micro-batch", "1.0"), "--train.micro-batch: expected null or INT, got 1.0"),
        (("--train.betas", "0.9", "false"), "--train.betas: expected FLOAT FLOAT, got 0.9 false"),
        (("--train.lr",), "--train.lr: expected 1 value, got nothing"),
        (("--train.betas", "0.9"), "--train.betas: expected 2 values, got 0.9"),
        (("--train.micro_batch", "two"), "--train.micro-batch: expected null or INT, got two"),
        (("--train.fuse", "maybe"), "--train.fuse: expected one of True, False, auto, got maybe"),
        *(
            (
                (f"--train.{option}", "maybe"),
                f"--train.{option.replace('_', '-')}: expected --train.teacher-ahead or --train.no-teacher-ahead"
                " without a value, got maybe",
            )
            for option in ("teacher_ahead", "no-teacher-ahead")
        ),
        (
            ("--train.precision", "int8"),
            "--train.precision: expected one of auto, measured, float32, bfloat16, float16, got int8",
        ),
        (("extra",), "demo digits: expected options (--...), got extra"),
    ],
)
def test_a_wrong_option_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert said(capsys, "demo", "digits", *arguments, "--dry-run") == (2, "", f"fastdistill: {message}\n")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "int8"), "--dtype: expected one of float32, bfloat16, float16, null, got int8"),
        (("--step", "x"), "--step: expected null or INT, got x"),
        (("--step",), "--step: expected 1 value, got nothing"),
        (
            ("--train.precision", "int8"),
            "--train.precision: expected one of auto, measured, float32, bfloat16, float16, got int8",
        ),
        (("extra",), "export: expected options (--...), got extra"),
    ],
)
def test_a_wrong_option_is_one_line_in_every_encoding(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    encoding: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    """tyro draws boxes around its errors if the encoding has the characters."""
    (tmp_path / "run.yaml").write_text("teacher: folder")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main(["export", str(tmp_path / "run.yaml"), *options]) == 2
    assert capsys.readouterr().err == f"fastdistill: {message}\n"


@pytest.mark.parametrize(("given", "expected"), [({}, ("5000", "1")), ({"OMP_WAIT_POLICY": "active"}, (None, None))])
def test_threads_of_commands_wait_briefly(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    """Said before torch is imported, where the environment says nothing."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # restored in the end
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0
    assert (os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME")) == expected
    loaded = "import sys, fastdistill.cli, fastdistill.commands; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", loaded], check=True)


@pytest.mark.parametrize("spelled", [("--train.micro-batch", "null"), ("--train.micro_batch=none",)])
def test_null_as_in_the_file(capsys: pytest.CaptureFixture[str], spelled: tuple[str, ...]) -> None:
    code, out, error = said(capsys, "demo", "digits", "--train.micro-batch", "2", *spelled, "--dry-run")
    assert (code, error) == (0, "") and "micro_batch: null" in out


@pytest.mark.parametrize("spelled", [("--train.fuse", "true"), ("--train.fuse=true",)])
def test_switches_with_other_values_as_in_the_file(
    capsys: pytest.CaptureFixture[str], spelled: tuple[str, ...]
) -> None:
    code, out, error = said(capsys, "demo", "digits", *spelled, "--dry-run")
    assert (code, error) == (0, "") and "fuse: true" in out


def test_all_mistakes_of_a_configuration_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = said(capsys, "demo", "digits", "--train.steps", "-3", "--cache-images", "2", "--dry-run")
    assert code == 2 and not out
    assert error.splitlines() == [
        "fastdistill: demo digits: 2 problems",
        "  cache_images: input should be greater than or equal to 48, got 2",
        "  train.steps: input should be greater than or equal to 1, got -3",
    ]


def test_a_teacher_is_compared_by_its_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are not compared, because other machines give other bits; a stop during training is reported by
    itself."""
    made = teacher.provenance() | {"sha256": "0" * 64}
    monkeypatch.setattr(teacher, "train_teacher", lambda *_: made)
    code, out, error = said(capsys, "teacher", "digits")
    assert code == 0 and "teacher.safetensors: trained by the shipped weights' recipe\n" in out
    made["recipe"]["weight_limit"] = 1.0
    out = said(capsys, "teacher", "digits")[1]
    assert "another recipe than the shipped weights' (weight_limit: expected 1.0, got 5.0)\n" in out

    def stopped(*_: object) -> None:
        raise Stopped("stopped after step 1 of 2", signal.SIGTERM)

    monkeypatch.setattr(teacher, "train_teacher", stopped)
    code, _, error = said(capsys, "teacher", "digits")
    assert code == 143 and "stopped" not in error


def test_a_dry_run_prints_what_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({"train": {"lr": 0.5}, "seeds": 3}))
    arguments = ("demo", "digits", "--config", str(tmp_path / "first.yaml"), "--seeds", "2", "--dry-run")
    code, out, _ = said(capsys, *arguments)
    assert code == 0
    (tmp_path / "second.yaml").write_text(out)
    config = from_yaml(DigitsConfig, tmp_path / "second.yaml")
    assert config.train.lr == 0.5 and config.seeds == 2 and config.train.steps == DigitsConfig().train.steps


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["versions"]["fastdistill"] == fastdistill.__version__
    assert "cpu" in found["devices"]
    for op in OPS:
        rows = [row for row in found["kernels"] if row["op"] == op]
        assert rows[-1]["kernel"] == "reference" and rows[-1]["reason"] is None
        assert sum("cpu" in row["chosen_for"] for row in rows) == 1
    code, out, _ = said(capsys, "doctor")
    assert code == 0 and all(op in out for op in OPS)
    summary = found["extensions"]["_cuda"]
    assert summary == "built" or out.count(summary) == 1  # once, not once per kernel


class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "fastdistill._cpu":
            raise ModuleNotFoundError(name)


def without_extension() -> tuple[str, str]:
    """The output of ``doctor`` without the extension, and the error for the C++ kernel."""
    sys.meta_path.insert(0, Hidden())
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["doctor", "--json"]) == 0
    given = [torch.ones(2)], [torch.zeros(2)]
    assert feature_match(*given).loss == 1
    assert used() == {"feature_match": ["reference"]}
    with pytest.raises(RuntimeError) as refused, use("cpp"):
        feature_match(*given)
    return out.getvalue(), str(refused.value)


def test_without_the_extension_the_reference_runs_and_the_reason_is_told() -> None:
    out, refused = call(without_extension)
    reason = "the extension fastdistill._cpu was not built (no C++ compiler when it was installed?)"
    rows = [row for row in json.loads(out)["kernels"] if row["op"] != "attention"]  # its kernels are torch's
    assert all(row["reason"] == reason for row in rows if row["kernel"] == "cpp")
    assert all(row["chosen_for"] == ["cpu"] for row in rows if row["kernel"] == "reference")
    assert f"feature_match: kernel 'cpp' cannot run this call on cpu: {reason}" in refused


def test_a_reader_that_has_gone() -> None:
    """As with ``| head``."""
    done = subprocess.run(f"{sys.executable} -m fastdistill --help | true", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_same_warning_comes_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_: object) -> None:
        warnings.simplefilter("always")
        for text in ("one", "two", "one"):
            warnings.warn(text, stacklevel=1)

    monkeypatch.setattr("fastdistill.cli._run", warned)
    assert said(capsys, "doctor") == (0, "", "fastdistill: one\nfastdistill: two\n")


def test_a_bar_that_shows_nothing_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """An error before the first step prints only its own line."""
    with Bars() as bars:
        bars.begin("samples")
    assert capsys.readouterr().err == ""
    with Bars() as bars:
        bars.show(bars.begin("samples"), 1, "samples", total=2)
    assert "samples" in capsys.readouterr().err
