# SPDX-License-Identifier: Apache-2.0
"""One small step of every op with a GPU kernel, on memory at fixed addresses.

``python -m tests.gpu.work DEVICE [KERNEL ...]`` runs each step, for a tool that watches the process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdistill.ops import (
    OPS,
    AdamWGroup,
    NoiseGather,
    Task,
    _native,
    adamw_ema,
    add_bias,
    cross_attention,
    feature_match,
    geglu,
    grad_square_sum,
    group_norm_silu,
    output_match,
    quantize_rows,
    residual_layer_norm_modulate,
    use,
)

REASONS = {"triton": _native.triton_reason, "cuda": _native.cuda_reason}
#: Kernels that can run here; without a GPU both are emulated.
KERNELS = [name for name, reason in REASONS.items() if not torch.cuda.is_available() or reason() is None]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Work:
    """``step`` reads and advances the ``state``, and returns what it wrote; the result depends only on the state."""

    state: list[Tensor]
    step: Callable[[], list[Tensor]]


def banks(device: str, rows: int = 11) -> tuple[Tensor, ...]:
    """The inputs of ``noise_gather`` and its counter; the row size is not a multiple of a vector."""
    g = torch.Generator().manual_seed(1)
    latents, prompts = torch.randn((rows, 3, 5, 7), generator=g), torch.randn((9, 4, 6), generator=g)
    alpha = torch.linspace(0.99, 0.05, 50)
    noise = (1 - alpha**2).sqrt()
    coefficients = torch.stack([alpha, noise, -noise, alpha], 1)
    replace = (torch.linspace(0, 1, 50, dtype=torch.float64) * 2**32).long()
    counter = torch.tensor([2**40 + 5, 7])
    return tuple(t.to(device) for t in (latents, torch.arange(rows) % 6, prompts, coefficients, replace, counter))


def noise_gather_work(device: str) -> Work:
    inputs = banks(device)
    latents, own, prompts, *tables = inputs
    several = [torch.arange(9, device=device), prompts, prompts[:, 0] > 0]
    draw = NoiseGather(latents, own, several, *tables, batch=6, null_index=8, null_probability=0.25, target=True)

    def step() -> list[Tensor]:
        drawn = [t.clone() for t in tree_leaves(tuple(draw()))]
        inputs[-1][1] += 1
        return drawn

    return Work(list(inputs), step)


def feature_match_work(device: str, distance: str) -> Work:
    g = torch.Generator().manual_seed(2)
    shapes = [(3, 5, 7), (1, 1), (2, 8, 4, 4), (2, 5000)]
    student = [torch.randn(s, generator=g).to(device, d) for s, d in zip(shapes, (*FLOATS, FLOATS[0]), strict=True)]
    teacher = [torch.randn(s.shape, generator=g).to(device, s.dtype) for s in student]
    weights = torch.linspace(0.5, 1.5, len(shapes)).to(device)
    buffers = [torch.empty_like(s) for s in student]

    def step() -> list[Tensor]:
        leaves = [s.detach().requires_grad_() for s in student]
        loss, taps = feature_match(leaves, teacher, weights=weights, distance=distance, grads=buffers)
        gradients = torch.autograd.grad(3 * loss, leaves)
        with torch.no_grad():
            for s, gradient in zip(student, gradients, strict=True):
                s -= gradient
        return [loss.detach(), taps, *(gradient.clone() for gradient in gradients)]

    return Work([*student, *teacher, weights], step)


def output_match_work(device: str) -> Work:
    """With a draw, guidance, a converted prediction of the teacher, and recomputed noise of the task."""
    *tables, counter = banks(device)
    latents, coefficients = tables[0], tables[3]
    draw = NoiseGather(*tables, counter, batch=6, null_index=8, target=True)
    g = torch.Generator().manual_seed(4)
    student, teacher, unconditional = (torch.randn((6, 3, 5, 7), generator=g).to(device) for _ in range(3))
    table = torch.rand((50, 5), generator=g).to(device)

    def step() -> list[Tensor]:
        drawn, leaf = draw(), student.detach().requires_grad_()
        task = Task.of(drawn, latents, coefficients, counter)
        loss, *rest = output_match(
            leaf, teacher, drawn.timestep, table, unconditional=unconditional, x_t=drawn.x_t, task=task
        )
        (gradient,) = torch.autograd.grad(3 * loss, leaf)
        with torch.no_grad():
            student.sub_(gradient)
        counter[1] += 1
        return [loss.detach(), *rest, gradient.clone()]

    return Work([*tables, counter, student, teacher, unconditional, table], step)


def adamw_ema_work(device: str) -> Work:
    g = torch.Generator().manual_seed(3)
    shapes = [(3, 5, 7), (1,), (9000,), (2, 8, 4)]
    params = [torch.randn(s, generator=g).to(device) for s in shapes]
    grads = [torch.randn(s, generator=g).to(device, d) for s, d in zip(shapes, (*FLOATS, FLOATS[0]), strict=True)]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    averages = [p.clone() for p in params]
    copies = [p.to(torch.bfloat16) if i % 2 else p.new_empty(0, dtype=torch.float16) for i, p in enumerate(params)]
    steps = [p.new_zeros(()) for p in params]
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    lr, weight = torch.tensor(0.1).to(device), torch.tensor(0.5).to(device)
    written = [*params, *moments[0], *moments[1], *averages, *copies, *steps, skipped]

    def step() -> list[Tensor]:
        total = grad_square_sum(grads)
        adamw_ema(
            params, grads, *moments, steps, groups=[AdamWGroup(lr)], square_sum=total, skipped=skipped, copies=copies,
            averages=averages, max_norm=1.0, ema_weight=weight, ema_warmup=True,
        )  # fmt: skip
        lr.mul_(0.5)
        return [total, *(t.clone() for t in written)]

    return Work([*written, *grads, lr, weight], step)


def model_work(
    device: str, call: Callable[..., Tensor | tuple[Tensor, ...]], *shapes: tuple[int, ...], dtype: torch.dtype
) -> Work:
    """An op of models and its backward; each step moves the inputs along their gradients."""
    g = torch.Generator().manual_seed(5)
    inputs = [torch.randn(s, generator=g).to(device, dtype) for s in shapes]

    def step() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        made = call(*leaves)
        outputs = [made] if isinstance(made, Tensor) else list(made)
        gradients = torch.autograd.grad([(out * out).sum() for out in outputs], leaves)
        with torch.no_grad():
            for t, gradient in zip(inputs, gradients, strict=True):
                t.sub_(gradient, alpha=0.01)
        return [*(out.detach() for out in outputs), *(gradient.clone() for gradient in gradients)]

    return Work(inputs, step)


def cross_attention_work(device: str, dtype: torch.dtype, keys: int) -> Work:
    """Samples that share rows, one of them masked; either all keys are on chip at once, or (float32) in blocks of
    16."""
    rows = torch.tensor([1, 0, 1]).to(device)
    mask = torch.ones(3, keys).bool()
    mask[2, keys // 2 :] = False
    call = functools.partial(cross_attention, mask=mask.to(device), rows=rows)
    return model_work(device, call, (3, 19, 1, 40), (2, keys, 1, 40), (2, keys, 1, 40), dtype=dtype)


def cross_attention_backward_work(device: str) -> Work:
    """Only its gradients, with two tiles of queries; the K and V of one sample are not those of the next row."""
    g = torch.Generator().manual_seed(6)
    q, k, v, grad_out = (
        torch.randn((2, n, 1, 160), generator=g).to(device, torch.bfloat16) for n in (150, 21, 21, 150)
    )  # fmt: skip

    def step() -> list[Tensor]:
        grads = [torch.empty_like(t) for t in (q, k, v)]
        OPS["cross_attention_backward"](None, q, k, v, None, None, 0.1, grad_out, *grads)
        q.sub_(grads[0], alpha=0.01)
        return grads

    return Work([q, k, v, grad_out], step)


def group_norm_silu_work(device: str, last: bool) -> Work:
    """As in a residual block: with time embedding, scale and shift."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        time_bias, scale, shift = rest
        return group_norm_silu(x, weight, bias, 2, time_bias=time_bias, scale=scale, shift=shift)

    return model_work(device, call, (2, 16, 5, 7), (16,), (16,), (2, 16), (2, 16), (2, 16), dtype=torch.bfloat16)


