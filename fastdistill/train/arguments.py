# SPDX-License-Identifier: Apache-2.0
"""The checks of a trainer's arguments, before anything is launched or written. An error names the argument."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import differences, dtype_name, listed, plain
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import EMBEDDINGS, PromptBank
from fastdistill.diffusion.flow import named_schedule_of
from fastdistill.diffusion.schedule import PredictionType, Schedule, check_prediction_type
from fastdistill.errors import InputError, described
from fastdistill.models import families, peft
from fastdistill.models.calling import kept_in_float32, layerwise_casting
from fastdistill.models.sharding import sharded
from fastdistill.models.students import Student, check_parameters
from fastdistill.models.weights import storage
from fastdistill.train import devices
from fastdistill.train.config import TrainConfig, TrainSettings, from_mapping, validated
from fastdistill.train.sources import Sources


def config(value: Any) -> TrainConfig:
    """A valid configuration, from a TrainConfig or a mapping of its fields."""
    if isinstance(value, Mapping):
        return from_mapping(TrainConfig, value)
    if not isinstance(value, TrainConfig):
        raise InputError.of("config", "a TrainConfig or a mapping of its fields", described(value))
    return validated(value)


def model(value: Any, argument: str) -> nn.Module:
    """A module whose weights have values (not on the meta device); for a ``Student`` its module."""
    found = value.model if isinstance(value, Student) else value
    if not isinstance(found, nn.Module):
        part = next((name for name in ("unet", "transformer") if isinstance(getattr(found, name, None), nn.Module)), "")
        raise InputError.of(
            argument, "a torch.nn.Module", str(described(found)) + (f" (pass its {part})" if part else "")
        )
    for name, tensor in itertools.chain(found.named_parameters(), found.named_buffers()):
        if tensor.is_meta:
            offloaded = any(hasattr(part, "_hf_hook") for part in found.modules())
            why = " (offloaded by accelerate: load it without device_map)" if offloaded else ""
            raise InputError.of(argument, "weights with values", f"{name} on the meta device{why}")
    return found


def sources(latents: Any, prompts: Any) -> Sources:
    """The checked pairs of a cache and a bank, one per shape of latents; lists are given for several shapes."""
    if not isinstance(latents, list | tuple):
        if isinstance(prompts, list | tuple):
            raise InputError.of("prompts", "a PromptBank, as there is one cache", described(prompts))
        check_data(latents, prompts)
        return [(latents, prompts)]
    banks = list(prompts) if isinstance(prompts, list | tuple) else [prompts] * len(latents)
    if not latents or len(banks) != len(latents):
        got = f"{len(latents)} and {len(banks)}"
        raise InputError.of("latents", "one cache or several, with one PromptBank or as many", got)
    pairs = list(zip(latents, banks, strict=True))
    for i, (cache, bank) in enumerate(pairs):
        check_data(cache, bank, f"[{i}]")
        own, first = (tuple(one.latents.shape[1:]) for one in (cache, latents[0]))
        if len(own) != len(first) or own[0] != first[0]:
            rule = f"{first[0]} channels and {len(first) - 1} other sizes, as latents[0]"
            raise InputError.of(f"latents[{i}]", rule, own)
        check_like(bank, banks[0], f"prompts[{i}]", "prompts[0]")
    return pairs


def check_data(latents: Any, prompts: Any, place: str = "") -> None:
    """Check that the cache and the bank have values, and that the bank has every prompt that the cache refers to."""
    for name, value, kind in (("latents", latents, LatentCache), ("prompts", prompts, PromptBank)):
        if not isinstance(value, kind):
            raise InputError.of(name + place, f"a {kind.__name__}", described(value))
    for name, bank in {"latents": latents.latents, **prompts.banks}.items():
        if bank.device.type == "meta":
            raise InputError.of(
                "prompts" if name == EMBEDDINGS else name, "rows with values", "a tensor on the meta device"
            )
    latents.check_prompts(len(prompts))


def preview_prompts(value: Any, pool: PromptBank) -> PromptBank:
    """A bank whose rows have the same form as those of the pool, so that the models can read them."""
    if not isinstance(value, PromptBank):
        raise InputError.of("preview_prompts", "a PromptBank, or None", described(value))
    check_like(value, pool, "preview_prompts", "prompts")
    return value


def check_like(value: PromptBank, other: PromptBank, argument: str, like: str) -> None:
    """Check that two prompt banks have the same names, row shapes and text encoder."""
    own, theirs = ({name: tuple(rows.shape[1:]) for name, rows in bank.banks.items()} for bank in (value, other))
    if own.keys() != theirs.keys():
        raise InputError.of(argument, f"the banks of {like}, {', '.join(theirs)}", ", ".join(own))
    for name, shape in theirs.items():
        if own[name] != shape:
            raise InputError.of(f"{argument}[{name!r}]", f"rows {shape}, as those of {like}", own[name])
    changed = differences(plain(other.encoder), plain(value.encoder))
    if changed and other.encoder and value.encoder:
        raise InputError.of(argument, f"the text encoder of {like}", listed(changed))


#: Settings of models that are distilled from a frozen diffusion teacher, which other trainings do not read.
OF_TEACHER = (
    "teacher_ahead",
    "teacher_fp8",
    "teacher_null_once",
    "fuse",
    "precision",
    "banks",
    "gradient_checkpointing",
)


def check_idle(train: TrainSettings, options: Sequence[str], why: str, place: str = "train") -> None:
    """InputError for settings that have no effect; ``why`` continues "expected DEFAULT, "."""
    for option in options:
        if (given := getattr(train, option)) != (only := getattr(type(train)(), option)):
            raise InputError.of(f"{place}.{option}", f"{only!r}, {why}", given)


def check_functions(objective: Any, **functions: Any) -> None:
    missing = [name for name in ("bind", "describe") if not callable(getattr(objective, name, None))]
    if missing or isinstance(objective, type):
        got = str(described(objective)) + (f" without {' and '.join(missing)}" if missing else "")
        raise InputError.of("objective", "an objective, such as RandomConditioning(...)", got)
    for name, value in functions.items():
        if value is not None:
            check_function(value, name)


def check_function(value: Any, argument: str) -> None:
    if not callable(value) or isinstance(value, type | nn.Module):
        raise InputError.of(argument, "a function, or None", described(value))


def check_callbacks(value: Any) -> None:
    rule = "pairs (every, function), such as [(500, validate)]"
    if not isinstance(value, list | tuple):
        raise InputError.of("callbacks", rule, described(value))
    for i, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError.of(f"callbacks[{i}]", rule, described(pair))
        every, function = pair
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise InputError.of(f"callbacks[{i}][0]", "a number of steps, at least 1", described(every))
        check_function(function, f"callbacks[{i}][1]")


def check_surroundings(device: torch.device) -> None:
    """Check that autocast is off: it would keep using copies of the weights from before the training."""
    if torch.is_autocast_enabled(device.type):
        rule = "to be called outside of autocast (config.precision is that of a run)"
        raise InputError.of("fit", rule, f"autocast to {dtype_name(torch.get_autocast_dtype(device.type))}")


def layout(student: nn.Module) -> dict[str, str]:
    """The properties of the parameters that must not change between the creation of a trainer and its ``fit``."""
    named = student.named_parameters()
    return {name: f"{dtype_name(p.dtype)}, {'trained' if p.requires_grad else 'frozen'}" for name, p in named}


def schedule(value: Any, prediction_type: Any, teacher: nn.Module, sources: Sources) -> tuple[Schedule, PredictionType]:
    """The schedule, and what the models predict (a diffusers scheduler states both)."""
    family, own = families.find(teacher), None
    if not isinstance(value, Schedule):
        stated = getattr(value, "config", {})
        if isinstance(value, type) or not isinstance(stated, Mapping):
            raise InputError.of(
                "schedule", "a NoiseSchedule, a FlowSchedule or a diffusers scheduler", described(value)
            )
        own = stated.get("prediction_type")
        if prediction_type not in (None, own) and own is not None:
            rule = f"None, or {own}, as the scheduler's configuration has it"
            raise InputError.of("prediction_type", rule, described(prediction_type))
        shapes = [tuple(cache.latents.shape[1:]) for cache, _ in sources]
        made = [named_schedule_of(value, families.tokens_of(teacher, shape), "schedule") for shape in shapes]
        if any(one.to_config() != made[0].to_config() for one in made[1:]):
            rule = "shapes of as many tokens, by which the shift of this scheduler goes (a FlowSchedule is one for all)"
            raise InputError.of("latents", rule, ", ".join(map(str, shapes)))
        value = made[0]
    usual = value.prediction_types[0]
    if prediction_type is None and family is not None and family.prediction_type not in ("epsilon", usual):
        rule = f"a FlowSchedule, for a {family} (or a prediction_type, for one that was trained otherwise)"
        raise InputError.of("schedule", rule, type(value).__name__)
    given = next((kind for kind in (prediction_type, own) if kind is not None), usual)
    return value, check_prediction_type(given, among=value.prediction_types)


def device(value: Any, student: nn.Module) -> torch.device:
    """The device to train on; None: the device of the student's first weight."""
    if value is None:
        tensor = next(itertools.chain(student.parameters(), student.buffers()), None)
        value = "cpu" if tensor is None else tensor.device
    return devices.usable(value)


