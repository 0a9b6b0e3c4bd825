# SPDX-License-Identifier: Apache-2.0
"""AdamW with clipping, an average of the weights and float32 master weights, in one pass over memory per step."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import listed
from fastdistill.errors import InputError, described
from fastdistill.ops import AdamWGroup, _check, _native, adamw_ema, grad_square_sum
from fastdistill.ops.adamw_ema import table
from fastdistill.train import prepared
from fastdistill.train.prepared import Prepared

# Options of torch's groups that change the result, or say how it is computed: the values that are not offered here.
_REFUSED = {"amsgrad": True, "maximize": True, "differentiable": True, "foreach": True, "fused": False}
_SHARED = ("max_norm", "ema_decay", "ema_warmup", "zero_grads")  # arguments of the optimizer that no group has


class AdamWEMA(torch.optim.AdamW):
    """``torch.optim.AdamW(fused=True)``, ``clip_grad_norm_`` and a moving average of the weights in one optimizer, with
    the op ``adamw_ema``.

    Its ``state_dict`` can be loaded into torch's optimizer and back. In addition to torch's state it contains ``ema``,
    the average, and for bfloat16 and float16 parameters ``master``, the weights in float32. All state is float32, for
    any dtype of the parameters. If a loaded master, when rounded, differs from its weight, the weight is used, because
    torch's optimizer has changed it in between. A parameter without a gradient does not change, nor does its average.
    If a gradient is not finite, nothing changes and ``skipped`` increases by 1.

    A step needs no synchronization with the host and can be captured in a CUDA graph. Values that may change between
    replays are in device memory: ``lr`` as a 0-dim tensor, and ``ema_weight``. ``torch.amp.GradScaler`` and
    learning-rate schedulers work as with torch's optimizers.

    Args:
        params: parameters, or groups of them, none of them empty; a group may have its own ``lr``, ``betas``, ``eps``
            and ``weight_decay``, and ``"ema": False``. All on one device: float32, bfloat16 or float16.
        lr: a float, or a 0-dim tensor; a tensor on the device is read there in every step.
        betas, eps, weight_decay: as in AdamW.
        max_norm: the norm of the gradient over all groups is clipped to this.
        ema_decay: decay of the averages (None: no averages).
        ema_warmup: the decay at step k (from 0) is at most (1 + k) / (10 + k).
        zero_grads: zero the gradients in the same pass, for a loop that keeps their buffers.

    Attributes:
        skipped: 0-dim int64, steps that were skipped. ema_weight: 0-dim float32, 1 - decay; both on the device.

    Raises:
        InputError: parameters of other dtypes or on several devices, also in groups that are added later; a max_norm
            below 0 or a decay out of range; sparse gradients; a group with amsgrad, maximize, differentiable, foreach,
            an unfused step or a decay that is not decoupled; loaded state from such a group, or of parameters with
            other shapes or names (nothing is loaded then).
    """

    grad_scale: Tensor  # for the next step, if there is a loss scale; torch.amp.GradScaler sets and deletes it
    _again: Prepared | None = None  # the previous step, prepared for repetition; a copy of the optimizer has none
    _before: Sequence[Counter[str]] = ()  # counts of kernel calls before the first call of a step
    _step_supports_amp_scaling = True  # also for copies, which torch's fused optimizers do not set

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float = math.inf,
        ema_decay: float | None = None,
        ema_warmup: bool = True,
        zero_grads: bool = False,
    ) -> None:
        max_norm = _check.within(max_norm, "max_norm", 0, math.inf, "a number >= 0")
        if ema_decay is not None:
            ema_decay = _check.within(ema_decay, "ema_decay", 0, 1, "a number, 0 to 1")
        for name, value in {"ema_warmup": ema_warmup, "zero_grads": zero_grads}.items():
            _check.flag(value, name)
        given = _options({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, "{}")
        self._averaged = ema_decay is not None
        self._loaded: set[Tensor] = set()  # parameters whose loaded masters have not been compared with them yet
        super().__init__(_entries(params, "params"), **given, fused=True)
        device = self._parameters()[0].device
        self.max_norm, self.ema_warmup, self.zero_grads = max_norm, ema_warmup, zero_grads
        self.ema_weight = torch.tensor(1 - (ema_decay or 0.0), dtype=torch.float32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        name = f"param_groups[{len(self.param_groups)}]"
        _check.require(isinstance(param_group, dict), name, "a dict with 'params'", described(param_group))
        given = param_group.get("params")
        one = [given] if isinstance(given, Tensor) else given
        param_group |= {"params": _entries(one, f"{name}['params']")} | _options(param_group, f"{name}['{{}}']")
        _check.flag(param_group.setdefault("ema", self._averaged), f"{name}['ema']")
        there = {id(p) for group in self.param_groups for p in group["params"]}
        for i, entry in enumerate(param_group["params"]):
            p = entry[1] if isinstance(entry, tuple) else entry
            if id(p) in there:
                got = "one that is there already"
                raise InputError.of(f"{name}['params'][{i}]", "each parameter once, in one group", got)
            there.add(id(p))
        super().add_param_group(param_group)
        parameters = self._parameters()
        try:
            self._check_options()
            for i, p in enumerate(parameters):
                _check.device(p, f"params[{i}]", parameters[0].device, "params[0]")
                _check.dtype(p, f"params[{i}]", *_check.FLOATS)
        except InputError:
            self.param_groups.pop()
            raise

    def _check_options(self) -> None:
        """InputError if a group has options that ``adamw_ema`` does not support, or no parameters."""
        for i, group in enumerate(self.param_groups):
            name = f"param_groups[{i}]"
            _check.require(len(group["params"]) > 0, f"{name}['params']", "at least one parameter", "an empty group")
            for option, value in _REFUSED.items():
                given = group.get(option)
                if given is not None and bool(given) == value:
                    raise InputError.of(f"{name}['{option}']", not value, given)
            if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", True):
                raise InputError.of(f"{name}['decoupled_weight_decay']", "True, or no weight_decay", False)
            for option in _SHARED:
                if option in group:
                    rule = "it for all groups, as an argument of AdamWEMA"
                    raise InputError.of(f"{name}['{option}']", rule, group[option])

    def __getstate__(self) -> dict[str, Any]:
        names = ("_averaged", "_loaded", "max_norm", "ema_warmup", "zero_grads", "ema_weight", "skipped")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Norm, clip, update. ``closure`` reevaluates the loss, as torch's optimizers have it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update(self.square_sum())
        return loss

    @torch.no_grad()
    def square_sum(self) -> Tensor:
        """The sum of squares of all gradients, 0-dim float64 on the device; the loss scale is not divided out.

        Sums over the shards of DTensors are all-reduced. If you shard without DTensor, all-reduce the result yourself
        and call ``update``.
        """
        if self._again is not None and self._again.fits(self):
            return self._again.square_sum()
        self._before = prepared.calls()
        parts: dict[Any, list[Tensor]] = {}
        for p in self._parameters():
            if p.grad is not None:
                _check.require(p.grad.layout == torch.strided, "gradient", "a dense tensor", p.grad.layout)
                parts.setdefault(_shards(p.grad), []).append(_local(p.grad))
        sums = [self.skipped.new_zeros((), dtype=torch.float64)] if not parts else []
        for shards, grads in parts.items():
            sums.append(grad_square_sum(grads))
            for mesh, dimension in shards:
                torch.distributed.all_reduce(sums[-1], group=mesh.get_group(dimension))
        return sum(sums[1:], sums[0])

    @torch.no_grad()
    def allocate(self) -> None:
        """Allocate the state of all parameters now; otherwise a step allocates it for parameters with a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                self._prepared(p, group["ema"])

    @torch.no_grad()
    def update(self, square_sum: Tensor) -> None:
        """Clip with this sum of squares, update and average; the part of ``step`` after ``square_sum``."""
        self._check_options()
        groups = [AdamWGroup(self._rate(g["lr"]), g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups]
        scalars = self._scalar("grad_scale"), self._scalar("found_inf"), self.ema_weight
        options = self.max_norm, self.ema_warmup, self.zero_grads
        if self._again is not None and self._again.holds(self):
            self._again.update(groups, square_sum, *scalars, self.skipped, *options)
            return
        self._again = None
        trained: list[Tensor] = []
        rows: list[tuple[Tensor, ...]] = []
        group: list[int] = []
        unwanted, no_copy = self.ema_weight.new_empty(0), self.ema_weight.new_empty(0, dtype=torch.bfloat16)
        for index, shared in enumerate(self.param_groups):
            for p in shared["params"]:
                if p.grad is None:
                    continue
                state = self._prepared(p, shared["ema"])
                weights = state.get("master", p)
                if not _native.same_order(p.grad, weights):
                    p.grad = torch.empty_like(weights, dtype=p.grad.dtype).copy_(p.grad)
                average = state["ema"] if shared["ema"] else unwanted
                copy = p.detach() if "master" in state else no_copy
                moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
                tensors = (weights.detach(), p.grad, *moments, average, copy)
                trained.append(p)
                rows.append(tuple(map(_local, tensors)))
                group.append(index)
        if not rows:
            return
        params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies = map(list, zip(*rows, strict=True))
        adamw_ema(
            params, grads, exp_avgs, exp_avg_sqs, steps, averages=averages, copies=copies, groups=groups, group=group,
            square_sum=square_sum, skipped=self.skipped, max_norm=self.max_norm, grad_scale=scalars[0],
            found_inf=scalars[1], ema_weight=self.ema_weight, ema_warmup=self.ema_warmup, zero_grads=self.zero_grads,
        )  # fmt: skip
        rates, hyper = [g.lr for g in groups], table.hyper(groups)
        lists = params, grads, exp_avgs, exp_avg_sqs, averages, copies, steps
        args = *lists, rates, square_sum, *scalars, self.skipped, group, hyper, *options
        self._again = Prepared.of(trained, self, args, self._before)

    def weights(self, module: nn.Module, averaged: bool) -> dict[str, Tensor]:
        """The trained parameters of a module by name: their averages if requested, otherwise their float32 masters;
        if there are none, the parameters themselves."""
        kinds = ("ema", "master") if averaged else ("master",)
        found = {}
        for name, p in module.named_parameters():
            if p.requires_grad:
                state = self.state.get(p, {})
                found[name] = next((state[kind] for kind in kinds if kind in state), p).detach()
        return found

    @torch.no_grad()
    def copy_average(self, module: nn.Module, to: nn.Module) -> None:
        """Write the averages of a module's parameters into the parameters with the same names of another module. If a
        parameter has no average yet, its value is written. With DTensors every rank must call this.

        Raises:
            InputError: ``to`` has other parameters, by name and shape; nothing is written then.
        """
        own, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (module, to))
        for source, target in by_name(own, theirs, "to"):
            average = self.state.get(source, {}).get("ema", source)
            target.copy_(average.full_tensor() if hasattr(average, "full_tensor") else average)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer or of torch's; kept in float32, in the memory layout of the parameters.
        ``foreach`` and ``fused``, which select torch's implementation, are not changed."""
        self._again = None  # it contains the state that is replaced
        averaged = [group["ema"] for group in self.param_groups]
        saved: dict[str, Any] = {}

        def look(_: Any, state: dict[str, Any]) -> None:
            saved.update(state)
            for group, option in itertools.product(state["param_groups"], ("amsgrad", "maximize", "differentiable")):
                if group.get(option):
                    raise InputError.of("state_dict", f"a state without {option}", f"{option}=True")
            self._check_shapes(state)

        hook = self.register_load_state_dict_pre_hook(look)  # the last hook: it sees the changes of the others
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, flag in zip(self.param_groups, averaged, strict=True):
            group.setdefault("ema", flag)
            group["foreach"], group["fused"] = None, True
        numbers = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
        for number, p in zip(numbers, self._parameters(), strict=True):
            for name, value in saved["state"].get(number, {}).items():
                if name == "step":
                    self.state[p][name] = torch.as_tensor(value, dtype=torch.float32, device=p.device).clone()
                else:  # torch's loader cast it to the dtype of the parameter
                    self.state[p][name] = torch.empty_like(p, dtype=torch.float32).copy_(value)
        self._loaded = {p for p in self._parameters() if "master" in self.state.get(p, {})}

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        """InputError if state has another shape than its parameter, or (in groups with ``param_names``) belongs to
        another name: torch matches them only by position."""
        for index, (own, theirs) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            named = zip(own.get("param_names", ()), theirs.get("param_names", ()), strict=False)
            if renamed := [f"{found} in place of {name}" for name, found in named if name != found]:
                rule = "the parameters of this optimizer in its order"
                raise InputError.of(f"state_dict: param_groups[{index}]", rule, listed(renamed))
            for p, number in zip(own["params"], theirs["params"], strict=False):
                for name, value in state_dict["state"].get(number, {}).items():
                    shape = () if name == "step" else tuple(p.shape)
                    if isinstance(value, Tensor) and tuple(value.shape) != shape:
                        raise InputError.of(f"state_dict: {name} of parameter {number}", shape, tuple(value.shape))

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _prepared(self, p: Tensor, averaged: bool) -> dict[str, Tensor]:
        """The state of a parameter; missing entries are created."""
        state: dict[str, Tensor] = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        if p.dtype != torch.float32 and "master" not in state:
            state["master"] = p.detach().float()
        elif p in self._loaded:  # only now, because the weights may be loaded after the state
            master = state["master"]
            master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))
            self._loaded.remove(p)
        if averaged and "ema" not in state:
            state["ema"] = state.get("master", p).detach().clone()
        return state

    def _rate(self, lr: float | Tensor) -> Tensor:
        device = self.skipped.device
        if isinstance(lr, Tensor):
            return lr.reshape(()).to(device, torch.float32, non_blocking=True)
        return torch.full((), lr, dtype=torch.float32, device=device)

    def _scalar(self, name: str) -> Tensor | None:
        """An attribute that ``torch.amp.GradScaler`` set on the optimizer for this step."""
        value: Tensor | None = getattr(self, name, None)
        return None if value is None else value.reshape(()).to(self.skipped.device, torch.float32, non_blocking=True)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def by_name(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], argument: str) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the same names, pair by pair.

    Raises:
        InputError: names the ones that are missing, unknown, of another shape or without values.
    """
    lines = []
    for name in sorted(own.keys() | theirs.keys()):
        a, b = own.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape or b.is_meta:
            wanted, got = ("none" if t is None else f"{'meta ' * t.is_meta}{list(t.shape)}" for t in (a, b))
            lines.append(f"{name}: expected {wanted}, got {got}")
    if lines:
        raise InputError.of(argument, "tensors of the same names and shapes", listed(lines))
    return [(own[name], theirs[name]) for name in own]


def _local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that is here; other tensors themselves."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined, unused-ignore]
    return local


def _entries(params: Any, argument: str) -> list[Any]:
    """Parameters, named ones or groups, at least one of them; the groups are checked as they are added."""
    rule = "an iterable of parameters"
    ordered = isinstance(params, Iterable) and not isinstance(params, Tensor | str | Mapping | Set)
    if not ordered:  # only then: the text of all weights takes a while
        raise InputError.of(argument, rule, described(params))
    entries = list(params)
    _check.require(len(entries) > 0, argument, "at least one parameter", "an empty group")
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):
            continue
        parameter = entry[-1] if isinstance(entry, tuple) and entry else entry
        _check.tensors(**{f"{argument}[{i}]": parameter})
        trained = parameter.is_leaf or parameter.retains_grad
        _check.require(trained, f"{argument}[{i}]", "a parameter", "the result of an operation, with a gradient")
    return entries


def _options(group: Mapping[str, Any], named: str) -> dict[str, Any]:
    """The options of AdamW that are there, as floats (``lr`` also as the tensor that it is); ``named``: in errors."""
    found: dict[str, Any] = {}
    for option in ("lr", "eps", "weight_decay"):
        if option in group:
            value = group[option]
            found[option] = _check.within(value, named.format(option), 0, math.inf, "a number >= 0")
            if isinstance(value, Tensor) and option == "lr":
                found[option] = value
    if "betas" in group:
        betas, rule = group["betas"], "two numbers, at least 0 and below 1"
        pair = isinstance(betas, list | tuple) and len(betas) == 2
        _check.require(pair, named.format("betas"), rule, described(betas))
        below = math.nextafter(1.0, 0.0)
        each = [_check.within(beta, f"{named.format('betas')}[{i}]", 0, below, rule) for i, beta in enumerate(betas)]
        found["betas"] = tuple(each)
    return found


def _shards(tensor: Tensor) -> tuple[tuple[Any, int], ...]:
    """The dimensions of the device mesh over which a DTensor is cut; none for other tensors."""
    if not hasattr(tensor, "to_local"):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(p.is_partial() for p in placements):
        raise InputError.of("gradient", "a DTensor that is sharded or replicated", placements)
    return tuple((mesh, i) for i, p in enumerate(placements) if p.is_shard())
