# SPDX-License-Identifier: Apache-2.0
"""State by name: what a run continues from, what is converted, and what is refused before anything changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastdistill import files
from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.errors import InputError, StorageError
from fastdistill.train import DistillTrainer
from fastdistill.train.checkpoint import steps
from fastdistill.train.state import check_storable, state_of
from tests import small
from tests.harness import untimed
from tests.train.ranks import Interrupted, Tiny, make, stop_after


def state(trainer: DistillTrainer) -> dict[str, Any]:
    found = state_of(trainer.step, trainer.student)
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in found.items()}


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(one[k], two[k]) if isinstance(one[k], Tensor) else one[k] == two[k] for k in one
    )


def refused(trainer: DistillTrainer, directory: Path, message: str) -> None:
    """It refuses to continue the run in the directory, and does not change."""
    before = state(trainer)
    with pytest.raises(StorageError, match=message):
        trainer.fit(directory)
    assert same(state(trainer), before)


def frozen(*names: str) -> Tiny:
    student = Tiny(6)
    for name in names:
        student.get_parameter(name).requires_grad_(False)
    return student


@pytest.mark.parametrize(("before", "after"), [((), ("inner.weight",)), (("inner.weight",), ())])
def test_parameters_frozen_or_unfrozen_in_between_are_named(
    tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    make(student=frozen(*before), steps=2).fit(tmp_path)
    words = ("frozen", "trained") if after else ("trained", "frozen")
    message = r"trains something else \(student.inner.weight: expected '{}', got '{}'\); use another".format(*words)
    refused(make(student=frozen(*after)), tmp_path, message)


class Reordered(Tiny):
    """The same parameters in another order, as after a refactoring."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        for name in ("inner", "outer"):
            module = self._modules.pop(name)
            self._modules[name] = module


def test_the_order_of_the_parameters_may_change(tmp_path: Path) -> None:
    whole = make()
    whole.fit()
    make(steps=2).fit(tmp_path)
    again = make(student=Reordered(6))
    again.fit(tmp_path)
    assert [*state(again)] != [*state(whole)] and same(state(again), state(whole))


def test_a_student_of_another_shape_or_other_names_is_refused(tmp_path: Path) -> None:
    make(steps=2).fit(tmp_path)
    refused(
        make(student=Tiny(4)),
        tmp_path,
        r"student.inner.weight: expected 'floating point \[4, 3, 3, 3\]', got 'floating point \[6, 3, 3, 3\]'",
    )
    student = Tiny(6)
    student.extra = nn.Linear(2, 2)
    refused(make(student=student), tmp_path, r"student.extra.bias: expected 'floating point \[2\]', got nothing")


