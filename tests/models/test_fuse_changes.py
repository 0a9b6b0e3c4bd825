# SPDX-License-Identifier: Apache-2.0
"""``fuse`` together with other changes of a model: the result is that of the model without ``fuse``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, LayerSkipConfig, ModelHook, apply_layer_skip
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from fastdistill.models.fuse import convolutional, fuse, unfuse
from fastdistill.ops import OPS
from tests.harness import assert_alike
from tests.models.fusible import call, cast, made, parts

NORMS = (nn.GroupNorm, nn.LayerNorm)
Change = Callable[[nn.Module], object]


@pytest.fixture(autouse=True)
def no_map_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutional, "FEW", 0)


def assert_same(name: str, change: Change, *, before: bool = False, differs: bool = True) -> list[Any]:
    """A change after (or ``before``) ``fuse`` has the same effect as without ``fuse``; returns the list of ``fuse``."""
    model, inputs = made(name)
    fused, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    plain = call(model, inputs)
    swaps = [] if before else fuse(fused)
    for some in (model, fused, exact):
        change(some)
    swaps = fuse(fused) if before else swaps
    expected = call(model, inputs)
    assert not differs or (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    assert_alike(call(fused, inputs), expected, call(exact, cast(inputs, torch.float64)), name=name)
    return swaps


def halved(norm: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = type(norm).forward(norm, *args, **kwargs) * 0.5
    return result


def patched(model: nn.Module) -> None:
    for norm in parts(model, *NORMS):
        norm.forward = functools.partial(halved, norm)


class Elsewhere(ModelHook):
    """Like offloading: the weight exists only during the norm's own forward."""

    def initialize_hook(self, module: Any) -> Any:
        self.weight, self.empty = module.weight.data, torch.full_like(module.weight.data, torch.nan)
        module.weight.data = self.empty
        return module

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        module.weight.data = self.weight
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        module.weight.data = self.empty
        return output


def offloaded(model: nn.Module) -> None:
    for norm in parts(model, *NORMS):
        if norm.weight is not None:
            HookRegistry.check_if_exists_or_initialize(norm).register_hook(Elsewhere(), "elsewhere")


def hooked(model: nn.Module) -> None:
    for norm in parts(model, *NORMS):
        norm.register_forward_hook(lambda module, args, out: out * 0.5)


def hooked_before(model: nn.Module) -> None:
    for norm in parts(model, *NORMS):
        norm.register_forward_pre_hook(lambda module, args: (args[0].roll(1, 1),))


def another_class(model: nn.Module) -> None:
    for norm in parts(model, *NORMS):
        norm.__class__ = type(
            "Own", (type(norm),), {"forward": lambda self, x: type(self).__base__.forward(self, x) / 2}
        )


def other_activation(model: nn.Module) -> None:
    for module in parts(model, nn.SiLU):
        module.forward = torch.tanh


NAMES = ["UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel, 3.5",
         "FluxTransformer2DModel", "SanaTransformer2DModel"]  # fmt: skip
CHANGES: dict[str, Change] = {f.__name__: f for f in (patched, offloaded, hooked, hooked_before, another_class)}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_norms_that_are_more_than_their_class(change: str, before: bool) -> None:
    """If changed before ``fuse``, the blocks are not replaced, and named; if changed later, they detect it."""
    swaps = assert_same(NAMES[0], CHANGES[change], before=before, differs=change != "offloaded")
    if before:
        left = [s for s in swaps if not s.swapped and s.name != "conv_norm_out"]
        assert {s.kind for s in left} == {"ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock"}
        assert all("its norm" in s.reason for s in left)
        (last,) = (s for s in swaps if s.name == "conv_norm_out")
        assert last.swapped is change.startswith("hooked")  # hooks run around it


@pytest.mark.parametrize("name", NAMES[1:])
def test_norms_of_transformers(name: str) -> None:
    assert_same(name, patched)
    assert_same(name, hooked)


def test_an_activation_of_resnets() -> None:
    assert_same(NAMES[0], other_activation)


@pytest.mark.parametrize("kind", [nn.LayerNorm, ResnetBlock2D])
def test_a_class_that_is_patched(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch affects every instance, whether it was fused before or not."""
    model, inputs = made(NAMES[0])
    fuse(model)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, *args, **kwargs: original(self, x, *args, **kwargs) * 0.5)
    got = call(model, inputs)
    unfuse(model)
    exact = call(copy.deepcopy(model).double(), cast(inputs, torch.float64))
    assert_alike(got, call(model, inputs), exact)


def test_hooks_on_all_modules() -> None:
    """Torch's global hooks are called for every norm, as without ``fuse``."""
    model, inputs = made(NAMES[0])
    seen: list[list[type]] = []
    for fused in (False, True):
        if fused:
            fuse(model)
        seen.append([])
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen[-1].append(type(m)))
        try:
            call(model, inputs)
        finally:
            handle.remove()
    assert seen[0] == seen[1] and nn.GroupNorm in seen[0]


