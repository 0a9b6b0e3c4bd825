# SPDX-License-Identifier: Apache-2.0
"""Students with PEFT adapters: trained on the teacher's own weights, saved without these, exported, refused."""

from __future__ import annotations

import copy
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor, nn

from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.errors import InputError, StorageError
from fastdistill.models import make_student
from fastdistill.models.families import family_of
from fastdistill.models.weights import storage, weights_hash
from fastdistill.train import DistillTrainer
from fastdistill.train.guard import NoHostSync
from fastdistill.train.state import state_of
from tests import tiny
from tests.models import tiny_families as small
from tests.models.test_peft import assert_equal, lora, output

peft = pytest.importorskip("peft")
LINEAR = {"target_modules": ["mid", "prompt"]}  # of tiny.Net


def make(name: str, student: Any = None, **options: Any) -> DistillTrainer:
    teacher = small.model(name)
    student = make_student(teacher, lora(**options.pop("lora", {}))) if student is None else student
    flow = family_of(teacher).prediction_type == "flow_prediction"
    data = {"latents": small.cache(name), "prompts": small.bank(name)}
    data["schedule"] = FlowSchedule(50, 3.0, "logit_normal") if flow else tiny.SCHEDULE
    objective = tiny.features((small.tap(name), small.tap(name)))
    return tiny.trainer(teacher, student, objective, **data, **{"lr": 1e-2} | options)


def adapted(teacher: nn.Module | None = None, **options: Any) -> nn.Module:
    """``tiny.Net`` with adapters; its weights are a copy of the teacher's."""
    torch.manual_seed(7)
    made: nn.Module = peft.get_peft_model(copy.deepcopy(teacher or tiny.Net()), lora(**LINEAR | options))
    return made


def sharing(teacher: nn.Module, **options: Any) -> nn.Module:
    """The same, with the teacher's own weights."""
    student = adapted(teacher, **options)
    weights = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        bare = name.replace("base_model.model.", "").replace("base_layer.", "")
        if bare in weights:
            p.data = weights[bare].data
    return student


def run(student: nn.Module, teacher: nn.Module | None = None, **options: Any) -> DistillTrainer:
    return tiny.trainer(teacher or tiny.Net(), student, tiny.features(("mid", "mid")), **options)


def average(trainer: DistillTrainer, averaged: bool) -> nn.Module:
    return trainer.ema_student() if averaged else copy.deepcopy(trainer.student)


