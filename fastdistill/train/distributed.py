# SPDX-License-Identifier: Apache-2.0
"""A run over several processes (``torchrun``), one per device: the ranks of torch's default process group.

Each draws its part of every batch. Gradients are averaged by ``DistributedDataParallel``, or by FSDP2 if the student
is sharded, so that all ranks make the same update. Only rank 0 accesses files, except for checkpoints of a sharded
student: each rank writes and reads its part. Without a process group there is one rank.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdistill.data.fingerprint import differences, listed, plain
from fastdistill.distill.objective import BoundObjective
from fastdistill.errors import FastdistillError, InputError, StorageError, quoted
from fastdistill.files import atomic_write
from fastdistill.models.sharding import sharded

NCCL = (2, 9, 6)  # the first whose collectives a CUDA graph can hold
ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
ANSWER = 10.0  # seconds in which a rank says what it met
T = TypeVar("T")
Evaluate = Callable[..., tuple[Tensor, list[Tensor]]]


def without_averaging(evaluate: Evaluate) -> contextlib.AbstractContextManager[None]:
    """A context in which a backward through the result of ``averaged`` does not average: each rank keeps its own
    gradients, which a later backward averages, too."""
    inner: Any = getattr(evaluate, "_orig_mod", evaluate)
    ddp = isinstance(inner, nn.parallel.DistributedDataParallel)
    found: contextlib.AbstractContextManager[None] = inner.no_sync() if ddp else contextlib.nullcontext()
    return found


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def started_as() -> int:
    """The rank that ``torchrun`` gave this process, also before there is a process group; 0 without it."""
    return int(os.environ.get("RANK", "0")) if dist.is_available() and dist.is_torchelastic_launched() else 0


def own_device(device: str) -> str:
    """The device of this process. If ``torchrun`` started it and ``device`` is auto or cuda: its own GPU, which becomes
    the current device."""
    torchrun = dist.is_available() and dist.is_torchelastic_launched()
    if not torchrun or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    torch.cuda.set_device(own := int(os.environ["LOCAL_RANK"]))
    return f"cuda:{own}"


@contextlib.contextmanager
def launched(device: str) -> Iterator[str]:
    """The process group of the processes that ``torchrun`` started, until the end of the block; none without it, or
    if there is one. Yields the device of this rank: its own GPU if ``device`` is auto or cuda."""
    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        yield device
        return
    own = own_device(device)
    if own != device:
        os.environ.setdefault(ERROR_HANDLING, "0")  # lets a CUDA graph hold the collectives
    dist.init_process_group("gloo" if own == device else "nccl")
    try:
        yield own
    finally:
        dist.destroy_process_group()


def part(batch: int, device: torch.device) -> tuple[int, int]:
    """The first sample of this rank's part of a batch, and how many it has.

    Raises:
        InputError: the batch cannot be cut into equal parts, no process group in spite of ``torchrun``, or the current
            GPU is not the rank's own.
    """
    torchrun = dist.is_available() and dist.is_torchelastic_launched()
    if torchrun and size() == 1 and (started := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        rule = f"init_process_group before the trainer, as torchrun started {started} processes"
        raise InputError.of("torch.distributed", rule, "none")
    if batch % size():
        raise InputError.of("config.batch", f"a multiple of the {size()} ranks that share it", batch)
    if size() > 1 and device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        rule = f"the current device {torch.cuda.current_device()} (torch.cuda.set_device(LOCAL_RANK) before)"
        raise InputError.of("device", rule, device)
    count = batch // size()
    return rank() * count, count


def first(act: Callable[[], T]) -> T:
    """Run ``act`` on rank 0 only; every rank returns its result or raises its error."""
    if size() == 1:
        return act()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if rank() == 0:
        outcome[0], failure = _tried(act)
        outcome[1] = _told(failure)
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None or outcome[1] is not None:
        raise failure or outcome[1]
    result: T = outcome[0]
    return result


def everywhere(act: Callable[[], T]) -> T:
    """Run ``act`` on every rank and return its result of this rank. If it raises on some ranks, all ranks raise the
    error of the first of these, so that all continue in the same way."""
    if size() == 1:
        return act()
    result, failure = _tried(act)
    outcomes: list[Any] = [None] * size()
    dist.all_gather_object(outcomes, _told(failure))
    for number, other in enumerate(outcomes):
        if other is not None:
            raise failure if failure is not None and number == rank() else other
    return result  # type: ignore[return-value]


def _tried(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        return None, error


def _told(failure: Exception | None) -> FastdistillError | None:
    """An error as other ranks have it."""
    if failure is None or isinstance(failure, FastdistillError):
        return failure
    return FastdistillError(f"rank {rank()}: {failure!r}")


@contextlib.contextmanager
def naming_the_silent() -> Iterator[None]:
    """A context in which the error of a failed collective (for example after a timeout) names the ranks that caused it:
    ranks that ended with an error, with this error, and ranks that do not answer within seconds.

    Raises:
        FastdistillError: from the error of the collective.
    """
    if size() == 1:
        yield
        return
    block = first(lambda: f"fastdistill/{secrets.token_hex(8)}")
    try:
        yield
    except Exception as error:
        told: dict[int, str] = {}
        failed = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        with contextlib.suppress(RuntimeError):  # the store may be gone with a rank
            from torch.distributed.distributed_c10d import _get_default_store

            store = _get_default_store()
            store.set(f"{block}/{rank()}", "" if failed else quoted(error))
            deadline = time.monotonic() + ANSWER
            others = set(range(size())) - {rank()}
            while failed and others - told.keys() and time.monotonic() < deadline:
                for other in others - told.keys():
                    if store.check([f"{block}/{other}"]):
                        told[other] = store.get(f"{block}/{other}").decode()
                time.sleep(0.05)
        if not failed:
            raise
        silent = [f"rank {n} has died or hangs" for n in range(size()) if n != rank() and n not in told]
        ended = [f"rank {n} ended with {why}" for n, why in sorted(told.items()) if why]
        if not silent + ended:
            raise
        raise FastdistillError(f"{'; '.join(ended + silent)}; the last checkpoint is intact") from error


def check_same(fingerprint: Mapping[str, Any]) -> None:
    """Raise ``InputError``, on every rank, if a rank was given other arguments than rank 0."""
    if size() == 1:
        return
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, plain(fingerprint))
    for number, theirs in enumerate(found):
        if different := differences(found[0], theirs):
            raise InputError(f"rank {number}: expected what rank 0 was given, got {listed(different)}")


def largest(value: int, device: torch.device) -> int:
    """The largest value of any rank; waits for the device."""
    if size() == 1:
        return value
    told = torch.tensor(value, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether any rank says so; waits for the device."""
    return bool(largest(int(flag), device))


