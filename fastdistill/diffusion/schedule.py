# SPDX-License-Identifier: Apache-2.0
"""Noise schedules: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, t = 0..T-1, as tables in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fastdistill.errors import InputError, described

PredictionType = Literal["epsilon", "sample", "v_prediction"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """``alphas_cumprod`` is abar, [T] (converted to float64 on the CPU): not increasing, within [0, 1], abar_0 > 0.

    ``parameters`` are the arguments of the constructor called ``name``, from which ``from_config`` builds it again.
    """

    alphas_cumprod: Tensor
    name: str = "custom"
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if not isinstance(abar, Tensor):
            abar = torch.tensor(abar, dtype=torch.float64, device="cpu")
        if abar.is_meta:
            raise InputError.of("alphas_cumprod", "values", "a tensor on the meta device")
        abar = abar.detach().to("cpu", torch.float64)
        if abar.ndim != 1 or len(abar) == 0:
            raise InputError.of("alphas_cumprod", "one value a timestep, [T]", tuple(abar.shape))
        inside = bool(((abar >= 0) & (abar <= 1)).all())  # false for NaN
        if not inside or abar[0] == 0 or bool((abar.diff() > 0).any()):
            got = f"{abar[0]:.6g} ... {abar[-1]:.6g}"
            raise InputError.of("alphas_cumprod", "values of [0, 1], the first above 0, that never increase", got)
        object.__setattr__(self, "alphas_cumprod", abar)

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @classmethod
    def cosine(cls, T: int = 1000, max_beta: float = 0.999) -> NoiseSchedule:
        """Nichol and Dhariwal 2021 (2102.09672) eq. 17; ``squaredcos_cap_v2`` of diffusers."""

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
        """The table of a diffusers scheduler as it is (float32 values, exactly), to fit the model trained with it."""
        abar = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(abar, Tensor):
            raise InputError.of("scheduler", "a diffusers scheduler with alphas_cumprod", type(scheduler).__name__)
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

    def coefficients(self, target: PredictionType = "epsilon") -> Tensor:
        """float32 [T, 4]: x_t = c0 x_0 + c1 noise and target = c2 x_0 + c3 noise; from float64, rounded once.

        c0 = sqrt(abar), c1 = sqrt(1 - abar); (c2, c3) is (0, 1) for ``epsilon``, (1, 0) for ``sample`` and (-c1, c0)
        for ``v_prediction`` (Salimans and Ho 2022, 2202.00512, appendix D).
        """
        signal, noise = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        zero, one = torch.zeros_like(signal), torch.ones_like(signal)
        targets = {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-noise, signal)}
        return torch.stack([signal, noise, *targets[check_prediction_type(target, "target")]], dim=1).float()


def flow_coefficients(T: int = 1000, shift: float = 1.0) -> Tensor:
    """float32 [T, 4] of rectified flow, as ``NoiseSchedule.coefficients``: x_t = (1 - s) x_0 + s noise, target =
    noise - x_0.

    s = shift u / (1 + (shift - 1) u) with u = (t + 1) / T (Esser et al. 2024, 2403.03206, eq. 23): the ``sigmas`` of
    diffusers' ``FlowMatchEulerDiscreteScheduler`` in ascending order. Float64, rounded once.
    """
    if not 0 < shift < math.inf:
        raise InputError.of("shift", "a number > 0", shift)
    u = torch.arange(1, _positive(T) + 1, dtype=torch.float64, device="cpu") / T
    s = shift * u / (1 + (shift - 1) * u)
    return torch.stack([1 - s, s, -torch.ones_like(s), torch.ones_like(s)], dim=1).float()


def check_prediction_type(value: str, argument: str = "prediction_type") -> PredictionType:
    """``value`` itself; InputError unless it is one of the three."""
    if not isinstance(value, str) or value not in get_args(PredictionType):
        raise InputError.of(argument, f"one of {', '.join(get_args(PredictionType))}", described(value))
    return cast(PredictionType, value)


def _cumulate(betas: Sequence[float]) -> Tensor:
    return (1 - torch.tensor(betas, dtype=torch.float64, device="cpu")).cumprod(0)


def _custom(alphas_cumprod: Sequence[float]) -> NoiseSchedule:
    return NoiseSchedule(torch.tensor(alphas_cumprod, dtype=torch.float64, device="cpu"))


def _positive(T: int) -> int:
    if T < 1:
        raise InputError.of("T", "at least 1 timestep", T)
    return T
