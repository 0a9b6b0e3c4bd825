# SPDX-License-Identifier: Apache-2.0
"""Typed configuration: plain dataclasses that define the command line options, the YAML fields and their checks.

Constraints are part of the annotations (``Annotated[int, Field(gt=0)]``). Creating a configuration checks nothing;
``validated`` checks all fields at once before the configuration is used. The one-line docstring of a field is the help
text of its option.
"""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
import yaml
from pydantic import Field

from fastdistill.documented import documented
from fastdistill.errors import InputError, StorageError, described, quoted
from fastdistill.files import located
from fastdistill.schemas import RUN
from fastdistill.train import yaml_text

Config = TypeVar("Config")
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Execution = Literal["auto", "eager", "compiled", "graph", "compiled_graph"]


@documented
@dataclass(frozen=True)
class PreviewConfig:
    """Grids of images from the teacher and from the averaged student, with the same prompts and noise."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two previews, in previews/ of the run (also one at the start and the end); none: no previews."""
    prompts: Annotated[int, Field(ge=1)] | tuple[int | str, ...] = 8
    """A number n: the first n prompts of the bank; or a list of row numbers or texts of the bank."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Seeds of the initial noise; each gives one image per prompt."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Number of sampling steps."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Guidance scale as in diffusers; 1 or none: no guidance."""
    guidance: str | float | None = None
    """Instead of guidance_scale: a schedule of the weight w = guidance_scale - 1 (docs/guidance.md)."""
    clip_sample: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Limit of the magnitude of the predicted clean sample, for images in [-1, 1] and a NoiseSchedule."""


@documented
@dataclass(frozen=True)
class TrainSettings:
    """How a student is trained. The defaults are from the paper on random conditioning (arXiv 2504.02011, SD-1.4)."""

    steps: Annotated[int, Field(ge=1, le=10**7)] = 1000
    """Number of optimizer steps."""
    batch: Annotated[int, Field(ge=1, le=2**20)] = 256
    """Samples per step, over all ranks."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Samples per forward on each rank; the gradient is that of the whole batch; none: all (in runs: what fits)."""
    gradient_checkpointing: bool = False
    """Save memory: compute the student's activations again in the backward pass (only diffusers models)."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-5
    """Learning rate of AdamW, or its maximum if a schedule changes it."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine that ends at 0 after the last step."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up of the learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the two moments of AdamW."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2
    """Decoupled weight decay of AdamW."""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """Epsilon of AdamW."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Maximum global norm of the gradient (student and adapters together); larger gradients are scaled down."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Decay of the moving average of the student's weights; limited to (1 + step) / (10 + step)."""
    ema_schedule: Literal["constant", "power"] = "constant"
    """constant: decay ema_decay; power: the average covers a fixed fraction of the steps so far (ema_width)."""
    ema_width: Annotated[float, Field(gt=0, lt=0.28)] = 0.1
    """For ema_schedule power: standard deviation of the averaged steps, relative to the number of steps so far."""
    precision: Literal["auto", "measured", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the trained weights (16 bits: with float32 masters); auto: bfloat16 on a GPU, else the student's;
    measured: bfloat16 if the CPU has instructions for it and a step is measured to be faster with them."""
    fuse: bool | Literal["auto"] = False
    """Use fused ops inside the teacher and the student (fastdistill.fuse); auto: on a GPU yes, on a CPU if measured to
    be faster."""
    execution: Execution = "auto"
    """How a step runs; auto: on a GPU one CUDA graph, or compiled if it cannot be captured; on a CPU what is measured
    to be the fastest. compiled_graph: one CUDA graph of the compiled step."""
    teacher_ahead: bool = False
    """Run the teacher for the next step during the backward of this one (CUDA graphs; more memory). Same bits, except
    in a compiled step, where the teacher is compiled separately and rounds differently."""
    teacher_fp8: bool = False
    """Run the linear layers of a transformer teacher in float8 (GPUs from 8.9 on): faster, half the memory, other
    targets; how far they move is measured at the start."""
    teacher_null_once: bool = False
    """Project the null prompt's keys and values once a step (guidance distillation, a fused U-Net, PixArt or Sana)."""
    banks: Literal["device", "pinned"] = "device"
    """Where banks in memory are stored: on the device, or in pinned host memory that a GPU reads directly."""
    ahead: Annotated[int, Field(ge=1, le=1024)] = 3
    """For how many steps rows are read in advance from banks on disk."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Steps between two lines of metrics; the host waits for the device only for these lines."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Number of most recent checkpoints to keep."""
    keep_every: Annotated[int, Field(ge=1)] | None = None
    """Also keep the checkpoints whose step is a multiple of this; none: only the most recent."""
    keep_best: str | None = None
    """Also keep the checkpoint with the best value of this name; callbacks return the values."""
    best: Literal["lowest", "highest"] = "lowest"
    """Whether the lowest or the highest value of keep_best is the best."""

    def fused(self, device: str) -> bool:
        """Whether both models are fused from the start on a device of this type; on a CPU ``auto`` measures first."""
        return device != "cpu" if self.fuse == "auto" else self.fuse


@documented
@dataclass(frozen=True)
class TrainConfig(TrainSettings):
    """Settings of a training run, with its seed, trackers and previews."""

    seed: Seed = 0
    """Seed of all random draws."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers that get metrics, settings and previews, in addition to metrics.jsonl."""
    preview: PreviewConfig = PreviewConfig()


#: Fields that do not change the results beyond last bits: what is kept and shown, how data are read, when the teacher
#: runs. ``teacher_fp8`` changes them; where it is on, a fingerprint has it (``train.sources``).
APART = frozenset({
    "ahead", "banks", "best", "checkpoint_every", "keep_best", "keep_checkpoints", "keep_every", "preview",
    "teacher_ahead", "teacher_fp8", "teacher_null_once", "trackers",
})  # fmt: skip


def validated(config: Config, name: str = "config") -> Config:
    """Checks all constraints and returns the configuration.

    Raises:
        InputError: with one line for each invalid field.
    """
    return _checked(type(config), dataclasses.asdict(config), name, [])  # type: ignore[call-overload]


def from_mapping(kind: type[Config], values: Mapping[str, Any], name: str = "config") -> Config:
    """A configuration from nested mappings, as read from YAML; fields that are not given keep their defaults. The field
    ``schema``, if given, is the version of the file format.

    Raises:
        InputError: with all unknown fields (and similar names) and all violated constraints; or the values are from a
            newer fastdistill.
    """
    if not isinstance(values, Mapping):
        raise InputError.of(name, "a mapping of fields", described(values))
    if "schema" in values:
        try:
            RUN.check(values["schema"], name)
        except StorageError as error:
            raise InputError(str(error)) from error
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        values = {field: value for field, value in values.items() if field != "schema"}
    laid = _onto(dataclasses.asdict(kind()), values)  # type: ignore[call-overload]
    return _checked(kind, laid, name, _unknown(kind, values, ""))


_LARGEST = 3.4028234663852886e38  # of float32


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    """Created once per kind: creating one takes ten times as long as a check."""
    return pydantic.TypeAdapter(kind)


def _checked(kind: type[Config], values: Mapping[str, Any], name: str, problems: list[str]) -> Config:
    """The configuration with these values. InputError lists ``problems`` and everything that pydantic finds."""
    values = _settled(kind, values)
    try:
        any_kind: Any = kind
        config: Config = _adapter(any_kind).validate_python(values)
    except pydantic.ValidationError as error:
        rules: dict[tuple[str, str], list[str]] = {}  # by place and value; each kind of a union adds a rule
        found = error.errors()
        wrong = {e["loc"][:-1] for e in found}  # if an item is wrong, pydantic also says that there are too few
        for e in found:
            if e["type"] != "unexpected_keyword_argument" and not (e["type"] == "too_short" and e["loc"] in wrong):
                place, rule = _place(kind, e["loc"]), e["msg"][0].lower() + e["msg"][1:]
                rules.setdefault((place, str(described(e["input"]))), []).append(rule)
        problems += [f"{place}: {', or '.join(rule)}, got {value}" for (place, value), rule in rules.items()]
    else:
        problems += _converted(values, config, "")
        problems += _rounded_away(kind, config)
        problems += _empty(config, "")
        problems += _apart(config, "")
    if problems:
        plural = "" if len(problems) == 1 else "s"
        raise InputError(f"{name}: {len(problems)} problem{plural}\n" + "\n".join(f"  {p}" for p in problems))
    return config


def _converted(given: Any, made: Any, place: str) -> Iterator[str]:
    """One line for each value that pydantic converted from another type, such as true to 1, or 2.0 to 2."""
    if dataclasses.is_dataclass(made) and isinstance(given, Mapping):
        names = [field.name for field in dataclasses.fields(made) if field.name in given]
        pairs = [(name, given[name], getattr(made, name)) for name in names]
    elif isinstance(made, Mapping) and isinstance(given, Mapping):
        pairs = [(name, given[name], made[name]) for name in given]
    elif isinstance(made, tuple) and isinstance(given, list | tuple):
        pairs = [(str(at), given[at], value) for at, value in enumerate(made)]
    else:
        kinds = {bool: (bool, "boolean"), int: (Integral, "integer"), float: (Real, "number")}
        kind, name = kinds.get(type(made), (object, ""))
        if name and callable(getattr(given, "item", None)):  # a scalar of NumPy or torch
            given = given.item()
        if not isinstance(given, kind) or (isinstance(given, bool) and kind is not bool and name):
            yield f"{place}: input should be a valid {name}, got {described(given)}"
        elif kind is Real and _LARGEST < abs(made) < math.inf:
            yield f"{place}: input should be within float32, got {described(given)}"
        return
    for key, own, result in pairs:
        yield from _converted(own, result, f"{place}.{key}".lstrip("."))


def _rounded_away(kind: Any, config: Any) -> Iterator[str]:
    """One line for each number that violates its constraint as float32, such as 1e-50, which is 0 then."""
    given = dataclasses.asdict(config)
    try:
        _adapter(kind).validate_python(_in_float32(given))
    except pydantic.ValidationError as error:
        for e in error.errors():
            rule = e["msg"][0].lower() + e["msg"][1:]
            value: Any = given
            part: Any
            for part in e["loc"]:
                value = value[part] if isinstance(value, dict | list | tuple) else value
            yield f"{_place(kind, e['loc'])}: {rule} in float32, got {described(value)}"


def _in_float32(value: Any) -> Any:
    """The same with each number as float32 has it; larger ones are refused anyway."""
    if isinstance(value, dict):
        return {key: _in_float32(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_in_float32, value))
    if isinstance(value, float) and abs(value) <= _LARGEST:
        return ctypes.c_float(value).value
    return value


_PROMPTS = ("prompt", "prompts")  # lists of texts, of which an empty one is the null prompt


def _empty(value: Any, place: str) -> Iterator[str]:
    """One line for each text that is empty or white space, unless this is the field's default."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            own = getattr(value, field.name)
            if not (isinstance(own, str) and own == field.default) and not (
                field.name in _PROMPTS and isinstance(own, tuple)
            ):
                yield from _empty(own, f"{place}{field.name}.")
    elif isinstance(value, tuple):
        for at, one in enumerate(value):
            yield from _empty(one, f"{place}{at}.")
    elif isinstance(value, str) and not value.strip():
        yield f"{place.removesuffix('.')}: input should be a text that is not empty, got {described(value)}"


def _settled(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, without the ``ema_decay`` that is a task's default where the average is of a power of time."""
    settled = dict(values)
    for field in dataclasses.fields(kind):
        given, make = values.get(field.name), field.default_factory
        if not isinstance(given, Mapping) or given.get("ema_schedule") != "power" or not callable(make):
            continue
        if getattr(make(), "ema_decay", None) == given.get("ema_decay"):
            settled[field.name] = {**given, "ema_decay": TrainSettings.ema_decay}
    return settled


def _apart(config: Any, place: str) -> Iterator[str]:
    """Lines for settings of a training that do not fit each other: parts that are none of the batch, and what is set of
    an average that is not the chosen one, or of a value that is not there."""
    if not dataclasses.is_dataclass(config):
        return
    if isinstance(config, TrainSettings):
        if config.micro_batch is not None and config.batch % config.micro_batch:
            yield f"{place}micro_batch: expected a divisor of batch, {config.batch}, got {config.micro_batch}"
        if config.keep_best is None and config.best != TrainSettings.best:
            rule = f"expected {TrainSettings.best} (its default), as it has no effect without keep_best"
            yield f"{place}best: {rule}, got {config.best}"
        schedule, idle = config.ema_schedule, "ema_width" if config.ema_schedule == "constant" else "ema_decay"
        if (value := getattr(config, idle)) != (default := getattr(TrainSettings, idle)):
            rule = f"expected {default} (its default), as it has no effect with ema_schedule {schedule}"
            yield f"{place}{idle}: {rule}, got {value}"
    for field in dataclasses.fields(config):
        yield from _apart(getattr(config, field.name), f"{place}{field.name}.")


def _place(kind: Any, parts: tuple[int | str, ...]) -> str:
    """The name of a field from pydantic's location of a problem, without the names of the kinds of a union in it."""
    place: list[int | str] = []
    union = False
    for part in parts:
        if not union or isinstance(part, int):
            place.append(part)
        kind = get_type_hints(kind).get(str(part)) if dataclasses.is_dataclass(kind) else None
        one_of = get_origin(kind) in (Union, types.UnionType)
        union |= one_of and not any(dataclasses.is_dataclass(option) for option in get_args(kind))
    return ".".join(map(str, place))


def from_yaml(kind: type[Config], path: str | Path) -> Config:
    """A configuration from a YAML file; see ``from_mapping``."""
    path = located(path, "config")
    try:
        values = yaml_text.parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError.of("config", "a readable YAML file", f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError.of("config", "YAML in UTF-8", f"{path}: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise InputError.of("config", "YAML", f"{path}: {yaml_text.told(error)}") from error
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        # An invalid date, number or boolean (by its value or its tag); too deeply nested lists.
        raise InputError.of("config", "YAML", f"{path}: {quoted(error)}") from error
    if not isinstance(values, dict | None):
        raise InputError.of(str(path), "a mapping of fields", type(values).__name__)
    return from_mapping(kind, values or {}, str(path))


def to_yaml(config: object) -> str:
    """A configuration as YAML that ``from_yaml`` reads back."""
    kind: Any = type(config)
    values = _adapter(kind).dump_python(config, mode="json")
    return yaml_text.dumped(values)


def run_yaml(config: object) -> str:
    """The text of a run file: the configuration and the version of its schema."""
    return f"schema: {RUN.version}\n{to_yaml(config)}"


def _onto(defaults: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, replaced by the given values, also in nested mappings. (The defaults of a task may differ from
    those of the nested class.)"""
    laid = dict(values)
    for key, default in defaults.items():
        given = values.get(key, default)
        laid[key] = _onto(default, given) if isinstance(default, dict) and isinstance(given, Mapping) else given
    return laid


_MOST = 16  # maximum number of fields in a message


def _unknown(kind: type, values: Mapping[str, Any], prefix: str) -> list[str]:
    """One line for each field that a (nested) dataclass does not have."""
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    lines = []
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            fields = ", ".join(known[:_MOST]) + (f" and {len(known) - _MOST} more" if len(known) > _MOST else "")
            hint = f" (did you mean {near[0]}?)" if near else f" (its fields: {fields})"
            lines.append(f"{prefix}{key}: no such field{hint}")
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(hints[key]):
            lines += _unknown(hints[key], value, f"{prefix}{key}.")
    return lines
