# SPDX-License-Identifier: Apache-2.0
"""Students that are a frozen model with adapters of PEFT: LoRA (arXiv 2106.09685) and its relatives.

PEFT is imported only if there are adapters.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import listed, sha256_of_tensors
from fastdistill.errors import FastdistillError, InputError, quoted
from fastdistill.files import atomic_write, make_directory
from fastdistill.models import families
from fastdistill.models.weights import memory, plain_tensors, storage

# Fields of a configuration about the origin of an adapter, not about what it computes.
_ORIGIN = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
_KEEPS_BASE = (True, False, "gaussian")  # values of init_lora_weights that do not change the weights below


def require() -> Any:
    """The package peft. FastdistillError with the command that installs it if it is missing."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        message = f"peft: expected to be installed for adapters; run: pip install 'fastdistill[lora]' ({error})"
        raise FastdistillError(message) from error


def owner(model: nn.Module) -> tuple[str, Any]:
    """The outermost module that has adapters, and its name followed by a dot; ("", None) if there is none."""
    for name, module in model.named_modules():
        if isinstance(found := getattr(module, "peft_config", None), Mapping) and found:
            return name + "." * bool(name), module
    return "", None


def configs(model: nn.Module) -> dict[str, Any]:
    """The configurations of the adapters in a model, by the adapters' names."""
    _, module = owner(model)
    return {} if module is None else dict(module.peft_config)


def is_config(value: Any) -> bool:
    """Whether this describes adapters: a configuration of PEFT, or a mapping as in ``adapter_config.json``."""
    if isinstance(value, Mapping):
        return "peft_type" in value
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(value).__mro__)


def with_adapters(teacher: nn.Module, config: Any, seed: int) -> Any:
    """A copy of the teacher whose weights share the teacher's memory and are frozen, with new adapters.

    If the initialization of the adapters changes the weights below (PiSSA, OLoRA), these are copied. torch's random
    state does not change. With LoRA, a diffusers model that supports it (``add_adapter``) keeps its class; others
    become a ``PeftModel``.

    Raises:
        InputError: a teacher with adapters, or a configuration that does not fit it.
        FastdistillError: PEFT is not installed.
    """
    peft = require()
    whole: Any = families.unwrapped(teacher)
    if names := sorted(configs(whole)):
        rule = "a model without adapters (PEFT's merge_and_unload adds them to its weights)"
        raise InputError.of("teacher", rule, f"adapters {', '.join(names)}")
    try:
        made = _from_mapping(config) if isinstance(config, Mapping) else copy.deepcopy(config)
        memo: dict[int, Any] = {}
        if getattr(made, "init_lora_weights", True) in _KEEPS_BASE:
            memo = {id(p): _frozen(p) for p in whole.parameters()}
        model = copy.deepcopy(whole, memo)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            if hasattr(model, "add_adapter") and made.peft_type == "LORA":
                model.add_adapter(made)
            else:
                model = peft.get_peft_model(model, made)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # also too little memory
        raise InputError.of("spec", "adapters that PEFT can put into the teacher", quoted(error)) from error
    taken = {storage(p) for p in whole.parameters()}
    for p in model.parameters():
        if p.requires_grad and storage(p) in taken:  # biases, if the configuration trains them
            p.data = p.data.clone()
    return model.to(next(whole.parameters()).device)


def _from_mapping(values: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unknown fields, which PEFT ignores
        made = require().PeftConfig.from_peft_type(**values)
    if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(made)}):
        raise InputError.of("spec", f"fields of {type(made).__name__}", ", ".join(unknown))
    return made


def _frozen(parameter: nn.Parameter) -> nn.Parameter:
    plain = type(parameter) is nn.Parameter
    return nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter


def check(student: nn.Module) -> None:
    """InputError unless the adapters of a student, if it has any, can be trained.

    Raises:
        InputError: they are merged into the weights, disabled, or all frozen.
    """
    if not configs(student):
        return
    layers = _layers(student)
    for state, undo in (("merged", "unmerge_adapter or unfuse_lora"), ("disable_adapters", "enable_adapters")):
        if names := [name for name, layer in layers.items() if getattr(layer, state)]:
            what = "merged into the weights" if state == "merged" else "disabled"
            rule = f"adapters that are not {what} ({undo} before)"
            raise InputError.of("student", rule, f"ones that are, in {listed(names, 3)}")
    if not any(p.requires_grad for p in student.parameters()):
        rule = "an adapter to train (set_adapter, or is_trainable=True of PeftModel.from_pretrained)"
        raise InputError.of("student", rule, "only frozen parameters")


