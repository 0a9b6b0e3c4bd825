# SPDX-License-Identifier: Apache-2.0
"""Noise schedules: the base class, and those of DDPM and DDIM."""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fastdistill.errors import InputError, described
from fastdistill.ops import _check

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]


class Schedule(ABC):
    """Noise levels for training: x_t = signal_t x_0 + noise_t noise, t = 0..T-1, as tables in double precision.

    ``prediction_types``: what models for this noise can predict, the most common type first.
    """

    prediction_types: ClassVar[tuple[PredictionType, ...]]

    @abstractmethod
    def __len__(self) -> int:
        """T, the number of training timesteps."""

    @property
    @abstractmethod
    def signal(self) -> Tensor:
        """[T] float64."""

    @property
    @abstractmethod
    def noise(self) -> Tensor:
        """[T] float64."""

    @property
    def clock(self) -> Tensor:
        """[T] float64 in [0, 1]: the distance of each timestep from the data, the argument of p(t)."""
        return torch.arange(len(self), dtype=torch.float64, device="cpu") / len(self)

    @property
    def times(self) -> Tensor | None:
        """[T] float64: the time that the model gets for each timestep; None: the timestep itself."""
        return None

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """JSON values that describe the schedule."""

    def coefficients(self, target: PredictionType | None = None) -> Tensor:
        """Coefficients [T, 4] float32 with x_t = c0 x_0 + c1 noise and target = c2 x_0 + c3 noise.

        (c2, c3) is (0, 1) for ``epsilon``, (1, 0) for ``sample``, (-c1, c0) for ``v_prediction`` (Salimans and Ho 2022,
        2202.00512, appendix D) and (-1, 1) for ``flow_prediction``; None: the first of ``prediction_types``. Computed
        in float64 and rounded once.
        """
        kind = check_prediction_type(target or self.prediction_types[0], "target", self.prediction_types)
        return torch.stack([self.signal, self.noise, *targets(self.signal, self.noise)[kind]], dim=1).float()


