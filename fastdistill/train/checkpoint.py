# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one safetensors file per saved step (for a sharded student one per rank, see ``stored``). It is
complete or does not exist, and a run resumed from it is bit-identical.

Everything is stored by name: weights and buffers of the student (``student.<key>``) and of other trained modules
(``trained.<i>.<key>``), for each trained parameter the state of the optimizer (``optimizer.<parameter>.<kind>``), and
what else the objective changes (``objective.<name>``).
Metadata of the file: schema, step, seconds trained, fingerprint of the run, names of the trained parameters, state that
is no tensor, the measured execution of the steps, if any (``choice``), and the hash of the tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import differences, dtype_name, listed, plain
from fastdistill.errors import StorageError, described
from fastdistill.models.sharding import sharded
from fastdistill.train import distributed
from fastdistill.train.state import State, modules, objective_state, progress, shared_state, weights
from fastdistill.train.step import TrainStep
from fastdistill.train.stored import SCHEMA, DamagedError, Stored, rank_files
from fastdistill.train.writing import Going, write, write_together

_NAME = re.compile(r"step-(\d{8})\.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq", "ema", "master")  # float32, of the shape of their parameter; and the 0-dim "step"


@dataclass(frozen=True)
class Checkpoint:
    """``trained``: names of the trained parameters. ``state``: by name, read on access; ``outline``: the same with
    tensors on the meta device."""

    step: int
    seconds: float
    trained: list[str]
    state: Mapping[str, Any]
    outline: State