def identity(student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """The student's adapters and the weights below them, for a fingerprint; empty for other students.

    Weights equal to the teacher's are identified by it; others by the hash of the given values. Call it before a cast.
    """
    if not (found := configs(student)):
        return {}
    layers = _layers(student).values()
    active = {name: set[float]() for layer in layers for name in layer.active_adapters}
    for layer in layers:
        for name, scale in getattr(layer, "scaling", {}).items():
            active.get(name, set()).add(float(scale))
    return {
        "configs": {name: _described(config) for name, config in found.items()},
        "scales": {name: sorted(scales) for name, scales in active.items()},
        "base": _base(student, teacher),
    }


def left_out(student: nn.Module) -> set[str]:
    """Names of the frozen weights below a student's adapters, which are not stored in checkpoints."""
    if not configs(student):
        return set()
    return {name for name, p in student.named_parameters(remove_duplicate=False) if not p.requires_grad}


def chosen(student: nn.Module, adapter: Any) -> str:
    """The name of an adapter; None: the one that is trained.

    Raises:
        InputError: there is none with that name, or the number of trained adapters is not one.
    """
    if not (found := configs(student)):
        raise InputError.of("student", "a model with adapters of PEFT", f"{type(student).__name__} without any")
    names = list(found)
    if adapter is None:
        parameters = [name.split(".") for name, p in student.named_parameters() if p.requires_grad]
        names = [name for name in names if any(name in parts for parts in parameters)]
        adapter = names[0] if len(names) == 1 else None
    if adapter not in found:
        raise InputError.of("adapter", f"the name of one adapter ({', '.join(names)})", adapter)
    return str(adapter)


def exported(student: nn.Module, values: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The weights of an adapter under PEFT's names; ``values``, by the student's names, replace its own weights.

    Raises:
        InputError: a trained weight belongs to no adapter, which PEFT's format cannot store.
    """
    prefix, module = owner(student)
    state = module.state_dict()
    state |= {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    found: dict[str, Tensor] = require().get_peft_model_state_dict(module, state_dict=state, adapter_name=adapter)
    places = {id(value) for value in found.values()}
    others = configs(student).keys() - {adapter}
    own = [n for n, p in student.named_parameters() if p.requires_grad and others.isdisjoint(n.split("."))]
    if lost := [name for name in own if name not in values or id(values[name]) not in places]:
        rule = "no trained weights but those of adapters, which alone it can hold (modules_to_save may name others)"
        raise InputError.of("student", rule, listed(lost, 3))
    return found


def write(student: nn.Module, tensors: Mapping[str, Tensor], adapter: str, directory: Path) -> None:
    """Write the result of ``exported`` in diffusers' format if its pipelines can load it, else in PEFT's: pipelines
    refuse trained biases and modules, and adapters whose initialization changes the weights below."""
    _, module = owner(student)
    config, family = module.peft_config[adapter], families.find(module)
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    make_directory(directory)
    loads = (
        config.peft_type == "LORA" and hasattr(module, "load_lora_adapter") and not hasattr(module, "get_base_model")
    )
    if loads and config.init_lora_weights in _KEEPS_BASE and all("lora" in name for name in tensors):
        part = family.part if family else "transformer"
        told = {"lora_adapter_metadata": json.dumps({f"{part}.{name}": value for name, value in fields.items()})}
        named = {f"{part}.{name}": tensor for name, tensor in tensors.items()}
        content = safetensors.torch.save(named, {"format": "pt"} | told)
        atomic_write(directory / "pytorch_lora_weights.safetensors", content)
        return
    prefix = "" if hasattr(module, "get_base_model") else "base_model.model."
    content = safetensors.torch.save({prefix + name: t for name, t in tensors.items()}, {"format": "pt"})
    atomic_write(directory / "adapter_model.safetensors", content)
    described = json.dumps(fields | {"inference_mode": True}, indent=2, sort_keys=True)
    atomic_write(directory / "adapter_config.json", described.encode())


def _layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have adapters, by name."""
    kind = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _described(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from the defaults, as JSON values."""
    usual = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config)
    }
    given = {name: value for name, value in config.to_dict().items() if name not in _ORIGIN}
    changed = {name: value for name, value in given.items() if value != usual.get(name)}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()} | {
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type))
    }


def _base(student: nn.Module, teacher: nn.Module) -> str:
    own = {_bare(name): p for name, p in student.named_parameters() if not p.requires_grad}
    theirs = {_bare(name): p for name, p in teacher.named_parameters()}
    if all(name in theirs and _equal(value, theirs[name]) for name, value in own.items()):
        return "the teacher's"
    return sha256_of_tensors(plain_tensors(own))


def _bare(name: str) -> str:
    """The name of a weight before adapters were added."""
    for part in ("base_model.model.", "base_layer.", "original_module."):
        name = name.replace(part, "")
    return name


def _equal(a: Tensor, b: Tensor) -> bool:
    if memory(a) == memory(b):
        return True
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b.to(a.device))
