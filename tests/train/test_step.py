# SPDX-License-Identifier: Apache-2.0
"""How a step is executed: it never waits for the device, and eager, compiled and captured steps give equal numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.ops.step import digits
from fastdistill.distill import RandomConditioning, Regions, Rolling, Weights
from fastdistill.distill.denoising import Denoising
from fastdistill.distill.objective import Objective, Setting
from fastdistill.errors import KernelError
from fastdistill.train import DistillTrainer, TrainConfig, distributed, graph
from fastdistill.train.graph import WARM_UP, _checkpoints_without_rng, runner
from fastdistill.train.guard import NoHostSync
from fastdistill.train.step import TrainStep, average_weights
from tests import small, tiny
from tests.harness import untimed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def step_on(device: str, objective: Callable[[Any], Objective] = small.objective, **options: Any) -> TrainStep:
    place = torch.device(device)
    teacher = small.teacher()
    made = small.student("bk_base", teacher)
    cache, bank = small.cache(), small.bank()
    setting = Setting(
        teacher=teacher.to(place).eval().requires_grad_(False), student=made.model.to(place).train(),
        schedule=small.SCHEDULE, latents=cache.latents.to(place), latent_prompts=cache.prompt_index.to(place),
        prompts=bank.embeddings.to(place), batch=4,
    )  # fmt: skip
    return TrainStep(objective(made).bind(setting), setting.student, small.config(**options), place)


OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "random conditioning": small.objective,
    "every loss": lambda made: small.objective(made, weights=Weights(1.0, 0.5, 0.25), feature_distance="cosine"),
    "denoising": lambda made: Denoising(5.0),
    "regions and rolling states": lambda made: small.objective(
        made, probability="measured", regions=Regions(count=3, every=2), rolling=Rolling(every=2, groups=1, null=0.5)
    ),
}


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_any_default_dtype(precision: str) -> None:
    """Rates, loss scale, counts and metrics are float32, as the kernels require."""
    own = small.teacher()
    made = small.student("bk_base", own)
    given = own, made.model, small.SCHEDULE, small.cache(), small.bank(), small.objective(made)
    config = small.config(precision=precision, steps=2)
    torch.set_default_dtype(torch.float64)
    try:
        found = DistillTrainer(*given, config).fit().history
    finally:
        torch.set_default_dtype(torch.float32)
    expected = small.trainer("bk_base", precision=precision, steps=2).fit().history
    assert untimed(found) == untimed(expected)


def test_steps_past_the_last_keep_its_rate() -> None:
    step = step_on("cpu", steps=2, lr_schedule="cosine")
    rates = []
    for _ in range(4):
        step()
        rates.append(float(step.lr))
    assert rates[0] > rates[1] == rates[2] == rates[3] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_step_reads_nothing_back_and_draws_from_no_generator(device: str, objective: str) -> None:
    """The meta device has no values, so every operation that would wait for a GPU fails there."""
    step = step_on(device, OBJECTIVES[objective])
    for _ in range(2):
        with NoHostSync():
            step()


class Sins(nn.Module):
    """Operations that a model must not contain during a step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        if self.kind == "item":
            return x * x.sum().item()
        if self.kind == "condition":
            return x if x.sum() > 0 else -x
        if self.kind == "boolean index":
            return x[x > 0]
        if self.kind == "boolean assignment":
            y = x.clone()
            y[x > 0] = 0.0
            return y
        if self.kind == "nonzero":
            return x.nonzero()
        if self.kind == "dropout":
            return nn.functional.dropout(x, 0.5)
        if self.kind == "randn":
            return x + torch.randn_like(x)
        if self.kind == "random":
            return x * random.random()
        if self.kind == "numpy":
            return x * np.random.rand()  # noqa: NPY002
        return x.to("meta" if x.device.type == "cpu" else "cpu")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("item", r"a value read on the host \(aten._local_scalar_dense.default\) at .*test_step.py:\d+"),
        ("condition", "a value read on the host"),
        ("boolean index", "an index of booleans"),
        ("boolean assignment", "an index of booleans"),
        ("nonzero", "a result whose size depends on values"),
        ("dropout", "random numbers of a stateful generator"),
        ("randn", "random numbers of a stateful generator"),
        ("random", "no random numbers but Philox's, got some of Python's random"),
        ("numpy", "no random numbers but Philox's, got some of NumPy's random"),
        ("copy", "a copy between cpu and meta"),
    ],
)
def test_the_guard_names_what_waits(kind: str, message: str) -> None:
    x = torch.ones(3, 4)
    with pytest.raises(KernelError, match=message), NoHostSync():
        Sins(kind)(x)
    with NoHostSync():  # other operations are allowed
        nn.functional.dropout(x, 0.0)
        nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])
        x[torch.tensor([0, 2])] = 1.0


def weights_after(execution: str, steps: int, device: str = "cpu", **options: Any) -> list[Tensor]:
    step = step_on(device, OBJECTIVES["every loss"], steps=steps, **options)
    advance = runner(step, nn.Module(), execution)  # type: ignore[arg-type]
    for _ in range(steps):
        advance()
    return [*step.parameters, step.totals, step.counter]


