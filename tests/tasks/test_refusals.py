# SPDX-License-Identifier: Apache-2.0
"""Commands refuse settings that do not fit together, or have no effect, before they write anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdistill.cli import main


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("guidance show 1e300", "schedule: expected a weight within float32, got 1e+300"),
        ("guidance show 2 --grid karras:30@1e300..0.09", "grid: expected a sigma of the schedule, "),
        ("guidance diagnose shades --schedules 1e300", "schedules: expected a weight within float32"),
        ("guidance diagnose digits --grid karras:30@1e9..0.09", "grid: expected a sigma of the schedule, "),
        ("demo guidance --windows 1e300", "windows: expected a weight within float32"),
        ("demo guidance --student 1e300", "student: expected a weight within float32"),
        ("demo guidance --train.teacher-fp8", "train.teacher_fp8: expected False, as the teachers are U-Nets"),
        ("demo guidance --device cpu --train.execution graph", "execution 'graph': it runs on cpu: "),
        ("demo digits --rolling 3", "rolling.every: expected a divisor of train.batch, 64, got 3"),
        ("demo digits --sampling.guidance 1e300", "cache.guidance: expected a weight within float32"),
        ("demo digits --train.micro-batch 7", "train.micro_batch: expected a divisor of batch, 64, got 7"),
        ("demo digits --device cpu --train.execution graph", "execution 'graph': it runs on cpu: "),
        ("demo digits --train.teacher-null-once", "train.teacher_null_once: expected false, got true, and there is"),
        ("demo digits --train.seed 9223372036854775807 --seeds 2", "seed: input should be less than 92233720368547758"),
        ("demo context --student.train.teacher-fp8", "student.train.teacher_fp8: expected False, as a classifier"),
        ("cadistill --student.train.precision bfloat16", "student.train.precision: expected 'auto', as a classifier"),
        ("teacher digits --train.teacher-fp8", "train.teacher_fp8: expected False, as the teacher has no other"),
        ("teacher digits --device cpu --train.execution graph", "execution 'graph': it runs on cpu: "),
    ],
)
def test_nothing_is_written(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(command.split()))
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
