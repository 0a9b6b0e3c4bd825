# SPDX-License-Identifier: Apache-2.0
"""``noise_gather``: a training batch from the banks. The rival is what a training script would write, not the
reference (which computes the same random numbers in eager torch). The compiled script is a rival only on a GPU: on a
CPU, compiled ``randn`` is many times slower than eager.

"rows alone" measures the gather of prompts: latents have one element, as if they were in other banks. The rivals are
given the rows; ours also draws rows, timesteps and choices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.registry import COMPILED, DTYPES, Case, Run, Workload, compiled, generator
from benchmarks.shapes import PIXART_CONDITIONS, PIXART_SAMPLE, SD15_SAMPLE, SDXL_CONDITIONS, SDXL_SAMPLE, Sizes
from fastdistill.ops import NoiseGather, use

SHAPES = [  # label, (latent, prompt, further banks of prompts), batch, device, among the first
    ("SD-1.5", SD15_SAMPLE, 4, "cpu", False),
    ("SD-1.5", SD15_SAMPLE, 16, "cpu", False),
    ("SD-1.5", SD15_SAMPLE, 64, "cuda", True),
    ("SD-1.5", SD15_SAMPLE, 512, "cuda", True),
    ("SDXL", (*SDXL_SAMPLE, *SDXL_CONDITIONS), 4, "cpu", False),
    ("SDXL", (*SDXL_SAMPLE, *SDXL_CONDITIONS), 64, "cuda", False),
    ("PixArt-XL/2", (*PIXART_SAMPLE, *PIXART_CONDITIONS), 64, "cuda", False),
]
ROWS = [  # label, banks of prompts, batch, device
    ("SD-1.5", SD15_SAMPLE[1:], 4, "cpu"),
    ("SD-1.5", SD15_SAMPLE[1:], 16, "cpu"),
    ("SDXL", (SDXL_SAMPLE[1], *SDXL_CONDITIONS), 4, "cpu"),
    ("SD-1.5", SD15_SAMPLE[1:], 512, "cuda"),
]
STEPS, TEXTS = 1000, 600


def cases() -> Iterator[Case]:
    for label, sample, batch, device, headline in SHAPES:
        sizes = " ".join("x".join(map(str, part)) for part in sample)
        for dtype in DTYPES:
            build = functools.partial(_build, sample[0], sample[1:], batch, DTYPES[dtype])
            rivals = ("literal", *((COMPILED,) if device == "cuda" else ()))
            yield Case(
                "noise_gather", f"{label} {sizes} B={batch}", dtype, device, build, rivals, headline and dtype == "bf16"
            )
    for label, banks, batch, device in ROWS:
        shape = f"{label} rows alone {' '.join('x'.join(map(str, sizes)) for sizes in banks)} B={batch}"
        for dtype in DTYPES:
            make = functools.partial(_rows, banks, batch, DTYPES[dtype])
            yield Case("noise_gather", shape, dtype, device, make, ("index_select(out=)", "index_select", "indexing"))


def _literal(
    latents: Tensor, prompts: list[Tensor], signal: Tensor, noise: Tensor, x: Tensor, z: Tensor, prompt: list[Tensor]
) -> Tensor:
    batch, device = len(x), x.device
    row, t, text = (torch.randint(n, (batch,), device=device) for n in (len(latents), STEPS, len(prompts[0])))
    torch.index_select(latents, 0, row, out=x)
    for bank, out in zip(prompts, prompt, strict=True):
        torch.index_select(bank, 0, text, out=out)
    torch.randn(z.shape, dtype=z.dtype, device=device, out=z)
    x.mul_(signal[t].view(-1, 1, 1, 1))
    return torch.addcmul(x, z, noise[t].view(-1, 1, 1, 1), out=x)


def _fusible(latents: Tensor, prompts: list[Tensor], signal: Tensor, noise: Tensor, batch: int) -> list[Tensor]:
    """The same without output buffers, so that a compiler can fuse it."""
    row, t, text = (torch.randint(n, (batch,), device=latents.device) for n in (len(latents), STEPS, len(prompts[0])))
    z = torch.randn(batch, *latents.shape[1:], dtype=latents.dtype, device=latents.device)
    x_t = latents[row] * signal[t].view(-1, 1, 1, 1) + noise[t].view(-1, 1, 1, 1) * z
    return [x_t, *(bank[text] for bank in prompts)]


def _ours(latents: Tensor, prompts: list[Tensor], coefficients: Tensor, batch: int) -> tuple[Run, Callable[[], None]]:
    """A draw of the next step, and the check of it."""
    device = latents.device
    own = torch.arange(len(latents), device=device) % TEXTS
    replace = torch.full((STEPS,), 2**31, device=device)
    numbers = np.array([1, 0])
    host = torch.from_numpy(numbers)  # shares its memory with the step counter
    counter = host.to(device)
    banks = prompts if len(prompts) > 1 else prompts[0]
    draw = NoiseGather(latents, own, banks, coefficients, replace, counter, null_index=TEXTS - 1, batch=batch)

    def ours() -> object:
        numbers[1] += 1
        return draw()

    def check() -> None:
        got = [tensor.clone() for tensor in tree_leaves(tuple(draw()))]
        with use("reference"):
            expected = tree_leaves(tuple(draw()))
        bound = 4e-6 if latents.dtype == torch.float32 else 2 * torch.finfo(latents.dtype).eps
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)

    return ours, check


def _banks(conditions: tuple[Sizes, ...], dtype: torch.dtype, device: torch.device, g: torch.Generator) -> list[Tensor]:
    return [torch.randn(TEXTS, *sizes, generator=g, device=device).to(dtype) for sizes in conditions]


def _schedule(device: torch.device) -> Tensor:
    alpha = torch.linspace(0.99, 0.05, STEPS, device=device)
    return torch.stack([alpha, (1 - alpha**2).sqrt(), torch.zeros_like(alpha), torch.ones_like(alpha)], 1)


def _buffers(banks: list[Tensor], batch: int) -> list[Tensor]:
    return [bank[:1].expand(batch, *bank.shape[1:]).clone() for bank in banks]


def _rows(conditions: tuple[Sizes, ...], batch: int, dtype: torch.dtype, device: torch.device) -> Workload:
    g = generator(device)
    banks = _banks(conditions, dtype, device, g)
    ours, check = _ours(torch.zeros(256, 1, dtype=dtype, device=device), banks, _schedule(device), batch)
    rows = itertools.cycle(torch.randint(TEXTS, (STEPS, batch), generator=g, device=device).unbind())
    buffers = _buffers(banks, batch)

    def into_buffers() -> None:
        index = next(rows)
        for bank, out in zip(banks, buffers, strict=True):
            torch.index_select(bank, 0, index, out=out)

    def fresh() -> list[Tensor]:
        index = next(rows)
        return [torch.index_select(bank, 0, index) for bank in banks]

    def indexed() -> list[Tensor]:
        index = next(rows)
        return [bank[index] for bank in banks]

    rivals: dict[str, Run | str] = {"index_select(out=)": into_buffers, "index_select": fresh, "indexing": indexed}
    return Workload(ours, rivals, check, 2 * sum(out.numel() for out in buffers) * dtype.itemsize)


def _build(
    latent: Sizes, conditions: tuple[Sizes, ...], batch: int, dtype: torch.dtype, device: torch.device
) -> Workload:
    g = generator(device)
    latents = torch.randn(max(256, batch), *latent, generator=g, device=device).to(dtype)
    prompts, coefficients = _banks(conditions, dtype, device, g), _schedule(device)
    ours, check = _ours(latents, prompts, coefficients, batch)
    signal, noise = (c.to(dtype) for c in coefficients[:, :2].T)
    x, z = latents.new_empty(2, batch, *latent)
    prompt = _buffers(prompts, batch)
    rivals: dict[str, Run | str] = {
        "literal": lambda: _literal(latents, prompts, signal, noise, x, z, prompt),
    }
    if device.type == "cuda":
        fused = compiled(_fusible, device)
        rivals[COMPILED] = lambda: fused(latents, prompts, signal, noise, batch)
    moved = batch * 2 * (latents[0].numel() + sum(bank[0].numel() for bank in prompts)) * dtype.itemsize
    return Workload(ours, rivals, check, moved)
