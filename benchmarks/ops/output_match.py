# SPDX-License-Identifier: Apache-2.0
"""``output_match``, loss and gradient: the output loss of a step, alone and with guidance and the task loss.

For the task loss, the rivals read a target that the draw has stored; ours computes its noise again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import COMPILED, DTYPES, Case, Run, Workload, agrees, compiled, forward_backward, generator
from benchmarks.shapes import PIXART_SAMPLE, SD15_SAMPLE, SDXL_SAMPLE, Sizes
from fastdistill.diffusion.matching import match_table
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.ops import Task, output_match

SHAPES = [  # label, latent, batch, device, headline
    ("SD-1.5", SD15_SAMPLE[0], 4, "cpu", False),
    ("SD-1.5", SD15_SAMPLE[0], 16, "cpu", False),
    ("SD-1.5", SD15_SAMPLE[0], 32, "cuda", True),
    ("SDXL", SDXL_SAMPLE[0], 32, "cuda", False),
    ("PixArt-XL/2", PIXART_SAMPLE[0], 32, "cuda", False),
]
GUIDED = [  # the target of guidance distillation, with one weight per sample
    ("SD-1.5", SD15_SAMPLE[0], 4, "cpu"),
    ("SD-1.5", SD15_SAMPLE[0], 8, "cuda"),
    ("SD-1.5", SD15_SAMPLE[0], 32, "cuda"),
    ("PixArt-XL/2", PIXART_SAMPLE[0], 32, "cuda"),
]
STEPS = 1000


def cases() -> Iterator[Case]:
    for label, latent, batch, device, headline in SHAPES:
        for dtype in DTYPES:
            for kind, build in {"output": _output, "guided + task": _guided}.items():
                shape = f"{label} {'x'.join(map(str, latent))} {kind} B={batch}"
                make = functools.partial(build, latent, batch, DTYPES[dtype])
                yield Case(
                    "output_match", shape, dtype, device, make, ("literal", COMPILED), headline and dtype == "bf16"
                )
    for label, latent, batch, device in GUIDED:
        for dtype in DTYPES:
            for kind in ("per-sample w", "per-sample w, eps -> v"):
                shape = f"{label} {'x'.join(map(str, latent))} {kind} B={batch}"
                make = functools.partial(_of_each_sample, kind.endswith("v"), latent, batch, DTYPES[dtype])
                yield Case("output_match", shape, dtype, device, make, ("literal", COMPILED), False)


def _tensors(latent: Sizes, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Student, teacher, teacher without the prompt, latents, timesteps."""
    g = generator(device)
    student, teacher, unconditional, latents = (
        torch.randn(batch, *latent, generator=g, device=device).to(dtype) for _ in range(4)
    )
    return student.requires_grad_(), teacher, unconditional, latents, torch.arange(batch, device=device) * 7 % STEPS


def _workload(ours: Run, literal: object, inputs: tuple[object, ...], tensors: int, example: Tensor) -> Workload:
    rivals: dict[str, Run | str] = {
        "literal": forward_backward(literal, *inputs),  # type: ignore[arg-type]
        COMPILED: forward_backward(compiled(literal, example.device), *inputs),  # type: ignore[arg-type]
    }
    return Workload(ours, rivals, agrees(ours), tensors * example.numel() * example.element_size())  # type: ignore[arg-type]


def literal_output(student: Tensor, teacher: Tensor) -> Tensor:
    """As in the scripts of BK-SDM and Random Conditioning."""
    return F.mse_loss(student.float(), teacher.float())


def _output(latent: Sizes, batch: int, dtype: torch.dtype, device: torch.device) -> Workload:
    student, teacher, _, _, time = _tensors(latent, batch, dtype, device)
    table = match_table(NoiseSchedule.scaled_linear(STEPS).coefficients()).to(device)
    grad = torch.empty_like(student, requires_grad=False)
    ours = forward_backward(lambda s, t: output_match(s, t, time, table, grad=grad).loss, student, teacher)
    return _workload(ours, literal_output, (student, teacher), 3, student)


