# SPDX-License-Identifier: Apache-2.0
"""An objective of one's own: progressive distillation (Salimans and Ho 2022, arXiv 2202.00512, algorithm 2).

The student learns to do in one DDIM step what the teacher does in two. After a run it is the teacher of the next one,
of half as many steps:

    steps = 512
    while steps > 4:
        steps //= 2
        trainer = DistillTrainer(teacher, student, schedule, latents, prompts, ProgressiveDistillation(steps), config)
        trainer.fit(f"runs/{steps}-steps")
        teacher, student = trainer.ema_student(), trainer.ema_student().requires_grad_(True)
"""

import dataclasses
from dataclasses import dataclass, field

import torch

from fastdistill import NoiseSchedule, match_table, output_match


@dataclass(frozen=True, eq=False)
class Levels(NoiseSchedule):
    """Some timesteps of a schedule: draws and predictions are numbered by them, models are given ``at``."""

    at: torch.Tensor = field(default=None)

    @property
    def times(self):
        return self.at.double()


@dataclass(frozen=True)
class ProgressiveDistillation:
    """steps: of the student; the teacher makes twice as many, trailing as in diffusers. A divisor of T / 2."""

    steps: int

    def describe(self):  # a part of the run's identity: a run of other settings is not continued
        return dataclasses.asdict(self)

    def bind(self, setting):
        return Bound(self.steps, setting)


class Bound:
    metric_names = ("loss",)
    trained = ()  # modules that are trained beside the student

    def __init__(self, steps, setting):
        T, alphas = len(setting.schedule), setting.schedule.alphas_cumprod
        if T % (2 * steps):
            raise ValueError(f"steps: expected a divisor of {T // 2}, got {steps}")
        stride = T // (2 * steps)
        ends = torch.arange(T - 1, -1, -stride).flip(0)  # of the teacher's steps
        levels = [Levels(alphas[at], at=at) for at in (ends[1::2], ends[0::2])]
        # The same models and data, at the timesteps where the first and the second of two steps begin.
        self.settings = [dataclasses.replace(setting, schedule=level) for level in levels]
        kind, device = setting.prediction_type, setting.device
        self.tables = [level.coefficients(kind).to(device) for level in levels]
        clean = torch.tensor([1.0, 0.0], device=device)
        self.end = torch.cat([clean[None], self.tables[0][:-1, :2]])  # [steps, 2]: signal and noise after both
        self.match = match_table(
            levels[0].coefficients(kind), teacher=levels[0].coefficients("sample"), weights="truncated_snr"
        ).to(device)
        never = torch.zeros(steps, dtype=torch.int64)  # no latent is shown with another prompt
        self.batches = self.settings[0].batches(never, null_probability=0.1)
        self.prepare, self.close = self.batches.prepare, self.batches.close

    def __call__(self, counter):
        return self.loss(self.draw(counter), counter)

    def draw(self, counter):  # with draw and loss apart, micro-batches work
        return self.batches(counter)

    def loss(self, draw, counter):
        target = self.target(draw)
        student = self.settings[0].predict(self.settings[0].student, draw.x_t, draw.timestep, draw.prompt)
        scale = self.settings[0].grad_scale
        loss = output_match(student, target, draw.timestep, self.match, x_t=draw.x_t, grad_scale=scale).loss
        return loss, [loss.detach()]

    @torch.no_grad()
    def target(self, draw):
        """The x_0 with which one step of the student arrives where two of the teacher's do."""
        shape = (-1, *[1] * (draw.x_t.ndim - 1))
        rows = [table[draw.timestep].T.reshape(4, *draw.timestep.shape) for table in self.tables]
        begin, middle = ([column.reshape(shape) for column in row] for row in rows)
        end = [column.reshape(shape) for column in self.end[draw.timestep].T]
        x = z = draw.x_t.float()
        for setting, (a, b, p, q), (a_next, b_next, *_) in zip(
            self.settings, (begin, middle), (middle, end), strict=True
        ):
            prediction = setting.predict(setting.teacher, x.to(draw.x_t.dtype), draw.timestep, draw.prompt).float()
            prediction = prediction[:, : x.shape[1]]  # without a learned variance
            x_0, noise = (q * x - b * prediction, a * prediction - p * x)
            x = (a_next * x_0 + b_next * noise) / (a * q - b * p)
        ratio = end[1] / begin[1]
        return ((x - ratio * z) / (end[0] - ratio * begin[0])).to(draw.x_t.dtype)