def test_processors_set_afterwards() -> None:
    """diffusers finds its own classes; another processor is used, and torch's processor runs fused again."""
    model, inputs = made(NAMES[0])
    expected = call(model, inputs)
    fuse(model)
    assert {type(p) for p in model.attn_processors.values()} == {AttnProcessor2_0}  # type: ignore[operator, union-attr]
    counted = OPS["attention"].calls

    def attentions() -> int:
        before = counted.total()
        exact = call(copy.deepcopy(model).double(), cast(inputs, torch.float64))
        assert_alike(call(model, inputs), expected, exact)
        return counted.total() - before

    assert attentions() > 0
    model.set_default_attn_processor()  # type: ignore[operator]
    assert {type(p) for p in model.attn_processors.values()} == {AttnProcessor}  # type: ignore[operator, union-attr]
    assert attentions() == 0
    model.set_attn_processor(AttnProcessor2_0())  # type: ignore[operator]
    assert attentions() > 0


def test_a_wrapped_block() -> None:
    """A hook of diffusers around a fused block; if ``fuse`` is undone below it, the block runs its class's code."""
    model, inputs = made(NAMES[0])
    twin = copy.deepcopy(model)
    fuse(model)
    for some in (model, twin):
        for block in parts(some, ResnetBlock2D, BasicTransformerBlock):
            HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "nothing")
    calls = OPS["group_norm_silu"].calls
    before = calls.total()
    call(model, inputs)
    assert calls.total() > before
    assert unfuse(model) > 0
    before = calls.total()
    assert torch.equal(call(model, inputs), call(twin, inputs)) and calls.total() == before
    assert {s.reason for s in fuse(model) if s.kind == "ResnetBlock2D"} == {"its forward has been replaced"}


def test_layerwise_casting() -> None:
    """Float8 weights that are cast for each forward."""
    for name in (NAMES[0], NAMES[2]):
        model, inputs = made(name)
        outputs, twin = [], copy.deepcopy(model)
        fuse(twin)
        for some in (model, twin):
            some.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)  # type: ignore[operator]
            outputs.append(call(some, inputs))
        exact = copy.deepcopy(made(name)[0])
        with torch.no_grad():
            for p, q in zip(exact.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        truth = call(exact.double(), cast(inputs, torch.float64))
        assert_alike(outputs[1], outputs[0], truth, name=name)


def test_offloading_to_disk(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")

    def offload(model: nn.Module) -> None:
        cpu, folder = torch.device("cpu"), str(tmp_path / str(id(model)))
        options = {"offload_type": "leaf_level", "offload_to_disk_path": folder}
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)  # type: ignore[operator]

    assert_same(NAMES[0], offload, differs=False)


def test_what_diffusers_finds_by_class() -> None:
    for name in NAMES:
        model, _ = made(name)
        kinds = [type(m) for m in model.modules()]
        fuse(model)
        assert [type(m) for m in model.modules()] == kinds
        if name == NAMES[0]:
            model.compile_repeated_blocks(backend="eager")  # type: ignore[operator]
    assert_same(NAMES[2], lambda m: apply_layer_skip(m, LayerSkipConfig(indices=[1], fqn="transformer_blocks")))


def test_replicas_of_data_parallel() -> None:
    """Each replica runs with its own parameters."""
    model, _ = made(NAMES[0])
    fuse(model)
    block = parts(model, ResnetBlock2D)[0]
    replica = block._replicate_for_data_parallel()
    assert replica.forward.args == (replica,) and block.forward.args == (block,)
    assert replica._replicate_for_data_parallel.args == (replica,)


def test_nothing_to_fuse_is_said() -> None:
    with pytest.warns(UserWarning, match="nothing in Linear was fused .it has no ResnetBlock2D, "):
        assert fuse(nn.Linear(2, 2)) == []
    model, _ = made("PixArtTransformer2DModel")
    model.set_attn_processor(AttnProcessor())  # type: ignore[operator]
    patched(model)
    with pytest.warns(UserWarning, match="nothing in .* the forward of its norm1 has been .*; AttnProcessor: no fused"):
        assert not any(swap.swapped for swap in fuse(model))


def test_backends_and_projections_of_flux() -> None:
    """The attention backend and fused projections that a user sets in diffusers are respected."""
    model, inputs = made("FluxTransformer2DModel")
    expected, exact = call(model, inputs), call(copy.deepcopy(model).double(), cast(inputs, torch.float64))
    assert all(swap.swapped for swap in fuse(model))
    with attention_backend("_native_math"):
        assert {swap.reason for swap in fuse(model)} == {None, "its attention backend is _native_math"}
    with attention_backend("native"):  # the method also sets the default for all models
        model.set_attention_backend("_native_math")  # type: ignore[operator]
    kept = {swap.kind for swap in fuse(model) if not swap.swapped}
    assert kept == {"FluxAttnProcessor"}
    assert_alike(call(model, inputs), expected, exact)
    model.reset_attention_backend()  # type: ignore[operator]
    assert all(swap.swapped for swap in fuse(model))
    for attention in parts(model, FluxAttention):
        attention.fuse_projections()
    assert any("put together" in str(swap.reason) for swap in fuse(model))
    assert_alike(call(model, inputs), expected, exact)


def test_what_sana_has_no_op_for_is_named() -> None:
    model, _ = made("SanaTransformer2DModel")
    left = {swap.name: swap.reason for swap in fuse(model) if not swap.swapped}
    assert left == {
        f"transformer_blocks.{i}.{part}": reason
        for i in (0, 1)
        for part, reason in (
            ("attn1", "there is no op for linear attention"),
            ("ff", "there is no op for its depthwise convolution and gate"),
        )
    }
