# SPDX-License-Identifier: Apache-2.0
"""The trainer: exact resume, clean stops, and errors before anything is launched or written."""

from __future__ import annotations

import copy
import itertools
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.distill import Weights
from fastdistill.errors import FastdistillError, InputError, StorageError
from fastdistill.models import make_student
from fastdistill.train import DistillTrainer
from fastdistill.train.checkpoint import steps
from fastdistill.train.loop import _Run
from fastdistill.train.metrics import read_metrics
from fastdistill.train.scaling import LossScale
from fastdistill.train.state import state_of
from fastdistill.train.step import learning_rates
from tests import small, tiny
from tests.harness import EPS
from tests.processes import begin


def state(trainer: DistillTrainer) -> dict[str, Tensor]:
    return state_of(trainer.step, trainer.student)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Interrupted(BaseException):  # like a kill: nothing is saved
    pass


ALL_STOPS = [pytest.param(*of, marks=pytest.mark.slow) for of in ((1, "channel_base"), (3, "bk_base"), (4, "bk_base"))]


@pytest.mark.parametrize(("stop_after", "kind"), [(1, "bk_base"), (3, "channel_base"), (4, "channel_base"), *ALL_STOPS])
def test_resume_is_exact(tmp_path: Path, kind: str, stop_after: int) -> None:
    """A run that is stopped anywhere, even between checkpoints, ends with the bits of an uninterrupted run."""
    whole = small.trainer(kind)
    expected = whole.fit()

    def stop(done: int, _: object) -> None:
        if done == stop_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        small.trainer(kind).fit(tmp_path, progress=stop)
    again = small.trainer(kind)
    result = again.fit(tmp_path)
    assert same(state(again), state(whole))
    losses = [[m["loss"] for m in r.history] for r in (expected, result)]
    assert losses[0] == losses[1] == [m["loss"] for m in read_metrics(tmp_path / "metrics.jsonl")]


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_resume_is_exact_in_low_precision(tmp_path: Path, precision: str) -> None:
    whole = small.trainer("channel_base", precision=precision)
    whole.fit()
    small.trainer("channel_base", precision=precision, steps=3).fit(tmp_path)
    again = small.trainer("channel_base", precision=precision)
    again.fit(tmp_path)
    assert same(state(again), state(whole))


def test_float16_trains_under_a_loss_scale_that_finds_its_size(tmp_path: Path) -> None:
    """A scale that is too large skips updates and is halved until it fits; then the losses are close to float32's."""
    trainer = small.trainer("bk_base", precision="float16", log_every=1, steps=10)
    trainer.step.scaling.value.fill_(2.0**24)  # type: ignore[union-attr]
    history = trainer.fit().history
    skipped, scale = int(history[-1]["skipped"]), float(trainer.step.scaling.value)  # type: ignore[union-attr]
    assert 0 < skipped < 8 and scale == 2.0 ** (24 - skipped)
    assert all(p.dtype == torch.float16 for p in trainer.student.parameters())
    own = small.trainer("bk_base", log_every=1, steps=10).fit().history
    trained = [(a, b) for a, b in zip(history, own, strict=True) if a["gradient_norm"] > 0]
    assert trained[0][0]["gradient_norm"] == pytest.approx(own[0]["gradient_norm"], rel=0.5)
    assert history[0]["loss"] == pytest.approx(own[0]["loss"], rel=0.02)
    assert history[-1]["loss"] < history[0]["loss"] and trainer.ema_student().dtype == torch.float32


def test_the_loss_scale() -> None:
    scaling = LossScale(torch.device("cpu"))
    fine, broken = torch.tensor(4.0, dtype=torch.float64), torch.tensor(float("nan"), dtype=torch.float64)
    scaling.update(broken)
    assert scaling.value == 2.0**15 and scaling.good == 0
    for step in range(1, 2000):
        scaling.update(fine)
        assert scaling.value == 2.0**15 and scaling.good == step
    scaling.update(fine)
    assert scaling.value == 2.0**16 and scaling.good == 0
    scaling.good.fill_(1500)
    scaling.update(broken)
    assert scaling.value == 2.0**15 and scaling.good == 0
    scaling.value.fill_(1.0)
    scaling.update(broken)
    assert scaling.value == 1.0


