# SPDX-License-Identifier: Apache-2.0
"""The canonical images of the task and the baselines' data, in a directory of sets.

``canonical``, and with the same losses: ``samples``, inverted and decoded without a projection; ``random``, without a
random direction of equal energy; ``generated``, from noise instead of an image. ``originals`` are the images
themselves with the teacher's feature; with them, ``posterior`` is the output of the teacher as a classifier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import TensorSpec
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.shards import RowWriter, load_rows
from fastdistill.diffusion.posterior import diffusion_posterior
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.distill.canonical import Clarid
from fastdistill.distill.canonical_set import CanonicalSet, draw_rows, extract_canonical
from fastdistill.distill.controls import random_directions
from fastdistill.errors import InputError
from fastdistill.files import make_directory
from fastdistill.models.weights import weights_hash
from fastdistill.tasks.context import data
from fastdistill.tasks.context.teacher import SCHEDULE, load_teacher, prompts

Name = Literal["canonical", "samples", "random", "generated", "originals", "posterior"]
NAMES: tuple[Name, ...] = get_args(Name)
CLARID = Clarid(t_e=650, k=40, tap="up_blocks.0")
PER_CLASS = 14  # images of each digit, 10 % of the data
_NEEDS: dict[str, tuple[Name, ...]] = {"random": ("canonical", "samples"), "originals": ("samples",), "posterior": ()}
DRAWS = 16  # noise draws for the teacher as a classifier
_BATCH = 20
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True, eq=False)
class Sets:
    """The results of ``make_sets``; None if not requested. posterior: [n, 10] float32 for the ``originals``."""

    canonical: CanonicalSet | None = None
    samples: CanonicalSet | None = None
    random: CanonicalSet | None = None
    generated: CanonicalSet | None = None
    originals: CanonicalSet | None = None
    posterior: Tensor | None = None

    def part(self, per_class: int) -> Sets:
        """The first ``per_class`` rows of each class, equal to ``make_sets`` with that number."""
        chosen: dict[str, Any] = {}
        for name in NAMES:
            found = getattr(self, name)
            if isinstance(found, CanonicalSet):
                part = _taken(found, _first(found.prompt_index, per_class))
                chosen[name] = dataclasses.replace(part, fingerprint={**found.fingerprint, "per_class": per_class})
        if self.posterior is not None and self.originals is not None:
            chosen["posterior"] = self.posterior[_first(self.originals.prompt_index, per_class)]
        return Sets(**chosen)


def make_sets(
    directory: str | Path,
    names: Sequence[Name] = NAMES,
    *,
    clarid: Clarid = CLARID,
    per_class: int | None = PER_CLASS,
    teacher: str = "broad",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Sets:
    """The sets in a directory; missing sets are made first, interrupted ones are continued.

    Args:
        clarid: the setting; for ``samples``, k = 0. per_class: rows of each digit; None: all.
        progress: called with the set's name, rows done and their total.

    Raises:
        StorageError: the directory has sets of another setting, teacher or rows.
    """
    for name in names:
        if name not in NAMES:
            raise InputError.of("names", f"some of {', '.join(NAMES)}", repr(name))
    wanted = [name for name in NAMES if name in names or any(name in _NEEDS.get(other, ()) for other in names)]
    show = progress or (lambda name, done, total: None)
    make_directory(place := Path(directory))
    model, bank = load_teacher(teacher).to(device), prompts(device)
    images, labels = data.students().images, data.students().digit
    scenes = LatentCache(images, labels, {"scenes": data.fingerprint()})

    def extracted(name: Name, setting: Clarid, source: LatentCache, many: int | None, **options: Any) -> CanonicalSet:
        extract_canonical(
            place / name, model, source, bank, setting, schedule=SCHEDULE, per_class=many, batch=_BATCH,
            rows_per_shard=_BATCH, progress=lambda done, total: show(name, done, total), **options,
        )  # fmt: skip
        return CanonicalSet.load(place / name)

    made: dict[Name, Any] = {}
    rows = draw_rows(labels, per_class, seed=clarid.seed)
    for name in wanted:
        if name == "canonical":
            made[name] = extracted(name, clarid, scenes, per_class)
        elif name == "samples":
            made[name] = extracted(name, dataclasses.replace(clarid, k=0), scenes, per_class)
        elif name == "random":
            latents = made["samples"].clareps  # without a projection
            directions = random_directions(latents, made["canonical"].energy, clarid.seed)
            given = LatentCache(latents, labels[rows])
            made[name] = _of(extracted(name, clarid, given, None, inverted=True, directions=directions), rows)
        elif name == "generated":
            given = LatentCache(initial_noise(clarid.seed, rows, data.SHAPE), labels[rows])
            made[name] = _of(extracted(name, clarid, given, None, inverted=True), rows)
        elif name == "originals":
            made[name] = dataclasses.replace(made["samples"], samples=images[rows])
        else:
            made[name] = _posterior(place / name, model, images[rows], rows, bank, clarid.seed, show)
    return Sets(**{str(name): value for name, value in made.items() if name in names})


def _of(found: CanonicalSet, rows: Tensor) -> CanonicalSet:
    """A set made from latents of the rows, as a set of the rows in their own order."""
    order = found.rows.argsort()
    return dataclasses.replace(_taken(found, order), rows=rows)


def _taken(found: CanonicalSet, rows: Tensor) -> CanonicalSet:
    columns = [f.name for f in dataclasses.fields(found) if f.name != "fingerprint"]
    return dataclasses.replace(found, **{name: getattr(found, name)[rows] for name in columns})


def _posterior(
    path: Path,
    model: UNet2DConditionModel,
    images: Tensor,
    rows: Tensor,
    bank: PromptBank,
    seed: int,
    show: Progress,
) -> Tensor:
    made_from = {"scenes": data.fingerprint(), "teacher": weights_hash(model), "draws": DRAWS, "seed": seed}
    made_from |= {"rows": sha256_of_tensors({"rows": rows})}
    specs = {"posterior": TensorSpec((len(data.DIGITS),), torch.float32)}
    with RowWriter(path, kind="posterior", fingerprint=made_from, rows=len(rows), tensors=specs) as writer:
        for span in writer.claims():
            device = bank.embeddings.device
            made = diffusion_posterior(
                model, images.to(device), bank.embeddings[: len(data.DIGITS)], schedule=SCHEDULE, draws=DRAWS,
                seed=seed, rows=rows, progress=lambda done, total: show("posterior", done, total),
            )  # fmt: skip
            writer.write(span, {"posterior": made.cpu()})
    return load_rows(path, kind="posterior")[1]["posterior"]


def _first(labels: Tensor, many: int) -> Tensor:
    """The first rows of each class [n] int64."""
    found = [(labels == label).nonzero().flatten() for label in sorted(set(labels.tolist()))]
    fewest = min(map(len, found))
    if not 1 <= many <= fewest:
        raise InputError.of("per_class", f"1 to the {fewest} rows of a class", many)
    return torch.cat([rows[:many] for rows in found])