def head(
    state: Mapping[str, Any],
    step: int,
    seconds: float,
    fingerprint: Mapping[str, Any],
    trained: list[str],
    choice: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The metadata of a checkpoint except for the hash, with the values of the state that are no tensors."""
    values = plain({name: value for name, value in state.items() if not isinstance(value, Tensor)}, "state_dict")
    made = {"schema": SCHEMA, "step": step, "seconds": seconds, "fingerprint": plain(fingerprint), "trained": trained}
    return made | {"values": values} | ({} if choice is None else {"choice": dict(choice)})


def save(directory: Path, tensors: Mapping[str, Tensor], head: Mapping[str, Any], going: Going = lambda: None) -> Path:
    """Write ``step-<step>.safetensors`` from tensors on the CPU. StorageError if it cannot be written; then no partial
    file remains. ``going``: see ``writing.write``."""
    path = _place(directory, head)
    write(path, tensors, head, going)
    return path


def save_together(
    directory: Path, tensors: Mapping[str, Tensor], head: Mapping[str, Any], going: Going, group: Any
) -> None:
    """Like ``save``, from the result of ``cut`` on each rank of a group; only rank 0 raises the StorageError."""
    write_together(_place(directory, head), tensors, head, going, group)


def _place(directory: Path, head: Mapping[str, Any]) -> Path:
    return directory / f"step-{head['step']:08d}.safetensors"


def shared(student: nn.Module) -> bool:
    """Whether each rank writes its part of the checkpoints, and reads what it needs."""
    return distributed.size() > 1 and sharded(student) is not None


def cut(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a state that this rank writes, and for each shard its position: ``shape`` of the whole and
    ``offset``, lists by the tensor's name. Rank 0 writes tensors that are not sharded; nothing is copied."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        here = distributed.part_of(value.detach())
        if not value.numel():
            if distributed.rank() == 0:
                tensors[name] = here.local.new_empty(value.shape)
        elif here.own and here.local.numel():
            tensors[name] = here.local
            if here.local.shape != value.shape:
                parts[name] = {"shape": list(value.shape), "offset": list(here.offset)}
    return tensors, parts


def steps(directory: Path) -> dict[int, Path]:
    """The checkpoints of a directory by their step, oldest first."""
    found = {int(m[1]): p for p in directory.glob("step-*.safetensors") if (m := _NAME.fullmatch(p.name))}
    return dict(sorted(found.items()))


def prune(directory: Path, keep: int, every: int | None = None, best: int | None = None) -> None:
    """Remove all checkpoints except the newest ``keep``, those whose step is a multiple of ``every``, and that of step
    ``best``. Do not call it while another rank writes."""
    for step, path in list(steps(directory).items())[:-keep]:
        if step != best and (every is None or step % every):
            path.unlink(missing_ok=True)
    sweep(directory)


def sweep(directory: Path) -> None:
    """Remove the files of other ranks whose checkpoint was removed or not completed."""
    for file, path in rank_files(directory):
        if not path.exists():
            file.unlink(missing_ok=True)


def newest(directory: Path, *, together: bool = False) -> tuple[Path, Checkpoint, dict[str, Any]] | None:
    """The newest complete checkpoint, with its file and the fingerprint of its run; None if there are no checkpoints.
    Damaged ones are skipped with a warning. ``together``: see ``read``.

    Raises:
        StorageError: all are damaged, or one cannot be read or has another schema.
    """

    def there() -> list[Path]:
        return list(steps(directory).values())

    damaged = None
    for path in reversed(distributed.first(there) if together else there()):
        try:
            saved, made_by = read(path, together=True) if together else read(path)
        except DamagedError as error:
            if not together or distributed.rank() == 0:
                warnings.warn(f"{error}; the one before is taken", stacklevel=2)
            damaged = damaged or error
        else:
            return path, saved, made_by
    if damaged is not None:
        raise StorageError(f"{damaged}; no other one is whole: delete them to begin anew") from damaged
    return None


def chosen(directory: Path) -> Any:
    """The measured execution (``choice``) of the run in a directory, from its newest checkpoint that opens; None
    if there is none. Every rank must call this; rank 0 reads."""

    def look() -> Any:
        for path in reversed(steps(directory).values()):
            with contextlib.suppress(StorageError):
                return Stored(path).head.get("choice")
        return None

    return distributed.first(look)


def latest(directory: Path, fingerprint: Mapping[str, Any], step: TrainStep, student: nn.Module) -> Checkpoint | None:
    """The newest complete checkpoint, to resume from, or None if there are no checkpoints. Every rank must call this.
    Newer damaged ones are renamed to end in ``.damaged``.

    If the student is sharded, each rank reads its part on access; else rank 0 reads for all.

    Raises:
        StorageError: all are damaged, or it has another schema or belongs to a run with other settings, another student
            or other frozen parameters; the message says what to do.
    """

    together = shared(student)

    def find() -> Checkpoint | None:
        found = newest(directory, together=together)
        if found is None:
            return None
        path, saved, made_by = found
        advice = "use another directory or delete it"
        if changed := differences(plain(fingerprint), made_by):
            raise StorageError(f"{path}: this run was started differently ({listed(changed)}); {advice}")
        if changed := _unlike(saved, step, student):
            raise StorageError(f"{path}: this run trains something else ({listed(changed)}); {advice}")
        aside = functools.partial(_set_aside, directory, saved.step)
        distributed.first(aside) if together else aside()
        return saved

    if distributed.size() == 1 or together:
        return find()
    read_here: list[Checkpoint] = []

    def tell() -> Checkpoint | None:
        read_here.extend(found for found in [find()] if found is not None)
        return dataclasses.replace(read_here[0], state={}) if read_here else None

    told = distributed.first(tell)
    if told is None:
        return None
    tensors = {name: value for name, value in told.outline.items() if isinstance(value, Tensor)}
    received = distributed.broadcast(tensors, lambda name: read_here[0].state[name], step.counter.device)
    return dataclasses.replace(told, state=told.outline | received)


def _set_aside(directory: Path, newest: int) -> None:
    """Rename the damaged checkpoints after the newest complete one; otherwise they would count as newer."""
    for number, path in steps(directory).items():
        if number > newest:
            for file in (path, *(file for file, of in rank_files(directory) if of == path)):
                file.replace(file.with_name(f"{file.name}.damaged"))


def whole(state: Mapping[str, Any]) -> State:
    """Copies on the CPU of rank 0 of tensors that may be sharded over the ranks; every rank must call this."""
    copies: State = {}
    for name, value in state.items():
        full = distributed.whole(value.detach()) if isinstance(value, Tensor) else value
        if distributed.rank() == 0:
            copies[name] = full.cpu().clone() if isinstance(full, Tensor) else full
    return copies


def read(path: Path, *, together: bool = False) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint and the fingerprint of its run. All of its files are read once, block by block, to check the hashes.

    Args:
        together: every rank calls this, and checks the hashes of some of the files.

    Raises:
        StorageError: it cannot be read or has another schema; DamagedError if it is incomplete. On every rank.
    """
    each: Any = distributed.everywhere if together else (lambda act: act())
    stored: Stored = each(lambda: Stored(path))
    each(lambda: stored.verify(*(distributed.rank(), distributed.size()) if together else (0, 1)))
    head = stored.head
    for name, kind in {"step": int, "seconds": float, "trained": list, "fingerprint": dict}.items():
        if type(head.get(name)) is not kind:
            raise DamagedError(f"{path}: damaged, not a checkpoint ({name} is {described(head.get(name))})")
    saved = Checkpoint(head["step"], head["seconds"], head["trained"], stored, stored.outline())
    return saved, head["fingerprint"]


def _unlike(saved: Checkpoint, step: TrainStep, student: nn.Module) -> list[str]:
    """One line per name that is only in the checkpoint or only in this run, or differs between them.

    Floating-point tensors may have another precision (``restore`` converts them); nothing else may differ.
    """
    own, parameters = weights(step, student), step.parameters_by_name
    theirs = {name: v for name, v in saved.outline.items() if name.startswith(("student.", "trained."))}
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
    shapes |= {name: value.shape for name, value in progress(step).items()}
    for name, value in objective_state(step).items():
        first, second, *rest = value.shape
        shapes[name] = torch.Size([first, distributed.size() * second, *rest])
    shapes |= {name: value.shape for kind in shared_state(step) for name, value in kind.items()}
    wanted = {k: str(list(v)) for k, v in shapes.items() if k in saved.outline or k in ("counter", "totals", "skipped")}
    found = {name: str(list(saved.outline[name].shape)) for name in saved.outline.keys() - theirs.keys()}
    if "totals" in found:  # a row per rank, of the metrics that a version logs
        found["totals"] = wanted["totals"]
    for name in {"loss_scale", "good_steps"} - wanted.keys():  # of float16 weights, which these are not
        found.pop(name, None)
    return differences(wanted, found)


def _kind(name: str, value: Any) -> str:
    """The properties that must be equal when a run is resumed."""
    if not isinstance(value, Tensor):
        return "a JSON value"
    if name.endswith("_extra_state"):
        return "a tensor"
    return f"{'floating point' if value.is_floating_point() else dtype_name(value.dtype)} {list(value.shape)}"


@torch.no_grad()
def restore(saved: Checkpoint, step: TrainStep, student: nn.Module) -> None:
    """Restore the state of a checkpoint that ``latest`` returned. Each tensor gets the layout, the device and the
    sharding that the run uses.

    The precision of the weights may differ. Weights that are now trained in float32 get the masters of the checkpoint.
    If the checkpoint has float32 weights, bfloat16 and float16 weights are rounded from them, and the saved ones become
    the masters. Other tensors are cast. If the checkpoint has no loss scale, it starts from its initial value.
    """
    names = {id(parameter): name for name, parameter in step.parameters_by_name.items()}
    for prefix, module in modules(step, student):
        values = {}
        for key, own in module.state_dict(keep_vars=True).items():
            name = prefix + key
            if name not in saved.outline:
                continue  # frozen, below adapters: ``latest`` has found that nothing else is missing
            like = saved.outline[name]
            if isinstance(like, Tensor) and isinstance(own, Tensor):
                master = f"optimizer.{names.get(id(own))}.master"
                if (
                    own.dtype != like.dtype and master in saved.outline
                ):  # tied weights have one name here, and one master
                    name = master
            values[key] = _placed(saved, name, own)
        module.load_state_dict(values, strict=False)
    for name, parameter in step.parameters_by_name.items():
        step.optimizer.state[parameter] = {
            kind: saved.state[source].to(parameter.device, copy=True)
            if kind == "step"
            else torch.empty_like(parameter, dtype=torch.float32).copy_(_placed(saved, source, parameter))
            for kind, source in _moments(name, parameter, saved.outline)
        }
    for name, value in progress(step).items():
        if name == "totals":
            rows = saved.state[name].reshape(-1, saved.outline[name].shape[-1])
            same = len(rows) == distributed.size()
            if rows.shape[1] == len(value):  # a version that logged other metrics left others
                value.copy_(rows[distributed.rank()] if same else rows.mean(0))
        elif name in saved.outline:
            value.copy_(saved.state[name])
    for name, value in objective_state(step).items():
        if name in saved.outline:
            value.copy_(saved.state[name].narrow(1, distributed.rank() * value.shape[1], value.shape[1]))
    common, sums = shared_state(step)
    for name, value in (common | sums).items():
        if name in saved.outline:
            value.copy_(saved.state[name])
            if name in sums and distributed.rank():
                value.zero_()


def _placed(saved: Checkpoint, name: str, like: Any) -> Any:
    """A value of a checkpoint. If ``like`` is sharded, a tensor with the same sharding; only this rank's part of it is
    read."""
    if not hasattr(like, "device_mesh"):
        return saved.state[name]
    assert isinstance(saved.state, Stored)
    placed = torch.empty_like(like, dtype=saved.outline[name].dtype)
    distributed.part_of(placed).local.copy_(saved.state.part(name, like))
    return placed


def _moments(name: str, parameter: Tensor, outline: State) -> Iterator[tuple[str, str]]:
    """The optimizer's state of a parameter by its name in a checkpoint, for the dtype that the parameter has now."""
    for kind in ("step", *_MOMENTS):
        source = f"optimizer.{name}.{kind}"
        if kind == "master" and parameter.dtype == torch.float32:
            continue
        if kind == "master" and source not in outline and isinstance(outline.get(name), Tensor):
            source = name if outline[name].dtype == torch.float32 else source
        if source in outline:
            yield kind, source
