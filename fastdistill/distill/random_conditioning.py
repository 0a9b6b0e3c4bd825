# SPDX-License-Identifier: Apache-2.0
"""Random conditioning: image-free distillation from few latents and many prompts (arXiv 2504.02011).

A latent made for one prompt is noised and shown with another one, drawn from the whole pool with probability p(t): at
large t the noised latent says little about its prompt, so the teacher's answer for the other prompt is a lesson too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdistill.data.fingerprint import up_to_rounding
from fastdistill.diffusion.conditioning import replacement_probability, thresholds
from fastdistill.diffusion.matching import GAMMA, LossWeighting
from fastdistill.distill.knowledge import Knowledge, Weights
from fastdistill.distill.objective import Setting
from fastdistill.ops import Draw
from fastdistill.ops.feature_match import Distance
from fastdistill.train.config import validated


@dataclass(frozen=True)
class RandomConditioning:
    """The objective's settings, checked where they are used; the defaults are the paper's.

    probability: name of p(t) (``fastdistill.diffusion.conditioning``) or a function of t/T; its ``parameters`` by name.
        ``"const"`` with ``{"value": 0.0}`` is plain distillation on the latents' own prompts.
    null_probability: how often the null prompt replaces whichever was chosen.
    weights: of output, feature and task loss. feature_distance: the plain mean square, each tap's normalized by the
        teacher feature's, Huber's or the cosine's (``fastdistill.feature_match``, whose eps and delta are the
        defaults). loss_weighting: of the output and the task loss at each timestep (``fastdistill.loss_weights``), with
        min_snr_gamma. taps: pairs (teacher module, student module), as ``make_student`` returns them.
    """

    probability: str | Callable[[float], float] = "exp"
    parameters: dict[str, float] = field(default_factory=dict)
    null_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    weights: Weights = Weights()
    feature_distance: Distance = "mse"
    taps: tuple[tuple[str, str], ...] = ()
    with_replacement: bool = False
    loss_weighting: LossWeighting = "uniform"
    min_snr_gamma: Annotated[float, Field(gt=0)] = GAMMA

    def p(self, T: int | Tensor) -> Tensor:
        """[T] float64: the probability of a random prompt at each timestep."""
        return replacement_probability(self.probability, T, **self.parameters)

    def bind(self, setting: Setting) -> BoundRandomConditioning:
        return BoundRandomConditioning(validated(self, "objective"), setting)

    def describe(self) -> dict[str, object]:
        config = validated(self, "objective")
        if isinstance(config.probability, str):
            return dataclasses.asdict(config)
        fields = dataclasses.asdict(dataclasses.replace(config, probability="a function"))
        return fields | {"probability": up_to_rounding(config.p(1000))}


class BoundRandomConditioning:
    """Draws a batch by counter and compares teacher and student on it."""

    def __init__(
        self, config: RandomConditioning, setting: Setting, coefficients: Tensor | None = None, **guided: Any
    ) -> None:
        self._weights = config.weights
        self._knowledge = Knowledge(
            setting,
            config.taps,
            config.weights,
            config.feature_distance,
            min_snr_gamma=config.min_snr_gamma,
            **{"loss_weighting": config.loss_weighting} | guided,
        )
        self.whole = "the normalized distance of features" if config.feature_distance == "normalized_mse" else ""
        self.metric_names, self.tapped = self._knowledge.metric_names, self._knowledge.tapped
        self.trained: tuple[nn.Module, ...] = self._knowledge.trained
        self._batches = setting.batches(
            thresholds(config.p(setting.schedule.clock)),
            coefficients,
            null_probability=config.null_probability,
            with_replacement=config.with_replacement,
            task=config.weights.task > 0,
        )

    def prepare(self, seed: int, step: int) -> None:
        self._knowledge.attach()
        self._batches.prepare(seed, step)

    def close(self) -> None:
        self._knowledge.close()
        self._batches.close()

    def __call__(self, counter: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.loss(self.draw(counter), counter)

    @torch.no_grad()
    def draw(self, counter: Tensor) -> Draw[Any]:
        return self._batches(counter)

    def loss(self, draw: Draw[Any], counter: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self._knowledge(draw, self._batches.task(draw, counter) if self._weights.task else None)
