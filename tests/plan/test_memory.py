# SPDX-License-Identifier: Apache-2.0
"""The memory of planned steps compared with the allocations of real ones, and with the sizes of what they keep."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.measure import allocated_gb
from fastdistill.errors import InputError
from fastdistill.models import float8, make_student
from fastdistill.models.families import family_of
from fastdistill.plan import Job, card_named, planned
from fastdistill.plan.memory import Layout, memory, total
from fastdistill.train import DistillTrainer
from fastdistill.train.graph import runner
from tests import tiny
from tests.models import tiny_families as small
from tests.train import test_families as trained

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"fuse": True},
    "checkpointed": {"gradient_checkpointing": True},
    "parts": {"micro_batch": 2},
    "bfloat16": {"precision": "bfloat16"},
    "ahead": {"teacher_ahead": True},
}
QUICK = [("sd3", "checkpointed"), ("pixart_sigma", "fused"), ("dit", "parts"), ("dit", "ahead")]


def job(run: DistillTrainer, name: str) -> Job:
    """The run of a trainer as a ``Job``, without its tensors."""
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
    places = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            with contextlib.suppress(RuntimeError):  # tensors of the compiler without memory
                places[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return places


def cases() -> Iterator[Any]:
    for name in small.TINY:
        for options in OPTIONS:
            yield pytest.param(name, options, "eager", marks=[] if (name, options) in QUICK else pytest.mark.slow)
        for options in ("plain", "fused"):
            yield pytest.param(name, options, "compiled", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "options", "execution"), list(cases()))
def test_planned_memory_is_that_of_a_real_step(
    name: str, options: str, execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tenth of the most memory that the allocator had given out at once: a CPU's operators, or the compiler's
    kernels, allocate slightly different amounts than those of the meta device."""
    monkeypatch.setenv("FASTDISTILL_ATTENTION", "default")  # not the measured choice
    gc.collect()
    before = living()
    run = trained.make(name, execution=execution, **OPTIONS[options])
    advance = runner(run.step, run.student, run.config.execution)
    for done in range(3):  # a compiled step is compiled again while there are no gradients yet
        run.step.prepare(done)
        advance()
    gc.collect()
    kept = sum(size for place, size in living().items() if place not in before)
    real = kept + 1e9 * allocated_gb(advance, torch.device("cpu"))
    run.close()
    size = run.config.micro_batch or run.config.batch
    parts = memory(job(run, name).traced(size < run.config.batch).trace, size, run.config.batch, Layout(cuda=False))
    assert abs(total(parts) - parts["workspace"] - real) < 0.1 * real


def test_a_teacher_in_float8_takes_half() -> None:
    """Of its linear layers: a byte a weight and four an output channel, where there were two a weight."""
    with trained.make("pixart_sigma", teacher_fp8=True) as run:
        made = dataclasses.replace(job(run, "pixart_sigma"), teacher_dtype=torch.bfloat16)
        plain = dataclasses.replace(made, config=dataclasses.replace(run.config, teacher_fp8=False))
        found = [planned(each, card_named("h100")) for each in (plain, made)]
        with pytest.raises(InputError, match=r"train.teacher_fp8: expected false on the NVIDIA A100 .* no float8"):
            planned(made, card_named("a100-80gb"))
    layers = float8.layers_of(small.model("pixart_sigma")).values()
    spared = sum(layer.weight.numel() - 4 * layer.out_features for layer in layers)
    assert found[0].memory["teacher"] - found[1].memory["teacher"] == spared > 0
    assert {**found[0].memory, "teacher": 0, "activations": 0, "workspace": 0} == {
        **found[1].memory, "teacher": 0, "activations": 0, "workspace": 0
    }  # fmt: skip
