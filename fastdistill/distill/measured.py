# SPDX-License-Identifier: Apache-2.0
"""p(t) from how much the teacher's output depends on the prompt: ``probability="measured"`` of random conditioning.

For a latent x of the cache with its own prompt c, noise z and a random prompt c' of the pool, at noise level t:

    x_t = s x + n z,    d(t)^2 = E | x_0(T(x_t, t, c)) - x_0(T(x_t, t, c')) |^2,    p(t) = (d(t) / max d)^power

x_0(y) = (b x_t - n y) / (s b - n a) is the clean sample for an output y = a x_0 + b eps. So levels and prediction types
are compared in one unit: d is n / |s b - n a| times the distance of the outputs. If d is small, the output is
determined by the image in x_t, and x_t with a random prompt is a sample that no sampler visits. If d is large, the
output is determined by the prompt, so any latent is suitable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastdistill.diffusion.conditioning import thresholds
from fastdistill.distill.objective import Setting
from fastdistill.errors import InputError
from fastdistill.models.calling import trial
from fastdistill.ops import _check

MEASURED = "measured"
MOST = 2**16  # limit of points and of samples: all are drawn at once, before the first step
_OWN_KEY = -(2**63)  # added to the seed: these samples differ from those of the training


@dataclasses.dataclass(frozen=True)
class Measurement:
    """points: number of timesteps at which it is measured, evenly spaced. samples: number of samples at each timestep
    (the same ones). power: p(t) is the relative distance to this power."""

    points: int = 20
    samples: int = 64
    power: float = 1.0

    @classmethod
    def of(cls, parameters: Mapping[str, float]) -> Measurement:
        """From ``RandomConditioning.parameters``; InputError for unknown parameters and invalid values."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(parameters) - set(names)):
            raise InputError.of(f"p(t) {MEASURED}", f"parameters among {', '.join(names)}", ", ".join(unknown))
        counts = {}
        for name, low in (("points", 2), ("samples", 1)):
            value = parameters.get(name, getattr(cls, name))
            whole = math.isfinite(value) and low <= value == int(value) <= MOST
            _check.require(whole, f"p(t) {MEASURED}: {name}", f"a whole number, {low} to {MOST}", value)
            counts[name] = int(value)
        power = float(parameters.get("power", cls.power))
        _check.require(0 < power < math.inf, f"p(t) {MEASURED}: power", "a finite number > 0", power)
        return cls(**counts, power=power)

    def timesteps(self, T: int) -> list[int]:
        """The middles of ``points`` equal parts of 0..T - 1."""
        points = min(self.points, T)
        return [(2 * i + 1) * T // (2 * points) for i in range(points)]

    def probability(self, distance: Tensor, T: int) -> Tensor:
        """p [T] float64 from the distances at ``timesteps(T)``: linear between them, constant outside."""
        at = torch.tensor(self.timesteps(T), dtype=torch.float64, device="cpu")
        d = distance.to("cpu", torch.float64)
        largest = d.max()
        if not bool(d.isfinite().all()):
            raise InputError.of("teacher", "finite outputs for its prompts, to measure p(t)", d.tolist())
        if largest == 0:  # the teacher ignores the prompt
            return torch.zeros(T, dtype=torch.float64, device="cpu")
        t = torch.arange(T, dtype=torch.float64, device="cpu")
        right = (
            torch.searchsorted(at, t).clamp(1, len(at) - 1) if len(at) > 1 else torch.zeros_like(t, dtype=torch.int64)
        )
        left = (right - 1).clamp_min(0)
        share = ((t - at[left]) / (at[right] - at[left]).clamp_min(1.0)).clamp(0, 1)
        between = d[left] + share * (d[right] - d[left])
        return (between / largest).clamp(0, 1) ** self.power


@torch.no_grad()
def prompt_dependence(setting: Setting, measurement: Measurement, seed: int) -> Tensor:
    """d at the points, [points] float64 on the CPU. The samples depend only on the seed: latents, prompts and noise are
    drawn by counter, equal for all points. The teacher gets ``setting.micro_batch`` or ``batch`` of them at once. If
    there are latents of several shapes, those of the first shape are used."""
    device, count = setting.device, measurement.samples
    clean_and_noise = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float32, device=device)
    whole = dataclasses.replace(
        setting, batch=count, global_batch=None, first_sample=0, micro_batch=None, others=(), trajectory=None, ahead=1
    )
    counter = torch.tensor([seed + _OWN_KEY, 0], device=device)
    drawn = []
    for random in (0, 2**32):
        certain = torch.tensor([random], dtype=torch.int64, device=device)
        batches = whole.batches(certain, clean_and_noise, null_probability=0.0, with_replacement=True, target=True)
        batches.prepare(seed + _OWN_KEY, 0)
        drawn.append(batches(counter))
        batches.close()
    own, other = drawn
    levels = setting.schedule.coefficients(setting.prediction_type).double()
    part, channels = min(count, setting.micro_batch or setting.batch), own.x_t.shape[1]
    found = []
    with trial(setting.teacher):
        for t in measurement.timesteps(len(levels)):
            s, n, a, b = levels[t].tolist()
            total = torch.zeros((), dtype=torch.float64, device=device)
            for first in range(0, count, part):
                one, two = own.part(first, first + part), other.part(first, first + part)
                x_t = (s * one.x_t.float() + n * one.target.float()).to(one.x_t.dtype)
                timestep = torch.full((len(x_t),), t, dtype=torch.int64, device=device)
                answers = [setting.predict(setting.teacher, x_t, timestep, each.prompt) for each in (one, two)]
                difference = answers[0][:, :channels].double() - answers[1][:, :channels].double()
                total += difference.square().flatten(1).mean(1).sum()
            scale = math.inf if s * b == n * a else n / abs(s * b - n * a)
            found.append(scale * math.sqrt(float(total) / count))
    return torch.tensor(found, dtype=torch.float64, device="cpu")


class MeasuredProbability:
    """The table of p(t); the first step of a run measures it, and checkpoints store it.

    replace: [T] int64 on the device, as for ``noise_gather``; below 0 until it is measured.
    """

    def __init__(self, measurement: Measurement, setting: Setting) -> None:
        self.measurement, self._setting = measurement, setting
        T, device = len(setting.schedule), setting.device
        self.replace = torch.full((T,), -1, dtype=torch.int64, device=device)
        points = len(self.measurement.timesteps(T))
        self.distance = torch.full((points,), -1.0, dtype=torch.float64, device=device)
        self._known = device.type == "meta"

    @property
    def common(self) -> dict[str, Tensor]:
        return {"replace": self.replace, "prompt_dependence": self.distance}

    def prepare(self, seed: int) -> bool:
        """Measure if neither this run nor its checkpoint has done so; returns whether the table may have changed. With
        several ranks, only one measures."""
        from fastdistill.train import distributed  # imported here: it imports the interface of objectives

        if self._known:
            return False
        if int(self.replace[0]) < 0:
            distance = distributed.first(lambda: prompt_dependence(self._setting, self.measurement, seed))
            self.distance.copy_(distance)
            self.replace.copy_(thresholds(self.measurement.probability(distance, len(self.replace))))
        self._known = True
        return True

    def close(self) -> None:
        """Check the table again before the next step, because a checkpoint may have replaced it."""
        self._known = self.replace.device.type == "meta"
