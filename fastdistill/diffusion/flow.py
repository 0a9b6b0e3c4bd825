# SPDX-License-Identifier: Apache-2.0
"""Rectified flow: x_t = (1 - sigma_t) x_0 + sigma_t noise, and models that predict noise - x_0.

Liu et al. 2022 (2209.03003); shifts and densities of sigma: Esser et al. 2024 (2403.03206), of Stable Diffusion 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from statistics import NormalDist
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fastdistill.diffusion.schedule import NoiseSchedule, PredictionType, Schedule, flow_matching
from fastdistill.errors import InputError, described

Density = Literal["uniform", "logit_normal", "mode"]
_OF = {"mean": "logit_normal", "std": "logit_normal", "scale": "mode"}  # the density to which an argument belongs


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Noise levels of rectified flow as a table of T rows, each drawn as often as any other.

    The table holds quantiles of the density of sigma, so that a draw of a row is a draw from the density. ``uniform``
    has sigma = (t + 1) / T, as diffusers' schedulers; the others have the quantiles of (t + 1/2) / T.

    Args:
        T: number of rows.
        shift: sigma -> shift sigma / (1 + (shift - 1) sigma), applied after the density (2403.03206, eq. 23).
        density: ``uniform``; ``logit_normal``: logit(sigma) is normal with ``mean`` and ``std`` (eq. 19; a higher mean
            is more noise); ``mode`` with ``scale`` (eq. 20), from -1 to 2 / (pi - 2).
        mean, std, scale: parameters of the density; keep the defaults of those that it does not use.
        factor: models are given sigma times this (``num_train_timesteps`` of diffusers' schedulers).

    Raises:
        InputError: a value outside of its range, or one that the density would ignore.
    """

    T: int = 1000
    shift: float = 1.0
    density: Density = "uniform"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    factor: float = 1000.0

    prediction_types: ClassVar[tuple[PredictionType, ...]] = ("flow_prediction", "epsilon", "sample")

    def __post_init__(self) -> None:
        if not isinstance(self.T, int) or self.T < 1:
            raise InputError.of("T", "at least 1 timestep", described(self.T))
        if self.density not in get_args(Density):
            raise InputError.of("density", f"one of {', '.join(get_args(Density))}", described(self.density))
        for name in ("shift", "std", "factor", "mean", "scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError.of(name, "a finite number", described(value))
            if name in ("shift", "std", "factor") and value <= 0:
                raise InputError.of(name, "a number > 0", value)
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise InputError.of("scale", f"-1 to {2 / (math.pi - 2):.4f}, where sigma rises with t", self.scale)
        for field in fields(self):
            value, density = getattr(self, field.name), _OF.get(field.name, self.density)
            if density != self.density and value != field.default:
                rule = f"its default {field.default} where density is not {density} but {self.density}"
                raise InputError.of(field.name, rule, value)

    def __len__(self) -> int:
        return self.T

    @cached_property
    def sigmas(self) -> Tensor:
        """[T] float64, rising."""
        if self.density == "uniform":
            s = torch.arange(1, self.T + 1, dtype=torch.float64, device="cpu") / self.T
        else:
            quantile = self._logit_normal if self.density == "logit_normal" else self._mode
            values = [quantile((t + 0.5) / self.T) for t in range(self.T)]
            s = torch.tensor(values, dtype=torch.float64, device="cpu")
        return self.shift * s / (1 + (self.shift - 1) * s)

    @property
    def signal(self) -> Tensor:
        return 1 - self.sigmas

    @property
    def noise(self) -> Tensor:
        return self.sigmas

    @property
    def clock(self) -> Tensor:
        return self.sigmas

    @property
    def times(self) -> Tensor:
        return self.sigmas * self.factor

    def to_config(self) -> dict[str, Any]:
        """JSON values: the name "flow" and the arguments."""
        return {"name": "flow"} | asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """The inverse of ``to_config``; InputError for a name or argument that does not exist."""
        arguments = dict(config)
        if arguments.pop("name", None) != "flow":
            raise InputError.of("schedule name", "flow", repr(config.get("name")))
        try:
            return cls(**arguments)
        except TypeError as error:
            raise InputError(f"schedule flow: {error}") from None

    def _logit_normal(self, u: float) -> float:
        return 1 / (1 + math.exp(-(self.mean + self.std * NormalDist().inv_cdf(u))))

    def _mode(self, u: float) -> float:
        """Equation 20 in ascending order: of 1 - u."""
        return u - self.scale * (math.cos(math.pi / 2 * (1 - u)) ** 2 - u)


def flow_coefficients(T: int = 1000, shift: float = 1.0) -> Tensor:
    """Coefficients [T, 4] float32 of ``FlowSchedule(T, shift)``, in the format of ``NoiseSchedule.coefficients``.

    x_t = (1 - s) x_0 + s noise and target = noise - x_0. s are the ``sigmas`` of diffusers'
    ``FlowMatchEulerDiscreteScheduler`` in ascending order. Computed in float64 and rounded once.
    """
    return FlowSchedule(T, shift).coefficients("flow_prediction")


def dynamic_mu(
    tokens: int, *, tokens_from: int = 256, tokens_to: int = 4096, mu_from: float = 0.5, mu_to: float = 1.15
) -> float:
    """The logarithm of the shift for images of this many tokens: linear between two sizes, as Flux has it."""
    slope = (mu_to - mu_from) / (tokens_to - tokens_from)
    return mu_from + slope * (tokens - tokens_from)


def resolution_shift(tokens: int, base_tokens: int, base_shift: float = 1.0) -> float:
    """The shift at which ``tokens`` lose as much to noise as ``base_tokens`` do at ``base_shift``: base_shift
    sqrt(tokens / base_tokens) (2403.03206, eq. 23)."""
    if tokens < 1 or base_tokens < 1:
        raise InputError.of("tokens", "at least 1", min(tokens, base_tokens))
    return base_shift * math.sqrt(tokens / base_tokens)


def mu_of(scheduler: Any, tokens: int | None) -> float | None:
    """mu of a scheduler with a dynamic shift for images of ``tokens`` tokens; None for any other scheduler.

    Raises:
        InputError: there is a dynamic shift and ``tokens`` is None.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    if tokens is None:
        raise InputError.of("tokens", "the tokens of an image, by which this scheduler's dynamic shift goes", None)
    return dynamic_mu(
        tokens,
        tokens_from=config.get("base_image_seq_len", 256),
        tokens_to=config.get("max_image_seq_len", 4096),
        mu_from=config.get("base_shift", 0.5),
        mu_to=config.get("max_shift", 1.15),
    )


def schedule_of(scheduler: Any, tokens: int | None = None) -> Schedule:
    """The noise that the models of a diffusers scheduler are trained with.

    For flow matching it is a ``FlowSchedule`` with a uniform density and the scheduler's shift, which is static, or
    dynamic and then follows from ``tokens``. For other schedulers it is ``NoiseSchedule.from_diffusers``. Settings that
    only matter for sampling (Karras sigmas, ``shift_terminal``) are left to ``sample_with``.

    Raises:
        InputError: a scheduler whose noise is neither; a dynamic shift without ``tokens``.
    """
    return named_schedule_of(scheduler, tokens, "scheduler")


def named_schedule_of(scheduler: Any, tokens: int | None, argument: str) -> Schedule:
    """``schedule_of``, for errors that name this argument."""
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping) or not flow_matching(type(scheduler).__name__, config):
        return NoiseSchedule._of(scheduler, argument)
    kind = type(scheduler).__name__
    if config.get("invert_sigmas") or not (kind.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        rule = "a scheduler of rectified flow, such as FlowMatchEulerDiscreteScheduler"
        raise InputError.of(argument, rule, kind + " with invert_sigmas" * bool(config.get("invert_sigmas")))
    T, mu = int(config["num_train_timesteps"]), mu_of(scheduler, tokens)
    shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
    if mu is not None:
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return FlowSchedule(T, 1.0 if shift is None else float(shift), factor=float(T))
