# SPDX-License-Identifier: Apache-2.0
"""The measurement of a run on a CPU before its first step: it has no side effects; checkpoints store the result."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastdistill.distill import RandomConditioning, Regions, Weights
from fastdistill.models.fuse.form import is_fused
from fastdistill.train import DistillTrainer, checkpoint, choice, products
from fastdistill.train.choice import Bench, Choice
from fastdistill.train.step import TrainStep
from tests import small, tiny
from tests.train import ranks, scenarios

Cost = Callable[[Choice], float]


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cost], list[Choice]]:
    """Every run measures, with these times instead of real ones; returns what is measured."""
    monkeypatch.setattr(choice, "LEAST", 1)
    monkeypatch.setattr("fastdistill.train.trainer.LEAST", 1)
    monkeypatch.setattr(choice, "PATIENCE", 0.0)
    monkeypatch.setattr(choice, "COMPILING", 0.0)
    monkeypatch.setattr(TrainStep.compile, "__kwdefaults__", {"backend": "eager"})
    seconds = Bench.seconds
    torch._dynamo.reset()

    def begin(cost: Cost) -> list[Choice]:
        seen: list[Choice] = []

        def pretended(bench: Bench, way: Choice) -> float:
            seconds(bench, way)
            seen.append(way)
            return cost(way)

        monkeypatch.setattr(Bench, "seconds", pretended)
        return seen

    return begin


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> float:
        raise AssertionError("a measurement")

    monkeypatch.setattr(Bench, "seconds", measured)


def test_a_short_run_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    run = tiny.trainer(fuse="auto", precision="measured")
    run.fit()
    assert (run.step.execution, run.step.why) == ("eager", "auto: 2 steps are too few to measure")


def test_what_is_named_is_not_measured(measuring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(lambda way: 1.0)
    refuse(monkeypatch)
    run = tiny.trainer(execution="eager")
    run.fit()
    assert (run.step.execution, run.step.why) == ("eager", "as set")


class Normed(ranks.Tiny):
    """Has statistics that every forward changes, and draws random numbers itself."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.outer = nn.Sequential(nn.BatchNorm2d(width), nn.Dropout(0.5), self.outer)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Normed, ranks.Tiny])
def test_a_measurement_leaves_no_trace(measuring: Any, kind: Callable[[int], nn.Module]) -> None:
    """The run is the eager one to the bit, where that is the fastest."""
    runs = [ranks.make(student=kind(6), rolling=scenarios.ROLLING, execution=way) for way in ("eager", "auto")]
    seen = measuring(lambda way: 1.0 if way == Choice("eager") else 2.0)
    one, two = map(ranks.finished, runs)
    assert one["history"] == two["history"] and {way.channels_last for way in seen} == {None, True}
    assert runs[1].step.execution == "eager" and "channels_last 2000.0 ms per step" in runs[1].step.why
    assert one["state"].keys() == two["state"].keys() and "objective.timestep" in one["state"]
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name
    assert all(p.grad is None for p in runs[1].student.parameters())
    draws = kind is Normed
    assert ("not compiled, as the student draws" in runs[1].step.why) == draws
    assert ("compiled" in {way.execution for way in seen}) != draws


@pytest.mark.parametrize("probability", ["const", "measured"])
def test_no_trace_in_what_the_objective_sums(measuring: Any, probability: str) -> None:
    """The distances of regions are not changed; a p(t) measured for the first step stays."""
    parameters = {"value": 1.0} if probability == "const" else {"samples": 2, "points": 2}
    given = {"probability": probability, "parameters": parameters, "regions": Regions(count=2, every=2)}
    runs = [ranks.make(conditioning=given, execution=way) for way in ("eager", "auto")]
    measuring(lambda way: 1.0 if way == Choice("eager") else 2.0)
    one, two = map(ranks.finished, runs)
    assert (one["state"]["objective.region_distance"] >= 0).any()
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name


def test_nothing_to_fuse_is_not_measured(measuring: Any, recwarn: pytest.WarningsRecorder) -> None:
    seen = measuring(best)
    run = ranks.make(fuse="auto", execution="eager")
    run.fit()
    assert not any(way.fuse for way in seen) and not [str(w.message) for w in recwarn if "fuse" in str(w.message)]