def test_updates_that_are_skipped_are_counted_and_saved(tmp_path: Path) -> None:
    """A gradient that is not finite does not end the run: the weights stay, metrics and checkpoints count it."""
    trainer = small.trainer(log_every=1)
    calls = iter(range(100))
    parameter = next(trainer.student.parameters())
    parameter.register_hook(lambda g: g * (torch.inf if next(calls) == 3 else 1.0))
    weights = []
    history = trainer.fit(tmp_path, progress=lambda *_: weights.append(parameter.detach().clone())).history
    assert [m["skipped"] for m in history] == [0, 0, 0, 1, 1, 1]
    assert history[3]["gradient_norm"] == 0 and all(m["gradient_norm"] > 0 for m in history if m["step"] != 4)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [False] * 3 + [True] + [False] * 2
    again = small.trainer(log_every=1, steps=8)
    assert [m["skipped"] for m in again.fit(tmp_path).history] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_the_norm_is_a_mean_over_the_updates(tmp_path: Path) -> None:
    """Also if a run is continued within a log interval."""
    each = small.trainer(log_every=1).fit().history
    trainer = small.trainer(log_every=3)
    assert trainer.fit(tmp_path).history[0]["gradient_norm"] == pytest.approx(
        sum(m["gradient_norm"] for m in each[:3]) / 3, rel=4 * EPS
    )
    half = small.trainer(log_every=3)
    half.step.optimizer.skipped.fill_(2)
    half.step.totals[-1] = 6.0
    metrics = _Run(half.step, half.student, {}, half.config).log(3)
    assert metrics["gradient_norm"] == 6.0 and metrics["skipped"] == 2


@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"precision": "float16"}], ids=str)
def test_the_loss_of_each_tap_is_logged(tmp_path: Path, options: dict[str, Any]) -> None:
    """In metrics.jsonl, by the names of the student's modules, unscaled. The sum and each tap are rounded once."""
    made = small.student()
    small.trainer(steps=2, log_every=1, **options).fit(tmp_path)
    for entry in read_metrics(tmp_path / "metrics.jsonl"):
        taps = [entry[f"feature/{name}"] for name in made.student_taps]
        assert len(taps) > 2 and len(set(taps)) == len(taps) and min(taps) > 0
        assert sum(taps) == pytest.approx(entry["feature"], rel=4 * EPS)
        named = [key.partition("/") for key in entry if "/" in key]
        assert sorted(named) == sorted((kind, "/", tap) for kind in ("feature", "spread") for tap in made.student_taps)


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    first = small.trainer()
    first.fit(tmp_path)
    again = small.trainer()
    assert again.fit(tmp_path).steps == 6 and same(state(again), state(first))


def test_a_constant_rate_can_go_on_for_more_steps(tmp_path: Path) -> None:
    small.trainer(steps=4).fit(tmp_path)
    longer = small.trainer(steps=6)
    longer.fit(tmp_path)
    whole = small.trainer(steps=6)
    whole.fit()
    assert same(state(longer), state(whole))


def test_training_lowers_the_loss_and_moves_the_adapters() -> None:
    trainer = small.trainer("channel_base", steps=60, batch=16, lr=3e-3, log_every=10)
    before = [p.detach().clone() for m in trainer.step.objective.trained for p in m.parameters()]
    history = trainer.fit().history
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    after = [p for m in trainer.step.objective.trained for p in m.parameters()]
    assert before and all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_gradient_is_clipped_adapters_included() -> None:
    trainer = small.trainer("channel_base", clip=1e-3)
    trainer.step()
    moments = [trainer.step.optimizer.state[p]["exp_avg"] for p in trainer.step.parameters]
    norm = torch.stack([m.norm() for m in moments]).norm().item()
    adapters = {id(p) for m in trainer.step.objective.trained for p in m.parameters()}
    assert adapters <= {id(p) for p in trainer.step.parameters}
    # The first moment after one step; clipping adds 1e-6 to a norm that is above 0.1.
    assert norm == pytest.approx((1 - 0.9) * 1e-3, rel=2e-5)


