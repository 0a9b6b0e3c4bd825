# SPDX-License-Identifier: Apache-2.0
"""Queries', keys' and values' weights of a frozen model side by side: the same bits, without copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.models.fuse import fuse, products
from fastdistill.models.fuse.packed import pack, side_by_side
from tests import tiny
from tests.models import tiny_families as small
from tests.models.test_float8 import predict
from tests.train.test_families import make, weights

NAMES = ["sd", "pixart_sigma", "sd3", "flux"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PLACES", {"cpu", "cuda"})


class Copies(TorchDispatchMode):
    """How often tensors of a weight's size are put together."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.found = sizes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cat.default and {id(t) for t in args[0]} <= self.sizes:
            self.found += 1
        return func(*args, **(kwargs or {}))


def copies(model: nn.Module, name: str) -> tuple[int, Tensor]:
    with Copies({id(p) for p in model.parameters()}) as mode:
        found = predict(model, name, small.bank(name))
    return mode.found, found


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_without_copies(name: str) -> None:
    model = small.model(name).eval().requires_grad_(False)
    fuse(model)
    state, own = copy.deepcopy(model.state_dict()), list(model.parameters())
    before = copies(model, name)
    assert before[0] > 0
    unpack = pack(model)
    after = copies(model, name)
    assert after[0] == 0 and torch.equal(after[1], before[1])
    assert all(p is q for p, q in zip(model.parameters(), own, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    unpack()
    again = copies(model, name)
    assert again[0] == before[0] and torch.equal(again[1], before[1])
    assert len({p.untyped_storage().data_ptr() for p in own}) == len(own)


def test_memory_is_moved_not_added(tmp_path: Path) -> None:
    """And the weights are loaded and saved as ever."""
    model: Any = small.model("pixart_sigma").eval().requires_grad_(False)
    fuse(model)
    state = copy.deepcopy(model.state_dict())
    pack(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    model.load_state_dict({key: value + 1 if value.is_floating_point() else value for key, value in state.items()})
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    for key, value in back.state_dict().items():
        assert torch.equal(value, state[key] + 1), key


def test_what_stays() -> None:
    """Trained weights, weights that are used twice, layers of another class; models that are not fused."""
    model: Any = small.model("pixart_sigma").eval().requires_grad_(False)
    pack(model)
    assert not any(_is_packed(block.attn1) for block in model.transformer_blocks)
    fuse(model)
    first, second, third, fourth = (block.attn1 for block in model.transformer_blocks)
    first.to_k.weight.requires_grad_(True)
    second.to_v.weight = third.to_v.weight
    pack(model)
    assert not any(map(_is_packed, (first, second, third))) and _is_packed(fourth)


def _is_packed(attention: Any) -> bool:
    return len({getattr(attention, n).weight.untyped_storage().data_ptr() for n in ("to_q", "to_k", "to_v")}) == 1


def test_side_by_side_is_seen() -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    parts = whole.split([1, 2, 3])
    assert side_by_side(parts).data_ptr() == whole.data_ptr() and torch.equal(side_by_side(parts), whole)
    for others in (parts[::-1], (parts[0], parts[2]), (parts[0], parts[1].clone()), (parts[0], whole[1:3, :2])):
        if others[0].shape[1:] == others[-1].shape[1:]:
            assert side_by_side(others).data_ptr() not in {t.data_ptr() for t in others}
            assert torch.equal(side_by_side(others), torch.cat(tuple(others)))
    later = whole[2:].split([2, 2])
    assert side_by_side(later).data_ptr() == later[0].data_ptr() and torch.equal(side_by_side(later), whole[2:])
    assert torch.equal(side_by_side(list(torch.arange(6).split(2))), torch.arange(6))


@pytest.mark.parametrize("options", [{}, {"teacher_fp8": True}])
def test_a_trainer_packs_its_teacher_until_it_is_closed(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("pixart_sigma", fuse=True, **options)
    teacher: Any = run.teacher
    assert _is_packed(teacher.transformer_blocks[0].attn1) != bool(options)
    assert not _is_packed(run.student.transformer_blocks[0].attn1)  # type: ignore[index, union-attr]
    run.fit()
    run.close()
    assert not _is_packed(teacher.transformer_blocks[0].attn1)
    if not options:
        monkeypatch.setattr("fastdistill.train.trainer.pack", lambda model: lambda: None)
        plain = make("pixart_sigma", fuse=True)
        plain.fit()
        assert all(torch.equal(value, plain.student.state_dict()[key]) for key, value in weights(run).items())


def test_closed_inside_of_inference_mode() -> None:
    """The weights are given back as tensors that any training can use."""
    run = make("pixart_sigma", fuse=True)
    with torch.inference_mode():
        run.close()
    assert not any(p.is_inference() for p in run.teacher.parameters())
    x = torch.ones(1, run.teacher.transformer_blocks[0].attn1.to_q.in_features)
    run.teacher.requires_grad_(True).transformer_blocks[0].attn1.to_q(x).sum().backward()


def test_not_where_nothing_is_fused() -> None:
    run = tiny.trainer()
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in run.teacher.parameters())