def edited(directory: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Write the newest checkpoint again with other tensors or metadata, and the correct hash."""
    path = list(steps(directory).values())[-1]
    with safetensors.safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["fastdistill"])
    tensors = safetensors.torch.load_file(path)
    change(tensors, head)
    head["sha256"] = sha256_of_tensors(tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"fastdistill": json.dumps(head)}))


def test_nothing_is_broadcast_into_a_state(tmp_path: Path) -> None:
    make(steps=2).fit(tmp_path)
    name = "optimizer.student.inner.weight.exp_avg"
    edited(tmp_path, lambda tensors, _: tensors.update({name: torch.ones(3)}))
    refused(make(), tmp_path, rf"{name}: expected '\[6, 3, 3, 3\]', got '\[3\]'")
    edited(tmp_path, lambda tensors, _: tensors.update({name: torch.zeros(6, 3, 3, 3), "counter": torch.tensor(2)}))
    refused(make(), tmp_path, r"counter: expected '\[2\]', got '\[\]'")


def test_checkpoints_of_another_schema_are_refused(tmp_path: Path) -> None:
    make(steps=2).fit(tmp_path)
    edited(tmp_path, lambda _, head: head.update(schema=4))
    refused(
        make(), tmp_path, r"expected schema version 5 or newer, got 4; fastdistill 0\.1\.0\.dev0 .* wrote and reads it"
    )
    edited(tmp_path, lambda _, head: head.update(schema=6))
    refused(make(), tmp_path, "expected schema version 5 or older, got 6; a newer fastdistill wrote it")


class Tied(Tiny):
    """Two names for one parameter, a frozen parameter, and a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.again = nn.Linear(1, width)
        self.again.weight = self.time.weight
        self.register_buffer("mean", torch.rand(3))
        self.prompt.bias.requires_grad_(False)


def trained(trainer: DistillTrainer) -> dict[str, Tensor]:
    return {**trainer.step.parameters_by_name}


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
def test_from_low_precision_to_float32_the_masters_carry_over(tmp_path: Path, low: str) -> None:
    first = make(student=Tied(6), precision=low, steps=3)
    first.fit(tmp_path)
    again = make(student=Tied(6), steps=3)
    again.fit(tmp_path)  # only restores
    for (name, p), old in zip(trained(again).items(), trained(first).values(), strict=True):
        theirs, own = first.step.optimizer.state[old], again.step.optimizer.state[p]
        assert p.dtype == torch.float32
        if theirs:  # "again.bias" is not trained
            assert torch.equal(p, theirs["master"]), name
            assert own.keys() == theirs.keys() - {"master"} and all(torch.equal(own[k], theirs[k]) for k in own)
    student: Any = again.student
    assert student.again.weight is student.time.weight
    assert torch.equal(student.mean, first.student.mean.float())
    longer = make(student=Tied(6), steps=5)
    longer.fit(tmp_path)
    assert longer.step.counter.tolist() == [0, 5]


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
def test_from_float32_the_weights_are_rounded_and_kept_as_masters(tmp_path: Path, low: str) -> None:
    dtype = getattr(torch, low)
    first = make(student=Tied(6), steps=3)
    first.fit(tmp_path)
    again = make(student=Tied(6), precision=low, steps=3)
    again.fit(tmp_path)
    for (name, p), old in zip(trained(again).items(), trained(first).values(), strict=True):
        assert p.dtype == dtype and torch.equal(p, old.to(dtype)), name
        assert torch.equal(again.step.optimizer.state[p]["master"], old), name
    longer = make(student=Tied(6), precision=low, steps=5)
    longer.fit(tmp_path)
    assert longer.step.counter.tolist() == [0, 5]


class Extra(Tiny):
    """Modules with state in addition to their tensors: JSON values, and a tensor whose length changes."""

    def __init__(self, width: int, value: Any = None) -> None:
        super().__init__(width)
        self.seen: Any = value
        self.table = Table()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(self.seen, dict) and self.training:
            self.seen["forwards"] += 1
        return super().forward(*args, **kwargs)

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class Table(nn.Module):
    amax = torch.zeros(0)

    def get_extra_state(self) -> Tensor:
        return self.amax

    def set_extra_state(self, state: Tensor) -> None:
        self.amax = state


def test_extra_state_is_kept(tmp_path: Path) -> None:
    student = Extra(6, {"forwards": 0, "scale": 0.1, "names": ["a"]})
    first = make(student=student, steps=2)
    student.table.amax = torch.tensor([1.0, 2.5])
    count = student.seen["forwards"]
    first.fit(tmp_path)
    again = Extra(6, {"forwards": 0})
    make(student=again, steps=2).fit(tmp_path)
    assert again.seen == {"forwards": count + 2, "scale": 0.1, "names": ["a"]}
    assert again.table.amax.tolist() == [1.0, 2.5]


def test_a_teacher_may_have_extra_state() -> None:
    objective = RandomConditioning(weights=Weights(1, 0, 0))
    given = Extra(12, {"amax": torch.ones(2)}), Tiny(6), small.SCHEDULE, small.cache(), small.bank(), objective
    assert DistillTrainer(*given, small.config(steps=1)).fit().steps == 1


def test_extra_state_that_cannot_be_kept_is_refused_before_the_first_step(tmp_path: Path) -> None:
    student = Extra(6)
    trainer = make(student=student, steps=1)
    for value in ({"amax": torch.ones(2)}, {1: 2}, (1, 2), float("nan"), object()):
        student.seen = value
        kind = type(value).__name__
        message = f"student._extra_state: expected a dense tensor or a JSON value .*, got a {kind} that JSON"
        with pytest.raises(InputError, match=message):
            trainer.fit(tmp_path)
    assert trainer.step.counter.tolist() == [0, 0]
    trainer.fit()  # saves nothing


def test_a_dtype_that_no_checkpoint_has_is_refused_before_the_first_step(tmp_path: Path) -> None:
    student = Tiny(6)
    student.register_buffer("waves", torch.zeros(2, dtype=torch.complex128))
    trainer = make(student=student)
    with pytest.raises(InputError, match=r"student.waves: .*, got complex128, which safetensors does not have"):
        trainer.fit(tmp_path)
    assert trainer.step.counter.tolist() == [0, 0]


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(precision="bfloat16")
    needed = check_storable(trainer.step, trainer.student, {})
    trainer.fit(tmp_path / "kept")
    tensors = safetensors.torch.load_file(list(steps(tmp_path / "kept").values())[-1])
    assert needed == pytest.approx(sum(t.nbytes for t in tensors.values()), abs=300)  # counters
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("usage", (), {"free": needed - 1})())
    trainer = make(precision="bfloat16")
    with pytest.raises(StorageError, match="of free disk space"):
        trainer.fit(tmp_path / "full")
    assert trainer.step.counter.tolist() == [0, 0]


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    """The run is equal to that with Python numbers, and continues it."""
    weights = Weights(np.float32(1), torch.tensor(0.5), np.int64(0))  # type: ignore[arg-type]
    objective = RandomConditioning("const", {"value": np.float32(0.5)}, torch.tensor(0.25), weights, taps=TAPS)  # type: ignore[arg-type]
    given = Tiny(12), Tiny(6), small.SCHEDULE, small.cache(), small.bank(), objective
    settings = {"batch": np.int64(4), "lr": torch.tensor(2.0**-10), "steps": np.int32(2), "clip": float("inf")}
    DistillTrainer(*given, small.config(**settings)).fit(tmp_path)
    objective = RandomConditioning("const", {"value": 0.5}, 0.25, Weights(1.0, 0.5, 0.0), taps=TAPS)
    config = small.config(batch=4, lr=2.0**-10, steps=4, clip=float("inf"))
    DistillTrainer(Tiny(12), Tiny(6), *given[2:5], objective, config).fit(tmp_path)
    assert list(steps(tmp_path)) == [2, 4]


