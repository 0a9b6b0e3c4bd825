# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` with simulated stages: limits, interrupts, crashes, and the results that are left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import benchmarks.gpu
from benchmarks.gpu import PARTS, Purse, Stage, plan, run
from benchmarks.run import parser

ROOT = Path(__file__).parent.parent


def python(name: str, code: str, seconds: float = 60, purse: Purse | None = None) -> Stage:
    return Stage(name, [sys.executable, "-c", code], seconds, purse=purse)


def records(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.gpu, "_LEAST", 0.1)
    monkeypatch.setattr(benchmarks.gpu, "_GRACE", 2.0)


def test_it_ends_at_once_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmarks.gpu.main([]) == 2
    said = capsys.readouterr()
    assert not said.out and "finds no CUDA device; nothing was run" in said.err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(["4/3"], "PART: expected some of 1/3, 2/3, 3/3, got '4/3'"), (["--minutes", "0"], "--minutes: expected 1")],
)
def test_mistakes_are_told(wrong: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmarks.gpu.main(wrong)
    assert stop.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_a_stage_is_stopped_at_its_limit_and_keeps_what_it_said(tmp_path: Path) -> None:
    code = "import time; print('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('evidence')"
    slow = python("slow", code, 1.2)
    assert run([slow, python("late", "pass", 0.05), python("next", "print('ran')")], tmp_path, minutes=2) == 1
    assert slow.ended == "stopped after 1 s" and 1 < slow.seconds < 20
    log = (tmp_path / "stages.log").read_text()
    assert log.index("begun\n") < log.index("evidence\n") < log.index("slow: stopped") < log.index("\nran\n")
    assert [(r["stage"], r["ended"]) for r in records(tmp_path)] == [
        ("slow", "stopped after 1 s"), ("late", "not begun: no time left"), ("next", "well")
    ]  # fmt: skip


@pytest.mark.usefixtures("at_once")
def test_a_stage_that_does_not_stop_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.gpu, "_GRACE", 0.2)
    child = f"import subprocess; p = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    ignored = "import signal, time; signal.signal(2, signal.SIG_IGN)"
    (read, write) = os.pipe()
    told = f"import os; os.write({write}, str(p.pid).encode()); time.sleep(60)"
    stage = python("deaf", f"{ignored}; {child}; {told}", 3)
    monkeypatch.setattr(subprocess, "Popen", _passing(write))
    stage.run(left=100)
    assert stage.ended == "stopped after 3 s" and stage.seconds < 20
    os.close(write)
    with pytest.raises(ProcessLookupError):
        _wait_for(int(os.read(read, 20)))


def _passing(descriptor: int) -> object:
    popen = subprocess.Popen
    return lambda *args, **options: popen(*args, pass_fds=(descriptor,), **options)


def _wait_for(number: int) -> None:
    for _ in range(100):  # a killed process exists until its parent has waited for it
        os.kill(number, 0)
        if Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            raise ProcessLookupError
        time.sleep(0.05)


def test_a_crash_costs_one_stage_and_the_exit_code_says_it(tmp_path: Path) -> None:
    crash = python("crash", "import os; print('begun', flush=True); os.abort()")
    assert run([crash, python("next", "print('ran')")], tmp_path, minutes=2) == 1
    assert [(r["stage"], r["ended"]) for r in records(tmp_path)] == [("crash", "with -6"), ("next", "well")]
    assert "\nran\n" in (tmp_path / "stages.log").read_text()
    assert run([python("next", "print('ran again')")], tmp_path, minutes=2) == 0
    log = (tmp_path / "stages.log").read_text()
    assert len(records(tmp_path)) == 3 and "begun\n" in log and "ran again\n" in log


