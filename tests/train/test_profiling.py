# SPDX-License-Identifier: Apache-2.0
"""Profiles: ranges with the ops' names in a trace, nothing left behind, calls that can be replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastdistill.cli import main
from fastdistill.errors import InputError
from fastdistill.ops import OPS, feature_match
from fastdistill.train import kept
from fastdistill.train.profiling import profile_steps, replay


def step_of() -> tuple[torch.nn.Linear, list[torch.Tensor]]:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 8), [torch.randn(4, 8), torch.randn(4, 8)]


def test_a_trace_has_ranges_named_like_the_ops_and_models(tmp_path: Path) -> None:
    model, (x, target) = step_of()
    ran = []

    def step() -> None:
        feature_match([model(x)], [target]).loss.backward()
        ran.append(1)

    before = {name: (op.kernels, op.reference) for name, op in OPS.items()}
    found = profile_steps(step, tmp_path, steps=2, warm_up=1, models={"student": model})
    assert {name: (op.kernels, op.reference) for name, op in OPS.items()} == before
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert len(ran) == 1 + 1 + 2
    assert found.trace is not None
    events = json.loads(found.trace.read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for name, count in {"feature_match": 2, "student": 2, "step 0": 1, "step 1": 1}.items():
        assert named.count(name) == count, name
    assert 0 < found.ops["feature_match"] < 1 and found.milliseconds > 0


def test_a_call_is_kept_as_it_was_and_replayed(tmp_path: Path) -> None:
    model, (x, target) = step_of()
    found = profile_steps(lambda: feature_match([model(x)], [target]).loss.backward(), tmp_path, steps=1)
    op, arguments = kept.load(found.calls["feature_match"], "cpu")
    assert op == "feature_match" and torch.equal(arguments[0][0], model(x)) and torch.equal(arguments[1][0], target)
    before = OPS["feature_match"].calls.copy()
    assert len(replay(found.calls["feature_match"], kernel="reference", device="cpu", repeats=4)) == 4
    assert OPS["feature_match"].calls["reference"] - before["reference"] == 4 + 3
    with pytest.raises(InputError, match="kernel: expected one of"):
        replay(found.calls["feature_match"], kernel="none", device="cpu")


def test_what_cannot_be_profiled_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps: expected at least one, got 0"):
        profile_steps(lambda: None, tmp_path, steps=0)
    (tmp_path / "other.pt").write_text("nothing")
    with pytest.raises(InputError, match=r"call: expected a file that a profile left, got .*other.pt"):
        replay(tmp_path / "other.pt")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="nsight: expected a CUDA device, got none"):
            profile_steps(lambda: None, tmp_path, nsight=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "profile"
    arguments = ["--steps", "1", "--warm-up", "0", "--batch", "4", "--device", "cpu", "--output", str(output)]
    assert main(["profile", "digits", *arguments]) == 0
    events = json.loads((output / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"noise_gather", "feature_match", "adamw_ema", "teacher", "student", "step 0"} <= names
    for op in ("noise_gather", "adamw_ema"):
        assert main(["profile", "replay", str(output / f"{op}.safetensors"), "--device", "cpu", "--repeats", "2"]) == 0
    assert "2 runs, median" in capsys.readouterr().out
    code = main(["profile", "replay", str(output / "noise_gather.safetensors"), "--device", "cpu", "--kernel", "magic"])
    assert code == 2 and "kernel: expected one of" in capsys.readouterr().err
