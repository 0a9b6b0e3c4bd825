# SPDX-License-Identifier: Apache-2.0
"""The commands ``fastdistill canonical``: canonical images of the task's scenes, or of a run's latents."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from fastdistill.data.fingerprint import differences, listed, plain, sha256_of_json
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.schedule import PredictionType, Schedule
from fastdistill.distill.canonical import Canonical, Clarid, canonical
from fastdistill.distill.canonical_set import CanonicalSet, draw_rows, extract_canonical
from fastdistill.distill.selection import Measures, chosen, sweep
from fastdistill.documented import documented
from fastdistill.errors import InputError, StorageError
from fastdistill.files import atomic_write, located, locked, make_directory, reason
from fastdistill.models.weights import weights_hash
from fastdistill.schemas import SWEEP
from fastdistill.tasks.context import data
from fastdistill.tasks.context.measures import Judge, chroma, ink
from fastdistill.tasks.context.teacher import SCHEDULE, Kind, load_teacher, prompts
from fastdistill.train.config import Seed, validated
from fastdistill.train.devices import usable

Progress = Callable[[int, int], object]
Part = Literal["students", "same", "independent", "swapped", "clutter"]
Timestep = Annotated[int, Field(ge=1)]
Directions = Annotated[int, Field(ge=0)]
_BATCH = 20


@documented
@dataclass(frozen=True)
class Options:
    """Options that all commands ``fastdistill canonical`` have."""

    task: Literal["context"] = "context"
    """The task: digits before colored backgrounds."""
    teacher: Kind = "broad"
    """The shipped teacher: broad was trained on backgrounds of any hue, same only on the data of the classifiers."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Number of steps of the inversion, and of the decoding."""
    seed: Seed = 0
    """Seed for the choice of images and for the controls (noise, random directions)."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads."""
    device: str = "cpu"
    """Device to compute on."""
    json: bool = False
    """Print the result as JSON."""


@documented
@dataclass(frozen=True)
class SweepConfig(Options):
    """Measure several settings of canonical latents, and choose the one with the best selectivity."""

    t_e: Annotated[tuple[Timestep, ...], Field(min_length=1)] = (400, 500, 650)
    """Timesteps to which images are inverted."""
    k: Annotated[tuple[Directions, ...], Field(min_length=1)] = (0, 5, 15, 40)
    """Numbers of directions that are projected out."""
    tap: Annotated[tuple[str, ...], Field(min_length=1)] = ("down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1",
                                                            "x0")  # fmt: skip
    """Features that the directions move most: modules of the teacher, output or x0."""
    part: Part = "independent"
    """Which scenes; in independent ones the hue is independent of the digit."""
    per_class: Annotated[int, Field(ge=3)] = 6
    """Images of each digit."""
    output: str = "runs/canonical-sweep"
    """Directory for sweep.json; an interrupted call in it is continued."""


@documented
@dataclass(frozen=True)
class Setting(Options):
    """One setting of canonical latents."""

    t_e: Timestep = 400
    """Timestep to which images are inverted."""
    k: Directions = 15
    """Number of directions that are projected out; 0: none."""
    tap: str = "up_blocks.0"
    """Feature that the directions move most: a module of the teacher, output or x0."""
    guidance: str = "0"
    """Schedule of the guidance weight for the decoding (docs/guidance.md)."""
    part: Part = "students"
    """Which scenes; students: the data of the classifiers; the others are held out."""

    def clarid(self) -> Clarid:
        return Clarid(self.t_e, self.k, self.tap, self.steps, self.guidance, seed=self.seed)


@documented
@dataclass(frozen=True)
class ExtractConfig(Setting):
    """Write canonical images of some scenes of each class, or of a run's latents."""

    run: str | None = None
    """Use the teacher and the cached latents of this run file instead of the task's. Also as the first argument."""
    per_class: Annotated[int, Field(ge=1)] | None = 14
    """Images of each class or prompt; none: all."""
    output: str = "runs/canonical"
    """Directory for the results; an interrupted call in it is continued."""


@documented
@dataclass(frozen=True)
class ShowConfig(Setting):
    """Draw a scene, the same inverted and decoded, its canonical image, and the directions that were removed."""

    row: Annotated[int, Field(ge=0)] = 0
    """Row number of the scene. Also as the first argument."""
    png: str | None = "runs/canonical-show.png"
    """File of the picture; none: no picture."""


@dataclass(frozen=True, eq=False)
class Source:
    """A model with its data, prompts and noise schedule."""

    model: Any
    data: LatentCache
    prompts: PromptBank
    schedule: Schedule
    prediction_type: PredictionType | None


def source(config: Options, part: Part) -> Source:
    """The source of the task."""
    usable(config.device)
    torch.set_num_threads(config.threads)
    scenes = data.students() if part == "students" else data.held_out(part)
    made = {"task": config.task, "scenes": data.fingerprint(), "part": part}
    cache = LatentCache(scenes.images, scenes.digit, made)
    return Source(load_teacher(config.teacher).to(config.device), cache, prompts(config.device), SCHEDULE, None)