@pytest.mark.parametrize(
    ("kept", "known"),
    [
        (["eager"], None),
        (
            {"execution": "newer", "precision": 8, "fuse": "x", "channels_last": [], "why": None, "other": None},
            Choice(),
        ),
        ({"execution": "eager", "fuse": False, "why": "auto"}, Choice("eager", fuse=False, why="auto")),
    ],
)
def test_what_a_checkpoint_says_and_this_version_does_not_know(kept: Any, known: Choice | None) -> None:
    assert Choice.of(kept) == known


def best(way: Choice) -> float:
    """Compiled, channels_last, fused and bfloat16 are faster."""
    return 8.0 - 4 * (way.execution == "compiled") - 2 * bool(way.channels_last) - bool(way.fuse)


def test_a_resumed_run_goes_on_as_chosen(
    measuring: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The bits are those of an uninterrupted run; one line reports the choice."""
    caplog.set_level(logging.INFO, "fastdistill")
    measuring(best)
    whole = ranks.make(checkpoint_every=1)
    one = ranks.finished(whole, tmp_path / "whole")
    told = [line for line in caplog.messages if line.startswith("training step: ")]
    assert len(told) == 1 and told[0].startswith("training step: compiled, channels_last (auto: eager 8000.0 ms")
    with pytest.raises(ranks.Interrupted):
        ranks.make(checkpoint_every=1).fit(tmp_path / "parts", progress=ranks.stop_after(3))
    refuse(monkeypatch)
    resumed = ranks.make(checkpoint_every=1)
    two = ranks.finished(resumed, tmp_path / "parts")
    assert resumed.step.execution == whole.step.execution == "compiled, channels_last"
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name
    kept = Choice.of(checkpoint.chosen(tmp_path / "parts"))
    assert kept is not None and kept == Choice("compiled", True, None, None, kept.why)


def test_fused_ops_where_they_are_faster(measuring: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is stored too; nothing else is measured if the execution is named."""
    seen = measuring(best)
    options: dict[str, Any] = {"fuse": "auto", "execution": "eager", "checkpoint_every": 1, "steps": 3}
    run = small.trainer("channel_base", **options)
    with pytest.raises(ranks.Interrupted):
        run.fit(tmp_path, progress=ranks.stop_after(2))
    assert {(way.execution, way.channels_last, way.fuse) for way in seen} == {(None, None, on) for on in (False, True)}
    refuse(monkeypatch)
    again = small.trainer("channel_base", **options)
    again.fit(tmp_path)
    for model in (run.teacher, run.student, again.teacher, again.student):
        assert any(map(is_fused, model.modules()))
    assert again.step.execution == "eager"


def test_a_run_of_an_older_version_goes_on_eagerly(
    measuring: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a run with a named execution, its checkpoints contain no choice."""
    run = tiny.trainer(steps=2, execution="eager", lr_schedule="constant")
    run.fit(tmp_path)
    assert checkpoint.chosen(tmp_path) is None
    measuring(best)
    refuse(monkeypatch)
    again = tiny.trainer(steps=3)
    again.fit(tmp_path)
    assert again.step.execution == "eager" and again.step.why == "auto: nothing was measured"


def test_a_step_that_cannot_be_compiled_runs_eagerly(measuring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise ValueError("no compiler")

    measuring(best)
    monkeypatch.setattr(TrainStep.compile, "__kwdefaults__", {"backend": broken})
    run = ranks.make(steps=2)
    run.fit()
    assert run.step.execution == "eager, channels_last" and "not compiled, as that failed: " in run.step.why


def test_compiling_has_to_pay(measuring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is tried only if its estimated time is small compared with the run."""
    measuring(best)
    monkeypatch.setattr(choice, "COMPILING", 1.0)
    run = ranks.make(steps=5)
    run.fit()
    assert run.step.execution == "eager, channels_last"
    assert run.step.why.endswith("not compiled, as that takes some 8 s, and the steps that are left 30 s")


@pytest.mark.parametrize(("faster", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_measured_precision(
    measuring: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool, dtype: torch.dtype
) -> None:
    """The stored choice is used, whatever a new measurement would choose."""
    monkeypatch.setattr("fastdistill.train.trainer.has_bfloat16", lambda device: True)
    measuring(best)
    seconds = Bench.seconds

    def by_dtype(bench: Bench, way: Choice) -> float:
        return seconds(bench, way) - 0.5 * (bench.student.first.weight.dtype == torch.bfloat16)

    if faster:
        monkeypatch.setattr(Bench, "seconds", by_dtype)
    options: dict[str, Any] = {"precision": "measured", "execution": "eager", "checkpoint_every": 1}
    run = tiny.trainer(steps=2, **options)
    run.fit(tmp_path)
    assert run.student.first.weight.dtype == dtype and run.teacher.first.weight.dtype == torch.float32
    refuse(monkeypatch)
    again = tiny.trainer(steps=3, **options)
    again.fit(tmp_path)
    assert again.student.first.weight.dtype == dtype
    run.close()
    again.close()


def test_compiling_pays_for_every_shape(measuring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of two shapes take twice the time to compile."""
    measuring(best)
    compiled = ranks.make(latents=scenarios.sizes(), steps=4)
    eager = ranks.make(latents=scenarios.sizes(), steps=4, execution="eager")
    one, two = (ranks.finished(run) for run in (compiled, eager))
    assert compiled.step.execution == "compiled, channels_last" and compiled.step.shapes == 2
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    monkeypatch.setattr(choice, "COMPILING", 0.5)
    run = ranks.make(latents=scenarios.sizes(), steps=5)
    run.fit()
    assert run.step.why.endswith("not compiled, as that takes some 8 s, and the steps that are left 30 s")


def test_a_run_that_ends_before_its_first_checkpoint_begins_anew(measuring: Any, tmp_path: Path) -> None:
    """What a kill leaves is no choice: the run measures again, and is one that has chosen so from its start."""

    def leave(done: int, _: object) -> None:
        if done == 2:
            shutil.copytree(tmp_path / "whole", tmp_path / "killed")

    measuring(best)
    ranks.make(log_every=1, checkpoint_every=3).fit(tmp_path / "whole", progress=leave)
    assert checkpoint.chosen(tmp_path / "killed") is None and (tmp_path / "killed" / "metrics.jsonl").stat().st_size
    measuring(lambda way: -best(way))
    again = ranks.make(log_every=1, checkpoint_every=3)
    one = ranks.finished(again, tmp_path / "killed")
    assert again.step.execution == "eager"
    two = ranks.finished(ranks.make(execution="eager", log_every=1, checkpoint_every=3), tmp_path / "named")
    assert one["history"] == two["history"]
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("killed", "named")]
    assert lines[0] == lines[1]


def test_a_precision_counts_in_its_fastest_way(measuring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 that is slower, except fused."""
    monkeypatch.setattr("fastdistill.train.trainer.has_bfloat16", lambda device: True)
    measuring(best)
    seconds = Bench.seconds

    def by_dtype(bench: Bench, way: Choice) -> float:
        took = seconds(bench, way)
        assert {any(map(is_fused, model.modules())) for model in (bench.teacher, bench.student)} == {bool(way.fuse)}
        low = next(bench.student.parameters()).dtype == torch.bfloat16
        return took + low * (1.0 if not way.fuse else -2.0)

    monkeypatch.setattr(Bench, "seconds", by_dtype)
    run = small.trainer("channel_base", steps=2, fuse="auto", precision="measured", execution="eager")
    own = {name: p.clone() for name, p in run.teacher.named_parameters()}
    run.fit()
    assert next(run.student.parameters()).dtype == torch.bfloat16
    for name, p in run.teacher.named_parameters():
        assert torch.equal(p, own[name]) and p.is_contiguous()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_second_call_goes_on_as_the_first(measuring: Any, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Also without a directory, and with a trainer that has other arguments: it neither measures nor starts again."""

    class Own(DistillTrainer):
        def __init__(self) -> None:
            objective = RandomConditioning(weights=Weights(1.0, 0.0, 0.0))
            options = ranks.OPTIONS | {"precision": "measured"}
            data = small.SCHEDULE, small.cache(), small.bank(), objective
            super().__init__(ranks.Tiny(12), ranks.Tiny(6), *data, small.config(**options))

    monkeypatch.setattr("fastdistill.train.trainer.has_bfloat16", lambda device: True)
    monkeypatch.setattr("fastdistill.train.trainer.faster_precision", lambda *_: precision)
    measuring(best)
    run = Own()
    with pytest.raises(ranks.Interrupted):
        run.fit(progress=ranks.stop_after(2))
    refuse(monkeypatch)
    monkeypatch.setattr("fastdistill.train.trainer.faster_precision", refuse)
    done: list[int] = []
    run.fit(progress=lambda step, _: done.append(step))
    assert done == [2, 3, 4] and run.step.execution == "compiled, channels_last"
    assert {p.dtype for p in run.student.parameters()} == {getattr(torch, precision)}


def test_products_by_onednn() -> None:
    """Only large products, with the same result as torch's; also products that sum over many terms, like the gradient
    of a weight, if the result is wide enough."""

    def computed(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, narrow: torch.Tensor) -> list[torch.Tensor]:
        y = torch.addmm(bias, x, w.t())
        return [y, y @ w, y.t() @ x, narrow.t() @ narrow, x[:8] @ w.t(), torch.addmm(y, x, w.t())]

    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    g = torch.Generator().manual_seed(0)
    shapes = (1024, 64), (96, 64), (96,), (4096, 32)
    given = [torch.randn(*shape, generator=g) for shape in shapes]
    fake = make_fx(computed, tracing_mode="fake")(*given)
    assert products.replace(fake.graph) == 3
    fake.recompile()
    for one, two in zip(fake(*given), computed(*map(torch.Tensor.double, given)), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=0, atol=2e-6 * float(two.abs().max()))


class Attending(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        attend = torch.nn.functional.scaled_dot_product_attention
        few = [attend(q, k, v), attend(query=q, key=k, value=v, is_causal=False), attend(q, k, v, None, 0.0, False)]
        rest = [attend(q, k, v, mask), attend(q, k, v, scale=0.5), attend(q.double(), k.double(), v.double())]
        return [*few, *rest, attend(*(torch.cat([t] * 50, 2) for t in (q, k, v)))]


def test_attention_over_few_tokens_as_products() -> None:
    """Only without a mask and without an explicit scale; output and gradients equal torch's."""
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, tokens, 8, generator=g) for tokens in (7, 5, 5)]
    mask = torch.zeros(7, 5)
    found = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(products.spell_out(graph.graph))
        graph.recompile()
        return graph

    torch._dynamo.reset()
    outcomes = []
    for model in (Attending(), torch.compile(Attending(), backend=backend)):
        own = [t.clone().requires_grad_() for t in given]
        outputs = model(*own, mask)
        sum(t.square().sum() for t in outputs).backward()
        outcomes.append([*outputs, *(t.grad for t in own)])
    torch.compile(Attending(), backend=backend)(*(t.bfloat16() for t in given), mask.bfloat16())
    assert found == [3, 3]
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, two)


def test_attention_over_few_tokens_in_bfloat16() -> None:
    """Computed in float32 and rounded at the end: the output differs from the exact one by no more than rounding it
    does, and so do the gradients."""
    g = torch.Generator().manual_seed(1)
    own = [torch.randn(4, 2, tokens, 16, generator=g).bfloat16().requires_grad_() for tokens in (16, 5, 5)]
    exact = [t.detach().double().requires_grad_() for t in own]
    outputs = []
    for attend, given in ((products.attention, own), (torch.nn.functional.scaled_dot_product_attention, exact)):
        output = attend(*given)
        output.backward(torch.ones_like(output).cumsum(-1))
        outputs.append([output, *(t.grad for t in given)])
    assert all(t.dtype == torch.bfloat16 for t in outputs[0])
    for one, two in zip(*outputs, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=2**-8, atol=1e-5 * float(two.abs().max()))


def test_who_multiplies_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not products.wanted.__wrapped__()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for vendor, wanted in (("GenuineIntel", False), ("AuthenticAMD", True)):
        monkeypatch.setattr(products.Path, "read_text", lambda *_, vendor=vendor, **__: f"vendor_id\t: {vendor}\n")
        assert products.wanted.__wrapped__() == (wanted and torch.backends.mkl.is_available())
