# SPDX-License-Identifier: Apache-2.0
"""``fuse`` against the models it is used on: values and gradients, and everything else as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.models.fuse import convolutional, fuse, unfuse
from fastdistill.models.taps import Taps

Inputs = dict[str, Any]


def unet(**changes: Any) -> tuple[nn.Module, Inputs]:
    options = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12, "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 900]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }  # fmt: skip
    return UNet2DConditionModel(**(options | changes)), inputs


def masked_unet() -> tuple[nn.Module, Inputs]:
    model, inputs = unet()
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    return model, inputs | {"encoder_attention_mask": keep}


def dit() -> tuple[nn.Module, Inputs]:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    model.eval()  # its label embedding drops labels at random in training
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 900]),
        "class_labels": torch.tensor([1, 7]),
    }  # fmt: skip


def pixart() -> tuple[nn.Module, Inputs]:
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=12,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 900]),
        "encoder_hidden_states": torch.randn(2, 6, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def sd3(**changes: Any) -> tuple[nn.Module, Inputs]:
    options = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
        "pooled_projection_dim": 10, "pos_embed_max_size": 8,
    }  # fmt: skip
    return SD3Transformer2DModel(**(options | changes)), {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 5, 12), "pooled_projections": torch.randn(2, 10),
    }  # fmt: skip


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "UNet2DConditionModel": unet,
    "UNet2DConditionModel, SDXL's choices": lambda: unet(
        use_linear_projection=True, resnet_time_scale_shift="scale_shift", resnet_out_scale_factor=1.5
    ),
    "UNet2DConditionModel, resampling in its resnets": lambda: unet(
        down_block_types=("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
    ),
    "UNet2DConditionModel, masked prompts": masked_unet,
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "SD3Transformer2DModel, 3.5": lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
}


@pytest.fixture(autouse=True)
def no_map_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused op at any size; by itself it leaves the maps of these models to torch on a CPU."""
    monkeypatch.setattr(convolutional, "FEW", 0)


def made(name: str) -> tuple[nn.Module, Inputs]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        with torch.no_grad():  # zeros at the start would hide what they gate
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    return model, inputs


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    floats = {k: v.to(dtype) for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return inputs | floats


def batches(inputs: Inputs, count: int = 4) -> list[Inputs]:
    """The same shapes and layouts with other values."""
    drawn = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point() and k != "timestep"}
    return [inputs | {k: torch.randn_like(inputs[k]) for k in sorted(drawn)} for _ in range(count)]


def run(model: nn.Module, inputs: list[Inputs]) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs, and every parameter's gradient of a weighted sum of each."""
    outputs, gradients = [], []
    for given in inputs:
        model.zero_grad()
        output = model(**given).sample
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        (output * weights).sum().backward()
        outputs.append(output.detach())
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
    return torch.stack(outputs), {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}


def assert_close(name: str, got: Tensor, truth: Tensor, eager: Tensor, factor: float) -> None:
    """The error's norm against float64 at most ``factor`` times the original's, or 4 eps of the norm."""
    error, own = ((t.double() - truth).norm().item() for t in (got, eager))
    bound = max(factor * own, 4 * torch.finfo(got.dtype).eps * truth.norm().item())
    assert error <= bound, f"{name}: error {error:.3e}, allowed {bound:.3e} (the original's {own:.3e})"


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
        "mid_block.resnets.0": "its activation is Mish, not SiLU",
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
    for call in (fuse, unfuse):
        with pytest.raises(InputError, match=r"model: expected a module \(of a pipeline, its unet or .*\), got dict"):
            call({"unet": None})  # type: ignore[operator]
