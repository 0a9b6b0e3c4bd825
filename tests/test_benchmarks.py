# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: when they run, their checks before the timing, and what they report as missing."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import benchmarks.run
from benchmarks import files, machine, registry, report
from benchmarks.measure import FIELDS, Settings, measure
from benchmarks.ops import sampling
from benchmarks.registry import COMPILED, Case, Workload
from benchmarks.run import main

ROOT = Path(__file__).parent.parent


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    alone["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=alone)


def test_pytest_benchmark_times_ops_alone(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    flags = ["--benchmark-max-time=0.1", "--benchmark-min-rounds=2", f"--benchmark-json={path}"]
    done = run_pytest("--benchmark", "-k", "noise_gather and B4 and not compile and not rows", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    timed = json.loads(path.read_text())["benchmarks"]
    assert {entry["extra_info"]["op"] for entry in timed} == {"noise_gather"}
    assert {entry["name"].rsplit("-", 1)[1] for entry in timed} == {"ours]", "literal]"}
    assert "tests/ops" not in done.stdout


def test_benchmarks_do_not_share_the_processor() -> None:
    pytest.importorskip("xdist")
    done = run_pytest("--benchmark", "-n", "2")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "--benchmark measures: it runs alone" in done.stderr


def test_plain_pytest_runs_none() -> None:
    done = run_pytest("--collect-only", "-q", "benchmarks")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "::" not in done.stdout


def test_every_op_has_cases_for_both_kinds_of_device() -> None:
    for op in registry.ops():
        for device in ("cpu", "cuda"):
            found = list(registry.cases(device, [op]))
            assert len({str(case) for case in found}) == len(found) > 0, device
        assert any(case.headline for case in found), "none is for the first part on a GPU"


CPU = Settings(torch.device("cpu"), rounds=4, warm_up=1, seconds=0.0)


def case_of(right: bool) -> tuple[Case, list[str]]:
    ran: list[str] = []

    def check() -> None:
        assert right, "it is wrong"

    workload = Workload(
        lambda: ran.append("ours"), {"slow": lambda: ran.append("slow"), "gone": "not here"}, check, 10**9
    )
    return Case("planted", "small", "fp32", "cpu", lambda device: workload, ("slow", "gone")), ran


def test_rows_of_rivals_that_are_there_and_that_are_not() -> None:
    case, ran = case_of(right=True)
    slow, gone = measure(case, CPU)
    assert slow["rival"] == "slow" and slow["ratio"] > 0 and slow["rival_iqr_ms"] >= 0 and not slow["note"]
    assert slow["copy_gb_s"] > 0 and slow["percent"] > 0 and slow["ours_gb_s"] > 0
    assert gone["ratio"] == "" and gone["note"] == "not here"
    assert ran.count("slow") >= 4


def test_compiled_rivals_come_after_all_others() -> None:
    """The rows of the others are written before the compiler starts."""
    case, ran = case_of(right=True)
    workload = case.build(torch.device("cpu"))
    workload.rivals[COMPILED] = lambda: ran.append("compiled")
    names = (COMPILED, *case.rivals)
    settings = dataclasses.replace(CPU, compiled=True)
    rows = measure(dataclasses.replace(case, rivals=names, build=lambda device: workload), settings)
    assert [next(rows)["rival"], next(rows)["rival"]] == ["slow", "gone"] and "compiled" not in ran
    (last,) = rows
    assert last["rival"] == COMPILED and last["ratio"] > 0 and "compiled" in ran


def test_rows_of_runs_that_make_images_say_how_many_a_second() -> None:
    case, _ = case_of(right=True)
    rivals = {"slow": lambda: time.sleep(2e-3), "gone": "not here"}
    made = Workload(lambda: time.sleep(1e-3), rivals, lambda: None, samples=8)
    slow, gone = measure(dataclasses.replace(case, build=lambda device: made), CPU)
    for side in ("ours", "rival"):
        assert slow[f"{side}_img_s"] == pytest.approx(8e3 / slow[f"{side}_ms"], rel=1e-3)
    assert gone["rival_img_s"] == ""


@pytest.mark.parametrize(("schedule", "evaluations"), sampling.SCHEDULES.values())
def test_sampling_equals_that_of_two_passes_a_step(schedule: str, evaluations: int) -> None:
    sampling._scheduled("digits 3x8x8", 1, schedule, evaluations, torch.device("cpu")).check()


def test_sampling_of_a_student_is_one_pass_a_step() -> None:
    sampling._student("digits 3x8x8", 1, torch.device("cpu")).check()


def test_a_wrong_op_is_not_timed() -> None:
    case, ran = case_of(right=False)
    rows = list(measure(case, CPU))
    assert len(rows) == 2 and not ran
    assert all(row["note"].startswith("wrong: AssertionError: it is wrong") and row["ratio"] == "" for row in rows)


def test_an_op_that_cannot_run_is_a_row_and_the_next_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, _ = case_of(right=True)

    def build(device: torch.device) -> Workload:
        raise RuntimeError("it does not compile")

    monkeypatch.setattr(benchmarks.run, "_chosen", lambda *_: [dataclasses.replace(right, build=build), right])
    arguments = f"--device cpu --rounds 4 --csv none --json - --out {tmp_path}".split()
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert "Traceback" in said.err and "eager, slow: failed: RuntimeError: it does not compile" in said.err
    rows = json.loads(said.out)
    (path,) = tmp_path.iterdir()
    assert [row["note"] for row in files.read(path)] == [row["note"] for row in rows]
    assert [row["note"] for row in rows] == ["failed: RuntimeError: it does not compile"] * 2 + ["", "not here"]
    assert rows[2]["ratio"] > 0


def test_failures_are_told_as_they_happen(tmp_path: Path) -> None:
    """Before the summary, so that they are not lost if the run is killed."""
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "test_planted.py").write_text("def test_a():\n    assert 1 == 2\ndef test_b():\n    print('then b')\n")
    done = run_pytest("--tell", "-q", "-s", "--rootdir", str(tmp_path), str(tmp_path))
    first = done.stdout.partition("then b")[0]
    assert "call of test_planted.py::test_a failed" in first and "assert 1 == 2" in first, done.stdout + done.stderr


def test_nvidia_smi_is_asked_for_the_gpu_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its UUID: the first visible GPU need not be the machine's first GPU."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$*" in *--id=GPU-12ab-34*) echo 1410, 2619, 350.5;; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    uuids = [types.SimpleNamespace(uuid=uuid) for uuid in ("99ff-00", "12ab-34")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: uuids[device.index])
    found = machine.load(torch.device("cuda", 1))
    assert found == {"sm_mhz": "1410", "memory_mhz": "2619", "watts": "350.5"}
    assert (
        set(machine.load(torch.device("cuda", 0)).values()) == {""} == set(machine.load(torch.device("cpu")).values())
    )


def test_without_a_gpu_every_row_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    before = sorted(files.RESULTS.iterdir())
    assert main(["--device", "cuda", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in rows} == set(registry.ops())
    assert all(row["note"] == "no CUDA device" and row["ratio"] == "" for row in rows)
    assert sorted(files.RESULTS.iterdir()) == before


def test_a_file_of_fewer_columns_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "device.csv"
    path.write_text("date,op,ratio\n2026-01-01,feature_match,2.5\n")
    files.append(path, [dict.fromkeys(FIELDS, "") | {"op": "noise_gather"}])
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["date"], first["op"], first["ratio"], first["note"]) == ("2026-01-01", "feature_match", "2.5", "")
    assert second["op"] == "noise_gather"


@pytest.mark.parametrize(
    "flags",
    [
        ["--base", "no-such-commit"],
        ["--base", "HEAD", "--rival", "literal"],
        *([flag, "nope"] for flag in ("--op", "--rival", "--dtype", "--device", "--shape")),
        ["--rounds", "1"],
    ],
)
def test_mistakes_are_told(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--device", "cpu", "--csv", "none", *flags])
    error = capsys.readouterr().err.split("error: ")[1]
    assert stop.value.code == 2 and flags[0] in error


def test_a_folder_of_results_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "none")])
    assert "--results: expected a folder of CSV files, got" in capsys.readouterr().err


