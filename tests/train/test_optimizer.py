# SPDX-License-Identifier: Apache-2.0
"""AdamWEMA compared with torch's fused AdamW with clipping and an average, and used with torch's optimizer tools."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fastdistill.errors import InputError
from fastdistill.train import AdamWEMA
from tests.harness import EPS
from tests.processes import as_ranks

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 7)).to(dtype)


def backward(net: nn.Module, step: int, scale: float = 1.0) -> None:
    """Gradients that depend only on the step: real ones would feed the rounding errors of the optimizer back to it."""
    g = torch.Generator().manual_seed(step)
    for p in net.parameters():
        made = torch.empty_like(p, requires_grad=False).copy_(scale * torch.randn(p.shape, generator=g))
        p.grad = made if p.grad is None else p.grad.add_(made)


def close(net: nn.Module, other: nn.Module, steps: int = 7) -> None:
    """The weights are at most 1, and each of ``steps`` updates is at most 0.1 and rounded twice on either side."""
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=4 * steps * EPS, atol=0.4 * steps * EPS)


def run(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, clip: float | None = None) -> None:
    for k in steps:
        backward(net, k)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("clip", [math.inf, 0.05])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_parity_with_torch(clip: float, memory: torch.memory_format) -> None:
    ours, theirs = model().to(memory_format=memory), model().to(memory_format=memory)
    average = torch.optim.swa_utils.AveragedModel(theirs, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    mine = AdamWEMA(ours.parameters(), **OPTIONS, max_norm=clip, ema_decay=0.9, ema_warmup=False)
    other = torch.optim.AdamW(theirs.parameters(), **OPTIONS, fused=True)
    average.update_parameters(theirs)  # the first call copies: the average starts with the weights
    for k in range(5):
        run(ours, mine, range(k, k + 1))
        run(theirs, other, range(k, k + 1), clip)
        average.update_parameters(theirs)
    close(ours, theirs)
    exported = copy.deepcopy(ours)
    mine.copy_average(ours, exported)
    close(exported, average.module)
    assert mine.skipped == 0


def test_state_goes_to_torch_and_back() -> None:
    one, two = model(), model()
    ours, theirs = AdamWEMA(one.parameters(), **OPTIONS, ema_decay=0.9), torch.optim.AdamW(two.parameters(), fused=True)
    run(one, ours, range(3))
    two.load_state_dict(one.state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch would share the tensors
    run(one, ours, range(3, 5))
    run(two, theirs, range(3, 5))
    close(one, two)
    three = copy.deepcopy(two)
    back = AdamWEMA(three.parameters(), ema_decay=0.9)
    back.load_state_dict(theirs.state_dict())
    assert back.param_groups[0]["lr"] == 1e-2 and back.param_groups[0]["ema"] is True
    run(two, theirs, range(5, 7))
    run(three, back, range(5, 7))
    close(two, three)
    assert back.state[next(three.parameters())]["step"] == 7


@pytest.mark.parametrize("saver", ["torch", "ours"])
def test_low_precision_weights_keep_float32_state(saver: str) -> None:
    net, truth = model(torch.bfloat16), model(torch.bfloat16).float()
    options = OPTIONS | {"lr": 1e-5}  # far below the resolution of a bfloat16 weight of 0.1
    mine, other = AdamWEMA(net.parameters(), **options, ema_decay=0.5), torch.optim.AdamW(truth.parameters(), **options)
    for k in range(4):
        backward(net, k)
        for p, q in zip(net.parameters(), truth.parameters(), strict=True):
            q.grad = p.grad.float() if p.grad is not None else None
        mine.step()
        other.step()
        mine.zero_grad()
    for p, q in zip(net.parameters(), truth.parameters(), strict=True):
        state = mine.state[p]
        assert {t.dtype for t in state.values()} == {torch.float32}
        torch.testing.assert_close(state["master"], q.detach(), rtol=16 * EPS, atol=0)
        assert torch.equal(p, state["master"].bfloat16())
    again = AdamWEMA(net.parameters(), ema_decay=0.5)
    saved = mine.state_dict() if saver == "ours" else torch.optim.AdamW(net.parameters()).state_dict()
    again.load_state_dict(saved)
    run(net, again, range(1))
    for p in net.parameters():
        assert {t.dtype for t in again.state[p].values()} == {torch.float32}
    if saver == "ours":
        fresh = AdamWEMA(net.parameters(), ema_decay=0.5)
        fresh.load_state_dict(copy.deepcopy(saved))
        for p in net.parameters():
            for name, value in mine.state[p].items():
                assert torch.equal(fresh.state[p][name], value)


def test_what_torch_trained_meanwhile_is_not_lost_to_old_masters() -> None:
    """Ours, torch's, ours: the current weights count, whether the weights or the optimizer are loaded first."""
    net = model(torch.bfloat16)
    mine = AdamWEMA(net.parameters(), lr=1e-4)
    run(net, mine, range(2))
    first = copy.deepcopy(mine.state_dict())
    theirs = torch.optim.AdamW(net.parameters(), fused=True)
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    for group in theirs.param_groups:
        group["lr"] = 0.1
    run(net, theirs, range(2, 4))
    other = model(torch.bfloat16)
    back = AdamWEMA(other.parameters())
    back.load_state_dict(theirs.state_dict())
    other.load_state_dict(net.state_dict())
    back.param_groups[0]["lr"] = 0.0
    run(other, back, range(1))
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(back.state[p]["master"].bfloat16(), p)
    mine.load_state_dict(first | {"param_groups": [first["param_groups"][0] | {"lr": 0.0}]})
    masters = [first["state"][i]["master"] for i in range(4)]
    for p, master in zip(net.parameters(), masters, strict=True):
        p.data.copy_(master)
    run(net, mine, range(1))
    assert all(torch.equal(mine.state[p]["master"], m) for p, m in zip(net.parameters(), masters, strict=True))


