# SPDX-License-Identifier: Apache-2.0
"""One training step: a pure function of the parameters and the step counter, with nothing read back to the host.

    draw -> teacher -> student -> losses -> backward -> clip, AdamW, EMA -> counter + 1

Seed, step, learning rate and EMA decay are read from device memory, so the same code can be captured in a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdistill.distill.objective import BoundObjective
from fastdistill.train.config import TrainConfig
from fastdistill.train.optimizer import AdamWEMA
from fastdistill.train.scaling import LossScale


def learning_rates(config: TrainConfig) -> Tensor:
    """[steps] float32: linear warm-up, then constant or a cosine that would reach 0 one step after the last."""
    rates = []
    for step in range(config.steps):
        scale = min(1.0, (step + 1) / (config.warmup + 1))
        if config.lr_schedule == "cosine" and step >= config.warmup:
            scale = 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(config.steps - config.warmup, 1)))
        rates.append(config.lr * scale)
    return torch.tensor(rates, dtype=torch.float32)


class TrainStep:
    """Calling it advances the student, the adapters, the optimizer, the EMA and the counter by one step.

    ``counter`` is [2] int64 on the device, (seed, step). ``totals`` [metrics] float32 sums the metrics of the steps
    since it was last zeroed; ``metric_names`` says what each is. The last is the norm of the gradient, left out where
    it is not finite: the optimizer skips that update and counts it (``optimizer.skipped``). ``scaling``: the loss scale
    of float16 weights.
    """

    def __init__(
        self,
        objective: BoundObjective,
        student: nn.Module,
        config: TrainConfig,
        device: torch.device,
        scaling: LossScale | None = None,
    ) -> None:
        self.objective, self.scaling = objective, scaling
        self._seed = config.seed
        self._evaluate: Callable[[Tensor], tuple[Tensor, list[Tensor]]] = objective
        own = [p for p in student.parameters() if p.requires_grad]
        adapters = [p for module in objective.trained for p in module.parameters()]
        self.parameters = own + adapters
        self.lr = torch.tensor(config.lr, device=device)
        self.optimizer = AdamWEMA(
            [{"params": own}, {"params": adapters, "ema": False}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            max_norm=config.clip,
            ema_decay=config.ema_decay,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # read there at every step
        if scaling is not None:
            self.optimizer.grad_scale = scaling.value  # as torch.amp.GradScaler leaves it there
        self.counter = torch.tensor([config.seed, 0], device=device)
        self._rates = learning_rates(config).to(device)
        self.metric_names = [*objective.metric_names, "gradient_norm"]
        self.totals = torch.zeros(len(self.metric_names), device=device)

    def prepare(self, step: int) -> None:
        """What happens on the host before step number ``step``, outside of what a graph captures."""
        self.objective.prepare(self._seed, step)

    def compile(self, *, backend: str = "inductor") -> None:
        """Run draw, models and losses through ``torch.compile`` from now on."""
        self._evaluate = torch.compile(self.objective, dynamic=False, backend=backend)

    def __call__(self) -> None:
        step = self.counter[1:]
        loss, metrics = self._evaluate(self.counter)
        (loss if self.scaling is None else loss * self.scaling.value).backward()
        self.lr.copy_(self._rates.index_select(0, step).squeeze(0))
        square_sum = self.optimizer.square_sum()
        self.optimizer.update(square_sum)
        self.optimizer.zero_grad(set_to_none=True)
        norm = square_sum.sqrt().float().nan_to_num(nan=0.0, posinf=0.0)
        if self.scaling is not None:
            norm = norm / self.scaling.value
            self.scaling.update(square_sum)
        self.totals.add_(torch.stack([*metrics, norm]))
        step.add_(1)