def knows(monkeypatch: pytest.MonkeyPatch, *known: Case) -> None:
    monkeypatch.setattr(report, "cases", lambda device: [case for case in known if case.device == device])


def test_the_report_plots_another_folder_and_leaves_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = case_of(right=True)
    knows(monkeypatch, case)
    files.append(tmp_path / "cpu-some.csv", measure(case, CPU))
    before = (ROOT / "README.md").read_bytes()
    assert report.main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "benchmarks-cpu-some.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "README.md").read_bytes() == before


def test_the_table_shows_the_last_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        "some_op", "small", "bf16", "cuda", lambda device: pytest.fail("built"), ("eager", "new"), headline=True
    )
    knows(monkeypatch, case)
    old = dict.fromkeys(FIELDS, "") | {"op": "some_op", "shape": "small", "dtype": "bf16", "ours_ms": "2.0"}
    old |= {"rival": "eager", "ratio": "1.5", "date": "1", "run": "1"}
    path = tmp_path / "gpu-some.csv"
    last = old | {"run": "2", "ratio": "3.25"}
    files.append(path, [old, old | {"rival": "new"}, last, last | {"rival": "forgotten"}, last | {"rival": "base 1"}])
    files.append(path, [old | {"date": "3", "ratio": "", "ours_ms": "", "note": "out of memory"}])
    assert "| eager **3.25** |" in report.table(tmp_path), "the last run's rivals alone, those that are known"
    assert "| eager **3.25** |" in report.summary(tmp_path) and "unmeasured" not in report.summary(tmp_path)
    assert "1.50" not in report.table(tmp_path) and "unmeasured" not in report.table(tmp_path)
    knows(monkeypatch, case, dataclasses.replace(case, op="other_op"))
    assert "| other_op | small | bf16 | eager · new: unmeasured |" in report.table(tmp_path)
    assert "unmeasured (other_op)" in report.summary(tmp_path)
    knows(monkeypatch, case)
    path.unlink()
    assert "unmeasured" in report.table(tmp_path) and "unmeasured (some_op)" in report.summary(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n", "expected columns of date, run, op"),
        ("op,ratio\nx,1.5\n", "expected the columns date, shape, dtype, threads, rival too, got op, ratio"),
        ("date,op,shape,dtype,threads,rival,ratio\n1,x,s,fp32,1,eager,fast\n", "line 2: expected 7 values, the ratio"),
        ("", "got none"),
    ],
)
def test_a_file_of_other_columns_is_named(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpu-some.csv").write_text(text)
    with pytest.raises(SystemExit) as stop:
        report.main(["--results", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "cpu-some.csv" in error and told in error


def test_compiled_rivals_are_timed_at_the_smallest_shapes_of_a_cpu() -> None:
    shapes = [case.shape for case in registry.cases("cpu", ["feature_match"], ["fp32"]) if registry.compiles(case)]
    assert shapes == ["SD-1.5 8 taps B=4"]
    assert all(map(registry.compiles, registry.cases("cuda")))
