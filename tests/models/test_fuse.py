# SPDX-License-Identifier: Apache-2.0
"""``fuse`` compared with the original models: outputs and gradients; and nothing else changes."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import sys
from typing import Any

import pytest
import torch
import torch._inductor
import torch._inductor.config
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.models.fuse import _FORMS, convolutional, fuse, unfuse
from fastdistill.models.taps import Taps
from fastdistill.ops import (
    attention,
    cross_attention,
    geglu,
    group_norm_silu,
    layer_norm_modulate,
    residual_layer_norm_modulate,
)
from fastdistill.ops.layer_norm_modulate import layer_norm_beside
from tests.harness import assert_alike
from tests.models.fusible import LEFT, MODELS, QUICK, assert_close, batches, call, cast, made, moved, run

SLOW = pytest.mark.slow
SMALLEST = "PixArtTransformer2DModel"


@pytest.fixture(autouse=True)
def no_map_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the fused op at any size; normally, on a CPU, torch computes such small maps."""
    monkeypatch.setattr(convolutional, "FEW", 0)


UNETS = [name for name in MODELS if name.startswith("UNet")]
CASES = [
    *((name, torch.float32, "contiguous", name in QUICK) for name in MODELS),
    *((name, torch.bfloat16, "contiguous", name == UNETS[1]) for name in MODELS),
    *((name, torch.float32, "channels_last", name == UNETS[2]) for name in UNETS),
    *((name, torch.bfloat16, "channels_last", False) for name in UNETS),
    *((name, torch.float32, "small", name == UNETS[0]) for name in UNETS),
]


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [pytest.param(*case, marks=[] if quick else SLOW, id="-".join(map(str, case))) for *case, quick in CASES],
)
def test_values_and_gradients(name: str, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of outputs is at most 2x, that of each parameter's gradient 3x the original's, over four batches (a few
    numbers of one batch would be too random). ``small``: maps that torch computes on a CPU."""
    model, inputs = made(name)
    if layout == "small":
        monkeypatch.setattr(convolutional, "FEW", 64)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    given = batches(inputs)
    truth, true_gradients = run(copy.deepcopy(model).double(), [cast(i, torch.float64) for i in given])
    model, given = model.to(dtype), [cast(i, dtype) for i in given]
    eager, eager_gradients = run(model, given)
    swaps = fuse(model)
    left = {s.kind for s in swaps if not s.swapped}
    assert left == LEFT.get(name.partition(",")[0], set()) and len(swaps) >= 4, swaps
    output, gradients = run(model, given)
    assert output.stride() == eager.stride()
    changed = functools.cache(lambda: moved(made(name)[0], batches(inputs), torch.finfo(dtype).eps))
    assert_close("output", output, truth, eager, 2.0, lambda: changed()[0])
    for key, gradient in gradients.items():
        condition = functools.partial(lambda key: changed()[1][key], key)
        assert_close(key, gradient, true_gradients[key], eager_gradients[key], 3.0, condition)
    assert unfuse(model) > 0
    assert torch.equal(run(model, given)[0], eager)


@pytest.mark.parametrize("name", MODELS)
def test_everything_else_is_as_it_was(name: str) -> None:
    """Names, isinstance, pickles, copies, hooks; also after fusing twice and after undoing."""
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


#: The ops of each family's models, as in docs/fuse.md.
OPS = {
    "UNet2DConditionModel": {attention, cross_attention, geglu, group_norm_silu, residual_layer_norm_modulate},
    "DiTTransformer2DModel": {attention, layer_norm_beside, residual_layer_norm_modulate},
    "PixArtTransformer2DModel": {attention, cross_attention, layer_norm_beside, residual_layer_norm_modulate},
    "SD3Transformer2DModel, 3.5": {attention, layer_norm_modulate, residual_layer_norm_modulate},
    "FluxTransformer2DModel": {attention, layer_norm_modulate, residual_layer_norm_modulate},
    "SanaTransformer2DModel": {cross_attention, layer_norm_modulate, residual_layer_norm_modulate},
}


@pytest.mark.parametrize("name", OPS)
def test_what_is_reported_runs_fused(name: str) -> None:
    """No replaced code of diffusers is run, and the ops are."""
    model, inputs = made(name)
    swapped = {swap.name for swap in fuse(model) if swap.swapped}
    kinds = {type(module) for own, module in model.named_modules() if own in swapped}
    left = {inspect.unwrap(getattr(kind, method)).__code__ for kind in kinds for method in _FORMS[kind].methods}
    run = set()
    sys.setprofile(lambda frame, event, _: run.add(frame.f_code) if event == "call" else None)
    try:
        call(model, inputs)
    finally:
        sys.setprofile(None)
    assert all(inspect.unwrap(op).__code__ in run for op in OPS[name])
    for kind in (Upsample2D, CrossAttnUpBlock2D, UpBlock2D):  # on a CPU they are not replaced
        left.discard(inspect.unwrap(kind.forward).__code__)
    if name.startswith("Sana"):  # its other attentions are not replaced
        left.discard(inspect.unwrap(Attention.forward).__code__)
    assert kinds and not left & run


def test_taps_and_hooks_of_what_a_fused_block_computes_itself() -> None:
    """A tap inside of a block fires and gets the original's value."""
    model, inputs = made("UNet2DConditionModel")
    names = ["down_blocks.0", "down_blocks.0.resnets.0.norm2", "mid_block.attentions.0.transformer_blocks.0.norm3",
             "mid_block.attentions.0.proj_out", "down_blocks.0.attentions.0.norm"]  # fmt: skip
    features = []
    for some, given in ((model, inputs), (copy.deepcopy(model).double(), cast(inputs, torch.float64))):
        taps = Taps(some, names)
        some(**given)
        features.append(taps.features())
        if some is model:
            fuse(model)
            model(**inputs)
            features.append(taps.features())
            taps.remove()
    expected, got, truth = features
    assert_alike(got, expected, truth)


def test_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """For a model whose attention is measured at its first call, inside of a checkpoint."""
    monkeypatch.delenv("FASTDISTILL_ATTENTION")
    monkeypatch.setenv("FASTDISTILL_CACHE", str(tmp_path))
    model, inputs = made("UNet2DConditionModel")
    model.train()
    fuse(model)
    model.enable_gradient_checkpointing()  # type: ignore[operator]
    _, gradients = run(model, [inputs])
    assert (tmp_path / "attention.json").exists()
    model.disable_gradient_checkpointing()  # type: ignore[operator]
    _, expected = run(model, [inputs])
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == SMALLEST else SLOW) for n in MODELS])
def test_compiled(name: str, backend: str) -> None:
    """Compared with the original compiled by the same compiler, whose sines differ from torch's."""
    model, inputs = made(name)
    given = batches(inputs)
    truth, true_gradients = run(copy.deepcopy(model).double(), [cast(i, torch.float64) for i in given])

    def compiled() -> tuple[Tensor, dict[str, Tensor]]:
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            output, gradients = run(torch.compile(model, backend=backend), given)  # type: ignore[arg-type]
        return output, {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}

    own, own_gradients = compiled() if backend == "inductor" else run(model, given)
    fuse(model)
    output, gradients = compiled()
    assert_close("output", output, truth, own, 2.0)
    for parameter, gradient in true_gradients.items():
        assert_close(parameter, gradients[parameter], gradient, own_gradients[parameter], 3.0)


