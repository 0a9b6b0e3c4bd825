# SPDX-License-Identifier: Apache-2.0
"""Small models of every class that ``fuse`` supports, their outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from fastdistill.models.families.flux import positions
from tests.harness import nudged

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
    model.eval()  # in training mode, its label embedding drops labels at random
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


def flux() -> tuple[nn.Module, Inputs]:
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 16, 16), "timestep": torch.tensor([0.003, 0.9]),
        "encoder_hidden_states": torch.randn(2, 5, 12), "pooled_projections": torch.randn(2, 10),
        "guidance": torch.tensor([3.5, 2.0]), "img_ids": positions(4, 4, torch.device("cpu")),
        "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def sana(**changes: Any) -> tuple[nn.Module, Inputs]:
    options = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "caption_channels": 12, "sample_size": 8,
    }  # fmt: skip
    return SanaTransformer2DModel(**(options | changes)), {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 6, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]),
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
    "FluxTransformer2DModel": flux,
    "SanaTransformer2DModel": sana,
    "SanaTransformer2DModel, 1.5": lambda: sana(qk_norm="rms_norm_across_heads"),
}
#: Parts without an op, by the start of a model's name; the rest of each model runs fused.
LEFT = {"SanaTransformer2DModel": {"SanaLinearAttnProcessor2_0", "GLUMBConv"}}
#: One block of each kind.
QUICK = {
    "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel, 3.5",
    "FluxTransformer2DModel", "SanaTransformer2DModel, 1.5",
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Inputs]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        with torch.no_grad():  # with zero gates, errors behind them would not be visible
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    return model, inputs


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    floats = {k: v.to(dtype) for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return inputs | floats


def batches(inputs: Inputs, count: int = 4) -> list[Inputs]:
    """The same shapes and layouts with other values, independent of earlier tests."""
    drawn = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point() and k != "timestep"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return [inputs | {k: torch.randn_like(inputs[k]) for k in sorted(drawn)} for _ in range(count)]


def run(model: nn.Module, inputs: list[Inputs]) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs, and the gradients of every parameter for a weighted sum of each output."""
    outputs, gradients = [], []
    for given in inputs:
        model.zero_grad()
        output = model(**given).sample
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
        (output * weights).sum().backward()
        outputs.append(output.detach())
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
    return torch.stack(outputs), {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}


_ROUNDED = ("sample", "hidden_states", "encoder_hidden_states", "pooled_projections")


def moved(model: nn.Module, inputs: list[Inputs], eps: float) -> tuple[Tensor, dict[str, Tensor]]:
    """``run`` in float64 with every weight and input changed by up to 4 eps: how far rounding of the inputs moves a
    result (its condition)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = copy.deepcopy(model).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(nudged(p, eps))
        changed = [
            {k: nudged(v, eps) if k in _ROUNDED else v for k, v in given.items()}
            for given in (cast(i, torch.float64) for i in inputs)
        ]
    return run(model, changed)


def assert_close(
    name: str, got: Tensor, truth: Tensor, eager: Tensor, factor: float, condition: Callable[[], Tensor] | None = None
) -> None:
    """The norm of the error against float64 is at most ``factor`` times the original's, or 4 eps of the norm, or the
    change caused by 4 eps of the weights and inputs (``condition``: the result after this change)."""
    error, own = ((t.double() - truth).norm().item() for t in (got, eager))
    bound = max(factor * own, 4 * torch.finfo(got.dtype).eps * truth.norm().item())
    if error > bound and condition is not None:
        bound = max(bound, (condition() - truth).norm().item())
    assert error <= bound, f"{name}: error {error:.3e}, allowed {bound:.3e} (the original's {own:.3e})"


def parts(model: nn.Module, *kinds: type) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, kinds)]


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        sample: Tensor = model(**inputs).sample
    return sample
