# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters in a copy of the teacher that uses the teacher's own weights."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.errors import FastdistillError, InputError
from fastdistill.models import make_student
from fastdistill.models.calling import Predictor
from fastdistill.models.fuse import fuse, unfuse
from fastdistill.models.taps import Taps
from fastdistill.models.weights import storage, weights_hash
from tests import tiny
from tests.harness import EPS, assert_alike
from tests.models import tiny_families as small

peft = pytest.importorskip("peft")
NAMES = ("sd", "sd3", "pixart_sigma")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["to_q", "to_v"]} | options)


def randomized(model: nn.Module) -> nn.Module:
    """The model with random adapters that change the output."""
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    rows = {key: bank[:2] for key, bank in small.bank(name).banks.items()}
    return Predictor(model.eval())(small.cache(name).latents[:2], torch.tensor([3, 40]), rows)


def assert_equal(model: nn.Module, wanted: nn.Module, name: str) -> None:
    """The outputs are equal except for rounding, which depends on the addresses of tensors."""
    assert_alike(output(model, name), output(wanted, name), output(copy.deepcopy(wanted).double(), name))


@pytest.mark.parametrize("name", NAMES)
def test_the_student_is_the_teacher_and_adapters_beside_its_weights(name: str) -> None:
    teacher = small.model(name)
    keys, before, state = list(teacher.state_dict()), weights_hash(teacher), torch.get_rng_state()
    made = make_student(teacher, lora(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    taken = {storage(p) for p in teacher.parameters()}
    own = {n: p for n, p in made.model.named_parameters() if storage(p) not in taken}
    assert own and all("lora_" in n and p.requires_grad for n, p in own.items())
    assert not any(p.requires_grad for n, p in made.model.named_parameters() if n not in own)
    assert list(teacher.state_dict()) == keys and all(p.requires_grad for p in teacher.parameters())
    assert_equal(made.model, teacher, name)  # lora_B is zero at first
    randomized(made.model)
    assert not torch.allclose(output(made.model, name), output(teacher, name))
    assert weights_hash(teacher) == before
    assert not made.needs_adapters and len(made.student_taps) == len(made.channels)
    with Taps(made.model, made.student_taps) as taps:
        output(made.model, name)
        features = taps.features()
    assert [f.shape[2 if f.ndim == 3 else 1] for f in features] == [c for c, _ in made.channels]


def test_the_seed_decides_where_the_adapters_begin() -> None:
    teacher, found = small.model("sd3"), []
    for seed in (3, 3, 4):
        torch.rand(1)
        found.append(weights_hash(make_student(teacher, lora(), seed=seed).model))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialization_that_changes_the_weights_below_leaves_the_teachers_alone(init: str) -> None:
    teacher = small.model("sd3")
    before = weights_hash(teacher)
    student = make_student(teacher, lora(init_lora_weights=init)).model
    assert weights_hash(teacher) == before
    weights = dict(student.named_parameters())
    changed = [n for n, p in teacher.named_parameters() if n in weights and not torch.equal(weights[n], p)]
    assert not changed  # the other layers are now a base_layer
    below = weights["transformer_blocks.0.attn.to_q.base_layer.weight"]
    assert not torch.equal(below, dict(teacher.named_parameters())["transformer_blocks.0.attn.to_q.weight"])


def test_biases_that_are_trained_are_the_students_own() -> None:
    teacher = small.model("sd3")
    taken = {storage(p) for p in teacher.parameters()}
    trained = {n: p for n, p in make_student(teacher, lora(bias="all")).model.named_parameters() if p.requires_grad}
    assert any(n.endswith("bias") for n in trained) and not any(storage(p) in taken for p in trained.values())


@pytest.mark.parametrize("kind", ["LoHaConfig", "VeraConfig", "HRAConfig"])
def test_other_adapters_of_peft(kind: str) -> None:
    config = getattr(peft, kind)(r=2, target_modules=["to_q"])
    student = make_student(small.model("sd3"), config).model
    assert isinstance(student, peft.PeftModel) and any(p.requires_grad for p in student.parameters())


def test_a_mapping_describes_adapters_as_a_file_of_peft_does() -> None:
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["to_k"]}
    student = make_student(small.model("sd3"), fields).model
    found = {n: p.shape[0] for n, p in student.named_parameters() if "lora_A" in n}
    assert found and set(found.values()) == {3} and all(".to_k." in n for n in found)
    with pytest.raises(InputError, match="spec: expected fields of LoraConfig, got rank"):
        make_student(small.model("sd3"), fields | {"rank": 4})
    with pytest.raises(InputError, match="spec: expected adapters that PEFT can put into the teacher"):
        make_student(small.model("sd3"), {"peft_type": "LORE"})


def test_adapters_that_do_not_fit_are_refused() -> None:
    teacher: Any = small.model("sd3")
    with pytest.raises(InputError, match=r"spec: expected adapters that PEFT can put into the teacher, got .*nowhere"):
        make_student(teacher, lora(target_modules=["nowhere"]))
    with pytest.raises(InputError, match="init: expected 'teacher' with adapters"):
        make_student(teacher, lora(), init="random")
    teacher.add_adapter(lora(), "style")
    with pytest.raises(InputError, match=r"teacher: expected a model without adapters .*, got adapters style"):
        make_student(teacher, lora())


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FastdistillError, match=r"peft: expected to be installed .* pip install 'fastdistill\[lora\]'"):
        make_student(small.model("sd3"), {"peft_type": "LORA", "r": 2, "target_modules": ["to_q"]})


def test_a_wrapped_model_has_the_names_and_the_call_of_the_model_inside() -> None:
    plain = tiny.Net()
    wrapped = peft.get_peft_model(copy.deepcopy(plain), lora(target_modules=["prompt", "mid"]))
    x, t, rows = tiny.cache().latents[:2], torch.tensor([1, 2]), tiny.bank().rows[:2]
    with Taps(wrapped, ["mid"]) as own, Taps(plain, ["mid"]) as theirs:
        assert torch.equal(Predictor(wrapped)(x, t, rows), Predictor(plain)(x, t, rows))
        assert torch.equal(own.features()[0], theirs.features()[0])

    class Named(tiny.Net):
        def forward(self, x: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Any:
            return super().forward(x, timestep, encoder_hidden_states)

    named = peft.get_peft_model(Named(), lora(target_modules=["prompt"]))
    assert torch.equal(Predictor(named)(x, t, rows), Predictor(plain)(x, t, rows))


@pytest.mark.parametrize(("name", "after"), [("sd", True), ("sd3", False), ("pixart_sigma", False)])
def test_fused_blocks_run_the_adapters(name: str, after: bool) -> None:
    """Layers with adapters are called unchanged, whether the adapters were added before or after ``fuse``."""
    model: Any = small.model(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if after:
        fuse(model)
    model = randomized(peft.inject_adapter_in_model(lora(target_modules=layers), model))
    assert any(swap.swapped for swap in fuse(model))
    fused = output(model, name)
    assert unfuse(model)
    plain = output(model, name)
    truth = output(copy.deepcopy(model).double(), name)
    assert_alike(fused, plain, truth)
    for p in model.parameters():
        if p.requires_grad:
            p.data.zero_()
    assert (output(model, name) - plain).abs().max() > 1e3 * EPS * plain.abs().max()