def test_compiled_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph with draw, models and losses; traced and executed by the ops, it gives the same bits."""
    monkeypatch.setattr(TrainStep.compile, "__kwdefaults__", {"backend": "aot_eager"})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for one, two in zip(weights_after("compiled", 3), weights_after("eager", 3), strict=True):
        assert torch.equal(one, two)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1


def test_gradient_checkpoints_change_nothing() -> None:
    """Also with taps inside of the checkpointed segments: the same weights, and no wait for the device."""
    results = []
    for wanted in (False, True):
        step = step_on("cpu")
        student = step.objective._knowledge.student  # type: ignore[attr-defined]
        if wanted:
            student.enable_gradient_checkpointing()
        with _checkpoints_without_rng(student), NoHostSync():
            step()
        step()
        assert student.is_gradient_checkpointing is wanted
        results.append([*step.parameters, step.totals])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_gradient_checkpoints_around_what_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The attention of a fused student is measured in its first step, inside of the checkpointed segments."""
    monkeypatch.delenv("FASTDISTILL_ATTENTION")
    monkeypatch.setenv("FASTDISTILL_CACHE", str(tmp_path))
    results = []
    for wanted in (True, False):
        trainer = small.trainer(fuse=True, steps=2)
        if wanted:
            trainer.student.enable_gradient_checkpointing()  # type: ignore[operator]
        trainer.fit()
        assert (tmp_path / "attention.json").exists()
        results.append([*trainer.student.parameters()])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_graph_is_eager(precision: Any) -> None:
    """The bits are equal after several replays, although every other buffer of the process has moved in between."""
    for one, two in zip(
        weights_after("graph", WARM_UP + 4, "cuda", precision=precision),
        weights_after("eager", WARM_UP + 4, "cuda", precision=precision),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rolling", [Rolling(), Rolling(every=2, steps=10, groups=4)])
def test_a_graph_is_eager_with_fused_models(rolling: Rolling) -> None:
    """The digits' U-Nets; also the step before the capture, which runs in a mode that watches it, has the same bits."""
    weights = []
    for execution in ("eager", "graph"):
        setup = digits(torch.device("cuda"))
        data = setup.schedule, setup.cache, setup.bank, RandomConditioning(taps=setup.taps, rolling=rolling)
        config = TrainConfig(steps=WARM_UP + 4, batch=64, lr=1e-3, execution=execution, fuse=True)  # type: ignore[arg-type]
        run = DistillTrainer(setup.teacher, setup.student, *data, config, device="cuda")
        run.fit()
        weights.append([p.detach().clone() for p in run.step.parameters])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_graph_of_compiled_steps_is_compiled_steps() -> None:
    """The kernels are the same, so the bits are equal."""
    steps = WARM_UP + 4
    for one, two in zip(
        weights_after("compiled_graph", steps, "cuda"), weights_after("compiled", steps, "cuda"), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_holds_what_ddp_does(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank acts as one of two; the bits are those of its eager steps."""
    monkeypatch.setenv(distributed.ERROR_HANDLING, "0")
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    try:
        steps = graph.DDP_WARM_UP + 4
        for one, two in zip(weights_after("graph", steps, "cuda"), weights_after("eager", steps, "cuda"), strict=True):
            assert torch.equal(one, two)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_the_average_of_a_power_of_time_has_its_width(width: float) -> None:
    """After any number of steps, mean and standard deviation of the averaged steps are as specified."""
    config = TrainConfig(steps=4000, ema_schedule="power", ema_width=width)
    weights = average_weights(config)
    assert weights is not None and float(weights[0]) == 1.0
    share = torch.zeros(4000, dtype=torch.float64)
    for step, weight in enumerate(weights.double()):
        share *= 1 - weight
        share[step] = weight
        if step + 1 in (1000, 4000):
            at = torch.arange(1, 4001) / (step + 1)
            mean = (share * at).sum()
            assert float(share.sum()) == pytest.approx(1.0)
            assert float((share * (at - mean).square()).sum().sqrt()) == pytest.approx(width, rel=0.01)
    assert average_weights(TrainConfig()) is None


def test_the_averaged_student_is_that_average() -> None:
    run = tiny.trainer(steps=6, ema_schedule="power", ema_width=0.2)
    weights, expected = average_weights(run.config), 0.0
    assert weights is not None
    for done, weight in enumerate(weights.tolist()):
        run.step.prepare(done)
        run.step()
        now = run.student.first.weight.detach().double()
        expected = (1 - weight) * expected + weight * now
    torch.testing.assert_close(run.ema_student().first.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_schedule_of_the_average_identifies_a_run() -> None:
    def told(**options: Any) -> Any:
        return tiny.trainer(**options)._fingerprint["config"]

    assert "ema_schedule" not in told() and told()["ema_decay"] == TrainConfig().ema_decay
    power = told(ema_schedule="power")
    assert power["ema_width"] == 0.1 and "ema_decay" not in power
