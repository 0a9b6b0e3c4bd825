# SPDX-License-Identifier: Apache-2.0
"""States that a guided sampler visits, as training data: the student is trained on the inputs that it gets in sampling
(adapter guidance distillation, arXiv 2503.07274)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdistill.data import values
from fastdistill.data.encoded import rows_of
from fastdistill.data.fingerprint import sha256_of_tensors, up_to_rounding
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import TensorSpec
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.shards import RowWriter
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Function, Guidance
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.diffusion.schedule import PredictionType
from fastdistill.errors import InputError, described
from fastdistill.models.calling import Call, Predictor
from fastdistill.models.weights import weights_hash
from fastdistill.ops import _check


@dataclass(frozen=True, eq=False)
class TrajectoryCache(LatentCache):
    """States of a sampler, written by ``generate_trajectory_cache``. ``latents`` [N, *S]: the states at which the
    sampler calls its model; ``step`` [N] int64: the step of each. The required ``fingerprint`` contains the schedule
    and the grid of the sampler.

    Raises:
        InputError: what ``LatentCache`` refuses; invalid steps.
    """

    step: Tensor | None = None

    kind: ClassVar[str] = "trajectory_cache"
    columns: ClassVar[tuple[str, ...]] = ("step",)

    def __post_init__(self) -> None:
        super().__post_init__()
        step = self.step
        wanted = isinstance(step, Tensor) and step.dtype == torch.int64 and tuple(step.shape) == (len(self),)
        if not wanted or int(step.min()) < 0:  # type: ignore[union-attr]
            got = f"{step.dtype} {tuple(step.shape)}" if isinstance(step, Tensor) else type(step).__name__
            raise InputError.of("step", f"torch.int64 ({len(self)},), from 0", got)
        if not {"guidance", "grid"} <= self.fingerprint.keys():
            raise InputError.of(
                "fingerprint", "guidance and grid of the sampler", ", ".join(self.fingerprint) or "none"
            )


def generate_trajectory_cache(
    path: str | Path,
    teacher: nn.Module,
    prompts: PromptBank,
    prompt_index: Tensor,
    row_shape: Sequence[int],
    grid: Grid,
    guidance: Guidance | float | str,
    *,
    prediction_type: PredictionType = "epsilon",
    clip_sample: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    images_per_shard: int = 64,
    batch: int = 64,
    call: Call | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes the states of one trajectory for each of ``prompt_index`` [N] to the directory ``path``, or continues an
    unfinished directory: N len(grid) rows. Rows of a trajectory are consecutive; the first one is pure noise.

    Row r depends only on its number, its prompt and the arguments. Processes that make the same call share its shards.

    Args:
        teacher: in eval mode. prompts: the bank, the null prompt last. row_shape: shape of a latent, [*S].
        grid, guidance, prediction_type, clip_sample: see ``diffusion.guided.sample``; the method is DDIM.
        seed: of the initial noise. dtype: of the stored states. images_per_shard: trajectories per file; an
            interruption loses at most one file. batch: trajectories at once. call: how the teacher is called.
        progress: called with (trajectories done, N) at the start and after each shard.

    Raises:
        InputError: a grid or schedule that ``sample`` refuses (before anything is written); states that are not finite.
        StorageError: the directory contains other data, or cannot be written.
    """
    schedule = Guidance.parse(guidance)
    if not isinstance(grid, Grid):
        raise InputError.of("grid", "a Grid", described(grid))
    schedule.passes(grid)
    _check.tensors(prompt_index=prompt_index)
    LatentCache(torch.zeros(len(prompt_index), 1), prompt_index).check_prompts(len(prompts))
    _check.whole(batch, "batch", "at least 1")
    _check.whole(images_per_shard, "images_per_shard", "at least 1")
    values.require_dtype(dtype, "dtype")
    device, steps, count = next(teacher.parameters()).device, len(grid), len(prompt_index)
    index, predict = prompt_index.cpu(), Predictor(teacher, call)
    null = {name: rows[0] for name, rows in rows_of(prompts.banks, slice(-1, None), device).items()}
    report = progress or (lambda done, total: None)

    def states(numbers: Tensor) -> Tensor:
        """[b, steps, *S]"""
        own = numbers.to(device)
        noise = initial_noise(seed, own, tuple(row_shape))
        found = [noise]
        rows = rows_of(prompts.banks, index[numbers], device)
        told: dict[str, Any] = {"prediction_type": prediction_type, "clip_sample": clip_sample, "rows": own}
        told["callback"] = lambda _index, _time, state: found.append(state)
        sample(
            lambda x, time, **banks: predict(x, time, banks),
            noise,
            rows,
            null,
            grid,
            guidance=schedule,
            seed=seed,
            **told,
        )
        return torch.stack(found[:steps], 1)

    made_from = {
        "teacher": weights_hash(teacher),
        "prompts": prompts.identity,
        "guidance": schedule_text(schedule),
        "grid": grid_text(grid),
        "prediction_type": prediction_type,
        "clip_sample": clip_sample,
        "seed": seed,
        "prompt_index": sha256_of_tensors({"prompt_index": index}),
    }
    with RowWriter(
        path,
        kind=TrajectoryCache.kind,
        fingerprint=made_from,
        rows=count * steps,
        tensors={
            "latents": TensorSpec(tuple(row_shape), dtype),
            "prompt_index": TensorSpec((), torch.int64),
            "step": TensorSpec((), torch.int64),
        },
        rows_per_shard=images_per_shard * steps,
    ) as writer:
        report(writer.rows_done // steps, count)
        for span in writer.claims(lambda: report(writer.rows_done // steps, count)):
            numbers = torch.arange(span.start // steps, span.stop // steps, device="cpu")
            with torch.no_grad():
                made = torch.cat([states(part).cpu() for part in torch.split(numbers, batch)]).flatten(0, 1)
            if (row := values.misfit(made, dtype)) is not None:
                rule = f"states that are finite as {dtype}"
                raise InputError.of("teacher", rule, f"others at step {row % steps} of trajectory {row // steps}")
            step = torch.arange(steps, device="cpu").repeat(len(numbers))
            own = index[numbers].repeat_interleave(steps)
            writer.write(span, {"latents": made.to(dtype), "prompt_index": own, "step": step})
            report(writer.rows_done // steps, count)


def schedule_text(schedule: Guidance) -> Any:
    """A schedule in the fingerprints of what is made with it: its text, of a function its values."""
    if not isinstance(schedule, Function):
        return str(schedule)
    levels = torch.linspace(0, 1, 101) if schedule.by != "sigma" else torch.logspace(-3, 3, 101)
    return up_to_rounding(schedule.weights_at(levels.double()))


def grid_text(grid: Grid | str) -> Any:
    """The same of a grid: its text, or its levels."""
    if isinstance(grid, str):
        return grid
    return grid.text or up_to_rounding(torch.cat([grid.signal, grid.noise, grid.times]))
