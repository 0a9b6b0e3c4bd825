# SPDX-License-Identifier: Apache-2.0
"""Creates a run file for a pipeline folder (``fastdistill init``), optionally with a recipe of runs/recipes."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastdistill.documented import field_texts
from fastdistill.errors import InputError
from fastdistill.models import BLOCK_SPECS, SPECS, make_student
from fastdistill.models.pipelines import PipelineFolder
from fastdistill.runs.config import RunConfig
from fastdistill.runs.student import student_spec_of
from fastdistill.runs.teacher import open_teacher
from fastdistill.schemas import RUN
from fastdistill.train.config import from_mapping
from fastdistill.train.yaml_text import parsed

RECIPES = Path(__file__).parent / "recipes"
_UNET, _TRANSFORMER = ("bk_small", "koala_700m", "channel_micro"), ("half_depth", "half_width")  # the first that fits
_WIDTH, _COLUMN = 118, 44
#: The fields that a run file shows in each section, in addition to those of the recipe.
_SHOWN = {
    "": "directory device seed teacher teacher_dtype log",
    "prompts": "file seen",
    "cache": "directory images_per_prompt steps guidance_scale dtype",
    "student": "spec init",
    "objective": "loss_weighting feature_distance",
    "objective.random_conditioning": "probability null",
    "objective.weights": "output feature task",
    "train": "steps batch micro_batch lr warmup ema_decay precision fuse gradient_checkpointing checkpoint_every",
    "preview": "every prompts seeds",
    "evaluate": "prompts images_per_prompt",
}


def init(
    folder: str | os.PathLike[str], *, recipe: str | None = None, call: str | None = None, allow_code: bool = False
) -> str:
    """The text of a run file for the pipeline in ``folder``, with comments; every value may be changed.

    Args:
        folder: a pipeline folder, or the id of a model on the Hub.
        recipe: a name from ``recipes()``: use the settings of a paper.
        call: ``module:function`` that calls the model, whose family may then be unknown.
        allow_code: whether the module of ``call`` may be imported.

    Raises:
        StorageError: no pipeline folder, or a damaged one.
        InputError: a pipeline of an unknown family without ``call``; an unknown recipe, or one whose student does not
            fit the model.
    """
    pipeline, _ = open_teacher(os.fspath(folder), call, allow_code)
    name = pipeline.name
    values: dict[str, Any] = {
        "directory": f"runs/{name}",
        "teacher": str(folder),
        "prompts": {"file": "prompts.txt" if pipeline.own_prompts() is None else None},
        "cache": {"directory": f"caches/{name}"},
        "student": {},
        "train": {"fuse": pipeline.family.name != "other"},
        "preview": {"every": 500},
    }
    values = _laid(values, pipeline.usual())
    if call is not None:
        values["call"] = call
    comment = ""
    if recipe is not None:
        comment, given = _recipe(recipe, pipeline)
        values = _laid(values, given)
    elif not values["student"]:
        values["student"] = {"spec": _student(pipeline)}
    config = from_mapping(RunConfig, values, recipe or "run")
    spec = student_spec_of(config.student, bool(pipeline.family.blocks))
    reads = config.objective.guidance.scale is not None
    student = make_student(pipeline.model(device="meta"), spec, guidance_embedding=reads)
    lines = [*_head(pipeline, student.model, comment), "", f"schema: {RUN.version}"]
    return "\n".join([*lines, *_section(config, values, "", 0)]) + "\n"


def recipes() -> dict[str, str]:
    """A description of each recipe, by its name."""
    return {file.stem: _comment(file.read_text(encoding="utf-8")) for file in sorted(RECIPES.glob("*.yaml"))}


def _comment(text: str) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def _recipe(name: str, pipeline: PipelineFolder) -> tuple[str, dict[str, Any]]:
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError.of("recipe", f"one of {', '.join(known)}", repr(name) + hint)
    given = parsed((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    if (family := given.pop("family")) != pipeline.family.name:
        rule = f"one for a {pipeline.family.name} model, as {pipeline.path} has it"
        raise InputError.of("recipe", rule, f"{name}, for {family}")
    return f"Recipe {name}: {known[name]}", given


def _laid(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values, replaced by the given ones, section by section."""
    laid = dict(values)
    for key, value in given.items():
        own = laid.get(key)
        laid[key] = {**own, **value} if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return laid


def _student(pipeline: PipelineFolder) -> str:
    """The first of the usual students that can be made from the model."""
    transformer = bool(pipeline.family.blocks)
    teacher = pipeline.model(device="meta")
    for name in _TRANSFORMER if transformer else _UNET:
        try:
            make_student(teacher, BLOCK_SPECS[name] if transformer else SPECS[name])
            return name
        except InputError:
            continue
    return _TRANSFORMER[-1] if transformer else _UNET[-1]


def _head(pipeline: PipelineFolder, student: Any, comment: str) -> list[str]:
    """What was found in the folder, as comments."""
    scheduler = pipeline.scheduler()
    shape, (height, width) = pipeline.latent_shape(), pipeline.size()
    teacher = sum(p.numel() for p in pipeline.model(device="meta").parameters())
    own = sum(p.numel() for p in student.parameters())
    encoders = [kind for name, kind in pipeline.components().items() if name.startswith("text_encoder")]
    banks = ", ".join(pipeline.family.conditions(pipeline.config) or pipeline.family.encoded)
    facts = [
        f"{pipeline.kind}, family {pipeline.family.name}: {pipeline.family.kind.__name__} of {teacher:,} parameters,"
        f" the student {own:,}",
        f"{height} x {width} pixels, latents {' x '.join(map(str, shape))}; {type(scheduler).__name__},"
        f" {pipeline.prediction_type}",
        f"A prompt is {banks}, by {', '.join(encoders)}." if encoders else f"A prompt is {banks}.",
    ]
    steps = "Then: fastdistill plan, cache, distill, evaluate, sample and export, each with this file."
    lines = itertools.chain.from_iterable(textwrap.wrap(text, _WIDTH - 2) for text in (*facts, comment, steps))
    return [f"# {line}" for line in lines]


def _section(config: Any, values: Mapping[str, Any], path: str, depth: int) -> Iterator[str]:
    """The lines of a (nested) configuration: its shown fields and the fields set by ``values``, with their help."""
    helps = field_texts(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name
        place = f"{path}.{name}".lstrip(".")
        given = values.get(name)
        if dataclasses.is_dataclass(value):
            if place in _SHOWN or given:
                if depth == 0:
                    yield ""
                yield f"{'  ' * depth}{name}:"
                yield from _section(value, given or {}, place, depth + 1)
        elif name in _SHOWN.get(path, "").split() or name in values:
            yield from _line(name, value, helps.get(name, ""), depth)


def _line(name: str, value: Any, text: str, depth: int) -> Iterator[str]:
    plain = list(value) if isinstance(value, tuple) else value
    told = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    line = f"{'  ' * depth}{name}: {told}"
    comment = f"# {text}"
    if max(len(line) + 2, _COLUMN) + len(comment) <= _WIDTH:
        yield f"{line:<{_COLUMN - 2}}  {comment}"
    else:
        yield from (f"{'  ' * depth}# {part}" for part in textwrap.wrap(text, _WIDTH - 2 - 2 * depth))
        yield line
