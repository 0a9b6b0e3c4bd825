# SPDX-License-Identifier: Apache-2.0
"""Images with a schedule of guidance, and with a student that makes guided images in one pass per step.

The rival of a schedule evaluates prompt and null prompt in one batch at every step, like the pipelines of diffusers.
The rivals of the student are the teacher with each schedule. A case states how many evaluations an image takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.registry import Case, Run, Workload, generator

#: Text of a schedule, and the number of evaluations per image.
SCHEDULES = {"constant": ("2", 60), "interval": ("0@8,2@2,0", 38), "window": ("8@8,-1@2,0", 39)}
STEPS = 30
GRID = f"karras:{STEPS}@30..0.09"
SHAPES = [("digits 3x8x8", 64, "fp32", "cpu"), ("SD-1.5 4x64x64", 4, "bf16", "cuda")]  # model, batch, dtype, device
EVERY_STEP = "two passes a step"


def cases() -> Iterator[Case]:
    for model, batch, dtype, device in SHAPES:
        for name, (text, evaluations) in SCHEDULES.items():
            build = functools.partial(_scheduled, model, batch, text, evaluations)
            label = f"{model} {name} {text}, {evaluations} evaluations B={batch}"
            yield Case("sampling", label, dtype, device, build, (EVERY_STEP,))
        build = functools.partial(_student, model, batch)
        label = f"{model} student, {STEPS} evaluations B={batch}"
        yield Case("sampling", label, dtype, device, build, tuple(SCHEDULES), headline=device == "cuda")


class Setup(NamedTuple):
    model: nn.Module
    noise: Tensor
    prompts: Tensor
    null: Tensor


def _grid() -> Any:
    from fastdistill import Grid, NoiseSchedule

    return Grid.parse(GRID, NoiseSchedule.cosine())  # the noise schedule of the digits


def _setup(name: str, batch: int, device: torch.device) -> Setup:
    from benchmarks.ops.jacobian import model_of

    model, size, prompt = model_of(name)
    model = model.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    g = generator(device)
    noise = torch.randn(batch, *size, generator=g, device=device)
    rows = torch.randn(batch + 1, *prompt, generator=g, device=device)
    return Setup(model, noise, rows[1:], rows[0])


def _sampled(setup: Setup, schedule: str) -> Tensor:
    from fastdistill.diffusion.guided import sample

    with torch.no_grad():
        return sample(setup.model, setup.noise, setup.prompts, setup.null, _grid(), guidance=schedule)


def _every_step(setup: Setup, schedule: str) -> Tensor:
    """DDIM with prompt and null prompt in one batch at every step."""
    from fastdistill import Guidance

    grid, model = _grid(), setup.model
    weights = Guidance.parse(schedule).weights(grid).tolist()
    times, rows = grid.model_times(setup.noise.device), torch.cat([setup.null.expand_as(setup.prompts), setup.prompts])
    x, dtype = setup.noise, next(model.parameters()).dtype
    with torch.no_grad():
        for i, w in enumerate(weights):
            (a, b), (c, d) = ((float(grid.signal[j]), float(grid.noise[j])) for j in (i, i + 1))
            given = torch.cat([x, x]).to(dtype)
            null, prompt = model(given, times[i], rows.to(dtype), return_dict=False)[0].float().chunk(2)
            eps = null + (1 + w) * (prompt - null)
            x = c * (x - b * eps) / a + d * eps
    return x


def _scheduled(name: str, batch: int, schedule: str, evaluations: int, device: torch.device) -> Workload:
    setup = _setup(name, batch, device)
    rivals: dict[str, Run | str] = {EVERY_STEP: lambda: _every_step(setup, schedule)}

    def check() -> None:
        from fastdistill import Guidance

        assert Guidance.parse(schedule).evaluations(_grid()) == evaluations
        ours, theirs = _sampled(setup, schedule), _every_step(setup, schedule)
        bound = 1e3 * torch.finfo(next(setup.model.parameters()).dtype).eps  # rounding errors grow over 30 steps
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * float(theirs.abs().max()))

    return Workload(lambda: _sampled(setup, schedule), rivals, check, samples=batch, graphs=False)


def _student(name: str, batch: int, device: torch.device) -> Workload:
    """The teacher without guidance, which has the size and the number of passes of such a student."""
    setup = _setup(name, batch, device)
    rivals: dict[str, Run | str] = {k: functools.partial(_sampled, setup, text) for k, (text, _) in SCHEDULES.items()}

    def check() -> None:
        counted = 0

        def count(*_: Any) -> None:
            nonlocal counted
            counted += 1

        with setup.model.register_forward_pre_hook(count):
            _sampled(setup, "0")
        assert counted == len(_grid()) == STEPS, f"{counted} forwards"

    return Workload(lambda: _sampled(setup, "0"), rivals, check, samples=batch, graphs=False)