def rows(value: Tensor) -> Tensor:
    """[ranks, *S]: the [*S] of every rank, in their order."""
    if size() == 1:
        return value[None]
    table = value.new_zeros(size(), *value.shape)
    table[rank()] = value
    dist.all_reduce(table)  # zeros except for one rank: gathers, also where a backend has no all_gather for the device
    return table


def broadcast(tensors: Mapping[str, Tensor], read: Callable[[str], Tensor], device: torch.device) -> dict[str, Tensor]:
    """What ``read`` gives on rank 0 for each name, on the CPU; ``tensors`` are of these shapes and dtypes."""
    received = {}
    for name, like in tensors.items():
        here = read(name).to(device) if rank() == 0 else torch.empty_like(like, device=device)
        dist.broadcast(here, 0)
        received[name] = here.cpu()
    return received


def require_seen(directory: Path) -> None:
    """StorageError, on every rank, unless all ranks see what rank 0 writes into the directory."""
    mark = directory / f".seen-{first(lambda: secrets.token_hex(8))}.tmp"  # which a sweep takes with it

    def look() -> None:
        if not mark.exists():
            rule = "a directory that all ranks see, as each writes its part of a sharded student"
            raise StorageError(f"{directory}: expected {rule}; rank {rank()} does not see what rank 0 writes there")

    first(lambda: atomic_write(mark, b""))
    try:
        everywhere(look)
    finally:
        if rank() == 0:
            mark.unlink(missing_ok=True)


def beside() -> Any:
    """A process group for background threads, with the timeout of the default one; all ranks must call this."""
    world: Any = dist.group.WORLD
    device = dist.get_backend_config().split(":")[0]  # "cuda:nccl", of several the first
    options = getattr(world._get_backend(torch.device(device)), "options", None)
    return dist.new_group(timeout=getattr(options, "_timeout", None), backend="gloo")


class _Trained(nn.Module):
    """An objective as the forward of all that it trains: what DDP wraps, adapters too."""

    def __init__(self, objective: BoundObjective, student: nn.Module, evaluate: Evaluate) -> None:
        super().__init__()
        self.student, self.adapters = student, nn.ModuleList(objective.trained)
        self._evaluate = [evaluate]  # in a list, should it be a module

    def forward(self, *given: Any) -> tuple[Tensor, list[Tensor]]:
        return self._evaluate[0](*given)


class _Averaging(nn.parallel.DistributedDataParallel):
    """A script may end its process group and drop its trainer without ``close``: the group is released in any case."""

    def __del__(self) -> None:
        release(self)