@dataclass(frozen=True, eq=False)
class NoiseSchedule(Schedule):
    """The noise of DDPM and DDIM for T training timesteps: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

    Args:
        alphas_cumprod: abar, [T], converted to float64 on the CPU. Within [0, 1], never increasing, abar_0 > 0. The
            last value may be 0 (zero terminal SNR).
        name: the constructor that made the schedule; ``from_config`` calls it again.
        parameters: the arguments of that constructor.

    Raises:
        InputError: values that are no such table.
    """

    alphas_cumprod: Tensor
    name: str = "custom"
    parameters: Mapping[str, float] = field(default_factory=dict)

    prediction_types: ClassVar[tuple[PredictionType, ...]] = ("epsilon", "sample", "v_prediction")

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if not isinstance(abar, Tensor):
            try:
                abar = torch.tensor(abar, dtype=torch.float64, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                raise InputError.of("alphas_cumprod", "one value per timestep, [T]", described(abar)) from None
        _check.valued(alphas_cumprod=abar)
        abar = abar.detach().to("cpu", torch.float64)
        if abar.ndim != 1 or len(abar) == 0:
            raise InputError.of("alphas_cumprod", "one value per timestep, [T]", tuple(abar.shape))
        inside = bool(((abar >= 0) & (abar <= 1)).all())  # false for NaN
        if not inside or abar[0] == 0 or bool((abar.diff() > 0).any()):
            got = f"{abar[0]:.6g} ... {abar[-1]:.6g}"
            raise InputError.of("alphas_cumprod", "values in [0, 1] that never increase, the first above 0", got)
        object.__setattr__(self, "alphas_cumprod", abar)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def signal(self) -> Tensor:
        return self.alphas_cumprod.sqrt()

    @property
    def noise(self) -> Tensor:
        return (1 - self.alphas_cumprod).sqrt()

    @classmethod
    def cosine(cls, T: int = 1000, max_beta: float = 0.999) -> NoiseSchedule:
        """Cosine schedule (Nichol and Dhariwal 2021, 2102.09672, eq. 17); ``squaredcos_cap_v2`` in diffusers."""

        def abar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - abar((i + 1) / _positive(T)) / abar(i / T), max_beta) for i in range(_positive(T))]
        return cls(_cumulate(betas), "cosine", {"T": T, "max_beta": max_beta})

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """beta linear in t (Ho, Jain, Abbeel 2020, 2006.11239, section 4)."""
        betas = torch.linspace(beta_start, beta_end, _positive(T), dtype=torch.float64, device="cpu").tolist()
        return cls(_cumulate(betas), "linear", {"T": T, "beta_start": beta_start, "beta_end": beta_end})

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
        """sqrt(beta) linear in t, as in latent diffusion (2112.10752) and Stable Diffusion."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, _positive(T), dtype=torch.float64, device="cpu")
        return cls(
            _cumulate((roots**2).tolist()), "scaled_linear", {"T": T, "beta_start": beta_start, "beta_end": beta_end}
        )

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The ``alphas_cumprod`` of a diffusers scheduler, its float32 or float64 values exactly.

        This is the noise that a model was trained with. A schedule contains no settings for sampling: pass the
        scheduler itself to ``ddim`` to keep its timestep spacing, prediction type and clipping.

        With ``rescale_betas_zero_snr``, the Euler, DPM-Solver++ and UniPC schedulers of diffusers store 2**-24 as the
        last value, so that their sigmas stay finite. It stands for a terminal SNR of zero (Lin et al. 2305.08891) and
        is read as 0, the value of ``DDIMScheduler`` and ``DDPMScheduler``.

        Raises:
            InputError: an object without ``alphas_cumprod`` (a folder, a configuration, a scheduler of another kind of
                noise), a scheduler set up for flow matching, or one whose models do not take its timesteps
                (``timestep_type="continuous"``).
        """
        return cls._of(scheduler, "scheduler")

    @classmethod
    def _of(cls, scheduler: Any, argument: str) -> NoiseSchedule:
        """``from_diffusers``, with this argument's name in error messages."""
        kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
        rule = "a diffusers scheduler with alphas_cumprod"
        if isinstance(scheduler, (str, os.PathLike, Mapping)):
            hint = "load it first, by from_pretrained or from_config of its class such as DDPMScheduler"
            raise InputError.of(argument, rule, f"a {kind}; {hint}")
        if flow_matching(kind, config):
            raise InputError.of(argument, rule, f"{kind} for flow matching, whose schedule is schedule_of(scheduler)")
        if config.get("timestep_type") == "continuous":
            got = f'{kind} with timestep_type="continuous", whose models take the noise level in place of a timestep'
            raise InputError.of(argument, rule, got)
        abar = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(abar, Tensor):
            raise InputError.of(argument, rule, kind)
        if config.get("rescale_betas_zero_snr") and not abar.is_meta and float(abar[-1]) == 2.0**-24:
            abar = torch.cat([abar[:-1], torch.zeros_like(abar[-1:])])
        return cls(abar)

    def to_config(self) -> dict[str, Any]:
        """JSON values from which ``from_config`` makes an equal schedule: name and arguments, or all T values."""
        if self.name == "custom":
            return {"name": self.name, "alphas_cumprod": self.alphas_cumprod.tolist()}
        return {"name": self.name, **self.parameters}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The inverse of ``to_config``; InputError for a name or argument that does not exist."""
        arguments = dict(config)
        name = arguments.pop("name", None)
        makers: dict[Any, Callable[..., NoiseSchedule]] = {
            "cosine": cls.cosine,
            "linear": cls.linear,
            "scaled_linear": cls.scaled_linear,
            "custom": _custom,
        }
        if name not in makers:
            raise InputError.of("schedule name", f"one of {', '.join(makers)}", repr(name))
        try:
            return makers[name](**arguments)
        except TypeError as error:
            raise InputError(f"schedule {name}: {error}") from None


def check_prediction_type(
    value: str, argument: str = "prediction_type", among: tuple[PredictionType, ...] = get_args(PredictionType)
) -> PredictionType:
    """Returns ``value``; InputError unless it is one of these."""
    if not isinstance(value, str) or value not in among:
        raise InputError.of(argument, f"one of {', '.join(among)}", described(value))
    return value


def targets(signal: Tensor, noise: Tensor) -> dict[PredictionType, tuple[Tensor, Tensor]]:
    """(p, q) for each type of prediction p x_0 + q eps at these levels."""
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    return {
        "epsilon": (zero, one),
        "sample": (one, zero),
        "v_prediction": (-noise, signal),
        "flow_prediction": (-one, one),
    }


def flow_matching(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler of this class and configuration interpolates data and noise (rectified flow).

    Some of them have an ``alphas_cumprod`` that they do not use (``use_flow_sigmas``).
    """
    named = re.search("Flow|RF", kind) is not None or "shift" in config
    return named or bool(config.get("use_flow_sigmas")) or "flow" in str(config.get("prediction_type"))


def _cumulate(betas: Sequence[float]) -> Tensor:
    return (1 - torch.tensor(betas, dtype=torch.float64, device="cpu")).cumprod(0)


def _custom(alphas_cumprod: Sequence[float]) -> NoiseSchedule:
    return NoiseSchedule(torch.tensor(alphas_cumprod, dtype=torch.float64, device="cpu"))


def _positive(T: int) -> int:
    if not isinstance(T, int) or T < 1:
        raise InputError.of("T", "at least 1 timestep", described(T))
    return T
