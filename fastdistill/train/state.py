# SPDX-License-Identifier: Apache-2.0
"""The state of a run, by the names in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import dtype_name, plain
from fastdistill.data.values import spelled
from fastdistill.errors import InputError
from fastdistill.models import peft
from fastdistill.train import distributed
from fastdistill.train.step import TrainStep

State = dict[str, Any]  # tensors, and JSON values


def modules(step: TrainStep, student: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "student.", student
    for i, module in enumerate(step.objective.trained):
        yield f"trained.{i}.", module


def weights(step: TrainStep, student: nn.Module) -> State:
    """The values of the state_dicts of all trained modules, by their names in a checkpoint, without the frozen weights
    below PEFT adapters."""
    found = {p + k: v for p, module in modules(step, student) for k, v in module.state_dict(keep_vars=True).items()}
    for name in peft.left_out(student):
        found.pop(f"student.{name}", None)
    return found


def progress(step: TrainStep) -> dict[str, Tensor]:
    """The tensors of a step that belong to no parameter; ``totals`` are those of this rank."""
    scaling = {} if step.scaling is None else {"loss_scale": step.scaling.value, "good_steps": step.scaling.good}
    return scaling | {"counter": step.counter, "totals": step.totals, "skipped": step.optimizer.skipped}


def state_of(step: TrainStep, student: nn.Module) -> State:
    """The whole state of a run: weights, adapters, moments and averages of the optimizer, counter and metrics.

    Every rank must call this. If the student is sharded, its tensors are sharded too; ``totals`` has a row per rank.
    """
    state = {k: v.detach() if isinstance(v, Tensor) else v for k, v in weights(step, student).items()}
    for name, parameter in step.parameters_by_name.items():
        moments = step.optimizer.state.get(parameter, {})
        state |= {f"optimizer.{name}.{kind}": value for kind, value in moments.items()}
    return state | progress(step) | {"totals": distributed.rows(step.totals)} | _of_objective(step)


def objective_state(step: TrainStep) -> dict[str, Tensor]:
    """The tensors that the objective changes, by their names in a checkpoint; each rank has its part of dimension 1."""
    return {f"objective.{name}": value for name, value in getattr(step.objective, "state", {}).items()}


def shared_state(step: TrainStep) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The objective's tensors that are equal on all ranks, and those that are summed over the ranks."""
    common, sums = (getattr(step.objective, kind, {}) for kind in ("common", "sums"))
    return tuple({f"objective.{name}": value for name, value in kind.items()} for kind in (common, sums))  # type: ignore[return-value]


def _of_objective(step: TrainStep) -> dict[str, Tensor]:
    """All tensors of the objective, from all ranks."""
    found, (common, sums) = objective_state(step), shared_state(step)
    if distributed.size() == 1:
        return found | common | sums
    found = {name: distributed.rows(value).transpose(0, 1).flatten(1, 2) for name, value in found.items()}
    return found | common | {name: distributed.rows(value).sum(0) for name, value in sums.items()}


def check_storable(step: TrainStep, student: nn.Module, fingerprint: Mapping[str, Any]) -> int:
    """The size of a checkpoint of this run in bytes. Checks that one can be created, without writing it.

    Raises:
        InputError: the state_dict of a trained module contains a value that is neither a dense tensor nor a JSON value,
            or the fingerprint contains one that is not a JSON value.
    """
    plain(fingerprint)
    state = weights(step, student)
    for name, value in state.items():
        if (found := _unstorable(value)) is not None:
            raise InputError.of(name, "a dense tensor or a JSON value in a state_dict", found)
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    averaged = {id(p) for group in step.optimizer.param_groups if group["ema"] for p in group["params"]}
    size = sum(t.numel() * t.element_size() for t in tensors)
    for parameter in step.parameters_by_name.values():
        copies = 2 + (id(parameter) in averaged) + (parameter.dtype != torch.float32)
        size += parameter.numel() * copies * torch.float32.itemsize
    size += sum(value.nbytes for kind in shared_state(step) for value in kind.values())
    return size + distributed.size() * sum(value.nbytes for value in objective_state(step).values())


def _unstorable(value: Any) -> str | None:
    """Why a value of a state_dict cannot be in a checkpoint."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            return f"{value.layout} {dtype_name(value.dtype)} on {value.device}"
        if (found := distributed.uncommon(value)) is not None:
            return found
        return None if spelled(value.dtype) else f"{dtype_name(value.dtype)}, which safetensors does not have"
    try:
        same = plain({"value": value})["value"] == value
    except InputError:
        same = False
    return None if same else f"a {type(value).__name__} that JSON does not keep"