def quantize_rows_work(device: str) -> Work:
    """Rows of several vectors of a thread, and a rest."""
    x = torch.randn((3, 530), generator=torch.Generator().manual_seed(8)).to(device, torch.bfloat16)

    def step() -> list[Tensor]:
        found = [quantize_rows(x), quantize_rows(x, gelu=True)]
        x.sub_((found[0][0].float() * found[0][1]).to(x.dtype), alpha=0.01)
        return [t for q, scale in found for t in (q.float(), scale)]

    return Work([x], step)


WORKS: dict[str, Callable[[str], Work]] = {
    "noise_gather": noise_gather_work,
    "feature_match-mse": lambda device: feature_match_work(device, "mse"),
    "feature_match-huber": lambda device: feature_match_work(device, "huber"),
    "feature_match-normalized_mse": lambda device: feature_match_work(device, "normalized_mse"),
    "feature_match-cosine": lambda device: feature_match_work(device, "cosine"),
    "output_match": output_match_work,
    "adamw_ema": adamw_ema_work,
    "cross_attention": lambda device: cross_attention_work(device, torch.bfloat16, 21),
    "cross_attention-long": lambda device: cross_attention_work(device, torch.float32, 20),
    "cross_attention-160": lambda device: model_work(
        device, cross_attention, (2, 150, 1, 160), (2, 21, 1, 160), (2, 21, 1, 160), dtype=torch.bfloat16
    ),
    "cross_attention_backward": cross_attention_backward_work,
    "group_norm_silu": lambda device: group_norm_silu_work(device, last=False),
    "group_norm_silu-channels_last": lambda device: group_norm_silu_work(device, last=True),
    "layer_norm_modulate": lambda device: model_work(
        device, residual_layer_norm_modulate, (2, 9, 40), (2, 9, 40), *[(2, 40)] * 3, dtype=torch.bfloat16
    ),
    "geglu": lambda device: model_work(device, geglu, (2, 9, 80), dtype=torch.float16),
    "add_bias": lambda device: model_work(device, add_bias, (2, 70, 3, 5), (2, 70, 3, 5), (70,), dtype=torch.bfloat16),
    "quantize_rows": quantize_rows_work,
    "geglu-bias": lambda device: model_work(
        device, lambda x, bias: geglu(x + bias.detach(), bias=bias), (2, 9, 80), (80,), dtype=torch.float16
    ),
}
#: Contiguous layouts; fewer keys than warpgroups take, or float32.
_REFUSED = {("cuda", w) for w in ("group_norm_silu", "cross_attention", "cross_attention-long")}
#: Each kernel with the steps of its ops; ``attention`` has no kernel of this library.
PAIRS = [(k, w) for k in KERNELS for w in WORKS if k in OPS[w.split("-")[0]].kernel_names() and (k, w) not in _REFUSED]


def steps_of(work: Work, count: int = 3) -> list[list[Tensor]]:
    """What each of some steps wrote; the state is as before in the end."""
    before = [t.clone() for t in work.state]
    written = [[t.clone() for t in work.step()] for _ in range(count)]
    restore(work, before)
    return written


def restore(work: Work, state: list[Tensor]) -> None:
    for t, value in zip(work.state, state, strict=True):
        t.copy_(value)


def main(device: str, *kernels: str) -> None:
    for name in kernels or KERNELS:
        for op in (work for kernel, work in PAIRS if kernel == name):
            with use(name):
                written = steps_of(WORKS[op](device), 2)
            print(name, op, "wrote", sum(t.double().nan_to_num().sum().item() for t in written[-1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
