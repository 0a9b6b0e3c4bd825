# SPDX-License-Identifier: Apache-2.0
"""The null prompt of a guided teacher, whose keys and values are projected once a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import GuidanceDistillation
from fastdistill.distill import Weights
from fastdistill.errors import InputError
from fastdistill.models import make_student
from fastdistill.models.fuse import attention as fused
from fastdistill.models.fuse import fuse, repeated
from fastdistill.models.fuse.repeated import Repeated
from fastdistill.train import DistillTrainer
from fastdistill.train.step import TrainStep
from tests import tiny
from tests.harness import EPS
from tests.models import tiny_families as small
from tests.train.test_families import weights

NAMES = ["sd", "sdxl", "pixart_sigma", "sana"]


def trainer(name: str = "sd", objective: Any = None, **options: Any) -> DistillTrainer:
    teacher = small.model(name)
    student = make_student(teacher, {"layers_per_block": 1} if small.TINY[name][0] == "unet" else "half_depth")
    data = {"latents": small.cache(name), "prompts": small.bank(name)}
    objective = objective or GuidanceDistillation(3.0, weights=Weights(1.0, 0.0, 0.0), loss_weighting="uniform")
    options = {"steps": 3, "fuse": True, "teacher_null_once": True} | options
    return tiny.trainer(teacher, student, objective, **data, **options)


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Prompts of which keys and values were projected, and samples, of each attention to a prompt."""
    found: list[tuple[int, int]] = []
    plain = fused.cross_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        found.append((len(k), len(q)))
        return plain(q, k, v, **options)

    monkeypatch.setattr(fused, "cross_attention", counted)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_a_model(name: str, projected: list[tuple[int, int]]) -> None:
    """As of all prompts, but for the order of sums in products of fewer rows; other calls are as before."""
    model = small.model(name).eval().requires_grad_(False)
    fuse(model)
    bank = {key: rows[:4] for key, rows in small.bank(name).banks.items()}
    rows = {key: torch.cat([value[3:].expand(3, *value.shape[1:]), value[:3]]) for key, value in bank.items()}
    x, t = small.cache(name).latents[:3].repeat(2, 1, 1, 1), torch.tensor([1, 20, 40] * 2)
    setting = trainer(name)._setting

    def predict(m: Any) -> Tensor:
        with torch.no_grad():
            return setting.predict(m, x, t, rows)

    projected.clear()
    before = predict(model)
    assert projected and set(projected) == {(6, 6)}
    one = Repeated(model, 3, torch.device("cpu"))
    one.attach()
    assert torch.equal(predict(model), before)
    projected.clear()
    one.on = True
    found = predict(model)
    assert projected and set(projected) == {(4, 6)}
    assert float((found - before).abs().max()) <= 64 * EPS * float(before.abs().max())
    one.detach()
    assert not any(repeated._NAME in module.__dict__ for module in model.modules())
    copy.deepcopy(model)


@pytest.mark.parametrize("options", [{}, {"teacher_ahead": True}, {"micro_batch": 2}])
def test_a_run(options: dict[str, Any], projected: list[tuple[int, int]]) -> None:
    run = trainer(**options)
    projected.clear()
    history = run.fit().history
    size = options.get("micro_batch", 4)
    assert {pair for pair in projected if pair[1] == 2 * size} == {(size + 1, 2 * size)}
    plain = trainer(**options, teacher_null_once=False)
    expected = plain.fit().history
    for own, theirs in zip(history, expected, strict=True):
        assert own["output"] == pytest.approx(theirs["output"], rel=1e-4)
    assert run._fingerprint == plain._fingerprint
    assert not any(repeated._NAME in module.__dict__ for module in run.teacher.modules())


def test_after_an_error_the_teacher_answers_as_before() -> None:
    run = trainer()
    hook = run.teacher.register_forward_hook(_fail)
    run.step.prepare(0)
    with pytest.raises(RuntimeError, match="planted"):
        run.step()
    hook.remove()
    assert not run.step.objective._knowledge._repeated.on  # type: ignore[attr-defined]


def _fail(*_: Any) -> None:
    raise RuntimeError("planted")


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TrainStep.compile.__kwdefaults__, "backend", "aot_eager")  # type: ignore[attr-defined]
    found = [trainer("pixart_sigma", execution=e).fit().history[-1]["output"] for e in ("eager", "compiled")]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_with_a_teacher_in_float8() -> None:
    found = [trainer("pixart_sigma", teacher_fp8=True, teacher_null_once=once) for once in (False, True)]
    one, two = (run.fit().history[-1]["output"] for run in found)
    assert one == pytest.approx(two, rel=0.02)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("sd", {"objective": tiny.features(("up_blocks.0", "up_blocks.0"))}, "asks for no answers to the null prompt"),
        ("sd", {"fuse": False}, r"the models are not fused \(fuse\)"),
        ("sd3", {}, "SD3Transformer2DModel has no fused attention to the prompt alone"),
        ("dit", {}, "DiTTransformer2DModel has no fused attention to the prompt alone"),
    ],
)
def test_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"config.teacher_null_once: expected false, got true, and .*{reason}"):
        trainer(name, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_on_a_gpu(execution: str) -> None:
    runs = [trainer(execution=execution, device="cuda", steps=8, teacher_null_once=once) for once in (False, True)]
    one, two = (run.fit() for run in runs)
    assert one.history[0]["output"] == pytest.approx(two.history[0]["output"], rel=1e-2)
    assert weights(runs[0]).keys() == weights(runs[1]).keys()
