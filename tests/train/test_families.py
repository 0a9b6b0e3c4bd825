# SPDX-License-Identifier: Apache-2.0
"""Students with half of the teacher's size, for every family: fused or not, interrupted, and on two processes."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.models import make_student
from fastdistill.models.families import family_of
from fastdistill.train import DistillTrainer
from tests import tiny
from tests.harness import EPS
from tests.models import tiny_families as small
from tests.processes import as_ranks

UNETS = {"layers_per_block": 1}


def make(name: str, **options: Any) -> DistillTrainer:
    """A run of three steps with all losses and the schedule of such models."""
    teacher = small.model(name)
    made = make_student(teacher, UNETS if small.TINY[name][0] == "unet" else "half_depth")
    flow = family_of(teacher).prediction_type == "flow_prediction"
    schedule = FlowSchedule(50, 3.0, "logit_normal") if flow else tiny.SCHEDULE
    objective = tiny.features(*zip(made.teacher_taps, made.student_taps, strict=True))
    smooth = {"clip": 0.5, "eps": 1e-2, "steps": 3}  # so that the sign of an update does not depend on rounding errors
    data = {"latents": small.cache(name), "prompts": small.bank(name), "schedule": schedule}
    return tiny.trainer(teacher, made, objective, **data, **smooth | options)


def weights(run: DistillTrainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in run.student.state_dict().items()}


class Interrupted(BaseException):  # like a kill: nothing is saved
    pass


def interrupt(done: int, _: object) -> None:
    if done == 2:
        raise Interrupted


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", small.TINY)
def test_resume_is_exact(name: str, fuse: bool, tmp_path: Path) -> None:
    whole = make(name, fuse=fuse)
    whole.fit()
    with pytest.raises(Interrupted):
        make(name, fuse=fuse, checkpoint_every=1).fit(tmp_path, progress=interrupt)
    again = make(name, fuse=fuse, checkpoint_every=1)
    again.fit(tmp_path)
    for key, value in weights(again).items():
        assert torch.equal(value, whole.student.state_dict()[key]), key


def work(rank: int, directory: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    store, wait = f"file://{directory}/store", datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=wait)
    found = {}
    for name in small.TINY:
        run = make(name)
        found[name] = run.fit().history, weights(run)
    torch.save(found, Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Weights are equal on both ranks, and differ from those of one process only by rounding: gradients of norm 0.5 at
    most are summed in another order (at most a hundred roundings), times lr / eps = 0.1, for three updates."""
    as_ranks(work, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name in small.TINY:
        alone = make(name)
        history = alone.fit().history
        for key, value in one[name][1].items():
            assert torch.equal(value, two[name][1][key]), (name, key)
            bound = 3 * 0.1 * 0.5 * 100 * EPS + 4 * EPS * value.abs().max()
            assert (value - alone.student.state_dict()[key]).abs().max() <= bound, (name, key)
        assert one[name][0][0]["loss"] == pytest.approx(history[0]["loss"], rel=100 * EPS)