def test_the_average_starts_from_the_student_and_is_what_is_exported() -> None:
    trainer = small.trainer(ema_decay=0.5, steps=2)
    start = {k: v.clone() for k, v in trainer.student.named_parameters()}
    trainer.step()
    exported = dict(trainer.ema_student().named_parameters())
    for name, now in trainer.student.named_parameters():
        expected = start[name] + (1 - 0.1) * (now - start[name])  # the decay is (1 + 0) / (10 + 0) at the first step
        torch.testing.assert_close(exported[name], expected.detach(), rtol=4 * EPS, atol=4 * EPS * 1e-3)  # of the rate
    assert not any(p.requires_grad for p in exported.values())


def test_learning_rates() -> None:
    constant = learning_rates(small.config(steps=10, warmup=4, lr=1.0))
    assert constant.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6], rel=4 * EPS)
    cosine = learning_rates(small.config(steps=10, warmup=2, lr=2.0, lr_schedule="cosine"))
    assert cosine[2] == 2.0 and cosine[6] == pytest.approx(1.0, rel=4 * EPS) and 0 < cosine[9] < 0.1


class NoReading(TorchDispatchMode):
    """Raises an error if a value is copied to the host, or a shape depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise AssertionError(f"the step calls {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"weights": Weights(task=0.5), "with_replacement": True}], ids=str)
def test_the_step_reads_nothing_back(changes: dict[str, Any]) -> None:
    trainer = small.trainer("channel_base", changes)
    trainer.step()  # the first step creates buffers
    with NoReading():
        trainer.step()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            trainer.step.lr.item()
    assert trainer.step.counter.tolist() == [0, 2]


def test_a_diffusers_scheduler_will_do() -> None:
    own = small.teacher()
    made = small.student(model=own)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    rest = small.cache(), small.bank(), small.objective(made), small.config()
    losses = {
        name: [m["loss"] for m in DistillTrainer(own, copy.deepcopy(made.model), schedule, *rest).fit().history]
        for name, schedule in {"diffusers": scheduler, "ours": small.SCHEDULE, "other": NoiseSchedule.linear()}.items()
    }
    # The tables differ by rounding in float32, which training amplifies; other schedules give very different losses.
    for theirs, ours, other in zip(*losses.values(), strict=True):
        assert abs(theirs - ours) < 0.01 * abs(theirs - other)


def test_what_is_no_scheduler_is_refused() -> None:
    own = small.teacher()
    made = small.student(model=own)
    with pytest.raises(InputError, match=r"^schedule: expected a diffusers scheduler with alphas_cumprod, got a str"):
        DistillTrainer(own, made.model, "folder", small.cache(), small.bank(), small.objective(made), small.config())


def test_ctrl_c_ends_the_step_and_saves(tmp_path: Path) -> None:
    trainer = small.trainer(checkpoint_every=100)

    def press(done: int, _: object) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 6"):
        trainer.fit(tmp_path, progress=press)
    assert list(steps(tmp_path)) == [3] and signal.getsignal(signal.SIGINT) == handler
    again, whole = small.trainer(checkpoint_every=100), small.trainer(checkpoint_every=100)
    again.fit(tmp_path)
    whole.fit()
    assert same(state(again), state(whole))


def train_on(directory: Path) -> None:
    torch.set_num_threads(1)
    small.trainer(steps=10**6, execution="eager", checkpoint_every=1, log_every=1).fit(directory)


def test_killed_at_any_moment_nothing_is_half_written(tmp_path: Path) -> None:
    process = begin(train_on, tmp_path)
    deadline = time.monotonic() + 120
    while len(steps(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    reached = max(steps(tmp_path))
    again, whole = small.trainer(steps=reached + 2), small.trainer(steps=reached + 2)
    assert again.fit(tmp_path).steps == reached + 2
    whole.fit()
    assert same(state(again), state(whole))


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path) -> None:
    small.trainer().fit(tmp_path)
    newest = list(steps(tmp_path).values())[-1]
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    for content in (bytes(data), bytes(data[:100])):
        newest.write_bytes(content)
        with pytest.warns(UserWarning, match=rf"{newest.name}: damaged.*; the one before is taken"):
            assert small.trainer().fit(tmp_path).steps == 6
        assert Path(f"{newest}.damaged").read_bytes() == content
    for path in steps(tmp_path).values():
        path.write_bytes(bytes(data[:100]))
    with pytest.warns(UserWarning), pytest.raises(StorageError, match=rf"{newest.name}: damaged.*delete them to begin"):
        small.trainer().fit(tmp_path)


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    small.trainer().fit(tmp_path)
    with pytest.raises(StorageError, match=r"config\.lr: expected 0\.002, got 0\.001.*another directory"):
        small.trainer(lr=2e-3).fit(tmp_path)
    with pytest.raises(StorageError, match=r"objective\.null_probability: expected 0\.2, got 0\.1"):
        small.trainer(changes={"null_probability": 0.2}).fit(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = small.trainer(lr=1e30)
    with pytest.raises(FastdistillError, match=r"expected finite metrics, got .*lower learning rate"):
        trainer.fit(tmp_path)
    assert not steps(tmp_path)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/fastdistill")):
        with pytest.raises(StorageError, match=str(place)):
            small.trainer().fit(place)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    small.trainer(steps=2).fit(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(StorageError, match="could not be written"):
            small.trainer(steps=4).fit(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(steps(tmp_path)) == [2] and not list(tmp_path.glob(".*.tmp"))
    assert small.trainer(steps=4).fit(tmp_path).steps == 4


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    def second(done: int, _: object) -> None:
        if done == 1:
            with pytest.raises(StorageError, match="another process is writing here"):
                small.trainer().fit(tmp_path)

    small.trainer().fit(tmp_path, progress=second)


def test_what_does_not_fit_together() -> None:
    own = small.teacher()
    made = small.student(model=own)
    rest = small.objective(made), small.config()
    with pytest.raises(InputError, match="width 12"):
        DistillTrainer(own, made.model, small.SCHEDULE, small.cache(), small.bank(width=16), *rest)
    with pytest.raises(InputError, match="student: expected at most the teacher's"):
        DistillTrainer(made.model, own, small.SCHEDULE, small.cache(), small.bank(), *rest)
    cache = small.cache()
    for latents, message in (
        (torch.randn(20, 4, 8, 8), r"latents: expected 3 channels \(in_channels of the teacher\), got 4"),
    ):
        with pytest.raises(InputError, match=message):
            DistillTrainer(
                own, made.model, small.SCHEDULE, type(cache)(latents, cache.prompt_index), small.bank(), *rest
            )
    with pytest.raises(InputError, match="prompt"):
        wrong = type(cache)(cache.latents, cache.prompt_index + 5)
        DistillTrainer(own, made.model, small.SCHEDULE, wrong, small.bank(), *rest)
    with pytest.raises(InputError, match=r"config: 2 problems\n.*steps: .*\n.*lr: "):
        DistillTrainer(own, made.model, small.SCHEDULE, cache, small.bank(), rest[0], small.config(steps=0, lr=-1.0))
    with pytest.raises(InputError, match=r"student: .*: expected float32, bfloat16 or float16 weights.*, got float64"):
        DistillTrainer(own, made.model.double(), small.SCHEDULE, cache, small.bank(), *rest)
    with pytest.raises(InputError, match=r"precision: input should be 'auto', .* or 'float16', got 'float8'"):
        config = small.config(precision="float8")
        DistillTrainer(own, made.model, small.SCHEDULE, cache, small.bank(), rest[0], config)
    with pytest.raises(InputError, match="layers_per_block"):
        make_student(own, {"layers_per_block": 3})


def test_the_teacher_is_left_alone() -> None:
    trainer = small.trainer()
    before = {k: v.clone() for k, v in trainer.teacher.state_dict().items()}
    trainer.fit()
    assert same(before, trainer.teacher.state_dict())
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    held = {id(p) for group in trainer.step.optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(id(p) for p in trainer.teacher.parameters())


def test_a_run_makes_no_text_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a tensor's text takes long and waits for the device; it belongs in messages alone."""

    def refused(self: Tensor, **_: Any) -> str:
        raise AssertionError("a text of a tensor")

    monkeypatch.setattr(torch.Tensor, "__repr__", refused)
    monkeypatch.setattr(nn.Parameter, "__repr__", refused)
    tiny.trainer(steps=2).fit()
