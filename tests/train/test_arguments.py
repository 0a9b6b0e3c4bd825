# SPDX-License-Identifier: Apache-2.0
"""Arguments of a trainer: invalid ones are refused by name before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.flow import flow_coefficients
from fastdistill.diffusion.matching import match_table
from fastdistill.diffusion.sampler import ddim
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.distill.denoising import Denoising
from fastdistill.errors import InputError
from fastdistill.models import Student
from fastdistill.models.calling import compute_dtype
from fastdistill.train import DistillTrainer, TrainConfig, arguments
from fastdistill.train.devices import moved, usable
from tests import tiny
from tests.models import tiny_families as families

OUTPUT = RandomConditioning(weights=Weights(1.0, 0.0, 0.0))


def given(**changes: Any) -> DistillTrainer:
    arguments: dict[str, Any] = {
        "teacher": tiny.Net(), "student": tiny.Net(seed=1), "schedule": tiny.SCHEDULE, "latents": tiny.cache(),
        "prompts": tiny.bank(), "objective": OUTPUT, "config": TrainConfig(steps=1, batch=4),
    }  # fmt: skip
    return DistillTrainer(**(arguments | changes))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(2, 2)


META = torch.empty(8, 4, 5, 3, device="meta")
WRONG = [None, "x", 3, 0.5, [1], np.zeros(3), torch.zeros(8, 4, 5, 3), nn.Linear, lambda x: x, Path("/tmp"), on_meta()]


@pytest.mark.parametrize(
    ("argument", "accepted"),
    [
        ("teacher", ()), ("student", ()), ("schedule", ()), ("latents", ()), ("prompts", ()), ("objective", ()),
        ("config", ()), ("device", (None,)), ("prediction_type", (None,)), ("shard", (None, WRONG[8])),
    ],
)  # fmt: skip
def test_wrong_types(argument: str, accepted: tuple[Any, ...]) -> None:
    for value in [*WRONG, {"a": 1}, META]:
        if not any(value is one for one in accepted):
            with pytest.raises(InputError, match=rf"^{argument}r?(\[0\])?: ") as error:
                given(**{argument: value})
            assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": tiny}, r"student: expected a torch\.nn\.Module, got module"),
        ({"teacher": type("Pipeline", (), {"unet": tiny.Net()})()}, r"got Pipeline \(pass its unet\)"),
        ({"teacher": on_meta()}, r"teacher: expected weights with values, got weight on the meta device"),
        ({"latents": LatentCache(META, torch.zeros(8, dtype=torch.int64))}, r"latents: expected rows with values"),
        ({"prompts": PromptBank(META[:3, :, :, 0], ["a", "b"])}, r"prompts: expected rows with values"),
        ({"objective": RandomConditioning}, r"such as RandomConditioning\(\.\.\.\), got the class RandomConditioning"),
        ({"objective": 3}, r"got 3 without bind and describe"),
        ({"config": {"step": 3}}, r"config: 1 problem\n  step: no such field \(did you mean steps\?\)"),
        ({"config": tiny}, r"config: expected a TrainConfig or a mapping of its fields, got module"),
        ({"device": "cuda:99"}, r"device: expected a device that torch can use here, such as 'cpu', got 'cuda:99' \("),
        (
            {"schedule": DDIMScheduler},
            r"schedule: expected a NoiseSchedule, a FlowSchedule or a diffusers.*got the class DDIMSchedu",
        ),
        (
            {"schedule": DDIMScheduler(prediction_type="v_prediction"), "prediction_type": "epsilon"},
            r"prediction_type: expected None, or v_prediction, as the scheduler's configuration has it, got 'epsilon'",
        ),
        (
            {"teacher": families.model("sd3")},
            r"schedule: expected a FlowSchedule, for a SD3Transformer2DModel \(or a pred.*got NoiseSchedule",
        ),
        ({"prediction_type": "eps"}, r"prediction_type: expected one of epsilon, sample, v_prediction, got 'eps'"),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        given(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    for device in ("cuda", torch.device("cuda", 1), 0, "banana"):
        with pytest.raises(InputError, match="device: expected a device that torch can use here"):
            usable(device)


@pytest.mark.parametrize("name", ["directory", "progress", "to"])
def test_wrong_types_of_methods(name: str, tmp_path: Path) -> None:
    trainer = given()
    for value in [*WRONG[2:8], META]:
        with pytest.raises(InputError, match=f"^{name}: expected "):
            trainer.ema_student(value) if name == "to" else trainer.fit(**{name: value})
    assert int(trainer.step.counter[1]) == 0


def test_a_student_and_a_mapping_will_do() -> None:
    model = tiny.Net(seed=1)
    config = {"steps": 2, "batch": 4, "lr": 1e-4, "log_every": 1}
    trainer = given(student=Student(model, (), (), (), None), config=config)  # type: ignore[arg-type]
    assert trainer.student is model and trainer.config == TrainConfig(steps=2, batch=4, lr=1e-4, log_every=1)
    assert len(trainer.fit().history) == 2 and float(trainer.step.lr) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("objective", [tiny.features(), Denoising(5.0)], ids=lambda o: type(o).__name__)
def test_a_default_device_changes_nothing(objective: Any) -> None:
    """Models and banks determine the device; "meta" stands for any other default device."""
    latents, prompts, models = tiny.cache(), tiny.bank(), (tiny.Net(), tiny.Net(5, seed=1))
    expected = tiny.trainer(*models[:1], tiny.Net(5, seed=1), objective, latents=latents, prompts=prompts).fit().history
    noise = torch.randn(2, 4, 5, 3)
    torch.set_default_device("meta")
    try:
        run = tiny.trainer(*models, objective, latents=latents, prompts=prompts)
        found = run.fit().history
        for schedule in (NoiseSchedule.cosine(20), NoiseSchedule.linear(20), NoiseSchedule.scaled_linear(20)):
            rows, null = prompts.embeddings[:2], prompts.embeddings[2]
            x = ddim(run.ema_student(), noise, rows, null, schedule, steps=2, guidance_scale=2.0)
            assert x.device.type == "cpu" and x.isfinite().all()
        assert flow_coefficients(20).device.type == match_table(tiny.SCHEDULE.coefficients()).device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert [m["loss"] for m in found] == [m["loss"] for m in expected]


def test_weights_of_the_teacher_that_the_student_would_train() -> None:
    teacher, student = tiny.Net(), tiny.Net(seed=1)
    student.prompt = teacher.prompt
    message = r"student: expected trained parameters of its own.*got the teacher's prompt\.weight, prompt\.bias"
    with pytest.raises(InputError, match=message):
        given(teacher=teacher, student=student)
    teacher.prompt.requires_grad_(False)
    before = student.prompt.weight.clone()
    given(teacher=teacher, student=student).fit()
    assert torch.equal(student.prompt.weight, before)


class Quantized(tiny.Net):
    """Like models of bitsandbytes: some weights are integers, and moving or casting them raises an error."""

    def __init__(self) -> None:
        super().__init__()
        integers = (self.prompt.weight.detach() * 100).round().to(torch.int8)
        self.prompt.weight = nn.Parameter(integers, requires_grad=False)
        self.prompt.forward = lambda x: nn.functional.linear(x, self.prompt.weight / 100, self.prompt.bias)  # type: ignore[method-assign]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("`.to` is not supported for 8-bit models.\nUse the model as it is.")

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        raise RuntimeError("only Tensors of floating point dtype can require gradients")


class Layerwise(tiny.Net):
    """Float8 weights that are cast to ``dtype`` for each forward, as diffusers' enable_layerwise_casting does."""

    def __init__(self, dtype: torch.dtype) -> None:
        from diffusers.hooks import apply_layerwise_casting

        super().__init__()
        apply_layerwise_casting(self, torch.float8_e4m3fn, dtype)


TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "integers": Quantized,
    "packed": lambda: tiny.packed(tiny.Net()),
    "layerwise bfloat16": lambda: Layerwise(torch.bfloat16),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_teachers_in_other_dtypes(kind: str, tmp_path: Path) -> None:
    """Outputs and features equal those of the same model called directly, in the dtype in which it computes."""
    teacher = TEACHERS[kind]()
    run = tiny.trainer(teacher, objective=tiny.features())
    objective: Any = run.step.objective
    draw = objective._batches(run.step.counter)
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    assert compute_dtype(teacher) == dtype
    inputs = draw.x_t.to(dtype), draw.timestep, draw.prompt.to(dtype)
    kept: list[Tensor] = []
    handle = teacher.mid.register_forward_hook(lambda module, args, output: kept.append(output))  # type: ignore[operator, union-attr]
    with torch.no_grad():
        expected = teacher(*inputs)
    handle.remove()
    found, _, (feature,) = objective._knowledge._teacher(draw, None)
    assert torch.equal(found, expected) and torch.equal(feature, kept[0]) and feature.dtype == dtype
    run.fit(tmp_path)
    again = tiny.trainer(teacher, objective=tiny.features(), steps=3)
    assert again.fit(tmp_path).steps == 3  # the same teacher, by its fingerprint


def test_a_model_that_cannot_be_moved() -> None:
    model = Quantized()
    assert moved(model, torch.device("cpu"), "teacher") is model
    message = r"teacher: expected a model that can be moved to meta, got ValueError: `\.to` is not supported for 8-bit"
    with pytest.raises(InputError, match=message):
        moved(model, torch.device("meta"), "teacher")


def test_a_student_in_layerwise_casting_is_refused() -> None:
    with pytest.raises(InputError, match=r"student: expected weights that stay .*got diffusers' layerwise casting"):
        given(student=Layerwise(torch.float32))


class Mixed(tiny.Net):
    """Has a part that diffusers would keep in float32."""

    _keep_in_fp32_modules = ["mid"]  # noqa: RUF012

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        bias = self.time(timestep[:, None].to(x.dtype) / 50) + self.prompt(encoder_hidden_states.mean(1))
        features = self.mid((self.first(x) + bias[..., None, None]).float())
        output: Tensor = self.last(features.to(x.dtype))
        return output


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_student_of_mixed_precision(precision: str) -> None:
    """Weights kept in float32 stay float32 and are trained; their features go through adapters of the other dtype."""
    student = Mixed(5)
    before = student.mid.weight.detach().clone()
    student.mid.weight.grad = torch.full_like(before, float("nan"))  # left behind by a loop before this one
    run = tiny.trainer(student=student, precision=precision)
    found = {name.split(".")[0]: p.dtype for name, p in student.named_parameters()}
    dtype = getattr(torch, precision)
    assert found == {"first": dtype, "mid": torch.float32, "last": dtype, "time": dtype, "prompt": dtype}
    assert run.step.objective.trained[0][0].weight.dtype == dtype
    history = run.fit().history
    assert history[-1]["skipped"] == 0 and not torch.equal(student.mid.weight, before)


def test_the_dtype_before_a_measurement() -> None:
    """Before the measurement, a plan and the trainer use the dtype of ``auto``."""
    for device in map(torch.device, ("cpu", "cuda")):
        measured, auto = (arguments.dtype(tiny.Net(), device, name, {}) for name in ("measured", "auto"))
        assert measured == auto
