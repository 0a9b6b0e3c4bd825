# SPDX-License-Identifier: Apache-2.0
"""A pipeline folder in which a student replaces the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor

from fastdistill import files
from fastdistill.data.fingerprint import differences, listed
from fastdistill.errors import InputError, StorageError, described
from fastdistill.models import families, peft
from fastdistill.models.calling import kept_in_float32
from fastdistill.models.students import Student
from fastdistill.models.weights import quantized, storage

if TYPE_CHECKING:
    from fastdistill.models.pipelines import PipelineFolder

INDEX = "model_index.json"


def export(
    source: PipelineFolder,
    student: Any,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    link: bool = False,
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes ``target``, a complete pipeline folder, or in case of an error nothing.

    ``DiffusionPipeline.from_pretrained`` loads it like the source: with the same ``variant``, if the source needs one.

    Args:
        source: the folder whose components, licence and index are used.
        student: of the model's family, or a ``Student``; wrappers are removed. Its weights are copied unchanged.
        dtype: of the stored weights; None: their own. What diffusers keeps in float32 stays in float32.
        link: the other components are symbolic links to the source's folders, which must then stay at their place.
        overwrite: an existing pipeline folder is replaced.
        texts: additional files of the folder by name, such as a model card ``README.md``.

    Raises:
        InputError: a student of another kind, or with latents or prompts other than the source's model; weights that
            are quantized, sharded, not finite or on the meta device, or adapters that are not merged; a target that
            exists already, or that overlaps with the source.
        StorageError: a component of the source is missing; no space; any error of the disk.
    """
    for argument, value in {"link": link, "overwrite": overwrite}.items():
        if not isinstance(value, bool):
            raise InputError.of(argument, "True or False", described(value))
    model = _model(student, source.family, f"the {source.kind} of {source.path}")
    _check_reads_the_same(model, source)
    state = _weights(model, dtype)
    written = _written(source.family, dict(model.config), state)
    place = _place(target, source.path, overwrite, INDEX)
    others = {name: source.path / name for name in source.components() if name != source.family.part}
    for name, folder in others.items():
        if not folder.is_dir():
            raise StorageError(f"{folder}: expected the {name} of the pipeline, got no folder")
        if link and place in folder.resolve().parents:
            rule = f"a folder apart from those that it links to (or link=False), such as {name}"
            raise InputError.of("target", rule, target)
    licences = [file for file in source.path.glob("LICEN[CS]E*") if file.is_file()]
    copied = [] if link else [file for folder in others.values() for file in folder.rglob("*") if file.is_file()]
    size = sum(tensor.nbytes for tensor in state.values()) + sum(file.stat().st_size for file in (*copied, *licences))
    files.require_space(place.parent, size)
    library = source.index[source.family.part][0]
    index = {**source.index, source.family.part: [library, source.family.kind.__name__]}
    with files.atomic_directory(place, replace=overwrite) as folder:
        for name, original in others.items():
            if link:
                (folder / name).symlink_to(original.resolve(), target_is_directory=True)
            else:
                shutil.copytree(original, folder / name)
        for file in licences:
            shutil.copyfile(file, folder / file.name)
        save_model(written, folder / source.family.part, variant=source.variant)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / INDEX).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export_model(
    student: Any,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes ``target``, the folder of a model alone, which ``from_pretrained`` of its class loads, or in case of an
    error nothing. Arguments and errors as in ``export``."""
    family = families.family_of(student.model if isinstance(student, Student) else student, "student")
    model = _model(student, family, "what is exported")
    state = _weights(model, dtype)
    written = _written(family, dict(model.config), state)
    if not isinstance(overwrite, bool):
        raise InputError.of("overwrite", "True or False", described(overwrite))
    place = _place(target, None, overwrite, "config.json")
    files.require_space(place.parent, sum(tensor.nbytes for tensor in state.values()))
    with files.atomic_directory(place, replace=overwrite) as folder:
        save_model(written, folder)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def save_model(model: Any, folder: Path, variant: str | None = None) -> None:
    """``model.save_pretrained``; StorageError for any error of the disk."""
    try:
        model.save_pretrained(folder, variant=variant)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: could not be written: {error}") from error


def _model(student: Any, family: families.Family, where: str) -> Any:
    """The model in ``student``, which must be of this family (that of ``where``)."""
    model = student.model if isinstance(student, Student) else student
    if not isinstance(model, nn.Module):
        raise InputError.of("student", "a model of diffusers, or a Student", described(student))
    if not isinstance(families.unwrapped(model), family.kind):
        rule = f"a {family}, as {where} has it"
        raise InputError.of("student", rule, type(families.unwrapped(model)).__name__)
    core = families.unwrapped(model)
    if names := sorted(peft.configs(model)):
        rule = (
            "no adapters: merged into the weights and taken off (fuse_lora and unload_lora of diffusers, "
            "merge_and_unload of PEFT), or saved alone (DistillTrainer.save_adapters)"
        )
        raise InputError.of("student", rule, f"adapters {', '.join(names)}")
    if quantized(core):
        raise InputError.of("student", "weights that are not quantized", "quantized ones")
    return core


def _check_reads_the_same(model: Any, source: PipelineFolder) -> None:
    """InputError unless the pipeline can call the model."""
    family = source.family
    own, theirs = ((family.channels(c), family.conditions(c)) for c in (model.config, source.config))
    if own[0] != theirs[0]:
        raise InputError.of("student", f"latents of {theirs[0]} channels, as {source.path}", own[0])
    new = {family.guidance_bank(model.config)} - theirs[1].keys()  # the pipelines pass it to models that have it
    for name in (own[1].keys() | theirs[1].keys()) - new:
        if own[1].get(name) != theirs[1].get(name):
            rule = f"prompts as {source.path} has them: {name} {_shape(theirs[1].get(name))}"
            raise InputError.of("student", rule, _shape(own[1].get(name)))


def _shape(condition: families.Condition | None) -> str:
    if condition is None:
        return "not read"
    return f"of shape {['any' if size is None else size for size in condition.shape]}"


def _weights(model: Any, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The weights on the CPU, as they will be stored."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError.of("dtype", "a floating-point dtype, or None", described(dtype))
    kept = kept_in_float32(model)
    found: dict[str, torch.Tensor] = {}
    places = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor) or tensor.is_meta:
            got = f"{name} {'in shards' if isinstance(tensor, DTensor) else 'on the meta device'}"
            raise InputError.of("student", "whole weights with values (a trainer's ema_student has them)", got)
        value = tensor.detach().cpu()
        if value.is_floating_point():
            if dtype is not None and id(tensor) not in kept:
                value = value.to(dtype)
            if not bool(value.float().isfinite().all()):
                raise InputError.of("student", f"weights that are finite as {value.dtype}", f"others in {name}")
        found[name] = value.clone() if storage(value) in places else value  # the file format has no tied tensors
        places.add(storage(value))
    return found


def _written(family: families.Family, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    """A plain model with these weights, ready to save: without the student's wrappers, hooks and fused forwards."""
    kind: Any = family.kind
    with torch.device("meta"):
        model = kind.from_config(config)
    wanted, found = ({n: list(t.shape) for n, t in tensors.items()} for tensors in (model.state_dict(), state))
    if changed := differences(wanted, found):
        raise InputError.of("student", f"the weights that its configuration gives {kind.__name__}", listed(changed, 3))
    model.load_state_dict(state, assign=True)
    return model


def _place(target: Path, source: Path | None, overwrite: bool, mark: str) -> Path:
    """Where to write, with links in its parents resolved; ``mark``: a file that shows that a folder may be
    overwritten."""
    whole = Path(os.path.abspath(target))
    place = whole.parent.resolve() / whole.name
    home = None if source is None else source.resolve()
    if home is not None and (place == home or place in home.parents or home in place.parents):
        raise InputError.of("target", f"a folder apart from {source}", target)
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise InputError.of("target", "a folder that is not there (or overwrite=True)", f"{target}, which is")
        if not (target / mark).is_file():
            kind = "pipeline" if mark == INDEX else "model"
            raise InputError.of("target", f"a {kind} folder to overwrite", f"{target} without {mark}")
    return place