@pytest.mark.parametrize(
    ("name", "options", "averaged"),
    [("sd", {"use_dora": True}, True), ("sd3", {"use_rslora": True, "lora_alpha": 3}, False)],
)
def test_a_diffusers_model_exports_what_diffusers_loads(
    name: str, options: dict[str, Any], averaged: bool, tmp_path: Path
) -> None:
    trainer = make(name, lora=options)
    before = weights_hash(trainer.teacher)
    trainer.fit()
    assert_equal(trainer.teacher, small.model(name), name)
    assert weights_hash(trainer.teacher) == before
    trainer.save_adapters(tmp_path, averaged=averaged)
    file = "pytorch_lora_weights.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [file]
    fresh: Any = small.model(name)
    part = "unet" if name == "sd" else "transformer"
    fresh.load_lora_adapter(tmp_path, weight_name=file, prefix=part)
    assert_equal(fresh, average(trainer, averaged), name)
    assert not torch.allclose(output(average(trainer, not averaged), name), output(fresh, name))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "lora_only", "target_modules": ["to_out.0"]},
        {"modules_to_save": ["conv_out"]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_pipelines_of_diffusers_refuse_is_for_peft(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make("sd", lora=options, lr=1e-3)
    trainer.fit()
    trainer.save_adapters(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    fresh = peft.PeftModel.from_pretrained(small.model("sd"), tmp_path)
    assert_equal(fresh, trainer.ema_student(), "sd")
    assert not torch.allclose(output(fresh, "sd"), output(small.model("sd"), "sd"))


def test_each_of_two_trained_adapters_is_exported_by_its_name(tmp_path: Path) -> None:
    student: Any = adapted()
    student.add_adapter("other", lora(**LINEAR))
    student.base_model.set_adapter(["default", "other"])
    trainer = run(student)
    trainer.fit()
    for name in ("default", "other"):
        trainer.save_adapters(tmp_path / name, adapter=name)
    fresh = peft.PeftModel.from_pretrained(tiny.Net(), tmp_path / "default")
    fresh.load_adapter(tmp_path / "other", "other")
    weights = dict(trainer.ema_student().named_parameters())
    found = {name: p for name, p in fresh.named_parameters() if "lora" in name}
    assert len({name.split(".")[-2] for name in found}) == 2
    assert all(torch.equal(p, weights[name]) for name, p in found.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("sd", "StableDiffusionPipeline", "unet"),
        ("sdxl", "StableDiffusionXLPipeline", "unet"),
        ("sd3", "StableDiffusion3Pipeline", "transformer"),
        ("flux", "FluxPipeline", "transformer"),
        ("sana", "SanaPipeline", "transformer"),
    ],
)
def test_pipelines_load_the_file(name: str, kind: str, part: str, tmp_path: Path) -> None:
    trainer = make(name)
    trainer.fit()
    trainer.save_adapters(tmp_path)
    pipeline = getattr(importlib.import_module("diffusers"), kind)
    parts: dict[str, Any] = dict.fromkeys(set(inspect.signature(pipeline).parameters) - {part})
    needed = {key: None for key in parts if inspect.signature(pipeline).parameters[key].default is inspect._empty}
    made = pipeline(**needed, **{part: small.model(name)})
    made.load_lora_weights(tmp_path)
    assert_equal(getattr(made, part), trainer.ema_student(), name)


@pytest.mark.parametrize("averaged", [True, False])
def test_a_model_of_peft_exports_what_peft_loads(averaged: bool, tmp_path: Path) -> None:
    trainer = make("pixart_sigma", lora={"modules_to_save": ["proj_out"]})
    trainer.fit()
    trainer.save_adapters(tmp_path, averaged=averaged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    fresh = peft.PeftModel.from_pretrained(small.model("pixart_sigma"), tmp_path)
    assert_equal(fresh, average(trainer, averaged), "pixart_sigma")
    assert not any(p.requires_grad for p in fresh.parameters())


def test_only_what_the_format_can_hold_is_exported(tmp_path: Path) -> None:
    student: Any = adapted()
    student.add_adapter("other", lora(**LINEAR))
    student.base_model.set_adapter(["default", "other"])
    trainer = run(student)
    with pytest.raises(InputError, match=r"adapter: expected the name of one adapter \(default, other\), got None"):
        trainer.save_adapters(tmp_path / "x")
    with pytest.raises(InputError, match=r"adapter: expected the name of one adapter .*, got third"):
        trainer.save_adapters(tmp_path / "x", adapter="third")
    student = adapted()
    student.base_model.model.last.requires_grad_(True)
    with pytest.raises(InputError, match=r"student: expected no trained weights but those of adapters.*last.weight"):
        run(student).save_adapters(tmp_path / "x")
    with pytest.raises(InputError, match="student: expected a model with adapters of PEFT, got Net without any"):
        tiny.trainer().save_adapters(tmp_path / "x")
    with pytest.raises(InputError, match="directory: expected the path of a file or directory, got None"):
        run(adapted()).save_adapters(None)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="expected a directory"):
        run(adapted()).save_adapters(tmp_path / "file")


class Interrupted(Exception):
    pass


def interrupt(done: int, _: object) -> None:
    if done == 2:
        raise Interrupted


def test_resume_is_exact_and_checkpoints_hold_no_frozen_weights(tmp_path: Path) -> None:
    """Also with dropout in the adapters; the continued run may have a copy of the teacher's weights."""
    teacher = tiny.Net()
    options = {"steps": 4, "checkpoint_every": 2}
    whole = run(sharing(teacher, lora_dropout=0.3), teacher, **options)
    whole.fit()
    with pytest.raises(Interrupted):
        run(sharing(tiny.Net(), lora_dropout=0.3), **options).fit(tmp_path, progress=interrupt)
    with safetensors.safe_open(tmp_path / "step-00000002.safetensors", "pt") as file:
        kept = {key for key in file.keys() if key.startswith("student.")}  # noqa: SIM118
    assert len(kept) == 4 and all("lora_" in key for key in kept)
    torch.manual_seed(8)  # the initial adapters differ, but the checkpoint replaces them
    again = run(peft.get_peft_model(tiny.Net(), lora(**LINEAR, lora_dropout=0.3)), **options)
    again.fit(tmp_path)
    states = [state_of(t.step, t.student) for t in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_another_base_or_other_adapters_are_refused(tmp_path: Path) -> None:
    run(adapted()).fit(tmp_path)
    other = tiny.Net()
    other.last.weight.data += 1
    with pytest.raises(StorageError, match=r"started differently \(adapters.base: expected '[0-9a-f]+', got \"the tea"):
        run(adapted(other)).fit(tmp_path)
    with pytest.raises(StorageError, match=r"adapters.configs.default.lora_alpha: expected 3, got nothing"):
        run(adapted(lora_alpha=3)).fit(tmp_path)
    with pytest.raises(StorageError, match=r"started differently \(adapters: expected nothing, got "):
        run(tiny.Net()).fit(tmp_path)


def test_the_base_stays_the_teachers_in_every_precision() -> None:
    teacher = tiny.Net()
    before = weights_hash(teacher)
    trainer = run(sharing(teacher), teacher, precision="bfloat16", lr=0.1)
    trainer.fit()
    places = {storage(p) for p in trainer.teacher.parameters()}
    for name, p in trainer.student.named_parameters():
        assert (storage(p) in places) == (not p.requires_grad), name
        assert p.dtype == (torch.bfloat16 if p.requires_grad else torch.float32)
    assert weights_hash(trainer.teacher) == before
    copied: Any = trainer.ema_student()
    assert not places & {storage(p) for p in copied.parameters()}
    copied.merge_and_unload()
    assert weights_hash(trainer.teacher) == before
    with pytest.raises(InputError, match="to: expected a model of its own, got one that shares"):
        trainer.ema_student(to=sharing(teacher))


def test_frozen_weights_of_the_teacher_without_peft_keep_the_precision() -> None:
    """Such layers cannot compute in two dtypes, and the teacher's weights must not change."""
    teacher, student = tiny.Net(), tiny.Net(seed=1)
    student.first = teacher.first
    teacher.first.requires_grad_(False)
    rule = "config.precision: expected float32, the dtype of the weights that the student shares with the teacher"
    with pytest.raises(InputError, match=f"{rule}, got bfloat16"):
        tiny.trainer(teacher, student, precision="bfloat16")
    trainer = tiny.trainer(teacher, student, precision="float32")
    trainer.fit()
    assert teacher.first.weight.dtype == torch.float32


def test_students_that_would_change_their_teacher_are_refused() -> None:
    teacher: Any = small.model("sd3")
    teacher.add_adapter(lora())
    rule = r"student: expected trained parameters of its own, .* \(make_student\(teacher, LoraConfig\(...\)\)"
    taps = tiny.features((small.tap("sd3"),) * 2)
    with pytest.raises(InputError, match=rule):
        tiny.trainer(teacher, teacher, taps, latents=small.cache("sd3"), prompts=small.bank("sd3"))
    net = tiny.Net()
    student = peft.get_peft_model(net, lora(**LINEAR))  # this adds the adapters to the teacher itself
    with pytest.raises(InputError, match=rule):
        run(student, net)
    with pytest.raises(InputError, match=rule):
        run(net, net)
    plain = tiny.Net()
    other = tiny.Net()
    other.load_state_dict(plain.state_dict(), assign=True)  # its own parameters, but in the teacher's memory
    with pytest.raises(InputError, match=r"student: expected trained parameters of its own, .* got the teacher's"):
        run(other, plain)


def test_adapters_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    merged: Any = adapted()
    merged.merge_adapter()
    with pytest.raises(
        InputError, match=r"student: expected adapters that are not merged into the weights .* in .*mid"
    ):
        run(merged)
    disabled: Any = adapted()
    disabled.base_model.disable_adapter_layers()
    with pytest.raises(InputError, match=r"student: expected adapters that are not disabled \(enable_adapters before"):
        run(disabled)
    adapted().save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = peft.PeftModel.from_pretrained(tiny.Net(), tmp_path)
    with pytest.raises(InputError, match=r"student: expected an adapter to train .*is_trainable=True"):
        run(loaded)
    run(peft.PeftModel.from_pretrained(tiny.Net(), tmp_path, is_trainable=True)).fit()


def moments(trainer: DistillTrainer) -> list[Tensor]:
    """The moments after one step with clipped gradients."""
    return [trainer.step.optimizer.state[p]["exp_avg"] for p in trainer.step.parameters]


@pytest.mark.parametrize("name", ["sd3", "pixart_sigma"])
def test_fused_checkpointed_and_in_parts(name: str) -> None:
    """The same gradients except for rounding: within 1e-3 of the largest; a missing layer would exceed this."""
    plain, other = make(name, steps=1), make(name, steps=1, fuse=True, gradient_checkpointing=True, micro_batch=2)
    for trainer in (plain, other):
        trainer.fit()
    largest = max(m.abs().max() for m in moments(plain))
    assert largest > 0
    for one, two in zip(moments(plain), moments(other), strict=True):
        assert (one - two).abs().max() <= 1e-3 * largest


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_bias": True}])
def test_a_step_reads_nothing_back(options: dict[str, Any]) -> None:
    """A CUDA graph requires this."""
    trainer = run(adapted(**options))
    trainer.step.prepare(0)
    trainer.step()
    with NoHostSync():
        trainer.step()
    assert int(trainer.step.counter[1]) == 2


def test_a_compiled_step_is_one_graph(counter: Any) -> None:
    """Executed without code generation, it gives the bits of the eager step."""
    runs = [run(adapted()) for _ in range(2)]
    runs[1].step.compile(backend=counter)
    for trainer in runs:
        trainer.step.prepare(0)
        trainer.step()
    assert counter.frame_count == 1
    assert all(torch.equal(one, two) for one, two in zip(*map(moments, runs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3", "pixart_sigma"])
def test_a_compiled_step_of_a_diffusers_model_is_one_graph(name: str, counter: Any) -> None:
    trainer = make(name, steps=1)
    trainer.step.compile(backend=counter)
    trainer.step.prepare(0)
    trainer.step()
    assert counter.frame_count == 1


def test_a_quantized_base_stays_as_it_is() -> None:
    """Its integers are neither cast nor stored in a checkpoint."""

    class Integers(nn.Linear):
        """Weights as int8, times a scale."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features)
            self.bias = linear.bias
            scale = linear.weight.detach().abs().max() / 127
            self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
            self.scale = float(scale)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    teacher = tiny.Net()
    teacher.prompt = Integers(teacher.prompt)
    trainer = run(adapted(teacher, target_modules=["prompt"]), teacher, precision="bfloat16")
    trainer.fit()
    below: Any = trainer.student
    assert below.base_model.model.prompt.base_layer.weight.dtype == torch.int8
    assert len(trainer.step.parameters) == 2