PLANTED = """
import sys
from pathlib import Path
from benchmarks import gpu
code = "import time; print('begun', flush=True); time.sleep(60)"
gpu.plan = lambda *_: iter([gpu.Stage("slow", [sys.executable, "-c", code], 60)])
sys.exit(gpu.main(["1/3", "--device", "cpu", "--minutes", "9", "--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_known_is_left_when_all_of_it_is_stopped(number: int, tmp_path: Path) -> None:
    """Also if SIGINT was ignored, as in background jobs of a shell."""
    start = f"import os, signal, sys; signal.signal(2, signal.SIG_IGN); os.execv({sys.executable!r}, sys.argv[1:])"
    command = [sys.executable, "-c", start, sys.executable, "-c", PLANTED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line == "begun\n" for line in process.stdout)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert "begun\n" in (tmp_path / "stages.log").read_text()
    if number != signal.SIGKILL:
        assert [(r["stage"], r["ended"]) for r in records(tmp_path)] == [("slow", "interrupted")]


def test_the_ops_behind_a_crash_are_measured_by_another_process(tmp_path: Path) -> None:
    begun: list[list[str]] = []
    for stage in benchmarks.gpu.stages("1/3", tmp_path, "cpu"):
        if not stage.name.startswith("headline"):
            continue
        at = stage.command.index("--op") + 1
        begun.append(stage.command[at : stage.command.index("--seconds")])
        if len(begun) == 1:
            code = "import os, sys; [print(f'[1/9] {op}, shape', flush=True) for op in sys.argv[1:]]; os.abort()"
            stage.command = [sys.executable, "-c", code, *begun[0][:2]]
            stage.run(left=100)
            assert stage.ended == "with -6"
        else:
            stage.ended = "well"
    assert len(begun) == 2 and len(begun[0]) > 5 and begun[1] == begun[0][2:]


def test_a_purse_leaves_something_to_every_stage() -> None:
    purse = Purse(100.0, 5)
    assert purse.limit() == 60
    purse.pay(60)
    assert purse.limit() == 10
    purse.pay(0)
    assert purse.limit() == 20
    purse.pay(35)  # it needed this time to end
    assert purse.limit() == 10


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_stages_call_what_is_there(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.gpu, "WHEELS", tmp_path)
    made = list(plan(PARTS, tmp_path, device, "90", 9.0))
    names = [stage.name for stage in made]
    assert names[0] == "build" and names[-1] == "report" and len({*names}) == len(names)
    headline = next(n for n in names if n.startswith("headline feature_match"))
    assert names.index("tests") < names.index(headline) < names.index("headline step")
    for stage in made:
        command = stage.command
        if "benchmarks.run" in command:
            options = parser().parse_args(command[command.index("benchmarks.run") + 1 :])
            assert options.device == device or options.once
    assert sum(s.seconds for s in made if s.name in ("build", "tests", "headline step")) < 60 * 9
    twice = {stage.name: stage.seconds for stage in plan(PARTS, tmp_path, device, "90", 18.0)}
    assert twice["tests"] == 2 * made[names.index("tests")].seconds


BROKEN = """
import sys, types

def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

sys.modules["torch"] = types.SimpleNamespace(
    cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: fail() if broken else None)
)
broken = False

def test_usable():
    assert False, "the device is as it was"

def test_breaks():
    global broken
    broken = True
    fail()

def test_next():
    assert not broken
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_error_that_breaks_the_device_costs_one_test(workers: str, tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "test_planted.py").write_text(BROKEN)
    command = "-m pytest --tell -q -p no:cacheprovider -n".split()
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command, workers, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, env=alone, capture_output=True, text=True,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert done.returncode == 1 and "call of test_planted.py::test_breaks failed" in told, told
    assert ("1 passed" in told) == (workers == "1"), told
    assert "call of test_planted.py::test_next failed" not in told, told


BARE = """
import importlib, sys
from pathlib import Path
libraries = "diffusers safetensors pydantic tyro rich yaml huggingface_hub matplotlib scipy sklearn pybind11 xdist"
for name in libraries.split():
    sys.modules[name] = None
import tests.conftest
from benchmarks import report, run
from benchmarks.registry import cases, ops
assert {case.op for case in cases("cuda")} == set(ops())
for path in (*Path("tests/gpu").glob("test_*.py"), *Path("tests/ops").glob("test_*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts))
"""


def test_the_ops_are_tested_and_measured_with_torch_numpy_and_pytest_alone() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
