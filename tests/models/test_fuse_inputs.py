# SPDX-License-Identifier: Apache-2.0
"""``fuse`` with all inputs that diffusers supports: every precision, autocast, and unusual inputs of single blocks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxIPAdapterAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastdistill.models.fuse import convolutional, fuse
from tests.harness import assert_alike
from tests.models.fusible import MODELS, QUICK, assert_close, call, cast, made, parts

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_map_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutional, "FEW", 0)


def keep_norms(model: nn.Module) -> nn.Module:
    for norm in parts(model, nn.GroupNorm, nn.LayerNorm):
        norm.float()
    return model


DTYPES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype, bool]] = {
    "autocast": (nn.Module.float, torch.float32, True),
    "float64": (nn.Module.double, torch.float64, False),
    "norms in float32": (lambda model: keep_norms(model.bfloat16()), torch.bfloat16, False),
    "autocast of bfloat16": (nn.Module.bfloat16, torch.bfloat16, True),
    "float16": (nn.Module.half, torch.float16, False),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else SLOW) for n in MODELS])
@pytest.mark.parametrize("how", [*list(DTYPES)[:3], *(pytest.param(h, marks=SLOW) for h in list(DTYPES)[3:])])
def test_dtypes(name: str, how: str) -> None:
    """The result has the same dtype as without ``fuse``, and the same accuracy."""
    model, inputs = made(name)
    convert, dtype, autocast = DTYPES[how]
    model, inputs = convert(model.eval()), cast(inputs, dtype)
    exact = call(copy.deepcopy(model).double(), cast(inputs, torch.float64))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = call(model, inputs)
        assert any(swap.swapped for swap in fuse(model))
        got = call(model, inputs)
    assert got.dtype == expected.dtype
    assert_close(f"{name}, {how}", got, exact, expected, 2.0)


def resnet(**options: Any) -> nn.Module:
    return ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=6, groups=4, eps=1e-5, **options)


def self_attention(**options: Any) -> nn.Module:
    options = {"query_dim": 8, "heads": 2, "dim_head": 4, "processor": AttnProcessor2_0()} | options
    return Attention(**options)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "one time embedding for all": (resnet, (randn(2, 8, 4, 4), randn(1, 6))),
    "one scale and shift for all": (
        functools.partial(resnet, time_embedding_norm="scale_shift"),
        (randn(2, 8, 4, 4), randn(1, 6)),
    ),
    "more time embeddings than maps": (resnet, (randn(1, 8, 4, 4), randn(3, 6))),
    "no prompt": (functools.partial(self_attention, cross_attention_dim=6), (randn(2, 5, 8), randn(2, 0, 6))),
    "a map": (self_attention, (randn(2, 8, 3, 3),)),
    "a map to a prompt": (
        functools.partial(self_attention, cross_attention_dim=6),
        (randn(2, 8, 3, 3), randn(2, 7, 6)),
    ),
    "a mask of each query": (self_attention, (randn(2, 5, 8), None, randn(2, 5, 5) * 9)),
    "a mask of a prompt": (
        functools.partial(self_attention, cross_attention_dim=6),
        (randn(2, 5, 8), randn(2, 7, 6), randn(2, 1, 7) * 9),
    ),
    "normalized queries": (functools.partial(self_attention, qk_norm="layer_norm"), (randn(2, 5, 8),)),
    "a residual": (
        functools.partial(self_attention, residual_connection=True, rescale_output_factor=3.0),
        (randn(2, 5, 8),),
    ),
    "SD3, one embedding for all": (
        functools.partial(JointTransformerBlock, 16, 2, 8), (randn(2, 5, 16), randn(2, 3, 16), randn(1, 16)),
    ),
    "SD3, no prompt": (
        functools.partial(JointTransformerBlock, 16, 2, 8, context_pre_only=True),
        (randn(2, 5, 16), randn(2, 0, 16), randn(2, 16)),
    ),
    "Flux, one embedding for all": (
        functools.partial(FluxTransformerBlock, 16, 2, 8), (randn(2, 5, 16), randn(2, 3, 16), randn(1, 16)),
    ),
    "Flux's single blocks, no prompt": (
        functools.partial(FluxSingleTransformerBlock, 16, 2, 8), (randn(2, 5, 16), randn(2, 0, 16), randn(2, 16)),
    ),
    "Flux, a mask": (
        functools.partial(FluxAttention, 16, 2, 8), (randn(2, 5, 16), None, randn(2, 2, 5, 5)),
    ),
    "DiT, one label for all": (
        functools.partial(BasicTransformerBlock, 16, 2, 8, norm_type="ada_norm_zero", num_embeds_ada_norm=9),
        (randn(2, 5, 16), None, None, None, torch.tensor([3]), None, torch.tensor([1])),
    ),
    "no tokens": (functools.partial(BasicTransformerBlock, 16, 2, 8), (randn(2, 0, 16),)),
}  # fmt: skip


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_diffusers_takes(name: str) -> None:
    """Single blocks with inputs that their models do not give them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = CALLS[name][0]().eval()
    args, exact = CALLS[name][1], copy.deepcopy(block).double()
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    with torch.no_grad():
        expected, truth = block(*args), exact(*wide)
        assert fuse(block)
        got = block(*args)
        assert fuse(exact) and all(map(torch.equal, tensors(exact(*wide)), tensors(truth)))
    assert_alike(*(tensors(out) for out in (got, expected, truth)), name=name)


def test_a_hook_on_normalized_queries_sees_what_it_sees_without() -> None:
    block: Any = self_attention(qk_norm="layer_norm")
    shapes: list[Any] = []
    block.norm_q.register_forward_hook(lambda module, args, out: shapes.append((args[0].shape, out.shape)))
    block(randn(2, 5, 8))
    fuse(block)
    block(randn(2, 5, 8))
    assert shapes[0] == shapes[1]


def test_a_mask_that_is_learned_has_its_gradient() -> None:
    block, grads = self_attention(cross_attention_dim=6), []
    for _ in range(2):
        mask = randn(2, 1, 7).requires_grad_()
        block(randn(2, 5, 8), randn(2, 7, 6), mask).square().sum().backward()
        grads.append(mask.grad)
        fuse(block)
    assert torch.equal(*grads)


def test_image_prompts_of_flux() -> None:
    """Its attention, with another processor, has a third output, which the block adds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = FluxTransformerBlock(16, 2, 8).eval()
        block.attn.set_processor(FluxIPAdapterAttnProcessor(16, 6, scale=[0.7]))
    exact = copy.deepcopy(block).double()
    outs = []
    with torch.no_grad():
        for some, dtype in ((block, torch.float32), (exact, torch.float64), (block, torch.float32)):
            x, context, temb, images = (randn(*s).to(dtype) for s in ((2, 5, 16), (2, 3, 16), (2, 16), (2, 4, 6)))
            outs.append(tensors(some(x, context, temb, None, {"ip_hidden_states": [images]})))
            swaps = fuse(block)
    assert {swap.kind: swap.reason for swap in swaps} == {
        "FluxTransformerBlock": None, "FluxIPAdapterAttnProcessor": "no fused form of it",
    }  # fmt: skip
    assert_alike(outs[2], outs[0], outs[1])