def test_the_average_warms_up_with_the_step() -> None:
    net = model()
    mine = AdamWEMA(net.parameters(), lr=0.1, ema_decay=0.2)
    expected = [p.detach().clone() for p in net.parameters()]
    for k in range(4):
        run(net, mine, range(k, k + 1))
        for average, p in zip(expected, net.parameters(), strict=True):
            average.lerp_(p.detach(), 1 - min(0.2, (1 + k) / (10 + k)))
    for average, p in zip(expected, net.parameters(), strict=True):
        torch.testing.assert_close(mine.state[p]["ema"], average, rtol=16 * EPS, atol=1.6 * EPS)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool) -> None:
    """Like torch's fused optimizer: scaled gradients, a step that overflows, a scale that decreases."""
    results = []
    for ours in (True, False):
        net = model()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer: Any = (
            AdamWEMA(net.parameters(), **OPTIONS, max_norm=0.05)
            if ours
            else torch.optim.AdamW(net.parameters(), **OPTIONS, fused=True)
        )
        if ours:  # a copy of the optimizer also gets the scale
            net, optimizer = copy.deepcopy((net, optimizer))
        for k in range(4):
            backward(net, k, scale=float(scaler.get_scale()) * (math.inf if k == 2 else 1.0))
            scaler.scale(torch.ones(()))
            if unscale or not ours:
                scaler.unscale_(optimizer)
            if not ours:
                nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((net, optimizer, scaler.get_scale()))
    close(results[0][0], results[1][0])
    assert results[0][1].skipped == 1 and results[0][2] == results[1][2] == 2.0**9
    p = next(results[0][0].parameters())
    assert results[0][1].state[p]["step"] == 3


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)], ids=str)
def test_schedulers_set_the_rate(lr: float | Tensor) -> None:
    ours, theirs = model(), model()
    rates = [lr.clone() if isinstance(lr, Tensor) else lr for _ in range(2)]
    pairs: list[tuple[nn.Module, torch.optim.Optimizer]] = [
        (ours, AdamWEMA(ours.parameters(), lr=rates[0])),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=rates[1], fused=True)),
    ]
    for net, optimizer in pairs:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for k in range(3):
            run(net, optimizer, range(k, k + 1))
            scheduler.step()
    close(ours, theirs)


