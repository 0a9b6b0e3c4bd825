# SPDX-License-Identifier: Apache-2.0
"""What a trainer changes on its models and restores, what callbacks may change, and how a stopped run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from fastdistill.distill import RandomConditioning
from fastdistill.errors import FastdistillError, InputError, Stopped
from fastdistill.train import DistillTrainer
from fastdistill.train.checkpoint import steps
from fastdistill.train.graph import runner
from fastdistill.train.loop import fit
from fastdistill.train.step import TrainStep
from tests import small, tiny
from tests.models import tiny_families as families
from tests.train.ranks import Tiny, make


def hooks(*models: nn.Module) -> int:
    modules = [module for model in models for module in model.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def trainer(teacher: nn.Module, student: nn.Module, **options: Any) -> DistillTrainer:
    data = small.SCHEDULE, small.cache(), small.bank(), RandomConditioning(taps=(("inner", "inner"),))
    return DistillTrainer(teacher, student, *data, small.config(**({"steps": 2} | options)))


def test_a_trainer_has_hooks_on_its_models_only_while_it_needs_them() -> None:
    models = Tiny(12), Tiny(6)
    first = trainer(*models)
    assert hooks(*models)
    del first
    assert not hooks(*models)
    first = trainer(*models)
    during: list[int] = []
    first.fit(progress=lambda *_: during.append(hooks(*models)))
    assert not hooks(*models)
    second = trainer(*models)
    second.fit(progress=lambda *_: during.append(hooks(*models)))
    assert not hooks(*models) and len(set(during)) == 1
    longer = trainer(*models, steps=4)
    longer.step.counter[1] = 2
    assert longer.fit().steps == 4 and longer.fit().steps == 4  # again, without a step to do
    with pytest.raises(InputError, match="step: expected one that was prepared"):
        longer.step()


def test_a_trainer_that_cannot_be_made_leaves_no_hooks() -> None:
    models = Tiny(12), Tiny(6)
    data = small.SCHEDULE, small.cache(), small.bank()
    for taps in ((("inner", "none"),), (("inner", "time"),)):
        with pytest.raises(InputError):
            DistillTrainer(*models, *data, RandomConditioning(taps=taps), small.config())
        assert not hooks(*models)


def test_a_closed_trainer_gives_the_teacher_back() -> None:
    teacher = Tiny(12)
    teacher.outer.requires_grad_(False)
    teacher.inner.eval()
    with trainer(teacher, Tiny(6)) as made:
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not hooks(teacher)
    assert teacher.training and not teacher.inner.training
    assert [n for n, p in teacher.named_parameters() if not p.requires_grad] == ["outer.weight", "outer.bias"]
    made.close()
    with pytest.raises(InputError, match="trainer: expected one that is open, got a closed one"):
        made.fit()
    made.ema_student()


def test_a_teacher_that_another_trainer_gave_back_is_frozen_again() -> None:
    teacher = Tiny(12)
    first, second = trainer(teacher, Tiny(6)), trainer(teacher, Tiny(6))
    first.close()
    assert teacher.training
    modes: list[bool] = []
    second.fit(progress=lambda *_: modes.append(teacher.training or any(p.requires_grad for p in teacher.parameters())))
    assert not any(modes)


@pytest.mark.parametrize("first", [0, 1])
def test_a_closed_trainer_takes_nothing_from_another_of_the_same_models(first: int) -> None:
    """In any order of closing, the other trainer's student still draws no labels and stays checkpointed."""

    def drawn() -> set[float]:
        return {m.dropout_prob for m in (*teacher.modules(), *student.modules()) if isinstance(m, LabelEmbedding)}

    teacher, student = families.model("dit"), families.model("dit", seed=1)
    before = drawn()
    given = teacher, student, tiny.features(("transformer_blocks.0",) * 2)
    data = {"latents": families.cache("dit"), "prompts": families.bank("dit"), "gradient_checkpointing": True}
    made = [tiny.trainer(*given, **data) for _ in range(2)]
    made[first].close()
    assert drawn() == {0.0} != before and student.is_gradient_checkpointing
    made[1 - first].fit()
    made[1 - first].close()
    assert drawn() == before and not student.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["fit", "close"])
def test_a_callback_neither_trains_nor_closes_its_trainer(name: str) -> None:
    made = trainer(Tiny(12), Tiny(6))
    with pytest.raises(InputError, match="trainer: expected one that is not training, got one inside of its own fit"):
        made.fit(callbacks=[(1, lambda *_: getattr(made, name)())])
    assert made.fit().steps == 2
    made.close()


class Norm(Tiny):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm, self.still = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.still(self.norm(super().forward(*args, **kwargs)))
        return output


