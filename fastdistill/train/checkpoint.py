# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one safetensors file a moment, whole or not there, enough to go on to the last bit.

Metadata of the file: schema, step, seconds trained, what made it (fingerprint) and the hash of its tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastdistill.data.fingerprint import differences, plain, sha256_of_tensors
from fastdistill.errors import StorageError
from fastdistill.files import atomic_write, reason
from fastdistill.train import distributed
from fastdistill.train.step import TrainStep

SCHEMA = 3
_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    step: int
    seconds: float
    tensors: dict[str, Tensor]


def save(
    directory: Path, state: Mapping[str, Tensor], step: int, seconds: float, fingerprint: Mapping[str, Any]
) -> Path:
    """Write ``step-<step>.safetensors``; StorageError when it cannot be written, and nothing is left of the attempt."""
    tensors = {name: t.contiguous() for name, t in state.items()}
    head = {"schema": SCHEMA, "step": step, "seconds": seconds, "fingerprint": plain(fingerprint)}
    head["sha256"] = sha256_of_tensors(tensors)
    path = directory / f"step-{step:08d}.safetensors"
    atomic_write(path, safetensors.torch.save(tensors, metadata={"fastdistill": json.dumps(head)}))
    return path


def steps(directory: Path) -> dict[int, Path]:
    """The checkpoints of a directory by their step, oldest first."""
    found = {int(m[1]): p for p in directory.glob("step-*.safetensors") if (m := _NAME.fullmatch(p.name))}
    return dict(sorted(found.items()))


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest ``keep``."""
    for path in list(steps(directory).values())[:-keep]:
        path.unlink(missing_ok=True)


def latest(directory: Path, fingerprint: Mapping[str, Any]) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none.

    Raises:
        StorageError: it is damaged, of a newer schema, or of a run with other settings; with what to do about it.
    """
    found = steps(directory)
    if not found:
        return None
    path = list(found.values())[-1]
    tensors, head = _read(path)
    changed = differences(plain(fingerprint), head["fingerprint"])
    if changed:
        fields = "; ".join(changed)
        raise StorageError(f"{path}: this run was started differently ({fields}); use another directory or delete it")
    return Checkpoint(head["step"], head["seconds"], tensors)


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, on rank 0, of tensors that may be cut over the ranks; every rank has to ask for them."""
    copies = {}
    for name, tensor in state.items():
        full = distributed.whole(tensor.detach())
        if distributed.rank() == 0:
            copies[name] = full.cpu().clone()
    return copies


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    advice = "delete it to go on from the one before"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})["fastdistill"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {reason(error)}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path}: damaged, not a checkpoint ({error}); {advice}") from error
    if head.get("schema") != SCHEMA:
        raise StorageError(f"{path}: expected a checkpoint of schema {SCHEMA}, got {head.get('schema')}")
    if sha256_of_tensors(tensors) != head["sha256"]:
        raise StorageError(f"{path}: damaged, its tensors do not have the hash it states; {advice}")
    return tensors, head


def state_of(step: TrainStep, student: torch.nn.Module) -> dict[str, Tensor]:
    """Everything a run consists of: weights, adapters, moments and averages of the optimizer, counter and metrics.

    Every rank has to ask for it. Where the student is sharded, so are its tensors here; ``totals`` are all ranks'.
    """
    state = {f"student.{k}": v for k, v in student.state_dict().items()}
    for i, module in enumerate(step.objective.trained):
        state |= {f"trained.{i}.{k}": v for k, v in module.state_dict().items()}
    for i, parameter in enumerate(step.parameters):
        state |= {f"optimizer.{i}.{k}": v for k, v in step.optimizer.state[parameter].items()}
    if step.scaling is not None:
        state |= {"loss_scale": step.scaling.value, "good_steps": step.scaling.good}
    totals = distributed.rows(step.totals)
    return state | {"counter": step.counter, "totals": totals, "skipped": step.optimizer.skipped}


@torch.no_grad()
def restore(tensors: Mapping[str, Tensor], step: TrainStep, student: torch.nn.Module) -> None:
    """Put a checkpoint's state back in place, each tensor in the layout and on the device that the run uses, and cut
    over the ranks as there."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    def load(module: torch.nn.Module, prefix: str) -> None:
        own = module.state_dict()
        module.load_state_dict({k: distributed.placed(v, own.get(k, v)) for k, v in part(prefix).items()})

    load(student, "student.")
    for i, module in enumerate(step.objective.trained):
        load(module, f"trained.{i}.")
    for i, parameter in enumerate(step.parameters):
        step.optimizer.state[parameter] = {
            k: torch.empty_like(parameter, dtype=v.dtype).copy_(distributed.placed(v, parameter))
            if v.shape == parameter.shape
            else v.to(parameter.device)
            for k, v in part(f"optimizer.{i}.").items()
        }
    if step.scaling is not None:
        step.scaling.value.copy_(tensors["loss_scale"])
        step.scaling.good.copy_(tensors["good_steps"])
    step.counter.copy_(tensors["counter"])
    totals = tensors["totals"].reshape(-1, len(step.totals))
    same = len(totals) == distributed.size()
    step.totals.copy_(totals[distributed.rank()] if same else totals.mean(0))
    step.optimizer.skipped.copy_(tensors["skipped"])
