# SPDX-License-Identifier: Apache-2.0
"""Canonical samples of some images per class, created once and stored in the package's format of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.encoded import rows_of
from fastdistill.data.fingerprint import differences, plain, sha256_of_tensors
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import Manifest, TensorSpec
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.shards import RowWriter, load_rows
from fastdistill.data.stored import open_rows
from fastdistill.diffusion.schedule import PredictionType, Schedule
from fastdistill.distill.canonical import Canonical, Clarid, canonical
from fastdistill.errors import StorageError, described
from fastdistill.models import families
from fastdistill.models.calling import compute_dtype
from fastdistill.models.jacobian import TapFunction
from fastdistill.models.weights import weights_hash
from fastdistill.ops import _check
from fastdistill.ops.philox import permute

KIND = "canonical"
Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class CanonicalSet:
    """N rows written by ``extract_canonical``; tensors, or ``StoredRows`` of an opened set.

    Attributes:
        rows: [N] int64, the row of the data from which each was made. prompt_index: [N] int64, its class or prompt.
        clareps: [N, *S]. samples: [N, ...], decoded. features: [N, *F], the tap at the clareps.
        values: [N, k], singular values. energy: [N], fraction that was projected out. settled: [N] bool.
        fingerprint: how the set was made: ``teacher``, ``data``, ``prompts``, ``clarid`` and so on.
    """

    rows: Any
    prompt_index: Any
    clareps: Any
    samples: Any
    features: Any
    values: Any
    energy: Any
    settled: Any
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        expect: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        verify: bool = True,
    ) -> CanonicalSet:
        """Loads the set in a directory.

        ``expect`` contains required values of the fingerprint, such as ``{"teacher": weights_hash(model), "data":
        cache.identity}``: a set of another model or other data raises a StorageError with both values, before its rows
        are read. A StorageError is also raised if the directory is missing or incomplete, or a shard is damaged.
        """
        manifest, rows = load_rows(path, kind=KIND, device=device, verify=verify, check=_as_expected(path, expect))
        return cls(**rows, fingerprint=manifest.fingerprint)

    @classmethod
    def open(cls, path: str | Path, *, expect: Mapping[str, Any] | None = None, verify: bool = True) -> CanonicalSet:
        """The same, but its rows stay on disk (``StoredRows``)."""
        manifest, rows = open_rows(path, kind=KIND, verify=verify, check=_as_expected(path, expect))
        return cls(**rows, fingerprint=manifest.fingerprint)


def draw_rows(
    prompt_index: Tensor, per_class: int | None, *, classes: Sequence[int] | None = None, seed: int = 0
) -> Tensor:
    """[N] int64: for each class ``per_class`` rows (None: all), drawn by counter from (seed, class), one class after
    another.

    Args:
        prompt_index: [rows] int64, the class of each row. classes: the wanted ones; None: all that occur.

    Raises:
        InputError: a class without rows, or with fewer than ``per_class``.
    """
    _check.valued(prompt_index=prompt_index)
    _check.dtype(prompt_index, "prompt_index", torch.int64)
    prompt_index = prompt_index.cpu()
    if per_class is not None:
        _check.whole(per_class, "per_class", "a whole number from 1, or None")
    key = torch.tensor(_check.seed(seed), dtype=torch.int64, device="cpu")
    found = []
    for number in sorted(set(prompt_index.tolist())) if classes is None else [int(c) for c in classes]:
        own = (prompt_index == number).nonzero().flatten()
        _check.require(len(own) > 0, "classes", "classes that have rows", number)
        many = len(own) if per_class is None else per_class
        _check.require(many <= len(own), "per_class", f"at most {len(own)}, the rows of class {number}", many)
        epoch = torch.full((many,), number, dtype=torch.int64, device="cpu")
        places = permute(torch.arange(many, device="cpu"), len(own), key, epoch)
        found.append(own[places])
    return torch.cat(found)


def extract_canonical(
    path: str | Path,
    model: nn.Module,
    data: LatentCache,
    prompts: PromptBank,
    clarid: Clarid,
    *,
    schedule: Schedule,
    per_class: int | None = None,
    classes: Sequence[int] | None = None,
    prediction_type: PredictionType | None = None,
    clip_sample: float | None = None,
    inverted: bool = False,
    directions: Tensor | None = None,
    encode: Convert | None = None,
    decode: Convert | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    batch: int = 16,
    rows_per_shard: int = 64,
    chunk: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Writes the canonical samples of rows of ``data`` to the directory ``path``, or continues an unfinished set there.

    Args:
        model, clarid, schedule, prediction_type, clip_sample, chunk: see ``canonical``. The model's device is used.
        data: latents in the model's scale with the class or prompt of each; with ``encode``: images.
        prompts: the bank to which ``data`` refers.
        per_class, classes: which rows (``draw_rows`` with the seed of ``clarid``).
        inverted: the data are already latents at t_e, such as noise. directions: [len(data), n, any]; for each row of
            the data, they are projected out instead of the top ones.
        encode: images [b, ...] -> latents; decode: samples -> images; for example of a VAE.
        fingerprint: other things that determine the values, such as a hash of the VAE's weights.
        batch: batch size. Batches start again at each shard, so a set that was interrupted ends with the same bits.
        progress: called with (rows done, N) at the start and after each batch.

    Raises:
        InputError: what ``canonical`` and ``draw_rows`` refuse, or prompts or a model other than those of ``data``;
            before anything is written. StorageError: those of ``RowWriter``.
    """
    from fastdistill.train.sources import check_sources  # imported here: it imports this package

    for name, value, kind in (
        ("data", data, LatentCache),
        ("prompts", prompts, PromptBank),
        ("clarid", clarid, Clarid),
    ):
        _check.require(isinstance(value, kind), name, f"a {kind.__name__}", described(value))
    _check.whole(batch, "batch", "a whole number from 1")
    _check.flag(inverted, "inverted")
    if directions is not None:
        _check.valued(directions=directions)
        _check.shape(directions, "directions", (len(data), None, None), f"vectors [{len(data)}, n, any] of the data")
    weights = weights_hash(model)
    check_sources(data, prompts, model, weights)
    data.check_prompts(len(prompts))
    prompt_index = data.prompt_index.cpu()
    chosen = draw_rows(prompt_index, per_class, classes=classes, seed=clarid.seed)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    dtype = compute_dtype(model)
    null = rows_of(prompts.banks, torch.tensor([prompts.null_index]), device) if clarid.guidance != "0" else None

    def read(rows: Tensor) -> tuple[Tensor, Any]:
        x = data.latents[rows].to(device)
        return (encode(x) if encode else x).to(dtype), rows_of(prompts.banks, prompt_index[rows], device)

    def made(rows: Tensor) -> Canonical:
        x, conditions = read(rows)
        return canonical(
            model, x, conditions, clarid, schedule=schedule, null_prompt=null, prediction_type=prediction_type,
            clip_sample=clip_sample, inverted=inverted,
            directions=None if directions is None else directions[rows].to(device), rows=rows.to(device), chunk=chunk,
        )  # fmt: skip

    x, conditions = read(chosen[:1])
    if (family := families.find(model)) is not None:
        family.check("teacher", model, (len(data), *x.shape[1:]), prompts.banks)
    grid = clarid.grid(schedule)
    f = TapFunction(model, clarid.tap, grid.model_times(device)[0], conditions,
                    level=(float(grid.signal[0]), float(grid.noise[0])),
                    prediction_type=prediction_type or schedule.prediction_types[0])  # fmt: skip
    with torch.no_grad():
        feature = f.feature(x)
        sample = decode(x) if decode else x
    most = min(x[0].numel(), feature[0].numel())
    _check.require(clarid.k <= most, "k", f"at most {most}, the elements of a sample and of the feature", clarid.k)
    with RowWriter(
        path,
        kind=KIND,
        fingerprint={
            "teacher": weights,
            "data": data.identity,
            "prompts": prompts.identity,
            "clarid": dataclasses.asdict(clarid),
            "schedule": schedule.to_config(),
            "prediction_type": prediction_type or schedule.prediction_types[0],
            "clip_sample": clip_sample,
            "rows": sha256_of_tensors({"rows": chosen}),
            **({"inverted": True} if inverted else {}),
            **({} if directions is None else {"directions": sha256_of_tensors({"directions": directions})}),
            **plain(fingerprint or {}),
        },
        rows=len(chosen),
        tensors={
            "rows": TensorSpec((), torch.int64),
            "prompt_index": TensorSpec((), torch.int64),
            "clareps": TensorSpec(tuple(x.shape[1:]), dtype),
            "samples": TensorSpec(tuple(sample.shape[1:]), sample.dtype),
            "features": TensorSpec(tuple(feature.shape[1:]), feature.dtype),
            "values": TensorSpec((clarid.k if directions is None else 0,), dtype),
            "energy": TensorSpec((), dtype),
            "settled": TensorSpec((), torch.bool),
        },
        rows_per_shard=rows_per_shard,
    ) as writer:
        report = progress or (lambda done, total: None)
        report(writer.rows_done, len(chosen))
        for span in writer.claims(lambda: report(writer.rows_done, len(chosen))):
            done = writer.rows_done
            parts = []
            for start in range(span.start, span.stop, batch):
                rows = chosen[start : min(start + batch, span.stop)]
                parts.append(_columns(made(rows), rows, prompt_index[rows], decode))
                if start + len(rows) < span.stop:
                    report(done + start + len(rows) - span.start, len(chosen))
            writer.write(span, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            report(writer.rows_done, len(chosen))


def _columns(found: Canonical, rows: Tensor, prompt_index: Tensor, decode: Convert | None) -> dict[str, Tensor]:
    subspace = found.subspace
    with torch.no_grad():
        samples = decode(found.samples) if decode else found.samples
    columns = {
        "rows": rows,
        "prompt_index": prompt_index,
        "clareps": found.clareps,
        "samples": samples,
        "features": found.features,
        "values": found.energy.new_zeros(len(rows), 0) if subspace is None else subspace.values,
        "energy": found.energy,
        "settled": torch.ones(len(rows), dtype=torch.bool) if subspace is None else subspace.settled,
    }
    return {name: column.cpu() for name, column in columns.items()}


def _as_expected(path: str | Path, expect: Mapping[str, Any] | None) -> Callable[[Manifest], None]:
    wanted = plain(expect or {}, "expect")

    def check(manifest: Manifest) -> None:
        found = {key: manifest.fingerprint[key] for key in wanted if key in manifest.fingerprint}
        if changed := differences(wanted, found):
            raise StorageError(f"{path}: this canonical set was made differently ({'; '.join(changed)})")

    return check
