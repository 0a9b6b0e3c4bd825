# SPDX-License-Identifier: Apache-2.0
"""Output matching in eager torch: the specification of the op's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.ops import philox
from fastdistill.ops.noise_gather.reference import RANDOM

GUIDANCE, FROM_X_T, FROM_TEACHER, OUTPUT_WEIGHT, TASK_WEIGHT = range(5)  # columns of the table


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
    """Fill the outputs, and ``grad`` if it has elements, in float32. A tensor without elements means None.

    If a sample's timestep or latent index is out of range, a CPU raises an error; elsewhere its weights are NaN.
    """
    shape = (len(student), *[1] * (student.dim() - 1))
    there = (timestep >= 0) & (timestep < len(table))
    if counter.numel():
        there &= (latent_index >= 0) & (latent_index < len(latents))
    if there.device.type == "cpu" and not there.all():
        refuse(int((~there).nonzero()[0]), timestep, table, latents, latent_index)
    if counter.numel():
        latent_index = torch.where(there, latent_index, 0)
    timestep = torch.where(there, timestep, 0)
    row = table[timestep]
    own = torch.where(there, weights if len(weights) else 1.0, torch.nan).float()
    weight = torch.stack([row[:, OUTPUT_WEIGHT], row[:, TASK_WEIGHT]], 1) * own[:, None]
    s = student[:, :channels].float()
    differences = [torch.zeros_like(s), torch.zeros_like(s)]
    if teacher.numel():
        target = teacher[:, :channels].float()
        if unconditional.numel():
            w = row[:, GUIDANCE] * guidance if len(guidance) else row[:, GUIDANCE]
            target = target + w.view(shape) * (target - unconditional[:, :channels].float())
        target = target * row[:, FROM_TEACHER].view(shape)
        if x_t.numel():
            target = target + row[:, FROM_X_T].view(shape) * x_t.float()
        differences[0] = s - target
    if counter.numel():
        sample = first_sample + torch.arange(len(student), device=student.device)
        z = philox.normal(counter[0], counter[1], sample, s.shape[1:])
        signal, noise = coefficients[timestep].view(-1, 4, *shape[1:]).unbind(1)[2:]
        clean = torch.where(signal == 0, 0.0, latents[latent_index].float())  # unused, it may be anything
        differences[1] = s - (signal * clean + noise * z)
        weight[:, 1] = torch.where(choice == RANDOM, 0.0, weight[:, 1])

    slopes = [d.clamp(-delta, delta) if huber else d for d in differences]
    terms = [c * (d - 0.5 * c) if huber else d * d for c, d in zip(slopes, differences, strict=True)]
    count = max(s[:1].numel(), 1)
    samples.copy_(torch.stack([t.flatten(1).sum(1) / count for t in terms], 1))
    parts.copy_((weight * samples).sum(0) / max(len(s), 1))
    loss.copy_(output_weight * parts[0] + task_weight * parts[1])
    if grad.numel():
        factor = grad_scale * weight * ((1.0 if huber else 2.0) / max(s.numel(), 1))
        gradient = torch.zeros_like(s)
        for i, scale, given in ((0, output_weight, teacher), (1, task_weight, counter)):
            if given.numel():  # a weight that is not finite must not affect a missing term
                gradient += (scale * factor[:, i]).view(shape) * slopes[i]
        grad.zero_()
        grad[:, :channels].copy_(gradient)


def refuse(sample: int, timestep: Tensor, table: Tensor, latents: Tensor, latent_index: Tensor) -> None:
    """Raise the error for a sample whose timestep or latent index is out of range."""
    name, rows, value = f"timestep[{sample}]", f"a row of table, 0 to {len(table) - 1}", int(timestep[sample])
    if 0 <= value < len(table):
        name, rows = f"task.latent_index[{sample}]", f"a row of task.latents, 0 to {len(latents) - 1}"
        value = int(latent_index[sample])
    raise InputError.of(name, rows, value)
