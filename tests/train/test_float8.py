# SPDX-License-Identifier: Apache-2.0
"""Runs with a teacher in float8: its target, what is said of it, every way to run a step, and its end."""

from __future__ import annotations

import copy
import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from fastdistill import Grid, GuidanceDistillation
from fastdistill.distill import RandomConditioning, TrajectoryCache, Weights, generate_trajectory_cache
from fastdistill.errors import InputError, StorageError
from fastdistill.models import float8, make_student
from fastdistill.models.float8 import Float8Linear
from fastdistill.train import DistillTrainer
from fastdistill.train.sources import explain
from fastdistill.train.step import TrainStep
from tests import tiny
from tests.harness import untimed
from tests.models import tiny_families as small
from tests.processes import as_ranks
from tests.train.test_families import make, weights

LINE = re.compile(
    r"fp8 teacher: target changes by ([\d.e-]+) % \(relative RMS, measured on 8 samples; \d+ linear layers in float8"
)


def trainer(teacher: Any = None, objective: Any = None, **options: Any) -> DistillTrainer:
    """A tiny PixArt and half of it, by their outputs."""
    teacher = small.model("pixart_sigma") if teacher is None else teacher
    student = make_student(teacher, "half_depth", seed=1)
    data = {"latents": small.cache("pixart_sigma"), "prompts": small.bank("pixart_sigma")}
    data["latents"] = options.pop("latents", data["latents"])
    objective = objective or RandomConditioning(weights=Weights(1.0, 0.0, 0.0))
    return tiny.trainer(teacher, student, objective, **data, **{"steps": 3, "teacher_fp8": True} | options)


def moved(run: DistillTrainer) -> float:
    (line,) = run.about_teacher
    found = LINE.match(line)
    assert found is not None, line
    return float(found[1]) / 100


