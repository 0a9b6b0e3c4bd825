# SPDX-License-Identifier: Apache-2.0
"""Random conditioning: image-free distillation from few latents and many prompts (arXiv 2504.02011).

A latent made for one prompt is noised and, with probability p(t), combined with another prompt from the whole pool. At
large t the noised latent shows little of its prompt, so the teacher's output for the other prompt is a useful target.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdistill.data.buckets import Buckets
from fastdistill.data.fingerprint import up_to_rounding
from fastdistill.data.staged import Batches
from fastdistill.diffusion.conditioning import REPLACEMENT, replacement_probability, thresholds
from fastdistill.diffusion.matching import GAMMA, LossWeighting
from fastdistill.distill.knowledge import Knowledge, Weights
from fastdistill.distill.measured import MEASURED, MeasuredProbability, Measurement
from fastdistill.distill.objective import Setting
from fastdistill.distill.regions import Regions, RegionSampler
from fastdistill.distill.rolling import ROLLING, Rolling, RollingStates
from fastdistill.errors import InputError
from fastdistill.ops import Draw
from fastdistill.ops.feature_match import Distance
from fastdistill.ops.noise_gather import RANDOM
from fastdistill.train.config import validated


@dataclass(frozen=True)
class RandomConditioning:
    """Settings of random conditioning (arXiv 2504.02011), checked when they are used; the defaults are those of the
    paper.

    probability: p(t), the probability that a latent gets a random prompt at timestep t: a name
        (``fastdistill.diffusion.conditioning``) or a function of t/T. ``"const"`` with the parameters ``{"value":
        0.0}`` is plain distillation on the latents' own prompts. ``"measured"``: from how much the teacher's output
        depends on the prompt at each t, measured before the first step (``fastdistill.distill.measured``); its
        parameters are points, samples and power.
    parameters: the parameters of p(t), by name.
    null_probability: probability that the null prompt replaces the chosen one.
    weights: of output, feature and task loss.
    feature_distance: ``mse``, ``normalized_mse``, ``huber`` or ``cosine`` (``fastdistill.feature_match``, with its
        default eps and delta).
    taps: pairs (teacher module, student module), as ``make_student`` returns them.
    with_replacement: draw latents independently; otherwise each occurs once per epoch.
    loss_weighting: weights of the output and the task loss at each timestep (``fastdistill.loss_weights``).
    min_snr_gamma: gamma of the weighting ``min_snr``.
    rolling: which samples of a batch are states of a sampler that runs during the training (``Rolling``); default:
    none.
    regions: draw random prompts more often where student and teacher differ more (``Regions``); default: uniformly.
    """

    probability: str | Callable[[float], float] = "exp"
    parameters: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = field(default_factory=dict)
    null_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    weights: Weights = Weights()
    feature_distance: Distance = "mse"
    taps: tuple[tuple[str, str], ...] = ()
    with_replacement: bool = False
    loss_weighting: LossWeighting = "uniform"
    min_snr_gamma: Annotated[float, Field(gt=0)] = GAMMA
    rolling: Rolling = Rolling()
    regions: Regions = Regions()

    def p(self, T: int | Tensor) -> Tensor:
        """[T] float64: the probability of a random prompt at each timestep; InputError if it is measured in the run."""
        if self.probability == MEASURED:
            rule = "a p(t) that is known before the first step of a run"
            raise InputError.of("probability", rule, repr(MEASURED))
        if isinstance(self.probability, str) and self.probability not in REPLACEMENT:
            names = [*REPLACEMENT, MEASURED]
            near = difflib.get_close_matches(self.probability, names, n=2, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            rule = f"one of {', '.join(names)}, or a function of t/T"
            raise InputError.of("probability", rule, repr(self.probability) + hint)
        return replacement_probability(self.probability, T, **self.parameters)

    def check_regions(self, p: Tensor) -> None:
        """InputError for regions that no prompt is drawn from with this p(t) [T]."""
        if self.regions.count is not None and self.rolling.every is None and not bool(p.any()):
            rule = "None, as no prompt is drawn at random: p(t) is 0 (probability), and there are no rolling states"
            raise InputError.of("regions.count", rule, self.regions.count)

    def bind(self, setting: Setting) -> BoundRandomConditioning:
        return BoundRandomConditioning(self._validated(), setting)

    def _validated(self) -> Self:
        """Checks all fields and returns the objective; InputError also for settings of a part that is switched off."""
        config = validated(self, "objective")
        for name, switch in (("rolling", "every"), ("regions", "count")):
            part = getattr(config, name)
            if getattr(part, switch) is None and part != type(part)():
                rule = f"a number, as other fields of {name} are set, which have no effect without it"
                raise InputError.of(f"{name}.{switch}", rule, None)
        return config

    def describe(self) -> dict[str, object]:
        config = self._validated()
        if config.probability == MEASURED:
            Measurement.of(config.parameters)
        named = config if isinstance(config.probability, str) else dataclasses.replace(config, probability="a function")
        fields = dataclasses.asdict(named)
        if config.rolling.every is None:
            del fields["rolling"]
        elif not config.rolling.null:
            del fields["rolling"]["null"]
        if config.regions.count is None:
            del fields["regions"]
        return fields if named is config else fields | {"probability": up_to_rounding(config.p(1000))}


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
        self._measured: MeasuredProbability | None = None
        if config.probability == MEASURED:
            self._measured = MeasuredProbability(Measurement.of(config.parameters), setting)
            replace = self._measured.replace
        else:
            p = config.p(setting.schedule.clock)
            config.check_regions(p)
            replace = thresholds(p)
        self._make_batches = functools.partial(
            setting.batches,
            replace,
            coefficients,
            null_probability=config.null_probability,
            with_replacement=config.with_replacement,
        )
        self._batches = self._make_batches(task=config.weights.task > 0)
        self._coming: Batches | Buckets | None = None  # for a teacher that runs a step ahead
        self._regions: RegionSampler | None = None
        if config.regions.count is not None:
            if not config.weights.output:
                raise InputError.of("weights.output", "above 0, as regions go by the distance of the outputs", 0.0)
            self._regions = RegionSampler(config.regions, setting)
        self._rolling: RollingStates | None = None
        if config.rolling.every is not None:
            self._rolling = RollingStates(config.rolling, setting, task=config.weights.task > 0, regions=self._regions)

    @property
    def state(self) -> dict[str, Tensor]:
        return {} if self._rolling is None else self._rolling.state

    @property
    def common(self) -> dict[str, Tensor]:
        parts = (self._measured, self._regions)
        return {name: value for part in parts if part is not None for name, value in part.common.items()}

    @property
    def sums(self) -> dict[str, Tensor]:
        return {} if self._regions is None else self._regions.sums

    def prepare(self, seed: int, step: int) -> None:
        if self._measured is not None and self._measured.prepare(seed):
            self._batches.refresh()
        if self._regions is not None:
            self._regions.prepare(step)
        self._knowledge.attach()
        self._batches.prepare(seed, step)
        if self._rolling is not None:
            self._rolling.prepare(seed, step)

    def close(self) -> None:
        self._knowledge.close()
        self._batches.close()
        if self._measured is not None:
            self._measured.close()
        if self._rolling is not None:
            self._rolling.close()

    def __call__(self, counter: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.loss(self.draw(counter), counter)

    def begin_ahead(self) -> str | None:
        """Let ``teach`` draw into its own buffers; returns the reason if this is not possible."""
        if self._rolling is not None:
            return "the states of the next step (rolling) come out of this one"
        if self._regions is not None:
            return "the prompts of the next step (regions) may go by distances of this one"
        if not (self._weights.output or self._weights.feature):
            return "there is no loss that asks the teacher"
        if not isinstance(self._batches, Batches):
            return "there are latents of several shapes"
        if self._batches.staged:
            return "rows of banks are read ahead for the step under way alone"
        self._coming = self._make_batches()
        return None

    @property
    def taught(self) -> bool:
        return self._knowledge.taught

    @torch.no_grad()
    def teach(self, counter: Tensor) -> None:
        assert self._coming is not None
        self._knowledge.teach(self._placed(self._coming(counter)))

    def _placed(self, batch: Draw[Any]) -> Draw[Any]:
        """The batch with the timesteps for the teacher."""
        return batch

    @torch.no_grad()
    def draw(self, counter: Tensor) -> Draw[Any]:
        drawn = self._batches(counter)
        if self._regions is not None:
            drawn = self._regions.put(drawn, counter)
        return drawn if self._rolling is None else self._rolling.put(drawn, counter)

    def loss(self, draw: Draw[Any], counter: Tensor) -> tuple[Tensor, list[Tensor]]:
        task = self._batches.task(draw, counter) if self._weights.task else None
        return self._knowledge(draw, task, **self._observers(draw, counter))

    def _observers(self, draw: Draw[Any], counter: Tensor) -> dict[str, Any]:
        """Functions that get the outputs of a step, and their distances, to use them later."""
        found: dict[str, Any] = {}
        if (rolling := self._rolling) is not None:

            def move(theirs: Tensor | None, own: Tensor) -> None:
                rolling.move(draw, own if theirs is None or rolling.config.by == "student" else theirs, counter)

            found["outputs"] = move
        if (regions := self._regions) is not None:
            found["distances"] = lambda distances: regions.add(draw, distances, (RANDOM, ROLLING))
        return found