def test_zeroed_gradients_keep_their_buffers() -> None:
    net, plain = model(), model()
    mine, other = AdamWEMA(net.parameters(), **OPTIONS, zero_grads=True), AdamWEMA(plain.parameters(), **OPTIONS)
    for k in range(3):
        backward(net, k)
        addresses = [p.grad.data_ptr() for p in net.parameters() if p.grad is not None]
        mine.step()
        assert [p.grad.data_ptr() for p in net.parameters() if p.grad is not None and not p.grad.any()] == addresses
    run(plain, other, range(3))
    close(net, plain, steps=0)


def test_gradients_in_another_layout_and_missing_ones() -> None:
    net, twin = model(), model()
    mine, other = (
        AdamWEMA(net.parameters(), **OPTIONS, max_norm=0.1),
        AdamWEMA(twin.parameters(), **OPTIONS, max_norm=0.1),
    )
    for k in range(2):
        backward(net, k)
        backward(twin, k)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            if p.dim() == 4:
                p.grad = p.grad.contiguous(memory_format=torch.channels_last)
        twin[2].bias.grad = net[2].bias.grad = None
        mine.step()
        other.step()
    close(net, twin, steps=0)
    assert torch.equal(net[2].bias, model()[2].bias) and net[2].bias not in mine.state


def test_a_step_without_gradients_and_a_closure() -> None:
    net = model()
    mine = AdamWEMA(net.parameters(), **OPTIONS)
    mine.step()
    assert not mine.state

    def closure() -> Tensor:
        mine.zero_grad()
        backward(net, 0)
        return torch.tensor(3.0)

    assert mine.step(closure) == 3.0 and len(mine.state) == 4


def test_the_norm_and_the_update_are_separate() -> None:
    """Two shards of a model, whose sums are added between the two calls, give the same as the whole model."""
    whole, parts = model(), model()
    mine = AdamWEMA(whole.parameters(), **OPTIONS, max_norm=0.05)
    shards = [AdamWEMA(list(parts.parameters())[i::2], **OPTIONS, max_norm=0.05) for i in range(2)]
    for k in range(2):
        run(whole, mine, range(k, k + 1))
        backward(parts, k)
        total = shards[0].square_sum() + shards[1].square_sum()
        for shard in shards:
            shard.update(total)
            shard.zero_grad()
    close(whole, parts, steps=2)


def test_torch_distributed_reads_and_writes_its_state() -> None:
    """``get_optimizer_state_dict`` steps a new optimizer with lr 0; this must not change anything."""
    net, source = model(), model()
    full = AdamWEMA(source.parameters(), **OPTIONS, ema_decay=0.9)
    run(source, full, range(2))
    fresh = AdamWEMA(net.parameters(), **OPTIONS, ema_decay=0.9)
    before = copy.deepcopy(net)
    get_optimizer_state_dict(net, fresh)
    close(net, before, steps=0)
    net.load_state_dict(source.state_dict())
    set_optimizer_state_dict(net, fresh, get_optimizer_state_dict(source, full))
    run(source, full, range(2, 4))
    run(net, fresh, range(2, 4))
    close(net, source, steps=0)
    for p, q in zip(net.parameters(), source.parameters(), strict=True):
        assert torch.equal(fresh.state[p]["ema"], full.state[q]["ema"])


