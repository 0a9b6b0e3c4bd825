# SPDX-License-Identifier: Apache-2.0
"""Rolling states: noised latents of prompts that are not in the cache, from a sampler that runs during the training.

Random conditioning uses other prompts mostly at large t, where a noised latent shows little of its own image. So the
student never learns small t for prompts that are not in the cache. Here some samples of each batch are replaced by
states of sampling trajectories for random prompts. The training step computes the output of teacher and student for
them anyway, and one DDIM step with this output (Song et al. 2021, 2010.02502, eq. 12) gives the next state: this needs
no additional forward and no stored images.

    x_0 = (b x - n y) / (s b - n a),   eps = (s y - a x) / (s b - n a),   x' = s' x_0 + n' eps,   t' = t - T / steps

for a model whose input is x = s x_0 + n eps and whose output is y = a x_0 + b eps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdistill.data.encoded import rows_of
from fastdistill.distill.objective import Setting
from fastdistill.distill.regions import RegionSampler
from fastdistill.errors import InputError
from fastdistill.ops import Draw, philox
from fastdistill.ops.noise_gather import NULL
from fastdistill.ops.noise_gather.banks import listed, mapped

ROLLING = 3  # ``Draw.choice`` of a sample that is a state


@dataclass(frozen=True)
class Rolling:
    """Which samples of a batch are states of a sampler that runs during the training, and how the states advance.

    every: n replaces every n-th sample of a batch by a state; None: none. by: the model whose output advances the
    states. steps: number of sampling steps of a trajectory. groups: number of groups of states; a training step uses
    and advances one group, so consecutive states of a trajectory are this many training steps apart. clip_sample:
    limit of the magnitude of x_0, as in the sampler of the models; None: no limit. null: probability that a state is
    shown with the null prompt; it does not advance then.
    """

    every: Annotated[int, Field(ge=2)] | None = None
    by: Literal["teacher", "student"] = "teacher"
    steps: Annotated[int, Field(ge=1)] = 20
    groups: Annotated[int, Field(ge=1, le=1024)] = 8
    clip_sample: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    null: Annotated[float, Field(ge=0, le=1)] = 0.0


class RollingStates:
    """The states of one process. K is the number of states in a batch.

    state: x [groups, K, *S] float32; timestep [groups, K] int64 (below 0: the trajectory has ended); for each prompt
    bank the rows [groups, K, *P]; with random prompts by region, their row numbers [groups, K] int64.

    Raises:
        InputError: the schedule has fewer timesteps than ``steps``; the batch of a process (or of its parts) is not a
            multiple of ``every``; latents of several shapes; a task loss (a state belongs to no latent).
    """

    def __init__(self, config: Rolling, setting: Setting, *, task: bool, regions: RegionSampler | None = None) -> None:
        every, T = config.every or 0, len(setting.schedule)
        for name, size in (("batch of a process", setting.batch), ("config.micro_batch", setting.micro_batch)):
            if size is not None and size % every:
                raise InputError.of("rolling.every", f"a divisor of the {name}, {size}", every)
        if config.steps > T:
            raise InputError.of("rolling.steps", f"at most the {T} timesteps of the schedule", config.steps)
        if setting.others:
            raise InputError.of("rolling.every", "None for latents of several shapes", every)
        if task:
            raise InputError.of("weights.task", "0 with rolling states, which are of no latent", "a weight above 0")
        self.config, self.every, self._stride = config, every, T // config.steps
        device, count = setting.device, setting.batch // every
        coefficients = setting.schedule.coefficients(setting.prediction_type)
        self._coefficients = coefficients.to(device, torch.float32)
        self._first = T - self._stride  # trajectories begin at a random timestep of [first, T)
        whole = setting.global_batch or setting.batch
        begun = dataclasses.replace(
            setting,
            batch=count,
            micro_batch=None,
            global_batch=whole + whole // every,
            first_sample=whole + setting.first_sample // every,  # not the numbers of the batch's samples
            trajectory=None,
        )
        certain = torch.full((self._stride,), 2**32, dtype=torch.int64)
        self._begun = begun.batches(certain, coefficients[self._first :], null_probability=0.0, with_replacement=True)
        self._rows = torch.arange(count, device=device)
        self._numbers = begun.first_sample + self._rows
        self._regions, self._null = regions, int(config.null * 2**32)
        last = len(listed(setting.prompts)[0]) - 1
        self._null_rows = listed(rows_of(setting.prompts, slice(last, last + 1), device)) if self._null else []
        shape = (config.groups, count)
        self.x = torch.zeros(*shape, *setting.latents.shape[1:], device=device)
        self.timestep = torch.full(shape, -1, dtype=torch.int64, device=device)
        dtypes = {predictor.dtype for predictor in setting.predictors}
        dtype = dtypes.pop() if len(dtypes) == 1 else None

        def rows(bank: Any) -> Tensor:
            floating = bank.dtype.is_floating_point
            kept = dtype if dtype is not None and floating else bank.dtype
            return torch.zeros(*shape, *bank.shape[1:], dtype=kept, device=device)

        banks: Any = setting.prompts
        self.prompts: Any = mapped(rows, banks)
        self.row = None if regions is None else torch.full(shape, -1, dtype=torch.int64, device=device)

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint; dimension 1 of each is divided among the processes."""
        banks = {f"prompt.{i}": rows for i, rows in enumerate(listed(self.prompts))}
        row = {} if self.row is None else {"prompt_row": self.row}
        return {"x": self.x, "timestep": self.timestep, **banks, **row}

    def prepare(self, seed: int, step: int) -> None:
        self._begun.prepare(seed, step)

    def close(self) -> None:
        self._begun.close()

    def put(self, draw: Draw[Any], counter: Tensor) -> Draw[Any]:
        """The batch with the states of this step's group in the places of samples.

        A trajectory that has ended starts again: in the first round of the groups from the sample that it replaces, so
        that there are states of all noise levels; later from noise and a random prompt.
        """
        group = counter[1] % self.config.groups
        places = slice(None, None, self.every)
        begun = self._begun(counter)
        if self._regions is not None:
            begun = self._regions.put(begun, counter, self._numbers)
        over = _of(self.timestep, group) < 0
        early = over & (counter[1] < self.config.groups)

        def chosen(kept: Tensor, new: Tensor, drawn: Tensor) -> Tensor:
            shape = (-1, *[1] * (kept.dim() - 2))
            now = torch.where(over.view(shape), new.to(kept.dtype), _of(kept, group))
            now = torch.where(early.view(shape), drawn[places].to(kept.dtype), now)
            kept.index_copy_(0, group.view(1), now[None])
            drawn[places] = now.to(drawn.dtype)
            return now

        chosen(self.x, begun.x_t, draw.x_t)
        chosen(self.timestep, begun.timestep + self._first, draw.timestep)
        for kept, new, drawn in zip(*map(listed, (self.prompts, begun.prompt, draw.prompt)), strict=True):
            chosen(kept, new, drawn)
        draw.choice[places] = torch.where(early, draw.choice[places], ROLLING)
        draw.latent_index[places] = self._rows
        if self.row is not None:
            chosen(self.row, begun.prompt_index, draw.prompt_index)
        else:
            new = torch.where(over, begun.prompt_index, -1)
            draw.prompt_index[places] = torch.where(early, draw.prompt_index[places], new)
        if self._null:
            resting = self._resting(counter)
            for null, drawn in zip(self._null_rows, listed(draw.prompt), strict=True):
                where = resting.view(-1, *[1] * (drawn.dim() - 1))
                drawn[places] = torch.where(where, null.to(drawn.dtype), drawn[places])
            draw.choice[places] = torch.where(resting, NULL, draw.choice[places])
        return draw

    def _resting(self, counter: Tensor) -> Tensor:
        """Which states are shown with the null prompt: none of the first round."""
        zero = torch.zeros_like(counter[0])
        word = philox.words(counter[0], counter[1], self._numbers, zero, philox.CHOICE)[3]
        return (word < self._null) & (counter[1] >= self.config.groups)

    @torch.no_grad()
    def move(self, draw: Draw[Any], output: Tensor, counter: Tensor) -> None:
        """Advance the states of a batch, or of a part of it, by one step, with the output of a model for it."""
        group = counter[1] % self.config.groups
        places = slice(None, None, self.every)
        rows = draw.latent_index[places]
        x, t = (_of(kept, group).index_select(0, rows) for kept in (self.x, self.timestep))
        y = output.detach()[places, : x.shape[1]].float()
        later = t - self._stride

        def levels(timestep: Tensor) -> tuple[Tensor, ...]:
            return self._coefficients[timestep].view(-1, 4, *[1] * (x.dim() - 1)).unbind(1)

        s, n, a, b = levels(t)
        determinant = s * b - n * a
        clean = (b * x - n * y) / determinant
        noise = (s * y - a * x) / determinant
        if self.config.clip_sample is not None:
            clean = clean.clamp(-self.config.clip_sample, self.config.clip_sample)
            noise = (x - s * clean) / n
        s, n, _, _ = levels(later.clamp_min(0))
        moved = s * clean + n * noise
        if self._null:
            resting = (draw.choice[places] == NULL) & (counter[1] >= self.config.groups)  # as ``put`` has drawn it
            moved = torch.where(resting.view(-1, *[1] * (x.dim() - 1)), x, moved)
            later = torch.where(resting, t, later)
        fine = moved.flatten(1).isfinite().all(1)
        where = group.expand_as(rows), rows
        self.x.index_put_(where, torch.where(fine.view(-1, *[1] * (x.dim() - 1)), moved, 0.0))
        self.timestep.index_put_(where, torch.where(fine, later, -1))


def _of(kept: Tensor, group: Tensor) -> Tensor:
    """kept[group], [K, ...] of [groups, K, ...], without waiting for the device."""
    return kept.index_select(0, group.view(1)).squeeze(0)