def test_the_students_target_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Its first loss is the distance to a teacher in float8; dtypes and numbers of the student stay as they are."""
    with caplog.at_level("INFO"):
        run = trainer()
    assert [r.message for r in caplog.records if "fp8" in r.message] == run.about_teacher
    assert 0 < moved(run) < 0.05 and "emulated on a CPU" in run.about_teacher[0]
    plain = trainer(teacher_fp8=False)
    assert plain.about_teacher == []
    for (name, p), (same, q) in zip(run.student.named_parameters(), plain.student.named_parameters(), strict=True):
        assert name == same and p.dtype == q.dtype and torch.equal(p, q)
    assert not any(isinstance(module, Float8Linear) for module in run.student.modules())
    loss, without = (each.fit().history[0]["output"] for each in (run, plain))
    assert loss != without and abs(loss - without) < 0.1 * without


def test_what_is_measured() -> None:
    """The relative distance of the outputs, of a teacher with weights eight bits wide to the one that was given."""
    teacher = small.model("pixart_sigma")
    run = trainer(teacher, batch=4, micro_batch=2)
    same = trainer(teacher=small.model("pixart_sigma"), batch=8)
    assert moved(run) == pytest.approx(moved(same), rel=1e-2)  # whatever the batch is
    setting, copied = run._setting, small.model("pixart_sigma").eval()
    draw = setting.batches(torch.zeros(50, dtype=torch.int64), null_probability=0.0, with_replacement=True)(
        torch.tensor([0, 0])
    )
    found = [setting.predict(m, draw.x_t, draw.timestep, draw.prompt).detach() for m in (copied, run.teacher)]
    distance = float((found[1] - found[0])[:, :4].norm() / found[0][:, :4].norm())
    assert 0.2 < distance / moved(run) < 5  # of other samples


def test_a_guided_target_moves_further() -> None:
    """By the difference of two answers, times the weight."""
    found = []
    for weight in (0.0, 20.0):
        objective = GuidanceDistillation(weight, weights=Weights(1.0, 0.0, 0.0), loss_weighting="uniform")
        with trainer(objective=objective) as run:
            found.append(moved(run))
            run.fit()
    assert found[1] > found[0] > 0


@pytest.mark.parametrize("stored", [False, True])
def test_states_of_a_sampler(stored: bool, tmp_path: Path) -> None:
    """At their own times and weights; in memory or on the disk."""
    grid, teacher = Grid.trailing(tiny.SCHEDULE, 4), small.model("pixart_sigma").eval()
    bank, index = small.bank("pixart_sigma"), torch.arange(4) % 3
    generate_trajectory_cache(tmp_path / "states", teacher, bank, index, (4, 8, 8), grid, 2.0, batch=4)
    opened = TrajectoryCache.open if stored else TrajectoryCache.load
    objective = GuidanceDistillation(2.0, grid=grid, states="trajectory", weights=Weights(1.0, 0.0, 0.0))
    with trainer(teacher, objective, latents=opened(tmp_path / "states")) as run:
        assert 0 < moved(run) < 0.1
        run.fit()


@pytest.mark.parametrize(
    "options", [{"fuse": True}, {"teacher_ahead": True}, {"micro_batch": 2}, {"precision": "bfloat16"}]
)
def test_other_options(options: dict[str, Any]) -> None:
    run, plain = trainer(**options), trainer()
    found = [each.fit().history[-1]["output"] for each in (run, plain)]
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TrainStep.compile.__kwdefaults__, "backend", "aot_eager")  # type: ignore[attr-defined]
    run, plain = trainer(execution="compiled"), trainer(execution="eager")
    found = [each.fit().history[-1]["output"] for each in (run, plain)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_resumed(tmp_path: Path) -> None:
    """With the same bits; not with another target."""
    whole = trainer(steps=4)
    whole.fit()
    trainer(steps=2).fit(tmp_path)
    with pytest.raises(StorageError, match="teacher_fp8"):
        trainer(steps=4, teacher_fp8=False).fit(tmp_path)
    run = trainer(steps=4)
    run.fit(tmp_path)
    for key, value in weights(run).items():
        assert torch.equal(value, whole.student.state_dict()[key]), key


def test_runs_of_before_go_on(tmp_path: Path) -> None:
    """Their fingerprint does not have the field."""
    run = trainer(teacher_fp8=False)
    assert "teacher_fp8" not in run._fingerprint["config"] and trainer()._fingerprint["config"]["teacher_fp8"] is True


def test_given_back_by_close() -> None:
    """Module by module, bit by bit; and by a trainer that could not be made."""
    teacher = small.model("pixart_sigma")
    state, modules = copy.deepcopy(teacher.state_dict()), dict(teacher.named_modules())
    with trainer(teacher) as run:
        assert any(isinstance(module, Float8Linear) for module in run.teacher.modules())
        for asked in (True, False):  # the other one would be taught by it, too
            with pytest.raises(InputError, match="teacher: expected one that no other trainer has, if it is in float8"):
                trainer(teacher, teacher_fp8=asked)
        run.fit()
    assert dict(teacher.named_modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    with pytest.raises(InputError, match="weights"):
        trainer(teacher, RandomConditioning(weights=Weights(0.0, 0.0, 0.0)))
    assert dict(teacher.named_modules()) == modules


def test_a_teacher_that_another_trainer_has() -> None:
    """Its target would change in the middle of a run; a trainer that is gone has none."""
    teacher = small.model("pixart_sigma")
    with trainer(teacher, teacher_fp8=False):
        with pytest.raises(InputError, match="teacher: expected one that no other trainer has"):
            trainer(teacher)
        trainer(teacher, teacher_fp8=False)
    trainer(teacher).close()


def test_adapters_on_the_teachers_own_weights() -> None:
    """The student continues with them unchanged."""
    teacher = small.model("pixart_sigma")
    student = make_student(teacher, LoraConfig(r=2, target_modules=["to_q"]))
    data = {"latents": small.cache("pixart_sigma"), "prompts": small.bank("pixart_sigma")}
    objective = RandomConditioning(weights=Weights(1.0, 0.0, 0.0))
    run = tiny.trainer(teacher, student, objective, **data, steps=2, teacher_fp8=True)
    own = dict(run.student.named_parameters())
    assert all(p.dtype == torch.float32 for p in own.values())
    run.fit()
    run.close()
    assert {p.data_ptr() for p in teacher.parameters()} <= {p.data_ptr() for p in own.values()}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd", {}, r"teacher: expected a transformer of .* for float8, got UNet2DConditionModel"),
        ("pixart_alpha", {}, "teacher: expected linear layers of torch in its blocks, of widths that are multiples"),
        ("dit", {"precision": "measured"}, r"config.teacher_fp8: expected false with precision 'measured'"),
    ],
)
def test_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(name, teacher_fp8=True, **options)


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "refuse", lambda device: "this GPU has compute capability 8.0")
    with pytest.raises(InputError, match=r"config.teacher_fp8: expected false, got true, and this GPU has compute"):
        trainer()


def test_a_teacher_that_is_not_finite_is_named() -> None:
    run = trainer()
    assert "are finite" in explain({}, run.teacher, run.student)
    run.teacher.transformer_blocks[1].attn1.to_q.weight.data[0, 0] = torch.nan  # type: ignore[index, union-attr]
    assert explain({}, run.teacher, run.student) == "the teacher's transformer_blocks.1.attn1.to_q.weight is not finite"


def work(rank: int, directory: str) -> None:
    """One process of two."""
    torch.set_num_threads(1)
    store, wait = f"file://{directory}/store", datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=wait)
    run = trainer()
    torch.save((untimed(run.fit().history), weights(run), run.about_teacher), Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    as_ranks(work, str(tmp_path))
    (history, own, line), (other, theirs, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert history == other and line == same
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())
    plain = trainer()
    assert plain.fit().history[-1]["output"] == pytest.approx(history[-1]["output"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("execution", ["eager", "graph", "compiled_graph"])
@pytest.mark.parametrize("fuse", [False, True])
def test_on_a_gpu(execution: str, fuse: bool) -> None:
    """Near the emulated run; a graph has the bits of the eager steps."""
    if (reason := float8.refuse(torch.device("cuda"))) is not None:
        pytest.skip(reason)
    options: dict[str, Any] = {"steps": 8, "fuse": fuse, "precision": "float32"}
    emulated = trainer(**options)
    run = trainer(execution=execution, device="cuda", **options)
    assert "emulated" not in run.about_teacher[0]
    assert moved(run) == pytest.approx(moved(emulated), rel=0.5)
    found, expected = run.fit().history, emulated.fit().history
    assert found[0]["output"] == pytest.approx(expected[0]["output"], rel=0.05)
    if execution == "graph":
        eager = trainer(execution="eager", device="cuda", **options)
        eager.fit()
        assert all(torch.equal(value, eager.student.state_dict()[key]) for key, value in weights(run).items())
