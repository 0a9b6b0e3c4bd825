# SPDX-License-Identifier: Apache-2.0
"""The memory of planned steps against the live storage of real ones, and against the sizes of what they keep."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from fastdistill.models import make_student
from fastdistill.models.families import family_of
from fastdistill.plan import Job
from fastdistill.plan.memory import Layout, memory, total
from fastdistill.plan.step import trace
from fastdistill.train import DistillTrainer
from tests import tiny
from tests.models import tiny_families as small
from tests.train import test_families as trained

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"fuse": True},
    "checkpointed": {"gradient_checkpointing": True},
    "parts": {"micro_batch": 2},
    "bfloat16": {"precision": "bfloat16"},
}
QUICK = [("sd3", "checkpointed"), ("pixart_sigma", "fused"), ("dit", "parts")]


def job(run: DistillTrainer, name: str) -> Job:
    """The run of a trainer, without its memory."""
    spec = trained.UNETS if small.TINY[name][0] == "unet" else "half_depth"
    setting = run._setting
    return Job(
        teacher=lambda: small.model(name).to("meta"),
        student=lambda teacher: make_student(teacher, spec),
        objective=lambda made: tiny.features(*zip(made.teacher_taps, made.student_taps, strict=True)),
        schedule=setting.schedule,
        latents=small.cache(name).latents.to("meta"),
        prompts={bank: rows.to("meta") for bank, rows in small.bank(name).banks.items()},
        prediction_type=family_of(run.teacher).prediction_type,  # type: ignore[arg-type]
        config=run.config,
        teacher_dtype=torch.float32,
        device="cpu",
    )


def living() -> dict[int, int]:
    """Bytes of all storages of tensors, by address."""
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def peak(run: DistillTrainer, kept: int) -> int:
    """Bytes of a real step at its peak: what is there before, and what the step allocates on top."""
    found = trace(run.step, run._setting)
    held = next(i for i, number in enumerate(found.events) if found.origins[max(number, ~number)])
    live = found.live()
    return kept + int(live.max() - live[held - 1])


@pytest.mark.parametrize(("name", "options"), [
    pytest.param(name, options, marks=[] if (name, options) in QUICK else pytest.mark.slow)
    for name in small.TINY for options in OPTIONS
])  # fmt: skip
def test_planned_memory_is_that_of_a_real_step(name: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tenth, as what operators of a CPU allocate differs a little from those of the meta device."""
    monkeypatch.setenv("FASTDISTILL_ATTENTION", "default")  # not what is the fastest here
    gc.collect()
    before = living()
    run = trained.make(name, **OPTIONS[options])
    run.step.prepare(0)
    run.step()
    gc.collect()
    kept = sum(size for place, size in living().items() if place not in before)
    real = peak(run, kept)
    run.close()
    size = run.config.micro_batch or run.config.batch
    parts = memory(job(run, name).traced(size < run.config.batch).trace, size, run.config.batch, Layout(cuda=False))
    assert abs(total(parts) - parts["workspace"] - real) < 0.1 * real