def test_a_callback_that_evaluates_changes_no_step() -> None:
    """The training modes are restored, including those of submodules in eval mode."""
    results = []
    for evaluates in (False, True):
        teacher, student = Norm(12), Norm(6)
        made = trainer(teacher, student, steps=4)
        student.still.eval()

        def evaluate(done: int, _: object, made: Any = made, evaluates: bool = evaluates) -> None:
            if evaluates:
                made.student.eval()
                made.teacher.train()

        made.fit(progress=evaluate)
        assert int(student.norm.num_batches_tracked) == 4 and int(student.still.num_batches_tracked) == 0
        assert int(teacher.norm.num_batches_tracked) == 0
        results.append(student.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_a_student_left_in_eval_mode_trains_in_training_mode() -> None:
    student = Norm(6)
    made = trainer(Norm(12), student, steps=2)
    student.eval()
    made.fit()
    assert student.training and int(student.norm.num_batches_tracked) == 2


class Dropping(Tiny):
    def __init__(self, width: int, *, module: bool) -> None:
        super().__init__(width)
        self.part = nn.Sequential(nn.Dropout(0.5)) if module else nn.Identity()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.part(super().forward(*args, **kwargs))
        return output if self.module else nn.functional.dropout(output, 0.5, self.training)


@pytest.mark.parametrize("execution", ["compiled", "graph"])
def test_dropout_is_refused_where_it_cannot_be_drawn_again(monkeypatch: pytest.MonkeyPatch, execution: Any) -> None:
    monkeypatch.setattr("fastdistill.train.graph.refuse_graph", lambda *_: None)
    made = make(student=Dropping(6, module=True), execution=execution)
    message = (
        rf"execution '{execution}': the student draws random numbers itself \(part.0 \(Dropout\)\), .*; use 'eager'"
    )
    with pytest.raises(FastdistillError, match=message):
        made.fit()
    made.step.prepare(0)
    with pytest.warns(UserWarning, match=r"no CUDA graph, as the student draws .*; it runs eagerly"):
        runner(made.step, made.student, "auto")()
    made.student.part.eval()
    assert execution == "graph" or runner(made.step, made.student, execution)


def test_dropout_without_a_module_shows_when_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainStep.compile, "__kwdefaults__", {"backend": "aot_eager"})
    made = make(student=Dropping(6, module=False), execution="compiled")
    with pytest.raises(FastdistillError, match=r"step: the student draws random numbers itself, which .*; use 'eager'"):
        made.fit()


@contextmanager
def handler(number: int, own: Any) -> Iterator[None]:
    before = signal.signal(number, own)
    try:
        yield
    finally:
        assert signal.getsignal(number) == own
        signal.signal(number, before)


def kill(number: int) -> Any:
    return lambda done, _: os.kill(os.getpid(), number) if done == 1 else None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_saved_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int) -> None:
    with handler(signal.SIGTERM, signal.SIG_DFL), pytest.raises(KeyboardInterrupt) as stop:
        make(checkpoint_every=100).fit(tmp_path, progress=kill(number))
    message = f"stopped after step 1 of 4; saved in {tmp_path}"
    assert isinstance(stop.value, Stopped) and str(stop.value) == message and stop.value.code == 128 + number
    assert capsys.readouterr().err == f"\nfastdistill: {message}\n" and list(steps(tmp_path)) == [1]
    assert make().fit(tmp_path).steps == 4


def test_a_run_without_a_directory_says_that_nothing_is_saved() -> None:
    with pytest.raises(Stopped, match="stopped after step 1 of 4; nothing is saved without a directory"):
        make().fit(progress=kill(signal.SIGINT))


def test_an_uncaught_stop_ends_a_script_without_a_traceback() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        code = f"from fastdistill.errors import Stopped\nraise Stopped('stopped', {int(number)})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_handlers_of_the_program_are_called_and_ignored_signals_stay_ignored() -> None:
    called = []
    with handler(signal.SIGTERM, lambda number, _: called.append(number)), pytest.raises(Stopped):
        make().fit(progress=kill(signal.SIGTERM))
    assert called == [signal.SIGTERM]
    with handler(signal.SIGINT, signal.SIG_IGN):
        assert make().fit(progress=kill(signal.SIGINT)).steps == 4


def test_a_loop_needs_no_teacher() -> None:
    made = make(steps=1)
    assert fit(made.step, made.student, {}, made.config).steps == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_computed_whatever_the_caller_has_switched_off(mode: Any) -> None:
    losses = [m["loss"] for m in tiny.trainer(steps=3).fit().history]
    models = tiny.Net(), tiny.Net(seed=1)
    with mode():
        assert [m["loss"] for m in tiny.trainer(*models, steps=3).fit().history] == losses
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode) and not torch.is_grad_enabled()


def test_a_run_under_autocast_is_refused() -> None:
    """Autocast would use its copies of the weights of the first step until the end."""
    trainer = tiny.trainer()
    message = r"fit: expected to be called outside of autocast \(config.precision .*, got autocast to bfloat16"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=message):
        trainer.fit()


def test_a_student_changed_behind_its_trainer_is_refused() -> None:
    changes: dict[str, Callable[[Any], object]] = {
        "first.weight: expected 'float32, trained', got 'float32, frozen'": lambda net: net.first.requires_grad_(False),
        "mid.bias: expected 'float32, trained', got 'bfloat16, trained'": lambda net: net.mid.bfloat16(),
        "extra.weight": lambda net: net.add_module("extra", nn.Linear(1, 1)),
    }
    for message, change in changes.items():
        trainer = tiny.trainer()
        change(trainer.student)
        with pytest.raises(
            InputError, match=f"student: expected weights as when the trainer was made, got .*{message}"
        ):
            trainer.fit()
    with torch.inference_mode():
        student = tiny.Net(seed=1)
    with pytest.raises(
        InputError, match=r"student: expected trained weights made outside of torch.inference_mode, got f"
    ):
        tiny.trainer(student=student)