TAPS = (("inner", "inner"),)


def test_an_objective_that_cannot_be_described_is_refused_at_once() -> None:
    class Strange(RandomConditioning):
        def describe(self) -> dict[str, object]:
            return {"table": torch.ones(3)}

    given = Tiny(12), Tiny(6), small.SCHEDULE, small.cache(), small.bank(), Strange(taps=TAPS)
    with pytest.raises(InputError, match=r"objective.describe\(\): expected values that JSON holds"):
        DistillTrainer(*given, small.config())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(
        InputError, match=r"student: expected a parameter to train \(requires_grad\), got 8 frozen ones"
    ):
        make(student=Tiny(6).requires_grad_(False))


def test_a_run_of_a_version_that_logged_other_metrics_goes_on(tmp_path: Path) -> None:
    """The weights are equal to the bit; the metrics of the interval cover only the later steps."""
    options: dict[str, Any] = {"steps": 6, "log_every": 4, "checkpoint_every": 3}
    older = make(**options)
    gradients, step = older.step.gradients, older.step
    place = step.metric_names.index("spread/inner")
    del step.metric_names[place]
    step.totals = step.totals[:-1].clone()
    step.gradients = lambda: [v for i, v in enumerate(gradients()) if i != place]  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        older.fit(tmp_path, progress=stop_after(4))
    newer, whole = make(**options), make(**options)
    history = newer.fit(tmp_path).history
    assert [line["step"] for line in history] == [4, 6] and all(line["spread/inner"] > 0 for line in history)
    assert untimed(history[1:]) == untimed(whole.fit().history[1:]) and same(state(newer), state(whole))
