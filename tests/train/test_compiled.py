# SPDX-License-Identifier: Apache-2.0
"""A run is compiled only once: no Python state that changes between steps is part of the compiled code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.sampler import ddim
from fastdistill.distill import GuidanceDistillation
from fastdistill.train.step import TrainStep
from tests import tiny
from tests.distill.test_setting import Own
from tests.harness import TIMED

UNTIMED = ("step", "skipped", "gradient_norm", *TIMED)


class Counting:
    """A backend that executes graphs without a change."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: GraphModule, inputs: Any) -> GraphModule:
        self.graphs += 1
        return graph


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(TrainStep.compile, "__kwdefaults__", {"backend": counting})
    torch._dynamo.reset()
    return counting


def on_disk(place: Path) -> dict[str, Any]:
    latents = tiny.cache()
    given = latents.prompt_index, latents.latents.shape[1:], torch.float32, {"made": "by hand"}
    generate_latent_cache(place / "latents", lambda rows, _: latents.latents[rows], *given)
    tiny.bank().save(place / "prompts")
    return {"latents": LatentCache.open(place / "latents"), "prompts": PromptBank.open(place / "prompts")}


CASES: dict[str, dict[str, Any]] = {
    "every loss, adapters": {"width": 5, "objective": tiny.features(feature_distance="huber")},
    "a loss scale, a teacher of another dtype, banks on the disk": {
        "precision": "float16", "teacher": torch.bfloat16, "disk": True,
    },
    "an objective of one's own": {"objective": Own()},
    "guidance": {"objective": GuidanceDistillation("4@0.5,-1", grid="trailing:10", taps=(("mid", "mid"),))},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_compiled_once(name: str, backend: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also with previews in between. The losses equal those of the eager run; different draws would differ far more."""
    losses = {}
    caplog.set_level(logging.INFO, "fastdistill")
    for execution in ("compiled", "eager"):
        case = dict(CASES[name])
        teacher = tiny.Net().to(case.pop("teacher", torch.float32))
        student = tiny.Net(case.pop("width", 6), seed=1)
        banks = on_disk(tmp_path / execution) if case.pop("disk", False) else {}
        run = tiny.trainer(teacher, student, **banks, **case, steps=4, execution=execution)

        def preview(done: int, _: object, run: Any = run) -> None:
            if done == 2:
                run.student.eval()
                x, rows = torch.randn(1, 4, 5, 3), torch.randn(1, 5, 6)
                ddim(run.student, x, rows, None, tiny.SCHEDULE, steps=1, guidance_scale=1.0)
                run.student.train()
                run.ema_student()

        losses[execution] = [v for m in run.fit(progress=preview).history for k, v in m.items() if k not in UNTIMED]
        assert backend.graphs == 1 and caplog.text.count("compiling the training step") == 1
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)


def test_a_model_that_torch_compiles_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the step holds at a graph break is complete after it: torch 2.11 empties a tuple made by ``_replace``."""
    forward = tiny.Net.forward

    def broken(self: tiny.Net, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TrainStep.compile, "__kwdefaults__", {"backend": "eager"})
    monkeypatch.setattr(tiny.Net, "forward", broken)
    torch._dynamo.reset()
    found = [tiny.trainer(execution=execution).fit().history[-1]["loss"] for execution in ("eager", "compiled")]
    assert found[0] == found[1]
