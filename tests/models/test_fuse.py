# SPDX-License-Identifier: Apache-2.0
"""``fuse`` against the models it is used on: values and gradients, and everything else as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._inductor
import torch._inductor.config
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from fastdistill.errors import InputError
from fastdistill.models.fuse import convolutional, fuse, unfuse
from fastdistill.models.taps import Taps
from tests.harness import assert_alike
from tests.models.fusible import MODELS, assert_close, batches, call, cast, made, run

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_map_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused op at any size; by itself it leaves the maps of these models to torch on a CPU."""
    monkeypatch.setattr(convolutional, "FEW", 0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name: str, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs within 2x, each parameter's gradient within 3x of the original's error, over four batches: the errors of
    a few numbers of one batch would be a throw of dice."""
    model, inputs = made(name)
    if layout == "small":
        if not name.startswith("UNet") or dtype != torch.float32:
            pytest.skip("only float32 maps are left to torch")
        monkeypatch.setattr(convolutional, "FEW", 64)
    if layout == "channels_last":
        if not name.startswith("UNet"):
            pytest.skip("transformers work on tokens")
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    given = batches(inputs)
    truth, true_gradients = run(copy.deepcopy(model).double(), [cast(i, torch.float64) for i in given])
    model, given = model.to(dtype), [cast(i, dtype) for i in given]
    eager, eager_gradients = run(model, given)
    swaps = fuse(model)
    assert all(s.swapped for s in swaps) and len(swaps) >= 4, [s for s in swaps if not s.swapped]
    output, gradients = run(model, given)
    assert output.stride() == eager.stride()
    assert_close("output", output, truth, eager, 2.0)
    for parameter, gradient in gradients.items():
        assert_close(parameter, gradient, true_gradients[parameter], eager_gradients[parameter], 3.0)
    assert unfuse(model) > 0
    assert torch.equal(run(model, given)[0], eager)


@pytest.mark.parametrize("name", MODELS)
def test_everything_else_is_as_it_was(name: str) -> None:
    """Names, classes by isinstance, pickles, copies, hooks; fusing twice and undoing."""
    model, inputs = made(name)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    expected = model(**inputs).sample
    swaps = fuse(model)
    assert list(model.state_dict()) == keys and all(map(isinstance, model.modules(), kinds))
    assert fuse(model) == swaps
    fused = model(**inputs).sample
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(**inputs).sample, fused)
    assert unfuse(model) > 0 and unfuse(model) == 0
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(**inputs).sample, expected)


def test_taps_and_hooks_of_what_a_fused_block_computes_itself() -> None:
    """A tap inside of a block fires, and sees the original's value."""
    model, inputs = made("UNet2DConditionModel")
    names = ["down_blocks.0", "down_blocks.0.resnets.0.norm2", "mid_block.attentions.0.transformer_blocks.0.norm3",
             "mid_block.attentions.0.proj_out", "down_blocks.0.attentions.0.norm"]  # fmt: skip
    taps = Taps(model, names)
    model(**inputs)
    expected = taps.features()
    fuse(model)
    model(**inputs)
    for name, one, two in zip(names, taps.features(), expected, strict=True):
        torch.testing.assert_close(one, two, msg=name, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing() -> None:
    model, inputs = made("UNet2DConditionModel")
    model.train()
    fuse(model)
    _, expected = run(model, [inputs])
    model.enable_gradient_checkpointing()  # type: ignore[operator]
    _, gradients = run(model, [inputs])
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("UNet2DConditionModel", "aot_eager"),
        ("DiTTransformer2DModel", "inductor"),
        ("PixArtTransformer2DModel", "aot_eager"),
        ("SD3Transformer2DModel", "aot_eager"),
    ],
)
def test_compiled(name: str, backend: str) -> None:
    model, inputs = made(name)
    fuse(model)
    expected, gradients = run(model, [inputs])
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        got, got_gradients = run(torch.compile(model, backend=backend), [inputs])  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for one, two in zip(got_gradients.values(), gradients.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * max(1.0, float(two.abs().max())))


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", pytest.param("UNet2DConditionModel", marks=SLOW)])
@pytest.mark.parametrize("packaged", [False, pytest.param(True, marks=SLOW)])
def test_exported(name: str, packaged: bool) -> None:
    """A program of torch.export with the fused ops in it, and its package of AOTInductor."""
    model, inputs = made(name)
    model.eval()
    expected, exact = call(model, inputs), call(copy.deepcopy(model).double(), cast(inputs, torch.float64))
    fuse(model)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
        assert any("fastdistill" in str(node.target) for node in program.graph.nodes)
        run: Any = program.module()
        if packaged:
            run = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
        assert_alike(run(**inputs).sample, expected, exact)


def test_what_is_left_alone_and_why() -> None:
    class Own(ResnetBlock2D):
        pass

    model, inputs = made("UNet2DConditionModel")
    expected = model(**inputs).sample
    model.down_blocks[0].resnets[0].__class__ = Own  # type: ignore[index, union-attr]
    model.mid_block.resnets[0].nonlinearity = nn.Mish()  # type: ignore[union-attr]
    model.mid_block.attentions[0].transformer_blocks[0].attn2.processor = AttnProcessor()  # type: ignore[union-attr]
    kept = {s.name: s.reason for s in fuse(model) if not s.swapped}
    assert kept == {
        "down_blocks.0.resnets.0": "a subclass of ResnetBlock2D may do something else",
        "mid_block.resnets.0": "its nonlinearity is Mish, not SiLU",
        "mid_block.attentions.0.transformer_blocks.0.attn2": "no fused form of it",
    }
    model.mid_block.resnets[0].nonlinearity = nn.SiLU()  # type: ignore[union-attr]
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    """Residuals in float32 beside products in bfloat16."""
    for name in ("UNet2DConditionModel", "SD3Transformer2DModel", "PixArtTransformer2DModel"):
        model, inputs = made(name)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(**inputs).sample
            fuse(model)
            torch.testing.assert_close(model(**inputs).sample, expected, rtol=0.05, atol=0.05)


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_fused_then_sharded_and_not_the_other_way() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model, inputs = made("PixArtTransformer2DModel")
    fuse(model)
    expected = model(**inputs).sample
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(**inputs).sample, expected)
    with pytest.raises(
        InputError, match="model: expected a model that is not sharded yet: fuse first, then shard, got"
    ):
        fuse(model)
    wrapped, inputs = made("DiTTransformer2DModel")
    fuse(wrapped)
    parallel = nn.parallel.DistributedDataParallel(wrapped)
    parallel(**inputs).sample.sum().backward()


def test_what_is_no_module_is_refused() -> None:
    for function in (fuse, unfuse):
        with pytest.raises(InputError, match=r"model: expected a module \(of a pipeline, its unet or .*\), got dict"):
            function({"unet": None})  # type: ignore[operator]
