# SPDX-License-Identifier: Apache-2.0
"""Output matching in Triton: loss and gradient in one launch, and one small launch that adds the partial sums in order.

Grid      one program per chunk of 1024 elements of a sample
Traffic   student, teacher (two tensors with guidance), x_t if prediction types differ, the latent if the task's target
          contains it: each read once; gradient written once; targets and noise never in memory
Precision elements and the sum of a chunk in fp32 (a tree), chunks added in fp64 in their order; gradients rounded once
Limits    any n >= 0 (64-bit); contiguous rows; a timestep or latent index out of range makes the loss NaN
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import FUSED, cdiv, normals
from fastdistill.ops.noise_gather.reference import RANDOM

CHUNK = 1024
WARPS = 4


@triton.jit
def _known(timestep, latent_index, b, inside, steps, latent_count, TASK: tl.constexpr):
    """The timestep and the latent of samples, and whether they are in range."""
    t = tl.load(timestep + b, mask=inside, other=0)
    there = (t >= 0) & (t < steps)
    latent = t * 0
    if TASK:
        latent = tl.load(latent_index + b, mask=inside, other=0)
        there = there & (latent >= 0) & (latent < latent_count)
    return tl.where(there, t, 0), tl.where(there, latent, 0), there


@triton.jit
def _weights(table, weights, choice, b, t, there, inside, OWN: tl.constexpr, TASK: tl.constexpr, RANDOM: tl.constexpr):
    """The weights of samples' output and task; NaN if out of range."""
    own = tl.where(there, 1.0, float("nan"))
    if OWN:
        own *= tl.load(weights + b, mask=inside, other=0.0)
    output = tl.load(table + 5 * t + 3) * own
    task = tl.load(table + 5 * t + 4) * own
    if TASK:
        task = tl.where(tl.load(choice + b, mask=inside, other=0) == RANDOM, 0.0, task)
    return output, task


@triton.jit
def _term(d, delta, HUBER: tl.constexpr):
    """The loss term of a difference and its derivative."""
    c = d
    if HUBER:  # clamped; keeps NaN
        c = tl.where(d < -delta, -delta, tl.where(d > delta, delta, d))
        return c * (d - 0.5 * c), c
    return d * d, c