@pytest.mark.parametrize("name", [SMALLEST, pytest.param("UNet2DConditionModel", marks=SLOW)])
@pytest.mark.parametrize("packaged", [False, pytest.param(True, marks=SLOW)])
def test_exported(name: str, packaged: bool) -> None:
    """A program of torch.export that contains the fused ops, and its AOTInductor package."""
    model, inputs = made(name)
    model.eval()
    exact = call(copy.deepcopy(model).double(), cast(inputs, torch.float64))

    def exported() -> Tensor:
        with torch.no_grad():
            program = torch.export.export(model, (), inputs)
            assert fused == any("fastdistill" in str(node.target) for node in program.graph.nodes)
            run: Any = program.module()
            if packaged:
                run = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
            sample: Tensor = run(**inputs).sample
        return sample

    fused = False
    expected = exported() if packaged else call(model, inputs)
    fused = bool(fuse(model))
    assert_alike(exported(), expected, exact)


def test_what_is_left_alone_and_why() -> None:
    class Own(ResnetBlock2D):
        pass

    model, inputs = made("UNet2DConditionModel")
    expected, exact = call(model, inputs), call(copy.deepcopy(model).double(), cast(inputs, torch.float64))
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
    assert_alike(call(model, inputs), expected, exact)


@pytest.mark.usefixtures("process_group")
def test_fused_then_sharded_and_not_the_other_way() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model, inputs = made("PixArtTransformer2DModel")
    expected, exact = call(model, inputs), call(copy.deepcopy(model).double(), cast(inputs, torch.float64))
    fuse(model)
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert_alike(call(model, inputs), expected, exact)
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