def check_models(teacher: nn.Module, student: nn.Module) -> None:
    """Check that this student can be trained with this teacher."""
    for name, module in {"teacher": teacher, "student": student}.items():
        if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in module.modules()):
            rule = "the model itself, which the trainer wraps for its ranks"
            raise InputError.of(name, rule, "DistributedDataParallel (pass its module)")
        if where := sharded(module):
            rule = "a model that is not sharded yet (the student is, by a function given as shard)"
            raise InputError.of(name, rule, where)
    if (casting := layerwise_casting(student)) is not None:
        rule = "weights that stay in the dtype they are trained in"
        raise InputError.of("student", rule, f"diffusers' layerwise casting (compute dtype {dtype_name(casting)})")
    for name, p in student.named_parameters():
        if p.requires_grad and p.is_inference():
            raise InputError.of("student", "trained weights made outside of torch.inference_mode", name)
    frozen = {storage(p) for p in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if p.requires_grad and storage(p) in frozen]
    if shared:
        makes = "make_student(teacher, LoraConfig(...))" if peft.configs(student) else "copy.deepcopy"
        rule = f"trained parameters of its own, as the teacher's are frozen ({makes} makes such a model)"
        raise InputError.of("student", rule, f"the teacher's {', '.join(shared[:3])}{' ...' * (len(shared) > 3)}")
    peft.check(student)
    check_parameters(teacher, student)


def dtype(student: nn.Module, where: torch.device, precision: str, shared: Mapping[int, Tensor]) -> torch.dtype | None:
    """The dtype to train the student in (for ``measured``: before the measurement); None: keep its dtypes. ``shared``:
    its weights that belong to the teacher and are not cast. Only PEFT adapters can have another dtype than the weights
    below them."""
    kept = kept_in_float32(student)
    fixed = {t.dtype for key, t in shared.items() if t.is_floating_point() and key not in kept}
    fixed = set() if peft.configs(student) else fixed
    if precision not in ("auto", "measured"):
        wanted = cast(torch.dtype, getattr(torch, precision))
        if fixed - {wanted}:
            names = ", ".join(sorted(map(dtype_name, fixed)))
            rule = f"{names}, the dtype of the weights that the student shares with the teacher"
            raise InputError.of("config.precision", rule, precision)
        return wanted
    for name, p in student.named_parameters():
        if p.requires_grad and p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            rule = "float32, bfloat16 or float16 weights, or config.precision"
            raise InputError.of(f"student: {name}", rule, dtype_name(p.dtype))
    return torch.bfloat16 if where.type == "cuda" and not fixed else None
