# SPDX-License-Identifier: Apache-2.0
"""Not an op but all of them: a whole training step of random conditioning, against the script a user would write.

Ours is what the trainer runs: one CUDA graph where there is a GPU. FLOPs are those of the literal step, counted by
torch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.registry import COMPILED, Case, Run, Workload, compiled, generator
from benchmarks.shapes import SD15_SAMPLE
from fastdistill.ops import use

if TYPE_CHECKING:
    from fastdistill.data.latent_cache import LatentCache
    from fastdistill.data.prompt_bank import PromptBank
    from fastdistill.diffusion.schedule import NoiseSchedule
    from fastdistill.train import DistillTrainer

RIVALS = ("literal", "tuned", COMPILED)
EAGER = "ours, eager"


def cases() -> Iterator[Case]:
    yield Case("step", "digits U-Net B=64", "fp32", "cpu", _digits, RIVALS[:2])
    for batch in (4, 16):
        build = functools.partial(_sd15, batch)
        yield Case("step", f"SD-1.5 to bk_base 512x512 B={batch}", "bf16", "cuda", build, (*RIVALS, EAGER), batch == 4)


def _digits(device: torch.device) -> Workload:
    from fastdistill.models import student_taps
    from fastdistill.tasks.digits.sampling import SCHEDULE
    from fastdistill.tasks.digits.text_encoder import prompt_bank
    from fastdistill.tasks.digits.trainer import noise_cache, noise_trainer

    trainer = noise_trainer(device=device)
    taps = student_taps(trainer.teacher.config, trainer.student.config)
    return _workload(trainer, taps, noise_cache(), prompt_bank(), SCHEDULE, RIVALS[:2])


def _sd15(batch: int, device: torch.device) -> Workload:
    from diffusers import UNet2DConditionModel

    from fastdistill import DistillTrainer, LatentCache, NoiseSchedule, PromptBank, RandomConditioning, make_student
    from fastdistill.train import TrainConfig

    with device:
        teacher = UNet2DConditionModel(sample_size=64, cross_attention_dim=SD15_SAMPLE[1][1])
        made = make_student(teacher, "bk_base")
    for model in (teacher, made.model):
        model.to(torch.bfloat16, memory_format=torch.channels_last)
    g = generator(device)
    latents = torch.randn(256, *SD15_SAMPLE[0], generator=g, device=device).bfloat16()
    prompts = torch.randn(601, *SD15_SAMPLE[1], generator=g, device=device).bfloat16()
    cache = LatentCache(latents, torch.arange(256, device=device))
    bank = PromptBank(prompts, [str(i) for i in range(600)])
    taps = tuple(zip(made.teacher_taps, made.student_taps, strict=True))
    config = TrainConfig(steps=10_000, batch=batch, lr=1e-5)
    schedule = NoiseSchedule.scaled_linear()
    objective = RandomConditioning(taps=taps)
    trainer = DistillTrainer(teacher, made.model, schedule, cache, bank, objective, config)
    return _workload(trainer, taps, cache, bank, schedule, RIVALS)


def _workload(
    trainer: DistillTrainer,
    taps: Sequence[tuple[str, str]],
    cache: LatentCache,
    bank: PromptBank,
    schedule: NoiseSchedule,
    names: tuple[str, ...],
) -> Workload:
    from fastdistill.train.graph import runner

    rivals: dict[str, Run | str] = {n: _Script(n, trainer, taps, cache, bank, schedule) for n in names}
    if trainer.device.type == "cuda":
        rivals[EAGER] = trainer.step
    with FlopCounterMode(display=False) as counter:
        _Script("literal", trainer, taps, cache, bank, schedule)()

    def check() -> None:
        losses = []
        for kernel in (None, "reference"):
            with use(kernel) if kernel else contextlib.nullcontext():
                losses.append(trainer.step.objective(trainer.step.counter)[1][0])
        low = next(trainer.student.parameters()).dtype != torch.float32
        torch.testing.assert_close(*losses, rtol=2e-2 if low else 1e-4, atol=0)

    ours = runner(trainer.step, trainer.student, trainer.config.execution)
    return Workload(ours, rivals, check, flops=counter.get_total_flops(), graphs=False)  # ours is one; scripts cannot


class _Script:
    """The step of the public scripts: hooks for the features, AdamW, a loop for the average, the loss read every step;
    where the models are in a low precision, fp32 weights under autocast.

    Other than ``literal``: low-precision weights with fp32 masters, fused AdamW, averages by ``torch._foreach``, and
    nothing read; with ``torch.compile`` both models compiled.
    """

    def __init__(
        self,
        name: str,
        trainer: DistillTrainer,
        taps: Sequence[tuple[str, str]],
        cache: LatentCache,
        bank: PromptBank,
        schedule: NoiseSchedule,
    ) -> None:
        self.literal, device = name == "literal", trainer.device
        self.batch, self.steps = trainer.config.batch, len(schedule)
        self.teacher, self.student = copy.deepcopy(trainer.teacher), copy.deepcopy(trainer.student)
        self.dtype = next(self.student.parameters()).dtype
        self.mixed = self.dtype != torch.float32
        if self.literal:
            self.student.float()
        self.features: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
        for i, pair in enumerate(taps):
            for model, module, kept in zip((self.teacher, self.student), pair, self.features, strict=True):
                model.get_submodule(module).register_forward_hook(functools.partial(_keep, kept, i))
        self.held = list(self.student.parameters())
        apart = self.mixed and not self.literal
        self.masters = [p.detach().float().requires_grad_() for p in self.held] if apart else self.held
        self.averages = [p.detach().clone() for p in self.masters]
        fused = None if self.literal else True
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=fused, capturable=device.type == "cuda")
        self.latents, self.own = cache.latents.to(device), cache.prompt_index.to(device)
        self.prompts = bank.embeddings.to(device)
        self.signal, self.noise = schedule.coefficients()[:, :2].to(device, self.latents.dtype).T
        self.models = [self.teacher, self.student]
        if name == COMPILED:
            self.models = [compiled(model, device) for model in self.models]

    def __call__(self) -> None:
        device = self.latents.device
        row, t, text = (
            torch.randint(n, (self.batch,), device=device) for n in (len(self.latents), self.steps, len(self.prompts))
        )
        random = torch.rand(self.batch, device=device) < 0.5
        prompt = self.prompts[torch.where(random, text, self.own[row])]
        x = self.latents[row]
        x_t = self.signal[t].view(-1, 1, 1, 1) * x + self.noise[t].view(-1, 1, 1, 1) * torch.randn_like(x)
        teacher, student = self.models
        with torch.no_grad():
            target = teacher(x_t, t, encoder_hidden_states=prompt).sample
        with torch.autocast(device.type, self.dtype, enabled=self.mixed and self.literal):
            output = student(x_t, t, encoder_hidden_states=prompt).sample
        loss = F.mse_loss(output.float(), target.float())
        theirs, own = self.features
        loss = loss + sum(F.mse_loss(own[i].float(), theirs[i].float()) for i in own)
        loss.backward()
        self.update()
        if self.literal:
            loss.item()

    @torch.no_grad()
    def update(self) -> None:
        apart = self.masters is not self.held
        if apart:
            for master, p in zip(self.masters, self.held, strict=True):
                master.grad = p.grad.float() if p.grad is not None else None
                p.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.literal:
            for average, p in zip(self.averages, self.masters, strict=True):
                average.mul_(0.9999).add_(p, alpha=1e-4)
        else:
            torch._foreach_lerp_(self.averages, self.masters, 1e-4)
        if apart:
            torch._foreach_copy_(self.held, self.masters)


def _keep(kept: dict[int, Tensor], index: int, module: nn.Module, args: Any, output: Any) -> None:
    kept[index] = output[0] if isinstance(output, tuple) else output
