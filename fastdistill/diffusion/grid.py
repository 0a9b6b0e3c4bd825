# SPDX-License-Identifier: Apache-2.0
"""The noise levels that a sampler visits."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdistill.diffusion.flow import FlowSchedule, mu_of
from fastdistill.diffusion.schedule import NoiseSchedule, PredictionType, Schedule, flow_matching
from fastdistill.errors import InputError, described
from fastdistill.ops import _check

_NUMBER = r"\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?"
_FORM = re.compile(rf"(trailing|karras|flow):(\d+)(?:@({_NUMBER})(?:\.\.({_NUMBER}))?)?", re.IGNORECASE)
_FORMS = "trailing:20, karras:30, karras:30@30..0.09, flow:28 or flow:28@3 (its shift)"


@dataclass(frozen=True, eq=False)
class Grid:
    """The n steps of a sampler between n + 1 levels x = signal x_0 + noise eps, from the noise to the data.

    Args:
        signal, noise: [n + 1]; sigma = noise / signal never rises from level to level. The first
            signal may be 0 (sigma is infinite there); the last level is (1, 0), or where a scheduler ends.
        times: [n], what the model is given at each step.
        clock: [n] in [0, 1], the time as a share of the training timesteps (for rectified flow: sigma).
        text: the text from which ``parse`` makes this grid; empty if there is none.

    All are float64 on the CPU.

    Raises:
        InputError: levels that do not form such a grid.
    """

    signal: Tensor
    noise: Tensor
    times: Tensor
    clock: Tensor
    text: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name in ("signal", "noise", "times", "clock"):
            value = getattr(self, name)
            _check.valued(**{name: value})
            object.__setattr__(self, name, value.detach().to("cpu", torch.float64))
        steps = self.times.numel()
        _check.whole(steps, "times", "at least 1 step")
        for name, size in (("signal", steps + 1), ("noise", steps + 1), ("times", steps), ("clock", steps)):
            value = getattr(self, name)
            _check.shape(value, name, (size,), f"one value per {'level' if size > steps else 'step'}, [{size}]")
            _holds(value.isfinite(), value, name, "finite values")
        signal, noise = self.signal, self.noise
        first = torch.arange(steps + 1, device="cpu") == 0
        last = torch.arange(steps + 1, device="cpu") == steps
        _holds((signal > 0) | first & (signal == 0), signal, "signal", "values > 0 (the first may be 0)")
        _holds((noise > 0) | last & (noise == 0), noise, "noise", "values > 0 (the last may be 0)")
        _holds(self.sigma.diff() <= 0, self.sigma[1:], "noise", "noise / signal that never rises from level to level")

    def __len__(self) -> int:
        return len(self.times)

    def __str__(self) -> str:
        return self.text or f"{len(self)} steps from sigma {self.sigma[0]:.6g} to {self.sigma[-1]:.6g}"

    @property
    def sigma(self) -> Tensor:
        """[n + 1] float64, noise / signal: the levels of a variance-exploding process."""
        return self.noise / self.signal

    def model_times(self, device: torch.device | str) -> Tensor:
        """``times`` on a device: int64 if all of them are whole, else float32."""
        whole = bool((self.times == self.times.round()).all())
        return self.times.to(device, torch.int64 if whole else torch.float32)

    @classmethod
    def trailing(cls, schedule: Schedule, steps: int, first: int | None = None) -> Grid:
        """Evenly spaced timesteps from the last of training (Lin et al. 2305.08891, table 2), as those of ``ddim``;
        from timestep ``first`` where one is given."""
        T = len(_schedule(schedule))
        if first is None:
            return _at(schedule, trailing_timesteps(T, steps), f"trailing:{steps}")
        is_one = isinstance(first, int) and not isinstance(first, bool) and 0 <= first < T
        _check.require(is_one, "first", f"a timestep of the schedule, 0 to {T - 1}", described(first))
        return _at(schedule, trailing_timesteps(first + 1, steps), "")

    @classmethod
    def karras(
        cls,
        schedule: Schedule,
        steps: int,
        sigma_max: float | None = None,
        sigma_min: float | None = None,
        rho: float = 7.0,
    ) -> Grid:
        """sigma_i = (max^(1/rho) + i / (n - 1) (min^(1/rho) - max^(1/rho)))^rho (Karras et al. 2206.00364, eq. 5).

        Each sigma is moved to the timestep with the nearest logarithm of sigma. If several fall on the same timestep,
        they become one step, so there may be fewer than n: see ``len`` of the grid.

        Args:
            sigma_max, sigma_min: of the first and the last step; None: the largest finite sigma of the schedule, and
                its smallest above 0.
        """
        sigmas = _schedule(schedule).noise / schedule.signal
        usable = ((sigmas > 0) & sigmas.isfinite()).nonzero().flatten()
        _check.require(len(usable) > 0, "schedule", "noise levels that are finite and above 0", sigmas.tolist()[:4])
        _check.whole(steps, "steps", "at least 1 step")
        logs = sigmas[usable].log()
        low, high = float(sigmas[usable].min()), float(sigmas[usable].max())
        first = _sigma(high if sigma_max is None else sigma_max, "sigma_max", low, high)
        last = _sigma(low if sigma_min is None else sigma_min, "sigma_min", low, high)
        _check.require(last < first or steps == 1, "sigma_min", f"less than sigma_max ({first:.6g})", last)
        if not math.isfinite(_check.real(rho, "rho")) or rho <= 0:
            raise InputError.of("rho", "a finite number > 0", rho)
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
        wanted = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
        nearest = usable[(wanted.log()[:, None] - logs).abs().argmin(1)].tolist()
        text = f"karras:{steps}"
        if sigma_max is not None or sigma_min is not None:
            text += f"@{first!r}..{last!r}"
        return _at(schedule, list(dict.fromkeys(nearest)), text if rho == 7 else "")

    @classmethod
    def flow(cls, steps: int, shift: float = 1.0, factor: float = 1000.0) -> Grid:
        """Rectified flow from sigma = 1 to 1 / n in even steps, shifted, as pipelines of Flux have it.

        Args:
            shift: sigma -> shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2403.03206, eq. 23).
            factor: models are given sigma times this.
        """
        _check.whole(steps, "steps", "at least 1 step")
        for name, value in (("shift", shift), ("factor", factor)):
            if not 0 < _check.real(value, name) < math.inf:
                raise InputError.of(name, "a finite number > 0", value)
        s = torch.arange(steps, 0, -1, dtype=torch.float64, device="cpu") / steps
        text = f"flow:{steps}" if shift == 1 else f"flow:{steps}@{float(shift)!r}"
        return _flow(shift * s / (1 + (shift - 1) * s), factor, text if factor == 1000 else "")

    @classmethod
    def of(cls, scheduler: Any, steps: int, tokens: int | None = None) -> Grid:
        """The levels that a scheduler of diffusers visits, with all its settings; ``tokens`` of an image if it has a
        dynamic shift.

        Raises:
            InputError: a scheduler that evaluates the model between its levels or twice at one (Heun, PNDM), whose
                models take no timesteps, or whose steps end at another level than that of the next timestep (DDIM
                where the number of timesteps is no multiple of ``steps``).
        """
        kind, config = type(scheduler).__name__, getattr(scheduler, "config", None)
        if not isinstance(config, Mapping) or not hasattr(scheduler, "set_timesteps"):
            raise InputError.of("scheduler", "a scheduler of diffusers", described(scheduler))
        _check.whole(steps, "steps", "at least 1 step")
        flow = flow_matching(kind, config)
        if config.get("invert_sigmas") or getattr(scheduler, "order", 1) != 1:
            raise InputError.of("scheduler", "one that evaluates the model once per step, from noise to data", kind)
        if not flow:
            NoiseSchedule.from_diffusers(scheduler)  # refuses models that take no timesteps
        scheduler = copy.deepcopy(scheduler)
        mu = mu_of(scheduler, tokens)
        scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
        times = scheduler.timesteps.to("cpu", torch.float64)
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None:
            return _of_table(scheduler, kind, times, steps)
        sigmas = torch.as_tensor(sigmas).to("cpu", torch.float64)
        if len(sigmas) != len(times) + 1:
            raise InputError.of("scheduler", "one level per timestep and a last one", f"{kind} with {len(sigmas)}")
        T = int(config["num_train_timesteps"])
        if flow:
            return cls(1 - sigmas, sigmas, times, sigmas[:-1])
        return cls((1 + sigmas**2).rsqrt(), sigmas * (1 + sigmas**2).rsqrt(), times, times / T)

    @classmethod
    def visited(cls, scheduler: Any) -> Grid:
        """The levels at which a scheduler of diffusers, whose timesteps are set, evaluates the model, and the data.

        They follow from the timesteps that the model gets. Therefore schedulers are possible that evaluate the model
        between their levels or twice at one level (Heun, PNDM), which ``of`` refuses: guidance has a weight for each
        evaluation. Between the training timesteps the logarithm of sigma is interpolated linearly.

        Raises:
            InputError: a scheduler without timesteps, or whose models take no timesteps.
        """
        kind, config = type(scheduler).__name__, getattr(scheduler, "config", None)
        times = getattr(scheduler, "timesteps", None)
        if not isinstance(config, Mapping) or times is None or getattr(scheduler, "num_inference_steps", 0) is None:
            raise InputError.of("scheduler", "a scheduler of diffusers whose timesteps are set", described(scheduler))
        T = int(config["num_train_timesteps"])
        levels = (
            FlowSchedule(T, factor=float(T)) if flow_matching(kind, config) else NoiseSchedule.from_diffusers(scheduler)
        )
        return cls.at(levels, torch.as_tensor(times))

    @classmethod
    def at(cls, schedule: Schedule, times: Tensor) -> Grid:
        """The levels at these times [n], given as the model gets them, and the data. Between the timesteps of a
        ``NoiseSchedule`` the logarithm of sigma is interpolated linearly."""
        times = times.to("cpu", torch.float64)
        if isinstance(_schedule(schedule), FlowSchedule):
            noise = times / schedule.factor  # type: ignore[attr-defined]
            return cls(_ended(1 - noise, 1.0), _ended(noise, 0.0), times, noise)
        known = (schedule.noise / schedule.signal).log()
        below = times.floor().clamp(0, len(known) - 1).long()
        above = (below + 1).clamp(max=len(known) - 1)
        part = (times - below).clamp(0, 1)
        sigma = torch.where(part > 0, torch.lerp(known[below], known[above], part), known[below]).exp()
        signal = (1 + sigma**2).rsqrt()
        noise = torch.where(sigma.isfinite(), sigma * signal, 1.0)
        return cls(_ended(signal, 1.0), _ended(noise, 0.0), times, times / len(schedule))

    @classmethod
    def parse(cls, text: str, schedule: Schedule | None = None) -> Grid:
        """The grid of a text: ``trailing:20``, ``karras:30``, ``karras:30@30..0.09`` (sigma of the first and the last
        step), ``flow:28``, ``flow:28@3`` (shift). The first two kinds need a schedule."""
        if not isinstance(text, str):
            raise InputError.of("grid", f"a text such as {_FORMS}", described(text))
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise InputError.of("grid", _FORMS, repr(text))
        kind, steps, first, last = found[1].lower(), int(found[2]), found[3], found[4]
        if first and (kind == "trailing" or (kind == "karras") != bool(last)):
            raise InputError.of("grid", _FORMS, repr(text))
        if kind == "flow":
            return cls.flow(steps, float(first or 1))
        if schedule is None:
            raise InputError.of("schedule", f"the schedule whose timesteps {text!r} takes", None)
        if kind == "trailing":
            return cls.trailing(schedule, steps)
        ends = (float(first), float(last)) if first and last else ()
        return cls.karras(schedule, steps, *ends)


@dataclass(frozen=True, eq=False)
class GridSchedule(Schedule):
    """The levels at which a grid's steps start as those of training, of models that were trained on ``schedule``.

    Raises:
        InputError: levels of a process other than the schedule's.
    """

    grid: Grid
    schedule: Schedule

    def __post_init__(self) -> None:
        _schedule(self.schedule)
        signal, noise = self.signal, self.noise
        sums = signal**2 + noise**2 if isinstance(self.schedule, NoiseSchedule) else signal + noise
        rule = "signal^2 + noise^2" if isinstance(self.schedule, NoiseSchedule) else "signal + noise"
        _holds((sums - 1).abs() < 1e-5, sums, "grid", f"levels with {rule} = 1, as those of the schedule")

    @property
    def prediction_types(self) -> tuple[PredictionType, ...]:  # type: ignore[override] # of each one its schedule's
        return self.schedule.prediction_types

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def signal(self) -> Tensor:
        return self.grid.signal[:-1]

    @property
    def noise(self) -> Tensor:
        return self.grid.noise[:-1]

    @property
    def clock(self) -> Tensor:
        return self.grid.clock

    @property
    def times(self) -> Tensor:
        return self.grid.times

    def to_config(self) -> dict[str, Any]:
        return {"name": "grid", "grid": str(self.grid), "schedule": self.schedule.to_config()}


def trailing_timesteps(T: int, steps: int) -> list[int]:
    """``steps`` evenly spaced decreasing timesteps that start at T - 1 ("trailing", Lin et al. 2305.08891, table 2).

    Sampling starts from pure noise, so the first timestep should be the last training timestep; with "leading" spacing
    it is an earlier one.
    """
    if not isinstance(steps, int) or not 1 <= steps <= T:
        raise InputError.of("steps", f"1 to {T}, the timesteps of the schedule", described(steps))
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def _holds(condition: Tensor, values: Tensor, argument: str, rule: str) -> None:
    """InputError for the first value that breaks a rule."""
    for index, (holds, value) in enumerate(zip(condition.tolist(), values.tolist(), strict=True)):
        _check.require(holds, argument, rule, f"{value} at {index}")


def _schedule(schedule: Any) -> Schedule:
    if not isinstance(schedule, Schedule):
        raise InputError.of("schedule", "a NoiseSchedule or a FlowSchedule", described(schedule))
    return schedule


def _sigma(value: Any, argument: str, low: float, high: float) -> float:
    sigma = _check.real(value, argument)
    if not low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6):  # tolerance for the rounding of a float32 table
        raise InputError.of(argument, f"a sigma of the schedule, {low:.6g} to {high:.6g}", sigma)
    return sigma


def _at(schedule: Schedule, rows: list[int], text: str) -> Grid:
    """The grid at these rows of a schedule's tables, ending at the data."""
    index = torch.tensor(rows, device="cpu")
    times = index.double() if schedule.times is None else schedule.times[index]
    signal, noise = (_ended(table[index], end) for table, end in ((schedule.signal, 1.0), (schedule.noise, 0.0)))
    return Grid(signal, noise, times, schedule.clock[index], text)


