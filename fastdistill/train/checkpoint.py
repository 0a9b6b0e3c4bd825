# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one safetensors file per moment, whole or not there, enough to go on to the last bit.

Everything is stored by name: weights and buffers of the student (``student.<key>``) and of other trained modules
(``trained.<i>.<key>``), and for each trained parameter the state of the optimizer (``optimizer.<parameter>.<kind>``).
Metadata of the file: schema, step, seconds trained, what made it (fingerprint), names of the trained parameters, state
that is no tensor, and the hash of the tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import differences, dtype_name, listed, plain, sha256_of_tensors
from fastdistill.data.values import spelled
from fastdistill.errors import InputError, StorageError, described, quoted
from fastdistill.files import json_value, reason
from fastdistill.models import peft
from fastdistill.train import distributed
from fastdistill.train.step import TrainStep
from fastdistill.train.writing import Going, write

SCHEMA = 5
_NAME = re.compile(r"step-(\d{8})\.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq", "ema", "master")  # float32, of the shape of their parameter; and the 0-dim "step"

State = dict[str, Any]  # tensors, and JSON values


@dataclass(frozen=True)
class Checkpoint:
    step: int
    seconds: float
    trained: list[str]
    state: State


class DamagedError(StorageError):
    """A checkpoint that is not what was written."""


def head(
    state: Mapping[str, Any], step: int, seconds: float, fingerprint: Mapping[str, Any], trained: list[str]
) -> dict[str, Any]:
    """The metadata of a checkpoint but for the hash, with the values of the state that are no tensors."""
    values = plain({name: value for name, value in state.items() if not isinstance(value, Tensor)}, "state_dict")
    made = {"schema": SCHEMA, "step": step, "seconds": seconds, "fingerprint": plain(fingerprint), "trained": trained}
    return made | {"values": values}


def save(directory: Path, tensors: Mapping[str, Tensor], head: Mapping[str, Any], going: Going = lambda: None) -> Path:
    """Write ``step-<step>.safetensors``, of tensors on the CPU; StorageError when it cannot be written, and nothing is
    left of the attempt. ``going``: see ``writing.write``."""
    path = directory / f"step-{head['step']:08d}.safetensors"
    write(path, tensors, head, going)
    return path


def steps(directory: Path) -> dict[int, Path]:
    """The checkpoints of a directory by their step, oldest first."""
    found = {int(m[1]): p for p in directory.glob("step-*.safetensors") if (m := _NAME.fullmatch(p.name))}
    return dict(sorted(found.items()))


def prune(directory: Path, keep: int, every: int | None = None, best: int | None = None) -> None:
    """Remove all but the newest ``keep``, those whose step is a multiple of ``every``, and that of step ``best``."""
    for step, path in list(steps(directory).items())[:-keep]:
        if step != best and (every is None or step % every):
            path.unlink(missing_ok=True)


