# SPDX-License-Identifier: Apache-2.0
"""Not one op but all of them: whole training steps of random conditioning and of guidance distillation, with real
models and random weights (``benchmarks/step.py``)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.registry import Case, Workload, generator
from benchmarks.shapes import DIT_SAMPLE, PIXART_SAMPLE, SD15_SAMPLE, Sizes
from benchmarks.step import Setup, rivals, workload

BATCHES = (32, 4, 16, 1)
GUIDED_BATCHES = (32, 4, 16)
SUSTAINED = 60.0  # seconds of the headline measurement
_ROWS, _PROMPTS, _NO_CLASS = 256, 600, 1000


def cases() -> Iterator[Case]:
    make: Callable[[torch.device], Workload]
    for name, build in {"digits U-Net": digits, "digits U-Net guided": functools.partial(_guided, digits)}.items():
        make = functools.partial(workload, build, measured=True)
        yield Case("step", f"{name} B=64", "fp32", "cpu", make, rivals(64, gpu=False))
        make = functools.partial(workload, functools.partial(_low, build), measured=True, whole=build)
        yield Case("step", f"{name} B=64", "bf16", "cpu", make, rivals(64, gpu=False, low=True))
    for batch in BATCHES:
        for name, build_of in MODELS.items():
            headline = name == "SD-1.5 to bk_base 512x512" and batch == 32
            make = functools.partial(_workload, build_of, batch, SUSTAINED if headline else 0.0)
            yield Case("step", f"{name} B={batch}", "bf16", "cuda", make, rivals(batch), headline)
    for batch in GUIDED_BATCHES:
        make = functools.partial(_workload, functools.partial(_guided, sd15), batch, 0.0)
        yield Case("step", f"SD-1.5 to bk_base 512x512 guided B={batch}", "bf16", "cuda", make, rivals(batch))


def _guided(build: Callable[..., Setup], *arguments: Any) -> Setup:
    """The same with a teacher that uses a guidance scale of 7.5."""
    return dataclasses.replace(build(*arguments), guidance=6.5)


def _low(build: Callable[..., Setup], *arguments: Any) -> Setup:
    """The same with both models and their inputs in bfloat16."""
    from fastdistill import LatentCache, PromptBank

    setup = build(*arguments)
    for model in (setup.teacher, setup.student):
        model._apply(lambda t: t.bfloat16() if t.is_floating_point() else t)
    cache = LatentCache(setup.cache.latents[:].bfloat16(), setup.cache.prompt_index)
    bank = PromptBank({name: rows[:].bfloat16() for name, rows in setup.bank.banks.items()}, setup.bank.texts)
    return dataclasses.replace(setup, cache=cache, bank=bank)


def _workload(
    build: Callable[[int, torch.device], Setup], batch: int, sustained: float, device: torch.device
) -> Workload:
    return workload(functools.partial(build, batch), device, sustained)


def digits(device: torch.device) -> Setup:
    """The shipped teacher and its student without a mid block, on random latents."""
    from fastdistill import LatentCache
    from fastdistill.models import make_student
    from fastdistill.tasks import open_task

    pipeline = open_task("task:digits")
    teacher = pipeline.model(device=device)
    made = make_student(teacher, "bk_small")
    taps = tuple(zip(made.teacher_taps, made.student_taps, strict=True))
    noise = torch.randn(512, *pipeline.latent_shape(), generator=generator(torch.device("cpu"))).clamp(-1, 1)
    prompts = pipeline.own_prompts() or []
    cache = LatentCache(noise, torch.arange(len(noise)) % len(prompts))
    return Setup(teacher, made.model, taps, cache, pipeline.encode(prompts), pipeline.schedule(), 64, device)


def sd15(batch: int, device: torch.device, **changes: Any) -> Setup:
    """The U-Net of Stable Diffusion 1.5 and BK-SDM's base student."""
    from diffusers import UNet2DConditionModel

    from fastdistill.models.specs import student_config
    from fastdistill.models.students import student_taps

    with device:
        teacher = UNet2DConditionModel(**{"sample_size": 64, "cross_attention_dim": SD15_SAMPLE[1][1]} | changes)
        config = student_config(teacher.config, "bk_base")
        student = UNet2DConditionModel.from_config(config)
    return _setup(teacher, student, student_taps(teacher.config, config), SD15_SAMPLE, batch, device)


def pixart(batch: int, device: torch.device, **changes: Any) -> Setup:
    """PixArt-alpha XL/2 at 512 x 512 and a student with half of its blocks."""
    from diffusers import PixArtTransformer2DModel

    sizes = {"sample_size": 64, "caption_channels": 4096} | changes
    return _transformers(PixArtTransformer2DModel, sizes, PIXART_SAMPLE, batch, device)


def dit(batch: int, device: torch.device, **changes: Any) -> Setup:
    """DiT-XL/2 at 256 x 256 and a student with half of its blocks; a prompt is a class number."""
    from diffusers import DiTTransformer2DModel

    return _transformers(DiTTransformer2DModel, {"out_channels": 8} | changes, DIT_SAMPLE, batch, device)


MODELS = {"SD-1.5 to bk_base 512x512": sd15, "PixArt-XL/2 to 14 blocks 512x512": pixart, "DiT-XL/2 to 14 blocks": dit}


def _transformers(
    kind: Any, sizes: dict[str, Any], sample: tuple[Sizes, Sizes], batch: int, device: torch.device
) -> Setup:
    """Teacher and student. The taps compare each block of the student with every second block of the teacher."""
    with device:
        teacher = kind(**sizes)
        blocks = teacher.config.num_layers
        student = kind(**sizes | {"num_layers": blocks // 2})
    block = "transformer_blocks.{}".format
    taps = [(block(2 * i + 1), block(i)) for i in range(blocks // 2)]
    return _setup(teacher, student, taps, sample, batch, device)


def _setup(
    teacher: nn.Module,
    student: nn.Module,
    taps: list[tuple[str, str]],
    sample: tuple[Sizes, Sizes],
    batch: int,
    device: torch.device,
) -> Setup:
    """bfloat16 and channels_last, with banks of random numbers (class numbers if the prompt has no shape)."""
    from fastdistill import LatentCache, NoiseSchedule, PromptBank

    for model in (teacher, student):
        model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    g = generator(torch.device("cpu")) if device.type == "meta" else generator(device)
    latents = torch.randn(_ROWS, *sample[0], generator=g, device=g.device)
    shape = (_PROMPTS + 1, *sample[1])
    prompts: Any
    if sample[1] == ():
        labels = torch.randint(_NO_CLASS + 1, shape, generator=g, device=g.device)
        prompts = {"class_labels": labels.index_fill(0, torch.tensor([_PROMPTS], device=g.device), _NO_CLASS)}
    else:
        prompts = torch.randn(shape, generator=g, device=g.device).bfloat16()
    cache = LatentCache(latents.bfloat16(), torch.arange(_ROWS, device=g.device))
    bank = PromptBank(prompts, [str(i) for i in range(_PROMPTS)])
    return Setup(teacher, student, taps, cache, bank, NoiseSchedule.scaled_linear(), batch, device)