def _ended(levels: Tensor, end: float) -> Tensor:
    return torch.cat([levels, levels.new_tensor([end])])


def _flow(sigmas: Tensor, factor: float, text: str) -> Grid:
    return Grid(_ended(1 - sigmas, 1.0), _ended(sigmas, 0.0), sigmas * factor, sigmas, text)


def _of_table(scheduler: Any, kind: str, times: Tensor, steps: int) -> Grid:
    """For schedulers that step from alphas_cumprod[t] to alphas_cumprod[t - T // steps] or to the next timestep."""
    abar = NoiseSchedule.from_diffusers(scheduler).alphas_cumprod
    rows = [int(t) for t in times]
    stride = scheduler.config["num_train_timesteps"] // steps
    if kind not in ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler"):
        raise InputError.of("scheduler", "one of DDIM, DDPM, LCM, or with sigmas", kind)
    if rows[0] >= len(abar) or rows[-1] < 0:
        raise InputError.of("steps", f"timesteps from {len(abar) - 1} to 0", f"{rows[0]} to {rows[-1]} ({steps} steps)")
    jumps = any(a - b != stride for a, b in itertools.pairwise(rows)) or rows[-1] - stride >= 0
    if kind != "LCMScheduler" and jumps:
        rule = f"a number of steps at which {kind} goes from timestep to timestep; Grid.trailing does at any"
        raise InputError.of("steps", rule, f"{steps}, timesteps {rows[:3]}... and steps of {stride}")
    levels = _ended(abar[rows], float(getattr(scheduler, "final_alpha_cumprod", 1.0)))
    T = scheduler.config["num_train_timesteps"]
    return Grid(levels.sqrt(), (1 - levels).sqrt(), times, times / T)
