# SPDX-License-Identifier: Apache-2.0
"""The small experiment from the command line: its report, and what happens if it is stopped, repeated or damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdistill.cli import main
from fastdistill.data.fingerprint import sha256_of_json
from fastdistill.files import locked
from fastdistill.tasks import processes
from fastdistill.tasks.digits import worker
from fastdistill.tasks.processes import Job, Processes
from tests.processes import once

SMALL: dict[str, Any] = {
    "cache_images": 48,
    "images_per_prompt": 1,
    "channels": [8, 16],
    "train": {"steps": 30, "batch": 4, "warmup": 2, "checkpoint_every": 3, "log_every": 3},
    "sampling": {"steps": 1},
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def arguments(output: Path, changes: dict[str, Any]) -> list[str]:
    output.parent.mkdir(exist_ok=True)
    config = output.parent / f"{output.name}.yaml"
    config.write_text(yaml.safe_dump(SMALL | changes))
    return ["demo", "digits", "--config", str(config), "--output", str(output)]


def start(output: Path, workers: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastdistill", *arguments(output, {"workers": workers})]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"STARTED_FOR": str(output)},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


@pytest.fixture
def workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts for the models run in this process, which has imported everything; the results are the same."""
    monkeypatch.setattr(Processes, "run", here)


def here(_: Processes, job: Job, *__: object) -> None:
    worker.run(job.directory / "job.json", lambda **fields: None)


def figures(output: Path) -> dict[str, Any]:
    report = json.loads((output / "report.json").read_text())
    models = {"teacher": report["teacher"], **report["students"]}
    return {name: [model["seen"], model["unseen"], model["parameters"]] for name, model in models.items()}


def weights(output: Path) -> dict[str, bytes]:
    found = sorted(output.glob("models/*/student/*.safetensors"))
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""

    def make(output: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Processes, "run", here)
            assert main(arguments(output, {"workers": 1})) == 0

    return once(tmp_path_factory, "digits/whole", make)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def test_report(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    for model in (report["teacher"], *report["students"].values()):
        assert 0 <= model["seen"] <= 1 and 0 <= model["unseen"] <= 1
        assert model["seen_interval"][0] <= model["seen"] <= model["seen_interval"][1]
        assert model["images_per_second"] > 0
    assert report["teacher"]["parameters"] == 984_867
    assert set(report["students"]) == {"random_conditioning", "paired"}
    assert report["students"]["paired"]["seconds"] > 0 and report["seconds"]["total"] > 0
    assert set(report["versions"]) >= {"fastdistill", "torch", "diffusers", "python"}
    assert set(report["backend"]) >= {"noise_gather", "feature_match", "adamw_ema"}
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page) and "<script" not in page


def test_each_student_is_a_run(whole: Path, tmp_path: Path) -> None:
    """The commands of a run file accept it; the students share the cache."""
    file = whole / "models" / "paired-0" / "training" / "run.yaml"
    assert main(["export", str(file), "--to", str(tmp_path / "student")]) == 0
    weights = "diffusion_pytorch_model.safetensors"
    exported = (whole / "models" / "paired-0" / "student" / weights).read_bytes()
    assert (tmp_path / "student" / weights).read_bytes() == exported
    assert {place.name for place in (whole / "cache").iterdir() if place.is_dir()} == {"prompts", "latents"}


