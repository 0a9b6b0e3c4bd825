# SPDX-License-Identifier: Apache-2.0
"""One training step: a pure function of the parameters and the step counter, without synchronization with the host.

    draw -> teacher -> student -> losses -> backward -> clip, AdamW, EMA -> counter + 1

Seed, step, learning rate and EMA decay are read from device memory, so the same code can be captured in a graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastdistill.distill.objective import BoundObjective
from fastdistill.errors import InputError
from fastdistill.models.sharding import sharded
from fastdistill.train import distributed, products
from fastdistill.train.ahead import TeacherAhead
from fastdistill.train.config import TrainConfig
from fastdistill.train.optimizer import AdamWEMA
from fastdistill.train.randomness import seeded
from fastdistill.train.scaling import LossScale

if TYPE_CHECKING:
    from fastdistill.train.choice import Choice


def learning_rates(config: TrainConfig) -> Tensor:
    """[steps] float32: linear warm-up, then constant or a cosine that would reach 0 one step after the last."""
    rates = []
    for step in range(config.steps):
        scale = min(1.0, (step + 1) / (config.warmup + 1))
        if config.lr_schedule == "cosine" and step >= config.warmup:
            scale = 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(config.steps - config.warmup, 1)))
        rates.append(config.lr * scale)
    return torch.tensor(rates, dtype=torch.float32, device="cpu")


def average_weights(config: TrainConfig) -> Tensor | None:
    """[steps] float32: how much of the average each step replaces, for an average of a power of time; else None.

    The decay after step t (from 1) is (1 - 1 / t)^(gamma + 1), so that step s has a weight proportional to s^gamma, and
    the standard deviation of the averaged steps is ema_width t (Karras et al. 2024, arXiv 2312.02696, section 3.1): the
    width is (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2).
    """
    if config.ema_schedule == "constant":
        return None
    low, high = 0.0, 0.5  # of 1 / (gamma + 2): the width increases with it
    for _ in range(100):
        middle = (low + high) / 2
        if middle * math.sqrt((1 - middle) / (1 + middle)) < config.ema_width:
            low = middle
        else:
            high = middle
    exponent = 1 / high - 1  # gamma + 1
    weights = [1 - (1 - 1 / t) ** exponent for t in range(1, config.steps + 1)]
    return torch.tensor(weights, dtype=torch.float32, device="cpu")


class TrainStep:
    """A call advances the student, the adapters, the optimizer, the EMA and the counter by one step. After the last
    step of the configuration the learning rate stays constant.

    ``counter`` is [2] int64 on the device, (seed, step). ``totals`` [metrics] float32 sums the metrics of the steps
    since it was last zeroed, and ``metric_names`` has their names. The last one is the norm of the gradient, without
    the steps in which it is not finite: the optimizer skips and counts them (``optimizer.skipped``). ``scaling`` is the
    loss scale of float16 weights. ``shapes`` is the number of shapes of latents; each step draws one of them. On
    several ranks (``train.distributed``) every gradient is the mean over ranks, so norm and update are the same on
    each; ``totals`` belong to each rank.

    ``parameters_by_name`` are the trained parameters, those of the student as ``student.<name>`` and those of
    ``objective.trained`` as ``trained.<i>.<name>``; ``parameters`` is the list of them.

    Raises:
        InputError: a student without trainable parameters, or with one that has no shape yet (lazy modules); a teacher
            that cannot run ahead (``config.teacher_ahead``); in the first call on several ranks, a parameter without a
            gradient.
    """

    def __init__(
        self,
        objective: BoundObjective,
        student: nn.Module,
        config: TrainConfig,
        device: torch.device,
        scaling: LossScale | None = None,
        *,
        shapes: int = 1,
    ) -> None:
        own = _trained({"student.": student})
        adapters = _trained({f"trained.{i}.": module for i, module in enumerate(objective.trained)})
        if not own:
            count = sum(1 for _ in student.parameters())
            got = f"{count} frozen ones" if count else "none at all"
            raise InputError.of("student", "a parameter to train (requires_grad)", got)
        self.objective, self.scaling, self.shapes = objective, scaling, shapes
        self._seed, self._student, self._checked = config.seed, student, distributed.size() == 1
        self.execution, self.why = "eager", ""  # what runs it, and why (``graph.runner``)
        self.choice: Choice | None = None  # what a run has measured for it
        self.stream: torch.cuda.Stream | None = None  # on which the step may be captured
        if device.type == "cuda" and config.execution in ("auto", "graph", "compiled_graph"):
            self.stream = torch.cuda.Stream(device)
        self._part, self._parts = _parts(objective, config)
        self._loss: distributed.Evaluate = objective if self._parts == 1 else objective.loss  # type: ignore[attr-defined]
        self._plain = self._evaluate = distributed.averaged(objective, student, self.stream, self._loss)
        self._compiled: distributed.Evaluate | None = None
        self.parameters_by_name = own | adapters
        self.parameters = list(self.parameters_by_name.values())
        self.lr = torch.tensor(config.lr, dtype=torch.float32, device=device)
        self.optimizer = AdamWEMA(
            [{"params": list(p.values()), "ema": p is own} for p in (own, adapters) if p],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            max_norm=config.clip,
            ema_decay=config.ema_decay,
            ema_warmup=config.ema_schedule == "constant",
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # read there at every step
        if scaling is not None:
            self.optimizer.grad_scale = scaling.value  # as torch.amp.GradScaler leaves it there
        self.counter = torch.tensor([config.seed, 0], device=device)
        self._rates = learning_rates(config).to(device)
        averages = average_weights(config)
        self._averages = None if averages is None else averages.to(device)
        self.metric_names = [*objective.metric_names, "gradient_norm"]
        self.totals = torch.zeros(len(self.metric_names), dtype=torch.float32, device=device)
        self._ahead = TeacherAhead(objective, self.counter, self._parts) if config.teacher_ahead else None
        self._number, self._first_sample = 0, distributed.rank() * (config.batch // distributed.size())

    def prepare(self, step: int) -> None:
        """The work of the host before step number ``step``, outside of a captured graph."""
        self._number = step
        self.objective.prepare(self._seed, step)
        if self._ahead is not None:
            self._ahead.prepare(step)

    def replayed(self) -> None:
        """Call after a graph has executed a step."""
        if self._ahead is not None:
            self._ahead.replayed()

    def randomness(self) -> contextlib.AbstractContextManager[None]:
        """A context for a step whose student draws random numbers itself (dropout). It seeds the generators by the step
        that was prepared, so that a resumed run draws the same. Use it outside of a captured graph."""
        return seeded(self._seed, self._number, self._first_sample, device=self.counter.device)

    def compile(self, *, backend: str = "inductor") -> None:
        """Run draw, models and losses with ``torch.compile`` from now on; code compiled before is reused."""
        if self._compiled is None:
            if self.stream is not None:  # a failed capture may have left DDP inside a backward
                self.wrap(None)
            by_onednn = backend == "inductor" and self.counter.device.type == "cpu" and products.wanted()
            options = products.options() if by_onednn else None
            self._compiled = torch.compile(self._plain, dynamic=False, backend=backend, options=options)
            if self._ahead is not None:
                self._ahead.compile(backend)
        self._evaluate = self._compiled

    def uncompile(self) -> None:
        """Run them eagerly again."""
        self._evaluate = self._plain

    def wrap(self, stream: torch.cuda.Stream | None = None) -> None:
        """Set up the averaging of gradients again, after the memory layout of weights has changed."""
        self._plain = self._evaluate = self._loss  # nothing holds what was there
        self._plain = self._evaluate = distributed.averaged(self.objective, self._student, stream, self._loss)
        self._compiled = None

    def close(self) -> None:
        """Release the process group, if any; the step cannot be called any more."""
        distributed.release(self._plain)

    def __call__(self) -> None:
        step = self.counter[1:]
        if self._ahead is not None:
            self._ahead.begin()
        metrics = self.gradients()
        if not self._checked:
            self._check_gradients()
        at = step.clamp(max=len(self._rates) - 1)
        self.lr.copy_(self._rates.index_select(0, at).squeeze(0))
        if self._averages is not None:
            self.optimizer.ema_weight.copy_(self._averages.index_select(0, at).squeeze(0))
        square_sum = self.optimizer.square_sum()
        self.optimizer.update(square_sum)
        self.optimizer.zero_grad(set_to_none=True)
        norm = square_sum.sqrt().float().nan_to_num(nan=0.0, posinf=0.0)
        if self.scaling is not None:
            norm = norm / self.scaling.value
            self.scaling.update(square_sum)
        self.totals.add_(torch.stack([*metrics, norm]))
        step.add_(1)
        if self._ahead is not None:
            self._ahead.join()

    def gradients(self) -> Sequence[Tensor]:
        """Compute the gradients of the batch; returns its metrics.

        With equal parts the mean over samples is the mean of the parts' means. So the sum of the gradients of
        loss / parts equals the gradient of the whole batch, up to the rounding of additions (in the gradients' dtype).
        """
        if self._parts == 1:
            loss, metrics = self._evaluate(self.counter)
            if self._ahead is not None:
                self._ahead.ask()
            (loss if self.scaling is None else loss * self.scaling.value).backward()
            return metrics
        draw = self.objective.draw(self.counter)  # type: ignore[attr-defined]
        total: Tensor | None = None
        for first in range(0, self._parts * self._part, self._part):
            last = first + self._part == self._parts * self._part
            with contextlib.nullcontext() if last else distributed.without_averaging(self._evaluate):
                loss, metrics = self._evaluate(draw.part(first, first + self._part), self.counter)
                loss = loss / self._parts
                (loss if self.scaling is None else loss * self.scaling.value).backward()
            means = (torch.stack(metrics) if metrics else self.totals[:0]) / self._parts
            total = means if total is None else total + means
        assert total is not None
        return total.unbind()

    def _check_gradients(self) -> None:
        """DDP needs a gradient for every parameter; a single process leaves a parameter without one unchanged."""
        self._checked = True
        named = self._student.named_parameters()
        resting = [name for name, p in named if p.requires_grad and p.grad is None]
        if resting and not sharded(self._student):
            rule = "a gradient for every parameter, or requires_grad_(False), where ranks average them"
            raise InputError.of("student", rule, f"none for {', '.join(resting)}")


def _parts(objective: BoundObjective, config: TrainConfig) -> tuple[int, int]:
    """Samples per pass through the models, and passes per step."""
    batch = config.batch // distributed.size()
    part = config.micro_batch or batch
    if batch % part:
        raise InputError.of("config.micro_batch", f"a divisor of the {batch} samples of each rank", part)
    if part < batch:
        missing = [name for name in ("draw", "loss") if not callable(getattr(objective, name, None))]
        if missing:
            rule = "an objective with draw and loss, for batches in parts (config.micro_batch)"
            raise InputError.of("objective", rule, f"{type(objective).__name__} without {' and '.join(missing)}")
        if why := getattr(objective, "whole", ""):
            rule = f"none, as the loss of a batch is not the mean of its parts' ({why})"
            raise InputError.of("config.micro_batch", rule, part)
    return part, batch // part


def _trained(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by prefix and name."""
    found = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if is_lazy(parameter):
                raise InputError.of(prefix + name, "a parameter with a shape (run one forward before)", "a lazy one")
            if parameter.requires_grad:
                found[prefix + name] = parameter
    return found
