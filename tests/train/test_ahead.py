# SPDX-License-Identifier: Apache-2.0
"""With the teacher one step ahead, a run has the same bits as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import GuidanceDistillation
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.distill.regions import Regions
from fastdistill.distill.rolling import Rolling
from fastdistill.errors import InputError
from fastdistill.train import DistillTrainer
from tests import tiny

Net = tiny.Net


class Asked(Net):
    """Counts the calls with a batch."""

    calls = 0

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        self.calls += len(x) > 1
        return super().forward(x, timestep, encoder_hidden_states)


def state(run: DistillTrainer) -> list[Tensor]:
    optimizer = [t for s in run.step.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return [*(p.detach().clone() for p in run.student.parameters()), *(t.clone() for t in optimizer)]


def guided() -> GuidanceDistillation:
    return GuidanceDistillation(
        3.0, probability="exp", loss_weighting="uniform", weights=Weights(1.0, 0.5, 0.25), taps=(("mid", "mid"),)
    )


CLOCKS = {"seconds", "waited_data", "waited_checkpoint"}
OBJECTIVES = {
    "every loss": tiny.features,
    "output": lambda: RandomConditioning(weights=Weights(1.0, 0.0, 0.0)),
    "features of other widths": tiny.features,
    "guided": guided,
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_same_bits(name: str, precision: str) -> None:
    """Weights, moments, averages and metrics are equal. The teacher is called once per step, plus once in total."""
    found = []
    for ahead in (False, True):
        teacher = Asked(8 if name.startswith("features of") else 6)
        run = tiny.trainer(teacher, Net(seed=1), OBJECTIVES[name](), steps=5, precision=precision, teacher_ahead=ahead)
        history = run.fit().history
        assert teacher.calls == 5 + ahead
        found.append((state(run), [{k: v for k, v in m.items() if k not in CLOCKS} for m in history]))
    (plain, metrics), (ahead_of, same) = found
    assert metrics == same
    for a, b in zip(plain, ahead_of, strict=True):
        assert torch.equal(a, b)


def test_resumed(tmp_path: Path) -> None:
    """A stopped run, with or without the option, continues with the same bits."""
    whole = tiny.trainer(steps=6)
    whole.fit()
    for options in ((True, True), (False, True), (True, False)):
        directory = tmp_path / str(options)
        for steps, ahead in zip((3, 6), options, strict=True):
            run = tiny.trainer(steps=steps, teacher_ahead=ahead)
            run.fit(directory)
        assert all(torch.equal(a, b) for a, b in zip(state(run), state(whole), strict=True))


def test_a_step_that_failed_is_done_again() -> None:
    """Also if it failed after the teacher was called for the next step."""
    plain = tiny.trainer(steps=3)
    plain.fit()
    run = tiny.trainer(steps=3, teacher_ahead=True)
    step, update = run.step, run.step.optimizer.update
    failed = []

    def fail(*_: Any) -> None:
        failed.append(1)
        step.optimizer.update = update  # type: ignore[method-assign]
        raise RuntimeError("planted")

    for number in range(3):
        step.prepare(number)
        if number == 1:
            step.optimizer.update = fail  # type: ignore[method-assign]
            with pytest.raises(RuntimeError, match="planted"):
                step()
            step.optimizer.zero_grad(set_to_none=True)
        step()
    assert failed
    for a, b in zip(run.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_that_do_not_follow_one_another() -> None:
    """Steps that were not prepared: a direct call is a step too."""
    run, plain = tiny.trainer(teacher_ahead=True), tiny.trainer()
    for number in (0, 1, 7, 3):
        for trainer in (run, plain):
            trainer.step.counter[1] = number
            trainer.step.prepare(number)
            trainer.step()
    for trainer in (run, plain):
        trainer.step()
        trainer.step()
    for a, b in zip(run.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_after_the_end() -> None:
    """After the end, the stored output is released like the other buffers, and computed again when needed."""
    run = tiny.trainer(steps=2, teacher_ahead=True)
    run.fit()
    assert not run.step.objective.taught  # type: ignore[attr-defined]
    plain = tiny.trainer(steps=3)
    plain.fit()
    run.step.prepare(2)
    run.step()
    for a, b in zip(run.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_measured_probability() -> None:
    """p(t) is measured before the teacher is called for the first time."""
    found = []
    for ahead in (False, True):
        objective = RandomConditioning("measured", {"samples": 8}, weights=Weights(1.0, 0.0, 0.0))
        run = tiny.trainer(objective=objective, teacher_ahead=ahead, steps=4)
        run.fit()
        found.append(state(run))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"micro_batch": 2}, r"the batch comes in parts \(config.micro_batch\)"),
        (
            {"objective": RandomConditioning(rolling=Rolling(every=2), weights=Weights(1.0, 0.0, 0.0))},
            "states of the next step",
        ),
        (
            {"objective": RandomConditioning(regions=Regions(count=2), weights=Weights(1.0, 0.0, 0.0))},
            r"prompts of the next step \(regions\)",
        ),
        ({"objective": RandomConditioning(weights=Weights(0.0, 0.0, 1.0))}, "no loss that asks the teacher"),
    ],
)
def test_what_cannot_be_ahead(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"config.teacher_ahead: expected false, got true, and .*{reason}"):
        tiny.trainer(teacher_ahead=True, **options)


def test_banks_on_the_disk_are_refused(tmp_path: Path) -> None:
    bank = tiny.bank()
    bank.save(tmp_path)
    with pytest.raises(InputError, match="rows of banks are read ahead for the step under way alone"):
        tiny.trainer(teacher_ahead=True, prompts=PromptBank.open(tmp_path))


def test_compiled() -> None:
    made = []
    for ahead in (False, True):
        torch._dynamo.reset()
        run = tiny.trainer(teacher_ahead=ahead, steps=3)
        run.step.compile(backend="aot_eager")
        for number in range(3):
            run.step.prepare(number)
            run.step()
        made.append(state(run))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["every loss", "guided"])
def test_same_bits_in_a_graph(name: str) -> None:
    found = []
    for ahead in (False, True):
        run = on_a_gpu(name, "graph", ahead)
        run.fit()
        found.append(state(run))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["every loss", "guided"])
def test_the_losses_of_a_compiled_graph(name: str) -> None:
    """The compiler rounds a teacher apart differently. The weights hardly move, so the losses differ by rounding alone
    in each step: they are sums of squares of bfloat16 outputs."""
    plain, ahead = (on_a_gpu(name, "compiled_graph", ahead, lr=1e-12).fit().history for ahead in (False, True))
    eps = torch.finfo(torch.bfloat16).eps
    for a, b in zip(plain, ahead, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=4 * eps)


def on_a_gpu(name: str, execution: str, ahead: bool, **given: Any) -> DistillTrainer:
    options = {"steps": 12, "execution": execution, "teacher_ahead": ahead, "device": "cuda", **given}
    return tiny.trainer(Net(64), Net(64, seed=1), OBJECTIVES[name](), **options)