def test_a_copy_of_the_optimizer_steps() -> None:
    net = model()
    mine = AdamWEMA(net.parameters(), **OPTIONS, max_norm=0.1, ema_decay=0.9)
    run(net, mine, range(1))
    twin = copy.deepcopy(mine)
    for p, q in zip(net.parameters(), twin.param_groups[0]["params"], strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(p)
    mine.step()
    twin.step()
    for p, q in zip(net.parameters(), twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_what_it_refuses() -> None:
    with pytest.raises(InputError, match=r"params\[0\]: expected dtype float32 or bfloat16 or float16, got float64"):
        AdamWEMA([torch.zeros(2, dtype=torch.float64, requires_grad=True)])
    with pytest.raises(InputError, match=r"params\[1\]: expected the device of params\[0\] \(cpu\), got meta"):
        AdamWEMA([torch.zeros(2, requires_grad=True, device=d) for d in ("cpu", "meta")])
    net = model()
    mine = AdamWEMA(net.parameters())
    for option in ("amsgrad", "maximize", "differentiable"):
        saved = torch.optim.AdamW(net.parameters(), lr=7.0, **{option: True}).state_dict()
        with pytest.raises(InputError, match=f"state_dict: expected a state without {option}"):
            mine.load_state_dict(saved)
    with pytest.raises(InputError, match=r"params\[4\]: expected dtype .*, got float64"):
        mine.add_param_group({"params": [torch.zeros(2, dtype=torch.float64, requires_grad=True)]})
    assert len(mine.param_groups) == 1 and mine.param_groups[0]["lr"] == 1e-3  # as it was
    for options, message in (({"max_norm": -1.0}, "max_norm"), ({"ema_decay": 1.5}, "ema_decay")):
        with pytest.raises(InputError, match=f"{message}: expected a number"):
            AdamWEMA(net.parameters(), **options)  # type: ignore[arg-type]
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="gradient: expected a dense tensor, got"):
        AdamWEMA(table.parameters()).step()


@pytest.mark.parametrize("way", ["constructor", "add_param_group", "assigned"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("amsgrad", True), ("maximize", True), ("differentiable", True), ("foreach", True), ("fused", False),
        ("decoupled_weight_decay", False), ("max_norm", 1.0), ("zero_grads", True), ("params", []),
    ],
)  # fmt: skip
def test_an_option_of_a_group_that_is_not_offered(option: str, value: object, way: str) -> None:
    """However the option is set, nothing is updated."""
    p, first = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    p.grad, wanted = torch.ones(3), {"params": [p], option: value}
    mine = AdamWEMA([p] if way == "assigned" else [first])
    with pytest.raises(InputError, match=rf"^param_groups\[\d\]\['{option}'\]: expected .*, got"):
        if way == "constructor":
            AdamWEMA([wanted])
        elif way == "add_param_group":
            mine.add_param_group(wanted)
        else:
            mine.param_groups[0][option] = value
            mine.step()
    assert (p == 1).all() and len(mine.param_groups) == 1


def test_how_torch_computed_is_not_taken_over() -> None:
    """State from any of torch's implementations, also from ``Adam`` (its decay is not decoupled)."""
    p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
    for options in ({"foreach": True}, {"fused": False, "capturable": True}):
        other = torch.optim.Adam([q], lr=0.1, weight_decay=0.1, **options)  # type: ignore[arg-type]
        mine, theirs = AdamWEMA([p], lr=0.5), torch.optim.AdamW([q], lr=0.5)
        for optimizer in (mine, theirs):
            optimizer.load_state_dict(other.state_dict())
        theirs.param_groups[0] |= {"foreach": False, "capturable": False}
        for _ in range(2):
            p.grad, q.grad = torch.full((3,), 0.5), torch.full((3,), 0.5)
            mine.step()
            theirs.step()
        assert mine.state_dict()["param_groups"][0]["fused"] is True
        torch.testing.assert_close(p, q, rtol=8 * EPS, atol=0)


def _sharded(rank: int, directory: str) -> None:
    """One of two processes: conv weights sharded, the linear layer replicated; compared with the whole model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = model()
    placements = [Shard(0), Shard(0), Replicate(), Replicate()]
    parts = [
        nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [how]))
        for p, how in zip(whole.parameters(), placements, strict=True)
    ]
    mine = AdamWEMA(parts, **OPTIONS, max_norm=0.05, ema_decay=0.9)
    other = AdamWEMA(whole.parameters(), **OPTIONS, max_norm=0.05, ema_decay=0.9)
    for k in range(3):
        backward(whole, k)
        for p, q, how in zip(parts, whole.parameters(), placements, strict=True):
            assert q.grad is not None
            p.grad = distribute_tensor(q.grad, mesh, [how])
        mine.step()
        other.step()
        whole.zero_grad()
    for p, q in zip(parts, whole.parameters(), strict=True):
        torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=12 * EPS, atol=0.1 * EPS)  # type: ignore[operator]
        ema = mine.state[p]["ema"].full_tensor()  # type: ignore[attr-defined]
        torch.testing.assert_close(ema, other.state[q]["ema"], rtol=12 * EPS, atol=0.1 * EPS)
    torch.distributed.destroy_process_group()


def test_shards_are_one_model(tmp_path: Path) -> None:
    as_ranks(_sharded, str(tmp_path))