def source_of_run(file: str, config: Options, allow_code: bool = False) -> Source:
    """The source of a run file, for the first of its sizes."""
    from fastdistill.runs import RunConfig
    from fastdistill.runs.opened import opened
    from fastdistill.train.config import from_yaml

    usable(config.device)
    torch.set_num_threads(config.threads)
    run = opened(from_yaml(RunConfig, file), allow_code=allow_code)
    if run.call is not None:
        raise InputError.of("run", "a teacher that is called as its family is", f"call: {run.config.call}")
    bank, size = run.bank(load=True), run.sizes[0]
    model = run.pipeline.model(device=config.device).eval().requires_grad_(False)
    return Source(model, run.latents(size, bank), bank, run.pipeline.schedule(size), run.pipeline.prediction_type)


def run_sweep(config: SweepConfig, progress: Progress | None = None) -> dict[str, Any]:
    """The rows of all settings and the chosen row. Each row is written at once to ``sweep.json`` in the output folder.

    Raises:
        InputError: an invalid option, before anything is computed. StorageError: another process writes there, or the
            rows there belong to other images or another teacher.
    """
    config = validated(config, "canonical sweep")
    settings = [
        Clarid(t_e, k, tap, config.steps, seed=config.seed)
        for t_e in config.t_e
        for tap in config.tap
        for k in config.k
    ]
    given = source(config, config.part)
    index = draw_rows(given.data.prompt_index, config.per_class, seed=config.seed)
    made_of = plain(
        {
            "teacher": weights_hash(given.model), "data": given.data.identity, "prompts": given.prompts.identity,
            "schedule": SCHEDULE.to_config(), "rows": sha256_of_json(index.tolist()), "steps": config.steps,
            "seed": config.seed,
        }
    )  # fmt: skip
    output = located(config.output, "output")
    make_directory(output)
    with locked(output):
        known = _known(output / "sweep.json", made_of)

        def keep(row: dict[str, Any] | None, choice: Mapping[str, Any] | None = None) -> None:
            known.extend([row] if row is not None else [])
            report = {"schema": SWEEP.version, "made_of": made_of, "sweep": known, "chosen": choice}
            atomic_write(output / "sweep.json", json.dumps(report, indent=1, allow_nan=False).encode())

        rows = sweep(
            given.model, given.data.latents[index].to(config.device), given.data.prompt_index[index].to(config.device),
            given.prompts.embeddings[: len(given.prompts)], settings, schedule=given.schedule,
            null_prompt=given.prompts.null, measures=Measures(chroma, ink, Judge().digits), seed=config.seed,
            known=list(known), on_row=keep, progress=progress,
        )  # fmt: skip
        choice = chosen(rows) if any(row["k"] for row in rows) else None
        keep(None, choice)
    return {"sweep": rows, "chosen": choice}


def run_extract(config: ExtractConfig, progress: Progress | None = None, *, allow_code: bool = False) -> CanonicalSet:
    """Writes the set, or continues an interrupted one, and opens it."""
    config = validated(config, "canonical extract")
    of_run = config.run is not None
    given = source_of_run(str(config.run), config, allow_code) if of_run else source(config, config.part)
    path = located(config.output, "output")
    extract_canonical(
        path, given.model, given.data, given.prompts, config.clarid(), schedule=given.schedule,
        per_class=config.per_class, prediction_type=given.prediction_type, batch=_BATCH, rows_per_shard=_BATCH,
        progress=progress,
    )  # fmt: skip
    return CanonicalSet.open(path)


def run_show(config: ShowConfig) -> tuple[Canonical, Canonical, torch.Tensor]:
    """For one scene: the results with the directions projected out and without, and the scene itself [3, 8, 8]."""
    config = validated(config, "canonical show")
    given = source(config, config.part)
    rule = f"a scene of {config.part}, 0 to {len(given.data) - 1}"
    if config.row >= len(given.data):
        raise InputError.of("row", rule, config.row)
    at = torch.tensor([config.row])
    x = given.data.latents[at].to(config.device)
    rows = given.prompts.embeddings[given.data.prompt_index[at].to(config.device)]
    options: dict[str, Any] = {"schedule": given.schedule, "null_prompt": given.prompts.null}
    found = canonical(given.model, x, rows, config.clarid(), rows=at.to(config.device), **options)
    none = dataclasses.replace(config.clarid(), k=0)
    plain_ = canonical(given.model, found.latents, rows, none, inverted=True, **options)
    return found, plain_, x[0].cpu()


def _known(file: Path, made_of: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier call."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        SWEEP.check(before.get("schema", 1), file)
        rows, made_before = list(before["sweep"]), dict(before["made_of"])
    except FileNotFoundError:
        return []
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{file}: could not be read: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{file}: damaged, no rows of a sweep; delete it to measure them again") from error
    if changed := differences(made_of, made_before):
        raise StorageError(f"{file}: its rows were made differently ({listed(changed)}); choose another directory")
    return rows
