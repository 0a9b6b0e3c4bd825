# SPDX-License-Identifier: Apache-2.0
"""Previews of a run: samples of teacher and student for the same prompts and noise, as a grid of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdistill.data.encoded import rows_of
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.diffusion.scheduled import check_scheduler, sample_with, scheduler_of
from fastdistill.distill.objective import Setting
from fastdistill.errors import InputError, described
from fastdistill.evaluate.figures import png, sample_grid
from fastdistill.models.calling import Call, with_guidance
from fastdistill.models.sharding import sharded
from fastdistill.train.config import PreviewConfig

Decode = Callable[[Tensor], Tensor]


@dataclass
class Previews:
    """``previews(student, done)``: a PNG file with a row of samples of the teacher and a row of the student.

    A column is a prompt and a seed; the columns of a prompt are side by side. The noise is drawn from (seed, position
    of the prompt), so it is the same in all grids of a run, also after resuming. The teacher samples once.

    Args:
        scheduler: of diffusers (``sample_with``). shape: of one latent.
        wanted: the number of prompts, from the first, or a list of rows and texts of the bank. seeds: of the initial
            noise.
        guidance: the argument ``guidance_scale`` or ``guidance`` of ``sample_with``.
        guided: whether a single forward of the student is guided already; then it is sampled without guidance.
        batch: samples per forward. call: how models are called (``Predictor``).
        decode: latents [b, *shape] float32 -> images [b, 1 or 3, H, W] in [0, 1]; None: ``pictured``.

    Raises:
        InputError: prompts that are not in the bank.
    """

    teacher: nn.Module
    scheduler: Any
    prompts: PromptBank
    shape: tuple[int, ...]
    device: torch.device
    wanted: int | Sequence[int | str]
    steps: int
    guidance: Mapping[str, Any]
    seeds: Sequence[int]
    batch: int
    call: Call | None = None
    decode: Decode | None = None
    guided: bool = False

    def __post_init__(self) -> None:
        self._rows = _rows(self.wanted, self.prompts.texts)
        self._taught: Tensor | None = None

    def __call__(self, student: nn.Module, done: int) -> bytes:
        if self._taught is None:
            self._taught = self._samples(self.teacher)
        taught, learnt = self._taught, self._samples(student, {} if self.guided else None)
        if self.decode is None:
            limits = (-1.0, 1.0) if self.shape[0] in (1, 3) else (float(taught.min()), float(taught.max()))
            images = [pictured(latents, limits) for latents in (taught, learnt)]
        else:
            images = [taught, learnt]
        names = "teacher", f"student, step {done}"
        texts = [self.prompts.texts[row] for row in self._rows for _ in self.seeds]
        figure = sample_grid({n: i.nan_to_num() for n, i in zip(names, images, strict=True)}, texts)
        return png(figure, transparent=False, dpi=150)

    @torch.no_grad()
    def _samples(self, model: nn.Module, guidance: Mapping[str, Any] | None = None) -> Tensor:
        """Latents (or images if ``decode`` is given) for each prompt with every seed, on the CPU; ``guidance`` None:
        the guidance of the previews."""
        given = self.guidance if guidance is None else guidance
        return torch.stack([self._of_seed(model, seed, given) for seed in self.seeds], 1).flatten(0, 1)

    def _of_seed(self, model: nn.Module, seed: int, guidance: Mapping[str, Any]) -> Tensor:
        made = []
        for first in range(0, len(self._rows), self.batch):
            rows = torch.tensor(self._rows[first : first + self.batch], device="cpu")
            own = torch.arange(first, first + len(rows), device=self.device)
            latents = sample_with(
                self.scheduler,
                model,
                initial_noise(seed, own, self.shape),
                self._conditions(model, rows),
                self._conditions(model, slice(-1, None)),
                steps=self.steps,
                **guidance,
                seed=seed,
                rows=own,
                call=self.call,
            )
            made.append((latents if self.decode is None else self._decoded(latents)).float().cpu())
        return torch.cat(made)

    def _decoded(self, latents: Tensor) -> Tensor:
        assert self.decode is not None
        images: Any = self.decode(latents)
        fits = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3)
        if not fits or len(images) != len(latents):
            got = tuple(images.shape) if isinstance(images, Tensor) else described(images)
            raise InputError.of("decode(latents)", f"images [{len(latents)}, 1 or 3, H, W]", got)
        return cast(Tensor, images)

    def _conditions(self, model: nn.Module, rows: Tensor | slice) -> Any:
        return with_guidance(
            model, rows_of(self.prompts.rows, rows, self.device), (self.guidance.get("guidance_scale") or 1.0) - 1
        )


def previews_of(
    setting: Setting,
    config: PreviewConfig,
    prompts: PromptBank,
    scheduler: Any = None,
    decode: Decode | None = None,
    guided: bool = False,
) -> Previews:
    """Previews of a run; ``scheduler``: of diffusers, None: ``scheduler_of`` the run's schedule.

    Raises:
        InputError: a sharded student, too many steps, prompts that are not in the bank, a schedule without a scheduler.
    """
    if where := sharded(setting.student):
        raise InputError.of("config.preview.every", "none for a sharded student", where)
    if config.steps > len(setting.schedule):
        raise InputError.of("config.preview.steps", f"at most the schedule's {len(setting.schedule)}", config.steps)
    if config.clip_sample is not None and (scheduler is not None or not isinstance(setting.schedule, NoiseSchedule)):
        rule = "none but for a NoiseSchedule (a scheduler of diffusers has it in its own settings)"
        raise InputError.of("config.preview.clip_sample", rule, config.clip_sample)
    if config.guidance is not None and config.guidance_scale is not None:
        raise InputError.of("config.preview.guidance", "none beside guidance_scale", config.guidance)
    scheduler = scheduler or scheduler_of(setting.schedule, setting.prediction_type, config.clip_sample)
    check_scheduler(scheduler)
    return Previews(
        setting.teacher,
        scheduler,
        prompts,
        tuple(setting.latents.shape[1:]),
        setting.device,
        wanted=config.prompts,
        steps=config.steps,
        guidance={"guidance_scale": config.guidance_scale, "guidance": config.guidance},
        seeds=config.seeds,
        batch=setting.micro_batch or setting.batch,
        call=setting.call,
        decode=decode,
        guided=guided,
    )


def pictured(latents: Tensor, limits: tuple[float, float]) -> Tensor:
    """Latents [P, C, *S] as images [P, 1 or 3, H, W]; ``limits`` are the values of black and white.

    Maps: the first three channels (if there are two, the third is empty). Videos: the same, of the first frame. Signals
    [P, C, L] and vectors [P, C]: gray images C x L and 1 x C.
    """
    while latents.ndim < 4:
        latents = latents[:, None]
    if latents.ndim == 5:
        latents = latents[:, :, 0]
    if latents.shape[1] != 1:
        latents = latents[:, :3]
    images = (latents - limits[0]) / max(limits[1] - limits[0], 1e-12)
    if images.shape[1] == 2:
        images = torch.cat([images, torch.zeros_like(images[:, :1])], 1)
    return images.clamp(0, 1)


def _rows(wanted: int | Sequence[int | str], texts: Sequence[str]) -> list[int]:
    if isinstance(wanted, int):
        return list(range(min(wanted, len(texts))))
    rows = []
    for i, prompt in enumerate(wanted):
        name = f"config.preview.prompts[{i}]"
        if isinstance(prompt, int) and not 0 <= prompt < len(texts):
            raise InputError.of(name, f"a row of the bank, 0 to {len(texts) - 1}", prompt)
        if isinstance(prompt, str) and prompt not in texts:
            near = get_close_matches(prompt, texts, n=3)
            hint = f" (near matches: {', '.join(map(repr, near))})" if near else ""
            raise InputError.of(name, "a text of the bank", repr(prompt) + hint)
        rows.append(prompt if isinstance(prompt, int) else texts.index(prompt))
    return rows