def averaged(
    objective: BoundObjective, student: nn.Module, stream: torch.cuda.Stream | None, evaluate: Evaluate | None = None
) -> Evaluate:
    """The objective, or a method of it, with a backward that leaves the mean gradients of all ranks.

    Weights and buffers become rank 0's. ``stream``: that of a later capture in a CUDA graph.
    """
    evaluate = evaluate or objective
    if size() == 1 or sharded(student):
        return evaluate
    if stream is None:
        trained = _Trained(objective, student, evaluate)
        return _Averaging(trained, gradient_as_bucket_view=True)
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        wrapped = averaged(objective, student, None, evaluate)
    current.wait_stream(stream)
    return wrapped


def release(evaluate: Evaluate) -> None:
    """Release the process group of the result of ``averaged``, which cannot be called any more.

    DDP's reducer must not be the last owner of the group: it would wait for gloo's thread while it holds Python's
    lock, for which that thread may be waiting, a deadlock. Python's own reference, which is the last one here, is
    released without that lock.
    """
    wrapped: Any = getattr(evaluate, "_orig_mod", evaluate)  # inside of torch.compile
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        for name in ("logger", "reducer", "process_group"):
            wrapped.__dict__.pop(name, None)


def require_group(argument: str) -> None:
    """InputError unless there is a process group to cut a student over, or ``torchrun`` would have one made."""
    if not (dist.is_available() and (dist.is_initialized() or "RANK" in os.environ)):
        raise InputError.of(argument, "none without a process group (torchrun) to cut the student over", "one")


def shard(student: nn.Module, objective: BoundObjective, how: Callable[[nn.Module], object]) -> None:
    """Let ``how`` shard the student, from rank 0's weights; its adapters stay whole, their gradients averaged."""
    if size() > 1:
        for tensor in student.state_dict().values():
            dist.broadcast(tensor, 0)
    how(student)
    if not all(hasattr(p, "device_mesh") for p in student.parameters()):
        raise InputError.of("shard", "a function that calls fully_shard on the student", "one that leaves weights out")
    for parameter in nn.ModuleList(objective.trained).parameters():
        parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    if size() > 1 and parameter.grad is not None:
        dist.all_reduce(parameter.grad.div_(size()))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor (every rank must call this); other tensors unchanged."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


@dataclass(frozen=True)
class Part:
    """A rank's part of a tensor: ``local``, which starts at index ``offset`` of the whole. ``own``: whether this rank
    writes it, if several ranks have the same part."""

    local: Tensor
    offset: tuple[int, ...]
    own: bool


def part_of(tensor: Tensor) -> Part:
    """The part of a DTensor that is here; of other tensors all."""
    offset, own = [0] * tensor.ndim, rank() == 0
    if not hasattr(tensor, "device_mesh"):
        return Part(tensor, tuple(offset), own)
    mesh: Any = tensor.device_mesh
    place = mesh.get_coordinate()
    own = place is not None
    for i, placement in enumerate(tensor.placements if own else ()):  # type: ignore[attr-defined]
        if placement.is_shard():  # in chunks of one size, as far as they go
            length = tensor.shape[placement.dim]
            offset[placement.dim] = min(place[i] * -(-length // mesh.size(i)), length)
        else:
            own = own and place[i] == 0
    return Part(tensor.to_local(), tuple(offset), own)  # type: ignore[attr-defined]


def uncommon(tensor: Any) -> str | None:
    """Why a rank's part of a DTensor is not one piece of it along one dimension; None if it is."""
    from torch.distributed.tensor import Replicate, Shard

    cuts = [p for p in getattr(tensor, "placements", ()) if type(p) is not Replicate]
    if [type(p) for p in cuts] in ([], [Shard]):
        return None
    return f"a DTensor cut as {tuple(tensor.placements)}, not along one dimension"


def refuse_capture() -> str | None:
    """Why a CUDA graph cannot hold the collectives of these ranks: torch's conditions, in its notes on CUDA."""
    if size() == 1:
        return None
    backend = dict(pair.split(":") for pair in dist.get_backend_config().split(",")).get("cuda")
    if backend != "nccl":
        return f"gradients are reduced by {backend}: a CUDA graph can hold NCCL's collectives"
    if (found := torch.cuda.nccl.version()) < NCCL:
        return f"NCCL is {'.'.join(map(str, found))}: a CUDA graph can hold its collectives from 2.9.6 on"
    if os.environ.get(ERROR_HANDLING) != "0":
        return f"NCCL's watchdog would query a capture: {ERROR_HANDLING}=0 is needed before init_process_group"
    return None
