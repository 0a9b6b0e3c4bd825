# SPDX-License-Identifier: Apache-2.0
"""Profiles: ranges with the ops' names in a trace, nothing changed afterwards, calls that can be replayed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastdistill.cli import main
from fastdistill.errors import InputError
from fastdistill.ops import OPS, feature_match
from fastdistill.ops._calls import CHECKS
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
    with pytest.raises(InputError, match=r"device: expected a device that torch can use here, .* got 'magic'"):
        replay(found.calls["feature_match"], device="magic")


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


Change = Callable[[dict[str, Any]], Any]


def _change(path: Path, change: Change, tensors: dict[str, torch.Tensor]) -> None:
    with safetensors.safe_open(path, "pt") as file:
        call = json.loads(file.metadata()["fastdistill"])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(call)
    safetensors.torch.save_file(held | tensors, path, {"fastdistill": json.dumps(call)})


LIES: dict[str, tuple[Change, dict[str, torch.Tensor]]] = {
    "a shorter result": (lambda call: None, {"1": torch.ones(2)}),
    "another dtype": (lambda call: None, {"0": torch.ones(3, 8, dtype=torch.float64)}),
    "an argument less": (lambda call: call["arguments"].pop(), {}),
    "a text as an argument": (lambda call: call["arguments"].__setitem__(1, "x"), {}),
    "a list as an argument": (lambda call: call["arguments"].__setitem__(0, []), {}),
    "strides beyond its memory": (lambda call: call["arguments"][0].update(strides=[2**40, 1]), {}),
    "strides that are texts": (lambda call: call["arguments"][0].update(strides="ab"), {}),
    "a tensor that is not there": (lambda call: call["arguments"][0].update(tensor="7"), {}),
    "another op": (lambda call: call.update(op="os.system"), {}),
    "an op that is a list": (lambda call: call.update(op=[]), {}),
    "a schema that is none": (lambda call: call.update(schema=-1), {}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_kept_call_that_lies_reaches_no_kernel(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "geglu.safetensors"
    kept.save(path, "geglu", "cpp", [torch.ones(3, 8), False, torch.empty(3, 4)])
    assert len(replay(path, device="cpu", repeats=1)) == 1
    _change(path, *LIES[lie])
    before = OPS["geglu"].calls.copy()
    with pytest.raises(InputError, match=r": expected .*, got "):
        replay(path, device="cpu", repeats=1)
    assert OPS["geglu"].calls == before


def test_a_kept_call_of_pickle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "geglu.pt"
    torch.save({"op": "geglu", "arguments": []}, path)
    with pytest.raises(InputError, match=r"call: expected a file that a profile left, got .*geglu\.pt"):
        replay(path, device="cpu")


def test_every_op_has_a_check_of_its_kept_calls() -> None:
    assert CHECKS.keys() == OPS.keys() - {"attention"}  # whose kernels belong to other packages


def test_strides_are_kept_where_they_are_dense(tmp_path: Path) -> None:
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    gaps = torch.randn(2, 8)[:, ::2]
    arguments = [[x, gaps], torch.ones(())]
    kept.save(tmp_path / "call", "scale_gradients", "cpp", arguments)
    op, ((first, second), factor) = kept.load(tmp_path / "call", "cpu")
    assert op == "scale_gradients" and factor == 1
    assert torch.equal(first, x) and first.stride() == x.stride()
    assert torch.equal(second, gaps) and second.is_contiguous()