def newest(directory: Path) -> tuple[Path, Checkpoint, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its file and the fingerprint of its run; None where there is none at
    all. Damaged ones are named in a warning and passed over.

    Raises:
        StorageError: all are damaged, or one could not be read or is of another schema.
    """
    damaged = None
    for path in reversed(steps(directory).values()):
        try:
            saved, made_by = read(path)
        except DamagedError as error:
            warnings.warn(f"{error}; the one before is taken", stacklevel=2)
            damaged = damaged or error
        else:
            return path, saved, made_by
    if damaged is not None:
        raise StorageError(f"{damaged}; no other one is whole: delete them to begin anew") from damaged
    return None


def latest(directory: Path, fingerprint: Mapping[str, Any], step: TrainStep, student: nn.Module) -> Checkpoint | None:
    """The newest checkpoint that is whole, to go on from, or None where there is none at all. Damaged ones after it get
    names that end in ``.damaged``.

    Raises:
        StorageError: all are damaged, or it is of another schema, or of a run with other settings, another student or
            other frozen parameters; with what to do about it.
    """
    found = newest(directory)
    if found is None:
        return None
    path, saved, made_by = found
    advice = "use another directory or delete it"
    if changed := differences(plain(fingerprint), made_by):
        raise StorageError(f"{path}: this run was started differently ({listed(changed)}); {advice}")
    if changed := _unlike(saved, step, student):
        raise StorageError(f"{path}: this run trains something else ({listed(changed)}); {advice}")
    for number, later in steps(directory).items():
        if number > saved.step:  # it would count as one of the newest
            later.replace(later.with_name(f"{later.name}.damaged"))
    return saved


def whole(state: Mapping[str, Any]) -> State:
    """Copies on the CPU, on rank 0, of tensors that may be cut over the ranks; every rank has to ask for them."""
    copies: State = {}
    for name, value in state.items():
        full = distributed.whole(value.detach()) if isinstance(value, Tensor) else value
        if distributed.rank() == 0:
            copies[name] = full.cpu().clone() if isinstance(full, Tensor) else full
    return copies


def read(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint, and the fingerprint of its run.

    Raises:
        StorageError: it cannot be read or is of another schema; DamagedError where it is not whole.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            head = json_value((file.metadata() or {})["fastdistill"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        schema = head["schema"]
        if schema == SCHEMA:
            found = Checkpoint(
                _typed(head, "step", int), float(_typed(head, "seconds", int | float)), _typed(head, "trained", list),
                tensors | _typed(head, "values", dict),
            ), _typed(head, "fingerprint", dict)  # fmt: skip
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {reason(error)}") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"{path}: damaged, not a checkpoint ({quoted(error)})") from error
    if schema != SCHEMA:
        other = "of another version of fastdistill, which can go on with it; use another directory or delete it"
        raise StorageError(f"{path}: expected a checkpoint of schema {SCHEMA}, got {described(schema)}, {other}")
    if sha256_of_tensors(tensors) != head.get("sha256"):
        raise DamagedError(f"{path}: damaged, its tensors do not have the hash it states")
    return found


def _typed(head: Mapping[str, Any], name: str, kind: Any) -> Any:
    """A value of the metadata; TypeError where it is of another type."""
    if not isinstance(head[name], kind) or isinstance(head[name], bool):
        raise TypeError(f"{name} is {described(head[name])}")
    return head[name]


def _modules(step: TrainStep, student: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "student.", student
    for i, module in enumerate(step.objective.trained):
        yield f"trained.{i}.", module


def _weights(step: TrainStep, student: nn.Module) -> State:
    """What the state_dicts of all trained modules hold, by its name in a checkpoint; not the frozen weights below
    adapters of PEFT."""
    found = {p + k: v for p, module in _modules(step, student) for k, v in module.state_dict(keep_vars=True).items()}
    for name in peft.left_out(student):
        found.pop(f"student.{name}", None)
    return found


def _progress(step: TrainStep) -> dict[str, Tensor]:
    """The tensors of a step that belong to no parameter; ``totals`` are this rank's own."""
    scaling = {} if step.scaling is None else {"loss_scale": step.scaling.value, "good_steps": step.scaling.good}
    return scaling | {"counter": step.counter, "totals": step.totals, "skipped": step.optimizer.skipped}


def state_of(step: TrainStep, student: nn.Module) -> State:
    """Everything a run consists of: weights, adapters, moments and averages of the optimizer, counter and metrics.

    Every rank has to ask for it. Where the student is sharded, so are its tensors here; ``totals`` are all ranks'.
    """
    state = {k: v.detach() if isinstance(v, Tensor) else v for k, v in _weights(step, student).items()}
    for name, parameter in step.parameters_by_name.items():
        moments = step.optimizer.state.get(parameter, {})
        state |= {f"optimizer.{name}.{kind}": value for kind, value in moments.items()}
    return state | _progress(step) | {"totals": distributed.rows(step.totals)}


def check_storable(step: TrainStep, student: nn.Module, fingerprint: Mapping[str, Any]) -> int:
    """Bytes of a checkpoint of this run. Tries whatever makes one but the writing.

    Raises:
        InputError: the state_dict of a trained module holds something that is neither a dense tensor nor a JSON value,
            or the fingerprint holds something that is no JSON value.
    """
    plain(fingerprint)
    state = _weights(step, student)
    for name, value in state.items():
        if (found := _unstorable(value)) is not None:
            raise InputError.of(name, "a dense tensor or a JSON value in a state_dict", found)
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    averaged = {id(p) for group in step.optimizer.param_groups if group["ema"] for p in group["params"]}
    size = sum(t.numel() * t.element_size() for t in tensors)
    for parameter in step.parameters_by_name.values():
        copies = 2 + (id(parameter) in averaged) + (parameter.dtype != torch.float32)
        size += parameter.numel() * copies * torch.float32.itemsize
    return size


def _unstorable(value: Any) -> str | None:
    """Why a value of a state_dict cannot be in a checkpoint."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            return f"{value.layout} {dtype_name(value.dtype)} on {value.device}"
        return None if spelled(value.dtype) else f"{dtype_name(value.dtype)}, which safetensors does not have"
    try:
        same = plain({"value": value})["value"] == value
    except InputError:
        same = False
    return None if same else f"a {type(value).__name__} that JSON does not keep"


def _unlike(saved: Checkpoint, step: TrainStep, student: nn.Module) -> list[str]:
    """One line per name whose saved state has no place in this run, or the other way round.

    Floating-point tensors may have another precision (``restore`` converts them); nothing else may differ.
    """
    own, parameters = _weights(step, student), step.parameters_by_name
    theirs = {name: v for name, v in saved.state.items() if name.startswith(("student.", "trained."))}
    wanted, found = ({name: _kind(name, v) for name, v in values.items()} for values in (own, theirs))
    if lines := differences(wanted, found):
        return lines
    either = {*parameters, *saved.trained}
    wanted, found = (
        {name: ("frozen", "trained")[name in names] for name in either} for names in (parameters, saved.trained)
    )
    if lines := differences(wanted, found):
        return lines
    shapes = {f"optimizer.{name}.{kind}": p.shape for name, p in parameters.items() for kind in _MOMENTS}
    shapes |= {f"optimizer.{name}.step": torch.Size() for name in parameters}
    shapes |= {name: value.shape for name, value in _progress(step).items()}
    wanted = {k: str(list(v)) for k, v in shapes.items() if k in saved.state or k in ("counter", "totals", "skipped")}
    found = {}
    for name in saved.state.keys() - theirs.keys():
        shape = saved.state[name].shape
        found[name] = str(list(shape[1:] if name == "totals" else shape))  # a row per rank
    for name in {"loss_scale", "good_steps"} - wanted.keys():  # of float16 weights, which these are not
        found.pop(name, None)
    return differences(wanted, found)


def _kind(name: str, value: Any) -> str:
    """What has to be the same between the sittings of a run."""
    if not isinstance(value, Tensor):
        return "a JSON value"
    if name.endswith("_extra_state"):
        return "a tensor"
    return f"{'floating point' if value.is_floating_point() else dtype_name(value.dtype)} {list(value.shape)}"


@torch.no_grad()
def restore(state: Mapping[str, Any], step: TrainStep, student: nn.Module) -> None:
    """Put the state of a checkpoint that ``latest`` returned back in place, each tensor in the layout and on the device
    that the run uses, and cut over the ranks as there.

    What may differ is the precision of the weights. Weights that are trained in float32 now are the masters of the
    checkpoint; of weights that are float32 in the checkpoint, bfloat16 and float16 ones are rounded, with the saved
    ones as masters. Other tensors are cast. A loss scale that the checkpoint lacks begins anew.
    """
    names = {id(parameter): name for name, parameter in step.parameters_by_name.items()}
    for prefix, module in _modules(step, student):
        values = {}
        for key, own in module.state_dict(keep_vars=True).items():
            if prefix + key not in state:
                continue  # frozen, below adapters: ``latest`` has found that nothing else is missing
            value = state[prefix + key]
            if isinstance(value, Tensor) and isinstance(own, Tensor):
                if own.dtype != value.dtype:  # tied weights have one name here, and one master
                    value = state.get(f"optimizer.{names.get(id(own))}.master", value)
                value = distributed.placed(value, own)
            values[key] = value
        module.load_state_dict(values, strict=False)
    for name, parameter in step.parameters_by_name.items():
        step.optimizer.state[parameter] = {
            kind: value.to(parameter.device)
            if kind == "step"
            else torch.empty_like(parameter, dtype=torch.float32).copy_(distributed.placed(value, parameter))
            for kind, value in _moments(name, parameter, state)
        }
    for name, value in _progress(step).items():
        if name == "totals":
            rows = state[name].reshape(-1, len(value))
            same = len(rows) == distributed.size()
            value.copy_(rows[distributed.rank()] if same else rows.mean(0))
        elif name in state:
            value.copy_(state[name])


def _moments(name: str, parameter: Tensor, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state of a parameter in a checkpoint, for the dtype that the parameter has now."""
    for kind in ("step", *_MOMENTS):
        value = state.get(f"optimizer.{name}.{kind}")
        if kind == "master" and parameter.dtype == torch.float32:
            continue
        if kind == "master" and value is None and isinstance(saved := state.get(name), Tensor):
            value = saved if saved.dtype == torch.float32 else None
        if value is not None:
            yield kind, value