@pytest.mark.slow
def test_a_part_in_a_process_of_its_own(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = figures(copy)
    (copy / "models" / "paired-0" / "result.json").unlink()
    assert main(arguments(copy, {})) == 0
    assert f"Report: {copy}/report.html" in capfd.readouterr().out
    assert figures(copy) == before


def test_again_reuses_everything(copy: Path) -> None:
    before, trained = figures(copy), weights(copy)
    times = {path: path.stat().st_mtime_ns for path in copy.glob("models/**/*") if path.is_file()}
    assert main(arguments(copy, {})) == 0
    assert figures(copy) == before and weights(copy) == trained
    assert {path: path.stat().st_mtime_ns for path in times} == times  # no process was started


def checkpoints(output: Path) -> list[Path]:
    return list(output.glob("models/*/training/step-*.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("workers_here")
def test_stopped_while_students_train(whole: Path, tmp_path: Path) -> None:
    """By each signal in turn, after it has continued from the previous stop."""
    output = tmp_path / "stopped"
    for done in ("cache", "models/teacher"):
        shutil.copytree(whole / done, output / done)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process, before, deadline = start(output, 2), set(checkpoints(output)), time.monotonic() + 120
        while before.issuperset(checkpoints(output)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        code, _, error = finish(process)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        if number != signal.SIGKILL:
            assert error.strip() == "fastdistill: stopped; run the same command again to go on"
        assert not (output / "report.json").exists()
        wait_for_orphans(output)
    assert main(arguments(output, {"workers": 1})) == 0
    assert figures(output) == figures(whole) and weights(output) == weights(whole)


def environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has ended
        return b""


def wait_for_orphans(output: Path) -> None:
    """Wait until no worker of the stopped run is left: each one notices after a step that its parent is gone."""
    deadline, wanted = time.monotonic() + 60, f"STARTED_FOR={output}\0".encode()
    while time.monotonic() < deadline:
        if not any(wanted in environment(process) for process in Path("/proc").glob("[0-9]*")):
            return
        time.sleep(0.1)
    raise AssertionError("a worker outlived its parent")


def test_stopped_at_once(tmp_path: Path) -> None:
    process = start(tmp_path / "stopped")
    status, deadline = Path(f"/proc/{process.pid}/status"), time.monotonic() + 60
    while time.monotonic() < deadline:  # until the command handles SIGTERM; before that, Python itself is starting
        (heard,) = re.findall(r"^SigCgt:\s*(\w+)$", status.read_text(), re.MULTILINE)
        if int(heard, 16) >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, out, error = finish(process)
    # If the signal arrives in code given to exec (as in imports), Python ends by the signal; a shell shows 130 too.
    assert code in (130, -signal.SIGINT) and not out, error
    assert error.strip() == "fastdistill: stopped; run the same command again to go on"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=str)
def test_memory_that_is_not_there_is_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["worker", "job.json"])
    assert processes.serve(run, "lower --train.batch") == 2
    assert json.loads(capsys.readouterr().out) == {"error": "not enough memory: lower --train.batch"}


@pytest.mark.slow
def test_memory_that_is_not_there_is_one_line(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nexec prlimit --data={2 * 2**30} -- {sys.executable} "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(limited))
    shutil.copytree(whole / "cache", tmp_path / "large" / "cache")
    train = SMALL["train"] | {"batch": 2**20, "steps": 1}
    assert main(arguments(tmp_path / "large", {"train": train, "workers": 1})) == 2
    assert "not enough memory: lower --train.batch" in one_line(capsys)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_places_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for place in (f"{tmp_path}/file/run", "/proc/run"):
        assert main(["demo", "digits", "--output", place]) == 2
        assert one_line(capsys).startswith(f"fastdistill: {place}: ")


@pytest.mark.usefixtures("workers_here")
def test_a_damaged_shard_is_made_anew(whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = (copy / "cache" / "latents").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    (student,) = copy.glob("models/random_conditioning-0")
    shutil.rmtree(student)
    assert main(arguments(copy, {"workers": 1})) == 0
    assert re.match(rf"fastdistill: {copy}/cache/latents/\S+\.safetensors: ", one_line(capsys))
    # the damaged shard was made again, and everything after it is the same
    assert figures(copy) == figures(whole) and weights(copy) == weights(whole)


def test_a_cache_of_another_teacher_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = copy / "cache" / "latents" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["fingerprint"]["model"] = "0" * 64
    content["fingerprint_sha256"] = sha256_of_json(content["fingerprint"])
    manifest.write_text(json.dumps(content))
    assert main(arguments(copy, {})) == 2
    assert re.search(r"copy/cache/latents: .*model: expected '\w{64}', got '0{64}'", one_line(capsys))


def test_two_at_once(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(copy):
        assert main(arguments(copy, {})) == 2
    assert f"{copy}: another process is writing here (process {os.getpid()})" in one_line(capsys)