@triton.jit
def _output_match(
    student, teacher, unconditional, timestep, table, guidance, weights, x_t, latents, latent_index, choice,
    coefficients, counter, gradient, partials, grad_scale, batch, n, student_row, teacher_row, steps, latent_count,
    first_sample, output_weight, task_weight, delta, chunks, TEACHER: tl.constexpr, GUIDED: tl.constexpr,
    PER_SAMPLE: tl.constexpr, OWN: tl.constexpr, CONVERTED: tl.constexpr, TASK: tl.constexpr, GRADIENT: tl.constexpr,
    HUBER: tl.constexpr, RANDOM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    b, first = at // chunks, at % chunks * CHUNK
    t, latent, there = _known(timestep, latent_index, b, b < batch, steps, latent_count, TASK)
    of_output, of_task = _weights(table, weights, choice, b, t, there, b < batch, OWN, TASK, RANDOM)
    e = first + tl.arange(0, CHUNK)
    inside = e < n
    s = tl.load(student + b * student_row + e, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(grad_scale).to(tl.float64) / (tl.cast(batch, tl.float64) * tl.cast(n, tl.float64))
    if not HUBER:
        scale *= 2.0
    g = tl.full((CHUNK,), 0.0, tl.float32)
    output, task = 0.0, 0.0
    if TEACHER:
        target = tl.load(teacher + b * teacher_row + e, mask=inside, other=0.0).to(tl.float32)
        if GUIDED:
            w = tl.load(table + 5 * t)
            if PER_SAMPLE:
                w *= tl.load(guidance + b)
            null = tl.load(unconditional + b * teacher_row + e, mask=inside, other=0.0).to(tl.float32)
            target = tl.fma(w, target - null, target)
        target = tl.load(table + 5 * t + 2) * target
        if CONVERTED:
            x = tl.load(x_t + b * n + e, mask=inside, other=0.0).to(tl.float32)
            target = tl.fma(tl.load(table + 5 * t + 1), x, target)
        term, slope = _term(tl.where(inside, s - target, 0.0), delta, HUBER)
        output = tl.sum(term)
        g = (scale * output_weight * of_output).to(tl.float32) * slope
    if TASK:
        signal = tl.load(coefficients + 4 * t + 2)
        x = tl.load(latents + latent * n + e, mask=e < tl.where(signal == 0.0, 0, n), other=0.0).to(tl.float32)
        z = normals(tl.load(counter), tl.load(counter + 1), first_sample + b, first, CHUNK)
        target = tl.fma(signal, x, tl.load(coefficients + 4 * t + 3) * z)
        term, slope = _term(tl.where(inside, s - target, 0.0), delta, HUBER)
        task = tl.sum(term)
        g += (scale * task_weight * of_task).to(tl.float32) * slope
    tl.store(partials + 2 * at, output)
    tl.store(partials + 2 * at + 1, task)
    if GRADIENT:
        to = gradient + b * student_row
        tl.store(to + e, g.to(gradient.dtype.element_ty), mask=inside)
        if first + CHUNK >= n:  # channels that are ignored (a learned variance)
            for start in range(n, student_row, CHUNK):
                rest = start + tl.arange(0, CHUNK)
                tl.store(to + rest, tl.full((CHUNK,), 0.0, gradient.dtype.element_ty), mask=rest < student_row)


@triton.jit
def _output_match_finish(
    partials, timestep, table, weights, latent_index, choice, loss, parts, samples, batch, n, steps, latent_count,
    output_weight, task_weight, chunks, OWN: tl.constexpr, TASK: tl.constexpr, RANDOM: tl.constexpr,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    count = tl.cast(tl.maximum(n, 1), tl.float64)
    output = tl.full((SAMPLES,), 0.0, tl.float64)
    task = tl.full((SAMPLES,), 0.0, tl.float64)
    for start in range(0, batch, SAMPLES):
        b = start + tl.arange(0, SAMPLES).to(tl.int64)
        inside = b < batch
        of_output = tl.full((SAMPLES,), 0.0, tl.float64)
        of_task = tl.full((SAMPLES,), 0.0, tl.float64)
        for i in range(chunks):
            of_output += tl.load(partials + 2 * (b * chunks + i), mask=inside, other=0.0)
            of_task += tl.load(partials + 2 * (b * chunks + i) + 1, mask=inside, other=0.0)
        of_output, of_task = of_output / count, of_task / count
        tl.store(samples + 2 * b, of_output.to(tl.float32), mask=inside)
        tl.store(samples + 2 * b + 1, of_task.to(tl.float32), mask=inside)
        t, _, there = _known(timestep, latent_index, b, inside, steps, latent_count, TASK)
        weight, task_own = _weights(table, weights, choice, b, t, there, inside, OWN, TASK, RANDOM)
        output += tl.where(inside, weight * of_output, 0.0)
        task += tl.where(inside, task_own * of_task, 0.0)
    all_samples = tl.cast(tl.maximum(batch, 1), tl.float64)
    output_part, task_part = tl.sum(output) / all_samples, tl.sum(task) / all_samples
    tl.store(parts, output_part.to(tl.float32))
    tl.store(parts + 1, task_part.to(tl.float32))
    tl.store(loss, (output_weight * output_part + task_weight * task_part).to(tl.float32))


def output_match(
    student: Tensor,
    teacher: Tensor,
    unconditional: Tensor,
    timestep: Tensor,
    table: Tensor,
    guidance: Tensor,
    weights: Tensor,
    x_t: Tensor,
    latents: Tensor,
    latent_index: Tensor,
    choice: Tensor,
    coefficients: Tensor,
    counter: Tensor,
    first_sample: int,
    channels: int,
    output_weight: float,
    task_weight: float,
    grad_scale: Tensor,
    huber: bool,
    delta: float,
    loss: Tensor,
    parts: Tensor,
    samples: Tensor,
    grad: Tensor,
) -> None:
    """Two launches; arguments as in the reference."""
    batch = student.size(0)
    student_row = student.numel() // max(batch, 1)
    n = student_row // max(student.size(1), 1) * channels
    chunks = max(cdiv(n, CHUNK), 1)
    has_task, own = counter.numel() > 0, weights.numel() > 0
    partials = torch.empty(max(2 * batch * chunks, 1), dtype=torch.float32, device=loss.device)
    if batch:
        _output_match[(batch * chunks,)](
            student, teacher, unconditional, timestep, table, guidance, weights, x_t, latents, latent_index, choice,
            coefficients, counter, grad, partials, grad_scale, batch, n, student_row, teacher.numel() // batch,
            table.size(0), latents.size(0), first_sample, output_weight, task_weight, delta, chunks,
            teacher.numel() > 0, unconditional.numel() > 0, guidance.numel() > 0, own, x_t.numel() > 0, has_task,
            grad.numel() > 0, huber, RANDOM, CHUNK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    _output_match_finish[(1,)](
        partials, timestep, table, weights, latent_index, choice, loss, parts, samples, batch, n, table.size(0),
        latents.size(0), output_weight, task_weight, chunks, own, has_task, RANDOM, 128, num_warps=WARPS, **FUSED,
    )  # fmt: skip