def literal_guided(
    student: Tensor, teacher: Tensor, unconditional: Tensor, target: Tensor, w: Tensor, weights: Tensor, mask: Tensor
) -> Tensor:
    """Guidance in the teacher's target, min-SNR weights, and the task loss for samples with their own prompt."""
    guided = unconditional + w.view(-1, 1, 1, 1) * (teacher - unconditional)
    output = F.mse_loss(student.float(), guided.float(), reduction="none").mean(dim=(1, 2, 3))
    task = F.mse_loss(student.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return ((output + task * mask) * weights).mean()


def _guided(latent: Sizes, batch: int, dtype: torch.dtype, device: torch.device) -> Workload:
    student, teacher, unconditional, latents, time = _tensors(latent, batch, dtype, device)
    coefficients = NoiseSchedule.scaled_linear(STEPS).coefficients("v_prediction").to(device)
    table = match_table(coefficients, guidance=6.5, weights="min_snr").to(device)
    rows, choice = torch.arange(batch, device=device), torch.arange(batch, device=device) % 3
    task = Task(latents, rows, choice, coefficients, torch.tensor([1, 5], device=device))
    grad = torch.empty_like(student, requires_grad=False)

    def match(s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return output_match(s, t, time, table, unconditional=u, task=task, grad=grad).loss

    ours = forward_backward(match, student, teacher, unconditional)
    target = torch.randn(student.shape, generator=generator(device), device=device).to(dtype)
    w, weights, mask = torch.full_like(table[time, 0], 7.5), table[time, 3], (choice != 1).float()
    inputs = (student, teacher, unconditional, target, w.to(dtype), weights, mask)
    return _workload(ours, literal_guided, inputs, 5, student)


def literal_scaled(
    student: Tensor, teacher: Tensor, unconditional: Tensor, x_t: Tensor, w: Tensor, of_x: Tensor, of_teacher: Tensor
) -> Tensor:
    """The target of Meng et al. with a drawn weight; x_t converts it to the student's prediction type."""
    guided = teacher + w.view(-1, 1, 1, 1) * (teacher - unconditional)
    target = of_x.view(-1, 1, 1, 1) * x_t + of_teacher.view(-1, 1, 1, 1) * guided
    return F.mse_loss(student.float(), target.float())


def literal_scaled_alike(student: Tensor, teacher: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """The same if teacher and student have the same prediction type."""
    guided = teacher + w.view(-1, 1, 1, 1) * (teacher - unconditional)
    return F.mse_loss(student.float(), guided.float())


def _of_each_sample(converted: bool, latent: Sizes, batch: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """One ``guidance`` weight per sample [B] for the teacher's two predictions; optionally converts epsilon to v by
    x_t."""
    student, teacher, unconditional, x_t, time = _tensors(latent, batch, dtype, device)
    noise = NoiseSchedule.scaled_linear(STEPS)
    own = noise.coefficients("v_prediction" if converted else "epsilon")
    table = match_table(own, teacher=noise.coefficients() if converted else None, guidance=1.0).to(device)
    w = torch.linspace(0, 8, batch, device=device)
    grad = torch.empty_like(student, requires_grad=False)

    def match(s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        given = {"x_t": x_t} if converted else {}
        return output_match(s, t, time, table, unconditional=u, guidance=w, grad=grad, **given).loss

    ours = forward_backward(match, student, teacher, unconditional)
    if not converted:
        return _workload(ours, literal_scaled_alike, (student, teacher, unconditional, w.to(dtype)), 4, student)
    of_x, of_teacher = (table[time, column].to(dtype) for column in (1, 2))
    inputs = (student, teacher, unconditional, x_t, w.to(dtype), of_x, of_teacher)
    return _workload(ours, literal_scaled, inputs, 5, student)
