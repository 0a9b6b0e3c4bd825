# SPDX-License-Identifier: Apache-2.0
"""Trackers: their files are read back, also of continued runs; they cannot end a run."""

from __future__ import annotations

import json
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdistill.errors import FastdistillError, InputError
from fastdistill.train.metrics import read_metrics
from fastdistill.train.trackers import TensorBoard
from tests import tiny
from tests.harness import EPS

SHOWN = {"preview": {"every": 2, "prompts": 1, "steps": 1}}


def run(directory: Path, **options: Any) -> Any:
    return tiny.trainer(**options).fit(directory, callbacks=[(2, lambda done, _: {"accuracy": done / 10})])


def test_event_files_of_tensorboard(tmp_path: Path) -> None:
    """Read by TensorBoard's reader; entries after the last checkpoint of an interrupted run are replaced."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"trackers": ["tensorboard"], "steps": 6, "checkpoint_every": 2} | SHOWN
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(**options).fit(tmp_path, progress=stop)
    run(tmp_path, **options)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    logged = read_metrics(tmp_path / "metrics.jsonl")
    assert set(events.Tags()["scalars"]) == {*logged[0], "accuracy"} - {"step"}
    for name in ("loss", "feature/mid", "gradient_norm", "skipped"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5, 6]
        expected = [pytest.approx(entry[name], rel=EPS) for entry in logged]
        assert [event.value for event in events.Scalars(name)] == expected
    assert [(e.step, e.value) for e in events.Scalars("accuracy")] == [(4, pytest.approx(0.4)), (6, pytest.approx(0.6))]
    assert [event.step for event in events.Images("preview")] == [0, 2, 4, 6]
    assert b"lr: 0.001" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def stop(done: int, _: object) -> None:
    if done == 3:
        raise KeyboardInterrupt  # the second one: nothing is saved


def records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, 7 bytes of header each; kinds 1 and 4 end a
    record."""
    at, record = 7, b""
    while at + 7 <= len(log):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes without a network, read from its log."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"trackers": ["wandb"], "steps": 6, "checkpoint_every": 2} | SHOWN
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(**options).fit(tmp_path, progress=stop)
    run(tmp_path, **options)
    steps, names, runs = [], set(), set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = protocol.Record.FromString(data)
            if record.HasField("run"):
                runs.add(record.run.run_id)
            if record.HasField("history"):
                entries = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                names |= entries.keys()
                steps += [json.loads(entries["_step"])] if "loss" in entries else []
    assert sorted(steps) == [1, 2, 3, 4, 5, 6] and len(runs) == 1
    assert {"loss", "feature/mid", "accuracy"} <= names and any(name.startswith("preview") for name in names)


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")

    def fails(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(TensorBoard, "scalars", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tiny.trainer(trackers=["tensorboard"], steps=3).fit(tmp_path).steps == 3
    told = [str(w.message) for w in caught if "tensorboard:" in str(w.message)]
    assert told == ["tensorboard: OSError: no room; the run goes on without it"]


def test_what_cannot_be_tracked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"trackers\.0: .*got 'mlflow'"):
        tiny.trainer(trackers=["mlflow"])
    with pytest.raises(InputError, match=r"directory: expected one for config\.trackers"):
        tiny.trainer(trackers=["wandb"]).fit()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FastdistillError, match=r"wandb: expected to be installed .*fastdistill\[trackers\]"):
        tiny.trainer(trackers=["wandb"]).fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()
